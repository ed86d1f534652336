"""Rotary frequencies that depend on a row's length: LongRoPE has one set for short rows and another for long ones.

Which set a row gets is decided by the longest row of its forward pass. So that a log-prob depends on its own row alone,
rows on either side of the boundary go through the model in forward passes of their own.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from infopo.logps.wrappers import base_of, num_virtual_tokens

_TYPES = {"longrope", "su"}
"""Names of LongRoPE in configurations; `su` is its first one."""


def boundary(model: nn.Module) -> int | None:
    """Most tokens of a row that gets the frequencies of short rows; None: the model has one set for all."""
    config: Any = getattr(base_of(model), "config", None)
    if config is None:
        return None
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limits = [
        parameters.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        for parameters in _rope_parameters(config)
        if (parameters.get("rope_type") or parameters.get("type")) in _TYPES
    ]
    known = [int(limit) for limit in limits if limit]
    return min(known) - num_virtual_tokens(model) if known else None


def _rope_parameters(config: Any) -> Iterator[Mapping[str, Any]]:
    """The parameters of all layers, or of each kind of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        parameters = getattr(config, name, None)
        if isinstance(parameters, Mapping):
            yield parameters
            yield from (each for each in parameters.values() if isinstance(each, Mapping))
