"""Finds the model of transformers inside the wrappers that other libraries put around it."""

from typing import Any

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
    return model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]


def has_virtual_tokens(model: nn.Module) -> bool:
    """Returns whether an adapter puts virtual tokens before each row, as prompt tuning does.

    Example:
        >>> has_virtual_tokens(nn.Linear(2, 2))
        False
    """
    return num_virtual_tokens(model) > 0


def num_virtual_tokens(model: nn.Module) -> int:
    """Returns how many virtual tokens an adapter puts before each row."""
    learned = (config for config in _adapters(model) if config.is_prompt_learning)
    return max((config.num_virtual_tokens for config in learned), default=0)


def acts_from_a_token_on(model: nn.Module) -> bool:
    """Returns whether an adapter looks for tokens in each row and acts from there on, as aLoRA does."""
    return any(getattr(config, "alora_invocation_tokens", None) for config in _adapters(model))


def _adapters(model: nn.Module) -> list[Any]:
    """Returns the settings of a model's adapters."""
    while not hasattr(model, "config") and isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return list((getattr(model, "peft_config", None) or {}).values())
