"""GSM8K, SVAMP and MATH: layouts of their data, bad rows, worked examples, and solutions right by their own rules."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infopo.errors import DataError
from infopo.evaluation.answers import numeric_marks
from infopo.evaluation.items import Answered, Item
from infopo.evaluation.math_answers import math_verify_marks
from infopo.evaluation.tasks import task

SHARED = Path(__file__).parents[2] / "shared" / "data"

GSM8K = [
    {"question": "How many?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"},
    {"question": "And now?", "answer": "#### 70,000"},
]


def test_the_layouts_of_published_data_are_read(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in GSM8K)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.json").write_text(json.dumps(GSM8K), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(GSM8K), tmp_path / "d.parquet")
    expected = [Item("gsm8k/0", "How many?", "2"), Item("gsm8k/1", "And now?", "70,000")]
    for name in ("a.jsonl", "b.jsonl.gz", "c.json", "d.parquet"):
        assert task("gsm8k").load(str(tmp_path / name)) == expected, name

    svamp = [
        {"Body": "Dan had $ 3 left", "Question": "How much?", "Answer": 51.0},
        {"Body": "It is 3.", "Question": "How much?", "Answer": "2.5"},
        {"Body": "It is 3.", "Question": "How much?", "Answer": -4},
    ]
    (tmp_path / "svamp.json").write_text(json.dumps(svamp), encoding="utf-8")
    items = task("svamp").load(str(tmp_path / "svamp.json"))
    assert [(item.prompt, item.gold) for item in items] == [
        ("Dan had $ 3 left. How much?", "51"),
        ("It is 3. How much?", "2.5"),
        ("It is 3. How much?", "-4"),
    ]

    math = [
        {"problem": "Half?", "solution": r"not \boxed{1} but $\boxed{\frac{1}{2}}$."},
        {"problem": "Half?", "solution": r"\boxed{2}", "answer": r"\frac12"},
    ]
    (tmp_path / "math.json").write_text(json.dumps(math), encoding="utf-8")
    assert [item.gold for item in task("math").load(str(tmp_path / "math.json"))] == [
        r"\frac{1}{2}",
        r"\frac12",
    ]


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        (
            "gsm8k",
            {"prompt": "How many?", "answer": "#### 2"},
            "expected a column 'question' or 'problem', got prompt, answer",
        ),
        ("gsm8k", {"question": "How many?"}, "expected a column 'answer' or 'Answer'"),
        ("gsm8k", {"question": " ", "answer": "#### 2"}, "column 'question': expected text, got ' '"),
        ("gsm8k", {"question": "How many?", "answer": "#### many"}, "expected a number, or a solution"),
        ("gsm8k", ["How many?"], "expected an object"),
        ("math", {"problem": "Half?", "solution": "one half"}, r"expected an answer in \\boxed"),
    ],
)
def test_a_bad_row_is_named_with_its_file(tmp_path: Path, name: str, row: object, problem: str) -> None:
    good = {"question": "How many?", "answer": "2"}
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(good)}\n\n{json.dumps(row)}\n", encoding="utf-8")
    with pytest.raises(DataError, match=problem) as caught:
        task(name).load(str(path))
    assert str(caught.value).startswith(f"{path}:3: ")


def test_without_the_hub_one_line_says_how_to_give_a_file() -> None:
    for name in ("gsm8k", "svamp", "math"):
        with pytest.raises(DataError, match=f"--data {name}=FILE") as caught:
            task(name).load(None)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


def test_worked_examples_are_right_by_the_rules_that_they_teach() -> None:
    for name, mark in (("gsm8k", numeric_marks), ("math", math_verify_marks)):
        examples = task(name).examples
        golds = [
            solution.rpartition("#### ")[2].rpartition("boxed{")[2].rstrip("$.") for _, solution in examples
        ]
        golds = [gold[:-1] if name == "math" else gold for gold in golds]
        answers = [
            Answered(Item("", "", gold), text) for gold, (_, text) in zip(golds, examples, strict=True)
        ]
        assert all(each.correct for each in mark(answers)), name
        assert len(examples) >= 4


@pytest.mark.parametrize(
    ("name", "file", "n"), [("gsm8k", "gsm8k/test.jsonl.gz", 1319), ("svamp", "svamp/SVAMP.json", 1000)]
)
def test_every_solution_is_right_by_every_rule(name: str, file: str, n: int) -> None:
    if not (SHARED / file).exists():
        pytest.skip("needs ../shared/data")
    subject = task(name)
    items = subject.load(str(SHARED / file))
    assert len(items) == n
    answers = [Answered(item, f"So there are {item.gold}.\n#### {item.gold}") for item in items]
    for rule in ("numeric", "lm_eval_strict", "lm_eval_flexible"):
        assert sum(mark.correct for mark in subject.rules[rule](answers)) == n, rule
    # Every tenth, since each costs milliseconds.
    assert all(mark.correct for mark in subject.rules["math_verify"](answers[::10]))
