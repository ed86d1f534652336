"""Prompts and the responses of two sides to them: files, evaluations, or the responses of a preference data set.

Imports no model.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from infopo.data.files import SUFFIXES, file_rows, object_rows
from infopo.errors import ConfigError, DataError
from infopo.evaluation.given import IDS, PROMPTS, given_responses
from infopo.evaluation.items import Item, shown_text
from infopo.evaluation.results import ITEMS, read_items
from infopo.evaluation.winrate import Duel
from infopo.texts import Text

SIDES = ("chosen", "rejected")
"""Names of the sides of a preference data set, which may stand in place of a model."""

_ANSWERED = (
    "chosen",
    "rejected",
    "conversations",
    "messages",
    "completion",
    "completions",
    "label",
    "chosen_response",
)

Answers = Mapping[str, Sequence[str]]
"""Responses by item."""


def read_prompts(source: str) -> list[Item]:
    """Returns the prompts of a data set, whose chosen and rejected responses are the `gold` of the items.

    Args:
        source: A file or hub name with preference data in any shape that training takes, or a file with a column
            `prompt`, `question` or `instruction` alone.

    Raises:
        DataError: There are none, or a row is damaged. Names the row.
    """
    path = Path(source)
    if path.is_file() and source.endswith(SUFFIXES) and _has_prompts_alone(path):
        items = [_item(row, row_id) for row_id, row in object_rows(path, source)]
    else:
        items = list(_of_preferences(source))
    if not items:
        raise DataError("has no prompts", source, "no prompts")
    return items


def _has_prompts_alone(path: Path) -> bool:
    _, row = next(iter(file_rows(path, str(path))), (0, None))
    return isinstance(row, Mapping) and any(name in row for name in PROMPTS) and not set(_ANSWERED) & set(row)


def _item(row: Mapping[str, Any], row_id: str) -> Item:
    prompt = next((row[name] for name in PROMPTS if row.get(name)), None)
    if not isinstance(prompt, str | list) or not shown_text(prompt).strip():
        got = {name: row[name] for name in PROMPTS if name in row}
        raise DataError(
            f"expected a prompt in {', '.join(PROMPTS)}, got {got or 'none'!r:.100}", row_id, "empty prompt"
        )
    name = next((row[key] for key in IDS if row.get(key) is not None), row_id)
    return Item(str(name), prompt, {})


def _of_preferences(source: str) -> Iterator[Item]:
    from infopo.data.counts import DataCounts
    from infopo.data.sources import read_rows

    for row in read_rows(source, DataCounts()):
        gold = {
            side: [shown_response(text) for text in texts]
            for side, texts in zip(SIDES, (row.chosen, row.rejected))
        }
        yield Item(row.row_id, row.prompt, gold)


def shown_response(response: Text) -> str:
    """Returns what a response says, its messages one below the other."""
    if isinstance(response, str):
        return response.strip()
    return "\n".join(
        str(turn.get("content") or "") for turn in response if turn.get("role") == "assistant"
    ).strip()


def prompts_of_responses(sources: Sequence[str]) -> list[Item]:
    """Returns the prompts that the first file of responses, or evaluation, with prompts tells of itself.

    Raises:
        ConfigError: None has prompts.
        DataError: A row of the only ones that have them lacks its prompt. Names the row.
    """
    partial: list[tuple[str, Mapping[str, Any]]] = []
    for source in sources:
        path = Path(source)
        if (path / ITEMS).is_file():
            return list(
                {each.item: Item(each.item, each.prompt, {}) for each in read_items(path / ITEMS)}.values()
            )
        if path.is_file() and source.endswith(SUFFIXES):
            rows = list(object_rows(path, source))
            lacking = [(row_id, row) for row_id, row in rows if not any(row.get(name) for name in PROMPTS)]
            if 0 < len(lacking) < len(rows):
                partial += lacking[:1]
            if rows and not lacking:
                found = [_item(row, row_id) for row_id, row in rows]
                # Several samples of a prompt stand in rows of their own.
                return list({shown_text(item.prompt): item for item in reversed(found)}.values())[::-1]
    for row_id, row in partial:
        _item(row, row_id)  # which says what is wrong with it
    raise ConfigError(
        f"--prompts: neither {' nor '.join(sources)} has prompts beside its responses; name the file that has them"
    )


def is_side(source: str) -> bool:
    """Whether a name is that of a side of the data set."""
    return source in SIDES


def has_responses(source: str) -> bool:
    """Whether a source is a side, an evaluation or a file, and not a model that is to be asked."""
    path = Path(source)
    return is_side(source) or (path / ITEMS).is_file() or path.is_file() or source.endswith(SUFFIXES)


def read_answers(source: str, items: Sequence[Item]) -> Answers:
    """Returns the responses of a side, an evaluation or a file to these prompts.

    Raises:
        ConfigError: The prompts have no such side.
        DataError: A row has no response, or the prompts do not match.
    """
    if is_side(source):
        found = {item.id: item.gold[source][:1] for item in items if item.gold.get(source)}
        if not found:
            raise ConfigError(
                f"{source}: the prompts have no {source} responses; name preference data in --prompts"
            )
        return found
    path = Path(source)
    if (path / ITEMS).is_file():
        by_text = {_bare(item.prompt): item.id for item in items}
        answers: dict[str, list[str]] = {}
        for each in read_items(path / ITEMS):
            if (place := by_text.get(_bare(each.prompt))) is not None:
                answers.setdefault(place, []).append(each.response)
        if not answers:
            raise DataError("answers none of the prompts", source, "no prompts in common")
        return answers
    given, _ = given_responses(path, "winrate", items)
    return {each.item.id: each.responses for each in given}


def _bare(prompt: Text) -> str:
    return " ".join(shown_text(prompt).split())


def make_duels(items: Sequence[Item], a: Answers, b: Answers) -> tuple[list[Duel], int, int]:
    """Returns the duels of what both answer, and the numbers of prompts that only A and only B answer.

    The k-th response of A stands against the k-th of B.

    Raises:
        DataError: They answer no prompt in common.
    """
    both = [item for item in items if a.get(item.id) and b.get(item.id)]
    if not both:
        raise DataError("answer no prompt in common", "the two sides", "no prompts in common")
    duels = [
        Duel(item.id, shown_text(item.prompt), first, second)
        for item in both
        for first, second in zip(a[item.id], b[item.id])
    ]
    only = [sum(bool(side.get(item.id)) for item in items) - len(both) for side in (a, b)]
    return duels, only[0], only[1]
