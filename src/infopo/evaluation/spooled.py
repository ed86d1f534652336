"""What is too much for memory and is needed for moments only, in temporary files: prompts, and places of lines.

The files have no name and end with the process. Imports no torch.
"""

import pickle
import sqlite3
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, overload

from infopo.evaluation.items import Item


class SpooledItems(Sequence[Item]):
    """Items in a temporary file, of which 8 bytes each are in memory. A slice shares the file.

    Args:
        items: The items.

    Example:
        >>> items = SpooledItems(Item(str(n), "What?", n) for n in range(5))
        >>> len(items), items[-1].id, [item.id for item in items[1:3]]
        (5, '4', ['1', '2'])
    """

    def __init__(self, items: Iterable[Item]) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - it is closed with the last slice
        self._places = array("q")
        for item in items:
            self._places.append(self._file.tell())
            pickle.dump(item, self._file)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> "SpooledItems": ...

    def __getitem__(self, index: int | slice) -> "Item | SpooledItems":
        if isinstance(index, slice):
            part = SpooledItems.__new__(SpooledItems)
            part._file, part._places = self._file, self._places[index]
            return part
        self._file.seek(self._places[index])
        item: Item = pickle.load(self._file)  # this process has written it
        return item

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in range(len(self)))


class Places:
    """Where lines begin in files, by key and number, in a temporary database with a cache of 2 MiB.

    Example:
        >>> places = Places()
        >>> places.add([("a", 1, Path("x.jsonl"), 30), ("a", 0, Path("x.jsonl"), 70), ("b", 0, Path("x.jsonl"), 0)])
        >>> [place for _, place in places.of("a")], len(places), "c" in places
        ([70, 30], 3, False)
    """

    def __init__(self) -> None:
        # The empty name is that of a private database on disk, which sqlite removes when it is closed.
        self._base = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._base.execute("PRAGMA journal_mode = OFF")
        self._base.execute("CREATE TABLE places (key BLOB, number INT, file INT, place INT)")
        self._base.execute("CREATE INDEX by_key ON places (key, number, place)")
        self._files: list[Path] = []
        self._count = 0

    def add(self, lines: Iterable[tuple[str, int, Path, int]]) -> None:
        """Adds lines as (key, number, file, byte that it begins at)."""
        self._base.execute("BEGIN")
        for key, number, file, place in lines:
            if file not in self._files:
                self._files.append(file)
            row = (_bytes(key), number, self._files.index(file), place)
            self._base.execute("INSERT INTO places VALUES (?, ?, ?, ?)", row)
            self._count += 1
        self._base.execute("COMMIT")

    def of(self, key: str) -> list[tuple[Path, int]]:
        """Returns file and byte of each line with this key, by number, then by place."""
        query = "SELECT file, place FROM places WHERE key = ? ORDER BY number, place"
        return [(self._files[file], place) for file, place in self._base.execute(query, (_bytes(key),))]

    def __contains__(self, key: str) -> bool:
        query = "SELECT 1 FROM places WHERE key = ? LIMIT 1"
        return self._base.execute(query, (_bytes(key),)).fetchone() is not None

    def __len__(self) -> int:
        return self._count


def _bytes(key: str) -> bytes:
    # Ids come from data, which may hold half a surrogate pair.
    return key.encode("utf-8", errors="surrogatepass")
