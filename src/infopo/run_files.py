"""The files by which a run is read later: its metrics, where and with what it was made, and its settings.

Every trainer writes them into `output_dir` while it trains, so that a run of a script is reported, compared and resumed
as one of the command line.
"""

import json
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from infopo import run_state
from infopo.arguments import InfoPOConfig
from infopo.data.examples import ExampleDataset
from infopo.errors import SaveError
from infopo.losses import foreign
from infopo.losses.mixture import as_written
from infopo.output import get_logger
from infopo.provenance import environment
from infopo.runs import Dispensable, Record, RunDirectoryError, RunWriter

logger = get_logger(__name__)


class RunFiles(TrainerCallback):
    """Writes `metrics.jsonl` and `environment.json`, and the recipe if there is one.

    Each log record becomes a line of metrics. On resume, records after the checkpoint are removed. A run that begins
    anew renames the metrics of an earlier one. What is logged before training is written when training begins, so that
    an evaluation alone leaves the files of the folder as they are.

    Args:
        trainer: The trainer whose run it is. It is not kept alive.

    Attributes:
        recipe: Text of the resolved recipe, which a command line sets. Without one, a file that cannot be written is
            warned about and training goes on. With one, the run ends.
    """

    def __init__(self, trainer: Any) -> None:
        self.recipe: str | None = None
        self._trainer = weakref.ref(trainer)
        self._early: list[Record] = []
        self._writer: RunWriter | None = None
        self._files = Dispensable(logger.warning, "the metrics of this run are")
        self._first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._first_step = state.global_step
            self._write(args, partial(self._begin, args, state))

    def _begin(self, args: TrainingArguments, state: TrainerState) -> None:
        done, run_dir = state.global_step, Path(str(args.output_dir))
        if not done and (earlier := run_state.set_aside_metrics(run_dir)):
            logger.info("%s: the metrics of an earlier run are kept as %s", run_dir, earlier.name)
        self._writer = RunWriter(run_dir)
        if not done or state.max_steps > done:
            if self.recipe is not None:
                self._writer.write_recipe(self.recipe, done)
            self._write_environment()
        self._writer.truncate_metrics_after(done)
        early, self._early = self._early, []
        for record in early if not done else ():
            self._writer.append_metrics(record)

    def _write_environment(self) -> None:
        assert self._writer is not None
        trainer: Any = self._trainer()
        found = about(trainer)
        if self.recipe is None:  # which says the same, and more
            found["settings"] = settings_of(trainer.args, trainer.mixture)
        accelerators = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        record = environment(seed=trainer.args.seed, accelerators=accelerators, extra=found)
        self._writer.write_environment(record, self._first_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        record = {"step": state.global_step, "time": round(time.time(), 3), **logs}
        if self._writer is None:
            self._early.append(record)
        else:
            self._write(args, partial(self._writer.append_metrics, record))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The rows of a stream are counted while it is read.
        is_stream = not isinstance(kwargs["train_dataloader"].dataset, ExampleDataset)
        if self._writer is not None and is_stream and state.global_step > self._first_step:
            self._write(args, self._write_environment)

    def _write(self, args: TrainingArguments, write: Callable[[], None]) -> None:
        if self.recipe is None:
            self._files.write(write)
            return
        try:
            write()
        except RunDirectoryError as error:
            raise SaveError(f"{error}. {run_state.kept(str(args.output_dir))}") from error


def about(trainer: Any) -> Record:
    """Returns what `environment.json` says of a trainer's run beside versions, hardware and settings."""
    args: InfoPOConfig = trainer.args
    names = list(trainer.dataset_names)
    return {
        "model": {"name_or_path": trainer.base_name, "hash": trainer.policy_hash},
        "reference": {"source": args.reference, "hash": trainer.reference_hash},
        "data": {"path": names[0] if len(names) == 1 else names or None, "hash": trainer.data_hash()},
        "rows": [
            {
                "source": counts.source,
                "rows": counts.rows,
                "used": counts.used,
                "skipped": dict(counts.skipped),
                "notes": dict(counts.notes),
            }
            for counts in trainer.data_counts.values()
        ],
        "processes": args.world_size,
        "losses_from_outside": foreign.records(trainer.mixture),
    }


def settings_of(args: InfoPOConfig, mixture: Sequence[tuple[str, Mapping[str, Any], float]]) -> Record:
    """Returns the objective as in a recipe, and the arguments that are not the defaults of `InfoPOConfig`.

    Paths, tokens and what the objective already says are left out.
    """
    shown = args.to_dict()
    train = {
        each.name: shown[each.name]
        for each in fields(args)
        if each.init and each.name in shown and each.name not in _ELSEWHERE and not _is_default(each, args)
    }
    found = {"objective": as_written(mixture), "train": train}
    return cast(Record, json.loads(json.dumps(found, default=str)))  # an argument may be any object


_ELSEWHERE = frozenset(
    {
        "output_dir", "logging_dir", "run_name", "seed", "objective", "loss_type", "loss_weights", "beta",
        "objective_parameters", "local_rank",
    }
)  # fmt: skip


def _is_default(each: Any, args: InfoPOConfig) -> bool:
    default = each.default if each.default_factory is MISSING else each.default_factory()
    value = getattr(args, each.name)
    return bool(value == default or (default is None and value in (False, [], {}, "")))
