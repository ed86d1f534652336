"""What the columns of a row hold: text, messages, labels, tools; each read by one function or refused by name."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from infopo.errors import DataError

if TYPE_CHECKING:
    from infopo.records import Message, Text

ROLES = ("system", "user", "assistant", "tool")

_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
    "function_call": "assistant",
} | {role: role for role in ROLES}

_TRUE, _FALSE = (True, "true", "1"), (False, "false", "0")


def has_value(row: Mapping[str, Any], column: str) -> bool:
    """Whether the column is there and not null: columnar files fill what a row lacks with null."""
    return row.get(column) is not None


def value_of(row: Mapping[str, Any], column: str, row_id: str) -> Any:
    """What the column holds.

    Raises:
        DataError: `missing column`, `null value`.
    """
    if column not in row:
        found = ", ".join(map(str, row)) or "none"
        raise DataError(
            f"expected a column {column!r}; columns are: {reprlib.repr(found)}", row_id, "missing column"
        )
    if row[column] is None:
        raise DataError(f"column {column!r}: expected a value, got null", row_id, "null value")
    return row[column]


def text_of(row: Mapping[str, Any], column: str, row_id: str) -> str:
    """The column's text.

    Raises:
        DataError: As `value_of`; `wrong type`, `invalid UTF-8`.
    """
    return as_text(value_of(row, column, row_id), f"column {column!r}", row_id)


def optional_text(row: Mapping[str, Any], column: str, row_id: str) -> str:
    """The column's text, empty where it is missing or null.

    Raises:
        DataError: `wrong type`, `invalid UTF-8`.
    """
    return text_of(row, column, row_id) if has_value(row, column) else ""


def as_text(value: object, where: str, row_id: str) -> str:
    """The value, if it is text that can be encoded.

    Raises:
        DataError: `wrong type`, `invalid UTF-8`.
    """
    if not isinstance(value, str):
        raise DataError(f"{where}: expected text, got {shown(value)}", row_id, "wrong type")
    return _check_encodable(value, where, row_id)


def list_of(row: Mapping[str, Any], column: str, row_id: str, what: str) -> list[Any]:
    """The column's list.

    Args:
        row: The row.
        column: Name of the column.
        row_id: Name of the row in errors.
        what: What the list holds, for the error.

    Raises:
        DataError: As `value_of`; `wrong type`.
    """
    value = value_of(row, column, row_id)
    if not isinstance(value, list):
        raise DataError(
            f"column {column!r}: expected a list of {what}, got {shown(value)}", row_id, "wrong type"
        )
    return value


def messages_of(row: Mapping[str, Any], column: str, row_id: str) -> list[Message]:
    """The column's messages {role, content}.

    Raises:
        DataError: As `value_of`; `wrong type`, `wrong role`, `message without content`, `images`, `invalid UTF-8`.
    """
    items = list_of(row, column, row_id, "messages")
    return [_message(item, f"column {column!r}, message {i}", row_id) for i, item in enumerate(items, 1)]


def sharegpt_of(row: Mapping[str, Any], column: str, row_id: str) -> list[Message]:
    """The column's turns as messages: one or a list of them, each {from, value} or {role, content}.

    Raises:
        DataError: As `messages_of`; `invalid JSON` for a function call.
    """
    value = value_of(row, column, row_id)
    items = [value] if isinstance(value, Mapping) else list_of(row, column, row_id, "turns")
    return [_turn(item, f"column {column!r}, turn {i}", row_id) for i, item in enumerate(items, 1)]


def prompt_of(row: Mapping[str, Any], row_id: str) -> Text:
    """The column `prompt`, as text or messages.

    Raises:
        DataError: As `text_of` and `messages_of`; `empty prompt`.
    """
    if not isinstance(row.get("prompt"), list):
        return text_of(row, "prompt", row_id)
    prompt = messages_of(row, "prompt", row_id)
    if not prompt:
        problem = "column 'prompt': expected at least one message, got an empty list"
        raise DataError(problem, row_id, "empty prompt")
    return prompt


def responses_of(row: Mapping[str, Any], column: str, prompt: Text, row_id: str) -> list[Text]:
    """The column's responses: texts to a prompt of text, lists of messages to a prompt of messages.

    Raises:
        DataError: As `list_of`, `as_text` and `messages_of`.
    """
    chat = isinstance(prompt, list)
    items = list_of(row, column, row_id, "lists of messages" if chat else "texts")
    return [_response(item, chat, f"{column}, response {i}", row_id) for i, item in enumerate(items, 1)]


def _response(item: Any, chat: bool, name: str, row_id: str) -> Text:
    return messages_of({name: item}, name, row_id) if chat else text_of({name: item}, name, row_id)


def label_of(row: Mapping[str, Any], column: str, row_id: str) -> bool:
    """Whether the response is a good one: true or false, 1 or 0, or these as text (CSV knows nothing else).

    Raises:
        DataError: As `value_of`; `wrong type`.
    """
    value = value_of(row, column, row_id)
    key = value.strip().lower() if isinstance(value, str) else value
    if key in _TRUE or key in _FALSE:  # 1 == True
        return key in _TRUE
    raise DataError(f"column {column!r}: expected true or false, got {shown(value)}", row_id, "wrong type")


def tools_of(row: Mapping[str, Any], row_id: str) -> list[Any] | None:
    """Tool schemas; JSON text is accepted because columnar files cannot hold schemas of different form.

    Raises:
        DataError: `invalid JSON`, `wrong type`.
    """
    tools = row.get("tools")
    if isinstance(tools, str):
        if not tools.strip():  # LLaMA-Factory's way to say that there are none
            return None
        tools = _parsed(tools, "column 'tools': expected a JSON list", row_id)
    if tools is not None and not isinstance(tools, list):
        raise DataError(
            f"column 'tools': expected a list of schemas, got {shown(tools)}", row_id, "wrong type"
        )
    # An empty list makes some templates (Llama's) write the introduction to tools.
    return tools or None


def chat_template_kwargs_of(row: Mapping[str, Any], row_id: str) -> dict[str, Any]:
    """Arguments for the chat template, without those that are null.

    Raises:
        DataError: `wrong type`.
    """
    kwargs = row.get("chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        problem = f"column 'chat_template_kwargs': expected an object, got {shown(kwargs)}"
        raise DataError(problem, row_id, "wrong type")
    return {key: value for key, value in (kwargs or {}).items() if value is not None}


def _message(item: object, where: str, row_id: str) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(f"{where}: expected {{role, content}}, got {shown(item)}", row_id, "wrong type")
    # Columnar files fill the keys that other messages have with null; templates would render "None".
    message = {key: value for key, value in item.items() if value is not None}
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        hint = (
            "; turns of 'from' and 'value' (ShareGPT) stand in 'conversations'" if "from" in message else ""
        )
        raise DataError(
            f"{where}: expected role {', '.join(ROLES)}, got {shown(role)}{hint}", row_id, "wrong role"
        )
    if content is None and not (role == "assistant" and message.get("tool_calls")):
        raise DataError(f"{where}: expected content, got none", row_id, "message without content")
    if _holds_image(content):
        raise DataError(f"{where}: images are not supported; expected text only", row_id, "images")
    if content is not None and not isinstance(content, str):
        raise DataError(f"{where}: expected content as text, got {shown(content)}", row_id, "wrong type")
    _check_encodable(content or "", where, row_id)
    return message


def _holds_image(content: object) -> bool:
    parts = content if isinstance(content, list) else []
    return any(isinstance(p, Mapping) and p.get("type") in ("image", "image_url") for p in parts)


def _turn(item: object, where: str, row_id: str) -> Message:
    """A turn of ShareGPT as a message; one that is a message already is judged as such."""
    if not isinstance(item, Mapping) or not has_value(item, "from"):
        return _message(item, where, row_id)
    speaker = item["from"]
    if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
        known = ", ".join(_SHAREGPT_ROLES)
        raise DataError(f"{where}: expected 'from' to be {known}, got {shown(speaker)}", row_id, "wrong role")
    if speaker == "function_call":
        call = _parsed(item.get("value"), f"{where}: expected a function call as JSON", row_id)
        calls = [
            {"type": "function", "function": each} for each in (call if isinstance(call, list) else [call])
        ]
        return {"role": "assistant", "tool_calls": calls}
    return _message({"role": _SHAREGPT_ROLES[speaker], "content": item.get("value")}, where, row_id)


def _parsed(text: object, expected: str, row_id: str) -> Any:
    try:
        return json.loads(text)  # type: ignore[arg-type]
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{expected}, got {shown(text)}", row_id, "invalid JSON") from error


def _check_encodable(text: str, where: str, row_id: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        problem = f"{where}: character {error.start + 1} is half of a surrogate pair, not Unicode text"
        raise DataError(problem, row_id, "invalid UTF-8") from error
    return text


def kind(value: object) -> str:
    """Type of a value in the words of data files."""
    return {str: "text", list: "a list", type(None): "null"}.get(type(value), type(value).__name__)


def shown(value: object) -> str:
    """Type and beginning of a value, for errors."""
    return f"{kind(value)} {reprlib.repr(value)}" if value is not None else "null"
