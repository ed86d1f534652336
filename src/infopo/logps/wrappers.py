"""The model of transformers under what others put around it."""

from typing import Any

from torch import nn


def base_of(model: nn.Module) -> Any:
    """The model itself, without the wrappers that distribute it and without the one that holds its adapters."""
    while not hasattr(model, "config") and isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]


def has_virtual_tokens(model: nn.Module) -> bool:
    """Whether an adapter puts tokens before each row (prompt tuning and its kin)."""
    while not hasattr(model, "config") and isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    adapters = getattr(model, "peft_config", None) or {}
    return any(config.is_prompt_learning for config in adapters.values())
