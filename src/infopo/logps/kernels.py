"""The kernels that compute shared-prefix attention, as a table, and the choice among them.

A kernel is an entry of `KERNELS`: a check that says why it cannot take a call, and the function that computes it.
`choose` takes the first kernel that has no obstacle. A kernel that depends on the machine is tried first: it runs a
tiny case forward and backward, and its results are compared with those of `written out`. An old GPU, another version of
torch or a head that is too wide then makes training slower, but neither stops it nor changes its numbers.
"""

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from infopo.logps.calls import Call, Key, Options, Output, Query, Value
from infopo.logps.flash import FLASH_2, FLASH_3, FLASH_4, by_varlen, varlen_obstacle
from infopo.logps.layout import ForestLayout
from infopo.output import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Kernel:
    """One way to compute attention over a layout.

    Attributes:
        name: Name of the kernel in logs.
        obstacle: Why the kernel cannot take a call, or None if it can.
        run: Computes the attention from queries, keys, values, layout and options.
        is_tried: Whether it is tried on a tiny case before its first call.
    """

    name: str
    obstacle: Callable[[Call], str | None]
    run: Callable[[Query, Key, Value, ForestLayout, Options], Output]
    is_tried: bool = False


def attend(query: Query, key: Key, value: Value, layout: ForestLayout, options: Options) -> Output:
    """Computes the attention of each token to its path, by the first kernel of `KERNELS` that takes the call.

    Args:
        query: Queries after rotary embedding, (1, heads, tokens, width).
        key: Keys after rotary embedding, (1, kv_heads, tokens, width), not repeated for grouped queries.
        value: Values, (1, kv_heads, tokens, value_width), not repeated either.
        layout: Which tokens attend to which.
        options: How scores are computed.

    Returns:
        The attended values, (1, tokens, heads, value_width), as transformers' attention functions return them.

    Example:
        >>> from infopo.logps.layout import ForestLayout, KeyIndex
        >>> row = torch.zeros(1, 2, 7, 8)  # 2 heads, 7 tokens, width 8
        >>> attend(row, row, row, ForestLayout([0, 3, 5, 7], [-1, 0, 0]), Options()).shape
        torch.Size([1, 7, 2, 8])
    """
    query, key, value = as_under_autocast(query, key, value)
    kernel = choose(Call.of(query, key, value, options))
    return kernel.run(query, key, value, layout, options)


def as_under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns the tensors in the type that matrix products have under autocast, or as they are without autocast.

    Under autocast, rotary embeddings leave queries and keys in float32 while values are in half precision. Kernels that
    autocast does not know need all three in one type. Float64 stays as it is, as autocast leaves it.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


_chosen: dict[Call, Kernel] = {}


def choose(call: Call) -> Kernel:
    """Returns the first kernel of the table that takes the call and, if it has to be tried, works on this machine.

    The choice is made once for each distinct `Call`. It is logged, with the reasons why earlier kernels are not taken.

    Example:
        >>> call = Call(torch.device("cpu"), None, torch.float32, heads=2, kv_heads=2, width=8, value_width=8)
        >>> choose(call).name
        'sdpa'
    """
    if call not in _chosen:
        reasons = []
        for kernel in KERNELS:
            reason = kernel.obstacle(call) or (failure(kernel, call) if kernel.is_tried else None)
            if reason is None:
                _chosen[call] = kernel
                break
            reasons.append(f"not {kernel.name}: {reason}")
        logger.info("attention on %s by %s (%s)", call.device, _chosen[call].name, "; ".join(reasons))
    return _chosen[call]


_TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest error that a trial allows, relative to the largest value. It is a few roundings of the type, and a wrong
kernel is off by more: on a CPU, rounding alone moved results by up to 1.4e-2 in bfloat16 and 2e-3 in float16. Types
that are not listed have 1e-2, because a GPU may compute float32 products in TF32."""


def failure(kernel: Kernel, call: Call) -> str | None:
    """Returns in one line why a kernel does not work for a call on this machine, or None if it does.

    A failure is logged as a warning, with all that is known of it.
    """
    # The choice is made within a model's forward pass. A thread of its own has none of that pass's autograd state, such
    # as the hooks with which activation checkpointing replaces saved tensors.
    with ThreadPoolExecutor(1) as pool:
        error = pool.submit(_try, kernel, call).exception()
    if error is None:
        return None
    logger.warning("the attention kernel %r does not work here, so a slower one runs: %s", kernel.name, error)
    # Errors of CUDA and of torch go on for many lines, and some assertions have none.
    return str(error).strip().partition("\n")[0] or type(error).__name__


_TRIED = (
    ForestLayout([0, 130, 140, 150], [-1, 0, 0]),
    ForestLayout([0, 5, 7, 8, 11, 14], [-1, 0, 0, 2, -1]),
)
"""Rows that a kernel is tried on: some kernels are other ones for rows of less than a block."""


def _try(kernel: Kernel, call: Call) -> None:
    """Runs responses to a prompt forward and backward, in a long and in a short row, and raises if the kernel fails or
    is wrong.
    """
    with torch.cuda.device(call.device) if call.device.type == "cuda" else contextlib.nullcontext():
        for layout in _TRIED:
            _compare(kernel, call, layout)


def _compare(kernel: Kernel, call: Call, layout: ForestLayout) -> None:
    inputs, options, weights = _trial(call, layout)
    results = []
    for run, dtype in ((kernel.run, call.dtype), (_written_out, torch.float32)):
        q, k, v = (t.detach().to(dtype).requires_grad_() for t in inputs)
        output = run(q, k, v, layout, options)
        varied = [q, k, v, *([options.sinks] if options.sinks is not None else [])]
        gradients = torch.autograd.grad(output, varied, weights.to(output.dtype), allow_unused=True)
        results.append([output.detach(), *gradients])
    for ours, expected in zip(*results, strict=True):
        if ours is None:
            raise ArithmeticError("its results have no gradient of all that they depend on")
        error = float((ours.float() - expected).abs().max() / expected.abs().max())
        if not error < _TOLERANCE.get(call.dtype, 1e-2):
            raise ArithmeticError(f"its results are off by {error:.2g} of the largest value")


def _trial(call: Call, layout: ForestLayout) -> tuple[list[Tensor], Options, Tensor]:
    """Returns random queries, keys and values, options, and weights of the output's entries in a sum.

    Nothing has a value at which a wrong factor shows little. Scores have a deviation of 2, so that a soft cap of 3
    bends them, and the scaling is not what a kernel takes by itself.
    """
    generator, size = torch.Generator().manual_seed(0), sum(layout.sizes)
    shapes = (
        (1, call.heads, size, call.width),
        (1, call.kv_heads, size, call.width),
        (1, call.kv_heads, size, call.value_width),
        (1, size, call.heads, call.value_width),
    )
    *inputs, weights = (
        torch.randn(shape, generator=generator).to(call.device, call.dtype) for shape in shapes
    )
    sinks = torch.randn(call.heads, generator=generator).to(call.device).requires_grad_()
    options = Options(
        scaling=2 * call.width**-0.5,
        window=size // 2 if call.has_window else None,
        softcap=3.0 if call.has_softcap else None,
        sinks=sinks if call.has_sinks else None,
    )
    return inputs, options, weights


# ---- flex_attention: soft caps and sinks -----------------------------------------------------------------------


def _flex_obstacle(call: Call) -> str | None:
    if not (call.has_softcap or call.has_sinks):
        return "it is for soft caps and sinks"
    if call.device.type != "cuda" or not _is_installed("triton"):
        return "it needs a GPU and triton"
    return None


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # something stands in for it, without a specification
        return False


@functools.cache
def _flex_kernel(backend: str = "inductor") -> Any:
    compiled = torch.compile(flex.flex_attention, backend=backend, fullgraph=True)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        # Each combination of windows, frozen projections and gradients needs a graph of its own. Beyond the default
        # limit of 8 graphs, a function that is compiled with `fullgraph` raises.
        with torch._dynamo.config.patch(recompile_limit=64):
            return compiled(*args, **kwargs)

    return kernel


def _by_flex(query: Query, key: Key, value: Value, layout: ForestLayout, options: Options) -> Output:
    """Computes the whole row in one call, with soft cap and sinks.

    A sink takes the share e^sink / (e^sink + Σ e^score) of each head's probability, so the output without sinks is
    scaled by what remains, σ(log Σ e^score - sink).
    """
    device, softcap = query.device, options.softcap
    # The cap enters as a tensor, because flex_attention would be compiled again for each Python number.
    cap = torch.full((), softcap or 0.0, device=device)
    output, log_total = _flex_kernel()(
        query,
        key,
        value,
        score_mod=None if softcap is None else lambda score, b, h, q, k: cap * torch.tanh(score / cap),
        block_mask=layout.block_mask(options.window, device),
        scale=options.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        return_lse=True,
        # For short rows the compiler would look for a kernel for decoding, of which torch 2.11 finds none.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )
    if options.sinks is not None:
        remaining = torch.sigmoid(log_total - options.sinks.to(log_total.dtype)[None, :, None])
        output = (output * remaining[..., None]).to(value.dtype)
    return output.transpose(1, 2)


# ---- one call of scaled_dot_product_attention per run ----------------------------------------------------------


def _sdpa_obstacle(call: Call) -> str | None:
    return "it has no soft caps and no sinks" if call.has_softcap or call.has_sinks else None


def _by_sdpa(query: Query, key: Key, value: Value, layout: ForestLayout, options: Options) -> Output:
    outputs = []
    for q, k, v, run in _runs(query, key, value, layout):
        mask = layout.mask(run, options.window, query.device)
        if mask is not None and query.device.type == "cuda":
            # No fused kernel on a GPU takes both a mask and grouped heads, so keys and values are repeated.
            k, v = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (k, v))
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=options.scaling,
                enable_gqa=query.shape[1] != k.shape[1],
            )
        )  # fmt: skip
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)


# ---- the definition --------------------------------------------------------------------------------------------


def _written_out(query: Query, key: Key, value: Value, layout: ForestLayout, options: Options) -> Output:
    """Computes the softmax over all scores of a run at once, and so defines what the other kernels compute."""
    outputs = []
    for q, k, v, run in _runs(query, key, value, layout):
        mask = layout.mask(run, options.window, query.device)
        outputs.append(_softmax_attention(q, k, v, mask, options))
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)


def _softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Options
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scaling, softcap, sinks = options.scaling, options.softcap, options.sinks
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, float("-inf")).to(torch.promote_types(scores.dtype, torch.float32))
    if sinks is not None:
        sink = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=3)
    weights = scores.softmax(dim=3)[..., : key.shape[2]].to(value.dtype)
    return weights @ value


def _by_run(tensor: Tensor, layout: ForestLayout) -> Sequence[Tensor]:
    # The gradient of `split` is one concatenation. The gradient of each slice would be as large as the whole tensor.
    return tensor.split(layout.sizes, dim=2)


def _runs(
    query: Tensor, key: Tensor, value: Tensor, layout: ForestLayout
) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Yields the queries of each run, the keys and values that they may see, and the run's index."""
    queries, keys, values = (_by_run(t, layout) for t in (query, key, value))
    for run, before in enumerate(layout.context):
        k, v = (torch.cat(_seen(t, layout, run), dim=2) if before else t[run] for t in (keys, values))
        yield queries[run], k, v, run


def _seen(parts: Sequence[Tensor], layout: ForestLayout, run: int) -> list[Tensor]:
    """Returns the keys (or values) that a run sees, oldest first: those of its context, then its own."""
    return [*(parts[other][:, :, :tokens] for other, tokens in layout.context[run]), parts[run]]


# The fastest come first. Later versions of flash-attn are for later GPUs, and varlen is version 2 as torch has it. Like
# flex, they compute the whole row in one call. Flex is for soft caps and sinks, which varlen and some versions of
# flash-attn lack. SDPA needs a call, and often a dense mask, per run, but works on every device. The last one forms the
# scores as they are defined, and therefore takes every call.
KERNELS: tuple[Kernel, ...] = (
    Kernel("flash 4", FLASH_4.obstacle, FLASH_4.run, is_tried=True),
    Kernel("flash 3", FLASH_3.obstacle, FLASH_3.run, is_tried=True),
    Kernel("flash 2", FLASH_2.obstacle, FLASH_2.run, is_tried=True),
    Kernel("varlen", varlen_obstacle, by_varlen, is_tried=True),
    Kernel("flex", _flex_obstacle, _by_flex, is_tried=True),
    Kernel("sdpa", _sdpa_obstacle, _by_sdpa),
    Kernel("written out", lambda call: None, _written_out),
)
"""All kernels in the order in which `choose` asks them."""
