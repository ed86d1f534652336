"""Draws responses from a model, where each sample has a seed of its own.

A token is drawn by inverting the distribution function: of the uniform number u of this sample and step, the first
token at which the cumulative probability exceeds u is taken. The numbers of a sample follow from its seed alone, so
that batch size, order, shards and a restart change nothing about it. What remains is rounding: the logits of another
batch differ in their last bits, and a token whose u lies within that of a boundary can change.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
)

from infopo.errors import ConfigError, ModelError
from infopo.evaluation.law import Law
from infopo.generate import left_pad, pad_id, without_shipped_settings
from infopo.noise import evaluating
from infopo.output import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Request:
    """One sample to draw.

    Attributes:
        prompt_ids: Token ids of the prompt.
        seed: Seed of the sample. It has no effect on greedy decoding.
    """

    prompt_ids: Sequence[int]
    seed: int


@dataclass(frozen=True)
class Drawn:
    """One response.

    Attributes:
        text: The response without special tokens, up to a stop text.
        tokens: Number of tokens drawn, with the one that ends the response. None if a server does not say.
        finished: Whether the policy ended it itself, by a token or a stop text.
        logp: Σ log π(token) over the tokens drawn, at temperature 1 and without a nucleus (nats). None if a server drew
            them.
        token_ids: The tokens drawn, with the one that ends the response. () if a server drew them.
    """

    text: str
    tokens: int | None
    finished: bool
    logp: float | None
    token_ids: tuple[int, ...] = ()


def draw(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    law: Law,
    *,
    ends: Sequence[int],
    batch_size: int,
) -> Iterator[tuple[int, Drawn]]:
    """Yields the index of a request and its response, in the order in which they are drawn: longest prompts first.

    The settings that the model ships are not used, and the global random state is neither read nor changed. If a
    batch does not fit into the accelerator's memory, it and all later ones are halved.

    Args:
        model: A causal language model, with or without adapters.
            It is in evaluation mode while a batch is drawn, and afterwards as it was.
        tokenizer: Its tokenizer.
        requests: What to draw.
        law: The distribution.
        ends: Tokens that end a response.
        batch_size: Number of sequences that are drawn together.

    Raises:
        ConfigError: `batch_size` is below 1.
        ModelError: A single prompt does not fit into the accelerator's memory.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size: expected at least 1, got {batch_size}")
    lengths = [len(request.prompt_ids) for request in requests]
    waiting = [index for batch in batches_of(lengths, batch_size) for index in batch]
    while waiting:
        batch = waiting[:batch_size]
        try:
            found = _draw_batch(model, tokenizer, [requests[index] for index in batch], law, ends)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise _too_large(requests[batch[0]], law) from error
            batch_size = len(batch) // 2
            torch.cuda.empty_cache()
            logger.warning("out of memory: batch_size is halved to %d", batch_size)
            continue
        yield from zip(batch, found, strict=True)
        waiting = waiting[len(batch) :]


def draw_one(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
    law: Law,
    *,
    ends: Sequence[int],
    streamer: Any = None,
) -> Drawn:
    """Returns one response, and hands its tokens to a streamer of transformers while they are drawn.

    Raises:
        ModelError: The prompt does not fit into the accelerator's memory.
    """
    try:
        return _draw_batch(model, tokenizer, [request], law, ends, streamer)[0]
    except torch.OutOfMemoryError as error:
        raise _too_large(request, law) from error


def _too_large(request: Request, law: Law) -> ModelError:
    return ModelError(
        f"a prompt of {len(request.prompt_ids)} tokens with {law.max_new_tokens} new ones does not fit into the "
        "accelerator's memory; lower max_new_tokens, or load the model in bfloat16"
    )


def batches_of(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Returns the places of the prompts that are drawn together: the longest first.

    Leaving out whole batches changes no other one.

    Example:
        >>> batches_of([3, 9, 3, 5, 5], 2)
        [[1, 3], [4, 0], [2]]
    """
    places = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    return [places[begin : begin + batch_size] for begin in range(0, len(places), batch_size)]


def _draw_batch(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    law: Law,
    ends: Sequence[int],
    streamer: Any = None,
) -> list[Drawn]:
    input_ids, mask = left_pad([list(request.prompt_ids) for request in requests], pad_id(tokenizer))
    chooser = _Chooser([request.seed for request in requests], law)
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=law.max_new_tokens,
        eos_token_id=list(ends),
        pad_token_id=pad_id(tokenizer),
        stop_strings=list(law.stop) or None,
    )
    # Not inference_mode: buffers that rotary embeddings make anew within it could not be used in a backward pass.
    with evaluating(model), without_shipped_settings(model), torch.no_grad():
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([chooser]),
            tokenizer=tokenizer if law.stop else None,
            streamer=streamer,
        )
    rows = output[:, input_ids.shape[1] :].tolist()
    logps = torch.stack(chooser.logps, dim=1).double().cpu()
    return [_drawn(tokenizer, ids, values, law, ends) for ids, values in zip(rows, logps, strict=True)]


def _drawn(
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    logps: torch.Tensor,
    law: Law,
    ends: Sequence[int],
) -> Drawn:
    """Returns the response in a row, which goes on with padding after its end."""
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    length = len(ids) if end is None else end + 1
    finished = end is not None

    def decode(count: int) -> str:
        return tokenizer.decode(ids[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    text = decode(length if end is None else end)
    cut = first_of(text, law.stop)
    if cut is not None:
        # Tokens after the stop text are padding, or were drawn while a library looked for it in other rows.
        length = _shortest(length, lambda count: first_of(decode(count), law.stop) is not None)
        text, finished = text[:cut], True
    return Drawn(text, length, finished, float(logps[:length].sum()), tuple(ids[:length]))


def _shortest(most: int, holds: Callable[[int], bool]) -> int:
    """Returns the smallest count for which a condition holds that, once it holds, goes on to hold."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def first_of(text: str, stops: Sequence[str]) -> int | None:
    """Returns where the first of these texts begins in `text`, or None.

    Example:
        >>> first_of("18. Question: what", ["Question:", "Answer:"])
        4
    """
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    return min(found) if found else None


class _Chooser(LogitsProcessor):
    """Chooses each row's next token by its own random numbers, and leaves `generate` no other.

    Args:
        seeds: Seed of each row.
        law: The distribution.
    """

    def __init__(self, seeds: Sequence[int], law: Law) -> None:
        self.law = law
        self.logps: list[torch.Tensor] = []
        """Log-probs of the tokens of each step, (rows,)."""
        self._uniform: torch.Tensor | None = None
        if law.temperature > 0:
            draws = [np.random.Generator(np.random.Philox(seed)).random(law.max_new_tokens) for seed in seeds]
            self._uniform = torch.from_numpy(np.stack(draws))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Returns logits that allow one token a row, (rows, vocabulary)."""
        logps = torch.log_softmax(scores.float(), dim=-1)
        chosen = logps.argmax(-1, keepdim=True) if self._uniform is None else self._sampled(logps)
        self.logps.append(logps.gather(-1, chosen).squeeze(-1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen, 0.0)

    def _sampled(self, logps: torch.Tensor) -> torch.Tensor:
        """Returns a token per row, (rows, 1)."""
        assert self._uniform is not None
        wide = torch.float32 if logps.device.type == "mps" else torch.float64
        masses, tokens = torch.softmax(logps.to(wide) / self.law.temperature, dim=-1), None
        if self.law.top_p < 1:
            masses, tokens = masses.sort(descending=True, stable=True)
            # A token is in the nucleus if those before it have less than its mass.
            masses = masses.where(masses.cumsum(-1) - masses < self.law.top_p, 0.0)
        below = masses.cumsum(-1)
        uniform = self._uniform[:, len(self.logps)].to(device=logps.device, dtype=wide)
        target = (uniform[:, None] * below[:, -1:]).contiguous()
        places = torch.searchsorted(below, target, right=True)
        # u below 1 lies before the total mass but for rounding, where the last token with mass is meant.
        last = (
            (masses > 0)
            .long()
            .mul(torch.arange(masses.shape[-1], device=masses.device))
            .amax(-1, keepdim=True)
        )
        places = torch.minimum(places, last)
        return places if tokens is None else tokens.gather(-1, places)
