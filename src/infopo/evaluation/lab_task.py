"""Problems of the lab as a task: held-out questions, graded by the lab's verifier. Imports no torch."""

from collections.abc import Sequence

from infopo.errors import ConfigError
from infopo.evaluation.items import Answered, Item, Mark, Task
from infopo.lab.problems import OPERATIONS, Problem, make_problems, solve, verify

PROBLEMS = 1000
"""Number of held-out problems."""


def lab_task() -> Task:
    """Returns the task `lab`.

    Example:
        >>> lab_task().load(None)[0]
        Item(id='lab/0', prompt=[{'role': 'user', 'content': '39+69*6-70=?'}], gold='39+69*6-70=?')
    """
    # A line of a worked solution has at most 11 tokens, the answer at most 5. Slips to longer numbers add a few.
    return Task("lab", _load, {"lab": lab_marks}, max_new_tokens=11 * OPERATIONS[1] + 11)


def lab_marks(answers: Sequence[Answered]) -> list[Mark]:
    """Marks responses with `infopo.lab.verify`. A response that was cut off is wrong, whatever it says."""
    return [_mark(answered) for answered in answers]


def lab_item(problem: Problem, number: int) -> Item:
    """Returns a problem as an item. Its question is all that is needed to grade answers to it."""
    return Item(f"lab/{number}", [{"role": "user", "content": problem.question}], problem.question)


def _mark(answered: Answered) -> Mark:
    last = answered.response.rsplit("\n", 1)[-1]
    answer = last.removeprefix("Answer: ") if last.startswith("Answer: ") else None
    if not answered.finished:
        return Mark(False, answer, "unfinished")
    correct = verify(solve(answered.item.gold), answered.response)
    return Mark(correct, answer, None if answer is not None else "no answer")


def _load(data: str | None) -> list[Item]:
    if data is not None:
        raise ConfigError(f"data: the lab makes its own problems and reads no file, got {data!r}")
    return [lab_item(problem, n) for n, problem in enumerate(make_problems(PROBLEMS, 0, "evaluation"))]
