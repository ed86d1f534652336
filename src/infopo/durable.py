"""Files and folders that exist as a whole or not at all, whenever the process is killed or the disk fills up.

A file is written beside its place under a temporary name, flushed to the disk and renamed. What the file system refuses
is raised as OSError, and a file that was there before is then unchanged. This module imports nothing of the package.
"""

import contextlib
import os
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

_TEMPORARY = ".{}.tmp"
SET_ASIDE = ".replaced"


def write(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Writes a file, which is durable once this returns.

    Args:
        path: The file, in a folder that exists.
        parts: Its content, in pieces.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write(folder / "a", [b"once ", b"and whole"])
        >>> [file.read_bytes() for file in folder.iterdir()]
        [b'once and whole']
    """
    # Threads and processes that write the same file at once have names of their own.
    temporary = path.with_name(_TEMPORARY.format(uuid.uuid4().hex))
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def remove_left_behind(folder: Path, seconds: float | None = None) -> None:
    """Removes the temporary files in a folder that killed processes have left.

    Args:
        folder: The folder, which may not exist.
        seconds: Age from which a file is one that was left, or None if the caller knows that nobody is writing.
    """
    for path in folder.glob(_TEMPORARY.format("*")):
        # Another process may remove it first.
        with contextlib.suppress(FileNotFoundError):
            if seconds is None or time.time() - path.stat().st_mtime > seconds:
                path.unlink()


def put(new: Path, final: Path, aside: Path) -> None:
    """Renames a file or folder into place, where it replaces what has this name.

    A rename cannot replace a folder that has files in it, and a kill while a folder is deleted would leave half of it.
    The old one is therefore moved into the folder `aside` first, which the caller removes afterwards.
    """
    if final.is_dir() or (new.is_dir() and final.exists()):
        replaced = aside / SET_ASIDE
        replaced.mkdir(exist_ok=True)
        final.replace(replaced / final.name)
    new.replace(final)


def sync(path: Path) -> None:
    """Makes one file, or the names in one folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Makes a folder durable, with everything in it."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def with_home(path: str) -> str:
    """Returns a path with the home folder in place of `~` if it begins with `~/`, and any other text unchanged.

    A `~` alone may be a token or a word, so that it is left as it is.

    Example:
        >>> with_home("a/~/b"), with_home("~"), with_home("~/a").endswith("/a"), with_home("~/a").startswith("~")
        ('a/~/b', '~', True, False)
    """
    # A Path would change what is none, such as a URL.
    return os.path.expanduser(path) if path.startswith("~/") else path  # noqa: PTH111
