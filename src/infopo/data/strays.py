"""Columns that do not fit: those of no shape are refused in one message, those that a shape leaves are counted."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from infopo.data.columns import names
from infopo.data.published import is_transcript, transcript_of
from infopo.errors import DataError
from infopo.vocabulary import COLUMNS, CONVERSATION, IMAGE_COLUMNS, NEEDED, PROMPTS, guessed

if TYPE_CHECKING:
    from infopo.records import Text

ANNOTATOR = re.compile(r"annotator\d+")

_METADATA = re.compile(
    r"(.*_)?(id|ids|idx|index|uuid|hash|model|models|score|scores|rating|ratings|rank|reward|url|timestamp)|"
    r"(model|score|rating|rank|reward|num|is|id)_.*|"
    r"source|dataset|subset|domain|lang|language|category|categories|type|topic|split|link|date|time|created|license|"
    r"version|tag|tags|label|labels|winner|margin|difficulty|annotator|author|count|length|tokens|status|"
    r"__.*__|unnamed.*",
    re.IGNORECASE,
)
"""Names of columns that say something about a row, and are no part of what was said."""

_ANSWERS = ("response", "completion", "answer", "output")


def no_shape(found: Sequence[str], where: str, shape: str | None = None) -> DataError:
    """The error for columns of no shape: what there is, what the nearest shape lacks, and a mapping that may help.

    Args:
        found: Columns of the row or file.
        where: The row or file.
        shape: The shape that the recipe names; None: any.
    """
    shapes = [shape] if shape else list(NEEDED)
    lacking = {
        (name, needed): [column for column in needed if not set(column.split("|")) & set(found)]
        for name in shapes
        for needed in NEEDED[name]
    }
    (nearest, needed), missing = min(lacking.items(), key=lambda item: len(item[1]) - 0.01 * len(item[0][1]))
    guess = {} if shape else guessed(list(found))
    if guess:
        nearest, needed = "standard", ("prompt", "chosen", "rejected")
        missing = [column for column in needed if column not in found]
    expected, absent = (", ".join(columns).replace("|", " or ") for columns in (needed, missing))
    problem = (
        f"expected the columns {expected} ({nearest}); {absent} missing among {names(found) or 'none'}. "
    )
    if guess:
        mapping = ", ".join(f"{target}: {_as_yaml(column)}" for target, column in guess.items())
        problem += f"Perhaps data.columns: {{{mapping}}} reads them"
    elif missing == ["prompt"] and (asking := [column for column in PROMPTS if column in found]):
        problem += f"Perhaps data.columns: {{prompt: {asking[0]}}} reads them"
    elif set(_ANSWERS) & set(found) and "rejected_response" not in found:
        answer = next(column for column in _ANSWERS if column in found)
        problem += (
            f"One {answer} a row: give it a label (data.columns: {{completion: {answer}, label: ...}}), or collect "
            f'those of a prompt: df.groupby("prompt").agg(responses=("{answer}", list), scores=("SCORE", list))'
        )
    else:
        problem += "Columns of other names are read with data.columns: {chosen: YOURS, ...}"
    return DataError(f"{problem}. Shapes: `infopo docs data`", where, "missing column")


def _as_yaml(column: str) -> str:
    """The name as a recipe takes it: quoted if it is more than a word, such as one with a space before it."""
    return column if re.fullmatch(r"[\w.-]+", column) else json.dumps(column, ensure_ascii=False)


def columns_to_read(
    found: Sequence[str], name: str, shape: str | None, texts: Iterable[str] = ()
) -> list[str]:
    """Columns of a columnar source that are read; one that is missing there is missing in all its rows.

    Args:
        found: Columns of the source.
        name: Name of the source, for errors.
        shape: The shape that the recipe names; None: any.
        texts: Columns that hold text, which are looked at where a prompt may stand among them.

    Raises:
        DataError: There are images, or columns of no shape (of the named shape) are all there.
    """
    if images := [column for column in IMAGE_COLUMNS if column in found]:
        raise DataError(
            f"column {images[0]!r}: images are not supported; drop the column to train on text",
            name,
            "images",
        )
    if not has_columns(found, shape):
        raise no_shape(found, name, shape)
    read = {*COLUMNS, *texts}
    return [column for column in found if column in read or ANNOTATOR.fullmatch(column)]


def has_columns(found: Iterable[str], shape: str | None) -> bool:
    """Whether all columns are there that the shape needs, or any shape where none is named."""
    found = set(found)
    return any(
        all(found & set(column.split("|")) for column in needed)
        for name in ([shape] if shape else NEEDED)
        for needed in NEEDED[name]
    )


def texts_beside(row: Mapping[str, Any]) -> list[str]:
    """Columns that may hold the prompt of a row which has only `chosen` and `rejected`: text, or turns of somebody."""
    return [
        column
        for column, value in row.items()
        if column not in ("chosen", "rejected", "tools")
        and (_is_turns(value) if isinstance(value, list) else isinstance(value, str) and value.strip())
        and not _METADATA.fullmatch(column)
        and not ANNOTATOR.fullmatch(column)
    ]


def _is_turns(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(turn, Mapping) and {"role", "from"} & turn.keys() for turn in value)


def begins_with_an_answer(conversation: object) -> bool:
    """Whether messages begin with the assistant's, so that they hold no prompt."""
    first = conversation[0] if isinstance(conversation, list) and conversation else None
    return isinstance(first, Mapping) and (first.get("role") == "assistant" or first.get("from") == "gpt")


def ignored_columns(
    row: Mapping[str, Any], shape: str, used: Sequence[Text], tools: object, row_id: str
) -> list[str]:
    """Columns with values that the shape does not read.

    Args:
        row: The row, under the names that shapes know.
        shape: Its shape.
        used: Prompt and responses that the row became.
        tools: The tools that it became; None: none.
        row_id: Name of the row, for errors.

    Raises:
        DataError: `ignored column`: one of `CONVERSATION` holds text that is nowhere in what the row became.
    """
    if tools is not None and isinstance(used[0], str):
        raise _dropped("tools", shape, "a prompt of text has no place for tools", row_id)
    needed = {name for columns in NEEDED[shape] for column in columns for name in column.split("|")}
    said: str | None = None
    ignored = []
    for column, value in row.items():
        if value is None or value in ("", [], {}) or column in ("tools", "chosen", "rejected"):
            continue
        if column == "prompt" and column in needed:
            continue
        if _leaf(column) in CONVERSATION and (texts := list(_texts(value))):
            if said is None:
                said = _squeezed(" ".join(text for each in used for text in _texts(each)))
            if all(_squeezed(text) in said for text in texts):
                continue
            if (
                shape == "conversational_implicit" and column == "prompt"
            ):  # TRL's convention: the turns are the prompt
                ignored.append(column)
                continue
            if column in ("system", "system_prompt") and _begins_with_system(used[0]):
                ignored.append(column)
                continue
            why = f"shape {shape} does not read it, and the prompt does not hold its text"
            raise _dropped(column, shape, why, row_id)
        is_for_template = column == "chat_template_kwargs" and isinstance(used[0], list)
        if column not in needed and not is_for_template and not ANNOTATOR.fullmatch(column):
            ignored.append(column)
    return ignored


_AS_CONVERSATIONS = {
    "standard": "{instruction: prompt}",
    "unpaired": "{instruction: prompt, output: completion}",
}
"""Mappings by which rows of text are read as conversations, which have a place for a system prompt and tools."""


def _dropped(column: str, shape: str, why: str, row_id: str) -> DataError:
    if column in ("system", "system_prompt", "tools") and shape in _AS_CONVERSATIONS:
        remedy = f"read text prompts as conversations (data.columns: {_AS_CONVERSATIONS[shape]})"
    else:
        remedy = "write it into the prompt, map it (data.columns)"
    remedy += f", or leave it out (data.columns: {{{column}: null}})"
    return DataError(f"column {column!r} would be dropped: {why}; {remedy}", row_id, "ignored column")


def _leaf(column: str) -> str:
    return column.rpartition(".")[2]


def _begins_with_system(prompt: Text) -> bool:
    return isinstance(prompt, list) and bool(prompt) and prompt[0]["role"] in ("system", "developer")


def _texts(value: object) -> Iterator[str]:
    """All text that was said, in a text, in messages or in rounds of a history."""
    if isinstance(value, str):
        yield from _told(value)
    elif isinstance(value, Mapping):
        for key in ("content", "value", "text", "full_text"):
            if value.get(key) is not None:
                yield from _texts(value[key])
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _told(text: str) -> Iterable[str]:
    """The text, or what is told in it where it is a transcript or a JSON list of rounds."""
    if is_transcript(text):
        return [str(turn["content"]) for turn in transcript_of(text)]
    if text.lstrip().startswith('["'):
        with contextlib.suppress(ValueError, RecursionError):
            rounds = json.loads(text)
            if all(isinstance(each, str) for each in rounds):
                return list(rounds)
    return [text]


def _squeezed(text: str) -> str:
    return " ".join(text.split())
