"""Asks a model the items of tasks through the sample store, so that nothing is drawn twice."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from infopo.evaluation.drawing import Drawn
from infopo.evaluation.items import Item
from infopo.evaluation.law import Law
from infopo.evaluation.prompting import Prompts
from infopo.evaluation.samples import Sample, SampleStore, key_of, prompt_hash, seed_of
from infopo.evaluation.subjects import Subject
from infopo.texts import Text

PIECE = 32
"""Number of samples that are written at once. A kill loses at most so many."""


@dataclass(frozen=True)
class Wanted:
    """One sample that an evaluation needs.

    Attributes:
        item: The item.
        sample: Number of the sample.
        key: What the store finds it by.
        seed: Its seed.
        prompt: What is asked, before it is rendered.
        rendered: The prompt as the model gets it: token ids, or messages for a server.
        prompt_sha256: Hash of that.
    """

    item: Item
    sample: int
    key: str
    seed: int
    prompt: Text
    rendered: Any
    prompt_sha256: str


def wanted(
    subject: Subject, prompts: Prompts, items: Sequence[Item], law: Law, *, num_samples: int, seed: int
) -> Iterator[Wanted]:
    """Yields every sample that is needed, in the order of the items.

    Raises:
        DataError: A prompt is empty, is refused by the template, or leaves no room for a response in the model's
            context.
    """
    about = subject.law(prompts, law)
    for item in items:
        rendered, text = subject.rendered(prompts, item, law), prompts.text(item)
        digest = prompt_hash(rendered)
        for sample in range(num_samples):
            key = key_of(subject.weights, digest, about, seed, sample)
            yield Wanted(item, sample, key, seed_of(seed, digest, sample), text, rendered, digest)


def ask(
    subject: Subject,
    prompts: Prompts,
    task: str,
    needed: Sequence[Wanted],
    law: Law,
    store: SampleStore,
    *,
    on_progress: Callable[[int], Any] = lambda count: None,
) -> None:
    """Draws what the store lacks, and stores it piece by piece.

    Samples that a model draws together are drawn together again if one of them is missing, because rounding depends on
    what else is in a batch: what a kill has left is completed to the same bits.

    Args:
        subject: The model.
        prompts: How it is asked.
        task: Name of the task, for the record.
        needed: What is needed (`wanted`).
        law: The distribution.
        store: Where samples are kept.
        on_progress: Called with the number of samples that have been drawn since the last call.

    Raises:
        RunDirectoryError: The store cannot be written to. What was drawn before is kept.
        ServerError: A server fails. What it answered before is kept.
    """
    # Two items may ask the same, and a greedy answer has one sample only.
    unique = list({each.key: each for each in needed}.values())
    batches = [
        [unique[place] for place in batch] for batch in subject.batches([each.rendered for each in unique])
    ]
    asked = [each for batch in batches if any(one.key not in store for one in batch) for each in batch]
    drawn = subject.draw([each.rendered for each in asked], [each.seed for each in asked], prompts, law)
    piece: list[Sample] = []
    try:
        for index, response in drawn:
            if asked[index].key in store:
                continue
            piece.append(_sample(subject, task, asked[index], law, response))
            if len(piece) == PIECE:
                store.add(piece)
                piece = []
            on_progress(1)
    finally:
        store.add(piece)


def in_memory(
    subject: Subject, prompts: Prompts, task: str, needed: Sequence[Wanted], law: Law
) -> list[tuple[Item, Sample]]:
    """Returns every needed sample, drawn anew and kept nowhere."""
    found = subject.draw([each.rendered for each in needed], [each.seed for each in needed], prompts, law)
    samples = {index: _sample(subject, task, needed[index], law, response) for index, response in found}
    return [(each.item, samples[index]) for index, each in enumerate(needed)]


def answers(needed: Sequence[Wanted], store: SampleStore) -> Iterator[tuple[Item, Sample]]:
    """Yields each needed sample from the store, under the item and number that it was needed for."""
    for each in needed:
        yield each.item, replace(store[each.key], item=each.item.id, sample=each.sample)


def _sample(subject: Subject, task: str, asked: Wanted, law: Law, response: Drawn) -> Sample:
    return Sample(
        key=asked.key,
        task=task,
        item=asked.item.id,
        sample=asked.sample,
        seed=asked.seed,
        weights=subject.weights,
        law=law.record,
        prompt=asked.prompt,
        text=response.text,
        token_ids=response.token_ids,
        tokens=response.tokens,
        finished=response.finished,
        logp=response.logp,
        prompt_sha256=asked.prompt_sha256,
    )
