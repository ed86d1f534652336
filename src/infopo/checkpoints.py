"""Writes checkpoints that are whole or do not exist, and that know which run they belong to."""

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from infopo.errors import CheckpointError
from infopo.run_state import IDENTITY, STAGING, STATE, seal
from infopo.runs import fsync_path, fsync_tree, write_json_atomic

AVERAGES = "moving_averages"
REPLACED = ".replaced"


def write_identity(checkpoint: Path, identity: dict[str, Any], averages: Sequence[float]) -> None:
    """Writes which reference, objective and data the checkpoint was made with, and the objectives' moving averages.

    Args:
        checkpoint: Folder of the checkpoint.
        identity: Values that a resumed run must have in common with this one.
        averages: Logarithm of each objective's moving average (nats), NaN if it has none. A float is written with all
            its digits, so that it is read back exactly.
    """
    kept = [None if math.isnan(average) else average for average in averages]
    write_json_atomic(checkpoint / IDENTITY, {**identity, AVERAGES: kept})


def read_averages(checkpoint: Path) -> list[float]:
    """Returns the moving averages of the checkpoint's objectives (nats), NaN if an objective has none.

    The identity of the checkpoint must have been checked.

    Raises:
        CheckpointError: They are missing, or are not numbers.
    """
    saved = json.loads((checkpoint / IDENTITY).read_text(encoding="utf-8"))
    averages = saved.get(AVERAGES)
    if not isinstance(averages, list) or len(averages) != len(saved["objective"]):
        raise CheckpointError(f"{checkpoint / IDENTITY}: expected one entry of {AVERAGES} an objective")
    if not all(average is None or isinstance(average, int | float) for average in averages):
        raise CheckpointError(f"{checkpoint / IDENTITY}: {AVERAGES} holds something that is no number")
    return [math.nan if average is None else float(average) for average in averages]


def check_identity(checkpoint: Path, saved: dict[str, Any], identity: dict[str, Any]) -> None:
    """Refuses a checkpoint of another run.

    A reference that has changed is the classic silent error of resuming.

    Args:
        checkpoint: Folder of the checkpoint.
        saved: Identity that the checkpoint was written with.
        identity: Identity of this run.

    Raises:
        CheckpointError: Reference, objective or data differ. The message names each difference.
    """
    now = json.loads(json.dumps(identity))
    differing = [
        f"{key} (then {saved.get(key)}, now {now[key]})" for key in now if saved.get(key) != now[key]
    ]
    if differing:
        raise CheckpointError(
            f"{checkpoint}: was made with another {'; another '.join(differing)}. Resume with the recipe that "
            "started the run, or start a new run in another output_dir."
        )


@contextlib.contextmanager
def staged(
    run_dir: Path, state: TrainerState, args: TrainingArguments, wait_for_everyone: Callable[[], None]
) -> Iterator[Path]:
    """Provides a folder to write a checkpoint in.

    On exit the checkpoint is fsynced and renamed into place, and old checkpoints beyond `save_total_limit` are deleted.
    A kill at any moment therefore leaves a whole checkpoint or none.

    Args:
        run_dir: Folder of all checkpoints.
        state: The trainer's state, whose `best_model_checkpoint` is set to the final name.
        args: Settings, of which `should_save` and `save_total_limit` are used.
        wait_for_everyone: Barrier over ranks, so that all have written before the rename.
    """
    staging = run_dir / STAGING
    if args.should_save:
        # A killed process may have left something there.
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    wait_for_everyone()
    yield staging
    wait_for_everyone()
    if args.should_save:
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        _fix_best(state, run_dir, name)
        state.save_to_json(str(staging / name / STATE))
        if (staging / name / IDENTITY).is_file():
            seal(staging / name)
        fsync_tree(staging / name)
        final = run_dir / name
        if final.is_dir():
            # It is moved away first, because a kill while it is deleted would leave half a checkpoint.
            final.replace(staging / f"{name}.old")
        (staging / name).replace(final)
        fsync_path(run_dir)
        shutil.rmtree(staging, ignore_errors=True)
        rotate_checkpoints(
            output_dir=str(run_dir),
            save_total_limit=args.save_total_limit,
            best_model_checkpoint=state.best_model_checkpoint,
            use_mtime=True,
        )
    wait_for_everyone()
    # The other ranks have the temporary name, too.
    _fix_best(state, run_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def remove_staging(run_dir: Path) -> None:
    """Removes what a failed save has left."""
    shutil.rmtree(run_dir / STAGING, ignore_errors=True)


def _fix_best(state: TrainerState, run_dir: Path, newest: str) -> None:
    """Sets the best checkpoint to its final path, in place of the temporary one that transformers has recorded."""
    if state.best_global_step:
        best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        state.best_model_checkpoint = str(best) if best.is_dir() or best.name == newest else None


@contextlib.contextmanager
def staged_files(
    directory: Path, args: TrainingArguments, wait_for_everyone: Callable[[], None]
) -> Iterator[Path]:
    """Provides a folder to write files in. On exit they are fsynced and moved, one by one, into `directory`."""
    staging = directory / STAGING
    if args.should_save:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    wait_for_everyone()
    yield staging
    wait_for_everyone()
    if args.should_save:
        fsync_tree(staging)
        _move_into(directory, staging)
        shutil.rmtree(staging)
    wait_for_everyone()


def _move_into(directory: Path, staging: Path) -> None:
    """Moves everything in `staging` into `directory`, where each artefact replaces the one of the same name.

    A tokenizer with several chat templates and a second adapter are saved as folders. A rename cannot replace a folder
    that has files in it, so the old one is moved aside first.
    """
    replaced = staging / REPLACED
    for new in sorted(staging.iterdir()):
        final = directory / new.name
        if final.is_dir() or (new.is_dir() and final.exists()):
            replaced.mkdir(exist_ok=True)
            final.replace(replaced / new.name)
        new.replace(final)
