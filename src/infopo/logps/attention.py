"""Switches shared-prefix attention on and off in a model."""

from torch import nn

from infopo.logps.eligibility import obstacle
from infopo.logps.registration import NAMES
from infopo.logps.wrappers import base_of


def enable(model: nn.Module) -> str | None:
    """Switches a model to forest attention; returns the reason where it cannot share prefixes, and None where it can.

    Args:
        model: A causal language model of transformers, or one with a PEFT adapter.
    """
    disable(model)
    reason = obstacle(model)
    if reason is None:
        base = base_of(model)
        name = NAMES[base.config._attn_implementation]
        base.set_attn_implementation(name)
        if base.config._attn_implementation != name:
            return "its attention cannot be exchanged"
    return reason


def disable(model: nn.Module) -> None:
    """Gives a model the attention back that it was loaded with."""
    if is_enabled(model):
        base_of(model).set_attn_implementation(implementation_of(model))


def is_enabled(model: nn.Module) -> bool:
    """Whether the model, or the one it wraps, attends over forests."""
    model = base_of(model)
    return getattr(getattr(model, "config", None), "_attn_implementation", None) in NAMES.values()


def implementation_of(model: nn.Module) -> str | None:
    """The attention implementation that the model was loaded with, which `from_pretrained` knows."""
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return next((original for original, ours in NAMES.items() if ours == name), name)
