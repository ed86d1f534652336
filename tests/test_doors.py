"""Sources beyond one file: globs, folders, CSV, streams, several sources with weights."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given
from hypothesis import strategies as st

from infopo import InfoPOConfig, InfoPOTrainer
from infopo.build import build_examples, build_tokenizer
from infopo.config import parse_recipe
from infopo.data.counts import DataCounts
from infopo.data.sources import read_mixture, read_rows
from infopo.errors import DataError, RecipeError
from infopo.records import PreferenceRow
from test_sources import (
    CONVERSATIONAL,
    SHAREGPT,
    STANDARD,
    UNPAIRED,
    compress,
    read,
    write_lines,
    write_parquet,
)
from worlds import quick


def pairs(n: int, first: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"{i}+1=", "chosen": f"{i + 1}", "rejected": f"{i}"} for i in range(first, first + n)]


# --- globs and folders ---


def test_a_glob_is_its_files_in_order_each_row_under_its_files_name(tmp_path: Path):
    write_lines(tmp_path / "b.jsonl", pairs(1, first=2))
    write_lines(tmp_path / "a.jsonl.gz", pairs(2))
    write_parquet(tmp_path / "c.parquet", pairs(1, first=3))
    (tmp_path / "notes.txt").write_text("none")
    rows, counts = read(f"{tmp_path}/[abc].*")
    assert [row.row_id for row in rows] == [
        f"{tmp_path}/{name}" for name in ("a.jsonl.gz:1", "a.jsonl.gz:2", "b.jsonl:1", "c.parquet:1")
    ]
    assert (counts.rows, counts.source) == (4, f"{tmp_path}/[abc].*")
    with pytest.raises(DataError, match=r"notes\.txt: expected a file that ends in"):
        read(f"{tmp_path}/*")
    with pytest.raises(DataError, match=r"d\*: no file matches"):
        read(f"{tmp_path}/d*")


def test_files_of_one_glob_must_have_one_shape(tmp_path: Path):
    write_lines(tmp_path / "a.jsonl", [STANDARD])
    second = write_lines(tmp_path / "b.jsonl", [UNPAIRED])
    with pytest.raises(DataError) as caught:
        read(f"{tmp_path}/*.jsonl")
    assert caught.value.row_id == f"{second}:1"


def test_a_folder_is_its_data_files_whatever_else_lies_there(tmp_path: Path):
    (tmp_path / "README.md").write_text("none")
    (tmp_path / "deep").mkdir()
    write_lines(tmp_path / "a.jsonl", pairs(1))
    write_lines(tmp_path / "deep" / "b.jsonl", pairs(1, first=1))
    rows, _ = read(tmp_path)
    assert [row.row_id for row in rows] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/deep/b.jsonl:1"]


def test_files_named_by_split_are_read_by_split_as_on_the_hub(tmp_path: Path):
    for split in ("train", "test"):
        write_lines(tmp_path / f"{split}.jsonl", pairs(1))
    for split in ("train", "test"):
        assert [row.row_id for row in read(tmp_path, split=split)[0]] == [f"{tmp_path}/{split}.jsonl:1"]
    with pytest.raises(DataError, match="no files of the split 'dev'; by their names there are train, test"):
        read(tmp_path, split="dev")


# --- CSV ---


def test_csv_rows_are_named_by_position_and_cells_may_hold_anything(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_bytes('﻿prompt,chosen,rejected,extra\r\n"a, ""b""\nc",1,2,\r\n\r\nd,"é",f,\r\n'.encode())
    rows, counts = read(path)
    assert [(row.prompt, row.chosen, row.row_id) for row in rows] == [
        ('a, "b"\nc', ["1"], f"{path}:1"),
        ("d", ["é"], f"{path}:2"),
    ]
    assert counts.rows == 2


def test_bad_rows_of_csv_are_named(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"chosen,rejected,prompt\na,b\na,b\xe9,c\na,b,c,d\na,b,c\n")
    rows, counts = read(path, skip=True)
    assert [row.row_id for row in rows] == [f"{path}:4"]
    assert counts.skipped == {"invalid CSV": 2, "invalid UTF-8": 1}
    assert counts.first_skipped["invalid CSV"].startswith(
        f"{path}:1: expected 3 cells, as in the header, got 2"
    )
    assert counts.first_skipped["invalid UTF-8"].startswith(f"{path}:2: column 'rejected'")


def test_a_long_cell_is_read(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text(f"prompt,chosen,rejected\na,{'b' * 200_000},c\n")
    assert len(read(path)[0][0].chosen[0]) == 200_000


# --- streams ---


def test_a_stream_is_read_row_by_row():
    taken = []

    def rows() -> Any:
        for i, row in enumerate(pairs(100)):
            taken.append(i)
            yield row

    stream = read_rows(IterableDataset.from_generator(rows), DataCounts(source="s"))
    assert [next(stream).row_id for _ in range(2)] == ["s:1", "s:2"]
    assert len(taken) == 2


def test_a_stream_that_breaks_off_is_named_by_row():
    def rows() -> Any:
        yield STANDARD
        raise OSError("connection lost")

    with pytest.raises(DataError, match="dataset:1: the stream broke off after this row: connection lost"):
        read(IterableDataset.from_generator(rows))


@pytest.mark.parametrize("file", quick(["rows.jsonl", "rows.jsonl.zst", "rows.csv"], "rows.jsonl"))
def test_files_are_read_in_constant_memory(tmp_path: Path, file: str):
    """The first row comes out though the end of the file cannot be read."""
    broken = b"\xff" * 50
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in pairs(30_000))
    if file == "rows.csv":
        content = b"prompt,chosen,rejected\n" + b"a,b,c\n" * 30_000 + b'"'
    else:
        content = compress(lines, Path(file).suffix)[:-30] + (b"" if file.endswith("zst") else broken)
    (tmp_path / file).write_bytes(content)
    rows = read_rows(tmp_path / file, DataCounts())
    assert next(rows).row_id == f"{tmp_path / file}:1"
    with pytest.raises(DataError):
        list(rows)


# --- several sources ---


def source(name: str, n: int) -> tuple[str, Any]:
    return name, (PreferenceRow("p", ["c"], ["r"], f"{name}:{i + 1}") for i in range(n))


def test_without_weights_all_rows_of_all_sources_come_in_order():
    counts = DataCounts()
    rows = [row.row_id for row in read_mixture([source("a", 2), source("b", 3)], None, counts)]
    assert rows == ["a:1", "a:2", "b:1", "b:2", "b:3"]
    assert counts.notes == {"row from a": 2, "row from b": 3}


@given(st.lists(st.sampled_from([0.5, 1, 2, 3.5]), min_size=1, max_size=4), st.integers(1, 60))
def test_every_beginning_of_a_mixture_has_the_shares_to_within_a_row_and_no_row_comes_twice(
    weights: list[float], n: int
):
    rows = read_mixture([source(str(i), n) for i in range(len(weights))], weights, DataCounts())
    taken = Counter[int]()
    seen = set()
    for length, row in enumerate(rows, 1):
        assert row.row_id not in seen
        seen.add(row.row_id)
        taken[int(row.row_id.split(":")[0])] += 1
        for i, weight in enumerate(weights):
            assert abs(taken[i] - length * weight / sum(weights)) <= len(weights)
    assert max(taken.values()) == n  # it ended because a source had run out


LAB = "model: {name_or_path: lab:policy}\noutput_dir: out\ndata: {max_length: 128, path: %s}\n"


def examples(path: Any, **settings: Any) -> tuple[Any, DataCounts]:
    recipe = parse_recipe(
        LAB % json.dumps(path), source="r", overrides=[f"data.{k}={v}" for k, v in settings.items()]
    )
    return build_examples(recipe.data, build_tokenizer(recipe))


def test_a_recipe_mixes_files_of_different_shapes(tmp_path: Path):
    a = write_lines(tmp_path / "a.jsonl", pairs(8))
    b = write_lines(tmp_path / "b.jsonl", [UNPAIRED | {"prompt": "1+1=", "completion": "2"}] * 4)
    dataset, counts = examples([a, b])
    assert len(dataset) == 12
    assert counts.source == f"{a} + {b}"
    dataset, counts = examples({a: 3, b: 1})
    assert [row.startswith(a) for row in dataset.row_ids[:8]].count(True) == 6
    assert counts.rows == counts.used + sum(counts.skipped.values())
    assert counts.shapes[a].startswith("standard (detected)")
    assert counts.shapes[b].startswith("unpaired (detected)")
    assert "  shape of " + b + ": unpaired (detected): prompt, completion" in "\n".join(counts.lines())


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.path={a.jsonl: 0}", "data.path (override): a.jsonl: expected a weight > 0, got 0"),
        ("data.path=[]", "data.path (override): is empty; expected at least one source"),
        (
            "data.path={a.jsonl: many}",
            "data.path (override): expected text or a list of texts or a mapping to numbers",
        ),
        ("data.score_rule=best", "data.score_rule (override): expected one of best-worst"),
        ("data.score_rule=threshold", "data.score_threshold (line 3): goes with score_rule: threshold"),
        ("data.score_threshold=3", "data.score_threshold (override): goes with score_rule: threshold"),
        ("data.on_too_long=keep", "data.on_too_long (override): expected one of cut, drop"),
        ("data.streaming=true", "data.streaming (override): needs train.max_steps: how many rows there are"),
    ],
)
def test_settings_of_the_data_that_cannot_be_are_refused(override: str, expected: str):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(LAB % "a.jsonl", source="r", overrides=[override])
    assert any(problem.startswith(expected) for problem in caught.value.problems), caught.value.problems


def test_a_named_shape_and_a_rule_reach_the_rows(tmp_path: Path):
    rows = [{"prompt": "1+1=", "responses": ["3", "2", "4"], "scores": [0, 9, 1]}]
    path = write_lines(tmp_path / "scored.jsonl", rows)
    dataset, counts = examples(path, shape="scored", score_rule="best-rest")
    assert len(dataset[0].rejected_ids) == 2
    assert counts.shapes[path].startswith("scored (named)")
    assert len(examples(path)[0][0].rejected_ids) == 1
    one_sided, _ = examples(path, score_rule="threshold", score_threshold=-1)
    assert (len(one_sided[0].chosen_ids), len(one_sided[0].rejected_ids)) == (3, 0)


def test_rows_that_are_too_long_can_be_left_out_and_are_counted(tmp_path: Path):
    long = {"prompt": "1" * 20, "chosen": "2" * 20, "rejected": "3"}
    path = write_lines(tmp_path / "a.jsonl", [*pairs(2), long])
    cut, counts = examples(path, max_length=24)
    assert (len(cut), counts.notes["response cut"]) == (3, 1)
    kept, counts = examples(path, max_length=24, on_too_long="drop")
    assert (len(kept), counts.skipped) == (2, {"too long": 1})
    assert counts.first_skipped["too long"].startswith(
        f"{path}:3: the prompt with its longest response has 42 tokens"
    )
    _, counts = examples(path, max_prompt_length=10, on_too_long="drop")
    assert counts.first_skipped["too long"].startswith(
        f"{path}:3: the prompt has 21 tokens, more than max_prompt_length=10"
    )


def test_sharegpt_and_messages_are_told_apart(tmp_path: Path):
    for row, shape in ((SHAREGPT, "sharegpt"), (CONVERSATIONAL, "conversational")):
        _, counts = read(write_lines(tmp_path / "x.jsonl", [row]))
        assert next(iter(counts.shapes.values())).startswith(f"{shape} (detected)")


def test_a_constructor_prints_nothing_and_warns_of_rows_that_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": f"{i}", "chosen": "a", "rejected": "b"} for i in range(3)]
    args = InfoPOConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", reference_store="off", on_bad_row="skip"
    )
    trainer = InfoPOTrainer(
        "lab:policy",
        args=args,
        train_dataset=Dataset.from_list([*rows, {"prompt": "x", "chosen": None, "rejected": "b"}]),
        eval_dataset={"few": Dataset.from_list(rows)},
    )
    assert capsys.readouterr().out == ""
    used = {name: (counts.rows, counts.used) for name, counts in trainer.data_counts.items()}
    assert used == {"train": (4, 3), "few": (3, 3)}
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert any(message.startswith("train_dataset: 4 rows, 3 used, 1 skipped") for message in warned)
    assert trainer.description()[0].startswith("objective: InfoPO (")
    assert args.dataloader_pin_memory == torch.accelerator.is_available()
