"""The load-balancing loss of mixture-of-experts models, as the model itself computes it and as TRL adds it.

aux = E Σ_e f_e P_e over E experts, where f_e is the share of choices that went to expert e and P_e its mean router
probability (https://huggingface.co/papers/2101.03961, equations 4 to 6), over all tokens of all rows without padding.
On the shared-prefix path a token counts as often as rows hold it, so that the loss is that of rows.
"""

import functools
import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from infopo.errors import ConfigError
from infopo.logps.collecting import Collector
from infopo.logps.wrappers import base_of
from infopo.output import get_logger
from infopo.records import PackedBatch

logger = get_logger(__name__)

_collected = Collector[list[tuple[Tensor, Tensor]]]("aux_losses")


def coefficient(model: nn.Module, setting: float | None) -> float:
    """Returns the factor of the auxiliary loss, or 0 if the model has none.

    Args:
        model: The policy.
        setting: `router_aux_loss_coef`, or None for the value of the model's configuration.

    Raises:
        ConfigError: A factor is set for a model that gives no router logits.
    """
    has_routers = _has_routers(model)
    if setting and not has_routers:
        raise ConfigError(
            f"router_aux_loss_coef={setting:g}: {type(base_of(model)).__name__} is no mixture of experts that returns "
            "its router logits, so it has no auxiliary loss; leave it out"
        )
    if setting is not None or not has_routers:
        return float(setting or 0.0)
    return float(getattr(base_of(model).config.get_text_config(), "router_aux_loss_coef", None) or 0.0)


def _has_routers(model: nn.Module) -> bool:
    base = base_of(model)
    config: Any = getattr(base, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not hasattr(text, "output_router_logits"):
        return False
    parameters = inspect.signature(base.forward).parameters
    takes = "output_router_logits" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return takes and _is_recorded(base)


def _is_recorded(base: Any) -> bool:
    """Returns False if transformers says which modules give router logits and the model contains none of them.

    All layers of a mixture of experts may be dense by its configuration, and the loss of no router is an IndexError.
    """
    has_recorders = "router_logits" in (getattr(base, "_can_record_outputs", None) or {})
    # This is asked in each forward pass, and the first router answers it.
    return not has_recorders or next(_recorded(base), None) is not None


def recorded(model: nn.Module) -> set[nn.Module]:
    """Returns the modules whose outputs transformers keeps as router logits.

    It does so by a hook on each of them, which it adds at the first forward pass that is asked for them.

    Example:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1}
        >>> model = MixtralForCausalLM(MixtralConfig(vocab_size=8, num_key_value_heads=1, **tiny))
        >>> sorted(type(module).__name__ for module in recorded(model))
        ['MixtralTopKRouter', 'MixtralTopKRouter']
    """
    return set(_recorded(base_of(model)))


def _recorded(base: nn.Module) -> Iterator[nn.Module]:
    # A model within a model, such as the text model of a multimodal one, has recorders of its own.
    for owner in base.modules():
        for recorder in _recorders(owner):
            for name, module in owner.named_modules():
                if _matches(recorder, name, module):
                    yield module


def _recorders(owner: Any) -> list[Any]:
    listed = (getattr(owner, "_can_record_outputs", None) or {}).get("router_logits") or []
    return list(listed) if isinstance(listed, list | tuple) else [listed]


def _matches(recorder: Any, name: str, module: nn.Module) -> bool:
    """Returns whether a recorder is for this module, by the rule of `transformers.utils.output_capturing`."""
    if isinstance(recorder, str):
        return name.endswith(recorder)
    kind, ending = getattr(recorder, "target_class", recorder), getattr(recorder, "class_name", None)
    is_named = ending is not None and name.endswith(ending)
    if not is_named and not (isinstance(kind, type) and isinstance(module, kind)):
        return False
    layer = getattr(recorder, "layer_name", None)
    return layer is None or f".{layer.strip('.')}." in f".{name}."


def aux_losses(wanted: bool) -> AbstractContextManager[list[tuple[Tensor, Tensor]]]:
    """Within it, forward passes leave their (auxiliary loss, number of tokens) in the list, if wanted."""
    return _collected.into([], wanted)


def is_wanted() -> bool:
    """Returns whether the auxiliary loss of the next forward pass is asked for."""
    return _collected.current is not None


def keywords(model: nn.Module) -> dict[str, bool]:
    """Keywords for the model's call: whatever its configuration says, router logits come only when they are used."""
    return {"output_router_logits": is_wanted()} if _has_routers(model) else {}


def note(output: Any, tokens: Tensor) -> None:
    """Keeps the auxiliary loss of a forward pass, if one is asked for and the model gives it.

    Args:
        output: Of the model.
        tokens: How often each token counts, of any shape: its attention mask.
    """
    found, aux = _collected.current, getattr(output, "aux_loss", None)
    if found is None:
        return
    if isinstance(aux, Tensor):
        found.append((aux, tokens.sum()))
    else:
        _warn_of_none(type(output).__name__)


@functools.cache
def _warn_of_none(output: str) -> None:
    """Says once that a loss which was asked for is not added."""
    logger.warning("the model gives no auxiliary loss of its routers (%s), so none is added", output)


def mean(found: list[tuple[Tensor, Tensor]]) -> Tensor | None:
    """Returns the mean of the passes' auxiliary losses, weighted by their tokens, or None if there are none."""
    if len(found) < 2:
        return found[0][0] if found else None
    weights = torch.stack([tokens for _, tokens in found]).float()
    return (torch.stack([aux for aux, _ in found]) * weights).sum() / weights.sum()


def multiplicity(batch: PackedBatch) -> Int[Tensor, " tokens"]:
    """Returns how many responses hold each token of the batch, on the host.

    Example:
        >>> from infopo.data.packing import pack
        >>> from infopo.records import PreferenceExample
        >>> multiplicity(pack([PreferenceExample([5, 6], [[7, 8]], [[9]], "pairs.jsonl:1")]))
        tensor([2, 2, 1, 1, 1])
    """
    times = [0] * len(batch.segment_parent)
    for response in range(batch.num_responses):
        for segment in batch.path(response):
            times[segment] += 1
    sizes = [end - begin for begin, end in pairwise(batch.segment_start)]
    return torch.tensor(times, dtype=torch.int64).repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
