"""What single columns of a row hold: text, lists, labels, tools; each read by one function or refused by name."""

from __future__ import annotations

import contextlib
import json
import math
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from infopo.errors import DataError

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
        problem = f"expected a column {column!r}; columns are: {names(row) or 'none'}"
        raise DataError(problem, row_id, "missing column")
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
    return check_encodable(value, where, row_id)


def list_of(row: Mapping[str, Any], column: str, row_id: str, what: str) -> list[Any]:
    """The column's list; JSON text of one is accepted, for CSV knows nothing else.

    Args:
        row: The row.
        column: Name of the column.
        row_id: Name of the row in errors.
        what: What the list holds, for the error.

    Raises:
        DataError: As `value_of`; `wrong type`.
    """
    value = value_of(row, column, row_id)
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parsed(value, f"column {column!r}: expected a list of {what}", row_id)
    if not isinstance(value, list):
        raise DataError(
            f"column {column!r}: expected a list of {what}, got {shown(value)}", row_id, "wrong type"
        )
    return value


def label_of(row: Mapping[str, Any], column: str, row_id: str) -> bool:
    """Whether the response is a good one: true or false, 1 or 0, or these as text (CSV knows nothing else).

    Raises:
        DataError: As `value_of`; `wrong type`.
    """
    value = value_of(row, column, row_id)
    key = value.strip().lower() if isinstance(value, str) else value
    if isinstance(key, str) and key in ("1.0", "0.0"):  # what pandas makes of integers beside a null
        key = key[0]
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
        tools = parsed(tools, "column 'tools': expected a JSON list", row_id)
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
    if isinstance(kwargs, str):
        kwargs = parsed(kwargs or "{}", "column 'chat_template_kwargs': expected a JSON object", row_id)
    if kwargs is not None and not isinstance(kwargs, Mapping):
        problem = f"column 'chat_template_kwargs': expected an object, got {shown(kwargs)}"
        raise DataError(problem, row_id, "wrong type")
    return {key: value for key, value in (kwargs or {}).items() if value is not None}


def number_of(value: object, where: str, row_id: str) -> float:
    """The value, if it is a finite number; text of one is accepted, for CSV knows nothing else.

    Raises:
        DataError: `wrong type`.
    """
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise DataError(f"{where}: expected a finite number, got {shown(value)}", row_id, "wrong type")


def parsed(text: object, expected: str, row_id: str) -> Any:
    """The value that JSON text stands for.

    Raises:
        DataError: `invalid JSON`.
    """
    try:
        return json.loads(text)  # type: ignore[arg-type]
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{expected}, got {shown(text)}", row_id, "invalid JSON") from error


def check_encodable(text: str, where: str, row_id: str) -> str:
    """The text, if it is Unicode throughout.

    Raises:
        DataError: `invalid UTF-8`.
    """
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
    if value is None:
        return "null"
    try:
        return f"{kind(value)} {reprlib.repr(value)}"
    except (ValueError, RecursionError):  # an integer of more digits than Python writes
        return kind(value)


def names(columns: Iterable[object]) -> str:
    """Names of columns in a line, for errors: all of them, unless they are very many or very long.

    >>> names(f"column_{number:03}" for number in range(400))[-23:]
    'column_016 and 383 more'
    """
    each = [str(column) if len(str(column)) <= 60 else f"{str(column)[:57]}..." for column in columns]
    line, rest = "", len(each)
    for name in each:
        if line and len(line) + len(name) > 200:
            return f"{line} and {rest} more"
        line, rest = f"{line}, {name}" if line else name, rest - 1
    return line
