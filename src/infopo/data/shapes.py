"""What one dataset row may look like, and what is wrong with it when it does not. Imports no torch.

Shapes and columns are TRL's. Each parser takes a row apart into prompt, chosen and rejected, or raises `DataError`
with the name of the fault: `missing column`, `null value`, `wrong type`, `wrong role`, `message without content`,
`empty prompt`, `empty chosen`, `empty rejected`, `chosen = rejected`, `no common prompt`, `invalid UTF-8`, `images`,
`not an object`, `another shape`.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from infopo.errors import DataError

if TYPE_CHECKING:
    from infopo.records import Message, Text

COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")
"""Columns that are read; others are ignored, but for `IMAGE_COLUMNS`, which are refused."""

IMAGE_COLUMNS = ("image", "images")

ROLES = ("system", "user", "assistant", "tool")

_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


class RowParts(NamedTuple):
    """A row taken apart; becomes a `PreferenceRow`."""

    prompt: Text
    chosen: Text
    rejected: Text
    tools: list[Any] | None
    chat_template_kwargs: dict[str, Any]


def detect_shape(row: Mapping[str, Any], row_id: str = "row") -> str:
    """Name of the row's shape: which columns it has, and whether they hold text or messages.

    A row of whole conversations whose `prompt` is text is `conversational_implicit`, as in TRL.

    Raises:
        DataError: No shape has these columns and types.
    """
    chosen, rejected = _value(row, "chosen", row_id), _value(row, "rejected", row_id)
    prompt = _value(row, "prompt", row_id) if "prompt" in row else None
    if isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(prompt, str):
            return "standard"
        if prompt is None:
            return "hh" if _is_transcript(chosen) or _is_transcript(rejected) else "standard_implicit"
    if isinstance(chosen, list) and isinstance(rejected, list):
        if isinstance(prompt, list):
            return "conversational"
        if prompt is None or isinstance(prompt, str):
            return "conversational_implicit"
    kinds = ", ".join(
        f"{name}: {_kind(row[name])}" for name in ("prompt", "chosen", "rejected") if name in row
    )
    raise DataError(f"expected all text or all lists of messages, got {kinds}", row_id, "wrong type")


def parse_row(row: object, shape: str, row_id: str) -> RowParts:
    """Takes a row of the named shape apart, and judges it.

    Args:
        row: What the file holds: an object with `COLUMNS`.
        shape: A name of `DATA_SHAPES`.
        row_id: Name of the row in errors.

    Raises:
        DataError: The row cannot be used; see the module's list of reasons.
    """
    row = check_object(row, row_id)
    for name in IMAGE_COLUMNS:
        if row.get(name) not in (None, []):
            raise DataError(
                f"column {name!r}: images are not supported; expected text only", row_id, "images"
            )
    prompt, chosen, rejected = _PARSERS[shape](row, row_id)
    _check_responses(prompt, chosen, rejected, row_id)
    return RowParts(prompt, chosen, rejected, _tools(row, row_id), _chat_template_kwargs(row, row_id))


def check_object(row: object, row_id: str) -> Mapping[str, Any]:
    """The row, if it is an object with columns.

    Raises:
        DataError: It is anything else.
    """
    if isinstance(row, Mapping):
        return row
    raise DataError(f"expected an object with columns, got {_shown(row)}", row_id, "not an object")


def _standard(row: Mapping[str, Any], row_id: str) -> tuple[Text, Text, Text]:
    return _text(row, "prompt", row_id), _text(row, "chosen", row_id), _text(row, "rejected", row_id)


def _standard_implicit(row: Mapping[str, Any], row_id: str) -> tuple[Text, Text, Text]:
    chosen, rejected = _text(row, "chosen", row_id), _text(row, "rejected", row_id)
    _check_not_blank(chosen, rejected, row_id)
    end = _common_prefix(chosen, rejected)
    # As in TRL's extract_prompt: the space before a response belongs to it, because tokenizers merge it into the word.
    if end and end < min(len(chosen), len(rejected)) and chosen[end - 1] == " ":
        end -= 1
    if not end:
        _refuse_no_common_prompt(f"chosen begins {_shown(chosen)}, rejected {_shown(rejected)}", row_id)
    return chosen[:end], chosen[end:], rejected[end:]


def _conversational(row: Mapping[str, Any], row_id: str) -> tuple[Text, Text, Text]:
    prompt = _messages(row, "prompt", row_id)
    if not prompt:
        raise DataError(
            "column 'prompt': expected at least one message, got an empty list", row_id, "empty prompt"
        )
    return prompt, _messages(row, "chosen", row_id), _messages(row, "rejected", row_id)


def _conversational_implicit(row: Mapping[str, Any], row_id: str) -> tuple[Text, Text, Text]:
    chosen, rejected = _messages(row, "chosen", row_id), _messages(row, "rejected", row_id)
    _check_not_blank(chosen, rejected, row_id)
    end = _common_prefix(chosen, rejected)
    if not end:
        _refuse_no_common_prompt("the conversations differ in their first message", row_id)
    return chosen[:end], chosen[end:], rejected[end:]


def _hh(row: Mapping[str, Any], row_id: str) -> tuple[Text, Text, Text]:
    """The response is the last Assistant turn, the prompt all before it: the data set's own convention."""
    chosen_prompt, chosen = _split_transcript(_text(row, "chosen", row_id), "chosen", row_id)
    rejected_prompt, rejected = _split_transcript(_text(row, "rejected", row_id), "rejected", row_id)
    if chosen_prompt != rejected_prompt:
        turn = _common_prefix(chosen_prompt, rejected_prompt) + 1
        _refuse_no_common_prompt(f"turn {turn} differs, and it is not the last", row_id)
    return chosen_prompt, chosen, rejected


_PARSERS: Mapping[str, Callable[[Mapping[str, Any], str], tuple[Text, Text, Text]]] = {
    "standard": _standard,
    "standard_implicit": _standard_implicit,
    "conversational": _conversational,
    "conversational_implicit": _conversational_implicit,
    "hh": _hh,
}


def _is_transcript(text: str) -> bool:
    return text.startswith("\n\nHuman:")


def _split_transcript(text: str, side: str, row_id: str) -> tuple[list[Message], list[Message]]:
    if not text.strip():
        raise DataError(
            f"column {side!r}: expected a transcript, got {_shown(text)}", row_id, f"empty {side}"
        )
    if not _is_transcript(text):
        problem = f"column {side!r}: expected a transcript that begins '\\n\\nHuman:', got {_shown(text)}"
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


def _check_responses(prompt: Text, chosen: Text, rejected: Text, row_id: str) -> None:
    _check_not_blank(chosen, rejected, row_id)
    if isinstance(prompt, list):
        if prompt[-1]["role"] == "assistant":
            problem = "the prompt's last turn: expected user or tool, got 'assistant'"
            raise DataError(problem, row_id, "wrong role")
        _check_response_roles(chosen, "chosen", row_id)
        _check_response_roles(rejected, "rejected", row_id)
    if chosen == rejected:
        raise DataError(
            f"expected two different responses, both are {_shown(chosen)}", row_id, "chosen = rejected"
        )


def _check_not_blank(chosen: Text, rejected: Text, row_id: str) -> None:
    for side, response in (("chosen", chosen), ("rejected", rejected)):
        if _is_blank(response):
            problem = f"expected a {side} response, it is empty ({_shown(response)})"
            raise DataError(problem, row_id, f"empty {side}")


def _is_blank(response: Text) -> bool:
    """Nothing was said, and no tool was called, in the turn that ends the response."""
    if isinstance(response, str):
        return not response.strip()
    if not response:
        return True
    last = response[-1]
    return last["role"] == "assistant" and not last.get("content", "").strip() and not last.get("tool_calls")


def _check_response_roles(response: Text, side: str, row_id: str) -> None:
    """A response is spoken by the assistant; what tools answer may come between its turns."""
    roles = [message["role"] for message in response if isinstance(message, dict)]
    if roles[0] != "assistant" or roles[-1] != "assistant" or not {"assistant", "tool"}.issuperset(roles):
        problem = f"{side} response: expected assistant turns (with tool turns between them), got {', '.join(roles)}"
        raise DataError(problem, row_id, "wrong role")


def _refuse_no_common_prompt(detail: str, row_id: str) -> None:
    problem = f"expected chosen and rejected to begin with the same prompt: {detail}"
    raise DataError(problem, row_id, "no common prompt")


def _common_prefix(a: Text, b: Text) -> int:
    """Number of leading characters or messages that two responses share.

    Where one side is the beginning of the other, it is all prompt, and its response is empty. (TRL's extract_prompt
    hands the last shared character or message back to both responses there.)
    """
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))


def _value(row: Mapping[str, Any], column: str, row_id: str) -> Any:
    if column not in row:
        found = ", ".join(map(str, row)) or "none"
        raise DataError(
            f"expected a column {column!r}; columns are: {reprlib.repr(found)}", row_id, "missing column"
        )
    if row[column] is None:
        raise DataError(f"column {column!r}: expected a value, got null", row_id, "null value")
    return row[column]


def _text(row: Mapping[str, Any], column: str, row_id: str) -> str:
    value = _value(row, column, row_id)
    if not isinstance(value, str):
        raise DataError(f"column {column!r}: expected text, got {_shown(value)}", row_id, "wrong type")
    return _check_encodable(value, f"column {column!r}", row_id)


def _messages(row: Mapping[str, Any], column: str, row_id: str) -> list[Message]:
    value = _value(row, column, row_id)
    if not isinstance(value, list):
        raise DataError(
            f"column {column!r}: expected a list of messages, got {_shown(value)}", row_id, "wrong type"
        )
    return [_message(item, f"column {column!r}, message {i}", row_id) for i, item in enumerate(value, 1)]


def _message(item: object, where: str, row_id: str) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(f"{where}: expected {{role, content}}, got {_shown(item)}", row_id, "wrong type")
    # Columnar files fill the keys that other messages have with null; templates would render "None".
    message = {key: value for key, value in item.items() if value is not None}
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        hint = "; rename 'from' and 'value' (ShareGPT) to 'role' and 'content'" if "from" in message else ""
        raise DataError(
            f"{where}: expected role {', '.join(ROLES)}, got {_shown(role)}{hint}", row_id, "wrong role"
        )
    if content is None and not (role == "assistant" and message.get("tool_calls")):
        raise DataError(f"{where}: expected content, got none", row_id, "message without content")
    if content is not None and not isinstance(content, str):
        raise DataError(f"{where}: expected content as text, got {_shown(content)}", row_id, "wrong type")
    _check_encodable(content or "", where, row_id)
    return message


def _check_encodable(text: str, where: str, row_id: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        problem = f"{where}: character {error.start + 1} is half of a surrogate pair, not Unicode text"
        raise DataError(problem, row_id, "invalid UTF-8") from error
    return text


def _tools(row: Mapping[str, Any], row_id: str) -> list[Any] | None:
    """Tool schemas; JSON text is accepted because columnar files cannot hold schemas of different form."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"column 'tools': expected a JSON list, got {_shown(tools)}", row_id, "invalid JSON"
            ) from error
    if tools is not None and not isinstance(tools, list):
        raise DataError(
            f"column 'tools': expected a list of schemas, got {_shown(tools)}", row_id, "wrong type"
        )
    # An empty list makes some templates (Llama's) write the introduction to tools.
    return tools or None


def _chat_template_kwargs(row: Mapping[str, Any], row_id: str) -> dict[str, Any]:
    kwargs = row.get("chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        problem = f"column 'chat_template_kwargs': expected an object, got {_shown(kwargs)}"
        raise DataError(problem, row_id, "wrong type")
    return {key: value for key, value in (kwargs or {}).items() if value is not None}


def _kind(value: object) -> str:
    return {str: "text", list: "a list", type(None): "null"}.get(type(value), type(value).__name__)


def _shown(value: object) -> str:
    return f"{_kind(value)} {reprlib.repr(value)}" if value is not None else "null"
