"""Switches shared-prefix attention on and off in a model."""

import contextlib
from collections.abc import Iterator, Sequence

from torch import nn

from infopo.logps.eligibility import obstacle
from infopo.logps.registration import NAMES, replacement_name
from infopo.logps.wrappers import base_of


def enable(model: nn.Module) -> str | None:
    """Switches a model to forest attention if it can share prefixes.

    Args:
        model: A causal language model of transformers, or one with a PEFT adapter.

    Returns:
        None if the model is switched, else the reason why it cannot share prefixes.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **tiny))
        >>> enable(model), is_enabled(model)
        (None, True)
        >>> disable(model)
        >>> is_enabled(model)
        False
    """
    disable(model)
    reason = obstacle(model)
    if reason is None:
        base = base_of(model)
        name = replacement_name(base.config._attn_implementation)
        base.set_attn_implementation(name)
        if base.config._attn_implementation != name:
            return "its attention cannot be exchanged"
    return reason


@contextlib.contextmanager
def lent(models: Sequence[nn.Module]) -> Iterator[None]:
    """Has models that `enable` could switch run forest attention within the block, and their own attention after it.

    Args:
        models: Models that can share prefixes.
    """
    for model in models:
        if not is_enabled(model):
            base_of(model).set_attn_implementation(replacement_name(implementation_of(model)))
    try:
        yield
    finally:
        for model in models:
            disable(model)


def disable(model: nn.Module) -> None:
    """Gives a model back the attention that it was loaded with."""
    if is_enabled(model):
        base_of(model).set_attn_implementation(implementation_of(model))


def is_enabled(model: nn.Module) -> bool:
    """Returns whether the model, or the one that it wraps, is switched to forest attention."""
    model = base_of(model)
    return getattr(getattr(model, "config", None), "_attn_implementation", None) in NAMES.values()


def implementation_of(model: nn.Module) -> str | None:
    """Returns the name of the attention implementation that the model was loaded with, for `from_pretrained`."""
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return next((original for original, ours in NAMES.items() if ours == name), name)
