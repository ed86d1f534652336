"""What one dataset row may look like, and what is wrong with it when it does not. Imports no torch.

Shapes are those of TRL, of LLaMA-Factory and Axolotl (ShareGPT, Alpaca), and of data sets that are used as they were
published; `docs/data.md` shows a row of each. Each parser takes a row apart into prompt, chosen and rejected responses,
or raises `DataError` with the name of the fault: `missing column`, `null value`, `wrong type`, `wrong role`, `message
without content`, `empty prompt`, `empty chosen`, `empty rejected`, `chosen = rejected`, `no common prompt`, `invalid
UTF-8`, `invalid JSON`, `images`, `not an object`, `another shape`, `no responses`, `scores do not match`. One reason is
no fault: a `tie` says that the row is sound and prefers nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from infopo.catalog import DATA_SHAPES
from infopo.data.columns import (
    chat_template_kwargs_of,
    has_value,
    kind,
    label_of,
    list_of,
    messages_of,
    optional_text,
    prompt_of,
    responses_of,
    sharegpt_of,
    shown,
    text_of,
    tools_of,
    value_of,
)
from infopo.data.counts import TIE
from infopo.data.responses import (
    ScoreRule,
    check_not_blank,
    check_responses,
    common_prefix,
    majority,
    refuse_no_common_prompt,
)
from infopo.errors import DataError

if TYPE_CHECKING:
    from infopo.records import Message, Text

IMAGE_COLUMNS = ("image", "images")

_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_ANNOTATOR = re.compile(r"annotator\d+")


class RowParts(NamedTuple):
    """A row taken apart; becomes a `PreferenceRow`."""

    prompt: Text
    chosen: list[Text]
    rejected: list[Text]
    tools: list[Any] | None
    chat_template_kwargs: dict[str, Any]


def detect_shape(row: Mapping[str, Any], row_id: str = "row") -> str:
    """Name of the row's shape: which columns it has, and whether they hold text, messages or lists of responses.

    Columns that are null count as missing. Rows with `chosen` and `rejected` are pairs or lists of responses, whatever
    else they hold. One of whole conversations whose `prompt` is text is `conversational_implicit`, as in TRL.

    Raises:
        DataError: No shape has these columns and types.
    """
    if not has_value(row, "chosen") and not has_value(row, "rejected"):
        for shape, columns in _WITHOUT_SIDES.items():
            if all(any(has_value(row, c) for c in column.split("|")) for column in columns):
                return shape
    chosen, rejected = value_of(row, "chosen", row_id), value_of(row, "rejected", row_id)
    if has_value(row, "conversations") or (isinstance(chosen, Mapping) and has_value(row, "messages")):
        return "sharegpt"
    prompt = row.get("prompt")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(prompt, str):
            return "standard"
        if prompt is None and (has_value(row, "instruction") or has_value(row, "question")):
            return "alpaca"
        if prompt is None and "prompt" not in row:
            return "hh" if _is_transcript(chosen) or _is_transcript(rejected) else "standard_implicit"
    if isinstance(chosen, list) and isinstance(rejected, list):
        if isinstance(prompt, str | list) and any(
            isinstance(r, str | list) for r in [*chosen, *rejected][:1]
        ):
            return "lists"
        if isinstance(prompt, list):
            return "conversational"
        if isinstance(prompt, str) or "prompt" not in row:
            return "conversational_implicit"
    if "prompt" in row:
        value_of(row, "prompt", row_id)
    kinds = ", ".join(
        f"{name}: {kind(row[name])}" for name in ("prompt", "chosen", "rejected") if name in row
    )
    raise DataError(f"expected all text or all lists of messages, got {kinds}", row_id, "wrong type")


def parse_row(row: object, shape: str, row_id: str, rule: ScoreRule | None = None) -> RowParts:
    """Takes a row of the named shape apart, and judges it.

    Args:
        row: What the file holds: an object with `COLUMNS`.
        shape: A name of `DATA_SHAPES`.
        row_id: Name of the row in errors.
        rule: How scored responses are split; None: by the default rule.

    Raises:
        DataError: The row cannot be used; see the module's list of reasons.
    """
    row = check_object(row, row_id)
    for name in IMAGE_COLUMNS:
        if row.get(name) not in (None, []):
            raise DataError(
                f"column {name!r}: images are not supported; expected text only", row_id, "images"
            )
    if shape == "scored":
        prompt, chosen, rejected = _scored(row, row_id, rule or ScoreRule())
    else:
        prompt, chosen, rejected = _PARSERS[shape](row, row_id)
    check_responses(prompt, chosen, rejected, row_id)
    return RowParts(prompt, chosen, rejected, tools_of(row, row_id), chat_template_kwargs_of(row, row_id))


def check_object(row: object, row_id: str) -> Mapping[str, Any]:
    """The row, if it is an object with columns.

    Raises:
        DataError: It is anything else.
    """
    if isinstance(row, Mapping):
        return row
    raise DataError(f"expected an object with columns, got {shown(row)}", row_id, "not an object")


def columns_to_read(found: Sequence[str], name: str, shape: str | None) -> list[str]:
    """Columns of a columnar source that are read; one that is missing there is missing in all its rows.

    Args:
        found: Columns of the source.
        name: Name of the source, for errors.
        shape: The shape that the recipe names; None: any.

    Raises:
        DataError: There are images, or columns of no shape (of the named shape) are all there.
    """
    if images := [column for column in IMAGE_COLUMNS if column in found]:
        raise DataError(
            f"column {images[0]!r}: images are not supported; drop the column to train on text",
            name,
            "images",
        )
    missing = {s: [c for c in _NEEDED[s] if not set(c.split("|")) & set(found)] for s in _NEEDED}
    nearest = shape or min(missing, key=lambda s: len(missing[s]) - 0.01 * len(_NEEDED[s]))
    if all(missing.values()) if shape is None else missing[shape]:
        needed, lacking = (", ".join(c).replace("|", " or ") for c in (_NEEDED[nearest], missing[nearest]))
        problem = f"expected the columns {needed}; {lacking} missing among {', '.join(found)}"
        raise DataError(problem, name, "missing column")
    return [column for column in found if column in COLUMNS or _ANNOTATOR.fullmatch(column)]


Parts = tuple["Text", list["Text"], list["Text"]]


def _standard(row: Mapping[str, Any], row_id: str) -> Parts:
    prompt = text_of(row, "prompt", row_id)
    return prompt, [text_of(row, "chosen", row_id)], [text_of(row, "rejected", row_id)]


def _standard_implicit(row: Mapping[str, Any], row_id: str) -> Parts:
    chosen, rejected = text_of(row, "chosen", row_id), text_of(row, "rejected", row_id)
    check_not_blank([chosen], [rejected], row_id)
    end = common_prefix(chosen, rejected)
    # As in TRL's extract_prompt: the space before a response belongs to it, because tokenizers merge it into the word.
    if end and end < min(len(chosen), len(rejected)) and chosen[end - 1] == " ":
        end -= 1
    if not end:
        refuse_no_common_prompt(f"chosen begins {shown(chosen)}, rejected {shown(rejected)}", row_id)
    return chosen[:end], [chosen[end:]], [rejected[end:]]


def _conversational(row: Mapping[str, Any], row_id: str) -> Parts:
    list_of(row, "prompt", row_id, "messages")
    return (
        prompt_of(row, row_id),
        [messages_of(row, "chosen", row_id)],
        [messages_of(row, "rejected", row_id)],
    )


def _conversational_implicit(row: Mapping[str, Any], row_id: str) -> Parts:
    chosen, rejected = messages_of(row, "chosen", row_id), messages_of(row, "rejected", row_id)
    check_not_blank([chosen], [rejected], row_id)
    end = common_prefix(chosen, rejected)
    if not end:
        refuse_no_common_prompt("the conversations differ in their first message", row_id)
    return chosen[:end], [chosen[end:]], [rejected[end:]]


def _hh(row: Mapping[str, Any], row_id: str) -> Parts:
    """The response is the last Assistant turn, the prompt all before it: the data set's own convention."""
    chosen_prompt, chosen = _split_transcript(text_of(row, "chosen", row_id), "chosen", row_id)
    rejected_prompt, rejected = _split_transcript(text_of(row, "rejected", row_id), "rejected", row_id)
    if chosen_prompt != rejected_prompt:
        turn = common_prefix(chosen_prompt, rejected_prompt) + 1
        refuse_no_common_prompt(f"turn {turn} differs, and it is not the last", row_id)
    return chosen_prompt, [chosen], [rejected]


def _sharegpt(row: Mapping[str, Any], row_id: str) -> Parts:
    prompt = sharegpt_of(row, "conversations" if has_value(row, "conversations") else "messages", row_id)
    if not prompt:
        raise DataError("column 'conversations': expected turns, got an empty list", row_id, "empty prompt")
    if prompt[0]["role"] != "system":  # LLaMA-Factory: a first turn of the system goes before the column
        prompt = [*_system(row, row_id), *prompt]
    return prompt, [sharegpt_of(row, "chosen", row_id)], [sharegpt_of(row, "rejected", row_id)]


def _alpaca(row: Mapping[str, Any], row_id: str) -> Parts:
    chosen, rejected = text_of(row, "chosen", row_id), text_of(row, "rejected", row_id)
    return _instruction(row, row_id), [_said(chosen)], [_said(rejected)]


def _alpaca_unpaired(row: Mapping[str, Any], row_id: str) -> Parts:
    prompt, response = _instruction(row, row_id), _said(text_of(row, "output", row_id))
    return prompt, *_sides(
        response, label_of(row, "kto_tag" if has_value(row, "kto_tag") else "label", row_id)
    )


def _unpaired(row: Mapping[str, Any], row_id: str) -> Parts:
    prompt = prompt_of(row, row_id)
    completion = messages_of if isinstance(prompt, list) else text_of
    return prompt, *_sides(completion(row, "completion", row_id), label_of(row, "label", row_id))


def _unpaired_messages(row: Mapping[str, Any], row_id: str) -> Parts:
    """The response is the last turn, the prompt all before it, as in LLaMA-Factory."""
    column = "messages" if has_value(row, "messages") or "conversations" not in row else "conversations"
    turns = sharegpt_of(row, column, row_id)
    if len(turns) < 2:
        problem = f"column {column!r}: expected a prompt and a response, got {len(turns)} turns"
        raise DataError(problem, row_id, "empty prompt")
    if turns[0]["role"] != "system":
        turns = [*_system(row, row_id), *turns]
    return turns[:-1], *_sides(turns[-1:], label_of(row, "label", row_id))


def _lists(row: Mapping[str, Any], row_id: str) -> Parts:
    prompt = prompt_of(row, row_id)
    return prompt, responses_of(row, "chosen", prompt, row_id), responses_of(row, "rejected", prompt, row_id)


def _scored(row: Mapping[str, Any], row_id: str, rule: ScoreRule) -> Parts:
    prompt = prompt_of(row, row_id)
    responses = responses_of(row, "responses", prompt, row_id)
    scores = list_of(row, "scores", row_id, "numbers")
    for i, score in enumerate(scores, 1):
        if not isinstance(score, int | float) or isinstance(score, bool) or not math.isfinite(score):
            problem = f"column 'scores', score {i}: expected a finite number, got {shown(score)}"
            raise DataError(problem, row_id, "wrong type")
    if len(scores) != len(responses) or not responses:
        problem = (
            f"expected a score for each response, got {len(responses)} responses and {len(scores)} scores"
        )
        raise DataError(problem, row_id, "scores do not match")
    chosen, rejected = rule.split(scores)
    if not chosen and not rejected:
        raise DataError(f"all {len(scores)} scores are {scores[0]}: none is preferred", row_id, TIE)
    return prompt, [responses[i] for i in chosen], [responses[i] for i in rejected]


def _votes(row: Mapping[str, Any], row_id: str) -> Parts:
    """What more than half of the annotators prefer; 0 is a vote for a tie."""
    prompt = _instruction(row, row_id)
    first, second = (_said(text_of(row, column, row_id)) for column in ("response1", "response2"))
    columns = sorted(column for column in row if _ANNOTATOR.fullmatch(str(column)))
    value_of(row, "annotator1", row_id)
    is_first = majority(row, columns, row_id) == 1
    return (prompt, [first], [second]) if is_first else (prompt, [second], [first])


_PARSERS: Mapping[str, Callable[[Mapping[str, Any], str], Parts]] = {
    "standard": _standard,
    "standard_implicit": _standard_implicit,
    "conversational": _conversational,
    "conversational_implicit": _conversational_implicit,
    "hh": _hh,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "alpaca_unpaired": _alpaca_unpaired,
    "unpaired": _unpaired,
    "unpaired_messages": _unpaired_messages,
    "lists": _lists,
    "votes": _votes,
}

_SIDES = ("chosen", "rejected")
_WITHOUT_SIDES: Mapping[str, tuple[str, ...]] = {
    "votes": ("instruction|question", "response1", "response2", "annotator1"),
    "scored": ("prompt", "responses", "scores"),
    "unpaired": ("prompt", "completion", "label"),
    "unpaired_messages": ("messages|conversations", "label"),
    "alpaca_unpaired": ("instruction|question", "output", "kto_tag|label"),
}
"""Columns that tell a shape, of those that have no `chosen` and `rejected`; `|`: one of them."""

_NEEDED: Mapping[str, tuple[str, ...]] = {
    "standard_implicit": _SIDES,
    "standard": ("prompt", *_SIDES),
    "conversational": ("prompt", *_SIDES),
    "conversational_implicit": _SIDES,
    "hh": _SIDES,
    "sharegpt": ("conversations|messages", *_SIDES),
    "alpaca": ("instruction|question", *_SIDES),
    "lists": ("prompt", *_SIDES),
    **_WITHOUT_SIDES,
}
"""Columns without which no row of the shape can be used."""

COLUMNS = frozenset(name for columns in _NEEDED.values() for c in columns for name in c.split("|")) | {
    "tools", "chat_template_kwargs", "input", "system", "history",
}  # fmt: skip
"""Columns that are read, beside those of annotators; others are ignored, but for `IMAGE_COLUMNS`, which are refused."""

assert set(_NEEDED) == set(DATA_SHAPES) == {*_PARSERS, "scored"}


def _said(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def _sides(response: Text, is_good: bool) -> tuple[list[Text], list[Text]]:
    return ([response], []) if is_good else ([], [response])


def _system(row: Mapping[str, Any], row_id: str) -> list[Message]:
    system = optional_text(row, "system", row_id)
    return [{"role": "system", "content": system}] if system.strip() else []


def _instruction(row: Mapping[str, Any], row_id: str) -> list[Message]:
    """The turns of an Alpaca row: system, history, and the instruction with its input on the next line."""
    turns = _system(row, row_id)
    for i, pair in enumerate(row.get("history") or [], 1):
        if not isinstance(pair, list) or len(pair) != 2:
            problem = f"column 'history', round {i}: expected [question, answer], got {shown(pair)}"
            raise DataError(problem, row_id, "wrong type")
        asked, answered = (text_of({"history": each}, "history", row_id) for each in pair)
        turns += [{"role": "user", "content": asked}, *_said(answered)]
    question = text_of(
        row, "question" if "instruction" not in row and "question" in row else "instruction", row_id
    )
    parts = [part for part in (question, optional_text(row, "input", row_id)) if part.strip()]
    if not parts:
        raise DataError("column 'instruction': expected text, it is empty", row_id, "empty prompt")
    return [*turns, {"role": "user", "content": "\n".join(parts)}]


def _is_transcript(text: str) -> bool:
    return text.startswith("\n\nHuman:")


def _split_transcript(text: str, side: str, row_id: str) -> tuple[list[Message], list[Message]]:
    if not text.strip():
        raise DataError(f"column {side!r}: expected a transcript, got {shown(text)}", row_id, f"empty {side}")
    if not _is_transcript(text):
        problem = f"column {side!r}: expected a transcript that begins '\\n\\nHuman:', got {shown(text)}"
        raise DataError(problem, row_id, "another shape")
    _, *pieces = _TURN.split(text)
    speakers, contents = pieces[0::2], pieces[1::2]
    turns = [
        {"role": _HH_ROLES[who], "content": said.strip()}
        for who, said in zip(speakers, contents, strict=True)
    ]
    if turns[-1]["role"] != "assistant":
        problem = (
            f"column {side!r}: expected a transcript that ends with an Assistant turn, got a Human turn last"
        )
        raise DataError(problem, row_id, "wrong role")
    return turns[:-1], turns[-1:]
