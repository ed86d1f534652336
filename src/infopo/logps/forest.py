"""The fast path: each token is computed once, because responses share their prompt and there is no padding.

Only positions before scored tokens go through the head. The model must be one that `attention.enable` has switched to
forest attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from infopo.logps import lm_head, naive, router
from infopo.logps.layout import ForestLayout, KeyIndex
from infopo.logps.registration import layout_given
from infopo.records import PackedBatch, to_device


@dataclass(frozen=True)
class Plan:
    """What the path knows of a batch before the model runs. `PreferenceCollator` makes it on the host.

    Attributes:
        layout: Which tokens attend to which.
        tensors: The position that predicts each scored token, its own position, for each token of each response,
            response after response, its place among the scored ones (empty if that is the same), how many responses
            hold each token, and then those of the layout's `KeyIndex`.

    Example:
        >>> from infopo.data.packing import pack
        >>> from infopo.records import PreferenceExample
        >>> plan = Plan.of(pack([PreferenceExample([5, 6], [[7, 8]], [[9]], "pairs.jsonl:1")]))
        >>> plan.tensors[0].tolist(), plan.tensors[1].tolist()
        ([1, 2, 1], [2, 3, 4])
    """

    layout: ForestLayout
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, batch: PackedBatch) -> "Plan":
        """Makes the plan of a batch, with its tensors on the host."""
        layout = ForestLayout(batch.segment_start, batch.segment_parent)
        before, target, first_target = _scored(batch)
        start, order = batch.segment_start, list[int]()
        # Where each scored segment is one whole response, they are in order already.
        if list(first_target) != batch.leaf:
            for response in range(batch.num_responses):
                for s in batch.path(response):
                    if batch.segment_scored[s]:
                        order += range(first_target[s], first_target[s] + start[s + 1] - start[s])
        scored = tuple(torch.tensor(each, dtype=torch.int64) for each in (before, target, order))
        return cls(layout, (*scored, router.multiplicity(batch), *layout.key_index().tensors))

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Plan":
        self.layout.place(KeyIndex.of_tensors(tensors[4:]))
        return Plan(self.layout, tuple(tensors))


def token_logps(model: nn.Module, batch: PackedBatch) -> Float[Tensor, "response_tokens *agreement"]:
    """Returns log π(y_t | x, y_<t) of every token of every response (nats), response after response.

    A token that several responses share is computed once, and appears once for each of them. The first token of each
    segment is scored from the last position of its parent.

    Args:
        model: A model that is switched to forest attention.
        batch: The packed segments, on the model's device.
    """
    if batch.num_responses == 0:
        return naive.token_logps(model, batch)
    device = batch.input_ids.device
    plan = batch.plan if isinstance(batch.plan, Plan) else Plan.of(batch)
    if plan.tensors[0].device != device:
        plan = plan.with_tensors(to_device(plan.tensors, device))
    positions, places, order, times = plan.tensors[:4]
    targets = batch.input_ids[places]
    mask = _mask(times)
    inputs = {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.position_ids[None],
        "attention_mask": mask,
        "use_cache": False,
        "forest": plan.layout,
    }
    with layout_given():
        if lm_head.plain_head(model) is not None:
            scored = lm_head.logps_of(model, positions, targets, **inputs)
        else:
            # A head with an adapter, or a quantised one, runs as it is, so that its logits exist all at once.
            output = model(**inputs, **router.keywords(model), logits_to_keep=positions)
            router.note(output, mask)
            scored = naive.logps_from(output.logits[0], targets)
    return scored[order] if len(order) else scored


def _mask(times: Int[Tensor, " tokens"]) -> Tensor:
    """Returns a mask that attention ignores. If routers are balanced, it says how often each token counts.

    Models take a mask of four dimensions as finished, and forest attention ignores it. Without a mask, a model would
    look for packed rows in the position ids, which synchronises with the GPU.
    """
    if router.is_wanted():
        return times[None]
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=times.device)


def _scored(batch: PackedBatch) -> tuple[list[int], list[int], dict[int, int]]:
    """Returns which position scores which token.

    Returns:
        Two lists with one entry per scored token, its predecessor's position on the path and its own position, and the
        index in these lists at which each scored segment begins.
    """
    before, target, first_target = list[int](), list[int](), dict[int, int]()
    for segment, parent in enumerate(batch.segment_parent):
        if batch.segment_scored[segment]:
            begin, end = batch.segment_start[segment], batch.segment_start[segment + 1]
            first_target[segment] = len(target)
            before += [batch.segment_start[parent + 1] - 1, *range(begin, end - 1)]
            target += range(begin, end)
    return before, target, first_target
