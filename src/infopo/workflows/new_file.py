"""Files that a command writes for the user, and never over another one."""

from collections.abc import Sequence
from pathlib import Path

from infopo.errors import ConfigError


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


def refuse_foreign(path: Path, beside: Sequence[str], read: Sequence[str | Path | None]) -> None:
    """Refuses to write over a file that an earlier run of the command has not written, or that is read.

    Args:
        path: The output.
        beside: Endings of what the command leaves beside its output, by which its own are known.
        read: The files that it reads.

    Raises:
        ConfigError: It is such a file.
    """
    if not path.exists():
        return
    if any(source is not None and Path(source).expanduser().resolve() == path.resolve() for source in read):
        raise ConfigError(f"--output: {path} is what is read, and would be overwritten; name another file")
    if not any(path.with_name(f"{path.stem}{ending}").exists() for ending in beside):
        raise ConfigError(
            f"--output: {path} is there already, and was not written by this command; name another file"
        )
