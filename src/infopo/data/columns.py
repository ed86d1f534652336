"""Reads single columns of a row: text, lists, labels, tools. A value that cannot be used is refused by name."""

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
    """Returns whether the column exists and is not null. Columnar files have null for what a row lacks."""
    return row.get(column) is not None


def value_of(row: Mapping[str, Any], column: str, row_id: str) -> Any:
    """Returns the value of a column.

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
    """Returns the text of a column.

    Raises:
        DataError: As `value_of`, and `wrong type`, `invalid UTF-8`.

    Example:
        >>> text_of({"chosen": "Yes."}, "chosen", "pairs.jsonl:1")
        'Yes.'
    """
    return as_text(value_of(row, column, row_id), f"column {column!r}", row_id)


def optional_text(row: Mapping[str, Any], column: str, row_id: str) -> str:
    """Returns the text of a column, or empty text if it is missing or null.

    Raises:
        DataError: `wrong type`, `invalid UTF-8`.
    """
    return text_of(row, column, row_id) if has_value(row, column) else ""


def as_text(value: object, where: str, row_id: str) -> str:
    """Returns the value, if it is text that can be encoded.

    Raises:
        DataError: `wrong type`, `invalid UTF-8`.
    """
    if not isinstance(value, str):
        raise DataError(f"{where}: expected text, got {shown(value)}", row_id, "wrong type")
    return check_encodable(value, where, row_id)


def list_of(row: Mapping[str, Any], column: str, row_id: str, what: str) -> list[Any]:
    """Returns the list of a column. JSON text of a list is accepted, because CSV has text only.

    Args:
        row: The row.
        column: Name of the column.
        row_id: Name of the row in errors.
        what: Description of the list's items, for the error.

    Raises:
        DataError: As `value_of`, and `wrong type`.
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
    """Returns whether the response is a good one: true or false, 1 or 0, or these as text (CSV has text only).

    Raises:
        DataError: As `value_of`, and `wrong type`.
    """
    value = value_of(row, column, row_id)
    key = value.strip().lower() if isinstance(value, str) else value
    # pandas turns integers into these if the column has a null.
    if isinstance(key, str) and key in ("1.0", "0.0"):
        key = key[0]
    # The numbers are found too, because 1 == True.
    if key in _TRUE or key in _FALSE:
        return key in _TRUE
    raise DataError(f"column {column!r}: expected true or false, got {shown(value)}", row_id, "wrong type")


def tools_of(row: Mapping[str, Any], row_id: str) -> list[Any] | None:
    """Returns tool schemas. JSON text is accepted, because columnar files cannot contain schemas of different form.

    Raises:
        DataError: `invalid JSON`, `wrong type`.
    """
    tools = row.get("tools")
    if isinstance(tools, str):
        # LLaMA-Factory writes empty text if there are none.
        if not tools.strip():
            return None
        tools = parsed(tools, "column 'tools': expected a JSON list", row_id)
    if tools is not None and not isinstance(tools, list):
        raise DataError(
            f"column 'tools': expected a list of schemas, got {shown(tools)}", row_id, "wrong type"
        )
    # For an empty list, some templates (Llama's) would write the introduction to tools.
    return tools or None


def chat_template_kwargs_of(row: Mapping[str, Any], row_id: str) -> dict[str, Any]:
    """Returns arguments for the chat template, without those that are null.

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
    """Returns the value, if it is a finite number. Text of a number is accepted, because CSV has text only.

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
    """Returns the value of JSON text.

    Raises:
        DataError: `invalid JSON`.
    """
    try:
        return json.loads(text)  # type: ignore[arg-type]
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{expected}, got {shown(text)}", row_id, "invalid JSON") from error


def check_encodable(text: str, where: str, row_id: str) -> str:
    """Returns the text, if it is Unicode throughout.

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
    """Returns the type of a value in the words of data files.

    Example:
        >>> kind("text"), kind(None), kind(1)
        ('text', 'null', 'int')
    """
    return {str: "text", list: "a list", type(None): "null"}.get(type(value), type(value).__name__)


def shown(value: object) -> str:
    """Returns type and beginning of a value, for errors.

    Example:
        >>> shown([1, 2])
        'a list [1, 2]'
    """
    if value is None:
        return "null"
    try:
        return f"{kind(value)} {reprlib.repr(value)}"
    except (ValueError, RecursionError):
        # Python does not write integers of too many digits.
        return kind(value)


def names(columns: Iterable[object]) -> str:
    """Returns names of columns in a line, for errors. Very long names, and very many, are cut off.

    Example:
        >>> names(f"column_{number:03}" for number in range(400))[-23:]
        'column_016 and 383 more'
    """
    short = [str(column) if len(str(column)) <= 60 else f"{str(column)[:57]}..." for column in columns]
    line, rest = "", len(short)
    for name in short:
        if line and len(line) + len(name) > 200:
            return f"{line} and {rest} more"
        line, rest = f"{line}, {name}" if line else name, rest - 1
    return line
