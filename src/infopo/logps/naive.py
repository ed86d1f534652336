"""One padded row a response, full logits: slow, short, and the definition of correct.

Every faster path must agree with this one in values and gradients.
"""

from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from infopo.records import PackedBatch


def token_logps(model: nn.Module, batch: PackedBatch) -> Float[Tensor, " response_tokens"]:
    """log π(y_t | x, y_<t) of every token of every response (nats), response after response.

    A response's first token is scored from the last position before it. Logits are taken to float32 at least
    before they are normalised. A batch without responses runs one token through the model, so that ranks which
    have run short of rows still take part in the collectives of the forward and backward pass.
    """
    inputs, is_scored = padded_rows(batch)
    input_ids, device = inputs["input_ids"], batch.input_ids.device
    logits = model(**inputs, use_cache=False).logits
    logits = logits[:, -input_ids.shape[1] :]  # prompt tuning puts virtual tokens before the row
    row, position = torch.nonzero(is_scored, as_tuple=True)  # on the host: no wait for the device
    logits = logits[row.to(device), position.to(device) - 1]
    return logps_from(logits, input_ids[row.to(device), position.to(device)])


def logps_from(
    logits: Float[Tensor, "scored vocabulary"], targets: Int[Tensor, " scored"]
) -> Float[Tensor, " scored"]:
    """log softmax(logits) at the targets (nats), in float32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(dim=1)


def padded_rows(
    batch: PackedBatch,
) -> tuple[dict[str, Int[Tensor, "rows width"]], Bool[Tensor, "rows width"]]:
    """Input ids and attention mask of one row a response, and (on the host) which positions are scored."""
    paths = [batch.path(response) for response in range(batch.num_responses)]
    spans = [[(batch.segment_start[s], batch.segment_start[s + 1]) for s in path] for path in paths]
    width = max((sum(end - begin for begin, end in row) for row in spans), default=1)
    rows = torch.full((max(len(paths), 1), width), -1, dtype=torch.int64)
    is_scored = torch.zeros_like(rows, dtype=torch.bool)
    for response, (path, row) in enumerate(zip(paths, spans, strict=True)):
        ends = list(accumulate(end - begin for begin, end in row))
        for segment, (begin, end), stop in zip(path, row, ends, strict=True):
            rows[response, stop - (end - begin) : stop] = torch.arange(begin, end)
            is_scored[response, stop - (end - begin) : stop] = batch.segment_scored[segment]
    is_token = rows >= 0
    if batch.num_responses == 0:
        is_token[:] = True  # a row that attends to nothing would give NaN
    device = batch.input_ids.device
    tokens = torch.cat([batch.input_ids, batch.input_ids.new_zeros(1)])  # -1, padding, finds the last entry
    inputs = {"input_ids": tokens[rows.to(device)], "attention_mask": is_token.long().to(device)}
    return inputs, is_scored
