"""Kernels of the flash-attn family, for sequences of any lengths: the packages of flash-attn, and torch's own."""

import functools
import importlib
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen

from infopo.logps.calls import Call, Key, Options, Output, Query, Value
from infopo.logps.layout import ForestLayout, KeyIndex

varlen_attn: Any = varlen.varlen_attn
"""torch's kernel for sequences of any lengths, whose arguments differ between the versions of torch."""


# ---- the packages of flash-attn --------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlashAttention:
    """One of the packages that have a `flash_attn_varlen_func`, which is called by the names of its arguments.

    The names are those of all versions, and their order is not.

    Attributes:
        module: Module that has the function.
        unlimited: What stands in its `window_size` for a side without a limit.
        oldest: Least major compute capability of the GPUs that it has a forward and a backward pass for.
        newest: Greatest one, or None if later ones may be tried.
    """

    module: str
    unlimited: int | None
    oldest: int
    newest: int | None = None

    def obstacle(self, call: Call) -> str | None:
        """Returns why the package cannot take a call, or None if it can."""
        if reason := _fused_obstacle(call):
            return reason
        major, minor = call.capability or (0, 0)
        if major < self.oldest or (self.newest is not None and major > self.newest):
            return f"it is not for GPUs of compute capability {major}.{minor}"
        function, reason = _varlen_function_of(self.module)
        if function is None:
            return reason
        if missing := self._needed(call) - _arguments(function):
            return f"this version has no {', '.join(sorted(missing))}"
        return None

    @staticmethod
    def _needed(call: Call) -> set[str]:
        features = {
            "softcap": call.has_softcap,
            "learnable_sink": call.has_sinks,
            "deterministic": call.is_deterministic,
        }
        always = {*_OF_ALL_RUNS, "softmax_scale", "causal", "window_size"}
        return always | {name for name, is_needed in features.items() if is_needed}

    def run(self, query: Query, key: Key, value: Value, layout: ForestLayout, options: Options) -> Output:
        """Computes all runs in one call, as `by_varlen`."""
        function, _ = _varlen_function_of(self.module)
        before = self.unlimited if options.window is None else options.window - 1
        arguments = dict(zip(_OF_ALL_RUNS, _of_all_runs(query, key, value, layout), strict=True))
        arguments |= {"softmax_scale": options.scaling, "causal": True, "window_size": (before, 0)}
        # What a call does not need is left out, because some versions do not have it.
        if options.softcap is not None:
            arguments["softcap"] = options.softcap
        if options.sinks is not None:
            # The trial has sinks in float32, and so must all that it speaks for.
            arguments["learnable_sink"] = options.sinks.float()
        if torch.are_deterministic_algorithms_enabled():
            arguments["deterministic"] = True
        output = function(**arguments)
        # Some versions return the sums of the softmax, too.
        return (output[0] if isinstance(output, tuple) else output)[None]


@functools.cache
def _varlen_function_of(module: str) -> tuple[Any, str]:
    """Returns `flash_attn_varlen_func` of a module, or None and why there is none."""
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a build for another torch or GPU raises what it likes
        # A missing module of another name is something that an installed package needs.
        is_absent = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        does_not_load = f"{module} does not load: {type(error).__name__}: {error}"
        return None, f"{module} is not installed" if is_absent else does_not_load
    function = getattr(found, "flash_attn_varlen_func", None)
    if function is None and getattr(found, "__file__", None) is None:
        # FlashAttention 4 alone leaves a folder flash_attn behind, which is imported as an empty module.
        return None, f"{module} is not installed"
    return function, f"{module} has no flash_attn_varlen_func"


# FlashAttention 4 has no backward pass for GPUs before Hopper (9.0). FlashAttention 3 calls exit() on a GPU that it was
# not built for, so a trial must not find that out. It is always built for Hopper, and for no GPU after it.
FLASH_4 = FlashAttention("flash_attn.cute", unlimited=None, oldest=9)
FLASH_3 = FlashAttention("flash_attn_interface", unlimited=-1, oldest=9, newest=9)
FLASH_2 = FlashAttention("flash_attn", unlimited=-1, oldest=8)


# ---- torch's varlen_attn ---------------------------------------------------------------------------------------


def varlen_obstacle(call: Call) -> str | None:
    """Returns why torch's kernel cannot take a call, or None if it can."""
    if call.has_softcap or call.has_sinks:
        return "it has no soft caps and no sinks"
    return _fused_obstacle(call)


def _fused_obstacle(call: Call) -> str | None:
    """Returns what kernels of the flash-attn family do not take."""
    if call.capability is None or call.capability < (8, 0):
        return "it needs a GPU of the Ampere generation or later"
    if call.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes half precision, not {call.dtype}"
    if call.width != call.value_width or call.width > 256 or call.width % 8:
        return (
            f"it takes heads of one width, a multiple of 8 up to 256, not {call.width} and {call.value_width}"
        )
    return None


@functools.cache
def _arguments(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def by_varlen(query: Query, key: Key, value: Value, layout: ForestLayout, options: Options) -> Output:
    """Computes all runs in one call, in which the queries of a run are aligned with the last of its keys."""
    # torch 2.11 takes grouped heads as they are and has no such argument. Later versions refuse them without it.
    is_grouped = (
        {"enable_gqa": query.shape[1] != key.shape[1]} if "enable_gqa" in _arguments(varlen_attn) else {}
    )
    output = varlen_attn(
        *_of_all_runs(query, key, value, layout),
        scale=options.scaling,
        window_size=(-1 if options.window is None else options.window - 1, 0),
        **is_grouped,
    )
    return output[None]


def _of_all_runs(query: Query, key: Key, value: Value, layout: ForestLayout) -> tuple[Any, ...]:
    """Returns what kernels of the flash-attn family begin with: queries, keys and values, each (tokens, heads, width),
    the cumulative numbers of queries and of keys, and the largest number of each.
    """
    index = layout.key_index(query.device)
    return (
        query[0].transpose(0, 1),
        _SeenByRuns.apply(key[0].transpose(0, 1), index),
        _SeenByRuns.apply(value[0].transpose(0, 1), index),
        index.ends_of_queries.to(torch.int32),
        index.ends_of_keys.to(torch.int32),
        max(layout.sizes),
        max(layout.keys_of(run) for run in range(len(layout.sizes))),
    )


_OF_ALL_RUNS = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
"""Names that the packages of flash-attn have for what `_of_all_runs` returns."""


class _SeenByRuns(torch.autograd.Function):
    """Copies keys (or values), (tokens, heads, width), to the place of each run that sees them.

    The gradient of a gather would add up copies in no fixed order on a GPU. Here each token's copies are added one
    after the other.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, index: KeyIndex) -> Tensor:
        ctx.index = index
        return tokens.index_select(0, index.source)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        index: KeyIndex = ctx.index
        total = grad.index_select(0, index.own)
        if len(index.copies) > 1:
            total = total.to(torch.promote_types(total.dtype, torch.float32))
        for tokens, places in index.copies:
            more = total.index_select(0, tokens).add_(grad.index_select(0, places))
            total.index_copy_(0, tokens, more)
        return total.to(grad.dtype), None
