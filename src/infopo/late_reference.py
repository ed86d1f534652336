"""The reference of data that come after training began, where its values were computed before and its model is gone."""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from infopo import hashing, models, ranks
from infopo.data.examples import ExampleDataset
from infopo.data.packing import pack
from infopo.errors import ConfigError, InfoPOError
from infopo.logps.rounding import moved_by_rounding
from infopo.reference import tolerance

Context = Callable[[], AbstractContextManager[object]]

PROBED = 4
"""Examples whose stored values must be those of the policy without its adapter, before it is taken as the reference."""


@dataclass
class LateReference:
    """What the stored values came from.

    Attributes:
        hash: Of the reference's weights.
        lent: The model that the caller passed as `ref_model`, as long as the caller keeps it.
        load: Loads the reference anew, if it was given by name.
        is_policy: Whether the reference is the policy as it was at the start.
        args: Settings of the run if its models are sharded, else None. Their weights cannot be hashed, so that whether
            they have changed shows in their values, and ranks decide together: the last reference to a model may be
            gone on one of them earlier than on another.
    """

    hash: str
    lent: "weakref.ref[nn.Module] | None"
    load: Callable[[], nn.Module] | None
    is_policy: bool
    args: TrainingArguments | None = None

    def find(
        self,
        policy: nn.Module,
        stored: object,
        values: Callable[[ExampleDataset, nn.Module, Context], ExampleDataset],
        *,
        has_trained: bool,
        is_exact: bool,
    ) -> tuple[nn.Module, Context]:
        """The reference and what to enter around its forward pass, tried in the order of what it costs.

        Args:
            policy: As it is now, without what distributes it.
            stored: The training data with their stored values.
            values: Computes the values of a dataset, as those of the training data were.
            has_trained: Whether the policy may have changed.
            is_exact: Whether values are computed in float32 throughout.

        Raises:
            ConfigError: It cannot be had; names every way out.
        """
        if self.is_policy and not has_trained:
            return policy, nullcontext
        lent = self.lent() if self.lent is not None else None
        if self.args is not None and not all(ranks.gathered(lent is not None, self.args)):
            lent = None
        if lent is not None and (
            hashing.hash_weights(lent).whole == self.hash
            if self.args is None
            else _agrees(lent, nullcontext, stored, values, is_exact)
        ):
            return lent, nullcontext
        if self.is_policy and models.is_peft_model(policy):
            off: Context = policy.disable_adapter  # type: ignore[assignment]
            if _agrees(policy, off, stored, values, is_exact):
                return policy, off
        if self.load is not None:
            try:
                loaded = self.load()
            except InfoPOError:  # moved or removed since: the message below says what else there is
                loaded = None
            if loaded is not None and hashing.hash_weights(loaded).whole == self.hash:
                return loaded, nullcontext
        raise ConfigError(
            "evaluate(eval_dataset=...): the reference's log-probs were computed before training, and its model is "
            "gone or has changed since. Give this dataset to the constructor as eval_dataset; or keep a reference: "
            "reference='live' (or 'adapter-off' with an adapter), ref_model=MODEL with MODEL kept in a variable, or a "
            "model given by name; or take an objective without a reference"
        )


def _agrees(
    model: nn.Module,
    context: Context,
    stored: object,
    values: Callable[[ExampleDataset, nn.Module, Context], ExampleDataset],
    is_exact: bool,
) -> bool:
    """Whether stored values of training data are those of a model, e.g. the policy without its adapter."""
    if not isinstance(stored, ExampleDataset) or stored.reference is None:
        return False
    few = ExampleDataset.from_examples(stored[i] for i in range(min(PROBED, len(stored))))

    def run() -> Tensor:
        reference = values(few, model, context).reference
        assert reference is not None
        return torch.as_tensor(reference)

    difference = (run() - torch.as_tensor(few.reference)).abs()
    is_known = ~difference.isnan()  # NaN is not computed
    limits = [tolerance(n, is_exact=is_exact) for n in pack(list(few)).length.tolist()]
    allowed = torch.tensor(limits, dtype=difference.dtype)
    if not (difference <= allowed)[is_known].all():
        allowed = torch.maximum(allowed, moved_by_rounding(model, run))
    return bool(is_known.any() and (difference <= allowed)[is_known].all())


def lend(model: nn.Module | None) -> "weakref.ref[nn.Module] | None":
    """A reference that does not keep the model in memory once its owner is done with it."""
    return None if model is None else weakref.ref(model)
