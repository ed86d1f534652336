"""Encoded examples on disk, with the account of their rows: made once, found by content, shared by processes.

    <folder>/                         $INFOPO_CACHE/examples, else ~/.cache/infopo/examples
      <key>.examples                  one dataset, whose key (`content.examples_key`) is all that decides its content
      .<random>.tmp                   one that is being written, or that a killed process has left

A file is `_MAGIC`, the XXH3 of all that follows, the length of the header, the header (JSON: account, and place of each
array), and the arrays. It is written under another name and renamed, so that it is whole or does not exist. Two
processes that write the same key write the same content. It is never changed, only replaced or removed, so that
processes can map it into their memory, and share it. Whoever opens it compares the hash, and removes it if it is
damaged.

The folder is kept below `LIMIT_BYTES`: whoever writes removes files that have not been used for longest. It may be
deleted at any time.
"""

import contextlib
import json
import mmap
import os
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from infopo import durable
from infopo.data.counts import DataCounts
from infopo.data.examples import ExampleDataset
from infopo.output import get_logger

logger = get_logger(__name__)

LIMIT_BYTES = 20 * 2**30
"""Largest size of a folder: 20 GiB, or some 80 data sets of 61,000 pairs."""

_SUFFIX = ".examples"
_MAGIC = b"infopo examples1"
_HEAD = len(_MAGIC) + 16 + 8
_ALIGNMENT = 64
_LEFT_BEHIND_SECONDS = 3600
"""Age from which a file that is being written is one that a killed process has left."""


def restore(counts: DataCounts, stored: dict[str, Any]) -> None:
    """Makes an account what it was when examples were stored."""
    for field in fields(counts):
        value = stored[field.name]
        setattr(counts, field.name, Counter(value) if field.default_factory is Counter else value)


class ExampleStore:
    """A folder of encoded examples.

    Args:
        folder: It is made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """Returns the file of a key, which may not exist."""
        return self.folder / f"{key}{_SUFFIX}"

    def find(self, key: str) -> tuple[ExampleDataset, dict[str, Any]] | None:
        """Returns stored examples and their account, or None. A damaged file is removed."""
        path = self.path(key)
        try:
            found = read(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("%s: cannot be read (%s); the rows are encoded anew", path, error)
            return None
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s: is damaged (%s); it is removed, and the rows are encoded anew", path, error)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return found

    def add(self, key: str, dataset: ExampleDataset, counts: DataCounts) -> Path | None:
        """Writes examples, and returns their file, or None with a warning if that is not possible."""
        path = self.path(key)
        try:
            write(path, dataset, counts)
        except OSError as error:
            logger.warning(
                "%s: encoded rows cannot be kept for later runs (%s); name a folder with data.cache (dataset_cache "
                "in a script), or set it to off", path, error.strerror or error,
            )  # fmt: skip
            return None
        with contextlib.suppress(OSError):
            self._clean(path)
        return path

    def _clean(self, newest: Path) -> None:
        """Removes what has not been used for longest until the rest is small enough, and what killed processes left."""
        durable.remove_left_behind(self.folder, _LEFT_BEHIND_SECONDS)
        states = [(path, path.stat()) for path in self.folder.glob(f"*{_SUFFIX}") if path != newest]
        room = LIMIT_BYTES - newest.stat().st_size
        for path, state in sorted(states, key=lambda each: each[1].st_mtime, reverse=True):
            room -= state.st_size
            if room < 0:
                path.unlink(missing_ok=True)


def write(path: Path, dataset: ExampleDataset, counts: DataCounts) -> None:
    """Writes examples and their account to a file, which exists as a whole or not at all.

    Raises:
        OSError: The file cannot be written.
    """
    places, blocks, size = dict[str, list[Any]](), list[bytes | memoryview](), 0
    for name, array in dataset.arrays().items():
        array = np.ascontiguousarray(array)
        places[name] = [array.dtype.str, list(array.shape), size]
        padding = -array.nbytes % _ALIGNMENT
        blocks += [array.reshape(-1).view(np.uint8).data, bytes(padding)]
        size += array.nbytes + padding
    header = json.dumps({"counts": vars(counts), "arrays": places}).encode()
    header += b" " * (-(_HEAD + len(header)) % _ALIGNMENT)
    parts = [len(header).to_bytes(8, "little"), header, *blocks]
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write(path, [_MAGIC, digest.digest(), *parts])


def read(path: Path) -> tuple[ExampleDataset, dict[str, Any]]:
    """Returns the examples of a file, whose arrays are the file in memory, and their account.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is damaged.
    """
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if content[: len(_MAGIC)] != _MAGIC:
        raise ValueError("it does not begin as such a file does")
    begin = len(_MAGIC) + 16
    with memoryview(content) as view:
        if xxhash.xxh3_128(view[begin:]).digest() != content[len(_MAGIC) : begin]:
            raise ValueError("its bytes do not have the hash that it names")
    first = _HEAD + int.from_bytes(content[begin:_HEAD], "little")
    header = json.loads(content[_HEAD:first])
    arrays = {
        name: _array(content, dtype, shape, first + place)
        for name, (dtype, shape, place) in header["arrays"].items()
    }
    return ExampleDataset.from_arrays(arrays), header["counts"]


def _array(content: mmap.mmap, dtype: str, shape: list[int], place: int) -> npt.NDArray[Any]:
    count = int(np.prod(shape))
    return np.frombuffer(content, dtype=np.dtype(dtype), count=count, offset=place if count else 0).reshape(
        shape
    )
