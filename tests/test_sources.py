"""Rows come out of every supported file and shape the same, and no row or file fails without a name."""

import csv
import gzip
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from trl.data_utils import extract_prompt

from infopo.catalog import DATA_SHAPES
from infopo.data.counts import DataCounts
from infopo.data.shapes import RowParts, detect_shape, parse_row
from infopo.data.sources import read_rows
from infopo.errors import DataError, RecipeError
from infopo.records import PreferenceRow
from infopo.vocabulary import COLUMNS

FIXTURE = Path(__file__).parent / "fixtures" / "hh" / "harmless-24.jsonl"


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


STANDARD = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
STANDARD_IMPLICIT = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
CONVERSATIONAL = {
    "prompt": [user("What colour is the sky?")],
    "chosen": [assistant("Blue.")],
    "rejected": [assistant("Green.")],
}
CONVERSATIONAL_IMPLICIT = {
    "chosen": [*CONVERSATIONAL["prompt"], *CONVERSATIONAL["chosen"]],
    "rejected": [*CONVERSATIONAL["prompt"], *CONVERSATIONAL["rejected"]],
}
HH = {
    "chosen": "\n\nHuman: What colour is the sky?\n\nAssistant: Blue.",
    "rejected": "\n\nHuman: What colour is the sky?\n\nAssistant: Green.",
}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "What colour is the sky?"}],
    "chosen": {"from": "gpt", "value": "Blue."},
    "rejected": {"from": "gpt", "value": "Green."},
}
ALPACA = {"instruction": "What colour is the sky?", "input": "", "chosen": "Blue.", "rejected": "Green."}
UNPAIRED = {"prompt": "The sky is", "completion": " blue.", "label": True}
UNPAIRED_MESSAGES = {"messages": [user("What colour is the sky?"), assistant("Green.")], "label": False}
ALPACA_UNPAIRED = {"instruction": "What colour is the sky?", "output": "Green.", "kto_tag": False}
LISTS = {"prompt": "The sky is", "chosen": [" blue.", " grey."], "rejected": [" green."]}
SCORED = {"prompt": "The sky is", "responses": [" green.", " blue.", " grey."], "scores": [1, 9.5, 7]}
VOTES = {
    "instruction": "What colour is the sky?", "input": "", "response1": "Blue.", "response2": "Green.",
    "annotator1": 1, "annotator2": 1, "annotator3": 2,
}  # fmt: skip
COMPARED = {
    "prompt": "What colour is the sky?", "response_0": "Green.", "response_1": "Blue.", "better_response_id": 1,
}  # fmt: skip
RATED = {
    "instruction": "What colour is the sky?",
    "completions": [{"response": "Blue.", "overall_score": 9.5}, {"response": "Green.", "overall_score": 1}],
}
OPENAI = {
    "input": {"messages": CONVERSATIONAL["prompt"]},
    "preferred_output": CONVERSATIONAL["chosen"],
    "non_preferred_output": CONVERSATIONAL["rejected"],
}
SWIFT = {"messages": CONVERSATIONAL_IMPLICIT["chosen"], "rejected_response": "Green."}
SAMPLES: dict[str, dict[str, Any]] = {
    "standard": STANDARD,
    "standard_implicit": STANDARD_IMPLICIT,
    "conversational": CONVERSATIONAL,
    "conversational_implicit": CONVERSATIONAL_IMPLICIT,
    "hh": HH,
    "sharegpt": SHAREGPT,
    "alpaca": ALPACA,
    "alpaca_unpaired": ALPACA_UNPAIRED,
    "unpaired": UNPAIRED,
    "unpaired_messages": UNPAIRED_MESSAGES,
    "lists": LISTS,
    "scored": SCORED,
    "votes": VOTES,
    "compared": COMPARED,
    "rated": RATED,
    "openai": OPENAI,
    "swift": SWIFT,
}
TEXT_PAIR = ("The sky is", [" blue."], [" green."])
CHAT_PAIR = (CONVERSATIONAL["prompt"], [CONVERSATIONAL["chosen"]], [CONVERSATIONAL["rejected"]])
CHAT_REJECTED = (CONVERSATIONAL["prompt"], [], [CONVERSATIONAL["rejected"]])
IN_PARTS: dict[str, tuple[Any, list[Any], list[Any]]] = dict.fromkeys(SAMPLES, CHAT_PAIR) | {
    "standard": TEXT_PAIR,
    "standard_implicit": TEXT_PAIR,
    "alpaca_unpaired": CHAT_REJECTED,
    "unpaired": ("The sky is", [" blue."], []),
    "unpaired_messages": CHAT_REJECTED,
    "lists": ("The sky is", [" blue.", " grey."], [" green."]),
    "scored": TEXT_PAIR,
}
TEXT_SHAPES = [
    shape for shape, row in SAMPLES.items() if not any(isinstance(v, list | dict) for v in row.values())
]
"""Shapes whose columns hold text and numbers only, as CSV does."""


def write_lines(path: Path, rows: list[Any]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(compress(text.encode(), path.suffix))
    return str(path)


def write_array(path: Path, rows: list[Any]) -> str:
    text = json.dumps(rows, indent=1).encode()
    path.write_bytes(compress(text, path.suffix))
    return str(path)


def write_parquet(path: Path, rows: list[Any]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def write_arrow_file(path: Path, rows: list[Any]) -> str:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    return str(path)


def write_arrow_stream(path: Path, rows: list[Any]) -> str:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)
    return str(path)


def write_csv(path: Path, rows: list[Any]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(compress(text.getvalue().encode(), path.suffix))
    return str(path)


def compress(content: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(content)
    if suffix != ".zst":
        return content
    with pa.BufferOutputStream() as out:
        with pa.CompressedOutputStream(out, "zstd") as compressed:
            compressed.write(content)
        return out.getvalue().to_pybytes()


WRITERS = {
    "rows.jsonl": write_lines,
    "rows.jsonl.gz": write_lines,
    "rows.jsonl.zst": write_lines,
    "rows.json": write_array,
    "rows.json.gz": write_array,
    "rows.json.zst": write_array,
    "lines.json": write_lines,
    "rows.csv": write_csv,
    "rows.csv.gz": write_csv,
    "rows.csv.zst": write_csv,
    "rows.parquet": write_parquet,
    "file.arrow": write_arrow_file,
    "stream.arrow": write_arrow_stream,
}


def read(source: Any, *, skip: bool = False, **options: Any) -> tuple[list[PreferenceRow], DataCounts]:
    counts = DataCounts(on_bad_row="skip" if skip else "raise")
    return list(read_rows(source, counts, **options)), counts


def error_of(row: Any, shape: str) -> DataError:
    with pytest.raises(DataError) as caught:
        parse_row(row, shape, "f:1")
    assert str(caught.value).startswith("f:1: ")
    return caught.value


def refusal(judge: Callable[[], object]) -> str | None:
    """Reason of the data error, None without one; any other exception is the test's failure."""
    try:
        judge()
    except DataError as error:
        return error.reason
    return None


def test_every_shape_has_a_sample():
    assert set(SAMPLES) == set(DATA_SHAPES)


@pytest.mark.parametrize("shape", DATA_SHAPES)
def test_a_shape_is_detected_and_taken_apart(shape: str):
    assert detect_shape(SAMPLES[shape]) == shape
    parts = parse_row(SAMPLES[shape], shape, "f:1")
    assert parts[:3] == IN_PARTS[shape]


@pytest.mark.parametrize(
    ("file", "shape"),
    [(f, s) for f in WRITERS for s in DATA_SHAPES if not f.startswith("rows.csv") or s in TEXT_SHAPES],
)
def test_every_file_format_gives_the_same_rows(tmp_path: Path, file: str, shape: str):
    path = WRITERS[file](tmp_path / file, [SAMPLES[shape]] * 3)
    rows, counts = read(path)
    assert rows == [PreferenceRow(*IN_PARTS[shape], f"{path}:{n}") for n in (1, 2, 3)]
    assert (counts.rows, counts.source) == (3, path)
    assert counts.shapes == {path: f"{shape} (detected): {DATA_SHAPES[shape]}"}


@pytest.mark.parametrize("shape", DATA_SHAPES)
def test_datasets_give_the_same_rows_in_memory_and_from_disk(tmp_path: Path, shape: str):
    dataset = Dataset.from_list([SAMPLES[shape]] * 2)
    dataset.save_to_disk(str(tmp_path / "saved"))
    DatasetDict({"train": dataset}).save_to_disk(str(tmp_path / "splits"))
    expected = [IN_PARTS[shape]] * 2
    for source in (dataset, dataset.to_iterable_dataset(), tmp_path / "saved", str(tmp_path / "splits")):
        assert [(row.prompt, row.chosen, row.rejected) for row in read(source)[0]] == expected
    assert [row.row_id for row in read(dataset)[0]] == ["dataset:1", "dataset:2"]


@given(
    st.text("ab \n", max_size=6),
    st.text("ab ", min_size=1, max_size=4),
    st.text("ab ", min_size=1, max_size=4),
)
def test_implicit_prompts_of_text_are_trls(prefix: str, chosen: str, rejected: str):
    row = {"chosen": prefix + chosen, "rejected": prefix + rejected}
    try:
        parts = parse_row(row, "standard_implicit", "f:1")
    except DataError:
        return
    assert as_trl(parts) == extract_prompt(row)


def as_trl(parts: RowParts) -> dict[str, Any]:
    (chosen,), (rejected,) = parts.chosen, parts.rejected
    return {"prompt": parts.prompt, "chosen": chosen, "rejected": rejected}


def test_implicit_prompts_of_conversations_are_trls():
    turns = [user("1"), assistant("2"), user("3")]
    row = {"chosen": [*turns, assistant("4")], "rejected": [*turns, assistant("5")]}
    parts = parse_row(row, "conversational_implicit", "f:1")
    assert as_trl(parts) == extract_prompt(row)


def test_whole_conversations_beside_a_text_prompt_are_implicit_as_in_trl():
    row = CONVERSATIONAL_IMPLICIT | {"prompt": "What colour is the sky?"}
    assert detect_shape(row) == "conversational_implicit"


def test_rows_are_named_by_line_and_blank_lines_are_no_rows(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps(STANDARD) + "\n  \n" + json.dumps(STANDARD))
    rows, counts = read(path)
    assert [row.row_id for row in rows] == [f"{path}:2", f"{path}:4"]
    assert counts.rows == 2


def test_a_byte_order_mark_is_ignored(tmp_path: Path):
    for file in ("rows.jsonl", "rows.json"):
        path = tmp_path / file
        WRITERS[file](path, [STANDARD])
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert len(read(path)[0]) == 1


def test_tools_and_template_arguments_are_carried():
    schema = {"type": "function", "function": {"name": "look"}}
    row = CONVERSATIONAL | {
        "tools": json.dumps([schema]),
        "chat_template_kwargs": {"thinking": True, "x": None},
    }
    parts = parse_row(row, "conversational", "f:1")
    assert parts.tools == [schema]
    assert parts.chat_template_kwargs == {"thinking": True}
    assert parse_row(CONVERSATIONAL | {"tools": []}, "conversational", "f:1").tools is None


def test_other_columns_are_ignored(tmp_path: Path):
    path = write_parquet(tmp_path / "rows.parquet", [STANDARD | {"score_chosen": 1.0, "messages": None}])
    assert len(read(path)[0]) == 1


def test_tool_turns_may_stand_within_a_response_only():
    tool = {"role": "tool", "content": "clear"}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}
    row = CONVERSATIONAL | {"chosen": [call, tool, assistant("Blue.")]}
    call_without_nulls = {key: value for key, value in call.items() if value is not None}
    assert parse_row(row, "conversational", "f:1").chosen == [[call_without_nulls, tool, assistant("Blue.")]]
    assert error_of(CONVERSATIONAL | {"chosen": [call, tool]}, "conversational").reason == "wrong role"


BAD_ROWS: list[tuple[str, Any, str]] = [
    ("not an object", ["prompt"], "standard"),
    ("missing column", {"prompt": "a", "chosen": "b"}, "standard"),
    ("null value", STANDARD | {"chosen": None}, "standard"),
    ("wrong type", STANDARD | {"chosen": 3}, "standard"),
    ("wrong type", CONVERSATIONAL | {"chosen": 3}, "conversational"),
    ("wrong type", CONVERSATIONAL | {"chosen": ["Blue."]}, "conversational"),
    ("wrong type", CONVERSATIONAL | {"prompt": [{"role": "user", "content": [{"type": "text"}]}]}, "conversational"),
    ("wrong type", CONVERSATIONAL | {"tools": {"name": "look"}}, "conversational"),
    ("invalid JSON", CONVERSATIONAL | {"chat_template_kwargs": "thinking"}, "conversational"),
    ("invalid JSON", CONVERSATIONAL | {"tools": "["}, "conversational"),
    ("empty chosen", STANDARD | {"chosen": ""}, "standard"),
    ("empty rejected", STANDARD | {"rejected": " \n"}, "standard"),
    ("empty chosen", STANDARD_IMPLICIT | {"chosen": "The sky"}, "standard_implicit"),
    ("empty chosen", CONVERSATIONAL | {"chosen": []}, "conversational"),
    ("empty rejected", CONVERSATIONAL | {"rejected": [assistant(" ")]}, "conversational"),
    ("empty chosen", HH | {"chosen": "\n\nHuman: What colour is the sky?\n\nAssistant: "}, "hh"),
    ("empty rejected", HH | {"rejected": ""}, "hh"),
    ("chosen = rejected", STANDARD | {"chosen": " green."}, "standard"),
    ("chosen = rejected", CONVERSATIONAL | {"chosen": [assistant("Green.")]}, "conversational"),
    ("chosen = rejected", HH | {"chosen": HH["rejected"] + " "}, "hh"),
    ("empty prompt", CONVERSATIONAL | {"prompt": []}, "conversational"),
    ("wrong role", CONVERSATIONAL | {"prompt": [user("a"), assistant("b")]}, "conversational"),
    ("wrong role", CONVERSATIONAL | {"chosen": [user("Blue.")]}, "conversational"),
    ("wrong role", CONVERSATIONAL | {"prompt": [{"role": "human", "content": "a"}]}, "conversational"),
    ("wrong role", CONVERSATIONAL | {"prompt": [{"role": ["user"], "content": "a"}]}, "conversational"),
    ("wrong role", CONVERSATIONAL | {"prompt": [{"from": "narrator", "value": "a"}]}, "conversational"),
    ("wrong role", HH | {"chosen": HH["chosen"] + "\n\nHuman: Why?"}, "hh"),
    ("message without content", CONVERSATIONAL | {"prompt": [{"role": "user"}]}, "conversational"),
    ("message without content", CONVERSATIONAL | {"chosen": [{"role": "assistant"}]}, "conversational"),
    ("no common prompt", {"chosen": "Blue.", "rejected": "Green."}, "standard_implicit"),
    ("no common prompt", {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]},
     "conversational_implicit"),
    ("no common prompt", HH | {"chosen": "\n\nHuman: Why?\n\nAssistant: Blue."}, "hh"),
    ("another shape", HH | {"chosen": "The sky is blue."}, "hh"),
    ("invalid UTF-8", STANDARD | {"prompt": "half \ud83d"}, "standard"),
    ("invalid UTF-8", CONVERSATIONAL | {"prompt": [user("\ud83d")]}, "conversational"),
    ("images", CONVERSATIONAL | {"images": ["sky.png"]}, "conversational"),
    ("images", STANDARD | {"image": "sky.png"}, "standard"),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "row", "shape"), BAD_ROWS)
def test_a_bad_row_is_refused_by_name(reason: str, row: Any, shape: str):
    assert error_of(row, shape).reason == reason


SKIP = "on_bad_row: skip leaves such rows out and counts them"


def test_an_error_says_what_was_expected_what_came_and_where(tmp_path: Path):
    path = write_lines(tmp_path / "rows.jsonl", [STANDARD, STANDARD | {"chosen": ["a"]}])
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value) == f"{path}:2: column 'chosen': expected text, got a list ['a']; {SKIP}"


def test_skipped_rows_are_counted_by_reason(tmp_path: Path):
    bad = [STANDARD | {"chosen": ""}, STANDARD | {"chosen": " "}, STANDARD | {"rejected": None}, 7]
    path = write_lines(tmp_path / "rows.jsonl", [*bad, STANDARD])
    rows, counts = read(path, skip=True)
    assert [row.row_id for row in rows] == [f"{path}:5"]
    assert counts.skipped == {"empty chosen": 2, "null value": 1, "not an object": 1}
    assert counts.first_skipped["empty chosen"].startswith(f"{path}:1: ")
    assert counts.rows == 5


def test_all_rows_must_have_the_shape_of_the_first_usable_one(tmp_path: Path):
    rows = [STANDARD_IMPLICIT | {"chosen": ""}, HH, STANDARD_IMPLICIT, STANDARD, CONVERSATIONAL, HH]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    used, counts = read(path, skip=True)
    assert [row.row_id for row in used] == [f"{path}:2", f"{path}:6"]
    assert counts.skipped == {"empty chosen": 1, "another shape": 2, "wrong type": 1}


def test_a_sound_row_of_another_shape_is_refused(tmp_path: Path):
    path = write_lines(tmp_path / "rows.jsonl", [STANDARD_IMPLICIT, STANDARD | STANDARD_IMPLICIT])
    with pytest.raises(
        DataError, match=r":2: expected the shape of the rows before, standard_implicit .*, got standard"
    ):
        read(path)


def test_a_named_shape_is_taken_at_its_word(tmp_path: Path):
    path = write_lines(tmp_path / "rows.jsonl", [HH])
    rows, _ = read(path, shape="standard_implicit")
    assert rows[0].prompt == "\n\nHuman: What colour is the sky?\n\nAssistant:"
    with pytest.raises(RecipeError, match="did you mean 'standard'"):
        read(path, shape="standart")


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("empty.jsonl", b"", "expected rows, got none"),
        ("blank.jsonl", b"\n \n", "expected rows, got none"),
        ("empty.json", b"", "expected rows, got none"),
        ("array.json", b"[]", "expected rows, got none"),
        ("text.jsonl", b"hello\nworld\n", "invalid JSON"),
        ("text.json", b"hello", "invalid JSON"),
        ("cut.json", b'[{"prompt": "a", ', "expected a JSON array of rows, got invalid JSON"),
        ("latin.json", b'[\n"caf\xe9"]', "line 2 is not"),
        ("deep.json", b"[" * 100_000, "invalid JSON"),
        ("deep.jsonl", b"[" * 100_000, "invalid JSON"),
        ("long.jsonl", b"1" * 5000, "invalid JSON"),
        ("columns.jsonl", b'{"question": "a"}\n', r"expected the columns .* missing among question"),
        ("rows.txt", b"prompt,chosen\n", "expected a file that ends in .json, .jsonl"),
        ("rows.csv", b"prompt,chosen\n", r"prompt, chosen, rejected \(standard\); rejected missing"),
        ("rows.csv", b"", "expected rows, got none"),
        ("rows.csv", b"chosen,rejected\n", "expected rows, got none"),
        ("rows.csv", b"chosen,rejected,chosen\na,b,c\n", "column 'chosen' stands in the header twice"),
        ("rows.csv", b"prompt;chosen;rejected\na;b;c\n", "expected commas between cells, got ';' in the header"),
        ("rows.csv", b"prompt\tchosen\trejected\na\tb\tc\n", r"expected commas .* got '\\t' in the header"),
        ("rows.csv", b"prompt, chosen, rejected\n", r'{prompt: prompt, chosen: " chosen", rejected: " rejected"}'),
        ("table.json", b'{"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"]}', r"lines=True\)"),
        ("table.json", b'{"prompt": {"0": "a"}, "chosen": {"0": "b"}, "rejected": {"0": "c"}}', r"lines=True\)"),
        ("rows.csv", b'chosen,rejected\n"a,b\n', "expected CSV with quotes that end"),
        ("cut.jsonl.zst", compress(json.dumps(STANDARD).encode() * 99, ".zst")[:-10], "cannot be read"),
        ("rows.jsonl.zst", b"{}", "cannot be read"),
        ("rows.arrow", b"ARROW1 no", "cannot be read"),
        ("empty.arrow", b"", "cannot be read"),
        ("rows.jsonl.gz", b"{}", "cannot be read: Not a gzipped file"),
        ("cut.jsonl.gz", gzip.compress(json.dumps(STANDARD).encode(), mtime=0)[:-10], "cannot be read"),
        ("cut.json.gz", gzip.compress(json.dumps([STANDARD]).encode(), mtime=0)[:-10], "cannot be read"),
        ("rows.parquet", b"PAR1 no", "cannot be read"),
        ("empty.parquet", b"", "cannot be read"),
    ],
)  # fmt: skip
def test_a_broken_file_is_refused_by_name_and_never_skipped(
    tmp_path: Path, file: str, content: bytes, match: str, skip: bool
):
    path = tmp_path / file
    path.write_bytes(content)
    with pytest.raises(DataError, match=match) as caught:
        read(path, skip=skip)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("source", ["missing.jsonl", "./missing", "/nowhere/at/all", "data.parquet"])
def test_a_missing_file_is_not_looked_for_on_the_hub(source: str):
    with pytest.raises(DataError, match="no such file") as caught:
        read(source)
    assert caught.value.row_id == source


def test_a_hub_failure_names_the_dataset_and_says_what_to_do():
    with pytest.raises(DataError, match=r"nobody/nothing: .*\n.*give the path of a file"):
        read("nobody/nothing")


def test_a_folder_without_data_files_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"save_to_disk; it has no files"):
        read(tmp_path)
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(DataError, match=r"save_to_disk; none of its 1 files is one"):
        read(tmp_path)


def test_invalid_utf8_is_named_by_line(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(STANDARD).encode() + b'\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:2: expected UTF-8, but byte 16 is 0xe9"):
        read(path)


def test_invalid_utf8_in_parquet_is_named_by_row(tmp_path: Path):
    text = pa.array([b"a", b"caf\xe9", b"c"], pa.binary())
    columns = {
        "prompt": ["x"] * 3,
        "chosen": pa.Array.from_buffers(pa.string(), 3, text.buffers()),
        "rejected": ["r"] * 3,
    }
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table(columns), path)
    rows, counts = read(path, skip=True)
    assert [row.row_id for row in rows] == [f"{path}:1", f"{path}:3"]
    assert counts.first_skipped["invalid UTF-8"].startswith(f"{path}:2: ")


@pytest.mark.parametrize("skip", [False, True])
def test_columns_that_all_rows_lack_are_the_files_fault(tmp_path: Path, skip: bool):
    path = write_parquet(tmp_path / "rows.parquet", [{"chosen": "a", "response": "b"}])
    with pytest.raises(
        DataError,
        match=r"rows\.parquet: expected the columns chosen, rejected \(standard_implicit\); rejected missing",
    ):
        read(path, skip=skip)
    with pytest.raises(DataError, match="prompt missing"):
        read(Dataset.from_list([STANDARD_IMPLICIT]), skip=skip, shape="standard")
    with pytest.raises(DataError, match="column 'images': images are not supported"):
        read(Dataset.from_list([STANDARD | {"images": ["a.png"]}]), skip=skip)


def test_only_finished_single_datasets_are_taken():
    dataset = Dataset.from_list([STANDARD])
    with pytest.raises(DataError, match="pick one of: train, test"):
        read(DatasetDict({"train": dataset, "test": dataset}))
    with pytest.raises(DataError, match="got none"):
        read(Dataset.from_list([]))
    with pytest.raises(RecipeError, match="got dict"):
        read({"prompt": "a"})


def test_a_datasets_format_is_left_aside():
    dataset = Dataset.from_list([CONVERSATIONAL]).with_format("numpy")
    assert read(dataset)[0][0].prompt == CONVERSATIONAL["prompt"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system"]) | json_values},
    optional={"content": st.text(max_size=3) | json_values, "tool_calls": json_values},
)
transcripts = st.lists(st.sampled_from(["\n\nHuman:", "\n\nAssistant:", " a", " b", "\n"]), max_size=6).map(
    "".join
)
columns = json_values | st.lists(messages | json_values, max_size=3) | transcripts
fuzzed_rows = json_values | st.fixed_dictionaries(
    {},
    optional=dict.fromkeys((*COLUMNS, "annotator1", "annotator2", "images"), columns),
)


@given(fuzzed_rows, st.sampled_from(list(DATA_SHAPES)))
def test_whatever_a_row_holds_only_data_errors_come_out(row: Any, shape: str):
    if reason := refusal(lambda: parse_row(row, shape, "f:1")):
        assert reason != "unusable"
    if isinstance(row, dict) and (reason := refusal(lambda: detect_shape(row, "f:1"))):
        assert reason in ("missing column", "null value", "wrong type")


@given(st.lists(fuzzed_rows, max_size=4), st.booleans())
def test_whatever_a_file_holds_only_data_errors_come_out(
    tmp_path_factory: Any, rows: list[Any], as_array: bool
):
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    path.write_text(json.dumps(rows) if as_array else "\n".join(map(json.dumps, rows)))
    counts = DataCounts(on_bad_row="skip")
    refused = refusal(lambda: list(read_rows(path, counts)))
    if refused in ("no usable row", "no rows"):
        assert sum(counts.skipped.values()) == counts.rows
    elif refused:
        assert refused == "invalid JSON"  # of an array, where rows before it have come out by then


@given(
    st.binary(max_size=60),
    st.sampled_from(["f.json", "f.jsonl.gz", "f.jsonl.zst", "f.csv", "f.arrow", "f.parquet"]),
)
def test_whatever_bytes_a_file_holds_only_data_errors_come_out(
    tmp_path_factory: Any, content: bytes, file: str
):
    path = tmp_path_factory.getbasetemp() / file
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"f\.(json|csv|arrow|parquet)"):
        read(path, skip=True)


def test_a_line_file_is_read_in_constant_memory(tmp_path: Path):
    """The first row comes out before the rest is read: a broken end does not matter to it."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(STANDARD) + "\n{")
    assert next(read_rows(path, DataCounts())).row_id == f"{path}:1"


def test_the_fixture_holds_rows_of_each_kind():
    rows, counts = read(FIXTURE, skip=True)
    assert (counts.rows, len(rows)) == (24, 22)
    assert counts.skipped == {"empty chosen": 1, "no common prompt": 1}
    assert rows[1].prompt == [user("Is it possible to download a car?")]
    assert rows[1].rejected == [[assistant("I’m sorry, I don’t understand.")]]


def test_counts_on_the_whole_of_hh_harmless(shared_data: Path):
    rows, counts = read(shared_data / "hh_harmless" / "harmless-base-test.jsonl.gz", skip=True)
    assert (counts.rows, len(rows)) == (2312, 2303)
    assert counts.skipped == {"no common prompt": 5, "empty chosen": 4}
    transcripts = {row.row_id: row for row in rows}
    assert len(transcripts) == len(rows)


@pytest.mark.parametrize("file", ["gsm8k/test.jsonl.gz", "mbpp/sanitized-mbpp.json", "svamp/SVAMP.json"])
def test_real_files_of_other_shapes_are_refused_by_name(shared_data: Path, file: str):
    with pytest.raises(DataError, match="none of its"):
        read(shared_data / file, skip=True)


def test_shapes_are_known_without_torch():
    code = (
        "import sys, infopo.data.shapes; assert not {'torch', 'datasets', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
