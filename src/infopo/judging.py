"""Judges a run while it trains, and at its end: verdicts go to the log and to `verdicts.json`, and may end the run."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from infopo import ranks
from infopo.arguments import InfoPOConfig
from infopo.data.examples import ExampleDataset
from infopo.data.facts import facts_of
from infopo.evidence import Evidence, History
from infopo.output import get_logger
from infopo.runs import Dispensable, write_json_atomic
from infopo.verdicts import DATA, VERDICTS, Verdict, judge, line_of, record_of, verdicts_in

logger = get_logger(__name__)

SECONDS_BETWEEN_WRITES = 30
"""How old `verdicts.json` may be while nothing new is found: a write waits for the disk."""


class Judge(TrainerCallback):
    """Runs the checks of `verdicts.py` at each log record, on the first rank, which decides for all.

    A verdict is announced once, when it is first reached. With `on_verdict="stop"` a checkpoint is saved and training
    ends after the step. A resumed run keeps the verdicts of its checkpoint's past.

    Attributes:
        verdicts: All checks, as they are now.
        announce: Takes a line about each new verdict. It is a warning in the log, unless a command line shows it.
    """

    def __init__(self) -> None:
        self.announce: Callable[[str], None] = logger.warning
        self._history: History | None = None
        self._facts: dict[str, Any] | None = None
        self.verdicts: list[Verdict] = []
        self._must_stop = False
        self._files = Dispensable(logger.warning, "verdicts are")
        self._written_at = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._must_stop = False
        if not state.is_world_process_zero:
            return
        dataset = kwargs["train_dataloader"].dataset
        self._facts = facts_of(dataset) if isinstance(dataset, ExampleDataset) else None
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.verdicts = _earlier(folder / VERDICTS, state.global_step) if state.global_step else []
        self._history = History(state.log_history)
        if self._facts is not None:
            self._files.write(partial(write_json_atomic, folder / DATA, self._facts))
        self._judge(args, state, ended=False)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._history is not None and logs:
            self._history.add({**logs, "step": state.global_step})
            self._judge(args, state, ended=False)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends training on all ranks. They ask the first one after each record, and not after each step."""
        every = max(1, state.logging_steps)
        if getattr(args, "on_verdict", "warn") != "stop" or (state.global_step - 1) % every:
            return
        if ranks.from_first(lambda: self._must_stop, args):
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._history is not None:
            self._judge(args, state, ended=True)
            self._history = None

    def _judge(self, args: TrainingArguments, state: TrainerState, *, ended: bool) -> None:
        assert self._history is not None
        assert isinstance(args, InfoPOConfig)
        as_planned = ended and state.global_step >= state.max_steps
        evidence = Evidence(self._history, self._facts, finished=as_planned, kl_budget=args.kl_budget)
        before = {verdict.name for verdict in self.verdicts if verdict.fired}
        self.verdicts = judge(evidence, self.verdicts)
        new = [verdict for verdict in self.verdicts if verdict.fired and verdict.name not in before]
        for verdict in new:
            self.announce(line_of(verdict))
        if new and args.on_verdict == "stop" and not ended:
            self._must_stop = True
            self.announce("on_verdict=stop: a checkpoint is saved, and training ends")
        if new or ended or time.monotonic() - self._written_at > SECONDS_BETWEEN_WRITES:
            record = record_of(self.verdicts, state.global_step, ended)
            self._files.write(partial(write_json_atomic, Path(args.output_dir) / VERDICTS, record))
            self._written_at = time.monotonic()


def _earlier(path: Path, step: int) -> list[Verdict]:
    """Returns the verdicts that a run had reached at a step. Those of a part that is now repeated are left out."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    found = verdicts_in(record) if isinstance(record, dict) else []
    return [verdict for verdict in found if verdict.fired and (verdict.step or 0) <= step]
