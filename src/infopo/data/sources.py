"""Reads `PreferenceRow`s from any supported source: files, globs, folders, hub datasets, `datasets` objects, or
several.

A row's name is `SOURCE:ROW`. SOURCE is what the user wrote (for a glob or folder, the file), and ROW is counted as in
`files`. Rows are read one by one, and only what a reader needs is in memory (see `files`). With `streaming`, this is
true of hub datasets, too.
"""

import glob
import os.path
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from infopo.catalog import DATA_SHAPES, suggestion
from infopo.data.columns import names
from infopo.data.counts import DataCounts
from infopo.data.door import Door
from infopo.data.files import SUFFIXES, RawRow, file_rows, text_columns, unreadable
from infopo.data.responses import ScoreRule
from infopo.data.shapes import detect_shape, parse_row
from infopo.data.strays import begins_with_an_answer, ignored_columns, texts_beside
from infopo.errors import ConfigError, DataError
from infopo.records import PreferenceRow
from infopo.vocabulary import check_columns

if TYPE_CHECKING:
    import datasets

__all__ = ["SUFFIXES", "Files", "Located", "detect_shape", "located", "read_mixture", "read_rows"]

_SAVED = ("dataset_dict.json", "state.json")
"""Files that `save_to_disk` writes. One of them tells such a folder from a folder of data files."""

NamedRow = tuple[str, object]
"""Name of a row, and its value, or the `DataError` of a row that cannot be read."""


def read_rows(
    source: "str | Path | Located",
    counts: DataCounts,
    *,
    split: str = "train",
    shape: str | None = None,
    rule: ScoreRule | None = None,
    streaming: bool = False,
    name: str | None = None,
    columns: Mapping[str, str | None] | None = None,
) -> Iterator[PreferenceRow]:
    """Yields the rows of a dataset, whatever its shape.

    The shape is that of the first row that can be used, and is required of all rows.

    Args:
        source: A file (see `SUFFIXES`), a glob of files, a folder of them or one written by `Dataset.save_to_disk`, a
            `datasets.Dataset` or `IterableDataset`, a list of rows, a name on the Hugging Face hub, or any of these as
            `located` has found it.
        counts: Ledger, which decides what happens to bad rows, and records the shape.
        split: Split of a hub dataset, of a folder whose files are named by split, or of a saved `DatasetDict`.
        shape: A name of `DATA_SHAPES`, or None to detect it.
        rule: Rule by which scored responses are split, or None for the default rule.
        streaming: Whether a hub dataset is read row by row, and not downloaded and prepared first.
        name: Name of a source that is neither a text nor a path in the names of its rows, or None for the source of
            `counts`.
        columns: Columns of the source, by the names that shapes know (see `infopo.vocabulary.check_columns`).

    Raises:
        DataError: The source cannot be read, has no row, or no row that can be used. Or a row cannot be used and
            `counts.on_bad_row` is `raise`.
        ConfigError: `shape` is unknown, or `source` is none of the above.

    Example:
        >>> counts = DataCounts()
        >>> rows = read_rows([{"prompt": "1+1=", "chosen": "2", "rejected": "3"}], counts)
        >>> [row.chosen for row in rows], counts.shapes["dataset"][:19]
        ([['2']], 'standard (detected)')
    """
    if shape is not None and shape not in DATA_SHAPES:
        shapes = ", ".join(DATA_SHAPES)
        raise ConfigError(
            f"data.shape: no shape {shape!r}{suggestion(shape, DATA_SHAPES)}; there are {shapes}"
        )
    if columns and (problems := check_columns(columns)):
        raise ConfigError([f"data.columns.{problem}" for problem in problems])
    default = name or counts.source or "dataset"
    door = Door(str(source) if isinstance(source, str | Path) else default, shape, columns, counts)
    raw_rows = _open_source(located(source, door.name, split, streaming), door)
    counts.source = counts.source or door.name
    return _judged_rows(raw_rows, door, rule)


def read_mixture(
    sources: Sequence[tuple[str, Iterator[PreferenceRow]]],
    weights: Sequence[float] | None,
    counts: DataCounts,
) -> Iterator[PreferenceRow]:
    """Yields the rows of several sources: one source after the other, or mixed in proportion to weights.

    In a mixture, the next row is always of the source that is furthest behind its share, so that every beginning of the
    mixture has these shares, to within a row. It ends when a source runs out, because no row is repeated.

    Args:
        sources: Name and rows of each source.
        weights: A weight above 0 per source, or None for all rows of all sources, in order.
        counts: Ledger, which counts the rows of each source.

    Example:
        >>> letters = [("a", iter("AAAA")), ("b", iter("BB"))]  # any rows will do
        >>> "".join(read_mixture(letters, [2.0, 1.0], DataCounts()))
        'AABAAB'
    """
    names, rows = [name for name, _ in sources], [rows for _, rows in sources]
    taken = [0] * len(rows)
    order = _in_order(rows, taken) if weights is None else _in_proportion(rows, taken, weights)
    for index, row in order:
        taken[index] += 1
        counts.notes[f"row from {names[index]}"] += 1
        yield row


def _in_order(rows: list[Iterator[PreferenceRow]], taken: list[int]) -> Iterator[tuple[int, PreferenceRow]]:
    return ((index, row) for index, of_source in enumerate(rows) for row in of_source)


def _in_proportion(
    rows: list[Iterator[PreferenceRow]], taken: list[int], weights: Sequence[float]
) -> Iterator[tuple[int, PreferenceRow]]:
    while True:
        index = min(range(len(rows)), key=lambda i: (taken[i] + 1) / weights[i])
        row = next(rows[index], None)
        if row is None:
            return
        yield index, row


def _judged_rows(raw_rows: Iterator[NamedRow], door: Door, rule: ScoreRule | None) -> Iterator[PreferenceRow]:
    counts, name = door.counts, door.name
    required, seen, used = door.shape, 0, 0
    first_problem: DataError | None = None
    for row_id, raw in raw_rows:
        counts.rows += 1
        seen += 1
        try:
            row, required = _parse(raw, row_id, door, required, rule)
        except DataError as error:
            first_problem = first_problem or error
            counts.bad_row(error)
            continue
        if not used:
            how = "named" if door.shape else "detected"
            counts.shapes[name] = f"{required} ({how}): {DATA_SHAPES[required]}"
        used += 1
        yield row
    if not seen:
        raise DataError("expected rows, got none: the file is empty", name, "no rows")
    door.close()
    if not used:
        problem = f"none of its {seen} rows can be used; the first: {first_problem}"
        raise DataError(problem, name, "no usable row")


def _parse(
    raw: object, row_id: str, door: Door, required: str | None, rule: ScoreRule | None
) -> tuple[PreferenceRow, str]:
    """Returns the row and its shape, which is the required one or, if none is required yet, the row's own."""
    if isinstance(raw, DataError):
        raise raw
    try:
        return _parsed(door.opened(raw, row_id), row_id, door, required, rule)
    except RecursionError as error:
        raise DataError("objects and lists are nested too deeply", row_id, "wrong type") from error


def _parsed(
    row: Mapping[str, Any], row_id: str, door: Door, required: str | None, rule: ScoreRule | None
) -> tuple[PreferenceRow, str]:
    shape = required or detect_shape(row, row_id)
    is_named = door.shape is not None
    if not is_named and _own_shape(row, row_id) == shape and _lacks_a_prompt(row, shape):
        _refuse_texts_beside(row, shape, row_id)
    try:
        parts = parse_row(row, shape, row_id, rule)
    except DataError as error:
        if not is_named and required and _own_shape(row, row_id) not in (None, shape):
            looks_like = f"the rows before are {shape}, this one looks like {_own_shape(row, row_id)}"
            problem = f"{error.problem}; {looks_like}"
            raise DataError(problem, row_id, error.reason) from error
        raise
    # This comes after parsing, whose errors say which column is wrong. Here a row is sound, but of another shape.
    if not is_named and (own := detect_shape(row, row_id)) != shape:
        before, here = f"{shape} ({DATA_SHAPES[shape]})", f"{own} ({DATA_SHAPES[own]})"
        problem = f"expected the shape of the rows before, {before}, got {here}"
        raise DataError(problem, row_id, "another shape")
    prompt, chosen, rejected, tools, chat_template_kwargs = parts
    door.counts.ignored.update(ignored_columns(row, shape, [prompt, *chosen, *rejected], tools, row_id))
    return PreferenceRow(prompt, chosen, rejected, row_id, chat_template_kwargs, tools), shape


def _lacks_a_prompt(row: Mapping[str, Any], shape: str) -> bool:
    """Whether answers are all that `chosen` and `rejected` may hold."""
    is_turns = shape == "conversational_implicit" and begins_with_an_answer(row.get("chosen"))
    return is_turns or shape == "standard_implicit"


def _refuse_texts_beside(row: Mapping[str, Any], shape: str, row_id: str) -> None:
    if texts := texts_beside(row):
        first = texts[0] if texts[0] == texts[0].strip() else repr(texts[0])
        problem = (
            f"beside chosen and rejected there is text in {names(texts)}, which may be the prompt: say so with "
            f"data.columns: {{prompt: {first}}}, leave it out with {{{first}: null}}, or name data.shape: "
            f"{shape} (the prompt is what chosen and rejected begin with alike)"
        )
        raise DataError(problem, row_id, "ignored column")


def _own_shape(row: Mapping[str, Any], row_id: str) -> str | None:
    try:
        return detect_shape(row, row_id)
    except DataError:
        return None


@dataclass(frozen=True)
class Files:
    """Data files, which are read one after the other.

    Attributes:
        files: Path of each file, and its name in the names of rows.
        are_found: Whether the user named a folder or pattern, in which they were found.
    """

    files: tuple[tuple[Path, str], ...]
    are_found: bool


Located: TypeAlias = "list[Any] | tuple[Any, ...] | Files | datasets.Dataset | datasets.IterableDataset"
"""Rows whose place is known: files are there but not open, and a data set of the hub is loaded."""


def located(source: Any, name: str, split: str = "train", streaming: bool = False) -> "Located":
    """Finds the rows of a source, and reads none.

    Args:
        source: See `read_rows`.
        name: Name of the source in errors.
        split: See `read_rows`.
        streaming: See `read_rows`.

    Raises:
        DataError: There is no such file, or the data set cannot be loaded.
        ConfigError: The source is of another kind.
    """
    if isinstance(source, list | tuple | Files):
        return source
    if not isinstance(source, str | Path):
        return _check_dataset(source, name)
    path = Path(source).expanduser()
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        # The name is too long for a file or has a null character, or the folder may not be read.
        raise unreadable(name, error) from error
    if is_folder and any((path / mark).exists() for mark in _SAVED):
        return _load_saved(path, name, split)
    if is_folder:
        return Files(tuple((file, str(file)) for file in _files_in(path, name, split)), True)
    if exists:
        return Files(((path, name),), False)
    if glob.has_magic(name):
        return Files(tuple((file, str(file)) for file in _matches(path, name)), True)
    if isinstance(source, Path) or name.endswith(SUFFIXES) or name.startswith(("./", "../", "/", "~")):
        raise DataError(f"no such file (looked in {Path.cwd()})", name, "no such file")
    return _load_from_hub(name, split, streaming)


def _open_source(found: "Located", door: Door) -> Iterator[NamedRow]:
    """Returns the rows of the source, before they are judged. Suffixes are checked at once, files are opened lazily."""
    if isinstance(found, list | tuple):
        return _numbered(door.name, enumerate(found, 1))
    if not isinstance(found, Files):
        return _numbered(door.name, _dataset_rows(found, door))
    if found.are_found:
        door.counts.files[door.name] = [str(path) for path, _ in found.files]
    return chain.from_iterable([_numbered(name, file_rows(path, name, door)) for path, name in found.files])


def _numbered(name: str, rows: Iterable[RawRow]) -> Iterator[NamedRow]:
    """Yields each row under its name, `SOURCE:ROW`."""
    return ((f"{name}:{number}", row) for number, row in rows)


def _matches(path: Path, name: str) -> list[Path]:
    paths = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
    matches = sorted(file for file in map(Path, paths) if file.is_file())
    if not matches:
        raise DataError(f"no file matches (looked in {Path.cwd()})", name, "no such file")
    return matches


def _files_in(folder: Path, name: str, split: str) -> list[Path]:
    """Returns the data files of a folder that belong to the split, by the hub's rules for a repository's files."""
    from datasets.data_files import DataFilesList, EmptyDatasetError, get_data_patterns

    expected = (
        f"expected a folder with files of {', '.join(SUFFIXES)}, or one written by Dataset.save_to_disk"
    )
    try:
        patterns = get_data_patterns(str(folder))
    except EmptyDatasetError as error:
        raise DataError(f"{expected}; it has no files", name, "no such file") from error
    if split not in patterns:
        there_are = ", ".join(map(str, patterns))
        raise DataError(
            f"no files of the split {split!r}; by their names there are {there_are}", name, "no such file"
        )
    found = DataFilesList.from_patterns(patterns[split], base_path=str(folder))
    # The paths begin with the folder as the user named it. `relpath` works whether or not links are resolved.
    files = sorted(folder / os.path.relpath(file, folder) for file in found if file.endswith(SUFFIXES))
    if not files:
        raise DataError(f"{expected}; none of its {len(found)} files is one", name, "no such file")
    return files


def _dataset_rows(dataset: "datasets.Dataset | datasets.IterableDataset", door: Door) -> Iterator[RawRow]:
    import datasets

    if isinstance(dataset, datasets.IterableDataset):
        return _stream_rows(dataset.with_format(None), door)
    if dataset.format["type"] == "custom":
        # The user has set a transform, and means its rows.
        return _stream_rows(dataset, door)
    # A format that was set for training would turn values into tensors.
    dataset = dataset.with_format(None)
    found = dataset.column_names
    texts = text_columns(dataset.features.arrow_schema)
    columns = door.columns(found, door.name, texts) if len(dataset) else []
    return ((number, door.columnar(row)) for number, row in enumerate(dataset.select_columns(columns), 1))


def _stream_rows(dataset: "datasets.Dataset | datasets.IterableDataset", door: Door) -> Iterator[RawRow]:
    """Yields the rows of a stream, or of a dataset with a transform, whose columns are known when a row is read."""
    import datasets

    number = 0
    try:
        for number, row in enumerate(dataset, 1):
            yield number, door.columnar(row) if isinstance(row, Mapping) else row
    except Exception as error:  # network, files, and functions of the user's each have their own classes
        what = "the stream" if isinstance(dataset, datasets.IterableDataset) else "the dataset's transform"
        problem = f"{what} broke off after this row: {error or type(error).__name__}"
        raise DataError(problem, f"{door.name}:{number}", "unreadable") from error


def _check_dataset(source: object, name: str) -> "datasets.Dataset | datasets.IterableDataset":
    import datasets

    if isinstance(source, datasets.Dataset | datasets.IterableDataset):
        return source
    if isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict):
        splits = ", ".join(map(str, source))
        raise DataError(
            f"expected one dataset, got a dictionary of splits; pick one of: {splits}", name, "several splits"
        )
    raise ConfigError(
        f"data: expected a file, a hub name, a datasets.Dataset or a list of rows, got "
        f"{type(source).__name__} (datasets.Dataset.from_dict, from_generator and the like make one)"
    )


def _load_saved(path: Path, name: str, split: str) -> "datasets.Dataset | datasets.IterableDataset":
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        # A damaged folder fails in as many ways as there are files in it.
        problem = f"expected a file, or a folder written by Dataset.save_to_disk: {error}"
        raise DataError(problem, name, "unreadable") from error
    if isinstance(loaded, Mapping) and split in loaded:
        loaded = loaded[split]
    return _check_dataset(loaded, name)


def _load_from_hub(name: str, split: str, streaming: bool) -> "datasets.Dataset | datasets.IterableDataset":
    import datasets

    try:
        loaded = datasets.load_dataset(name, split=split, streaming=streaming)
    except Exception as error:
        # Network, hub, cache and builder each have errors of their own classes.
        problem = (
            f"no such file here, and it cannot be loaded from the Hugging Face hub (split {split!r}): {error}\n"
            "Check the name and the split, and that the hub can be reached (private data: hf auth login); "
            "or download the data and give the path of a file"
        )
        raise DataError(problem, name, "hub") from error
    return _check_dataset(loaded, name)
