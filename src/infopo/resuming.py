"""Settings that a run is resumed with, held against those that its checkpoint was made with.

Part of them lives in the checkpoint (the optimizer's own settings, the place in the order of rows): another value
would be without effect, or would change what a step means, and is refused. The others take effect from the next step
on, which is said with the values then and now.
"""

import math
from pathlib import Path
from typing import Any

from torch import nn

from infopo.arguments import InfoPOConfig
from infopo.errors import CheckpointError
from infopo.output import get_logger

logger = get_logger(__name__)

SETTINGS = "settings"
"""Key of `infopo_state.json`."""

_FIXED = (
    "seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last", "optim", "optim_args", "adam_beta1",
    "adam_beta2", "adam_epsilon", "weight_decay", "disable_dropout",
)  # fmt: skip
"""Arguments that a checkpoint keeps: the order of rows, and what the optimizer's state carries."""

_CHANGEABLE = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs",
    "max_grad_norm", "bf16", "fp16", "tf32",
)  # fmt: skip
"""Arguments that take effect from the next step on."""

_ROWS = "rows of an optimizer step"
_GROUP = "rows that a process groups by length"
_ADAPTER = "adapter"


def settings_of(args: InfoPOConfig, model: nn.Module) -> dict[str, Any]:
    """What a checkpoint records of the settings it was made with, as JSON has them."""
    values = args.to_dict()
    per_process = args.train_batch_size * args.gradient_accumulation_steps
    group = per_process if values["train_sampling_strategy"] == "group_by_length" else None
    fixed = {name: values[name] for name in _FIXED} | {_ROWS: per_process * args.world_size, _GROUP: group}
    fixed[_ADAPTER] = _adapters(model)
    return {"fixed": fixed, "changeable": {name: values[name] for name in _CHANGEABLE}}


def _adapters(model: nn.Module) -> dict[str, Any]:
    """What decides the shapes and the scale of each adapter's update."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return {}
    named = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "target_modules")
    return {
        name: {key: _plain(getattr(config, key)) for key in named if hasattr(config, key)}
        for name, config in configs.items()
    }


def _plain(value: Any) -> Any:
    value = getattr(value, "value", value)
    return sorted(value) if isinstance(value, set | frozenset) else value


def check_settings(
    checkpoint: Path, saved: dict[str, Any], now: dict[str, Any], step: int, steps_now: int | None
) -> list[str]:
    """Refuses settings that a checkpoint cannot be resumed with, and says which others hold from now on.

    Args:
        checkpoint: Its folder.
        saved: The checkpoint's `infopo_state.json`. Without settings (of an earlier version), nothing is compared.
        now: `settings_of` this run.
        step: Optimizer steps that the checkpoint has behind it.
        steps_now: Optimizer steps that this run is asked for, or None if they are not known.

    Returns:
        The settings that differ and take effect, each with its values then and now.

    Raises:
        CheckpointError: A setting cannot be changed, or nothing is left to train.
    """
    then = saved.get(SETTINGS)
    if not isinstance(then, dict):
        return []
    fixed = _differing(then.get("fixed"), now["fixed"])
    if fixed:
        raise CheckpointError(
            f"{checkpoint}: was made with other settings, which a resumed run cannot change: {'; '.join(fixed)}. "
            "Resume with these settings as they were, or start a new run in another output_dir"
        )
    changed = _differing(then.get("changeable"), now["changeable"])
    if changed and steps_now is not None and steps_now <= step:
        raise CheckpointError(
            f"{checkpoint}: has {step} steps behind it, but only {steps_now} are asked for ({'; '.join(changed)}), so "
            "nothing is left to train. Ask for more steps or epochs, or take an earlier checkpoint"
        )
    return changed


def _differing(then: Any, now: dict[str, Any]) -> list[str]:
    """`name (then a, now b)` of each value that is known of both and differs."""
    then = then if isinstance(then, dict) else {}
    return [
        f"{name} (then {then[name]}, now {value})"
        for name, value in now.items()
        if name in then and then[name] != value
    ]


def steps_of(args: InfoPOConfig, rows: int | None) -> int | None:
    """Returns the optimizer steps that these settings ask for, or None if neither they nor the number of rows say so.

    Args:
        args: Settings of the run.
        rows: Number of rows to train on, or None for a stream.
    """
    if args.max_steps > 0:
        return int(args.max_steps)
    if rows is None:
        return None
    batch = args.train_batch_size * args.world_size
    batches = rows // batch if args.dataloader_drop_last else math.ceil(rows / batch)
    a_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    return math.ceil(args.num_train_epochs * a_epoch)


def scale_learning_rate(optimizer: Any, scheduler: Any, factor: float) -> None:
    """Multiplies the learning rates that a checkpoint has brought back, and those that the schedule starts from.

    Args:
        optimizer: With its state loaded.
        scheduler: Likewise.
        factor: Learning rate now / learning rate then.
    """
    for group in optimizer.param_groups:
        for name in {"lr", "initial_lr"} & group.keys():
            group[name] *= factor
    for name in ("base_lrs", "_last_lr"):
        if isinstance(rates := getattr(scheduler, name, None), list):
            setattr(scheduler, name, [rate * factor for rate in rates])


def learning_rate_factor(saved: dict[str, Any], args: InfoPOConfig) -> float:
    """Returns learning rate now / learning rate that the checkpoint was made with, or 1 if that is not known."""
    then = saved.get(SETTINGS)
    changeable = then.get("changeable") if isinstance(then, dict) else None
    rate = changeable.get("learning_rate") if isinstance(changeable, dict) else None
    return args.learning_rate / rate if isinstance(rate, int | float) and rate > 0 else 1.0
