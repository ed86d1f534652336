"""Reads the raw rows of one data file: JSON, JSON lines, CSV, Parquet or Arrow, also compressed.

Each reader yields (number, row). Numbers count from 1. They are lines in JSON lines (blank lines are counted, but are
no rows), and positions of rows everywhere else. For a row that cannot be read, the reader yields the `DataError`, and
continues. An error that spoils the whole file is raised.

All formats are read in constant memory. No row may have more than `LONGEST_ROW` bytes, so that a small compressed file
cannot fill the machine's memory.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa

from infopo.data.door import Door, check_object
from infopo.errors import DataError

_COMPRESSED = ("", ".gz", ".zst")

SUFFIXES = (
    *(f"{kind}{compressed}" for compressed in _COMPRESSED for kind in (".json", ".jsonl", ".csv")),
    ".parquet",
    ".arrow",
)
"""Endings of the files that can be read."""

RawRow = tuple[int, object]
"""Number of a row, and its value, or the `DataError` of a row that cannot be read."""

_READ_ERRORS = (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError)

_ROWS_A_BATCH = 256

LONGEST_ROW = 2**26
"""Largest number of bytes of a row of JSON, and of characters of a CSV cell: 64 MiB, or some 16 million tokens."""


def file_rows(path: Path, name: str, door: Door | None = None) -> Iterator[RawRow]:
    """Yields the rows of a file, which is read as the suffix of its name says.

    Args:
        path: The file.
        name: Name of the file in errors.
        door: Decides which columns of a columnar file are read, and removes its nulls. If None, all are read unchanged.

    Raises:
        DataError: The file has another suffix, or, during iteration, it cannot be read or lacks columns.
    """
    kind = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
    for ending, reader in (
        (".jsonl", _json_lines), (".json", _json_rows), (".csv", _csv_rows), (".parquet", _parquet_rows),
        (".arrow", _arrow_rows),
    ):  # fmt: skip
        if kind.startswith(ending):
            return reader(path, name, door)
    raise DataError(f"expected a file that ends in {', '.join(SUFFIXES)}", name, "unknown suffix")


def object_rows(path: Path, name: str | None = None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the rows of a file that consists of objects, with their names, `NAME:ROW`.

    Args:
        path: The file.
        name: Name of the file in errors, by default its path.

    Raises:
        DataError: During iteration, a row cannot be read or is no object. Names the row.
    """
    name = name or str(path)
    for number, row in file_rows(path, name):
        if isinstance(row, DataError):
            raise row
        yield f"{name}:{number}", check_object(row, f"{name}:{number}")


def unreadable(name: str, error: Exception) -> DataError:
    """Returns the error for a source that the system or a library cannot read."""
    return DataError(f"cannot be read: {error or type(error).__name__}", name, "unreadable")


def _open_bytes(path: Path) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _json_lines(path: Path, name: str, door: Door | None) -> Iterator[RawRow]:
    try:
        with _open_bytes(path) as file:
            yield from _lines_of(file, name)
    except _READ_ERRORS as error:
        raise unreadable(name, error) from error


def _lines_of(file: io.BufferedIOBase, name: str) -> Iterator[RawRow]:
    number = 0
    while line := file.readline(LONGEST_ROW + 1):
        number += 1
        if len(line) > LONGEST_ROW:
            yield number, _too_long(f"{name}:{number}")
            while line and not line.endswith(b"\n"):
                line = file.readline(LONGEST_ROW)
        elif line.strip():
            value = _json_value(line, f"{name}:{number}")
            if number == 1 and _is_table_by_columns(value):
                problem = (
                    "expected rows, got one object with all values of each column; pandas writes rows with "
                    'to_json(path, orient="records", lines=True)'
                )
                raise DataError(problem, name, "not an object")
            yield number, value


def _is_table_by_columns(value: object) -> bool:
    """Whether a JSON object is a whole table: of each column a list of texts, or an object of numbered values."""
    if not isinstance(value, dict) or len(value) < 2:
        return False
    columns = list(value.values())
    if all(isinstance(column, list) and column for column in columns):
        return all(isinstance(cell, str) for column in columns for cell in column)
    return all(isinstance(column, dict) and column and all(map(str.isdigit, column)) for column in columns)


def _too_long(row_id: str) -> DataError:
    problem = f"expected a row of at most {LONGEST_ROW >> 20} MiB, this one is longer; is it one row a line?"
    return DataError(problem, row_id, "row too long")


def _json_value(data: bytes, row_id: str) -> object:
    """Returns the value, or the error if it cannot be parsed."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} is 0x{error.object[error.start]:02x}"
        problem = f"expected UTF-8, but {byte}; save the file as UTF-8"
        return DataError(problem, row_id, "invalid UTF-8")
    except (ValueError, RecursionError) as error:
        # The parser's own message would count lines within this line.
        what = (
            f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
        )
        return DataError(f"expected one JSON object a line, got invalid JSON: {what}", row_id, "invalid JSON")


def _json_rows(path: Path, name: str, door: Door | None) -> Iterator[RawRow]:
    """Yields the rows of a `.json` file, which is an array, or JSON lines if it does not begin with a bracket."""
    try:
        with _open_bytes(path) as file:
            head = file.read(4096)
            is_array = head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
            if is_array:
                yield from _ArrayReader(file, head, name).rows()
        if not is_array:
            yield from _json_lines(path, name, door)
    except _READ_ERRORS as error:
        raise unreadable(name, error) from error


class _ArrayReader:
    """Reads the items of a JSON array one by one, with no more in memory than the item and the piece after it.

    `_text` is the part of the file that is in memory, `_at` the position in it that is read next, and `_lines` the
    number of the line that it begins on.
    """

    _PIECE = 2**16
    _SPACE = re.compile(r"[ \t\r\n]*")

    def __init__(self, file: io.BufferedIOBase, head: bytes, name: str) -> None:
        self._file = file
        self._name = name
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._text, self._at, self._lines = "", 0, 1
        self._has_ended = False
        self._take(head)

    def rows(self) -> Iterator[RawRow]:
        # The first character is the bracket, which the caller has seen.
        self._next_character()
        self._at += 1
        number = 0
        while not self._ends(is_first=number == 0):
            number += 1
            yield number, self._item(number)
        self._at += 1
        if self._next_character():
            raise self._invalid("text after the array's end")

    def _ends(self, *, is_first: bool) -> bool:
        """Returns whether the array ends here. Otherwise moves to the next item."""
        following = self._next_character()
        if following == "]" or is_first:
            return following == "]"
        if following != ",":
            raise self._invalid("expected ',' or ']' after an item")
        self._at += 1
        if self._next_character() == "]":
            raise self._invalid("expected an item after ','")
        return False

    def _item(self, number: int) -> object:
        piece = self._PIECE
        while True:
            problem: Exception | None = None
            try:
                value, end = self._json.raw_decode(self._text, self._at)
                # A number at the end of the text in memory may continue in the file.
                if end < len(self._text) or self._has_ended:
                    self._at = end
                    return value
            except (ValueError, RecursionError) as error:
                problem = error
            if self._has_ended or isinstance(problem, RecursionError):
                raise self._invalid(str(problem).partition(": line")[0], problem) from problem
            if len(self._text) - self._at > LONGEST_ROW:
                raise _too_long(f"{self._name}:{number}")
            self._take(self._file.read(piece))
            # Pieces grow, because a long item is parsed again for each of them.
            piece *= 2

    def _next_character(self) -> str:
        """Moves to the next character that is no space, and returns it, or empty text at the end of the file."""
        while True:
            match = self._SPACE.match(self._text, self._at)
            # The pattern also matches no space at all.
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text) or self._has_ended:
                return self._text[self._at : self._at + 1]
            self._take(self._file.read(self._PIECE))

    def _take(self, data: bytes) -> None:
        """Adds what has been read to the text, and drops the part that has been parsed."""
        self._lines += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :], 0
        self._has_ended = not data
        try:
            self._text += self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            line = self._lines + self._text.count("\n") + error.object.count(b"\n", 0, error.start)
            problem = f"expected UTF-8, line {line} is not; save the file as UTF-8"
            raise DataError(problem, self._name, "invalid UTF-8") from error

    def _invalid(self, what: str, cause: Exception | None = None) -> DataError:
        place = cause.pos if isinstance(cause, json.JSONDecodeError) else self._at
        line = self._lines + self._text.count("\n", 0, place)
        problem = f"expected a JSON array of rows, got invalid JSON: {what} (line {line})"
        return DataError(problem, self._name, "invalid JSON")


def _csv_rows(path: Path, name: str, door: Door | None) -> Iterator[RawRow]:
    """Yields the rows below the header, in which every cell is text."""
    csv.field_size_limit(LONGEST_ROW)
    try:
        with ExitStack() as stack:
            file = stack.enter_context(_open_bytes(path))
            # Bytes that are not UTF-8 become surrogates, so that their row can be named.
            text = io.TextIOWrapper(
                cast(IO[bytes], file), encoding="utf-8-sig", errors="surrogateescape", newline=""
            )
            lines = csv.reader(_bounded_lines(stack.enter_context(text), name), strict=True)
            header = next(lines, [])
            if len(header) == 1 and (between := next((mark for mark in ";\t|" if mark in header[0]), "")):
                problem = f"expected commas between cells, got {between!r} in the header {header[0]!r:.80}"
                raise DataError(f"{problem}; save the file with commas", name, "invalid CSV")
            if len(set(header)) < len(header):
                twice = next(column for column in header if header.count(column) > 1)
                raise DataError(f"column {twice!r} stands in the header twice", name, "invalid CSV")
            if any("\ud800" <= letter <= "\udfff" for column in header for letter in column):
                problem = "expected a header in UTF-8, got bytes of another encoding; save the file as UTF-8"
                raise DataError(problem, name, "invalid UTF-8")
            if header and door:
                door.columns(header, name)
            for number, cells in enumerate((cells for cells in lines if cells), 1):
                yield number, _csv_row(header, cells, f"{name}:{number}")
    except csv.Error as error:
        if "field limit" in str(error):
            raise _too_long(name) from error
        raise DataError(f"expected CSV with quotes that end: {error}", name, "invalid CSV") from error
    except _READ_ERRORS as error:
        raise unreadable(name, error) from error


def _bounded_lines(text: io.TextIOWrapper, name: str) -> Iterator[str]:
    number = 0
    while line := text.readline(LONGEST_ROW + 1):
        number += 1
        if len(line) > LONGEST_ROW:
            raise _too_long(f"{name}, line {number}")
        yield line


def _csv_row(header: Sequence[str], cells: Sequence[str], row_id: str) -> object:
    if len(cells) != len(header):
        problem = (
            f"expected {len(header)} cells, as in the header, got {len(cells)}; quote cells that hold commas"
        )
        return DataError(problem, row_id, "invalid CSV")
    for column, cell in zip(header, cells, strict=True):
        if any("\udc80" <= character <= "\udcff" for character in cell):
            problem = f"column {column!r}: expected UTF-8; save the file as UTF-8"
            return DataError(problem, row_id, "invalid UTF-8")
    return dict(zip(header, cells, strict=True))


def _parquet_rows(path: Path, name: str, door: Door | None) -> Iterator[RawRow]:
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = _columns(file.schema_arrow, name, door)
            yield from _numbered(file.iter_batches(batch_size=_ROWS_A_BATCH, columns=columns), name, door)
    except _READ_ERRORS as error:
        raise unreadable(name, error) from error


def _columns(schema: "pa.Schema", name: str, door: Door | None) -> list[str]:
    if door is None:
        return list(schema.names)
    return door.columns(schema.names, name, text_columns(schema))


def text_columns(schema: "pa.Schema") -> list[str]:
    """Returns the columns that may hold a prompt: text, and lists of objects that say who speaks."""
    return [
        column
        for column, kind in zip(schema.names, schema.types, strict=True)
        if pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_dictionary(kind)
        or _is_turns(kind)
    ]


def _is_turns(kind: "pa.DataType") -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(
        kind.value_type
    ):
        return False
    return bool({"role", "from"} & {field.name for field in kind.value_type.fields})


def _arrow_rows(path: Path, name: str, door: Door | None) -> Iterator[RawRow]:
    """Yields the rows of an Arrow IPC file, or of an IPC stream, as `datasets` writes it."""
    try:
        with pa.memory_map(str(path)) as file:
            if file.read(6) == b"ARROW1":
                reader = pa.ipc.open_file(file)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                file.seek(0)
                batches = reader = pa.ipc.open_stream(file)
            columns = _columns(reader.schema, name, door)
            small = (
                batch.select(columns).slice(start, _ROWS_A_BATCH)
                for batch in batches
                for start in range(0, batch.num_rows, _ROWS_A_BATCH)
            )
            yield from _numbered(small, name, door)
    except _READ_ERRORS as error:
        raise unreadable(name, error) from error


def _numbered(batches: "Iterable[pa.RecordBatch]", name: str, door: Door | None) -> Iterator[RawRow]:
    number = 0
    for batch in batches:
        for row in _batch_rows(batch, name, number):
            number += 1
            yield number, door.columnar(row) if door and isinstance(row, Mapping) else row


def _batch_rows(batch: "pa.RecordBatch", name: str, rows_before: int) -> Iterator[object]:
    """Yields the rows of a batch. If a value cannot be turned into Python, they are read one by one, to name its row.

    The batch is validated first, because Arrow trusts a file: offsets of a damaged one may point anywhere, and
    following them ends the process.
    """
    try:
        batch.validate(full=True)
        yield from batch.to_pylist(maps_as_pydicts="lossy")
    except (ValueError, OverflowError, KeyError) as error:
        if batch.num_rows == 1:
            problem = f"expected UTF-8 text, got a value that cannot be read: {error}"
            yield DataError(problem, f"{name}:{rows_before + 1}", "invalid UTF-8")
            return
        for index in range(batch.num_rows):
            yield from _batch_rows(batch.slice(index, 1), name, rows_before + index)
