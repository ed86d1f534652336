"""What a model is asked: items of a task as token ids, rendered as in training."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from infopo.data.encode import prompt_ids
from infopo.data.endings import Endings
from infopo.data.templates import ChatTemplate
from infopo.data.tokenization import Tokenization
from infopo.errors import ConfigError, DataError
from infopo.evaluation.items import Item, Task
from infopo.records import Message, Text

STYLES = ("chat", "plain")
"""`chat` renders a conversation with the chat template. `plain` is text, as base models continue it."""


class Prompts:
    """Renders the items of a task for a tokenizer.

    Args:
        tokenizer: The model's tokenizer, or None if a server renders the prompts.
        task: The task, whose worked examples and plain form are used.
        style: One of `STYLES`, or None for `chat` if the tokenizer has a chat template.
        num_fewshot: Number of worked examples before each problem.
        variables: Further variables of the chat template.

    Raises:
        ConfigError: The style does not exist or needs a chat template, or the task has fewer examples.

    Attributes:
        style: One of `STYLES`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        task: Task,
        style: str | None = None,
        num_fewshot: int = 0,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        has_template = tokenizer is None or bool(tokenizer.chat_template)
        self.style = style or ("chat" if has_template else "plain")
        if self.style not in STYLES:
            raise ConfigError(f"--prompting: expected one of {', '.join(STYLES)}, got {style!r}")
        if self.style == "chat" and not has_template:
            raise ConfigError("--prompting chat: the tokenizer has no chat template; use --prompting plain")
        if not 0 <= num_fewshot <= len(task.examples):
            raise ConfigError(
                f"--num-fewshot: expected 0 to {len(task.examples)}, since task {task.name} has so many worked "
                f"examples, got {num_fewshot}"
            )
        self._task = task
        self._examples = task.examples[:num_fewshot]
        self._tokenizer = tokenizer
        self._variables = variables

    @cached_property
    def _rendering(self) -> tuple[Tokenization, ChatTemplate]:
        assert self._tokenizer is not None, "a server renders its prompts"
        return Tokenization(self._tokenizer), ChatTemplate(self._tokenizer, self._variables)

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts at which a response ends: those of the task for plain prompts, none for a chat."""
        return tuple(self._task.stop) if self.style == "plain" else ()

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The token with which the template ends a turn, since training ends responses with it. () if it has none.

        Models are published whose configuration names another token only, and they would not stop.
        """
        if self.style != "chat":
            return ()
        tokens, template = self._rendering
        try:
            return Endings(tokens).ids(template.end_of_turn([], ""))[:1]
        except DataError:  # a template that refuses a conversation of one word
            return ()

    def text(self, item: Item) -> Text:
        """Returns what the model is asked, with the worked examples, before it is rendered.

        Raises:
            DataError: The item has an empty prompt.
        """
        if not item.prompt:
            raise DataError("the prompt is empty; expected a text or messages", item.id, "empty prompt")
        return self._chat(item) if self.style == "chat" else self._plain(item)

    def ids(self, item: Item) -> list[int]:
        """Returns the prompt as token ids, as training encodes it.

        Raises:
            DataError: The prompt is empty, or the template refuses it.
        """
        tokens, template = self._rendering
        found = prompt_ids(tokens, template, self.text(item), item.id)
        if not found:
            raise DataError("the prompt has no tokens; expected at least one", item.id, "empty prompt")
        return found

    def _chat(self, item: Item) -> list[Message]:
        turns = [self._asked(item.prompt)] if isinstance(item.prompt, str) else item.prompt
        shown: list[Message] = []
        for question, answer in self._examples:
            shown += [self._asked(question), {"role": "assistant", "content": answer}]
        # A system prompt stays in front.
        systems = 1 if turns and turns[0].get("role") == "system" else 0
        return [*turns[:systems], *shown, *turns[systems:]]

    def _asked(self, question: str) -> Message:
        return {"role": "user", "content": self._task.chat.replace("{prompt}", question)}

    def _plain(self, item: Item) -> str:
        asked = item.prompt if isinstance(item.prompt, str) else _contents(item.prompt, item.id)
        form = self._task.plain
        between = "" if form.endswith("\n") else " "
        worked = [
            f"{form.replace('{prompt}', question)}{between}{answer}" for question, answer in self._examples
        ]
        return "\n\n".join([*worked, form.replace("{prompt}", asked)])


def _contents(turns: Sequence[Message], row_id: str) -> str:
    """Returns what the messages say, one below the other."""
    contents = [turn.get("content") for turn in turns]
    if not all(isinstance(content, str) for content in contents):
        raise DataError("--prompting plain: expected messages of text alone", row_id, "no plain text")
    return "\n".join(str(content) for content in contents)
