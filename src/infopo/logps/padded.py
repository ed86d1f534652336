"""The path for models that cannot share prompts: rows are those of `naive`, the head is the chunked one.

Only positions before scored tokens go through the head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from infopo.logps import lm_head, naive
from infopo.records import PackedBatch, to_device


@dataclass(frozen=True)
class Plan:
    """What the path knows of a batch before the model runs. `PreferenceCollator` makes it on the host.

    Attributes:
        tensors: For each position of the padded rows the place of its token in the batch (-1 for padding), the
            attention mask, and the position of each scored token in the flattened rows.

    Example:
        >>> from infopo.data.packing import pack
        >>> from infopo.records import PreferenceExample
        >>> plan = Plan.of(pack([PreferenceExample([5, 6], [[7, 8]], [[9]], "pairs.jsonl:1")]))
        >>> plan.tensors[0].tolist(), plan.tensors[2].tolist()
        ([[0, 1, 2, 3], [0, 1, 4, -1]], [2, 3, 6])
    """

    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, batch: PackedBatch) -> "Plan":
        """Makes the plan of a batch, with its tensors on the host."""
        places, mask, row, position = naive.padded_places(batch)
        return cls((places, mask, row * places.shape[1] + position))

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Plan":
        return Plan(tuple(tensors))


def token_logps(model: nn.Module, batch: PackedBatch) -> Float[Tensor, "response_tokens *agreement"]:
    """Returns log π(y_t | x, y_<t) of every token of every response (nats), response after response.

    Args:
        model: A causal language model with a plain head (see `lm_head.plain_head`).
        batch: The packed segments, on the model's device.
    """
    if batch.num_responses == 0:
        return naive.token_logps(model, batch)
    device = batch.input_ids.device
    plan = batch.plan if isinstance(batch.plan, Plan) else Plan.of(batch)
    tensors = plan.tensors if plan.tensors[0].device == device else to_device(plan.tensors, device)
    places, mask, scored = tensors
    inputs = naive.padded_rows(batch, places, mask)
    targets = inputs["input_ids"].flatten()[scored]
    return lm_head.logps_of(model, scored - 1, targets, **inputs, use_cache=False)
