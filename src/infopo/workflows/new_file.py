"""Files that a command writes for the user, and never over another one."""

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
