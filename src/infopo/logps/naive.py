"""The slow path: one padded row per response, and the whole logits. It is short, and defines what is correct.

Every faster path must agree with this one in values and gradients.
"""

from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from infopo.logps import agreement, router, spread
from infopo.records import PackedBatch, to_device


def token_logps(model: nn.Module, batch: PackedBatch) -> Float[Tensor, "response_tokens *agreement"]:
    """Returns log π(y_t | x, y_<t) of every token of every response (nats), response after response.

    A response's first token is scored from the last position before it. Logits are converted to float32 at least before
    they are normalised. A batch without responses runs one token through the model, so that a rank which has run short
    of rows still takes part in the collectives of the forward and backward pass.

    Args:
        model: Any causal language model.
        batch: The packed segments, on the model's device.
    """
    places, mask, row, position = to_device(padded_places(batch), batch.input_ids.device)
    inputs = padded_rows(batch, places, mask)
    input_ids = inputs["input_ids"]
    output = model(**inputs, **router.keywords(model), use_cache=False)
    router.note(output, inputs["attention_mask"])
    logits = output.logits
    # Prompt tuning puts virtual tokens before each row, whose logits come first.
    logits = logits[:, -input_ids.shape[1] :]
    return logps_from(logits[row, position - 1], input_ids[row, position])


def logps_from(
    logits: Float[Tensor, "scored vocabulary"], targets: Int[Tensor, " scored"]
) -> Float[Tensor, "scored *agreement"]:
    """Returns log softmax(logits) at the targets (nats), in float32 at least. See `lm_head.token_logps` for agreement.

    Example:
        >>> logps_from(torch.zeros(1, 4), torch.tensor([3]))  # -log 4
        tensor([-1.3863])
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if (measured := spread.wanted()) is not None:
        lse, mean, largest = spread.of_logits(logits.detach())
        measured.add(lse - mean, largest - lse)
    logps = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(dim=1)
    if not agreement.is_wanted():
        return logps
    return agreement.beside(logps, (2 * logits.detach().log_softmax(dim=1)).logsumexp(dim=1))


def padded_places(
    batch: PackedBatch,
) -> tuple[
    Int[Tensor, "rows width"], Int[Tensor, "rows width"], Int[Tensor, " scored"], Int[Tensor, " scored"]
]:
    """Lays each response out as a row of its own, after its prompt and padded on the right.

    Returns:
        On the CPU: for each position of the rows its token's place in the batch, or -1 for padding, the attention mask,
        and row and position of each scored token.
    """
    paths = [batch.path(response) for response in range(batch.num_responses)]
    spans = [[(batch.segment_start[s], batch.segment_start[s + 1]) for s in path] for path in paths]
    width = max((sum(end - begin for begin, end in row) for row in spans), default=1)
    places = torch.full((max(len(paths), 1), width), -1, dtype=torch.int64)
    is_scored = torch.zeros_like(places, dtype=torch.bool)
    for response, (path, row) in enumerate(zip(paths, spans, strict=True)):
        ends = list(accumulate(end - begin for begin, end in row))
        for segment, (begin, end), stop in zip(path, row, ends, strict=True):
            places[response, stop - (end - begin) : stop] = torch.arange(begin, end)
            is_scored[response, stop - (end - begin) : stop] = batch.segment_scored[segment]
    is_token = places >= 0
    if batch.num_responses == 0:
        # A row that attends to nothing would give NaN.
        is_token[:] = True
    scored_row, scored_position = torch.nonzero(is_scored, as_tuple=True)
    return places, is_token.long(), scored_row, scored_position


def padded_rows(
    batch: PackedBatch, places: Int[Tensor, "rows width"], mask: Int[Tensor, "rows width"]
) -> dict[str, Int[Tensor, "rows width"]]:
    """Returns the model's inputs for the rows of `padded_places`, whose tensors are on the batch's device here."""
    # Padding has the place -1, which finds the added last entry.
    tokens = torch.cat([batch.input_ids, batch.input_ids.new_zeros(1)])
    return {"input_ids": tokens[places], "attention_mask": mask}
