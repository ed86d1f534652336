"""Recognises the shape of a dataset row, and takes it apart or says what is wrong with it. Imports no torch.

Shapes are those of TRL, of LLaMA-Factory and Axolotl (ShareGPT, Alpaca), and of data sets that are used as they were
published. `docs/data.md` shows a row of each. Each parser takes a row apart into prompt, chosen and rejected responses,
or raises `DataError` with the name of the fault: `missing column`, `null value`, `wrong type`, `wrong role`, `message
without content`, `empty prompt`, `empty chosen`, `empty rejected`, `chosen = rejected`, `no common prompt`, `invalid
UTF-8`, `invalid JSON`, `images`, `not an object`, `another shape`, `no responses`, `scores do not match`, `several
rounds`. A `tie` is no fault: the row is sound, but prefers nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from infopo.catalog import DATA_SHAPES
from infopo.data import published
from infopo.data.columns import (
    chat_template_kwargs_of,
    has_value,
    kind,
    label_of,
    list_of,
    number_of,
    optional_text,
    shown,
    text_of,
    tools_of,
    value_of,
)
from infopo.data.door import check_object
from infopo.data.messages import (
    SYSTEM_ROLES,
    answer_of,
    asked,
    messages_of,
    prompt_of,
    responses_of,
    said,
    sharegpt_of,
)
from infopo.data.published import is_transcript, split, transcript_of
from infopo.data.responses import (
    ScoreRule,
    check_not_blank,
    check_responses,
    common_prefix,
    majority,
    refuse_no_common_prompt,
)
from infopo.data.strays import ANNOTATOR, no_shape
from infopo.errors import DataError
from infopo.vocabulary import IMAGE_COLUMNS, NEEDED, PROMPTS

if TYPE_CHECKING:
    from infopo.records import Message, Text


class RowParts(NamedTuple):
    """The parts of a row, which become a `PreferenceRow`."""

    prompt: Text
    chosen: list[Text]
    rejected: list[Text]
    tools: list[Any] | None
    chat_template_kwargs: dict[str, Any]


def detect_shape(row: Mapping[str, Any], row_id: str = "row") -> str:
    """Returns the name of the row's shape, by its columns and by whether they are text, messages or lists of responses.

    Columns that are null count as missing. Rows with `chosen` and `rejected` are pairs or lists of responses, whatever
    other columns they have. A row of whole conversations whose `prompt` is text is `conversational_implicit`, as in
    TRL.

    Raises:
        DataError: No shape has these columns and types.

    Example:
        >>> detect_shape({"prompt": "1+1=", "chosen": "2", "rejected": "3"})
        'standard'
    """
    if not has_value(row, "chosen") and not has_value(row, "rejected"):
        for shape in _WITHOUT_SIDES:
            if any(_has_all(row, columns) for columns in NEEDED[shape]):
                return shape
    if "chosen" not in row or "rejected" not in row:
        raise no_shape(list(map(str, row)), row_id)
    chosen, rejected = value_of(row, "chosen", row_id), value_of(row, "rejected", row_id)
    if has_value(row, "conversations") or (isinstance(chosen, Mapping) and has_value(row, "messages")):
        return "sharegpt"
    prompt = row.get("prompt")
    if isinstance(prompt, list) and _is_answer(chosen) and _is_answer(rejected):
        return "conversational"
    if isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(prompt, str):
            return "standard"
        is_hh = is_transcript(chosen) or is_transcript(rejected)
        if prompt is None and not is_hh and any(name in row for name in PROMPTS):
            return "alpaca"
        if prompt is None and "prompt" not in row:
            return "hh" if is_hh else "standard_implicit"
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


def _is_answer(value: object) -> bool:
    """Whether the value is one answer of a conversation: text, a turn or turns, and no list of answers."""
    is_turns = isinstance(value, list) and all(isinstance(turn, Mapping) for turn in value)
    return is_turns or isinstance(value, str | Mapping)


def _has_all(row: Mapping[str, Any], columns: tuple[str, ...]) -> bool:
    return all(any(has_value(row, name) for name in column.split("|")) for column in columns)


def parse_row(row: object, shape: str, row_id: str, rule: ScoreRule | None = None) -> RowParts:
    """Takes a row of the named shape apart, and checks it.

    Args:
        row: The row, which should be an object.
        shape: A name of `DATA_SHAPES`.
        row_id: Name of the row in errors.
        rule: Rule by which scored responses are split, or None for the default rule.

    Raises:
        DataError: The row cannot be used, for one of the reasons in the module's list.

    Example:
        >>> parse_row({"prompt": "1+1=", "chosen": "2", "rejected": "3"}, "standard", "pairs.jsonl:1")[:3]
        ('1+1=', ['2'], ['3'])
    """
    row = check_object(row, row_id)
    for name in IMAGE_COLUMNS:
        if row.get(name) not in (None, []):
            raise DataError(
                f"column {name!r}: images are not supported; expected text only", row_id, "images"
            )
    row = published.openai_tools(row) if shape == "openai" else row
    if shape in _SCORED:
        prompt, chosen, rejected = _SCORED[shape](row, row_id, rule or _BY_SCORE)
    else:
        prompt, chosen, rejected = _PARSERS[shape](row, row_id)
    # As in LLaMA-Factory, a conversation that begins with a system turn of its own keeps that one.
    if isinstance(prompt, list) and prompt[0]["role"] not in SYSTEM_ROLES:
        prompt = [*_system(row, row_id), *prompt]
    check_responses(prompt, chosen, rejected, row_id)
    return RowParts(prompt, chosen, rejected, tools_of(row, row_id), chat_template_kwargs_of(row, row_id))


Parts = tuple["Text", list["Text"], list["Text"]]


def _standard(row: Mapping[str, Any], row_id: str) -> Parts:
    prompt = text_of(row, "prompt", row_id)
    return prompt, [text_of(row, "chosen", row_id)], [text_of(row, "rejected", row_id)]


def _standard_implicit(row: Mapping[str, Any], row_id: str) -> Parts:
    chosen, rejected = text_of(row, "chosen", row_id), text_of(row, "rejected", row_id)
    check_not_blank([chosen], [rejected], row_id)
    end = common_prefix(chosen, rejected)
    # As in TRL's extract_prompt, the space before a response is part of it, because tokenizers merge it into the word.
    if end and end < min(len(chosen), len(rejected)) and chosen[end - 1] == " ":
        end -= 1
    if not end:
        refuse_no_common_prompt(f"chosen begins {shown(chosen)}, rejected {shown(rejected)}", row_id)
    return chosen[:end], [chosen[end:]], [rejected[end:]]


def _conversational(row: Mapping[str, Any], row_id: str) -> Parts:
    list_of(row, "prompt", row_id, "messages")
    return (
        prompt_of(row, row_id),
        [answer_of(row, "chosen", row_id)],
        [answer_of(row, "rejected", row_id)],
    )


def _conversational_implicit(row: Mapping[str, Any], row_id: str) -> Parts:
    chosen, rejected = messages_of(row, "chosen", row_id), messages_of(row, "rejected", row_id)
    check_not_blank([chosen], [rejected], row_id)
    end = common_prefix(chosen, rejected)
    if not end:
        refuse_no_common_prompt("the conversations differ in their first message", row_id)
    return chosen[:end], [chosen[end:]], [rejected[end:]]


def _hh(row: Mapping[str, Any], row_id: str) -> Parts:
    """Takes the last Assistant turn as the response and all before it as the prompt, as the data set's authors do."""
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
    return prompt, [answer_of(row, "chosen", row_id)], [answer_of(row, "rejected", row_id)]


def _alpaca(row: Mapping[str, Any], row_id: str) -> Parts:
    chosen, rejected = text_of(row, "chosen", row_id), text_of(row, "rejected", row_id)
    return _instruction(row, row_id), [said(chosen)], [said(rejected)]


def _alpaca_unpaired(row: Mapping[str, Any], row_id: str) -> Parts:
    prompt, response = _instruction(row, row_id), said(text_of(row, "output", row_id))
    return prompt, *_sides(
        response, label_of(row, "kto_tag" if has_value(row, "kto_tag") else "label", row_id)
    )


def _unpaired(row: Mapping[str, Any], row_id: str) -> Parts:
    prompt = prompt_of(row, row_id)
    completion = messages_of if isinstance(prompt, list) else text_of
    return prompt, *_sides(completion(row, "completion", row_id), label_of(row, "label", row_id))


def _unpaired_messages(row: Mapping[str, Any], row_id: str) -> Parts:
    """Takes the last turn as the response and all before it as the prompt, as in LLaMA-Factory."""
    column = "messages" if has_value(row, "messages") or "conversations" not in row else "conversations"
    turns = sharegpt_of(row, column, row_id)
    if len(turns) < 2:
        problem = f"column {column!r}: expected a prompt and a response, got {len(turns)} turns"
        raise DataError(problem, row_id, "empty prompt")
    return turns[:-1], *_sides(turns[-1:], label_of(row, "label", row_id))


def _lists(row: Mapping[str, Any], row_id: str) -> Parts:
    prompt = prompt_of(row, row_id)
    return prompt, responses_of(row, "chosen", prompt, row_id), responses_of(row, "rejected", prompt, row_id)


def _scored(row: Mapping[str, Any], row_id: str, rule: ScoreRule) -> Parts:
    prompt = prompt_of(row, row_id)
    responses = responses_of(row, "responses", prompt, row_id)
    scores = [
        number_of(score, f"column 'scores', score {i}", row_id)
        for i, score in enumerate(list_of(row, "scores", row_id, "numbers"), 1)
    ]
    return prompt, *split(responses, scores, rule, row_id)


def _votes(row: Mapping[str, Any], row_id: str) -> Parts:
    """Takes the response that more than half of the annotators prefer as the chosen one. 0 is a vote for a tie."""
    prompt = _instruction(row, row_id)
    first, second = (said(text_of(row, column, row_id)) for column in ("response1", "response2"))
    columns = sorted(column for column in row if ANNOTATOR.fullmatch(str(column)))
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
    "openai": published.openai,
    "swift": published.swift,
    "compared": published.compared,
}
_SCORED: Mapping[str, Callable[[Mapping[str, Any], str, ScoreRule], Parts]] = {
    "scored": _scored,
    "rated": published.rated,
}
_BY_SCORE = ScoreRule()

_WITHOUT_SIDES = (
    "votes", "openai", "swift", "compared", "rated", "scored", "unpaired", "unpaired_messages", "alpaca_unpaired",
)  # fmt: skip
"""Shapes that have no `chosen` and `rejected`, in the order in which they are tried, the most specific first."""

assert set(NEEDED) == set(DATA_SHAPES) == {*_PARSERS, *_SCORED}


def _sides(response: Text, is_good: bool) -> tuple[list[Text], list[Text]]:
    return ([response], []) if is_good else ([], [response])


def _system(row: Mapping[str, Any], row_id: str) -> list[Message]:
    system = optional_text(row, "system", row_id)
    if not system.strip():
        system = optional_text(row, "system_prompt", row_id)
    return [{"role": "system", "content": system}] if system.strip() else []


def _instruction(row: Mapping[str, Any], row_id: str) -> list[Message]:
    """Returns the turns of an Alpaca row: history, and the instruction with its input on the next line."""
    turns: list[Message] = []
    history = list_of(row, "history", row_id, "rounds") if row.get("history") else []
    for i, pair in enumerate(history, 1):
        if not isinstance(pair, list) or len(pair) != 2:
            problem = f"column 'history', round {i}: expected [question, answer], got {shown(pair)}"
            raise DataError(problem, row_id, "wrong type")
        question, answer = (text_of({"history": text}, "history", row_id) for text in pair)
        turns += [*asked(question), *said(answer)]
    prompts = [name for name in PROMPTS if name in row] or ["instruction"]
    column = next((name for name in prompts if has_value(row, name)), prompts[0])
    if isinstance(row.get(column), list):
        return [*turns, *_turns_of(row, column, row_id)]
    parts = [text_of(row, column, row_id), "" if column == "input" else optional_text(row, "input", row_id)]
    parts = [part for part in parts if part.strip()]
    if not parts:
        raise DataError(f"column {column!r}: expected text, it is empty", row_id, "empty prompt")
    return [*turns, *asked("\n".join(parts))]


def _turns_of(row: Mapping[str, Any], column: str, row_id: str) -> list[Message]:
    if has_value(row, "input") and column != "input":
        problem = f"column 'input': expected none beside turns in {column!r}, got {shown(row['input'])}"
        raise DataError(problem, row_id, "wrong type")
    turns = messages_of(row, column, row_id)
    if not turns:
        raise DataError(f"column {column!r}: expected turns, got an empty list", row_id, "empty prompt")
    return turns


def _split_transcript(text: str, side: str, row_id: str) -> tuple[list[Message], list[Message]]:
    if not text.strip():
        raise DataError(f"column {side!r}: expected a transcript, got {shown(text)}", row_id, f"empty {side}")
    if not is_transcript(text):
        problem = f"column {side!r}: expected a transcript that begins '\\n\\nHuman:', got {shown(text)}"
        raise DataError(problem, row_id, "another shape")
    turns = transcript_of(text)
    if turns[-1]["role"] != "assistant":
        problem = (
            f"column {side!r}: expected a transcript that ends with an Assistant turn, got a Human turn last"
        )
        raise DataError(problem, row_id, "wrong role")
    return turns[:-1], turns[-1:]
