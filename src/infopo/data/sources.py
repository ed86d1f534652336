"""Any supported dataset -> `PreferenceRow`s: JSON, JSON lines, Parquet, `datasets.Dataset`, hub datasets.

A row's name is `SOURCE:ROW`, SOURCE as the user wrote it. ROW counts from 1: the line in JSON lines (blank lines are no
rows but are counted as lines), the position of the row everywhere else.

JSON lines and Parquet files are read in constant memory; a JSON array is read whole.
"""

import gzip
import json
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from io import BufferedIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infopo.catalog import DATA_SHAPES, suggestion
from infopo.data.counts import DataCounts
from infopo.data.shapes import (
    COLUMNS,
    IMAGE_COLUMNS,
    check_object,
    detect_shape,
    parse_row,
)
from infopo.errors import DataError, RecipeError, UnsupportedArgumentError
from infopo.records import PreferenceRow

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

__all__ = ["SUFFIXES", "detect_shape", "read_rows"]

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
"""Endings of the files that can be read."""

_READ_ERRORS = (OSError, EOFError, zlib.error)

_ROWS_A_BATCH = 256

RawRow = tuple[int, object]
"""Number of a row, and what the file holds there: an object, or the `DataError` that reading it gave."""


def read_rows(
    source: "str | Path | datasets.Dataset",
    counts: DataCounts,
    *,
    split: str = "train",
    shape: str | None = None,
) -> Iterator[PreferenceRow]:
    """Rows of a dataset, whatever its shape.

    The shape is that of the first row that can be used, and the same is required of all rows.

    Args:
        source: A file (see `SUFFIXES`), a folder written by `Dataset.save_to_disk`, a `datasets.Dataset`, or a name
            on the Hugging Face hub.
        counts: Ledger; decides what happens to bad rows.
        split: Split of a hub dataset, or of a saved `DatasetDict`.
        shape: A name of `DATA_SHAPES`; None: detect it.

    Raises:
        DataError: The source cannot be read, holds no row, or no row that can be used. Or a row cannot be used and
            `counts.on_bad_row` is `raise`.
        RecipeError: `shape` is unknown.
        UnsupportedArgumentError: `source` is an `IterableDataset`.
    """
    if shape is not None and shape not in DATA_SHAPES:
        known = ", ".join(DATA_SHAPES)
        raise RecipeError(
            f"data.shape: no shape {shape!r}{suggestion(shape, DATA_SHAPES)}; there are {known}"
        )
    name, raw_rows = _open_source(source, counts, split, shape)
    counts.source = counts.source or name
    return _judged_rows(raw_rows, name, counts, shape)


def _judged_rows(
    raw_rows: Iterator[RawRow], name: str, counts: DataCounts, shape: str | None
) -> Iterator[PreferenceRow]:
    required, seen, used = shape, 0, 0
    first_problem: DataError | None = None
    for number, raw in raw_rows:
        counts.rows += 1
        seen += 1
        try:
            row, required = _parse(raw, f"{name}:{number}", shape, required)
        except DataError as error:
            first_problem = first_problem or error
            counts.bad_row(error)
            continue
        used += 1
        yield row
    if not seen:
        raise DataError("expected rows, got none: the file is empty", name, "no rows")
    if not used:
        problem = f"none of its {seen} rows can be used; the first: {first_problem}"
        raise DataError(problem, name, "no usable row")


def _parse(raw: object, row_id: str, named: str | None, required: str | None) -> tuple[PreferenceRow, str]:
    """The row and its shape, which is the required one or, while none is required yet, the row's own."""
    if isinstance(raw, DataError):
        raise raw
    row = check_object(raw, row_id)
    shape = required or detect_shape(row, row_id)
    parts = parse_row(row, shape, row_id)
    # After parsing, whose errors say which column is wrong; here a row is sound but of the wrong kind.
    if named is None and (own := detect_shape(row, row_id)) != shape:
        before, here = f"{shape} ({DATA_SHAPES[shape]})", f"{own} ({DATA_SHAPES[own]})"
        problem = f"expected the shape of the rows before, {before}, got {here}"
        raise DataError(problem, row_id, "another shape")
    prompt, chosen, rejected, tools, chat_template_kwargs = parts
    return PreferenceRow(prompt, [chosen], [rejected], row_id, chat_template_kwargs, tools), shape


def _open_source(
    source: Any, counts: DataCounts, split: str, shape: str | None
) -> tuple[str, Iterator[RawRow]]:
    """The source's name, and its rows yet to be judged."""
    if not isinstance(source, str | Path):
        name = counts.source or "dataset"
        return name, _dataset_rows(_check_dataset(source, name), name, shape)
    name, path = str(source), Path(source).expanduser()
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:  # a name that is too long for a file, a folder that may not be read
        raise _unreadable(name, error) from error
    if is_folder:
        return name, _dataset_rows(_load_saved(path, name, split), name, shape)
    if exists:
        return name, _file_rows(path, name, shape)
    if isinstance(source, Path) or name.endswith(SUFFIXES) or name.startswith(("./", "../", "/", "~")):
        raise DataError(f"no such file (looked in {Path.cwd()})", name, "no such file")
    return name, _dataset_rows(_load_from_hub(name, split), name, shape)


def _file_rows(path: Path, name: str, shape: str | None) -> Iterator[RawRow]:
    if name.endswith(".parquet"):
        return _parquet_rows(path, name, shape)
    if name.endswith((".jsonl", ".jsonl.gz")):
        return _json_lines(path, name)
    if name.endswith((".json", ".json.gz")):
        return _json_rows(path, name)
    raise DataError(f"expected a file that ends in {', '.join(SUFFIXES)}", name, "unknown suffix")


def _open_bytes(path: Path) -> BufferedIOBase:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _unreadable(name: str, error: Exception) -> DataError:
    return DataError(f"cannot be read: {error or type(error).__name__}", name, "unreadable")


def _json_lines(path: Path, name: str) -> Iterator[RawRow]:
    try:
        with _open_bytes(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _json_value(line, f"{name}:{number}")
    except _READ_ERRORS as error:
        raise _unreadable(name, error) from error


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


def _json_rows(path: Path, name: str) -> Iterator[RawRow]:
    """Rows of a `.json` file: an array, or JSON lines where it does not begin with a bracket."""
    try:
        with _open_bytes(path) as file:
            head = file.read(4096)
            is_array = head.removeprefix(BOM_UTF8).lstrip().startswith(b"[")
            content = head + file.read() if is_array else b""
    except _READ_ERRORS as error:
        raise _unreadable(name, error) from error
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


def _parquet_rows(path: Path, name: str, shape: str | None) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = _columns_to_read(file.schema_arrow.names, name, shape)
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS_A_BATCH, columns=columns):
                for row in _batch_rows(batch, name, number):
                    number += 1
                    yield number, row
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(name, error) from error


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


def _dataset_rows(dataset: "datasets.Dataset", name: str, shape: str | None) -> Iterator[RawRow]:
    columns = _columns_to_read(dataset.column_names, name, shape) if len(dataset) else []
    # Without its format: a format set for training would hand out tensors.
    yield from enumerate(dataset.with_format(None).select_columns(columns), 1)


def _columns_to_read(found: list[str], name: str, shape: str | None) -> list[str]:
    """Columns of a columnar source, where a missing one is missing in all rows.

    Raises:
        DataError: A column is missing, or holds images.
    """
    if images := [column for column in IMAGE_COLUMNS if column in found]:
        raise DataError(
            f"column {images[0]!r}: images are not supported; drop the column to train on text",
            name,
            "images",
        )
    needed = (
        ["prompt", "chosen", "rejected"]
        if shape in ("standard", "conversational")
        else ["chosen", "rejected"]
    )
    if missing := [column for column in needed if column not in found]:
        problem = (
            f"expected the columns {', '.join(needed)}; {', '.join(missing)} missing among {', '.join(found)}"
        )
        raise DataError(problem, name, "missing column")
    return [column for column in COLUMNS if column in found]


def _check_dataset(source: object, name: str) -> "datasets.Dataset":
    import datasets

    if isinstance(source, datasets.Dataset):
        return source
    if isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict):
        splits = ", ".join(map(str, source))
        raise DataError(
            f"expected one dataset, got a dictionary of splits; pick one of: {splits}", name, "several splits"
        )
    if isinstance(source, datasets.IterableDataset):
        raise UnsupportedArgumentError(
            "data: an IterableDataset has no length and cannot be shuffled and resumed exactly; "
            "load it without streaming, or write it to a .jsonl or .parquet file"
        )
    raise RecipeError(f"data: expected a file, a hub name or a datasets.Dataset, got {type(source).__name__}")


def _load_saved(path: Path, name: str, split: str) -> "datasets.Dataset":
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # a damaged folder fails in as many ways as there are files in it
        problem = f"expected a file, or a folder written by Dataset.save_to_disk: {error}"
        raise DataError(problem, name, "unreadable") from error
    if isinstance(loaded, Mapping) and split in loaded:
        loaded = loaded[split]
    return _check_dataset(loaded, name)


def _load_from_hub(name: str, split: str) -> "datasets.Dataset":
    import datasets

    try:
        loaded = datasets.load_dataset(name, split=split)
    except Exception as error:  # network, hub, cache and builder each have their own classes
        problem = (
            f"no such file here, and it cannot be loaded from the Hugging Face hub (split {split!r}): {error}\n"
            "Check the name and the split, and that the hub can be reached (private data: hf auth login); "
            "or download the data and give the path of a file"
        )
        raise DataError(problem, name, "hub") from error
    return _check_dataset(loaded, name)
