"""Checkpoints that are whole or not there, and that know which run they belong to."""

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
    """Notes which reference, objective and data the checkpoint was made with, and what the objectives average.

    Args:
        checkpoint: Its folder.
        identity: What a run that resumes must have in common.
        averages: Logarithm of each objective's moving average (nats), NaN where it keeps none. Exact: a float is
            written with all its digits.
    """
    kept = [None if math.isnan(average) else average for average in averages]
    write_json_atomic(checkpoint / IDENTITY, {**identity, AVERAGES: kept})


def read_averages(checkpoint: Path) -> list[float]:
    """The moving averages of the checkpoint's objectives (nats), NaN where there is none.

    Of a checkpoint whose identity has been checked.

    Raises:
        CheckpointError: They are not there, or are no numbers.
    """
    saved = json.loads((checkpoint / IDENTITY).read_text(encoding="utf-8"))
    averages = saved.get(AVERAGES)
    if not isinstance(averages, list) or len(averages) != len(saved["objective"]):
        raise CheckpointError(f"{checkpoint / IDENTITY}: expected one entry of {AVERAGES} an objective")
    if not all(average is None or isinstance(average, int | float) for average in averages):
        raise CheckpointError(f"{checkpoint / IDENTITY}: {AVERAGES} holds something that is no number")
    return [math.nan if average is None else float(average) for average in averages]


def check_identity(checkpoint: Path, saved: dict[str, Any], identity: dict[str, Any]) -> None:
    """Refuses a checkpoint of another run: a reference that moved is the classic silent error of resuming.

    Args:
        checkpoint: Its folder.
        saved: What `read_identity` gives for it.
        identity: Of this run.

    Raises:
        CheckpointError: Reference, objective or data differ; names each.
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
    """A folder to write a checkpoint in; afterwards it is made durable and renamed to its place, oldest ones go.

    Args:
        run_dir: Where checkpoints live.
        state: The trainer's state, whose `best_model_checkpoint` is set to the final name.
        args: `should_save` and `save_total_limit`.
        wait_for_everyone: Barrier over ranks: all have written before the rename.
    """
    staging = run_dir / STAGING
    if args.should_save:
        shutil.rmtree(staging, ignore_errors=True)  # what a killed process left
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
        if final.is_dir():  # moved away first: a kill while it is deleted would leave half a checkpoint
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
    _fix_best(state, run_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")  # on the other ranks


def remove_staging(run_dir: Path) -> None:
    """Removes what a save that failed has left."""
    shutil.rmtree(run_dir / STAGING, ignore_errors=True)


def _fix_best(state: TrainerState, run_dir: Path, newest: str) -> None:
    """Names the best checkpoint by its final place, where transformers noted the temporary one."""
    if state.best_global_step:
        best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        state.best_model_checkpoint = str(best) if best.is_dir() or best.name == newest else None


@contextlib.contextmanager
def staged_files(
    directory: Path, args: TrainingArguments, wait_for_everyone: Callable[[], None]
) -> Iterator[Path]:
    """A folder to write files in; afterwards they are made durable and moved, one by one, into `directory`."""
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
    """Moves everything in `staging` into `directory`, each artefact in place of the one of the same name.

    A tokenizer with several chat templates and a second adapter are saved as folders, and a rename cannot replace a
    folder with files in it: the old one is moved aside first.
    """
    replaced = staging / REPLACED
    for new in sorted(staging.iterdir()):
        final = directory / new.name
        if final.is_dir() or (new.is_dir() and final.exists()):
            replaced.mkdir(exist_ok=True)
            final.replace(replaced / new.name)
        new.replace(final)
