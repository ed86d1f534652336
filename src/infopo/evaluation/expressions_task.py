"""Problems of the lab with many right answers as a task. Imports no torch."""

from collections.abc import Sequence

from infopo.errors import ConfigError
from infopo.evaluation.items import Answered, Item, Mark, Task
from infopo.lab.expressions import NUMBERS, Puzzle, is_right, make_puzzles, parse

PUZZLES = 200
"""Number of held-out puzzles."""


def expressions_task() -> Task:
    """Returns the task `expressions`, whose answers are compared as texts: two ways to the target are two answers.

    Example:
        >>> expressions_task().load(None)[0].gold
        '1 8 9>0'
    """
    return Task("expressions", _load, {"expressions": expression_marks}, max_new_tokens=10 * NUMBERS)


def expression_marks(answers: Sequence[Answered]) -> list[Mark]:
    """Marks responses with `infopo.lab.expressions.is_right`. A response that was cut off is wrong."""
    return [_mark(answered) for answered in answers]


def expression_item(puzzle: Puzzle, number: int) -> Item:
    """Returns a puzzle as an item."""
    return Item(f"expressions/{number}", [{"role": "user", "content": puzzle.question}], puzzle.question)


def _mark(answered: Answered) -> Mark:
    if not answered.finished:
        return Mark(False, answered.response, "unfinished")
    return Mark(is_right(parse(answered.item.gold), answered.response), answered.response)


def _load(data: str | None) -> list[Item]:
    if data is not None:
        raise ConfigError(f"data: the lab makes its own puzzles and reads no file, got {data!r}")
    return [expression_item(puzzle, n) for n, puzzle in enumerate(make_puzzles(PUZZLES, 0, "evaluation"))]
