"""Responses that something else wrote, matched to the items of a task. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infopo.data.files import object_rows
from infopo.errors import DataError
from infopo.evaluation.items import Item, shown_text
from infopo.evaluation.samples import Sample
from infopo.output import counted

IDS = ("item", "id", "task_id", "question_id", "idx")
TEXTS = ("response", "output", "completion", "generation", "answer", "text")
PROMPTS = ("prompt", "question", "instruction")

FINISHED = "finished"
"""Column that says of a response whether the model ended it itself, as `infopo generate` writes it."""

_YES, _NO = ("true", "1", "1.0"), ("false", "0", "0.0")
"""What formats without types make of a bool."""


@dataclass(frozen=True)
class Given:
    """Responses to one item.

    Attributes:
        item: The item.
        responses: One or more, in the order of the file.
        finished: Whether the model ended each of them itself. Those of which the file does not say it are taken to be.
    """

    item: Item
    responses: Sequence[str]
    finished: Sequence[bool]


def given_responses(path: Path, task: str, items: Sequence[Item]) -> tuple[list[Given], str]:
    """Reads a file of responses (JSONL, JSON, CSV, Parquet, compressed or not) and matches them to items.

    A row has the response as `response`, `output`, `completion`, `generation`, `answer` or `text` (a text, or a list of
    samples), and says what it answers by the item's id (`item`, `id`, `task_id`, ...), with or without the task's name
    before it, or by the question itself (`prompt`, `question`, `instruction`). Rows that say neither are taken in the
    order of the items, if there are as many. A row with another `task` is left out. A response with `finished: false`
    was cut off.

    Returns:
        Items with their responses, and how they were matched: "id", "prompt" or "order".

    Raises:
        DataError: A row has no response, answers no item, or nothing says what the rows answer. Names the row.
    """
    if not path.is_file():
        raise DataError("there is no such file", str(path), "no such file")
    rows = [(row_id, row) for row_id, row in object_rows(path) if row.get("task", task) == task]
    if not rows:
        raise DataError(f"holds no responses to task {task}", str(path), "no responses")
    id_field, prompt_field = _field(rows, IDS), _field(rows, PROMPTS)
    text_field = _field(rows, tuple(name for name in TEXTS if name not in (id_field, prompt_field)))
    if text_field is None:
        # The column that most rows have tells which row lacks it.
        most = max(TEXTS, key=lambda name: sum(row.get(name) is not None for _, row in rows))
        row_id, row = next(each for each in rows if each[1].get(most) is None)
        raise DataError(
            f"expected a column {', '.join(TEXTS[:-1])} or {TEXTS[-1]} with a text, got {', '.join(row)}",
            row_id,
            "no response",
        )
    places, how = _places(path, task, items, rows, id_field, prompt_field)
    found: dict[int, list[tuple[str, bool]]] = {}
    for (row_id, row), place in zip(rows, places, strict=True):
        texts = _texts(row.get(text_field), text_field, row_id)
        ends = _finished(row.get(FINISHED), len(texts), row_id)
        found.setdefault(place, []).extend(zip(texts, ends, strict=True))
    return [Given(items[place], *map(list, zip(*found[place], strict=True))) for place in sorted(found)], how


def as_sample(task: str, item: Item, number: int, text: str, *, finished: bool) -> Sample:
    """Returns a response from a file in the form of a drawn one, of which less is known."""
    return Sample(
        key="",
        task=task,
        item=item.id,
        sample=number,
        seed=0,
        weights="",
        law={},
        prompt=item.prompt,
        text=text,
        token_ids=(),
        tokens=None,
        finished=finished,
        logp=None,
    )


def _field(rows: Sequence[tuple[str, Mapping[str, Any]]], names: Sequence[str]) -> str | None:
    """Returns the first of these names that every row has."""
    return next((name for name in names if all(row.get(name) is not None for _, row in rows)), None)


def _texts(value: Any, field: str, row_id: str) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    # An answer may be a bare number.
    texts = [
        str(text) if isinstance(text, int | float) and not isinstance(text, bool) else text for text in texts
    ]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{field}: expected a text or a list of texts, got {value!r:.60}", row_id, "no text")
    return list(texts)


def _finished(value: Any, count: int, row_id: str) -> list[bool]:
    """Returns whether each of a row's responses is finished: one value for all of them, or a list."""
    values = value if isinstance(value, list) else [value] * count
    # An empty cell of a CSV file says nothing.
    words = [str(True if each in (None, "") else each).strip().casefold() for each in values]
    if len(words) != count or not all(word in (*_YES, *_NO) for word in words):
        raise DataError(
            f"{FINISHED}: expected true or false, or {counted(count, 'value')} of these, got {value!r:.60}",
            row_id,
            "no bool",
        )
    return [word in _YES for word in words]


def _places(
    path: Path,
    task: str,
    items: Sequence[Item],
    rows: Sequence[tuple[str, Mapping[str, Any]]],
    id_field: str | None,
    prompt_field: str | None,
) -> tuple[list[int], str]:
    """Returns for each row the index of its item, and how it was found."""
    by_id = {_id(item.id): place for place, item in enumerate(items)}
    by_id |= {_id(item.id.removeprefix(f"{task}/")): place for place, item in enumerate(items)}
    if id_field is not None and _id(rows[0][1][id_field]) in by_id:
        places = [_found(by_id, _id(row[id_field]), id_field, row_id) for row_id, row in rows]
        if prompt_field is not None:
            for place, (row_id, row) in zip(places, rows):
                _refuse_other_question(items[place], row[id_field], row[prompt_field], prompt_field, row_id)
        return places, "id"
    by_prompt = {_bare(shown_text(item.prompt)): place for place, item in enumerate(items)}
    by_prompt |= {_bare(_last_content(item)): place for place, item in enumerate(items)}
    if prompt_field is not None:
        keys = [_question(row[prompt_field], by_prompt) for _, row in rows]
        return [
            _found(by_prompt, key, prompt_field, row_id) for key, (row_id, _) in zip(keys, rows)
        ], "prompt"
    if id_field is not None:
        _found(by_id, _id(rows[0][1][id_field]), id_field, rows[0][0])
    if len(rows) != len(items):
        raise DataError(
            f"has {counted(len(rows), 'response')} to {counted(len(items), 'item')} of {task}, and no column "
            f"says which ({', '.join(IDS)}, "
            f"or {', '.join(PROMPTS)})",
            str(path),
            "cannot be matched",
        )
    return list(range(len(items))), "order"


def _question(prompt: Any, known: Mapping[str, int]) -> str:
    """Returns what a row asks, as it is compared: of a conversation all of it, or else its last message."""
    whole = _bare(shown_text(prompt))
    if whole not in known and isinstance(prompt, list) and prompt and isinstance(prompt[-1], Mapping):
        return _bare(str(prompt[-1].get("content")))
    return whole


def _found(known: Mapping[str, int], key: str, field: str, row_id: str) -> int:
    if key not in known:
        raise DataError(
            f"{field}: {key!r:.80} is no item of the task, such as {next(iter(known), '')!r:.60}",
            row_id,
            "unknown item",
        )
    return known[key]


def _refuse_other_question(item: Item, given_id: Any, asked: Any, field: str, row_id: str) -> None:
    """Refuses a row whose question is not that of the item with its id, as of ids that count from 1."""
    if _bare(_last_content(item)) not in _bare(shown_text(asked)):
        raise DataError(
            f"id {given_id!r:.40} is item {item.id}, which asks {_bare(_last_content(item))!r:.80}, but the row's "
            f"{field} is {_bare(shown_text(asked))!r:.80}; ids count from 0; without ids, {field} matches rows",
            row_id,
            "other question",
        )


def _last_content(item: Item) -> str:
    return item.prompt if isinstance(item.prompt, str) else str(item.prompt[-1].get("content"))


def _id(value: Any) -> str:
    """Returns an id as it is compared: published files write `HumanEval/0`, and some formats make 0 a 0.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).casefold()


def _bare(text: str) -> str:
    return " ".join(text.split())
