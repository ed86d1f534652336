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

from infopo import durable
from infopo.errors import CheckpointError
from infopo.losses.coupling import Averages
from infopo.run_state import IDENTITY, STAGING, STATE, seal
from infopo.runs import PROBE, write_json_atomic
from infopo.secrets import masked_tree

AVERAGES = "moving_averages"


def write_identity(checkpoint: Path, identity: dict[str, Any], averages: Sequence[Averages]) -> None:
    """Writes which reference, objective and data the checkpoint was made with, and the objectives' moving averages.

    Args:
        checkpoint: Folder of the checkpoint.
        identity: Values that a resumed run must have in common with this one.
        averages: Each objective's moving averages, NaN if it has none. A float is written with all its digits, so that
            it is read back exactly.
    """
    kept = [None if any(map(math.isnan, _numbers(average))) else average for average in averages]
    write_json_atomic(checkpoint / IDENTITY, {**identity, AVERAGES: kept})


def copy_probe(run_dir: Path, checkpoint: Path) -> None:
    """Copies the run's probe set, if there is one, so that a run which is resumed elsewhere goes on with the same."""
    if (run_dir / PROBE).is_file():
        shutil.copyfile(run_dir / PROBE, checkpoint / PROBE)


def read_averages(checkpoint: Path) -> list[Averages]:
    """Returns the moving averages of the checkpoint's objectives, NaN if an objective has none.

    The identity of the checkpoint must have been checked.

    Raises:
        CheckpointError: They are missing, or are not numbers.
    """
    saved = json.loads((checkpoint / IDENTITY).read_text(encoding="utf-8"))
    averages = saved.get(AVERAGES)
    if not isinstance(averages, list) or len(averages) != len(saved["objective"]):
        raise CheckpointError(f"{checkpoint / IDENTITY}: expected one entry of {AVERAGES} an objective")
    if not all(
        isinstance(number, int | float) for each in averages if each is not None for number in _numbers(each)
    ):
        raise CheckpointError(f"{checkpoint / IDENTITY}: {AVERAGES} holds something that is no number")
    return [math.nan if average is None else average for average in averages]


def _numbers(average: Any) -> list[Any]:
    return average if isinstance(average, list) else [average]


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
    # A secret, such as a parameter of a loss may be, is masked in the checkpoint.
    saved, now = masked_tree(saved), masked_tree(json.loads(json.dumps(identity)))
    differing = [
        f"{key} {_difference(saved.get(key), now[key])}" for key in now if saved.get(key) != now[key]
    ]
    if differing:
        raise CheckpointError(
            f"{checkpoint}: was made with another {'; another '.join(differing)}. Resume with the recipe that "
            "started the run, or start a new run in another output_dir."
        )


def _difference(then: Any, now: Any) -> str:
    """Returns two values in words. Long lists, such as the terms of a loss, are told from where they differ."""
    place = ""
    if isinstance(then, list) and isinstance(now, list) and len(f"{then}{now}") > _LONG:
        same = next(
            (i for i, (a, b) in enumerate(zip(then, now, strict=False)) if a != b), min(len(then), len(now))
        )
        then, now, place = then[same:], now[same:], f"from item {same + 1} on " if same else ""
    return f"{place}(then {then}, now {now})"


_LONG = 200
"""Characters of two values that are told whole."""


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
    with _shared_folder(run_dir / STAGING, args, wait_for_everyone) as staging:
        yield staging
    if args.should_save:
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        _fix_best(state, run_dir, name)
        state.save_to_json(str(staging / name / STATE))
        if (staging / name / IDENTITY).is_file():
            seal(staging / name)
        durable.sync_tree(staging / name)
        durable.put(staging / name, run_dir / name, aside=staging)
        durable.sync(run_dir)
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
    """Provides a folder to write files in. On exit they are fsynced and moved, one by one, into `directory`.

    Some are folders, such as a second adapter, and the templates of a tokenizer that has several.
    """
    with _shared_folder(directory / STAGING, args, wait_for_everyone) as staging:
        yield staging
    if args.should_save:
        durable.sync_tree(staging)
        for new in sorted(staging.iterdir()):
            durable.put(new, directory / new.name, aside=staging)
        durable.sync(directory)
        shutil.rmtree(staging)
    wait_for_everyone()


@contextlib.contextmanager
def _shared_folder(
    folder: Path, args: TrainingArguments, wait_for_everyone: Callable[[], None]
) -> Iterator[Path]:
    """Provides an empty folder in which all ranks have written when the block is left."""
    if args.should_save:
        # A killed process may have left something there.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    wait_for_everyone()
    yield folder
    wait_for_everyone()
