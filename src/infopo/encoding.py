"""Rows are encoded once: by one process of each machine, and not again by a later run on the same rows.

The first process of a machine encodes, or finds what an earlier run has kept (`data/example_store.py`). The others
wait, and map the same file into their memory, where it takes the room of one copy.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from infopo import caches, ranks
from infopo.data.content import examples_key, stamps
from infopo.data.counts import DataCounts
from infopo.data.encode import Encoder
from infopo.data.example_store import ExampleStore, read, restore, write
from infopo.data.examples import ExampleDataset
from infopo.data.sources import Located
from infopo.data.templates import TAKES_TOO_LONG
from infopo.output import get_logger

logger = get_logger(__name__)


def encode_once(
    sources: Sequence[Located],
    encoder: Encoder,
    counts: DataCounts,
    encode: Callable[[DataCounts], ExampleDataset],
    *,
    reading: Mapping[str, Any],
    cache: str | None,
) -> ExampleDataset:
    """Returns what `encode` returns, and counts what it counts, without doing the work twice.

    All processes of a run have to call this together.

    Args:
        sources: The rows that `encode` reads.
        encoder: The encoder that it uses.
        counts: Ledger of these rows, which is empty.
        encode: Reads and encodes the rows, and counts them.
        reading: All settings that `encode` depends on beside these, in values of JSON.
        cache: Folder that encoded rows are kept in. `auto` is the user's cache, and `off` or None keeps none.

    Raises:
        InfoPOError: What `encode` raises, on all processes.
    """
    folder = caches.folder_of(cache, "examples")
    own: list[ExampleDataset] = []

    def first() -> tuple[Path | None, bool]:
        dataset, path = _found_or_encoded(sources, encoder, counts, encode, reading, folder)
        own.append(dataset)
        if path is None and ranks.number() > 1:
            return _handed_over(dataset, counts), True
        return path, False

    path, is_temporary = ranks.from_first_of_machine(first)
    if ranks.number() == 1:
        return own[0]
    dataset = own[0] if own else _read(path, counts)
    if is_temporary and path is not None:
        ranks.wait_for_each_other()
        if own:
            path.unlink(missing_ok=True)
            path.parent.rmdir()
    # Without a file that all of them can read, each process has to do the work.
    return encode(counts) if dataset is None else dataset


def _found_or_encoded(
    sources: Sequence[Located],
    encoder: Encoder,
    counts: DataCounts,
    encode: Callable[[DataCounts], ExampleDataset],
    reading: Mapping[str, Any],
    folder: Path | None,
) -> tuple[ExampleDataset, Path | None]:
    """Returns the examples, and the file in which they are kept, if they are."""
    before = stamps(sources)
    account = {"on_bad_row": counts.on_bad_row, "source": counts.source}
    key = None if folder is None else examples_key(sources, encoder, {**account, **reading})
    if folder is None or key is None:
        return encode(counts), None
    store = ExampleStore(folder)
    if (found := store.find(key)) is not None:
        dataset, stored = found
        restore(counts, stored)
        logger.info("%s: %d examples, encoded before, from %s", counts.source, len(dataset), store.path(key))
        return dataset, store.path(key)
    dataset = encode(counts)
    # The key is that of the files as they were. A template's time is the machine's affair, and may suffice next time.
    if stamps(sources) != before or TAKES_TOO_LONG in counts.skipped:
        return dataset, None
    path = store.add(key, dataset, counts)
    # What is used is what was written, and other processes share its memory.
    found = None if path is None else store.find(key)
    return (dataset, None) if found is None else (found[0], path)


def _handed_over(dataset: ExampleDataset, counts: DataCounts) -> Path | None:
    """Writes examples for the other processes of this machine, which remove the file when all have opened it."""
    try:
        path = Path(tempfile.mkdtemp(prefix="infopo-")) / "rows.examples"
        write(path, dataset, counts)
    except OSError as error:
        logger.warning("encoded rows cannot be handed to other processes (%s); each encodes its own", error)
        return None
    return path


def _read(path: Path | None, counts: DataCounts) -> ExampleDataset | None:
    if path is None:
        return None
    try:
        dataset, stored = read(path)
    except (OSError, ValueError, KeyError) as error:
        logger.warning("%s: cannot be read (%s); this process encodes the rows itself", path, error)
        return None
    restore(counts, stored)
    return dataset
