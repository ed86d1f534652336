"""Says what a reference is: a map from a batch to log π_ref of its responses, for the sides that are asked for.

Its values are either put into the examples before training (`reference_pass.py`) or computed live, by a second model or
by the policy with its adapter switched off. Its identity is all that a value depends on besides tokens.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from infopo.data.examples import ExampleDataset
from infopo.data.packing import select
from infopo.errors import ConfigError
from infopo.hashing import WeightsHash, config_hash
from infopo.logps import attention
from infopo.logps.forward import path_of, response_logps
from infopo.losses.catalog import row_of
from infopo.noise import evaluating
from infopo.output import get_logger
from infopo.records import PackedBatch, Role, to_device
from infopo.reference_store import ReferenceIdentity

logger = get_logger(__name__)

HEAD = "float32 logits (on the naive path in the model's type), normalised in float32"
"""Part of the store's keys that describes what `logps/` does with hidden states.

Change it whenever that computation changes, so that no stored value of the old one is used again.
"""

ROLE_OF = {"chosen": Role.CHOSEN, "rejected": Role.REJECTED, "kl": Role.KL}
"""Role of the responses of each side."""


@runtime_checkable
class Reference(Protocol):
    """The interface that a trainer needs of a reference.

    Attributes:
        sides: Sides whose log-probs it computes, a subset of {chosen, rejected, kl}.
    """

    sides: frozenset[str]

    def __call__(self, batch: PackedBatch) -> Float[Tensor, " responses"]:
        """Returns log π_ref(y|x) of each response (nats), NaN if its side was not asked for."""
        ...


class StoredReference:
    """A reference whose values are already part of the examples."""

    def __init__(self, sides: frozenset[str]) -> None:
        self.sides = sides

    def __call__(self, batch: PackedBatch) -> Float[Tensor, " responses"]:
        return batch.reference


class LiveReference:
    """A frozen model that runs beside the policy on the sides that are needed.

    Args:
        model: The reference, or the policy itself when `context` turns it into the reference.
        sides: Sides to compute.
        context: Context of the forward pass, e.g. one that switches an adapter off.
    """

    def __init__(
        self,
        model: nn.Module,
        sides: frozenset[str],
        context: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.model = model
        self.sides = sides
        self.context = context

    def __call__(self, batch: PackedBatch) -> Float[Tensor, " responses"]:
        roles = {ROLE_OF[side] for side in self.sides}
        wanted = [i for i, role in enumerate(batch.roles) if role in roles]
        # The model may be the policy, whose dropout must not change the reference.
        with torch.no_grad(), evaluating(self.model), self.context():
            values = response_logps(self.model, select(batch, wanted))
        [places] = to_device([torch.tensor(wanted, dtype=torch.int64)], values.device)
        result = torch.full_like(batch.reference, float("nan"), dtype=values.dtype)
        result[places] = values
        return result


def reference_sides(
    mixture: Sequence[tuple[str, Mapping[str, object], float]], setting: str, split: Literal["train", "eval"]
) -> frozenset[str]:
    """Returns the sides whose reference log-probs are computed, a subset of {chosen, rejected, kl}.

    Args:
        mixture: The objectives, each as (name, parameters, weight).
        setting: `needed` is the sides that the loss needs, and `both` is chosen and rejected. `auto` is `needed` for
            training, where each side costs a pass over the data, and `both` for evaluation, which is small and is done
            for its metrics. For losses without a reference, `auto` is no side.
        split: Whether the examples are for training or for evaluation.

    Example:
        >>> sorted(reference_sides([("infopo", {}, 1.0)], "auto", "train"))
        ['rejected']
        >>> sorted(reference_sides([("infopo", {}, 1.0)], "auto", "eval"))
        ['chosen', 'rejected']
    """
    needed = frozenset[str]().union(*(row_of(name).reference for name, _, _ in mixture))
    if any(row_of(name).statistic == "kl" for name, _, _ in mixture):
        needed |= {"kl"}
    if setting == "both" or (setting == "auto" and split == "eval" and needed):
        return needed | {"chosen", "rejected"}
    return needed


def resolve(source: str, dataset: object) -> str:
    """Returns what `reference: auto` means for a dataset: `precompute` if its rows can be enumerated, else `live`.

    Any other source is returned as it is.

    Raises:
        ConfigError: The reference of a stream would be computed before training.
    """
    can_be_enumerated = isinstance(dataset, ExampleDataset)
    if source == "precompute" and not can_be_enumerated:
        raise ConfigError(
            "reference='precompute': the rows of a stream cannot be enumerated before training; use live or adapter-off"
        )
    if source == "auto":
        return "precompute" if can_be_enumerated else "live"
    return source


def identity_of(
    model: nn.Module,
    weights: WeightsHash,
    device: torch.device,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> ReferenceIdentity:
    """Returns the identity of the function that `precompute` evaluates: all that a value depends on besides tokens.

    Args:
        model: The reference, whose attention implementation is set.
        weights: Hashes of its weights.
        device: Device that it will run on. The kind of device is not part of the identity, because it changes no more
            than rounding.
        context: Context of the forward pass, as in `precompute`.
    """
    with context():
        casts = torch.is_autocast_enabled(device.type)
        autocast = _name(torch.get_autocast_dtype(device.type)) if casts else "off"
    return ReferenceIdentity(
        weights=weights.base,
        adapter=weights.adapter,
        config=config_hash(model),
        dtype=_name(model.dtype),  # type: ignore[arg-type]
        autocast=autocast,
        matmul=_matmul_precision(device),
        head=HEAD,
        path=path_of(model),
        attention=str(attention.implementation_of(model)),
    )


def is_exact(
    model: nn.Module,
    device: torch.device,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> bool:
    """Returns whether this model computes in float32 or better throughout: no autocast and no TF32, however set.

    Args:
        model: Policy or reference.
        device: Device that it runs on.
        context: Context of its forward pass.
    """
    with context():
        casts = torch.is_autocast_enabled(device.type)
    full = model.dtype in (torch.float32, torch.float64)
    return full and not casts and _matmul_precision(device) == "ieee"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _matmul_precision(device: torch.device) -> str:
    """Returns the precision of float32 matrix products on this kind of device: `ieee`, `tf32` or `bf16`."""
    backend = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    precision = getattr(backend, "fp32_precision", None)
    if precision is None:
        # Versions of torch before 2.9 have no such attribute.
        precision = "tf32" if device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32 else "ieee"
    return "ieee" if precision == "none" else str(precision)


def tolerance(tokens: int, *, is_exact: bool, noise: float | None = None) -> float:
    """Returns how far two values of a response's log-prob may differ if the same function computed both (nats).

    It is c (1 + √n) for n tokens, because the logits of one token are rounded, and the log-probs of n tokens are
    rounded independently. c is 5e-4 in float32, where other kernels differ by 1e-5 per token. In half precision it is
    0.1, where one unit in the last place of a bfloat16 logit of 16 is 0.125. If the noise of this model was measured,
    it is five times that, from 0.02 to 0.1. Stored values, the start-up test and the check of step 0 are all judged by
    it. A response that differs by more is computed again before anything is refused, to see what rounding does to it:
    see `logps.rounding`.

    Args:
        tokens: Number of tokens of the response.
        is_exact: Whether values are computed in float32 throughout.
        noise: c as measured on this model: the change of a response's log-prob (nats) by padding, divided by 1 + √n.

    Example:
        >>> round(tolerance(100, is_exact=True), 6)
        0.0055
    """
    measured = 0.1 if noise is None else min(0.1, max(0.02, 5 * noise))
    return (5e-4 if is_exact else measured) * (1 + math.sqrt(tokens))
