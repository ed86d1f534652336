"""Which arguments `InfoPOTrainer` takes. All that is wrong with them is told at once."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

import datasets
import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from infopo.arguments import InfoPOConfig
from infopo.catalog import suggestion
from infopo.data.packing import PreferenceCollator
from infopo.data.streaming import ExampleStream
from infopo.errors import ConfigError, UnsupportedArgumentError


def refuse_arguments(
    model: Any,
    ref_model: Any,
    args: Any,
    data_collator: Any,
    train_dataset: Any,
    compute_metrics: Callable[..., Any] | None,
    quantization_config: Any,
    optimizers: Any = (None, None),
    processing_class: Any = None,
    callbacks: Any = None,
    others: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Checks the arguments of `InfoPOTrainer`, all at once.

    Raises:
        UnsupportedArgumentError: One of them cannot be honoured.
        ConfigError: One is missing, or two contradict each other.
    """
    unsupported = [_foreign(name) for name in others]
    unsupported += _without_use(data_collator, train_dataset, compute_metrics)
    problems = _wrong_optimizers(optimizers) + _wrong_types(
        model, ref_model, args, processing_class, callbacks
    )
    if train_dataset is None:
        problems.append("train_dataset: is required")
    if isinstance(train_dataset, datasets.IterableDataset | ExampleStream):
        problems += _stream_problems(args)
    if ref_model is not None and ref_model is model:
        problems.append("ref_model: is the same object as model; leave it out to use the policy as it is now")
    if quantization_config is not None and not isinstance(model, str):
        problems.append("quantization_config: the model is already loaded; give its name, or leave this out")
    if unsupported:
        raise UnsupportedArgumentError(unsupported + problems)
    if problems:
        raise ConfigError(problems)


def _wrong_types(model: Any, ref_model: Any, args: Any, processing_class: Any, callbacks: Any) -> list[str]:
    problems = []
    if not isinstance(processing_class, PreTrainedTokenizerBase | None):
        problems.append(
            f"processing_class: expected a tokenizer, got {type(processing_class).__name__}"
            + ("; pass its .tokenizer" if hasattr(processing_class, "tokenizer") else "")
        )
    for each in callbacks or []:
        if not issubclass(each if isinstance(each, type) else type(each), TrainerCallback):
            problems.append(f"callbacks: expected a TrainerCallback, got {each!r}"[:200])
    if not isinstance(args, InfoPOConfig | None):
        problems.append(f"args: expected an InfoPOConfig, got {type(args).__name__}")
    if not isinstance(model, str | torch.nn.Module):
        problems.append(f"model: expected a model or the name of one, got {type(model).__name__}")
    if not isinstance(ref_model, torch.nn.Module | None):
        problems.append(
            f"ref_model: expected a model, got {type(ref_model).__name__}; the name of one goes into reference"
        )
    return problems


def _wrong_optimizers(optimizers: Any) -> list[str]:
    if not isinstance(optimizers, tuple | list) or len(optimizers) != 2:
        got = type(optimizers).__name__
        return [f"optimizers: expected (optimizer, schedule), each of which may be None, got {got}"]
    optimizer, schedule = optimizers
    if not isinstance(optimizer, torch.optim.Optimizer | None):
        return [f"optimizers: expected an optimizer first, got {optimizer!r}"[:200]]
    if optimizer is None and schedule is not None:
        return ["optimizers: the schedule is of an optimizer that is not there; give that one too"]
    return []


def _without_use(data_collator: Any, train_dataset: Any, compute_metrics: Any) -> list[str]:
    """Returns why arguments that other trainers take cannot be honoured."""
    unsupported = []
    if data_collator is not None and not isinstance(data_collator, PreferenceCollator):
        unsupported.append(
            f"data_collator: expected infopo.data.packing.PreferenceCollator, got {type(data_collator).__name__}; "
            "batches are packed, so other collators cannot be used"
        )
    if compute_metrics is not None:
        unsupported.append(
            "compute_metrics: no logits are kept to pass to it; read the metrics in a TrainerCallback's on_evaluate"
        )
    is_ours = isinstance(train_dataset, datasets.IterableDataset | ExampleStream)
    if isinstance(train_dataset, torch.utils.data.IterableDataset) and not is_ours:
        unsupported.append(
            "train_dataset: iterable datasets of torch are not supported; give a datasets.IterableDataset"
        )
    return unsupported


def _stream_problems(args: Any) -> list[str]:
    """Returns what is missing or wrong in the settings for training on a stream."""
    problems = []
    if getattr(args, "max_steps", -1) <= 0:
        problems.append(
            "max_steps: is required for a stream: how many rows there are, and so when an epoch ends and how the "
            "learning rate falls, is not known before it ends"
        )
    if getattr(args, "dataloader_num_workers", 0):
        problems.append(
            "dataloader_num_workers: expected 0 for a stream, whose rows are read, judged and counted in this process"
        )
    if getattr(args, "train_sampling_strategy", "random") == "group_by_length":
        problems.append("train_sampling_strategy: group_by_length needs all rows; a stream keeps its order")
    return problems


_OF_TRAINER = {
    "tokenizer": "is called processing_class now",
    "model_init": "a run has one model, since its reference is computed from it; make a trainer for each trial",
    "compute_loss_func": "losses are functions of log-probs here; name one with objective or loss_type",
    "preprocess_logits_for_metrics": "no logits are kept to pass to it",
    "optimizer_cls_and_kwargs": "build the optimizer, and pass optimizers=(optimizer, None); or set optim",
    "dataset_text_field": "name columns with InfoPOConfig(columns=...)",
    "formatting_func": "map the dataset before, or name its columns with InfoPOConfig(columns=...)",
}
"""Arguments of trainers of transformers and TRL that this one has not -> what to do."""


def _foreign(name: str) -> str:
    """Returns why an argument of `InfoPOTrainer` is refused that is none."""
    known = [f.name for f in fields(InfoPOConfig)]
    if name in known:
        return f"{name}: is a setting; write args=InfoPOConfig({name}=...)"
    why = _OF_TRAINER.get(name, f"there is no such argument{suggestion(name, known)}")
    return f"{name}: {why}"
