"""Hostile and damaged data: memory is bounded, nothing moves the terminal, every fault has a name."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infopo.config import parse_recipe
from infopo.data.counts import DataCounts
from infopo.data.files import LONGEST_ROW
from infopo.data.sources import read_rows
from infopo.errors import DataError, InfoPOError, RecipeError, printable
from test_sources import CONVERSATIONAL, STANDARD, read, write_array, write_lines

SCRIPTS = Path(__file__).parents[1] / "scripts"

# --- memory ---


def bomb(path: Path, before: bytes, after: bytes = b"") -> Path:
    """A small file that holds, between these bytes, three times as many as a row may have."""
    with pa.CompressedOutputStream(str(path), {".gz": "gzip", ".zst": "zstd"}[path.suffix]) as file:
        file.write(before)
        for _ in range(3 * (LONGEST_ROW >> 20)):
            file.write(b"a" * 2**20)
        file.write(after)
    return path


@pytest.mark.parametrize(
    ("name", "before", "rows"),
    [
        ("rows.jsonl.gz", b'{"prompt": "', 1),
        ("rows.jsonl.zst", b'{"prompt": "', 1),
        ("rows.json.gz", b'[{"prompt": "', 0),
        ("rows.csv.zst", b"prompt,chosen,rejected\n", 0),
        ("rows.csv.gz", b'prompt,chosen,rejected\n"', 0),
    ],
)
def test_a_small_file_cannot_fill_the_memory(tmp_path: Path, name: str, before: bytes, rows: int):
    path = bomb(tmp_path / name, before, b'"}\n' + json.dumps(STANDARD).encode() + b"\n")
    assert path.stat().st_size < 2**20
    tracemalloc.start()
    try:
        if rows:  # where lines are rows, those behind it can be read
            used, counts = read(path, skip=True)
            assert len(used) == rows
            assert counts.skipped == {"row too long": 1}
        else:
            with pytest.raises(DataError, match="expected a row of at most 64 MiB"):
                read(path, skip=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The row, a copy of it while it grows, and its text.
    assert peak < 6 * LONGEST_ROW
    with pytest.raises(DataError, match="at most 64 MiB"):
        read(path)


def test_a_json_array_is_read_in_constant_memory(tmp_path: Path):
    path = Path(write_array(tmp_path / "rows.json", [STANDARD | {"note": "x" * 10_000}] * 300))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows(path, DataCounts())) == 300
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size / 4


@given(
    st.lists(
        st.recursive(st.integers() | st.floats(allow_nan=False) | st.text(), st.lists, max_leaves=3),
        max_size=6,
    ),
    st.sampled_from([None, 1, 4]),
    st.booleans(),
)
def test_items_of_an_array_are_those_that_json_reads(
    tmp_path_factory: Any, items: list[Any], indent: int | None, ascii_only: bool
):
    from infopo.data.files import file_rows

    path = tmp_path_factory.getbasetemp() / "items.json"
    path.write_text(json.dumps(items, indent=indent, ensure_ascii=ascii_only), errors="surrogatepass")
    try:
        expected = json.loads(path.read_text())
    except UnicodeDecodeError:
        return
    assert [item for _, item in file_rows(path, str(path))] == expected


@pytest.mark.parametrize(
    "content", [b"[1,]", b"[1 2]", b"[1,,2]", b"[1", b"[1] 2", b"[,1]", b"[tru]", b'[{"a": 1]', b"["]
)
def test_an_array_that_json_refuses_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"expected a JSON array of rows, got invalid JSON: .* \(line 1\)"):
        read(path, skip=True)


# --- values ---


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "responses": ["a", "b"], "scores": [10**400, 1]}, "wrong type"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [float("inf"), 1]}, "wrong type"),
        ({"instruction": "p", "history": 3, "chosen": "a", "rejected": "b"}, "wrong type"),
        ({"instruction": "p", "history": {"a": 1}, "chosen": "a", "rejected": "b"}, "wrong type"),
        ({"prompt": "p", "completion": "a", "label": 10**400}, "wrong type"),
        ({"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 10**400}, "wrong type"),
        (STANDARD | {"chosen": "\ud800"}, "invalid UTF-8"),
    ],
)
def test_values_that_are_no_values_are_refused_by_name(tmp_path: Path, row: dict[str, Any], reason: str):
    for source in ([row], write_lines(tmp_path / "rows.jsonl", [row])):
        with pytest.raises(DataError) as caught:
            read(source)
        assert caught.value.reason == reason


def test_a_deeply_nested_row_is_refused_by_name():
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    for row in (
        CONVERSATIONAL | {"prompt": deep},
        STANDARD | {"system": deep},
    ):
        with pytest.raises(DataError):
            read([row])


def test_a_name_with_a_null_is_no_file():
    with pytest.raises(DataError, match=r"no such file|cannot be read"):
        read("rows\x00.jsonl")


def test_offsets_of_a_damaged_arrow_file_are_not_followed(tmp_path: Path):
    """They point outside the file; following them would end the process."""
    path = tmp_path / "rows.arrow"
    table = pa.Table.from_pylist([STANDARD] * 3)
    offsets = table["chosen"].chunk(0).buffers()[1].to_pybytes()
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    content = path.read_bytes()
    assert offsets in content
    path.write_bytes(content.replace(offsets, offsets[:4] + b"\xff\xff\xff\x3f" + offsets[8:]))
    with pytest.raises(DataError, match="a value that cannot be read"):
        read(path)


# --- what reaches a terminal ---

ESCAPES = "\x1b[31m\x07\x9b2J\u202e\r\u2028"


@given(st.text(st.characters()))
def test_printable_text_holds_no_control_character(text: str):
    shown = printable(text)
    assert all(c in "\n\t" or (ord(c) >= 32 and not 0x7F <= ord(c) < 0xA0) for c in shown)
    assert printable(shown) == shown
    if text.isprintable():
        assert shown == text


@pytest.mark.parametrize(
    "raise_it",
    [
        lambda: read([{ESCAPES: ESCAPES}]),
        lambda: read([STANDARD | {"chosen": [ESCAPES]}]),
        lambda: read([CONVERSATIONAL | {"prompt": [{"role": ESCAPES, "content": "a"}]}]),
        lambda: read(f"{ESCAPES}.jsonl"),
        lambda: read([STANDARD], columns={ESCAPES: "a"}),
        lambda: read([STANDARD], columns={"system": ESCAPES}),
        lambda: parse_recipe(f'"{ESCAPES}": 1', source=ESCAPES),
        lambda: parse_recipe("a: 1", source="r", overrides=[ESCAPES]),
        lambda: (_ for _ in ()).throw(RecipeError([ESCAPES, ESCAPES], ESCAPES)),
    ],
)
def test_no_error_sends_escape_sequences(raise_it: Any):
    with pytest.raises(InfoPOError) as caught:
        raise_it()
    text = str(caught.value)
    assert text == printable(text)
    assert not set("\x1b\x07\x9b\u202e\r\u2028") & set(text)


def test_no_account_sends_escape_sequences(tmp_path: Path):
    folder = tmp_path / f"a{ESCAPES}"
    folder.mkdir()
    rows = [STANDARD | {f"x{ESCAPES}": 1}, STANDARD | {"chosen": f" {ESCAPES} ", "rejected": f" {ESCAPES} "}]
    write_lines(folder / "rows.jsonl", rows)
    _, counts = read(folder, skip=True, columns={f"y{ESCAPES}": None})
    lines = counts.lines()
    assert any("ignored columns" in line for line in lines)
    assert all(line == printable(line) for line in lines)


def test_a_name_of_a_file_cannot_begin_a_line_of_its_own(tmp_path: Path):
    path = tmp_path / "a\nerror: all is well.jsonl"
    path.write_text("{}\n")
    with pytest.raises(DataError) as caught:
        read(path)
    assert "\n" not in str(caught.value)


# --- folders ---


def test_a_folder_may_be_given_relative_to_any_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    write_lines(tmp_path / "data" / "train.jsonl", [STANDARD])
    write_lines(tmp_path / "data" / "test.jsonl", [STANDARD] * 2)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    monkeypatch.chdir(tmp_path / "work")
    for folder in ("../data", "../data/deep/..", "../link", f"../../{tmp_path.name}/data", tmp_path / "data"):
        rows, counts = read(folder)
        assert len(rows) == 1, folder
        assert Path(rows[0].row_id.removesuffix(":1")).samefile(tmp_path / "data" / "train.jsonl")
        assert any(
            line.startswith(f"  files of {folder}: ") and "train.jsonl" in line for line in counts.lines()
        )
    assert read("../data", split="test")[1].rows == 2


# --- what a refusal says ---


def test_a_refused_row_says_how_such_rows_are_left_out():
    with pytest.raises(DataError, match="on_bad_row: skip leaves such rows out and counts them"):
        read([STANDARD, STANDARD | {"chosen": ""}])
    with pytest.raises(DataError) as caught:
        read([{"question": "a"}])
    assert "on_bad_row" not in str(caught.value)  # none would be left


# --- fuzzing ---


@pytest.mark.long
def test_damaged_input_gives_a_result_or_a_named_error():
    done = subprocess.run(
        [sys.executable, SCRIPTS / "fuzz.py", "--inputs", "500", "--seed", "1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
