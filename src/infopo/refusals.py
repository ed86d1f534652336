"""What transformers' Trainer does with logits or with several models, refused by name."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any, ClassVar

from transformers import Trainer, TrainerCallback

from infopo.errors import UnsupportedArgumentError

_A_LOSS = "a loss is a function of log-probs here: objective=my_loss (`infopo docs your-own-loss`)"
_THE_DATA = (
    "map the dataset before it is given to the trainer, or name its columns with InfoPOConfig(columns=...)"
)
_THE_REFERENCE = "InfoPOConfig(reference=...) or ref_model say which model is the reference"

NEVER_CALLED: Mapping[str, str] = {
    "_compute_loss": _A_LOSS,
    "_compute_loss_liger": _A_LOSS,
    "dpo_loss": _A_LOSS,
    "get_batch_loss_metrics": _A_LOSS,
    "concatenated_forward": _A_LOSS,
    "_prepare_dataset": _THE_DATA,
    "tokenize_row": _THE_DATA,
    "process_row": _THE_DATA,
    "compute_ref_log_probs": _THE_REFERENCE,
    "_precompute_ref_logps": _THE_REFERENCE,
    "null_ref_context": _THE_REFERENCE,
    "prediction_step": "evaluation keeps no logits; change its numbers in a TrainerCallback's on_evaluate",
}
"""Methods of TRL's DPOTrainer, now or before, and of `Trainer`, that are not called here -> what to do instead."""

FIXED = (
    "beta", "loss_type", "loss_types", "loss_weights", "label_smoothing", "f_divergence_type",
    "f_alpha_divergence_coef", "ld_alpha", "use_weighting", "precompute_ref_logps",
)  # fmt: skip
"""Attributes in which TRL's trainers keep settings of the loss, where a script may change them during training."""

CALLBACKS: Mapping[str, str] = {
    "SyncRefModelCallback": "the reference is frozen: it is part of InfoPO's definition",
    "LogCompletionsCallback": "it reads columns of text; samples at each generation_steps stand in generations.jsonl",
    "WinRateCallback": "it reads columns of text; `infopo winrate` compares two models",
}
"""Callbacks of TRL that read or change what is not here -> why."""


def wrong_callback(callback: Any) -> str | None:
    """Returns why a callback of TRL cannot do here what it is for, or None if it can."""
    kind = callback if isinstance(callback, type) else type(callback)
    for each in kind.__mro__:
        if each.__module__.startswith("trl.") and each.__name__ in CALLBACKS:
            return f"{kind.__name__}: {CALLBACKS[each.__name__]}"
    if kind.__name__ == "BEMACallback" and getattr(callback, "update_ref_model", False):
        return f"{kind.__name__}: update_ref_model=True: {CALLBACKS['SyncRefModelCallback']}"
    return None


def refuse_uses(trainer: type, callbacks: Sequence[Any]) -> None:
    """Refuses methods of a subclass that nothing would call, and callbacks that cannot do what they are for.

    Args:
        trainer: The trainer's class.
        callbacks: Callbacks that the constructor is given.

    Raises:
        UnsupportedArgumentError: There is one.
    """
    own = list(takewhile(lambda kind: kind is not RefusingTrainer, trainer.__mro__))
    used = {name for kind in own for each in vars(kind).values() for name in _names_in(each)}
    names = [name for kind in own for name in vars(kind) if name in NEVER_CALLED and name not in used]
    problems = [f"{name}: this method is never called; {NEVER_CALLED[name]}" for name in names]
    problems += [
        f"callbacks: {problem}" for each in callbacks if (problem := wrong_callback(each)) is not None
    ]
    if problems:
        raise UnsupportedArgumentError(problems)


def _names_in(member: Any) -> Iterable[str]:
    """Returns the names that the code of a method uses: a class may call by itself what nothing else calls."""
    function = getattr(member, "__func__", member)
    return getattr(getattr(function, "__code__", None), "co_names", ())


class RefusingTrainer(Trainer):
    """transformers' `Trainer` without the methods that cannot work here, each of which says what to do instead."""

    _tag_names: ClassVar[list[str]] = []

    def __setattr__(self, name: str, value: Any) -> None:
        """Overrides `Trainer`'s to refuse settings of the loss as attributes, which nothing would read.

        Raises:
            UnsupportedArgumentError: The attribute is one of TRL's trainers that holds such a setting.
        """
        # A subclass may keep what it likes before the trainer is made.
        if name in FIXED and "accelerator" in vars(self):
            raise UnsupportedArgumentError(
                f"trainer.{name}: the objective is fixed when the trainer is made; set it in InfoPOConfig, or give a "
                "loss of your own, which may follow a schedule"
            )
        super().__setattr__(name, value)

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Overrides `Trainer`'s to refuse callbacks of TRL that cannot do here what they are for.

        Raises:
            UnsupportedArgumentError: The callback is one of them.
        """
        if (problem := wrong_callback(callback)) is not None:
            raise UnsupportedArgumentError(problem)
        super().add_callback(callback)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Overrides `Trainer`'s, which returns logits and labels, to refuse. It leaves out everything.

        Raises:
            UnsupportedArgumentError: Always.
        """
        raise UnsupportedArgumentError(
            "predict: no logits are kept to return; evaluate(dataset, metric_key_prefix='test') gives the metrics"
        )

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Overrides `Trainer`'s, which returns a batch's logits and labels, to refuse. It leaves out everything.

        Raises:
            UnsupportedArgumentError: Always.
        """
        raise UnsupportedArgumentError(
            "prediction_step: no logits are kept to return; infopo.logps.forward.response_logps(model, batch) gives "
            "the log-probs of a batch"
        )

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Overrides `Trainer`'s, which makes a new model for each trial, to refuse. It leaves out everything.

        Raises:
            UnsupportedArgumentError: Always.
        """
        raise UnsupportedArgumentError(
            "hyperparameter_search: the reference is computed from one model; make a trainer for each trial, which "
            "finds its reference log-probs in the store"
        )
