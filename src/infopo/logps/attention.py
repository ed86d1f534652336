"""Switches shared-prefix attention on and off in a model."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

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
        _exchange(model, replacement_name(implementation_of(model)))
        if not is_enabled(model):
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
            _exchange(model, replacement_name(implementation_of(model)))
    try:
        yield
    finally:
        for model in models:
            disable(model)


def disable(model: nn.Module) -> None:
    """Gives a model back the attention that it was loaded with."""
    if is_enabled(model):
        _exchange(model, implementation_of(model))


def is_enabled(model: nn.Module) -> bool:
    """Returns whether the model, or the one that it wraps, is switched to forest attention."""
    return _current(model) in NAMES.values()


def implementation_of(model: nn.Module) -> str | None:
    """Returns the name of the attention implementation that the model was loaded with, for `from_pretrained`."""
    name = _current(model)
    return next((original for original, ours in NAMES.items() if ours == name), name)


def _current(model: nn.Module) -> str | None:
    """Returns the name of the implementation that texts run with now."""
    config: Any = getattr(base_of(model), "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "_attn_implementation", None)


def _exchange(model: nn.Module, name: str | None) -> None:
    """Sets the implementation that texts run with. Towers of a multimodal model keep what they have."""
    base = base_of(model)
    base.set_attn_implementation(_of_text(base.config, base.config.get_text_config(), name))


def _of_text(config: Any, text: Any, name: str | None) -> Any:
    """Returns a name for the configuration of texts, in dicts by the keys that lead to it if it is within another."""
    if config is text:
        return name
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    return {
        key: _of_text(part, text, name)
        for key, part in parts.items()
        if part is not None and _leads(part, text)
    }


def _leads(config: Any, text: Any) -> bool:
    parts = (getattr(config, key, None) for key in getattr(config, "sub_configs", ()))
    return config is text or any(_leads(part, text) for part in parts if part is not None)
