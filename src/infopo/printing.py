"""What transformers prints of a run in a script: the metrics of training and evaluation, without measurements."""

from collections.abc import Mapping
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

MEASURED = (
    "probe/", "anchor/", "drift/", "kl/", "reference/", "gradients/", "forecast/", "ratio_tail/", "length/",
    "generations/", "memory/",
)  # fmt: skip
"""Beginnings of the names in docs/diagnostics.md. A record may have fifty of them, which would fill the screen.
`metrics.jsonl`, trackers and callbacks get them all."""


def printed(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what is printed of a record, or nothing if it contains measurements alone.

    Example:
        >>> printed({"loss": 0.5, "probe/margin": 1.0, "epoch": 1.0}), printed({"probe/margin": 1.0, "epoch": 0})
        ({'loss': 0.5, 'epoch': 1.0}, {})
    """
    kept = {name: value for name, value in logs.items() if not name.startswith(MEASURED)}
    return {} if kept.keys() <= {"epoch", "step"} else kept


class _WithoutMeasurements(TrainerCallback):
    """Prints records without measurements, as the class after it does."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if found := printed(logs or {}):
            super().on_log(args, state, control, logs=found, **kwargs)


class ShortProgress(_WithoutMeasurements, ProgressCallback):
    """transformers' `ProgressCallback`, whose records have no measurements."""


class ShortPrinter(_WithoutMeasurements, PrinterCallback):
    """transformers' `PrinterCallback`, whose records have no measurements."""


def shorten(trainer: Trainer) -> None:
    """Replaces what transformers prints records with by default. Subclasses of the user's own stay as they are."""
    for callback in list(trainer.callback_handler.callbacks):
        for usual, short in ((ProgressCallback, ShortProgress), (PrinterCallback, ShortPrinter)):
            if type(callback) is usual:
                trainer.remove_callback(callback)
                trainer.add_callback(short)
