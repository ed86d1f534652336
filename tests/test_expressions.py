"""Problems with many right answers: what is right, and that all right answers are known."""

import itertools

import pytest

from infopo.errors import ConfigError, DataError
from infopo.evaluation.expressions_task import expressions_task
from infopo.evaluation.items import Answered
from infopo.lab.expressions import (
    FEWEST_ANSWERS,
    Puzzle,
    chain_in,
    is_right,
    make_puzzles,
    parse,
    value_of,
    written,
)
from infopo.lab.problems import SPLITS


def test_the_answers_of_a_puzzle_are_all_that_are_right() -> None:
    """Each chain of the numbers, by Python's own arithmetic, one operation after the other."""
    for puzzle in make_puzzles(20, 3, "preference"):
        right = set()
        for order in itertools.permutations(puzzle.numbers):
            for operators in itertools.product("+-*", repeat=2):
                middle = eval(f"{order[0]}{operators[0]}{order[1]}")
                end = eval(f"({middle}){operators[1]}{order[2]}")
                text = f"{order[0]}{operators[0]}{order[1]}={middle}\n{middle}{operators[1]}{order[2]}={end}"
                assert is_right(puzzle, text) == (end == puzzle.target and 0 <= middle <= 199)
                if is_right(puzzle, text):
                    right.add(text)
        assert right == set(puzzle.answers)
        assert len(right) >= FEWEST_ANSWERS


@pytest.mark.parametrize(
    "response",
    [
        "",
        "22",
        "3*5=15",  # 7 is left
        "3*5=15\n15+7=23",
        "3*5=16\n16+7=23",
        "3*5=15\n14+7=21",
        "3*5=15\n15+7=22\n",
        "3*5=15\n15+7=22\n22+0=22",
        "15+7=22",
        "11*2=22",
        "3 * 5 = 15\n15+7=22",
        "3*5=15\n15+７=22",
    ],
)
def test_what_is_no_right_answer(response: str) -> None:
    assert not is_right(Puzzle((3, 5, 7), 22), response)


def test_questions_are_read_back_and_splits_share_none() -> None:
    made = {split: make_puzzles(60, 1, split) for split in SPLITS}
    questions = [{puzzle.question for puzzle in puzzles} for puzzles in made.values()]
    assert not set.intersection(*questions)
    for puzzles in made.values():
        assert [parse(puzzle.question) for puzzle in puzzles] == puzzles
    assert make_puzzles(5, 1, "sft") == made["sft"][:5]
    chain = chain_in(made["sft"][0].answers[0])
    assert chain is not None
    assert value_of(chain) == made["sft"][0].target
    assert written(chain) == made["sft"][0].answers[0]


def test_bad_arguments_are_refused() -> None:
    # There are some hundred questions with two numbers.
    for arguments in ((1, 0, "test"), (-1, 0, "sft"), (1, 0, "sft", 1), (10_000, 0, "sft", 2)):
        with pytest.raises(ConfigError):
            make_puzzles(*arguments)
    with pytest.raises(DataError, match="expected a question"):
        parse("3 5 7=22")


def test_the_task_marks_each_way_as_an_answer_of_its_own() -> None:
    task = expressions_task()
    item = task.load(None)[0]
    answers = parse(item.gold).answers
    marks = task.rules[task.headline]([Answered(item, text) for text in answers])
    assert all(mark.correct for mark in marks)
    assert len({mark.answer for mark in marks}) == len(answers)
    (cut,) = task.rules[task.headline]([Answered(item, answers[0], finished=False)])
    assert (cut.correct, cut.note) == (False, "unfinished")
