"""Where and with what a run is made: versions, commits, hardware, command line. Imports no torch."""

import contextlib
import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infopo.secrets import masked_argument

SCHEMA_VERSION = 1
"""Version of `environment.json`, which rises if a reader must know about a change."""

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy", "peft")
"""Packages whose versions a run records."""


def environment(
    *,
    seed: int | None,
    packages: Sequence[str] = PACKAGES,
    accelerators: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns a record of where and with what a run is made.

    Args:
        seed: Seed of the run, or None if none is set.
        packages: Distributions whose versions are recorded, as null if they are not installed.
        accelerators: Names of the devices in use. They are an argument, because asking for them needs torch.
        extra: Further keys, which replace those of the same name.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "infopo": _version("infopo"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "git": _git_state(Path.cwd()),
        "infopo_git": own_git_state(),
        "platform": platform.platform(),
        "hardware": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "memory_bytes": _memory_bytes(),
            "accelerators": list(accelerators),
        },
        "command_line": [masked_argument(argument) for argument in sys.argv],
        "seed": seed,
        **(extra or {}),
    }


@functools.cache
def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state(directory: Path) -> dict[str, Any] | None:
    """Returns the commit of the repository around `directory`, and whether it has changes, or None without one."""
    if _git(directory, "rev-parse", "--is-inside-work-tree") != "true":
        return None
    changes = _git(directory, "status", "--porcelain")
    return {
        "commit": _git(directory, "rev-parse", "--verify", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }


@functools.cache
def own_git_state() -> dict[str, Any] | None:
    """Returns the state of the checkout that infopo itself runs from, or None if it is installed elsewhere."""
    package = Path(__file__).parent
    # A virtual environment may be inside some repository that does not track its files.
    is_tracked = _git(package, "ls-files", "--error-unmatch", Path(__file__).name) is not None
    return _git_state(package) if is_tracked else None


def _git(directory: Path, *arguments: str) -> str | None:
    """Returns what git prints, or None if it fails, hangs or is not installed."""
    quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=directory,
            env=quiet,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()


@functools.cache
def _cpu_model() -> str | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
