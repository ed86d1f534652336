"""Each token once: prompts shared, no padding, and only positions before scored tokens go through the head.

Needs a model that `attention.enable` has switched to forest attention.
"""

from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor, nn

from infopo.logps import lm_head, naive
from infopo.logps.layout import ForestLayout
from infopo.logps.registration import layout_given
from infopo.records import PackedBatch


def token_logps(model: nn.Module, batch: PackedBatch) -> Float[Tensor, " response_tokens"]:
    """log π(y_t | x, y_<t) of every token of every response (nats), response after response.

    A token that several responses share is scored once. The first token of each segment is scored from the last
    position of its parent.
    """
    if batch.num_responses == 0:
        return naive.token_logps(model, batch)
    before, target, first_of = _scored(batch)
    device = batch.input_ids.device
    positions = torch.tensor(before, device=device)
    targets = batch.input_ids[torch.tensor(target, device=device)]
    inputs = {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.position_ids[None],
        # Taken for a finished mask, and ignored; without one, a model looks at position ids and waits for the device.
        "attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device),
        "use_cache": False,
        "forest": ForestLayout(batch.segment_start, batch.segment_parent),
    }
    with layout_given():
        if lm_head.plain_head(model) is not None:
            scored = lm_head.logps_of(model, positions, targets, **inputs)
        else:  # a head with an adapter, or quantised: its logits are held whole
            logits = model(**inputs, logits_to_keep=positions).logits[0]
            scored = naive.logps_from(logits, targets)
    if list(first_of) == batch.leaf:
        return scored  # each scored segment is a response, in their order: nothing to put in place
    start = batch.segment_start
    places = chain.from_iterable(
        range(first_of[s], first_of[s] + start[s + 1] - start[s])
        for response in range(batch.num_responses)
        for s in batch.path(response)
        if batch.segment_scored[s]
    )
    return scored[torch.tensor(list(places), device=device)]


def _scored(batch: PackedBatch) -> tuple[list[int], list[int], dict[int, int]]:
    """Of each scored token, the position before it on its path and its own; and where each segment's begin."""
    before, target, first_of = list[int](), list[int](), dict[int, int]()
    for segment, parent in enumerate(batch.segment_parent):
        if batch.segment_scored[segment]:
            begin, end = batch.segment_start[segment], batch.segment_start[segment + 1]
            first_of[segment] = len(target)
            before += [batch.segment_start[parent + 1] - 1, *range(begin, end - 1)]
            target += range(begin, end)
    return before, target, first_of
