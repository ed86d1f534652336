"""Chained-arithmetic problems with worked solutions, and the verifier that grades answers to them.

A question such as `12+5-3*2=?` is evaluated strictly **from left to right**, without operator precedence:
12+5=17, 17-3=14, 14*2=28. The worked solution writes one operation per line and closes with the answer:

    12+5=17
    17-3=14
    14*2=28
    Answer: 28

A question has two or three operations, or as many as `make_problems` is asked for. They are sums and differences with
operands up to 99 and products with operands up to 9. Every intermediate value is within [0, 999]. A policy of a few
hundred thousand parameters learns this within minutes, and carries and products keep it fallible for most of them.

The split of a question depends on the question's own text alone (`split_of`). The problems of the supervised stage,
those of the preference stage and those held out for evaluation are therefore disjoint, whatever the seeds and sizes.
"""

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from infopo.errors import ConfigError, DataError

SPLITS = ("sft", "preference", "evaluation")

ANSWER_PREFIX = "Answer: "
MAX_VALUE = 999
OPERATIONS = (2, 3)
"""Smallest and largest number of operations of the problems that the shipped policy was trained on."""

MOST_BARREN = 20_000
"""Number of draws in a row that give nothing new, after which there is nothing more to draw."""

# Of every ten questions, five train the SFT policy, four carry preferences and one is held out.
_SPLIT_OF_BUCKET = ("sft",) * 5 + ("preference",) * 4 + ("evaluation",)

# A natural number as it is written by hand, without sign or leading zero. `\d` would match digits of any script.
_NATURAL = r"(?:0|[1-9][0-9]*)"
_INTEGER = rf"(?:{_NATURAL}|-[1-9][0-9]*)"
_OPERATION = re.compile(rf"([+*-])({_NATURAL})")
_QUESTION = re.compile(rf"({_NATURAL})((?:[+*-]{_NATURAL})+)=\?")
_STEP = re.compile(rf"({_INTEGER})([+*-])({_NATURAL})=({_INTEGER})")
_ANSWER = re.compile(rf"{ANSWER_PREFIX}({_INTEGER})")


@dataclass(frozen=True)
class Problem:
    """One question with its worked solution."""

    question: str
    """Question that the policy is asked, e.g. `12+5-3*2=?`."""
    steps: tuple[str, ...]
    """Right step lines in order, e.g. `("12+5=17", "17-3=14", "14*2=28")`."""
    answer: int
    """Value after the last step."""

    @property
    def solution(self) -> str:
        """Worked solution as a response: the steps, then the answer line."""
        return "\n".join((*self.steps, f"{ANSWER_PREFIX}{self.answer}"))


def solve(question: str) -> Problem:
    """Solves the problem that `question` poses, from left to right.

    Raises:
        DataError: the question is not a chain such as `12+5-3*2=?`.

    Example:
        >>> print(solve("12+5-3*2=?").solution)
        12+5=17
        17-3=14
        14*2=28
        Answer: 28
    """
    parsed = _QUESTION.fullmatch(question)
    if parsed is None:
        raise DataError(
            "expected a question such as '12+5-3*2=?'", row_id=repr(question), reason="malformed question"
        )
    value = int(parsed[1])
    steps = []
    for operator, operand in _OPERATION.findall(parsed[2]):
        result = _apply(operator, value, int(operand))
        steps.append(f"{value}{operator}{operand}={result}")
        value = result
    return Problem(question, tuple(steps), value)


def make_problems(n: int, seed: int, split: str, operations: tuple[int, int] = OPERATIONS) -> list[Problem]:
    """Makes `n` problems of one of the `SPLITS`, with distinct questions.

    The same arguments give the same problems, and a smaller `n` gives a prefix of a larger one. Different seeds of one
    split may share problems, different splits never do.

    Args:
        n: Number of problems.
        seed: Seed of the draws.
        split: One of `SPLITS`.
        operations: Smallest and largest number of operations of a question. A worked solution has one line for each, so
            that this is the length of responses.

    Raises:
        ConfigError: `n` is negative or more than there are, the split is unknown, or `operations` are no range from at
            least 1.

    Example:
        >>> [problem.question for problem in make_problems(2, seed=0, split="evaluation")]
        ['39+69*6-70=?', '6+68*3-45=?']
    """
    if n < 0:
        raise ConfigError(f"n: expected a number of problems of at least 0, got {n}")
    if split not in SPLITS:
        raise ConfigError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    if not 1 <= operations[0] <= operations[1]:
        raise ConfigError(f"operations: expected 1 <= smallest <= largest, got {operations}")
    # `random` hashes a string seed with SHA-512, so the three splits draw independent streams.
    rng = random.Random(f"{split}:{seed}")

    def draw() -> str | None:
        question = _draw_question(rng, operations)
        return question if split_of(question) == split else None

    return [solve(question) for question in distinct(n, draw)]


def distinct(n: int, draw: Callable[[], str | None]) -> list[str]:
    """Returns different questions in the order in which they are drawn.

    Args:
        n: Number of questions.
        draw: Returns a question, or None if what it has drawn is none that is wanted.

    Raises:
        ConfigError: `n` is more than there are.

    Example:
        >>> draws = iter(["1+1=?", None, "1+1=?", "2+1=?"])
        >>> distinct(2, lambda: next(draws))
        ['1+1=?', '2+1=?']
    """
    found: dict[str, None] = {}
    barren = 0
    while len(found) < n:
        question = draw()
        if question is not None and question not in found:
            found[question], barren = None, 0
            continue
        barren += 1
        if barren > MOST_BARREN:
            raise ConfigError(
                f"n: there are hardly more than {len(found)} such problems, expected fewer than {n}"
            )
    return list(found)


def split_of(question: str) -> str:
    """Returns the one split that `question` belongs to, which the SHA-256 of its text decides.

    Example:
        >>> split_of("12+5-3*2=?")
        'preference'
    """
    digest = hashlib.sha256(question.encode()).digest()
    return _SPLIT_OF_BUCKET[int.from_bytes(digest[:8], "big") % len(_SPLIT_OF_BUCKET)]


def verify(problem: Problem, text: str) -> bool:
    """Returns whether `text` is a well-formed solution with the right final answer.

    A well-formed solution has one line of the form `a+b=c` for each of the problem's steps, then `Answer: c`, and
    nothing else, not even white space. As in the verifiers of mathematics benchmarks, the outcome counts: a slip in a
    step is forgiven if the answer is right. `share_of_right_steps` grades the steps.

    Example:
        >>> problem = solve("1+2-3=?")
        >>> verify(problem, problem.solution), verify(problem, "Answer: 0")
        (True, False)
    """
    *steps, last = text.split("\n")
    answer = _ANSWER.fullmatch(last)
    well_formed = len(steps) == len(problem.steps) and all(map(_STEP.fullmatch, steps))
    return answer is not None and well_formed and int(answer[1]) == problem.answer


def share_of_right_steps(problem: Problem, text: str) -> float:
    """Returns the share, in [0, 1], of the solution's steps that are right in `text`.

    Step i is right if line i starts from the result that line i-1 states (from the question's first number for i = 1),
    applies the question's i-th operation, and computes it correctly. One slip therefore costs one step, not every step
    after it. A malformed line is wrong, and so is the line after it. The share is taken of the problem's steps or of
    the lines before the answer, whichever are more, so additional lines never pay.

    Example:
        >>> share_of_right_steps(solve("1+2-3=?"), "1+2=4")  # wrong, and the second step is missing
        0.0
        >>> share_of_right_steps(solve("1+2-3=?"), "1+2=4, 4-3=1".replace(", ", chr(10)))  # the second goes on from 4
        0.5
    """
    lines = text.split("\n")
    if _ANSWER.fullmatch(lines[-1]):
        lines.pop()
    before: int | None = int(re.split(r"[+*-]", problem.question, maxsplit=1)[0])
    right = 0
    for line, expected in zip(lines, problem.steps, strict=False):
        taken = _STEP.fullmatch(line)
        right += taken is not None and _continues(taken, before, expected)
        before = int(taken[4]) if taken else None
    return right / max(len(problem.steps), len(lines))


def _continues(taken: re.Match[str], before: int | None, expected: str) -> bool:
    """Returns whether a parsed step starts from `before`, does `expected`'s operation, and computes it correctly."""
    reference = _STEP.fullmatch(expected)
    assert reference is not None
    value, operator, operand, result = int(taken[1]), taken[2], int(taken[3]), int(taken[4])
    same_operation = (operator, operand) == (reference[2], int(reference[3]))
    return value == before and same_operation and _apply(operator, value, operand) == result


def _apply(operator: str, left: int, right: int) -> int:
    if operator == "+":
        return left + right
    return left - right if operator == "-" else left * right


def _draw_question(rng: random.Random, operations: tuple[int, int]) -> str:
    """Draws a random chain whose values all stay within [0, MAX_VALUE]."""
    value = rng.randint(1, 99)
    question = str(value)
    for _ in range(rng.randint(*operations)):
        operator, operand = _draw_operation(rng, value)
        value = _apply(operator, value, operand)
        question += f"{operator}{operand}"
    return f"{question}=?"


def _draw_operation(rng: random.Random, value: int) -> tuple[str, int]:
    """Draws an operation whose result is within [0, MAX_VALUE], with operands in [2, 9] for products, else [2, 99]."""
    while True:
        operator = rng.choice("+-*")
        operand = rng.randint(2, 9 if operator == "*" else 99)
        if 0 <= _apply(operator, value, operand) <= MAX_VALUE:
            return operator, operand
