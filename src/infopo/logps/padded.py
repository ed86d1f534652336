"""One padded row a response, as in `naive`, but scored positions alone go through the chunked head."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from infopo.logps import lm_head, naive
from infopo.records import PackedBatch


def token_logps(model: nn.Module, batch: PackedBatch) -> Float[Tensor, " response_tokens"]:
    """log π(y_t | x, y_<t) of every token of every response (nats), response after response."""
    if batch.num_responses == 0:
        return naive.token_logps(model, batch)
    inputs, is_scored = naive.padded_rows(batch)
    scored = torch.nonzero(is_scored.flatten())[:, 0].to(batch.input_ids.device)  # found on the host
    targets = inputs["input_ids"].flatten()[scored]
    return lm_head.logps_of(model, scored - 1, targets, **inputs, use_cache=False)
