"""Who is asked: a model in this process, or one behind a server. Both draw the samples that the store lacks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from infopo.errors import DataError, ServerError
from infopo.evaluation import server
from infopo.evaluation.drawing import Drawn, Request, batches_of, draw
from infopo.evaluation.items import Item
from infopo.evaluation.law import Law
from infopo.evaluation.prompting import Prompts
from infopo.generate import end_token_ids
from infopo.hashing import config_hash, hash_weights
from infopo.records import Text


@runtime_checkable
class Subject(Protocol):
    """A model that is asked."""

    @property
    def name(self) -> str:
        """Its name, as the user gave it."""
        ...

    @property
    def weights(self) -> str:
        """What its samples are found by in the store."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Its tokenizer, or None if a server renders the prompts."""
        ...

    @property
    def record(self) -> Mapping[str, Any]:
        """What `eval.json` says of it."""
        ...

    def rendered(self, prompts: Prompts, item: Item, law: Law) -> Sequence[int] | Text:
        """Returns a prompt as this model gets it, token ids or messages."""
        ...

    def law(self, prompts: Prompts, law: Law) -> Mapping[str, Any]:
        """Returns all settings that samples depend on besides the weights and the prompt."""
        ...

    def batches(self, rendered: Sequence[Any]) -> list[list[int]]:
        """Returns the places of the prompts that are drawn together, batch by batch."""
        ...

    def draw(
        self, rendered: Sequence[Sequence[int] | Text], seeds: Sequence[int], prompts: Prompts, law: Law
    ) -> Iterator[tuple[int, Drawn]]:
        """Yields index and response of each prompt, as they are drawn."""
        ...


@dataclass(frozen=True)
class LoadedModel:
    """A model in this process.

    Attributes:
        name: See `Subject`.
        model: A `PreTrainedModel`, or a `PeftModel` with one beneath.
        tokenizer: Its tokenizer.
        batch_size: Number of sequences that are drawn together.
        weights: See `Subject`. By default, the hash of the values as they lie in memory.
    """

    name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    weights: str = ""

    def __post_init__(self) -> None:
        if self.weights:
            return
        weights = f"{hash_weights(self.model).whole[:32]}{config_hash(self.model)[:16]}"
        object.__setattr__(self, "weights", weights)

    @property
    def record(self) -> Mapping[str, Any]:
        return {
            "name": self.name,
            "weights": self.weights,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    def rendered(self, prompts: Prompts, item: Item, law: Law) -> list[int]:
        """Returns the token ids of a prompt.

        Raises:
            DataError: It is empty, is refused by the template, or leaves no room for a response.
        """
        ids = prompts.ids(item)
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and 0 < context < len(ids) + law.max_new_tokens:
            raise DataError(
                f"{len(ids)} prompt tokens and {law.max_new_tokens} new tokens do not fit the model's context of "
                f"{context}; lower --max-new-tokens or --num-fewshot",
                item.id,
                "prompt too long",
            )
        return ids

    def law(self, prompts: Prompts, law: Law) -> Mapping[str, Any]:
        return {**law.record, "ends": self._ends(prompts)}

    def draw(
        self, rendered: Sequence[Any], seeds: Sequence[int], prompts: Prompts, law: Law
    ) -> Iterator[tuple[int, Drawn]]:
        requests = [Request(ids, seed) for ids, seed in zip(rendered, seeds, strict=True)]
        ends = self._ends(prompts)
        yield from draw(self.model, self.tokenizer, requests, law, ends=ends, batch_size=self.batch_size)

    def batches(self, rendered: Sequence[Any]) -> list[list[int]]:
        """Returns the places of the prompts that are drawn together."""
        return batches_of([len(ids) for ids in rendered], self.batch_size)

    def _ends(self, prompts: Prompts) -> list[int]:
        return sorted({*end_token_ids(self.model, self.tokenizer), *prompts.end_ids})


class ServedSubject:
    """A model behind an OpenAI-compatible server, which renders the prompts.

    The server does not say which weights it has. Samples are found by its address and the model's name.

    Args:
        settings: Where it is.

    Raises:
        ServerError: It cannot be reached.
    """

    tokenizer: PreTrainedTokenizerBase | None = None

    def __init__(self, settings: server.ServerSettings) -> None:
        self._served = server.ServedModel(settings)
        self.name = self._served.name
        self.weights = f"{settings.base_url} {self.name}"

    @property
    def record(self) -> Mapping[str, Any]:
        return {"name": self.name, "weights": None, "server": self._served.settings.base_url}

    def rendered(self, prompts: Prompts, item: Item, law: Law) -> Text:
        return prompts.text(item)

    def law(self, prompts: Prompts, law: Law) -> Mapping[str, Any]:
        return law.record

    def batches(self, rendered: Sequence[Any]) -> list[list[int]]:
        """Returns each prompt's place by itself: a server's batches are its own."""
        return [[place] for place in range(len(rendered))]

    def draw(
        self, rendered: Sequence[Any], seeds: Sequence[int], prompts: Prompts, law: Law
    ) -> Iterator[tuple[int, Drawn]]:
        """Yields index and response of each prompt, as they arrive.

        Raises:
            ServerError: The server fails, or refuses a prompt.
        """
        requests = (
            server.Request(
                prompt,
                law.max_new_tokens,
                law.temperature,
                law.top_p if law.top_p < 1 else None,
                # Servers take seeds of 32 bits.
                seed % 2**31 if law.temperature > 0 else None,
                law.stop,
                dispensable=frozenset({"seed"}),
            )
            for prompt, seed in zip(rendered, seeds, strict=True)
        )
        for place, reply in self._served.ask_all(requests):
            if reply.refusal is not None:
                raise ServerError(f"{self._served.settings.url}: refuses prompt {place}: {reply.refusal}")
            yield place, Drawn(reply.text, reply.tokens, reply.finished, None)
