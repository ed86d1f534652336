"""Files that a command writes for the user, and never over another one."""

from collections.abc import Sequence
from pathlib import Path

from infopo.errors import ConfigError
from infopo.output import counted, say


def write_new(path: Path, text: str) -> None:
    """Writes a file that does not exist yet.

    Raises:
        ConfigError: There is such a file, or it cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError(f"{path} is there already, and is not overwritten; name another file") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def refuse_foreign(path: Path, marks: Sequence[Path], read: Sequence[str | Path | None]) -> None:
    """Refuses to write over a file that an earlier run of the command has not written, or that is read.

    Args:
        path: The output.
        marks: Files or folders that the command leaves beside its output, by any of which its own is known.
        read: The files that it reads.

    Raises:
        ConfigError: It is such a file.
    """
    if not path.exists():
        return
    refuse_what_is_read(path, read)
    if not any(mark.exists() for mark in marks):
        raise ConfigError(
            f"--output: {path} is there already, and was not written by this command; name another file"
        )


def refuse_what_is_read(path: Path, read: Sequence[str | Path | None]) -> None:
    """Refuses to write over a file that the command reads.

    Raises:
        ConfigError: It is one.
    """
    if any(source is not None and Path(source).expanduser().resolve() == path.resolve() for source in read):
        raise ConfigError(f"--output: {path} is what is read, and would be overwritten; name another file")


def rows_in(path: Path) -> int:
    """Returns the number of lines of a file, 0 if there is none."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in file)


def say_if_fewer(path: Path, rows: int, before: int, kept: Path) -> None:
    """Says so if a file of rows was replaced by one with fewer.

    Args:
        path: The file.
        rows: Number of its rows.
        before: Number of the rows that it had.
        kept: Where the samples are that rows are made of.
    """
    if rows < before:
        say(f"{path}: {counted(rows, 'row')} in place of {before}, whose samples are kept in {kept}")
