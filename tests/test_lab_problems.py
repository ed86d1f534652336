"""Laws and hand-derived values of the lab's problems and their verifier."""

import os
import subprocess
import sys

import pytest

from infopo.errors import DataError, RecipeError
from infopo.lab import SPLITS, Problem, make_problems, share_of_right_steps, solve, verify
from infopo.lab.problems import MAX_VALUE, split_of

# By hand, from left to right: 12+5 = 17, 17-3 = 14, 14*2 = 28 (with precedence it would be 12+5-6 = 11).
CHAIN = Problem("12+5-3*2=?", ("12+5=17", "17-3=14", "14*2=28"), 28)
RIGHT = "12+5=17\n17-3=14\n14*2=28\nAnswer: 28"


def test_a_chain_is_evaluated_from_left_to_right() -> None:
    assert solve("12+5-3*2=?") == CHAIN
    assert CHAIN.solution == RIGHT


def test_negative_values_are_carried_through() -> None:
    # 3-8 = -5, -5*2 = -10
    assert solve("3-8*2=?").steps == ("3-8=-5", "-5*2=-10")


@pytest.mark.parametrize("question", ["", "12=?", "12+5", "12+5=? ", "012+5=?", "12+-5=?", "12/5=?", "١+2=?"])
def test_a_malformed_question_is_refused_by_name(question: str) -> None:
    with pytest.raises(DataError, match="expected a question such as"):
        solve(question)


def test_first_problems_of_each_split_are_pinned() -> None:
    """Other seeds or another generator would silently change every result recorded with the lab."""
    assert [make_problems(1, 0, split)[0].question for split in SPLITS] == [
        "89+93+57=?",
        "42-2+45=?",
        "39+69*6-70=?",
    ]


def test_problems_depend_on_seed_and_split_alone() -> None:
    for split in SPLITS:
        assert make_problems(50, 3, split) == make_problems(50, 3, split)
        assert make_problems(50, 3, split) != make_problems(50, 4, split)


def test_fewer_problems_are_a_prefix_of_more() -> None:
    assert make_problems(200, 1, "sft")[:30] == make_problems(30, 1, "sft")


def test_splits_are_disjoint_whatever_the_seeds() -> None:
    questions = {
        split: {problem.question for seed in range(3) for problem in make_problems(500, seed, split)}
        for split in SPLITS
    }
    assert not questions["sft"] & questions["preference"]
    assert not questions["sft"] & questions["evaluation"]
    assert not questions["preference"] & questions["evaluation"]
    assert all(split_of(question) == split for split in SPLITS for question in questions[split])


def test_questions_are_distinct_and_values_stay_in_range() -> None:
    problems = make_problems(1000, 0, "preference")
    assert len({problem.question for problem in problems}) == 1000
    assert {len(problem.steps) for problem in problems} == {2, 3}
    values = [int(step.partition("=")[2]) for problem in problems for step in problem.steps]
    assert min(values) >= 0
    assert max(values) <= MAX_VALUE


def test_the_worked_solution_is_verified_and_all_its_steps_are_right() -> None:
    for split in SPLITS:
        for problem in make_problems(300, 5, split):
            assert solve(problem.question) == problem
            assert verify(problem, problem.solution)
            assert share_of_right_steps(problem, problem.solution) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Answer: 28",
        RIGHT + "\n",
        RIGHT + " ",
        " " + RIGHT,
        RIGHT.replace("\n", "\r\n"),
        RIGHT.replace("\n", "\n\n", 1),
        RIGHT.replace("Answer: 28", "Answer: 29"),
        RIGHT.replace("Answer: 28", "Answer: 028"),
        RIGHT.replace("Answer: 28", "Answer: +28"),
        RIGHT.replace("Answer: 28", "Answer: -28"),
        RIGHT.replace("Answer: 28", "Answer:28"),
        RIGHT.replace("Answer: 28", "answer: 28"),
        RIGHT.replace("Answer: 28", "Answer: ٢٨"),
        RIGHT.replace("Answer: 28", "28"),
        RIGHT.replace("12+5=17", "12+5=017"),
        RIGHT.replace("12+5=17", "12 + 5 = 17"),
        RIGHT.replace("12+5=17", "so, 12+5=17"),
        RIGHT.replace("12+5=17\n", ""),
        RIGHT.replace("14*2=28", "14*2=28\n28+0=28"),
        RIGHT + "\nAnswer: 28",
        "Answer: 28\n" + RIGHT,
        RIGHT.replace("Answer", "Answer: 28\nAnswer"),
    ],
)
def test_malformed_or_wrong_text_is_not_verified(text: str) -> None:
    assert not verify(CHAIN, text)


def test_the_verifier_judges_the_outcome_and_forgives_a_slip_on_the_way() -> None:
    assert verify(CHAIN, RIGHT.replace("17-3=14", "17-3=15"))


@pytest.mark.parametrize(
    ("text", "right_of"),
    [
        (RIGHT, (3, 3)),
        # One slip, carried on consistently, costs the one step: 12+5=18 | 18-3=15 | 15*2=30.
        ("12+5=18\n18-3=15\n15*2=30\nAnswer: 30", (2, 3)),
        # The second line does not start from the first one's 17.
        ("12+5=17\n18-3=15\n15*2=30\nAnswer: 30", (2, 3)),
        # Right arithmetic with an operation that the question does not ask for.
        ("12+5=17\n17-4=13\n13*2=26\nAnswer: 26", (2, 3)),
        ("12+5=17\n17+3=20\n20*2=40\nAnswer: 40", (2, 3)),
        # The wrong first number.
        ("13+5=18\n18-3=15\n15*2=30\nAnswer: 30", (2, 3)),
        # A malformed line is wrong and leaves the next one nothing to start from.
        ("12+5=17 \n17-3=14\n14*2=28\nAnswer: 28", (1, 3)),
        ("12+5=17\n17-3=\n17*2=34\nAnswer: 34", (1, 3)),
        # The answer line is not a step, and a text cut before it keeps its steps.
        ("12+5=17\n17-3=14", (2, 3)),
        ("12+5=17\n17-3=14\n14*2=28", (3, 3)),
        # Four lines before the answer: the share is of four.
        ("12+5=17\n17-3=14\n14*2=28\n28+0=28\nAnswer: 28", (3, 4)),
        ("12+5=17\n12+5=17\n17-3=14\n14*2=28\nAnswer: 28", (1, 4)),
        ("Answer: 28", (0, 3)),
        ("", (0, 3)),
    ],
)
def test_share_of_right_steps_by_hand(text: str, right_of: tuple[int, int]) -> None:
    right, of = right_of
    assert share_of_right_steps(CHAIN, text) == pytest.approx(right / of, abs=1e-15)


def test_bad_arguments_are_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="n: expected"):
        make_problems(-1, 0, "sft")
    with pytest.raises(RecipeError, match="split: expected one of sft, preference, evaluation"):
        make_problems(1, 0, "train")
    with pytest.raises(RecipeError, match="operations: expected 1 <= smallest <= largest"):
        make_problems(1, 0, "sft", operations=(3, 2))
    assert make_problems(0, 0, "sft") == []


def test_problems_import_neither_torch_nor_transformers() -> None:
    code = "import sys, infopo.lab, infopo.lab.problems; print({'torch', 'transformers'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert result.stdout.strip() == "set()"


def test_more_operations_make_longer_solutions_of_the_same_split() -> None:
    problems = make_problems(50, seed=3, split="preference", operations=(10, 12))
    assert {len(problem.steps) for problem in problems} == {10, 11, 12}
    assert all(split_of(problem.question) == "preference" for problem in problems)
    assert all(verify(problem, problem.solution) for problem in problems)
