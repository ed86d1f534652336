"""Finds the model of transformers inside the wrappers that other libraries put around it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def base_of(model: nn.Module) -> Any:
    """Returns the model itself, without wrappers that distribute it (DDP) and without PEFT's, which has its adapters.

    Example:
        >>> inner = nn.Linear(2, 2)
        >>> base_of(inner) is inner
        True
    """
    while not hasattr(model, "config") and isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    # PEFT sets `peft_config` on the model within its wrapper, too.
    is_wrapper = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    return model.get_base_model() if is_wrapper else model  # type: ignore[operator]


def has_virtual_tokens(model: nn.Module) -> bool:
    """Returns whether an adapter puts virtual tokens before each row, as prompt tuning does.

    Example:
        >>> has_virtual_tokens(nn.Linear(2, 2))
        False
    """
    return num_virtual_tokens(model) > 0


def num_virtual_tokens(model: nn.Module) -> int:
    """Returns how many virtual tokens an adapter puts before each row.

    Example:
        >>> num_virtual_tokens(nn.Linear(2, 2))
        0
    """
    learned = (config for config in _adapters(model) if config.is_prompt_learning)
    return max((config.num_virtual_tokens for config in learned), default=0)


def acts_from_a_token_on(model: nn.Module) -> bool:
    """Returns whether an adapter looks for tokens in each row and acts from there on, as aLoRA does.

    Example:
        >>> acts_from_a_token_on(nn.Linear(2, 2))
        False
    """
    return any(getattr(config, "alora_invocation_tokens", None) for config in _adapters(model))


@contextmanager
def adapter_moved(model: nn.Module, by: float = 0.02) -> Iterator[bool]:
    """Adds noise to the trainable weights of a model with adapters, until it is left.

    Most adapters change nothing before the first update, so that what is wrong with them would show only afterwards:
    LILY weighs its experts by a mean over all tokens of a batch, later ones too. Random numbers stay as they were.

    Args:
        model: Any model.
        by: Standard deviation of the noise.

    Yields:
        Whether there are such weights; without an adapter, nothing happens.

    Example:
        >>> with adapter_moved(nn.Linear(2, 2)) as is_moved:
        ...     is_moved
        False
    """
    # Under ZeRO-3 a weight that is elsewhere has no elements here, and could not be moved.
    trained = [p for p in model.parameters() if p.requires_grad and type(p) is nn.Parameter and p.numel()]
    trained = trained if _adapters(model) else []
    before = [p.detach().clone() for p in trained]
    devices = {p.device.index for p in trained if p.is_cuda}
    with torch.random.fork_rng(devices), torch.no_grad():
        for parameter in trained:
            parameter.add_(by * torch.randn_like(parameter))
    try:
        yield bool(trained)
    finally:
        with torch.no_grad():
            for parameter, value in zip(trained, before, strict=True):
                parameter.copy_(value)


def _adapters(model: nn.Module) -> list[Any]:
    """Returns the settings of a model's adapters."""
    while not hasattr(model, "config") and isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return list((getattr(model, "peft_config", None) or {}).values())
