"""Published data become preference rows, every item accounted for; the real files load, and train a tiny model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infopo.cli import main
from infopo.data.counts import DataCounts
from infopo.data.sources import read_rows
from infopo.errors import DataError, RecipeError
from infopo.runs import read_run
from published_data import mbpp_rows, squality_rows
from test_real_data import RECIPE, ROOT, script
from test_sources import write_lines
from worlds import quick


def solution(task: int, text: str, is_solved: bool) -> dict[str, Any]:
    return {
        "task_id": f"MBPP/{task}",
        "prompt": f"def f{task}():\n",
        "solution": text,
        "is_solved": is_solved,
    }


SOLUTIONS = [
    solution(12, "a", True), solution(12, "b", True), solution(12, "c", False), solution(12, "a\n", True),
    solution(11, "d", True), solution(13, "e", False), solution(13, "e", True), solution(14, "f", True),
]  # fmt: skip


def code(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": f"```python\n{text}\n```"}]


def test_mbpp_solutions_become_lists_a_task(tmp_path: Path):
    converted = mbpp_rows([write_lines(tmp_path / "s.jsonl", SOLUTIONS)], tasks=range(11, 14))
    assert [(row["chosen"], row["rejected"]) for row in converted.rows] == [
        ([code("d")], []),
        ([code("a"), code("b")], [code("c")]),
    ]
    assert "def f12():" in converted.rows[1]["prompt"][0]["content"]
    assert converted.lines() == [
        "8 items, 4 used in 2 rows of shape lists",
        "  left out 2: labelled both ways, or empty",
        "  left out 1: another task",
        "  left out 1: repeated",
    ]


def test_mbpp_solutions_become_pairs_within_a_task(tmp_path: Path):
    converted = mbpp_rows([write_lines(tmp_path / "s.jsonl", SOLUTIONS)], "pairs")
    assert [(row["chosen"], row["rejected"]) for row in converted.rows] == [
        (code("a"), code("c")),
        (code("b"), code("c")),
    ]
    assert converted.items == converted.used + sum(converted.left_out.values())
    assert converted.left_out["none of the other side in its task"] == 2


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (solution(11, "a", True) | {"task_id": "11a"}, "s.jsonl:1: column 'task_id': expected MBPP/<number>"),
        (
            solution(11, "a", True) | {"is_solved": "maybe"},
            "s.jsonl:1: column 'is_solved': expected true or false",
        ),
        ({"task_id": "MBPP/11"}, "s.jsonl:1: expected a column 'solution'"),
        (3, "s.jsonl:1: expected an object"),
    ],
)
def test_solutions_that_cannot_be_used_are_named(tmp_path: Path, row: Any, match: str):
    with pytest.raises(DataError, match=match):
        mbpp_rows([write_lines(tmp_path / "s.jsonl", [row])])
    with pytest.raises(RecipeError, match="expected lists or pairs"):
        mbpp_rows([], "triples")


STORY = {
    "passage-id": "7",
    "questions": {
        "0": {
            "bart": {"response": "A", "reviews": [{"overall-rating": 10}, {"overall-rating": 20}]},
            "human": {"response": "B", "reviews": [{"overall-rating": 90}, {"overall-rating": 91}]},
        }
    },
}


def test_squality_ratings_become_mean_scores(tmp_path: Path):
    path = write_lines(tmp_path / "s.jsonl", [STORY])
    converted = squality_rows(path, {("7", "0"): "The story. What happens?"})
    assert converted.rows == [
        {"prompt": "The story. What happens?", "responses": ["A", "B"], "scores": [15.0, 90.5]}
    ]
    assert squality_rows(path).rows[0]["prompt"] == "Summarize story 7 for question 0.\n\n"
    with pytest.raises(DataError, match="question 0: column 'prompt': expected a value"):
        squality_rows(path, {})
    with pytest.raises(DataError, match="question 0: expected a column 'correctness-rating'"):
        squality_rows(path, rating="correctness-rating")


def test_the_script_writes_rows_and_says_what_it_left_out(tmp_path: Path):
    write_lines(tmp_path / "mbpp_seed_a.jsonl", SOLUTIONS)
    command = [sys.executable, str(ROOT / "scripts" / "convert_data.py"), "mbpp"]
    out = tmp_path / "out.jsonl"
    done = subprocess.run(
        [*command, tmp_path, out, "--tasks", "12-12"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("8 items, 3 used in 1 rows of shape lists\n")
    assert len(json.loads(out.read_text())["chosen"]) == 2
    failed = subprocess.run(
        [*command, tmp_path / "none.jsonl", out], capture_output=True, text=True, check=False
    )
    assert (failed.returncode, "Traceback" in failed.stderr) == (2, False)


# --- the real files ---

REAL: dict[str, tuple[str, int, dict[str, int]]] = {
    "hh_harmless/harmless-base-test.jsonl.gz": ("hh", 2303, {"no common prompt": 5, "empty chosen": 4}),
    "llamafactory/dpo_en_demo.json.gz": ("sharegpt", 300, {}),
    "llamafactory/kto_en_demo.json.gz": ("unpaired_messages", 300, {}),
    "pandalm/testset-v1.json.gz": (
        "votes", 836, {"tie": 105, "empty rejected": 51, "empty chosen": 1, "wrong type": 6},
    ),
    "mbpp lists": ("lists", 500, {}),
    "mbpp pairs": ("conversational", 334, {}),
    "squality": ("scored", 100, {}),
}  # fmt: skip
"""File -> shape, rows used, rows skipped by reason."""


def real_file(shared_data: Path, name: str, folder: Path) -> Path:
    """The file as published, or converted."""
    if "/" in name:
        return shared_data / name
    if name == "squality":
        converted = squality_rows(shared_data / "squality" / "human_eval_all_responses.jsonl.gz")
    else:
        files = sorted((shared_data / "code_mbpp").glob("mbpp_seed_*.jsonl"))
        converted = mbpp_rows(files, name.split()[1])
    assert converted.items == converted.used + sum(converted.left_out.values())
    return Path(write_lines(folder / f"{name.replace(' ', '_')}.jsonl", converted.rows))


@pytest.mark.parametrize("name", REAL)
def test_every_row_of_the_real_files_is_used_or_skipped_for_a_reason(
    shared_data: Path, tmp_path: Path, name: str
):
    path = real_file(shared_data, name, tmp_path)
    shape, used, skipped = REAL[name]
    counts = DataCounts(on_bad_row="skip")
    rows = list(read_rows(path, counts))
    assert (len(rows), dict(counts.skipped)) == (used, skipped)
    assert counts.rows == len(rows) + sum(counts.skipped.values())
    assert counts.shapes[str(path)].startswith(f"{shape} (detected)")
    assert len({row.row_id for row in rows}) == len(rows)


@pytest.mark.parametrize("name", quick(REAL, next(iter(REAL))))
def test_the_real_files_train_a_tiny_model(
    shared_data: Path,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    path = real_file(shared_data, name, tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["hh_tokenizer.py", str(path), str(tmp_path / "model"), "--vocab-size", "600"]
    )
    script("hh_tokenizer").main()
    overrides = ["data.limit=24", "train.max_steps=3", "train.logging_steps=1", "train.per_device_train_batch_size=8",
                 "train.save_strategy=no", f"model.name_or_path={tmp_path / 'model'}", f"data.path={path}",
                 # The mean over tokens has a loss whose size is known.
                 "objective.length_normalized=true", f"output_dir={tmp_path / 'run'}"]  # fmt: skip
    assert main(["train", RECIPE, *overrides]) == 0, capsys.readouterr().err
    run = read_run(tmp_path / "run")
    assert run.environment is not None
    (rows,) = run.environment["rows"]
    assert rows["rows"] == rows["used"] + sum(rows["skipped"].values())
    _, losses = run.series("loss")
    assert len(losses) == 3
    assert all(0 < loss < 20 for loss in losses)
