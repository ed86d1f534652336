"""Samples responses from a policy through transformers' `generate`.

The samples follow the policy's own law. The arguments of `sample` alone decide. The settings that a model ships in its
`generation_config` (`top_k`, `repetition_penalty`, ...) are not used, because they would change the distribution that
preference data are drawn from.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from infopo.data.encode import prompt_ids
from infopo.data.templates import ChatTemplate, check_variables
from infopo.data.tokenization import Tokenization
from infopo.errors import ConfigError, DataError, ModelError, UnsupportedArgumentError
from infopo.logps.wrappers import base_of
from infopo.noise import evaluating
from infopo.records import Text


@dataclass(frozen=True)
class Sample:
    """One sampled response."""

    text: str
    """The response without special tokens."""
    token_ids: tuple[int, ...]
    """The sampled tokens without the end-of-sequence token."""
    finished: bool
    """Whether the policy ended the response itself. False if it was cut off at `max_new_tokens`."""


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    *,
    max_new_tokens: int,
    temperature: float,
    num_return_sequences: int = 1,
    batch_size: int,
    seed: int,
    top_p: float = 1.0,
    tools: list[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[list[Sample]]:
    """Samples `num_return_sequences` responses to each prompt, in the order of the prompts.

    The same arguments give the same samples, because the global random state is neither read nor changed. Samples
    depend on `batch_size` as well as on the seed, because the sequences of a batch share one stream of draws.

    Args:
        model: A causal language model. It is in evaluation mode during the call, and afterwards as it was.
        tokenizer: The model's tokenizer.
        prompts: Plain texts, or conversations that are rendered with the chat template and its generation prompt. Their
            tokens are those of training (`infopo.data.encode.prompt_ids`), in which a text that starts with the BOS
            token gets no second one.
        max_new_tokens: Largest number of tokens of a response, the end-of-sequence token included.
        temperature: Divisor of the logits. 0 means greedy decoding.
        num_return_sequences: Number of responses per prompt. It is 1 for greedy decoding.
        batch_size: Number of sequences per batch, at least those of one prompt. Prompts of similar length share a
            batch.
        seed: Seed of the draws. It has no effect on greedy decoding.
        top_p: Mass of the nucleus that tokens are drawn from, in (0, 1]. 1 is the whole distribution.
        tools: Schemas for the chat template.
        chat_template_kwargs: Further variables of the chat template, as in a recipe.

    Raises:
        ConfigError: an argument is outside its domain.
        UnsupportedArgumentError: several greedy responses a prompt, or a conversation for a tokenizer without
            a chat template.
        DataError: a prompt is empty, the template refuses it, or it leaves no room for `max_new_tokens` in the model's
            context.
        ModelError: neither the model nor the tokenizer names an end-of-sequence token.
    """
    _check_arguments(max_new_tokens, temperature, num_return_sequences, batch_size, top_p)
    ends = end_token_ids(model, tokenizer)
    settings = _generation_config(max_new_tokens, temperature, top_p)
    settings.update(
        eos_token_id=ends, pad_token_id=pad_id(tokenizer), num_return_sequences=num_return_sequences
    )
    if problems := check_variables(chat_template_kwargs or {}, "chat_template_kwargs"):
        raise ConfigError(problems)
    encoded = _encode_prompts(tokenizer, prompts, tools, chat_template_kwargs)
    _check_lengths(encoded, max_new_tokens, getattr(model.config, "max_position_embeddings", None))

    samples: list[list[Sample]] = [[] for _ in prompts]
    for index, ids in _draws(model, encoded, settings, max(1, batch_size // num_return_sequences), seed):
        samples[index].append(_to_sample(tokenizer, ids, ends))
    return samples


def sample_ids(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> list[tuple[list[int], bool]]:
    """Samples one response to each prompt of token ids from the policy's own law (temperature 1).

    Args:
        model: A causal language model, with or without adapters.
            It is in evaluation mode during the call, and afterwards as it was.
        tokenizer: The model's tokenizer.
        prompt_ids: Token ids of each prompt.
        max_new_tokens: Largest number of tokens of a response. It is lower where the model's context ends.
        batch_size: Number of sequences per batch.
        seed: Seed of the draws.

    Returns:
        For each prompt the token ids of the response, with the token that ends it, and whether the policy ended it.

    Raises:
        ModelError: Neither the model nor the tokenizer names an end-of-sequence token.
    """
    ends = end_token_ids(model, tokenizer)
    context = getattr(model.config, "max_position_embeddings", None)
    room = max_new_tokens if context is None else min(max_new_tokens, context - max(map(len, prompt_ids)))
    settings = _generation_config(max(1, room), temperature=1.0, top_p=1.0)
    settings.update(eos_token_id=ends, pad_token_id=pad_id(tokenizer), num_return_sequences=1)
    found: list[tuple[list[int], bool]] = [([], False)] * len(prompt_ids)
    for index, ids in _draws(model, [list(ids) for ids in prompt_ids], settings, batch_size, seed):
        end = next((place for place, token in enumerate(ids) if token in ends), None)
        found[index] = (ids if end is None else ids[: end + 1], end is not None)
    return found


def _draws(
    model: Any, encoded: list[list[int]], settings: GenerationConfig, per_batch: int, seed: int
) -> Iterator[tuple[int, list[int]]]:
    """Yields index of the prompt and new token ids of each sequence. Prompts of similar length share a batch."""
    longest_first = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]))
    # Not inference_mode: buffers that rotary embeddings make anew within it could not be used in a backward pass.
    with (
        evaluating(model),
        without_shipped_settings(model),
        _private_random_state(seed, model.device),
        torch.no_grad(),
    ):
        for start in range(0, len(longest_first), per_batch):
            indices = longest_first[start : start + per_batch]
            responses = _generate_batch(model, [encoded[index] for index in indices], settings)
            for row, ids in enumerate(responses):
                yield indices[row // settings.num_return_sequences], ids


def _generate_batch(model: Any, prompt_ids: list[list[int]], settings: GenerationConfig) -> list[list[int]]:
    """Returns the new token ids of each sequence, including those after its end."""
    input_ids, attention_mask = left_pad(prompt_ids, int(settings.pad_token_id))
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=settings,
    )
    responses: list[list[int]] = output[:, input_ids.shape[1] :].tolist()
    return responses


def left_pad(rows: list[list[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns input ids and attention mask, (rows, longest row), padded on the left so that prompts end together."""
    length = max(map(len, rows))
    input_ids = torch.tensor([[pad_token_id] * (length - len(row)) + row for row in rows])
    attention_mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return input_ids, attention_mask


def _to_sample(tokenizer: PreTrainedTokenizerBase, ids: list[int], ends: list[int]) -> Sample:
    end = next((position for position, token in enumerate(ids) if token in ends), None)
    kept = ids[:end]
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Sample(text=text, token_ids=tuple(kept), finished=end is not None)


def _encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    tools: list[Any] | None,
    variables: Mapping[str, Any] | None,
) -> list[list[int]]:
    tokens, template, encoded = Tokenization(tokenizer), ChatTemplate(tokenizer, variables), list[list[int]]()
    for index, prompt in enumerate(prompts):
        name = f"prompts[{index}]"
        if not isinstance(prompt, str) and not tokenizer.chat_template:
            raise UnsupportedArgumentError(
                f"{name}: a conversation needs a tokenizer with a chat template; "
                "set tokenizer.chat_template or pass plain text"
            )
        encoded.append(prompt_ids(tokens, template, prompt, name, tools=tools))
        if not encoded[-1]:
            raise DataError("the prompt has no tokens; expected at least one", name, "empty prompt")
    return encoded


def end_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns every token that ends a response: the tokenizer's, and those that the model's configuration adds."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids = {*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id} - {None}
    if not ids:
        raise ModelError(
            "neither the tokenizer nor the model's generation_config names an end-of-sequence token"
        )
    return sorted(ids)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns a token that fills rows up."""
    # Padding is masked before a prompt and cut off after a response, so any token can be used.
    return 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def _generation_config(max_new_tokens: int, temperature: float, top_p: float) -> GenerationConfig:
    """Returns the settings of a call."""
    # Without this, top_k would be 50.
    law = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    return GenerationConfig(**law, do_sample=temperature > 0, max_new_tokens=max_new_tokens, use_cache=True)


@contextmanager
def without_shipped_settings(model: nn.Module) -> Iterator[None]:
    """Removes the settings that the model ships within the block, because `generate` would use them as defaults.

    That of a model with adapters hands its own settings to the model beneath.
    """
    holders: list[Any] = list({id(each): each for each in (model, base_of(model))}.values())
    shipped = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for holder, settings in zip(holders, shipped, strict=True):
            holder.generation_config = settings


def _check_arguments(
    max_new_tokens: int, temperature: float, num_return_sequences: int, batch_size: int, top_p: float
) -> None:
    counts = {
        "max_new_tokens": max_new_tokens,
        "num_return_sequences": num_return_sequences,
        "batch_size": batch_size,
    }
    problems = [f"{name}: expected at least 1, got {count}" for name, count in counts.items() if count < 1]
    # The comparison is written so that NaN fails, too.
    if not 0 <= temperature < float("inf"):
        problems.append(f"temperature: expected a finite number of at least 0, got {temperature}")
    if not 0 < top_p <= 1:
        problems.append(f"top_p: expected a number in (0, 1], got {top_p}")
    if problems:
        raise ConfigError(problems)
    if temperature == 0 and num_return_sequences > 1:
        raise UnsupportedArgumentError(
            f"num_return_sequences: greedy decoding has one response a prompt, got {num_return_sequences}; "
            "set a temperature above 0"
        )


def _check_lengths(prompt_ids: list[list[int]], max_new_tokens: int, context: int | None) -> None:
    for index, ids in enumerate(prompt_ids):
        if context is not None and len(ids) + max_new_tokens > context:
            raise DataError(
                f"{len(ids)} prompt tokens and {max_new_tokens} new tokens do not fit the model's context of "
                f"{context}; shorten the prompt or lower max_new_tokens",
                row_id=f"prompts[{index}]",
                reason="prompt too long",
            )


@contextmanager
def _private_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds the random state within the block, and restores the caller's afterwards, on the CPU and on `device`."""
    accelerators = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=accelerators, device_type=device.type if accelerators else "cuda"):
        torch.manual_seed(seed)
        yield
