"""Reference log-probs: where they come from, and for which sides.

A reference maps a batch to log π_ref of its responses, NaN for the sides that were not asked for. It is either
stored in the examples beforehand (`precompute`) or computed live, by a second model or by the policy with its
adapter switched off.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from infopo.data.examples import ExampleDataset
from infopo.data.packing import pack, select
from infopo.logps.forward import response_logps
from infopo.records import PackedBatch, PreferenceExample, Role, sum_dtype

_ROLE_OF = {"chosen": Role.CHOSEN, "rejected": Role.REJECTED}


class Reference(Protocol):
    """What a trainer needs of a reference.

    Attributes:
        sides: Subset of {chosen, rejected} whose log-probs it gives.
    """

    sides: frozenset[str]

    def __call__(self, batch: PackedBatch) -> Float[Tensor, " responses"]:
        """log π_ref(y|x) of each response (nats), NaN where the side was not asked for."""
        ...


class StoredReference:
    """Values that the examples already carry."""

    def __init__(self, sides: frozenset[str]) -> None:
        self.sides = sides

    def __call__(self, batch: PackedBatch) -> Float[Tensor, " responses"]:
        return batch.reference


class LiveReference:
    """A frozen model that runs beside the policy on the sides that are needed.

    Args:
        model: The reference, or the policy itself when `context` turns it into the reference.
        sides: Sides to compute.
        context: Entered around the forward pass, e.g. to switch an adapter off.
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
        roles = {_ROLE_OF[side] for side in self.sides}
        wanted = [i for i, role in enumerate(batch.role.tolist()) if role in roles]
        was_training = self.model.training
        self.model.eval()  # it may be the policy, whose dropout is not the reference's
        with torch.no_grad(), self.context():
            values = response_logps(self.model, select(batch, wanted))
        self.model.train(was_training)
        result = torch.full_like(batch.reference, float("nan"), dtype=values.dtype)
        result[wanted] = values
        return result


def precompute(
    dataset: ExampleDataset,
    model: nn.Module,
    sides: frozenset[str],
    *,
    batch_size: int,
    device: torch.device,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
    rank: int = 0,
    world_size: int = 1,
    add_over_ranks: Callable[[Tensor], Tensor] = lambda values: values,
    progress: Callable[[Iterable[list[int]]], Iterable[list[int]]] = lambda batches: batches,
) -> ExampleDataset:
    """The dataset with log π_ref of `sides` stored in it, computed once; each rank computes its share.

    Examples run in order of length, so that little padding is computed.

    Args:
        dataset: Examples to complete.
        model: The reference, in the precision in which it will be compared with the policy.
        sides: Sides to compute; the others stay NaN.
        batch_size: Examples a forward pass.
        device: Where `model` is.
        context: Entered around each forward pass (autocast, say).
        rank: This process's number.
        world_size: Number of processes.
        add_over_ranks: Sums a (responses,) tensor over the processes.
        progress: Wraps the iteration over batches.
    """
    offsets = dataset.response_offsets
    values = np.zeros(offsets[-1], dtype=np.float64)
    order = np.argsort(-dataset.lengths, kind="stable")[rank::world_size].tolist()
    was_training = model.training
    model.eval()
    with torch.no_grad(), context():
        for indices in progress([order[i : i + batch_size] for i in range(0, len(order), batch_size)]):
            parts, targets = [], []
            for i in indices:
                example, kept = _only(dataset[i], sides)
                parts.append(example)
                targets += [offsets[i] + k for k in kept]
            if targets:
                values[targets] = response_logps(model, pack(parts).to(device)).cpu().numpy()
    model.train(was_training)
    if world_size > 1:
        values = add_over_ranks(torch.from_numpy(values).to(device, sum_dtype(device))).double().cpu().numpy()
    values[~_computed(dataset, sides)] = np.nan
    return dataset.with_reference(values)


def _only(example: PreferenceExample, sides: frozenset[str]) -> tuple[PreferenceExample, list[int]]:
    """The example with the responses of these sides, and their places among all its responses."""
    chosen = list(example.chosen_ids) if "chosen" in sides else []
    rejected = list(example.rejected_ids) if "rejected" in sides else []
    first_rejected = len(example.chosen_ids)
    kept = [*range(len(chosen)), *range(first_rejected, first_rejected + len(rejected))]
    return PreferenceExample(example.prompt_ids, chosen, rejected, example.row_id), kept


def _computed(dataset: ExampleDataset, sides: frozenset[str]) -> np.ndarray:
    """Which responses of the dataset belong to these sides, (responses,) bool."""
    return np.isin(dataset.roles, [int(_ROLE_OF[side]) for side in sides])
