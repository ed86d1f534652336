"""Conversations of a row: messages of {role, content}, turns of ShareGPT, content in parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from infopo.data.columns import as_text, check_encodable, has_value, list_of, parsed, shown, text_of, value_of
from infopo.errors import DataError

if TYPE_CHECKING:
    from infopo.records import Message, Text

ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")
"""Roles of messages: those that chat templates know. `ipython` is Llama 3.1's name for a tool, `developer` gpt-oss's
for a system."""

SYSTEM_ROLES = ("system", "developer")
OTHERS_ROLES = ("tool", "ipython", "user")
"""Roles of those who answer the policy within a response."""

_TEXT_PARTS = (None, "text", "input_text", "output_text")
"""Types of parts that hold text: those of transformers, and of OpenAI's interfaces."""


SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool_response": "tool",
} | {role: role for role in ROLES}
"""Roles by the names that turns of {from, value} bear, and messages of ms-swift (the last two)."""

_CALLS = ("function_call", "tool_call")
"""Names of turns whose text is a tool call, as JSON."""


def messages_of(row: Mapping[str, Any], column: str, row_id: str) -> list[Message]:
    """The column's messages {role, content}.

    Raises:
        DataError: As `value_of`; `wrong type`, `wrong role`, `message without content`, `images`, `invalid UTF-8`.
    """
    return _turns(list_of(row, column, row_id, "messages"), f"column {column!r}, message", row_id)


def answer_of(row: Mapping[str, Any], column: str, row_id: str) -> list[Message]:
    """The column's messages of a response: text is one turn of the assistant, as are turns of ShareGPT.

    Raises:
        DataError: As `sharegpt_of`.
    """
    if isinstance(row.get(column), str):
        return said(text_of(row, column, row_id))
    return sharegpt_of(row, column, row_id)


def said(text: str) -> list[Message]:
    """The text as a turn of the assistant."""
    return [{"role": "assistant", "content": text}]


def asked(text: str) -> list[Message]:
    """The text as a turn of the user."""
    return [{"role": "user", "content": text}]


def sharegpt_of(row: Mapping[str, Any], column: str, row_id: str) -> list[Message]:
    """The column's turns as messages: one or a list of them, each {from, value} or {role, content}.

    Raises:
        DataError: As `messages_of`; `invalid JSON` for a function call.
    """
    value = value_of(row, column, row_id)
    items = [value] if isinstance(value, Mapping) else list_of(row, column, row_id, "turns")
    return _turns(items, f"column {column!r}, turn", row_id)


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
    return answer_of({name: item}, name, row_id) if chat else text_of({name: item}, name, row_id)


def _message(item: object, where: str, row_id: str) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(f"{where}: expected {{role, content}}, got {shown(item)}", row_id, "wrong type")
    # Columnar files fill the keys that other messages have with null; templates would render "None".
    message = {key: value for key, value in item.items() if value is not None}
    # Some templates write a list of calls if there is the key, so that an empty one is left out.
    if calls := _calls(message.pop("tool_calls", None), where, row_id):
        message["tool_calls"] = calls
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"{where}: expected role {', '.join(ROLES)}, got {shown(role)}", row_id, "wrong role")
    if content is None and not (role == "assistant" and message.get("tool_calls")):
        raise DataError(f"{where}: expected content, got none", row_id, "message without content")
    if content is not None:
        message["content"] = _content(content, where, row_id)
    return message


def _calls(calls: object, where: str, row_id: str) -> list[Any]:
    """The tool calls of a message: a list of objects, or JSON text of it, because columnar files hold one form only."""
    expected = f"{where}: 'tool_calls': expected a list of calls"
    if isinstance(calls, str):
        calls = parsed(calls, expected, row_id) if calls.strip() else None
    if calls is None:
        return []
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise DataError(f"{expected}, got {shown(calls)}", row_id, "wrong type")
    return calls


def _content(content: object, where: str, row_id: str) -> str:
    """Text, or the text of content in parts, one part after the other.

    Templates that know parts write those of text one after the other too; others could not render a list.
    """
    if isinstance(content, list):
        content = "".join([_part(part, f"{where}, part {i}", row_id) for i, part in enumerate(content, 1)])
    if not isinstance(content, str):
        raise DataError(f"{where}: expected content as text, got {shown(content)}", row_id, "wrong type")
    return check_encodable(content, where, row_id)


def _part(part: object, where: str, row_id: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise DataError(f"{where}: expected {{type, text}}, got {shown(part)}", row_id, "wrong type")
    kind_of_part = part.get("type")
    if kind_of_part not in _TEXT_PARTS:
        problem = (
            f"{where}: images and sound are not supported; expected type text, got {shown(kind_of_part)}"
        )
        raise DataError(problem, row_id, "images")
    if any(part.get(key) is not None for key in ("image", "image_url", "audio", "video")):
        raise DataError(f"{where}: images are not supported; expected text only", row_id, "images")
    text = part.get("text") if part.get("text") is not None else part.get("value")  # LLaMA-Factory's v1
    return as_text(text, f"{where}: 'text'", row_id)


def _turns(items: list[Any], where: str, row_id: str) -> list[Message]:
    """Turns as messages. A call with the role `tool_call` joins the assistant's message before it, as in ms-swift."""
    messages: list[Message] = []
    for i, item in enumerate(items, 1):
        message = _turn(item, f"{where} {i}", row_id)
        is_call = isinstance(item, Mapping) and "tool_call" in (item.get("role"), item.get("from"))
        if is_call and messages and messages[-1]["role"] == "assistant":
            before = messages.pop()
            message = {**before, "tool_calls": [*before.get("tool_calls", []), *message["tool_calls"]]}
        messages.append(message)
    return messages


def _turn(item: object, where: str, row_id: str) -> Message:
    """A turn of ShareGPT or ms-swift as a message; one that is a message already is judged as such."""
    if isinstance(item, Mapping) and item.get("role") in ("tool_call", "tool_response"):
        item = {
            **{key: value for key, value in item.items() if key not in ("role", "content")},
            "from": item["role"],
            "value": item.get("content"),
        }
    if not isinstance(item, Mapping) or not has_value(item, "from"):
        return _message(item, where, row_id)
    speaker = item["from"]
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        known = ", ".join(SHAREGPT_ROLES)
        raise DataError(f"{where}: expected 'from' to be {known}, got {shown(speaker)}", row_id, "wrong role")
    if speaker in _CALLS:
        value = item.get("value")
        expected = f"{where}: expected a function call as JSON"
        call = value if isinstance(value, Mapping | list) else parsed(value, expected, row_id)
        calls = [
            {"type": "function", "function": each} for each in (call if isinstance(call, list) else [call])
        ]
        return {"role": "assistant", "tool_calls": calls}
    others = {key: value for key, value in item.items() if key not in ("from", "value")}
    return _message({**others, "role": SHAREGPT_ROLES[speaker], "content": item.get("value")}, where, row_id)
