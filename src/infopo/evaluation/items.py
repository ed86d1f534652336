"""What evaluation is about: a task has items, a model answers them, and rules mark the answers. Imports no torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from infopo.texts import Text


@dataclass(frozen=True)
class Item:
    """One problem of a task.

    Attributes:
        id: Name that stays the same whatever else is evaluated, e.g. `gsm8k/17`.
        prompt: What the model is asked, without examples and without a chat template: plain text, or a conversation.
        gold: What the task's rules grade against, in the task's own form. It can be written as JSON.
    """

    id: str
    prompt: Text
    gold: Any


@dataclass(frozen=True)
class Answered:
    """A response to an item, as rules see it.

    Attributes:
        item: The problem.
        response: The model's text without special tokens.
        finished: Whether the model ended it itself. False if it was cut off at the largest number of tokens.
    """

    item: Item
    response: str
    finished: bool = True


@dataclass(frozen=True)
class Mark:
    """What a rule makes of a response.

    Attributes:
        correct: Whether the response is right. A response without an answer is wrong.
        answer: The answer as the rule read it, or None if it found none.
        note: Why there is no verdict on the merits: "no answer", "no code found", "time-out", ... None if there is one.
    """

    correct: bool
    answer: str | None = None
    note: str | None = None


Rule: TypeAlias = Callable[[Sequence[Answered]], Sequence[Mark]]
"""Marks many responses at once, in their order, because some rules work in other processes."""


@dataclass(frozen=True)
class Task:
    """Problems, and how their answers are graded.

    Attributes:
        name: Name on the command line.
        load: Returns the items of a file or hub name, or of the task's own source (None).
        rules: Rules by name. All mark the same outputs. The first is the headline.
        max_new_tokens: Largest number of tokens of a response, unless the user sets another.
        examples: Worked examples as (prompt, response), for few-shot prompts. Empty if there are none.
        stop: Texts at which a response to a plain prompt ends, because a base model would go on with the next problem.
        plain: How a problem reads as plain text, for models without a chat template. `{prompt}` is what is asked.
        chat: How a problem reads as a message of the user, if its prompt is plain text.
        executes_code: Whether grading runs what the model wrote, which the user has to allow.
    """

    name: str
    load: Callable[[str | None], Sequence[Item]]
    rules: Mapping[str, Rule]
    max_new_tokens: int
    examples: Sequence[tuple[str, str]] = ()
    stop: Sequence[str] = ()
    plain: str = "Question: {prompt}\nAnswer:"
    chat: str = "{prompt}"
    executes_code: bool = False

    @property
    def headline(self) -> str:
        """Name of the rule whose result stands for the task."""
        return next(iter(self.rules))


def shown_text(prompt: Text) -> str:
    """Returns a prompt as one text for people to read.

    Example:
        >>> shown_text([{"role": "user", "content": "1+1=?"}])
        'user: 1+1=?'
    """
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in prompt)
