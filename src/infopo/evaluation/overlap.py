"""Overlap of training data with a task: problems that a model has seen say little about what it can do.

The problems are indexed, which are few, and the training data are read once, row by row, so that memory does not grow
with them. Imports no torch.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infopo.evaluation.items import Item
from infopo.output import counted
from infopo.records import Message, PreferenceRow, Text

N = 13
"""Words of a piece that two unrelated texts do not share by chance.

References:
    Brown et al., 2020, "Language Models are Few-Shot Learners", arXiv 2005.14165, appendix C.
"""

NOT_DETECTED = (
    "paraphrases, translations, changed names or numbers, solutions without their problem, and what an earlier stage "
    "of training has seen"
)

_WORD = re.compile(r"\w+")
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Overlap:
    """What training data and a task have in common.

    Attributes:
        items: Number of items of the task.
        rows: Number of rows of training data that were read.
        exact: Ids of items whose problem is a prompt, or a turn, of the training data.
        shared: Ids of items that share a piece of `N` words with any text of the training data.
        short: Number of items with fewer than `N` words, which can only be found exactly.
    """

    items: int
    rows: int
    exact: Sequence[str]
    shared: Sequence[str]
    short: int

    @property
    def record(self) -> dict[str, Any]:
        """Returns it as `eval.json` has it."""
        return {**vars(self), "n": N, "not_detected": NOT_DETECTED}

    def line(self, task: str) -> str:
        """Returns it as a sentence."""
        return (
            f"{task}: {len(self.exact)} of {self.items} problems are among the {counted(self.rows, 'row')} of training "
            f"data word for word, {len(self.shared)} share {N} words in a row with them ({self.short} are too short "
            f"for that). Not detected: {NOT_DETECTED}."
        )


def overlap(items: Sequence[Item], rows: Iterable[PreferenceRow]) -> Overlap:
    r"""Finds the items of a task in training data.

    Two problems are the same if they differ in nothing but case, spaces, line breaks, the form of Unicode characters
    and marks at the end. Pieces are compared without punctuation, too.

    Args:
        items: Items of the task.
        rows: Training data, which are read one by one.

    Example:
        >>> rows = [PreferenceRow("What is\n1 + 1?", ["2"], ["3"], "pairs.jsonl:1")]
        >>> overlap([Item("math/0", "what is 1 + 1", "2"), Item("math/1", "what is 1 - 1", "0")], rows).exact
        ['math/0']
    """
    return overlaps({"": items}, rows)[""]


def overlaps(tasks: Mapping[str, Sequence[Item]], rows: Iterable[PreferenceRow]) -> dict[str, Overlap]:
    """Finds the items of several tasks in training data, which are read once."""
    indices = {name: _Index(items) for name, items in tasks.items()}
    read = 0
    for row in rows:
        read += 1
        prompts = list(_texts(row.prompt))
        answers = [text for response in (*row.chosen, *row.rejected) for text in _texts(response)]
        for index in indices.values():
            for text in prompts:
                index.find_exact(text)
            for text in (*prompts, *answers):
                index.find_pieces(text)
    return {name: index.result(read) for name, index in indices.items()}


class _Index:
    """Problems of a task, found by their whole text and by their pieces."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._ids = [item.id for item in items]
        self._exact: set[str] = set()
        self._shared: set[str] = set()
        self._short = 0
        self._wholes: dict[str, list[str]] = {}
        self._pieces: dict[str, list[str]] = {}
        # A piece is built for places alone whose first and last word begin and end one. That is ten times as fast.
        self._ends: set[tuple[str, str]] = set()
        for item in items:
            problem = _problem(item.prompt)
            self._wholes.setdefault(_whole(problem), []).append(item.id)
            words = _words(problem)
            self._short += len(words) < N
            for at in range(len(words) - N + 1):
                self._pieces.setdefault(" ".join(words[at : at + N]), []).append(item.id)
                self._ends.add((words[at], words[at + N - 1]))

    def result(self, rows: int) -> Overlap:
        exact, shared = (
            [name for name in self._ids if name in found] for found in (self._exact, self._shared)
        )
        return Overlap(len(self._ids), rows, exact, shared, self._short)

    def find_exact(self, text: str) -> None:
        self._exact.update(self._wholes.get(_whole(text), ()))

    def find_pieces(self, text: str) -> None:
        words = _words(text)
        for at, ends in enumerate(zip(words, words[N - 1 :])):
            if ends in self._ends:
                self._shared.update(self._pieces.get(" ".join(words[at : at + N]), ()))


def _problem(prompt: Text) -> str:
    """Returns what an item asks, without instructions that stand in a system prompt or in earlier turns."""
    return prompt if isinstance(prompt, str) else next(reversed([*_texts(prompt[-1:])]), "")


def _texts(text: Text) -> Iterable[str]:
    """Yields the texts of a prompt or a response: itself, or those of its turns."""
    if isinstance(text, str):
        yield text
        return
    for message in text:
        yield from _contents(message)


def _contents(message: Message) -> Iterable[str]:
    content = message.get("content")
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        texts = (part.get("text") for part in content if isinstance(part, dict))
        yield from (text for text in texts if isinstance(text, str))


def _whole(text: str) -> str:
    # Operators stay: without them "3 + 4" and "3 - 4" would be the same problem.
    return _SPACE.sub(" ", _folded(text)).strip(" .!?:")


def _words(text: str) -> list[str]:
    return _WORD.findall(_folded(text))


def _folded(text: str) -> str:
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
