"""Answers that are expressions: math-verify in processes that end, and the text of the last box."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from infopo.evaluation import math_answers
from infopo.evaluation.items import Answered, Item, Mark
from infopo.evaluation.math_answers import (
    FAILED,
    TIME_OUT,
    boxed_marks,
    lm_eval_hendrycks_marks,
    math_verify_marks,
)

RIGHT = [
    (r"\frac{1}{2}", r"The answer is $\boxed{\frac{2}{4}}$."),
    ("0.5", r"\boxed{\dfrac12}"),
    ("x^2+1", r"so $f(x) = \boxed{1+x^2}$"),
    ("(3,4)", r"\boxed{(3, 4)}"),
    (r"\text{Friday}", r"\boxed{\text{Friday}}"),
    ("18", "She makes 18 dollars.\n#### 18"),
    ("1234", "#### 1,234"),
    ("-5", "The answer is \u22125."),
    ("50", r"The answer is $50\%$."),
    (r"50\%", r"\boxed{50}"),
    ("50", "It is 50 percent."),
]
WRONG = [("0.5", "50%"), ("0.5", "50 percent"), ("5", "The answer is \u22125."), ("18", "19"), ("18", "")]


def test_expressions_are_compared_outside_of_the_main_thread_too() -> None:
    answers = [Answered(Item("math/0", "?", gold), response) for gold, response in RIGHT + WRONG]
    with ThreadPoolExecutor(1) as pool:
        marks = pool.submit(math_verify_marks, answers).result()
    assert [mark.correct for mark in marks] == [True] * len(RIGHT) + [False] * len(WRONG)
    assert marks[-1] == Mark(False, None, "no answer")


def test_a_comparison_that_hangs_or_dies_costs_its_own_mark_only() -> None:
    def work(job: tuple[str, str]) -> Mark:
        match job[1]:
            case "hang":
                time.sleep(60)
            case "die":
                os._exit(1)
            case "raise":
                raise ValueError("no")
            case "memory":
                bytearray(2**33)
        return Mark(True, job[1])

    whats = ["a", "hang", "b", "die", "c", "raise", "d", "memory", "e"]
    marks = list(math_answers._in_processes(work, [("", what) for what in whats], 1.0))
    assert [mark.answer for mark in marks] == ["a", None, "b", None, "c", None, "d", None, "e"]
    notes = [mark.note for mark in marks if mark.note]
    assert notes == [TIME_OUT, FAILED, f"{FAILED} (ValueError)", f"{FAILED} (MemoryError)"]


@pytest.mark.long
def test_a_tower_of_powers_takes_neither_the_machine_nor_the_others() -> None:
    responses = [r"\boxed{10^{10^{10^{10}}}}", r"\boxed{9^{9^{9^9}}+1}", r"\boxed{18}"]
    marks = math_verify_marks([Answered(Item("math/0", "?", "18"), response) for response in responses])
    assert [mark.correct for mark in marks] == [False, False, True]


def test_texts_of_boxes_are_compared_as_math_was_published() -> None:
    pairs = [
        (r"\frac{1}{2}", r"so \boxed{\frac12}", True),
        ("10", r"\boxed{5} and \boxed{10\%}", True),
        ("2", r"\boxed{4/2}", False),
        ("2", "It is $2$.", False),
    ]
    answers = [Answered(Item("math/0", "?", gold), response) for gold, response, _ in pairs]
    assert [mark.correct for mark in boxed_marks(answers)] == [right for *_, right in pairs]
    # The harness takes what stands between the dollar signs, and the whole response if there are none.
    assert [mark.correct for mark in lm_eval_hendrycks_marks(answers)] == [False, False, False, True]


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_answers, "find_spec", lambda name: None)
    for rule in (math_verify_marks, boxed_marks, lm_eval_hendrycks_marks):
        with pytest.raises(math_answers.ConfigError, match=r"pip install 'infopo\[eval\]'"):
            rule([])
