"""Where things are kept that can be made anew: one folder per kind, beneath one root. Imports no torch."""

import os
from pathlib import Path


def default_folder(kind: str) -> Path:
    """Returns the folder of a kind of thing: `$INFOPO_CACHE/KIND`, or else `infopo/KIND` in the user's cache."""
    if cache := os.environ.get("INFOPO_CACHE"):
        return Path(cache).expanduser() / kind
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "infopo" / kind


def folder_of(setting: str | None, kind: str) -> Path | None:
    """Returns the folder that a setting names. `auto` is the default one, and `off` and None are no folder.

    Example:
        >>> folder_of("off", "examples"), folder_of("/tmp/store", "examples")
        (None, PosixPath('/tmp/store'))
    """
    if setting is None or setting == "off":
        return None
    return default_folder(kind) if setting == "auto" else Path(setting).expanduser()
