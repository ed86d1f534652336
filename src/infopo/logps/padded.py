"""The path for models that cannot share prompts: rows are those of `naive`, the head is the chunked one.

Only positions before scored tokens go through the head.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from infopo.logps import lm_head, naive
from infopo.records import PackedBatch


def token_logps(model: nn.Module, batch: PackedBatch) -> Float[Tensor, "response_tokens *agreement"]:
    """Returns log π(y_t | x, y_<t) of every token of every response (nats), response after response.

    Args:
        model: A causal language model with a plain head (see `lm_head.plain_head`).
        batch: The packed segments, on the model's device.
    """
    if batch.num_responses == 0:
        return naive.token_logps(model, batch)
    inputs, is_scored = naive.padded_rows(batch)
    # The mask is on the CPU, because `nonzero` of a tensor on a GPU would synchronise with it.
    scored = torch.nonzero(is_scored.flatten())[:, 0].to(batch.input_ids.device)
    targets = inputs["input_ids"].flatten()[scored]
    return lm_head.logps_of(model, scored - 1, targets, **inputs, use_cache=False)
