"""What a run directory holds and who is using it: checkpoints and whether they are sound, a model, a lock.

Imports neither torch nor transformers, so that a directory is judged before they are loaded.
"""

import contextlib
import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock, Timeout

from infopo import durable
from infopo.errors import CheckpointError, ConfigError
from infopo.output import get_logger
from infopo.runs import EVALUATION, METRICS, write_json_atomic

logger = get_logger(__name__)

IDENTITY = "infopo_state.json"
STATE = "trainer_state.json"
STAGING = ".staging"
LOCK = ".lock"
FILES = "files"
"""Key of `infopo_state.json`: size and XXH3 of every other file of the checkpoint."""

MODELS = (
    "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "pytorch_model.bin",
)  # fmt: skip
"""One of these files is in a directory with a trained model."""

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_PIECE = 1 << 24

_locks: dict[Path, FileLock] = {}
"""Locks of this process, by directory: a second trainer of the same process shares them."""


def checkpoints_in(run_dir: str | Path) -> list[Path]:
    """Checkpoints of a run by their names, the newest first."""
    folder = Path(run_dir)
    found = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    steps = {path: int(match[1]) for path in found if (match := _CHECKPOINT.fullmatch(path.name))}
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def last(run_dir: str | Path) -> str | None:
    """The newest checkpoint of a run, or None."""
    return next(map(str, checkpoints_in(run_dir)), None)


def holds_run(run_dir: Path) -> bool:
    """Whether something is there that a second run would spoil: a checkpoint, a model, an evaluation."""
    return any((run_dir / name).exists() for name in (EVALUATION, *MODELS)) or last(run_dir) is not None


def refuse_to_hold_runs(folder: Path) -> None:
    """Refuses a folder whose runs are to be folders beneath it, if it is the run directory of one training.

    Raises:
        ConfigError: It is.
    """
    if holds_run(folder):
        raise ConfigError(
            f"output_dir: {folder} holds a run of its own, and those of this command are folders beneath it; name "
            "another one"
        )


def set_aside_metrics(run_dir: Path) -> Path | None:
    """Renames the metrics of a run that saved nothing, so that the next one begins a file of its own.

    Returns:
        The new name, or None if there are no metrics.
    """
    metrics = run_dir / METRICS
    if not metrics.exists():
        return None
    names = (metrics.with_name(f"metrics.before-{number}.jsonl") for number in range(1, 10**6))
    return metrics.rename(next(name for name in names if not name.exists()))


def kept(run_dir: str | Path) -> str:
    """One sentence for an error message: what is kept of a run, and how to go on."""
    found = last(run_dir)
    if found is None:
        return f"No checkpoint had been saved to {run_dir} before"
    return f"{found} is whole and kept; resume_from_checkpoint=true goes on from it"


# --- checkpoints ---


def seal(checkpoint: Path) -> None:
    """Notes size and XXH3 of every file of a finished checkpoint in its `infopo_state.json`."""
    path = checkpoint / IDENTITY
    about = json.loads(path.read_text(encoding="utf-8"))
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file() and file != path)
    write_json_atomic(path, {**about, FILES: {str(f.relative_to(checkpoint)): _digest(f) for f in files}})


def read_identity(checkpoint: Path) -> dict[str, Any]:
    """What `infopo_state.json` of a checkpoint says.

    Raises:
        CheckpointError: It is not there, or is damaged.
    """
    path = checkpoint / IDENTITY
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint}: has no {IDENTITY}; infopo did not write it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged ({error}); resume from an earlier checkpoint") from error
    if not isinstance(about, dict):
        raise CheckpointError(f"{path}: is damaged (no JSON object); resume from an earlier checkpoint")
    return about


def look_at(checkpoint: Path) -> dict[str, Any]:
    """Returns what `infopo_state.json` says of a folder that looks like a checkpoint, whose other files are not read.

    Raises:
        CheckpointError: It is none, or not one of ours.
    """
    if not (checkpoint / STATE).is_file():
        raise CheckpointError(f"{checkpoint}: is no checkpoint (it holds no {STATE})")
    return read_identity(checkpoint)


def verify(checkpoint: Path) -> None:
    """Refuses a checkpoint with a file that is missing or that is not the one that was written.

    Nothing in it is unpickled or run.

    Raises:
        CheckpointError: Names the file.
    """
    files = look_at(checkpoint).get(FILES, {})
    if not isinstance(files, dict):
        raise CheckpointError(f"{checkpoint / IDENTITY}: is damaged ({FILES} is no JSON object)")
    for name, expected in files.items():
        try:
            found = _digest(checkpoint / name)
        except OSError as error:
            raise CheckpointError(
                f"{checkpoint / name}: cannot be read: {error.strerror or error}"
            ) from error
        if found != expected:
            raise CheckpointError(
                f"{checkpoint / name}: is damaged: its bytes are not those that were written ({found[0]} bytes, "
                f"expected {expected[0] if isinstance(expected, list) and expected else 'others'}); resume from an "
                "earlier checkpoint"
            )


def _digest(path: Path) -> list[Any]:
    """Size in bytes, and XXH3 in hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
        return [file.tell(), digest.hexdigest()]


def find(resume_from_checkpoint: str | bool, run_dir: str | Path) -> Path:
    """Returns the checkpoint to resume from: the one named, or (True) the newest sound one.

    It warns about each that is damaged.

    Raises:
        CheckpointError: There is none, or the one named is damaged.
    """
    if isinstance(resume_from_checkpoint, str):
        verify(Path(resume_from_checkpoint))
        return Path(resume_from_checkpoint)
    problems: list[CheckpointError] = []
    for checkpoint in checkpoints_in(run_dir):
        try:
            verify(checkpoint)
        except CheckpointError as error:
            problems.append(error)
            continue
        for problem in problems:
            logger.warning("%s. %s is taken instead", problem, checkpoint)
        return checkpoint
    if problems:
        raise problems[0]
    raise CheckpointError(f"{run_dir}: there is no checkpoint to resume from")


# --- the lock ---


@contextlib.contextmanager
def in_use(run_dir: str | Path) -> Iterator[None]:
    """Within it, no other process trains into this directory. The system ends the lock of a process that dies.

    It may be entered again by the same process. A file system without locks is used without one, with a warning.

    Raises:
        ConfigError: Another run is using the directory.
    """
    folder = Path(run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir: {run_dir} cannot be made: {error.strerror or error}") from error
    path = folder.resolve() / LOCK
    if path not in _locks:
        _locks[path] = FileLock(path, thread_local=False, fallback_to_soft=False)
    lock = _locks[path]
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"output_dir: {run_dir} is in use by another run ({_holder(path)}), which would mix with this one: name "
            "another output_dir, or wait for its end"
        ) from error
    except OSError as error:
        logger.warning("%s cannot be locked (%s): do not start another run in it", run_dir, error)
        yield
        return
    with contextlib.suppress(OSError):
        if lock.lock_counter == 1:  # nobody else writes here, so what a killed run was writing is left behind
            durable.remove_left_behind(folder)
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    try:
        yield
    finally:
        if lock.lock_counter == 1:  # filelock gives no lock on a file that has lost its name
            path.unlink(missing_ok=True)
        lock.release()


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()[:100] or "process unknown"
    except OSError:
        return "process unknown"
