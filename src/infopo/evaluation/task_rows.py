"""Rows of a task's data: local files of any kind that training reads, a saved dataset, or the hub. Imports no torch."""

from collections.abc import Iterator, Mapping
from typing import Any

from infopo.data.door import check_object
from infopo.data.files import object_rows
from infopo.data.sources import Files, located
from infopo.errors import DataError

Row = Mapping[str, Any]


def task_rows(task: str, data: str | None, hub: tuple[str, str | None, str]) -> Iterator[tuple[str, Row]]:
    """Yields the rows of a task with their names, `SOURCE:ROW`.

    Args:
        task: Name of the task, for errors.
        data: A file (JSON, JSON lines, CSV, Parquet or Arrow, also compressed), a glob or folder of them, a folder
            written by `Dataset.save_to_disk`, or a name on the hub, whose split `hub[2]` is read. None: the task's
            own data.
        hub: The task's own data: name on the hub, configuration or None, and split.

    Raises:
        DataError: The data cannot be read, or a row is no object. Names the file and the row.
    """
    if data is None or data == hub[0]:
        name, rows = hub[0], _own_data(task, *hub)
        yield from ((f"{name}:{number}", check_object(row, name)) for number, row in enumerate(rows, 1))
        return
    found = located(data, data, hub[2])
    if isinstance(found, Files):
        for path, name in found.files:
            yield from object_rows(path, name)
        return
    for number, row in enumerate(found, 1):
        yield f"{data}:{number}", check_object(row, f"{data}:{number}")


def _own_data(task: str, name: str, configuration: str | None, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, configuration, split=split)
    except Exception as error:  # network, hub, cache and builder each have errors of their own classes
        reason = (str(error) or type(error).__name__).splitlines()[0]
        problem = (
            f"the data of task {task} is not in the cache and cannot be loaded from the Hugging Face hub "
            f"({reason:.150}); without the hub, give a file: --data {task}=FILE"
        )
        raise DataError(problem, name, "hub") from error
