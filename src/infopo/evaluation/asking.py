"""Asks a model the items of tasks through the sample store, so that nothing is drawn twice."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from infopo.errors import DataError
from infopo.evaluation.drawing import Law, Request, draw
from infopo.evaluation.items import Item
from infopo.evaluation.prompting import Prompts
from infopo.evaluation.samples import Sample, SampleStore, key_of, prompt_hash, seed_of
from infopo.generate import end_token_ids
from infopo.hashing import config_hash, hash_weights
from infopo.records import Text

_T = TypeVar("_T")


@dataclass(frozen=True)
class Subject:
    """A model that is asked.

    Attributes:
        name: Its name, as the user gave it.
        model: The model.
        tokenizer: Its tokenizer.
        weights: Hash of its values and of the settings that decide what they compute.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weights: str

    @classmethod
    def of(cls, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> "Subject":
        """Returns the subject, whose weights are hashed as they lie in memory."""
        return cls(name, model, tokenizer, f"{hash_weights(model).whole[:32]}{config_hash(model)[:16]}")


@dataclass(frozen=True)
class Wanted:
    """One sample that an evaluation needs.

    Attributes:
        item: The item.
        sample: Number of the sample.
        key: What the store finds it by.
        seed: Its seed.
        prompt: What is asked, before it is rendered.
        prompt_ids: Token ids of the prompt.
    """

    item: Item
    sample: int
    key: str
    seed: int
    prompt: Text
    prompt_ids: Sequence[int]


def wanted(
    subject: Subject, prompts: Prompts, items: Sequence[Item], law: Law, *, num_samples: int, seed: int
) -> list[Wanted]:
    """Returns every sample that is needed, in the order of the items.

    Raises:
        DataError: A prompt is empty, is refused by the template, or leaves no room for a response in the model's
            context.
    """
    found = []
    context = getattr(subject.model.config.get_text_config(), "max_position_embeddings", None)
    for item in items:
        ids = prompts.ids(item)
        if context is not None and 0 < context < len(ids) + law.max_new_tokens:
            raise DataError(
                f"{len(ids)} prompt tokens and {law.max_new_tokens} new tokens do not fit the model's context of "
                f"{context}; lower --max-new-tokens or --num-fewshot",
                item.id,
                "prompt too long",
            )
        digest = prompt_hash(ids)
        about = {**law.record, "ends": _ends(subject, prompts)}
        for sample in range(num_samples):
            key = key_of(subject.weights, digest, about, seed, sample)
            found.append(Wanted(item, sample, key, seed_of(seed, digest, sample), prompts.text(item), ids))
    return found


def ask(
    subject: Subject,
    prompts: Prompts,
    task: str,
    needed: Sequence[Wanted],
    law: Law,
    store: SampleStore,
    *,
    batch_size: int,
    on_progress: Callable[[int], None] = lambda count: None,
) -> int:
    """Draws what the store lacks, and stores it batch by batch. Returns the number of samples drawn.

    Args:
        subject: The model.
        prompts: How it is asked.
        task: Name of the task, for the record.
        needed: What is needed (`wanted`).
        law: The distribution.
        store: Where samples are kept.
        batch_size: Number of sequences that are drawn together.
        on_progress: Called with the number of samples that have been drawn since the last call.

    Raises:
        RunDirectoryError: The store cannot be written to. What was drawn before is kept.
    """
    # Two items may ask the same, and a greedy answer has one sample only.
    missing = list({each.key: each for each in needed if each.key not in store}.values())
    requests = [Request(each.prompt_ids, each.seed) for each in missing]
    drawn = draw(
        subject.model, subject.tokenizer, requests, law, ends=_ends(subject, prompts), batch_size=batch_size
    )
    for batch in _batched(drawn, batch_size):
        store.add(
            [
                Sample(
                    key=missing[index].key,
                    task=task,
                    item=missing[index].item.id,
                    sample=missing[index].sample,
                    seed=missing[index].seed,
                    weights=subject.weights,
                    law=law.record,
                    prompt=missing[index].prompt,
                    text=response.text,
                    token_ids=response.token_ids,
                    tokens=response.tokens,
                    finished=response.finished,
                    logp=response.logp,
                )
                for index, response in batch
            ]
        )
        on_progress(len(batch))
    return len(missing)


def answers(needed: Sequence[Wanted], store: SampleStore) -> Iterator[tuple[Item, Sample]]:
    """Yields each needed sample from the store, under the item and number that it was needed for."""
    for each in needed:
        yield each.item, replace(store[each.key], item=each.item.id, sample=each.sample)


def _ends(subject: Subject, prompts: Prompts) -> list[int]:
    return sorted({*end_token_ids(subject.model, subject.tokenizer), *prompts.end_ids})


def _batched(values: Iterator[_T], size: int) -> Iterator[list[_T]]:
    batch: list[_T] = []
    for value in values:
        batch.append(value)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
