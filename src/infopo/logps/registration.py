"""Registers shared-prefix attention with transformers as attention implementations that have names.

There is one name for each implementation that is replaced. A call without a layout (in generation, and for padded rows)
is passed on to the replaced implementation, with its mask. The layout reaches the attention layers as an extra keyword
argument of the model, which checkpointing, adapters and wrappers pass through.
"""

import contextlib
import re
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from infopo.errors import LogpsError
from infopo.logps.calls import Key, Options, Output, Query, Value
from infopo.logps.kernels import attend
from infopo.logps.layout import ForestLayout

NAMES: dict[str, str] = {}
"""Attention implementation that a model was loaded with -> name of the implementation that replaces it."""

_FLASH = re.compile(r"flash_attention_\d|kernels-community/.*flash.*")
"""Names of implementations that compute what sdpa computes, with kernels of the flash-attn family."""

_WITHOUT_EFFECT = {
    "position_ids", "use_cache", "cache_position", "output_attentions", "output_router_logits", "output_hidden_states",
    "return_dict", "num_items_in_batch", "is_causal",
}  # fmt: skip
"""Keywords that attention functions receive and that change nothing here. `forest_attention` refuses any other."""

WAY_OUT = ": set logps_path to 'naive'"
"""End of each error message of this module: what a user can do about it."""

OWN_MASK = "is given a mask of its model's own making, so rows of unequal length run apart"
"""Said of an attention that a layout does not reach: what padding does to such a mask is not known either."""

_has_layout: ContextVar[bool] = ContextVar("infopo_has_layout", default=False)


@contextlib.contextmanager
def layout_given() -> Iterator[None]:
    """Keeps models from building attention masks within the block, because the layout takes their place."""
    token = _has_layout.set(True)
    try:
        yield
    finally:
        _has_layout.reset(token)


def has_layout() -> bool:
    """Returns whether a forward pass over a layout is under way."""
    return _has_layout.get()


def forest_attention(
    module: nn.Module,
    query: Query,
    key: Key,
    value: Value,
    layout: ForestLayout,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Output, None]:
    """Computes softmax(q·k scaling) v of each token over its path: ancestors, and earlier tokens of its segment.

    The signature is that of transformers' attention functions. A keyword that is not known is refused, because a window
    or a sink that is ignored would change the numbers without a word.

    Args:
        module: The attention layer.
        query: Queries after rotary embedding, (1, heads, tokens, width).
        key: Keys after rotary embedding, (1, kv_heads, tokens, width), not repeated for grouped queries.
        value: Values, (1, kv_heads, tokens, value_width), not repeated either.
        layout: Which tokens attend to which.
        scaling: Factor of q·k, or None for 1/√width.
        dropout: Must be 0, because responses of one prompt would share the prompt's dropout mask.
        sliding_window: Distance in tokens from which on keys are not seen, or None.
        softcap: c in c·tanh(q·k scaling / c), or None.
        s_aux: Logit of each head's sink, or None. A sink takes part in the softmax and has no value.
        kwargs: Keywords that have no effect on attention.

    Returns:
        The attended values, (1, tokens, heads, value_width), and None for the attention weights.

    Raises:
        LogpsError: A keyword is given that this function does not honour.
    """
    unknown = {name for name, argument in kwargs.items() if argument is not None} - _WITHOUT_EFFECT
    if unknown or dropout:
        raise LogpsError(
            f"{type(module).__name__} asks for {', '.join(sorted(unknown)) or 'dropout'}, which shared-prefix "
            f"attention does not honour{WAY_OUT}"
        )
    return attend(query, key, value, layout, Options(scaling, sliding_window, softcap, s_aux)), None


def _replacement_of(original: str) -> Any:
    """Returns the attention function and the mask function that replace an implementation of transformers."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        layout = kwargs.pop("forest", None)
        if layout is not None:
            if attention_mask is not None and attention_mask.numel() != 1:  # 1: what `forest` itself passes
                raise LogpsError(f"{type(module).__name__} {OWN_MASK}{WAY_OUT}")
            return forest_attention(module, query, key, value, layout, **kwargs)
        if _has_layout.get():
            raise LogpsError(
                f"{type(module).__name__} is not given the layout of its batch, because its model does not pass "
                f"unknown keywords on{WAY_OUT}"
            )
        # Transformers' table has no entry for eager attention, which each modeling file defines for itself.
        plain = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        run = ALL_ATTENTION_FUNCTIONS.get_interface(original, plain)
        with _original_in_config(module, original):
            return run(module, query, key, value, attention_mask, **kwargs)

    def mask(*args: Any, **kwargs: Any) -> Any:
        return None if _has_layout.get() else ALL_MASK_ATTENTION_FUNCTIONS[original](*args, **kwargs)

    # A layout is a Python object, for each of which compiled code would be made again.
    return torch.compiler.disable(attention), mask


@contextlib.contextmanager
def _original_in_config(module: nn.Module, original: str) -> Iterator[None]:
    """Lets an attention layer read in its config the implementation that runs, which flash attention is chosen by."""
    config: Any = module.config
    ours = config._attn_implementation
    config._attn_implementation_internal = original
    try:
        yield
    finally:
        config._attn_implementation_internal = ours


def replacement_name(original: str | None) -> str | None:
    """Returns the name under which shared-prefix attention replaces an implementation, and registers it at first.

    Returns:
        None if it is not known what the implementation computes.

    Example:
        >>> replacement_name("sdpa"), replacement_name("my_attention")
        ('infopo_forest', None)
    """
    if original is None or not (original in ("sdpa", "eager") or _FLASH.fullmatch(original)):
        return None
    if original not in NAMES:
        # The name must not contain "sdpa", "eager" or "flash": transformers tests for these substrings.
        NAMES[original] = name = "infopo_forest" + (f"_{len(NAMES)}" if NAMES else "")
        attention, mask = _replacement_of(original)
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask)
    return NAMES[original]


for _original in ("sdpa", "eager"):
    replacement_name(_original)
