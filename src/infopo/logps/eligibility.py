"""Decides which models can share the prompt of several responses."""

import copy
import inspect
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from infopo.errors import LogpsError
from infopo.logps.layout import ForestLayout
from infopo.logps.registration import WAY_OUT, layout_given, replacement_name
from infopo.logps.wrappers import acts_from_a_token_on, base_of, has_virtual_tokens

_LAYER_TYPES = {"full_attention", "sliding_attention"}


def obstacle(model: nn.Module) -> str | None:
    """Returns why responses cannot share their prompt in this model, or None if they can.

    Args:
        model: A causal language model, with or without wrappers and adapters.

    Example:
        >>> obstacle(nn.Linear(2, 2))
        'it is not a model of transformers'
    """
    base = base_of(model)
    if has_virtual_tokens(model):
        return "its adapter puts virtual tokens before each row"
    if acts_from_a_token_on(model):
        return "its adapter acts from certain tokens of a row on"
    if not isinstance(base, PreTrainedModel):
        return "it is not a model of transformers"
    implementation = base.config.get_text_config()._attn_implementation
    if replacement_name(implementation) is None:
        return (
            f"its attention is {implementation!r}; prefixes are shared with sdpa, eager and flash attention"
        )
    if not base._supports_attention_backend or base.config.is_encoder_decoder:
        return "its attention cannot be exchanged"
    if "logits_to_keep" not in inspect.signature(base.forward).parameters:
        return "its forward pass gives logits of all positions only"
    running = list(_running(base))
    if any(getattr(module, "is_causal", True) is False for module in running):
        return "its attention is not causal"
    text = base.config.get_text_config()
    if other := set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES:
        return f"it has layers of type {', '.join(sorted(other))}"
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in running) or any(
        value for name, value in vars(text).items() if "drop" in name and isinstance(value, float)
    ):
        return "it has dropout, which a shared prompt would share too"
    return _refusal(base)


def _running(base: PreTrainedModel) -> Iterable[nn.Module]:
    """Returns the modules that a text runs through. The towers of a multimodal model, for images and sound, rest."""
    decoder = base.get_decoder() if base.config.get_text_config() is not base.config else base
    return base.modules() if decoder is None else decoder.modules()


def _refusal(base: PreTrainedModel) -> str | None:
    """Returns why forest attention refuses this model, or None if it does not.

    One layer of the architecture runs on the meta device, without weights or data. That shows which keywords its
    attention passes, and whether the layout reaches it, which no field of the config tells.
    """
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device="meta")
    layout = ForestLayout([0, 1, 2], [-1, -1])
    inputs = {"input_ids": ids, "position_ids": ids, "attention_mask": mask, "forest": layout}
    try:
        config = copy.deepcopy(base.config)
        text = config.get_text_config()
        text._attn_implementation = replacement_name(text._attn_implementation)
        text.num_hidden_layers = 1
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:1]
        with torch.device("meta"):
            layer = type(base)(config)
        with layout_given(), torch.no_grad():
            layer(**inputs, use_cache=False, logits_to_keep=1)
    except LogpsError as error:
        return str(error).removesuffix(WAY_OUT)
    except Exception:
        # Some architectures cannot run on the meta device. The self-test at start-up still checks their numbers.
        return None
    return None
