"""Problems with many right answers: combine some numbers into a target, strictly from left to right.

The question `3 5 7>22` asks for an expression that uses each of the numbers once and comes to 22. An answer has one
operation a line, and each but the first goes on from the result before:

    3*5=15
    15+7=22

`5*3=15` with the same second line is another answer, and so is any other chain that comes to the target. How many of
the right answers a policy gives, and not only whether it gives one, is what these problems are for.
"""

import itertools
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from infopo.errors import ConfigError, DataError
from infopo.lab.problems import SPLITS, distinct, split_of

NUMBERS = 3
"""Number of numbers of a question."""

LARGEST_NUMBER = 15
MAX_VALUE = 199
FEWEST_ANSWERS = 3
"""Least number of right answers of a question."""

_QUESTION = re.compile(r"([0-9]+(?: [0-9]+)+)>([0-9]+)")
_STEP = re.compile(r"([0-9]+)([+*-])([0-9]+)=([0-9]+)")

Chain = tuple[int, tuple[tuple[str, int], ...]]
"""The first number, and the operations in order."""


@dataclass(frozen=True)
class Puzzle:
    """One question.

    Attributes:
        numbers: The numbers in the order of the question.
        target: What they are to come to.
    """

    numbers: tuple[int, ...]
    target: int

    @property
    def question(self) -> str:
        """The question, e.g. `3 5 7>22`."""
        return f"{' '.join(map(str, self.numbers))}>{self.target}"

    @property
    def answers(self) -> list[str]:
        """All right answers, as responses."""
        return sorted({written(chain) for chain in _chains(self.numbers) if value_of(chain) == self.target})


def parse(question: str) -> Puzzle:
    """Returns the puzzle that a question poses.

    Raises:
        DataError: It is no such question.

    Example:
        >>> print(parse("3 5 7>22").answers[0])
        3*5=15
        15+7=22
    """
    match = _QUESTION.fullmatch(question)
    if match is None:
        raise DataError(
            "expected a question such as '3 5 7>22'", row_id=repr(question), reason="malformed question"
        )
    return Puzzle(tuple(map(int, match[1].split())), int(match[2]))


def make_puzzles(n: int, seed: int, split: str, numbers: int = NUMBERS) -> list[Puzzle]:
    """Makes `n` different puzzles of one of the `SPLITS`, each with at least `FEWEST_ANSWERS` right answers.

    The same arguments give the same puzzles. A question is in one split, whatever the seed.

    Args:
        n: Number of puzzles.
        seed: Seed of the draws.
        split: One of `SPLITS`.
        numbers: Number of numbers of a question.

    Raises:
        ConfigError: The split is unknown, `n` is negative or more than there are, or there are fewer than two numbers.

    Example:
        >>> [puzzle.question for puzzle in make_puzzles(2, seed=0, split="evaluation")]
        ['1 8 9>0', '14 10 1>140']
    """
    if split not in SPLITS:
        raise ConfigError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    if n < 0 or numbers < 2:
        raise ConfigError(f"expected n >= 0 and at least 2 numbers, got {n} and {numbers}")
    rng = random.Random(f"expressions:{split}:{seed}:{numbers}")

    def draw() -> str | None:
        chosen = tuple(rng.randint(1, LARGEST_NUMBER) for _ in range(numbers))
        order = rng.sample(chosen, numbers)
        target = value_of((order[0], tuple((rng.choice("+-*"), value) for value in order[1:])))
        if target is None:
            return None
        puzzle = Puzzle(chosen, target)
        is_wanted = split_of(puzzle.question) == split and len(puzzle.answers) >= FEWEST_ANSWERS
        return puzzle.question if is_wanted else None

    return [parse(question) for question in distinct(n, draw)]


def chain_in(response: str) -> Chain | None:
    """Returns the chain of a well-formed response whose every step is computed right, or None.

    Example:
        >>> chain_in("3*5=15" + chr(10) + "15+7=22"), chain_in("3*5=16")
        ((3, (('*', 5), ('+', 7))), None)
    """
    first: int | None = None
    before: int | None = None
    operations = []
    for line in response.split("\n"):
        step = _STEP.fullmatch(line)
        if step is None or (before is not None and int(step[1]) != before):
            return None
        if first is None:
            first = int(step[1])
        before = _apply(step[2], int(step[1]), int(step[3]))
        if before != int(step[4]):
            return None
        operations.append((step[2], int(step[3])))
    return None if first is None else (first, tuple(operations))


def is_right(puzzle: Puzzle, response: str) -> bool:
    """Returns whether a response uses each number once, computes every step right, and comes to the target."""
    chain = chain_in(response)
    if chain is None or value_of(chain) != puzzle.target:
        return False
    return Counter([chain[0], *(value for _, value in chain[1])]) == Counter(puzzle.numbers)


def value_of(chain: Chain) -> int | None:
    """Returns what a chain comes to from left to right, or None if a value leaves [0, `MAX_VALUE`]."""
    value = chain[0]
    for operator, operand in chain[1]:
        value = _apply(operator, value, operand)
        if not 0 <= value <= MAX_VALUE:
            return None
    return value


def written(chain: Chain) -> str:
    """Returns a chain as a response, one operation a line."""
    lines, value = [], chain[0]
    for operator, operand in chain[1]:
        result = _apply(operator, value, operand)
        lines.append(f"{value}{operator}{operand}={result}")
        value = result
    return "\n".join(lines)


def _chains(numbers: Sequence[int]) -> Iterator[Chain]:
    for order in set(itertools.permutations(numbers)):
        for operators in itertools.product("+-*", repeat=len(numbers) - 1):
            yield order[0], tuple(zip(operators, order[1:], strict=True))


def _apply(operator: str, left: int, right: int) -> int:
    if operator == "+":
        return left + right
    return left - right if operator == "-" else left * right
