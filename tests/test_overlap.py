"""Overlap of training data with a task: what is found, what is not, and what it costs."""

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from infopo.cli import main
from infopo.evaluation.items import Item
from infopo.evaluation.overlap import N, overlap
from infopo.records import PreferenceRow, Text
from infopo.workflows.overlap import overlap_of_run

LONG = (
    "Janet\u2019s ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins for her "
    "friends every day with four. How much does she make?"
)
ITEMS = [Item("t/long", LONG, "18"), Item("t/short", [{"role": "user", "content": "39+69*6=?"}], "453")]


def row(prompt: Text, chosen: Text = "yes", rejected: Text = "no") -> PreferenceRow:
    return PreferenceRow(prompt, [chosen], [rejected], "pairs.jsonl:1")


def test_a_problem_is_found_whatever_its_spaces_case_and_apostrophes_form() -> None:
    for text in (
        LONG,
        LONG.replace(" ", "\n"),
        LONG.upper(),
        f"  {LONG}\n",
        LONG.replace("three", "\uff54hree"),
    ):
        for prompt in (text, [{"role": "system", "content": "Help."}, {"role": "user", "content": text}]):
            found = overlap(ITEMS, [row(prompt)])
            assert (found.exact, found.shared) == (["t/long"], ["t/long"]), text


def test_line_breaks_hide_no_piece() -> None:
    broken = "Question:\n" + LONG[:120].replace(" ", " \n ") + "\nAnswer:"
    assert overlap(ITEMS, [row(broken)]).shared == ["t/long"]
    assert overlap(ITEMS, [row("Hello", chosen=[{"role": "assistant", "content": broken}])]).shared == [
        "t/long"
    ]
    assert overlap(ITEMS, [row("Hello", rejected=broken)]).exact == []


def test_less_than_a_piece_is_not_found_and_signs_tell_problems_apart() -> None:
    words = LONG.split()
    assert overlap(ITEMS, [row(" ".join(words[: N - 2]))]).shared == []
    found = overlap(ITEMS, [row("39-69*6=?")])
    assert (found.exact, found.short) == ([], 1)
    assert overlap(ITEMS, [row("39+69*6=? ")]).exact == ["t/short"]


def test_the_record_says_what_is_not_detected() -> None:
    found = overlap(ITEMS, [row("Hello")] * 3)
    assert (found.items, found.rows) == (2, 3)
    assert "paraphrases" in found.record["not_detected"]
    assert "0 of 2 problems are among the 3 rows" in found.line("t")


def test_memory_does_not_grow_with_the_training_data() -> None:
    def rows(n: int) -> Iterator[PreferenceRow]:
        return (row(f"Problem {i}: " + "word " * 50 + str(i)) for i in range(n))

    def peak(n: int) -> int:
        tracemalloc.start()
        overlap(ITEMS, rows(n))
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(1000) < 2 * peak(100)


def test_the_data_of_a_run_are_found_by_its_recipe_and_stated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": LONG, "chosen": "18", "rejected": "9"},
        {"prompt": "x", "chosen": None, "rejected": "9"},
    ]
    data.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    recipe = {"model": "sft", "data": {"path": str(data)}, "output_dir": str(tmp_path)}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    assert overlap_of_run(str(tmp_path), {"t": ITEMS})["t"]["exact"] == ["t/long"]
    assert "t: 1 of 2 problems are among the 1 row" in capsys.readouterr().out

    data.unlink()
    assert "no such file" in overlap_of_run(str(tmp_path), {"t": ITEMS})["t"]["unknown"]
    assert "is not known" in capsys.readouterr().out
    assert overlap_of_run("lab:policy", {"t": ITEMS}) == {}


def test_check_looks_for_problems_of_tasks_in_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [
        {"prompt": f"{LONG} {i}" if i else LONG, "chosen": f"It is {i}.", "rejected": "I do not know."}
        for i in range(8)
    ]
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps(each) + "\n" for each in pairs), encoding="utf-8"
    )
    (tmp_path / "test.jsonl").write_text(
        json.dumps({"question": LONG, "answer": "#### 18"}) + "\n", encoding="utf-8"
    )
    recipe = {
        "model": "lab:policy",
        "data": {"path": str(tmp_path / "pairs.jsonl"), "cache": "off"},
        "reference": {"store": "off"},
        "output_dir": str(tmp_path / "run"),
        "train": {"probe_size": 0},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    assert main(["check", str(path), "--tasks", "gsm8k", "--data", str(tmp_path / "test.jsonl")]) == 0
    found = capsys.readouterr().out
    assert (
        "gsm8k: 1 of 1 problems are among the 8 rows of training data word for word, 1 share 13 words"
        in found
    )
    assert "  e.g. gsm8k/0" in found
    assert main(["check", str(path), "--tasks", "gms8k"]) == 2
    assert "no task 'gms8k'" in capsys.readouterr().err
