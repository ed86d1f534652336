"""Prompts from files of any shape: a text a line, rows with a prompt, or preference data. Imports no torch."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from infopo.data.cells import open_cells
from infopo.errors import DataError
from infopo.evaluation.items import Item
from infopo.evaluation.task_rows import task_rows
from infopo.texts import Message, Text

PROMPTS = ("prompt", "messages", "question", "instruction", "problem")
"""Columns that prompts stand in, the first that a row has."""

_PREFERENCES = ("chosen", "rejected", "conversations", "chosen_response")
"""Columns of rows whose prompt is not in a column of its own, but is what both responses begin with."""


def prompts_in(source: str) -> list[Item]:
    """Returns the prompts of a file, in its order. The `gold` of an item is the row that it is from.

    Args:
        source: A `.txt` file with a prompt a line (`-` is standard input), or a file, folder or hub name with rows that
            have a prompt in one of `PROMPTS`, or with preference data.

    Raises:
        DataError: There are none, or a row has none. Names the row.
    """
    items = list(_lines(source) if source == "-" or source.endswith(".txt") else _rows(source))
    if not items:
        raise DataError("has no prompts", source, "no prompts")
    return items


def _lines(source: str) -> Iterator[Item]:
    """Yields the lines of a text that are not blank."""
    if source == "-":
        text = sys.stdin.read().removeprefix("\ufeff")
    else:
        try:
            text = Path(source).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot be read as text in UTF-8: {error}", source, "unreadable") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield Item(f"{source}:{number}", line.rstrip("\r"), {})


def _rows(source: str) -> Iterator[Item]:
    for row_id, row in task_rows("generate", source, ("", None, "train")):
        if not any(row.get(column) for column in PROMPTS) and any(row.get(column) for column in _PREFERENCES):
            from infopo.evaluation.duels import read_prompts

            yield from (Item(item.id, item.prompt, {}) for item in read_prompts(source))
            return
        for column in ("tools", "chat_template_kwargs"):
            if row.get(column):
                raise DataError(
                    f"column {column!r}: prompts with {column} cannot be asked by this command; take the column "
                    "out to ask without",
                    row_id,
                    "unused column",
                )
        yield Item(row_id, prompt_of(row, row_id), dict(row))


def prompt_of(row: Mapping[str, Any], row_id: str) -> Text:
    r"""Returns the prompt of a row, without what an assistant has answered to it.

    The `input` of an instruction follows it on the next line, and a `system` column is a system message.

    Raises:
        DataError: It has none, or another type.

    Example:
        >>> prompt_of({"instruction": "Add.", "input": "1, 2", "output": "3"}, "rows.jsonl:1")
        'Add.\n1, 2'
    """
    row = open_cells(row, row_id)
    column = next((column for column in PROMPTS if row.get(column)), None)
    if column is None:
        raise DataError(
            f"expected a column {' or '.join(PROMPTS)}, got {', '.join(row):.200}", row_id, "no prompt"
        )
    prompt, system = row[column], row.get("system")
    if isinstance(prompt, str) and prompt.strip():
        if column == "instruction" and isinstance(row.get("input"), str) and row["input"].strip():
            prompt = f"{prompt}\n{row['input']}"
        return with_system(prompt, system, row_id) if isinstance(system, str) and system.strip() else prompt
    turns = _turns(prompt, column, row_id)
    return with_system(turns, system, row_id) if isinstance(system, str) and system.strip() else turns


def _turns(prompt: Any, column: str, row_id: str) -> list[Message]:
    is_conversation = isinstance(prompt, list) and all(
        isinstance(turn, Mapping) and {"role", "content"} <= set(turn) for turn in prompt
    )
    if not is_conversation:
        raise DataError(
            f"column {column!r}: expected text or messages, got {prompt!r:.80}", row_id, "wrong type"
        )
    turns = [dict(turn) for turn in prompt]
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns:
        raise DataError(f"column {column!r}: expected a turn before the assistant's", row_id, "no prompt")
    return turns


def with_system(prompt: Text, system: str, row_id: str) -> list[Message]:
    """Returns a prompt as a conversation that begins with a system message.

    Raises:
        DataError: It begins with another one.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    first: Message = {"role": "system", "content": system}
    if turns and turns[0].get("role") == "system":
        if turns[0].get("content") == system:
            return turns
        raise DataError("has a system message of its own, and another one is given", row_id, "system message")
    return [first, *turns]
