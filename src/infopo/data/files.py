"""One data file -> its rows as they stand there: JSON, JSON lines, CSV, Parquet, Arrow; also compressed.

Each reader yields (number, row). Numbers count from 1: the line in JSON lines (blank lines are no rows but are counted
as lines), the position of the row everywhere else. A row that cannot be read on its own is yielded as the `DataError`
that reading it gave; what spoils the whole file is raised.

All but JSON arrays are read in constant memory.
"""

import csv
import gzip
import io
import json
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

import pyarrow as pa

from infopo.data.shapes import columns_to_read
from infopo.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

_COMPRESSED = ("", ".gz", ".zst")

SUFFIXES = (
    *(f"{kind}{compressed}" for compressed in _COMPRESSED for kind in (".json", ".jsonl", ".csv")),
    ".parquet",
    ".arrow",
)
"""Endings of the files that can be read."""

RawRow = tuple[int, object]
"""Number of a row, and what the file holds there: an object, or the `DataError` that reading it gave."""

_READ_ERRORS = (OSError, EOFError, zlib.error, pa.ArrowException)

_ROWS_A_BATCH = 256

_LONGEST_CELL = 2**30
"""Characters of a CSV cell. The csv module refuses more than 2^17 unless told otherwise."""


def file_rows(path: Path, name: str, shape: str | None) -> Iterator[RawRow]:
    """Rows of a file, read as its name's ending says.

    Args:
        path: The file.
        name: What errors call it.
        shape: The shape that the recipe names; decides which columns of a columnar file must be there.

    Raises:
        DataError: The file has another ending; while iterating: it cannot be read, or lacks columns.
    """
    kind = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
    for ending, reader in (
        (".jsonl", _json_lines), (".json", _json_rows), (".csv", _csv_rows), (".parquet", _parquet_rows),
        (".arrow", _arrow_rows),
    ):  # fmt: skip
        if kind.startswith(ending):
            return reader(path, name, shape)
    raise DataError(f"expected a file that ends in {', '.join(SUFFIXES)}", name, "unknown suffix")


def unreadable(name: str, error: Exception) -> DataError:
    """The error for a source that the system or a library cannot read."""
    return DataError(f"cannot be read: {error or type(error).__name__}", name, "unreadable")


def _open_bytes(path: Path) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _json_lines(path: Path, name: str, shape: str | None = None) -> Iterator[RawRow]:
    try:
        with _open_bytes(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _json_value(line, f"{name}:{number}")
    except _READ_ERRORS as error:
        raise unreadable(name, error) from error


def _json_value(data: bytes, row_id: str) -> object:
    """The value, or the error that parsing it gave."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} is 0x{error.object[error.start]:02x}"
        problem = f"expected UTF-8, but {byte}; save the file as UTF-8"
        return DataError(problem, row_id, "invalid UTF-8")
    except (ValueError, RecursionError) as error:
        # Its own message counts lines within this one.
        what = (
            f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
        )
        return DataError(f"expected one JSON object a line, got invalid JSON: {what}", row_id, "invalid JSON")


def _json_rows(path: Path, name: str, shape: str | None) -> Iterator[RawRow]:
    """Rows of a `.json` file: an array, or JSON lines where it does not begin with a bracket."""
    try:
        with _open_bytes(path) as file:
            head = file.read(4096)
            is_array = head.removeprefix(BOM_UTF8).lstrip().startswith(b"[")
            content = head + file.read() if is_array else b""
    except _READ_ERRORS as error:
        raise unreadable(name, error) from error
    yield from _json_array(content, name) if is_array else _json_lines(path, name)


def _json_array(content: bytes, name: str) -> Iterator[RawRow]:
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"expected UTF-8, line {line} is not; save the file as UTF-8", name, "invalid UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"expected a JSON array of rows, got invalid JSON: {error}", name, "invalid JSON"
        ) from error
    return enumerate(rows, 1)


def _csv_rows(path: Path, name: str, shape: str | None) -> Iterator[RawRow]:
    """Rows below the header; every cell is text."""
    csv.field_size_limit(_LONGEST_CELL)
    try:
        with ExitStack() as stack:
            file = stack.enter_context(_open_bytes(path))
            # Bytes that are no UTF-8 come through as marks, so that their row can be named.
            text = io.TextIOWrapper(
                cast(IO[bytes], file), encoding="utf-8-sig", errors="surrogateescape", newline=""
            )
            lines = csv.reader(stack.enter_context(text), strict=True)
            header = next(lines, [])
            if len(set(header)) < len(header):
                twice = next(column for column in header if header.count(column) > 1)
                raise DataError(f"column {twice!r} stands in the header twice", name, "invalid CSV")
            if header:
                columns_to_read(header, name, shape)
            for number, cells in enumerate((cells for cells in lines if cells), 1):
                yield number, _csv_row(header, cells, f"{name}:{number}")
    except csv.Error as error:
        raise DataError(f"expected CSV with quotes that end: {error}", name, "invalid CSV") from error
    except _READ_ERRORS as error:
        raise unreadable(name, error) from error


def _csv_row(header: "Sequence[str]", cells: "Sequence[str]", row_id: str) -> object:
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


def _parquet_rows(path: Path, name: str, shape: str | None) -> Iterator[RawRow]:
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = columns_to_read(file.schema_arrow.names, name, shape)
            yield from _numbered(file.iter_batches(batch_size=_ROWS_A_BATCH, columns=columns), name)
    except _READ_ERRORS as error:
        raise unreadable(name, error) from error


def _arrow_rows(path: Path, name: str, shape: str | None) -> Iterator[RawRow]:
    """Rows of an Arrow IPC file, or of an IPC stream, which is what `datasets` writes."""
    try:
        with pa.memory_map(str(path)) as file:
            if file.read(6) == b"ARROW1":
                reader = pa.ipc.open_file(file)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                file.seek(0)
                batches = reader = pa.ipc.open_stream(file)
            columns = columns_to_read(reader.schema.names, name, shape)
            small = (
                batch.select(columns).slice(start, _ROWS_A_BATCH)
                for batch in batches
                for start in range(0, batch.num_rows, _ROWS_A_BATCH)
            )
            yield from _numbered(small, name)
    except _READ_ERRORS as error:
        raise unreadable(name, error) from error


def _numbered(batches: "Iterable[pa.RecordBatch]", name: str) -> Iterator[RawRow]:
    number = 0
    for batch in batches:
        for row in _batch_rows(batch, name, number):
            number += 1
            yield number, row


def _batch_rows(batch: "pa.RecordBatch", name: str, rows_before: int) -> Iterator[object]:
    """Rows of a batch; one by one where a value cannot be turned into Python, to name the row that holds it."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            problem = f"expected UTF-8 text, got a value that cannot be read: {error}"
            yield DataError(problem, f"{name}:{rows_before + 1}", "invalid UTF-8")
            return
        for index in range(batch.num_rows):
            yield from _batch_rows(batch.slice(index, 1), name, rows_before + index)
