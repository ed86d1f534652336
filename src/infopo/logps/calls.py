"""A call of attention over a layout: its tensors, its options, and what the choice of a kernel depends on."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Query = Float[Tensor, "1 heads tokens width"]
Key = Float[Tensor, "1 kv_heads tokens width"]
Value = Float[Tensor, "1 kv_heads tokens value_width"]
Output = Float[Tensor, "1 tokens heads value_width"]


@dataclass(frozen=True)
class Options:
    """How a layer computes its scores.

    Attributes:
        scaling: Factor of q·k, or None for 1/√width.
        window: Sliding window in tokens (distance < window), or None.
        softcap: c in c·tanh(q·k scaling / c), or None.
        sinks: Logit of each head's sink, or None. A sink takes part in the softmax and has no value.
    """

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Float[Tensor, " heads"] | None = None


@dataclass(frozen=True)
class Call:
    """Everything that the choice of a kernel depends on.

    All calls of a layer, and of layers like it, are equal as `Call`s, so that the choice is made once.

    Attributes:
        device: Device of the tensors.
        capability: Compute capability of the GPU, or None on other devices.
        dtype: Type of queries, keys and values, after autocast.
        heads: Number of query heads.
        kv_heads: Number of key and value heads.
        width: Width of a query head and of a key head.
        value_width: Width of a value head.
        has_window: Whether attention is limited to a sliding window.
        has_softcap: Whether scores have a soft cap.
        has_sinks: Whether heads have sinks.
        is_deterministic: Whether torch is asked for algorithms that repeat bit for bit.
    """

    device: torch.device
    capability: tuple[int, int] | None
    dtype: torch.dtype
    heads: int
    kv_heads: int
    width: int
    value_width: int
    has_window: bool = False
    has_softcap: bool = False
    has_sinks: bool = False
    is_deterministic: bool = False

    @classmethod
    def of(cls, query: Query, key: Key, value: Value, options: Options) -> "Call":
        """Describes the call that has these tensors and options."""
        return cls(
            query.device,
            torch.cuda.get_device_capability(query.device) if query.is_cuda else None,
            query.dtype,
            query.shape[1],
            key.shape[1],
            query.shape[3],
            value.shape[3],
            options.window is not None,
            options.softcap is not None,
            options.sinks is not None,
            torch.are_deterministic_algorithms_enabled(),
        )
