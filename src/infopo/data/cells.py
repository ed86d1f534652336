"""What files do to values that they cannot hold: conversations written as text into a cell, nulls for absent keys."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from infopo.data.messages import SHAREGPT_ROLES
from infopo.errors import DataError

CELLS = (
    "prompt", "chosen", "rejected", "completion", "completions", "messages", "conversations", "history", "context",
    "responses", "answers", "input", "preferred_output", "non_preferred_output", "rejected_messages",
    "rejected_response", "conversation_a", "conversation_b", "info", "summaries", "question",
)  # fmt: skip
"""Columns that may hold a conversation, or a list of such, and are opened where they hold the text of one."""

_LISTS = ("completions", "answers", "history", "info", "summaries", "responses")
"""Those of them that hold lists or objects and never text of their own: any JSON in them is opened."""

_NESTED = ("tools", "chat_template_kwargs")

_SPEAKS = (("role", "content"), ("from", "value"), ("role", "tool_calls"))
"""Keys that make an object a turn of a conversation: who speaks, and what is said."""

_BEGINS_AS_TURNS = re.compile(
    r"""(?:array\()?[\[{(]\s*(?:array\()?[\[{]*\s*["'](?:role|from|content|value|messages)["']\s*:"""
)
_SPEAKER = re.compile(rf"""["'](?:role|from)["']\s*:\s*["'](?:{"|".join(SHAREGPT_ROLES)})["']""")
_WEBGPT = re.compile(r"""["']full_text["']\s*:""")
_LONGEST_LITERAL = 2**20
"""Characters of a Python literal: its parser takes a hundred times the memory of the text."""


def open_cells(row: Mapping[str, Any], row_id: str) -> Mapping[str, Any]:
    """The row, with conversations that stand in text cells in place of their text.

    JSON and Python's own notation (what pandas writes into CSV) are read; so is `{"messages": [...]}`. Text that only
    looks like a list stays text: a conversation is a list of objects with role and content, or from and value.

    Raises:
        DataError: `conversation as text`: the text begins as a conversation does, but cannot be read as one.
    """
    opened = {
        column: _opened(row[column], column, row_id)
        for column in CELLS
        if isinstance(row.get(column), str | list | Mapping)
    }
    changed = {column: value for column, value in opened.items() if value is not row[column]}
    return {**row, **changed} if changed else row


def lists_in_text(row: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Both sides of a row as lists of responses, if the text of each is a JSON list; else nothing.

    A file of text cells, such as CSV, has no other way to hold lists. But a list may also be what the policy is to
    write, so only the user can tell which it is.

    Example:
        >>> lists_in_text({"chosen": '["a", "b"]', "rejected": "[]"})
        {'chosen': ['a', 'b'], 'rejected': []}
        >>> lists_in_text({"chosen": '["a"]', "rejected": "b"})
        {}
    """
    lists = {}
    for side in ("chosen", "rejected"):
        text = row.get(side)
        if not isinstance(text, str) or text.strip()[:1] != "[":
            return {}
        try:
            lists[side] = json.loads(text)
        except (ValueError, RecursionError):
            return {}
    return lists


def _opened(value: Any, column: str, row_id: str) -> Any:
    if isinstance(value, str):
        value = _conversation(value, column, row_id)
    elif isinstance(value, list) and any(isinstance(item, str) and item[:1] in "[{" for item in value):
        items = [_conversation(item, column, row_id) if isinstance(item, str) else item for item in value]
        if all(_is_conversation(item) and text[:1] == "{" for item, text in zip(items, value, strict=True)):
            return [turn for item in items for turn in item]  # each text held a turn
        if any(new is not old for new, old in zip(items, value, strict=True)):
            value = items
    if isinstance(value, Mapping) and isinstance(value.get("messages"), list) and column != "input":
        return value["messages"]
    return value


def _conversation(text: str, column: str, row_id: str) -> Any:
    """The conversation that the text stands for, or the text itself where it is none."""
    stripped = text.strip()
    is_broken_or_turns = _BEGINS_AS_TURNS.match(stripped) and _SPEAKER.search(stripped)
    is_enclosed = stripped[:1] in ("[", "{") and stripped[-1:] in ("]", "}")
    is_object = column in _LISTS or _SPEAKER.search(stripped) or _WEBGPT.search(stripped)
    if not is_broken_or_turns and not (is_enclosed and is_object):
        return text
    value = _parsed(stripped)
    if _is_conversation(value) or (column in _LISTS and isinstance(value, list | dict)):
        return value
    if isinstance(value, dict) and _is_conversation(value.get("messages")):
        return value
    if _is_conversation([value]):
        return value if column in ("chosen", "rejected") else [value]
    if isinstance(value, dict) and column == "question" and isinstance(value.get("full_text"), str):
        return value  # WebGPT
    if value is None and is_broken_or_turns:
        problem = (
            f"column {column!r}: expected a conversation or text, got the text of a conversation that cannot be "
            f"read ({text[:60]!r}...); write it as JSON, or keep it as lists in JSON lines or Parquet"
        )
        raise DataError(problem, row_id, "conversation as text")
    return text


def _parsed(text: str) -> Any:
    """What JSON or a Python literal stands for; None where it is neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if len(text) > _LONGEST_LITERAL:
        return None
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None
    return list(value) if isinstance(value, tuple) else value


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and any(
        isinstance(value.get(who), str) and what in value for who, what in _SPEAKS
    )


def _is_conversation(value: Any) -> bool:
    """A list of turns, one of which at least is spoken by somebody known, or a list of such lists."""
    if not isinstance(value, list) or not value:
        return False
    if all(map(_is_turn, value)):
        return any(turn.get("role", turn.get("from")) in SHAREGPT_ROLES for turn in value)
    return all(isinstance(item, list) and _is_conversation(item) for item in value)


def without_nulls(row: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The row without the keys that a columnar file added, and whether tools or calls had any.

    In such a file objects of one column all have the same keys, and those that an object lacked are null. So keys that
    are null are left out at every depth; a null that the data meant (`"default": null`) cannot be told from these, and
    goes with them. Nulls in lists, and columns of the row itself, stay.
    """
    found = [False]
    pruned = {
        column: _pruned(value, found, column in _NESTED) if isinstance(value, list | dict) else value
        for column, value in row.items()
    }
    return pruned, found[0]


def _pruned(value: Any, found: list[bool], counts: bool) -> Any:
    if isinstance(value, list):
        return [_pruned(item, found, counts) if isinstance(item, list | dict) else item for item in value]
    kept = {}
    for key, item in value.items():
        if item is None:
            found[0] = found[0] or counts
        elif isinstance(item, list | dict):
            kept[key] = _pruned(item, found, counts or key in ("tools", "tool_calls"))
        else:
            kept[key] = item
    return kept
