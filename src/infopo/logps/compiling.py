"""Compiles the parts of a model's layers, around an attention that stays as it is.

A compiled whole model would be compiled again for the layout of each batch. The parts of a layer (norms, projections
with their rotary embedding, the feed-forward network) know nothing of the layout, and their elementwise work is what a
compiler has to win.

The routers of a mixture of experts stay as they are, too. transformers reads their logits by hooks that it adds when a
forward pass is asked for them, and a graph that was made before has no hooks.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from infopo.logps import router
from infopo.logps.registration import has_layout
from infopo.logps.wrappers import base_of


def compile_layers(model: nn.Module, backend: str, mode: str | None = None) -> int:
    """Makes each part of each layer compile itself when shared prefixes first run through it, for rows of any length.

    The parts keep their names and their weights, so that saving and loading change nothing. They are compiled one by
    one, because torch leaves to Python what runs within activation checkpointing of a layer. Other passes without
    gradients run as without a compiler: those of generation would be compiled again for each form of their caches.

    Args:
        model: A causal language model of transformers, with or without adapters.
        backend: Backend of `torch.compile`.
        mode: Mode of `torch.compile`, or None for its default.

    Returns:
        Number of parts.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1}
        >>> compile_layers(LlamaForCausalLM(LlamaConfig(vocab_size=8, **tiny)), "eager")  # 2 norms, attention, MLP
        8
    """
    parts = parts_of(model)
    for part in parts:
        plain = part._compiled_call_impl or part._call_impl
        call = torch.compile(part._call_impl, backend=backend, mode=mode, dynamic=True)
        part._compiled_call_impl = partial(_call, call, plain)
    return len(parts)


@contextmanager
def compiled(model: nn.Module, backend: str, mode: str | None = None) -> Iterator[None]:
    """Has the layers of a model compiled within the block, after which it is as it was.

    torch keeps the graphs, so that a later block compiles nothing again.

    Args:
        model: As in `compile_layers`, like the other arguments.
        backend: Backend of `torch.compile`.
        mode: Mode of `torch.compile`, or None for its default.
    """
    before = [(part, part._compiled_call_impl) for part in parts_of(model)]
    try:
        compile_layers(model, backend, mode)
        yield
    finally:
        for part, call in before:
            part._compiled_call_impl = call


def parts_of(model: nn.Module) -> list[nn.Module]:
    """Returns the parts of layers that are compiled, which are those without a router."""
    layers = [m for m in base_of(model).modules() if isinstance(m, GradientCheckpointingLayer)]
    routers = router.recorded(model)
    return [part for layer in layers for part in _parts(layer, routers)]


def _parts(module: nn.Module, left_out: Collection[nn.Module]) -> Iterator[nn.Module]:
    """Yields the parts of a module in which none of those left out is, as large as they can be."""
    for child in module.children():
        # A list of modules is not called, so that compiling it would do nothing.
        if isinstance(child, nn.ModuleList | nn.ModuleDict) or any(m in left_out for m in child.modules()):
            yield from _parts(child, left_out)
        else:
            yield child


def _call(compiled: Callable[..., Any], plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a part of a layer, compiled in passes over a layout and in their backward passes."""
    # Activation checkpointing runs a part again in the backward pass, when the layout is out of sight, and must find
    # the operations of the forward pass. Generation has no gradients.
    return (compiled if torch.is_grad_enabled() or has_layout() else plain)(*args, **kwargs)
