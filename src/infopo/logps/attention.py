"""Shared-prefix attention: a forest of segments in one row, each token attending to its own path only.

Registered with transformers under two names, one for each implementation that it stands in for; without a layout
(generation, padded rows) a call goes on to that one, with its mask. The layout reaches the attention as an extra
keyword of the model, through checkpointing, adapters and wrappers alike.
"""

import contextlib
import copy
import functools
import importlib.util
import inspect
import logging
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from infopo.errors import LogpsError
from infopo.logps.wrappers import base_of, has_virtual_tokens

logger = logging.getLogger(__name__)

varlen_attn: Any = None  # torch has it from 2.10 on
with contextlib.suppress(ImportError):
    from torch.nn.attention.varlen import varlen_attn

# Neither may hold the name of an implementation: transformers looks for parts of names.
_NAMES = {"sdpa": "infopo_forest", "eager": "infopo_forest_plain"}
"""Implementation that a model was loaded with -> name under which the forest stands in for it."""

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_WITHOUT_EFFECT = {
    "position_ids", "use_cache", "cache_position", "output_attentions", "output_router_logits", "output_hidden_states",
    "return_dict", "num_items_in_batch", "is_causal",
}  # fmt: skip
"""Keywords that attention functions receive and that change nothing here: any other is refused, not swallowed."""

_WAY_OUT = ": set logps_path to 'naive'"

_has_layout: ContextVar[bool] = ContextVar("infopo_has_layout", default=False)


class ForestLayout:
    """Which tokens attend to which: runs of tokens, each with the runs that come before it on its path.

    A segment that follows its parent directly goes on with the parent's run; any other begins one. A token sees the
    context of its run and the tokens of the run up to itself: plain causal attention where there is no context.

    Attributes:
        sizes: Tokens of each run, in the order of the row.
        context: For each run, the (run, tokens) before it: the first `tokens` of that run, oldest first.
    """

    def __init__(self, segment_start: Sequence[int], segment_parent: Sequence[int]) -> None:
        """As in `PackedBatch`."""
        run_of, end_in_run = list[int](), list[int]()  # of each segment
        self.sizes: list[int] = []
        self.context: list[list[tuple[int, int]]] = []
        for segment, parent in enumerate(segment_parent):
            size = segment_start[segment + 1] - segment_start[segment]
            if parent >= 0 and parent == segment - 1:  # goes on where its parent ended
                run_of.append(run_of[parent])
                self.sizes[-1] += size
            else:
                above = run_of[parent] if parent >= 0 else None
                self.context.append(
                    [] if above is None else [*self.context[above], (above, end_in_run[parent])]
                )
                run_of.append(len(self.sizes))
                self.sizes.append(size)
            end_in_run.append(self.sizes[-1])
        self._segments = (segment_start, segment_parent)
        self._block_masks: dict[tuple[int | None, torch.device], Any] = {}
        self._ends: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple[int, int, int | None, torch.device], Bool[Tensor, "queries keys"]] = {}

    def keys_of(self, run: int) -> int:
        """Number of tokens that the last token of a run sees."""
        return self.sizes[run] + sum(tokens for _, tokens in self.context[run])

    def ends(self, device: torch.device) -> tuple[Int[Tensor, " ends"], Int[Tensor, " ends"]]:
        """Where queries and keys of each run end, one run after the other, from 0 (int32)."""
        if device not in self._ends:
            runs = range(len(self.sizes))
            sizes = (self.sizes, [self.keys_of(run) for run in runs])
            queries, keys = (
                torch.tensor([0, *accumulate(s)], dtype=torch.int32, device=device) for s in sizes
            )
            self._ends[device] = queries, keys
        return self._ends[device]

    def mask(self, run: int, window: int | None, device: torch.device) -> Bool[Tensor, "queries keys"] | None:
        """Which keys each query of a run sees; None: plain causal attention.

        Args:
            run: Number of the run.
            window: Sliding window in tokens (distance < window), or None.
            device: Where the mask is needed.
        """
        queries = self.sizes[run]
        keys = self.keys_of(run)
        if queries == keys and (window is None or window >= keys):
            return None
        key = (queries, keys, window, device)
        if key not in self._masks:  # the same for every layer
            position = torch.arange(keys, device=device)
            distance = position[keys - queries :, None] - position
            seen = distance >= 0
            self._masks[key] = seen if window is None else seen & (distance < window)
        return self._masks[key]

    def block_mask(self, window: int | None, device: torch.device) -> Any:
        """Who sees whom in the whole row, as `flex_attention` takes it.

        Args:
            window: Sliding window in tokens (distance < window), or None.
            device: Where the mask is needed.
        """
        if (window, device) not in self._block_masks:  # the same for every layer
            position, first, end = (torch.tensor(values, device=device) for values in self._places())
            size = len(position)
            reach = size if window is None else window
            too_old = position - reach  # a tensor: each number would be compiled anew
            self._block_masks[window, device] = flex.create_block_mask(
                lambda batch, head, query, key: (
                    (first[key] <= first[query])
                    & (first[query] < end[key])
                    & (position[key] <= position[query])
                    & (position[key] > too_old[query])
                ),
                None, None, size, size, device,
            )  # fmt: skip
        return self._block_masks[window, device]

    def _places(self) -> tuple[list[int], list[int], list[int]]:
        """Of each token: its position on its path; its segment's number, counted depth first; and the number after
        the last segment beneath that one. So what lies beneath a segment is a range of numbers.
        """
        start, parents = self._segments
        sizes = [end - begin for begin, end in pairwise(start)]
        root = len(parents)  # also parents' -1: it holds all trees
        beneath, free, after = [1] * (root + 1), [0] * (root + 1), [0] * (root + 1)
        for segment in reversed(range(root)):
            beneath[parents[segment]] += beneath[segment]
        positions, firsts, ends = list[int](), list[int](), list[int]()
        for segment, parent in enumerate(parents):
            first, free[parent] = free[parent], free[parent] + beneath[segment]
            free[segment], after[segment] = first + 1, after[parent] + sizes[segment]
            positions += range(after[parent], after[segment])
            firsts += [first] * sizes[segment]
            ends += [first + beneath[segment]] * sizes[segment]
        return positions, firsts, ends


def enable(model: nn.Module) -> str | None:
    """Switches a model to forest attention; returns the reason where it cannot share prefixes, and None where it can.

    Args:
        model: A causal language model of transformers, or one with a PEFT adapter.
    """
    disable(model)
    reason = _obstacle(model)
    if reason is None:
        base = base_of(model)
        name = _NAMES[base.config._attn_implementation]
        base.set_attn_implementation(name)
        if base.config._attn_implementation != name:
            return "its attention cannot be exchanged"
    return reason


def disable(model: nn.Module) -> None:
    """Gives a model the attention back that it was loaded with."""
    if is_enabled(model):
        base_of(model).set_attn_implementation(implementation_of(model))


def _obstacle(model: nn.Module) -> str | None:
    """Why responses of a prompt cannot share it in this model, or None."""
    base = base_of(model)
    if has_virtual_tokens(model):
        return "its adapter puts virtual tokens before each row"
    if not isinstance(base, PreTrainedModel):
        return "it is not a model of transformers"
    implementation = base.config._attn_implementation
    if implementation not in _NAMES:
        return f"its attention is {implementation!r}; prefixes are shared with {' and '.join(_NAMES)}"
    if not base._supports_attention_backend or base.config.is_encoder_decoder:
        return "its attention cannot be exchanged"
    if "logits_to_keep" not in inspect.signature(base.forward).parameters:
        return "its forward pass gives logits of all positions only"
    if any(getattr(module, "is_causal", True) is False for module in base.modules()):
        return "its attention is not causal"
    text = base.config.get_text_config()
    if other := set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES:
        return f"it has layers of type {', '.join(sorted(other))}"
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()) or any(
        value for name, value in vars(text).items() if "drop" in name and isinstance(value, float)
    ):
        return "it has dropout, which a shared prompt would share too"
    return _refusal(base)


def _refusal(base: PreTrainedModel) -> str | None:
    """What forest attention itself would say against this model, tried without weights or data, on one layer."""
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device="meta")
    layout = ForestLayout([0, 1, 2], [-1, -1])
    inputs = {"input_ids": ids, "position_ids": ids, "attention_mask": mask, "forest": layout}
    try:
        config = copy.deepcopy(base.config)
        text = config.get_text_config()
        text.num_hidden_layers = 1
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:1]
        with torch.device("meta"):
            layer = type(base)(config)
        layer.set_attn_implementation(_NAMES[base.config._attn_implementation])
        with layout_given(), torch.no_grad():
            layer(**inputs, use_cache=False, logits_to_keep=1)
    except LogpsError as error:
        return str(error).removesuffix(_WAY_OUT)
    except Exception:  # this architecture cannot be tried so; the self-test stays
        return None
    return None


def is_enabled(model: nn.Module) -> bool:
    """Whether the model, or the one it wraps, attends over forests."""
    model = base_of(model)
    return getattr(getattr(model, "config", None), "_attn_implementation", None) in _NAMES.values()


def implementation_of(model: nn.Module) -> str | None:
    """The attention implementation that the model was loaded with, which `from_pretrained` knows."""
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return next((original for original, ours in _NAMES.items() if ours == name), name)


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
    query: Float[Tensor, "1 heads tokens width"],
    key: Float[Tensor, "1 kv_heads tokens width"],
    value: Float[Tensor, "1 kv_heads tokens value_width"],
    layout: ForestLayout,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Float[Tensor, " heads"] | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "1 tokens heads value_width"], None]:
    """Attention of each token to its path: softmax(q·k scaling) v over ancestors and earlier tokens of its segment.

    Args:
        module: The attention layer.
        query: After rotary embedding.
        key: Not repeated for grouped queries.
        value: Likewise.
        layout: Who attends to whom.
        scaling: Factor of q·k; None: 1/√width.
        dropout: Must be 0: responses would share their prompt's mask.
        sliding_window: Distance (tokens) from which keys are out of sight.
        softcap: c in c·tanh(q·k scaling / c).
        s_aux: Logit of a sink for each head, which takes probability and gives no value.
        kwargs: Keywords without effect on attention.

    Raises:
        LogpsError: A keyword that is not honoured.
    """
    unknown = {name for name, given in kwargs.items() if given is not None} - _WITHOUT_EFFECT
    if unknown or dropout:
        raise LogpsError(
            f"{type(module).__name__} asks for {', '.join(sorted(unknown)) or 'dropout'}, which shared-prefix "
            f"attention does not honour{_WAY_OUT}"
        )
    if (softcap is not None or s_aux is not None) and _has_flex(query, key, value):
        return _by_flex(query, key, value, layout, scaling, sliding_window, softcap, s_aux), None
    # Split, not sliced: the gradient of a slice is as large as the whole.
    queries, keys, values = (t.split(layout.sizes, dim=2) for t in (query, key, value))
    if softcap is None and s_aux is None and _has_varlen(query, value):
        return _one_call(query, keys, values, layout, scaling, sliding_window), None
    outputs = []
    for run, before in enumerate(layout.context):
        k, v = (torch.cat(_seen(t, layout, run), dim=2) if before else t[run] for t in (keys, values))
        mask = layout.mask(run, sliding_window, query.device)
        if softcap is None and s_aux is None:
            if mask is not None and query.device.type == "cuda":
                # No fused kernel there has both a mask and groups.
                k, v = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (k, v))
            outputs.append(
                F.scaled_dot_product_attention(
                    queries[run], k, v, mask, is_causal=mask is None, scale=scaling,
                    enable_gqa=query.shape[1] != k.shape[1],
                )
            )  # fmt: skip
        else:
            outputs.append(_written_out(queries[run], k, v, mask, scaling, softcap, s_aux))
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1), None


def _seen(parts: Sequence[Tensor], layout: ForestLayout, run: int) -> list[Tensor]:
    """Keys (or values) of what a run sees, oldest first: of its context, then its own."""
    return [*(parts[other][:, :, :tokens] for other, tokens in layout.context[run]), parts[run]]


def _has_varlen(query: Tensor, value: Tensor) -> bool:
    """Whether one kernel takes all runs: it wants halves, on a GPU of the Ampere generation or later."""
    return (
        varlen_attn is not None
        and query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[3] == value.shape[3]
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _one_call(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    layout: ForestLayout,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """All runs in one kernel; where a run has fewer queries than keys, they are the last ones."""
    runs = range(len(layout.sizes))
    # Parts put together, not rows gathered: the gradient of a gather adds up in no fixed order.
    k, v = (
        torch.cat([part for run in runs for part in _seen(parts, layout, run)], dim=2)[0].transpose(0, 1)
        for parts in (keys, values)
    )
    ends_of_queries, ends_of_keys = layout.ends(query.device)
    output = varlen_attn(
        query[0].transpose(0, 1),
        k,
        v,
        ends_of_queries,
        ends_of_keys,
        max(layout.sizes),
        max(layout.keys_of(run) for run in runs),
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != k.shape[1],
    )
    return output[None]


def _has_flex(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether soft caps and sinks have a kernel here."""
    if not query.is_cuda or importlib.util.find_spec("triton") is None:
        return False
    return _flex_works(
        query.device, value.dtype, query.shape[1], key.shape[1], query.shape[3], value.shape[3]
    )


@functools.cache
def _flex_works(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, width: int, value_width: int
) -> bool:
    """Whether the kernel can be compiled and run, in both directions: wide heads do not fit every GPU."""

    def attempt() -> None:
        q, k, v = (
            torch.zeros(1, number, 150, size, device=device, dtype=dtype, requires_grad=True)
            for number, size in ((heads, width), (kv_heads, width), (kv_heads, value_width))
        )
        layout, sinks = ForestLayout([0, 130, 140, 150], [-1, 0, 0]), torch.zeros(heads, device=device)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            _by_flex(q, k, v, layout, None, 64, 1.0, sinks.requires_grad_()).sum().backward()

    # In a thread of its own, where the autograd state of the forward pass around this (checkpointing) is not.
    with ThreadPoolExecutor(1) as pool:
        error = pool.submit(attempt).exception()
    if error is not None:
        logger.warning("flex attention does not run here, so soft caps and sinks are slower: %s", error)
    return error is None


@functools.cache
def _flex_kernel(backend: str = "inductor") -> Any:
    compiled = torch.compile(flex.flex_attention, backend=backend, fullgraph=True)
    settings = torch._dynamo.config
    limit = "recompile_limit" if hasattr(settings, "recompile_limit") else "cache_size_limit"

    def kernel(*args: Any, **kwargs: Any) -> Any:
        # A graph for each combination of windows, frozen projections and gradients; 8 by default, then no kernel.
        with settings.patch({limit: 64}):
            return compiled(*args, **kwargs)

    return kernel


def _by_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: ForestLayout,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """The whole row in one kernel, for a soft cap or sinks: a sink takes e^sink / (e^sink + Σ e^score) of each head."""
    device = query.device
    cap = torch.full((), softcap or 0.0, device=device)  # a tensor, as in the mask
    # As products do under autocast: rotary embeddings leave queries and keys in float32.
    if torch.is_autocast_enabled(device.type):
        query, key, value = (t.to(torch.get_autocast_dtype(device.type)) for t in (query, key, value))
    output, log_total = _flex_kernel()(
        query,
        key,
        value,
        score_mod=None if softcap is None else lambda score, b, h, q, k: cap * torch.tanh(score / cap),
        block_mask=layout.block_mask(window, device),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        return_lse=True,
    )
    if s_aux is not None:
        kept = torch.sigmoid(log_total - s_aux.to(log_total.dtype)[None, :, None])
        output = (output * kept[..., None]).to(value.dtype)
    return output.transpose(1, 2)


def _written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """softmax over all scores at once, for what no fused kernel has: a soft cap, or sinks."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, float("-inf")).to(torch.promote_types(scores.dtype, torch.float32))
    if s_aux is not None:
        sink = s_aux.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=3)
    weights = scores.softmax(dim=3)[..., : key.shape[2]].to(value.dtype)
    return weights @ value


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
                f"unknown keywords on{_WAY_OUT}"
            )
        plain = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        return ALL_ATTENTION_FUNCTIONS.get_interface(original, plain)(
            module, query, key, value, attention_mask, **kwargs
        )

    def mask(*args: Any, **kwargs: Any) -> Any:
        return None if _has_layout.get() else ALL_MASK_ATTENTION_FUNCTIONS[original](*args, **kwargs)

    return attention, mask


for _original, _name in _NAMES.items():
    _attention, _mask = _stand_in(_original)
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, _mask)
