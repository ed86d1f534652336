"""Shared-prefix attention as transformers sees it: an attention implementation with a name.

There is one name for each implementation that it stands in for. Without a layout (in generation, and for padded rows)
a call goes on to that implementation with its mask. The layout reaches the attention as an extra keyword of the model,
through checkpointing, adapters and wrappers alike.
"""

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from infopo.errors import LogpsError
from infopo.logps.kernels import Key, Options, Output, Query, Value, attend
from infopo.logps.layout import ForestLayout

# The names must not contain "sdpa", "eager" or "flash": transformers tests for these substrings.
NAMES = {"sdpa": "infopo_forest", "eager": "infopo_forest_plain"}
"""Implementation that a model was loaded with -> name under which the forest stands in for it."""

_WITHOUT_EFFECT = {
    "position_ids", "use_cache", "cache_position", "output_attentions", "output_router_logits", "output_hidden_states",
    "return_dict", "num_items_in_batch", "is_causal",
}  # fmt: skip
"""Keywords that attention functions receive and that change nothing here. Any other is refused, not swallowed."""

WAY_OUT = ": set logps_path to 'naive'"

_has_layout: ContextVar[bool] = ContextVar("infopo_has_layout", default=False)


@contextlib.contextmanager
def layout_given() -> Iterator[None]:
    """Within it, models build no mask: the layout says who attends to whom."""
    token = _has_layout.set(True)
    try:
        yield
    finally:
        _has_layout.reset(token)


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
    """Attention of each token to its path: softmax(q·k scaling) v over ancestors and earlier tokens of its segment.

    The signature is that of transformers' attention functions.

    Args:
        module: The attention layer.
        query: Queries after rotary embedding.
        key: Keys after rotary embedding, not repeated for grouped queries.
        value: Values, not repeated either.
        layout: Which tokens attend to which.
        scaling: Factor of q·k. None: 1/√width.
        dropout: Must be 0, because responses would share their prompt's mask.
        sliding_window: Distance (tokens) from which keys are out of sight.
        softcap: c in c·tanh(q·k scaling / c).
        s_aux: Logit of a sink for each head, which takes probability and gives no value.
        kwargs: Keywords without effect on attention.

    Raises:
        LogpsError: A keyword is given that this function does not honour.
    """
    unknown = {name for name, given in kwargs.items() if given is not None} - _WITHOUT_EFFECT
    if unknown or dropout:
        raise LogpsError(
            f"{type(module).__name__} asks for {', '.join(sorted(unknown)) or 'dropout'}, which shared-prefix "
            f"attention does not honour{WAY_OUT}"
        )
    return attend(query, key, value, layout, Options(scaling, sliding_window, softcap, s_aux)), None


def _stand_in(original: str) -> Any:
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
            return forest_attention(module, query, key, value, layout, **kwargs)
        if _has_layout.get():
            raise LogpsError(
                f"{type(module).__name__} is not given the layout of its batch, because its model does not pass "
                f"unknown keywords on{WAY_OUT}"
            )
        plain = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        return ALL_ATTENTION_FUNCTIONS.get_interface(original, plain)(
            module, query, key, value, attention_mask, **kwargs
        )

    def mask(*args: Any, **kwargs: Any) -> Any:
        return None if _has_layout.get() else ALL_MASK_ATTENTION_FUNCTIONS[original](*args, **kwargs)

    return attention, mask


for _original, _name in NAMES.items():
    _attention, _mask = _stand_in(_original)
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, _mask)
