"""An encoded example as a person reads it: what is scored stands out from what is masked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from infopo.errors import printable
from infopo.records import PreferenceExample, Spans

DIM, SPECIAL, RESET = "\x1b[2m", "\x1b[36m", "\x1b[0m"
"""Masked text is dim, and special tokens are cyan."""

MASKED = ("⟪", "⟫")
"""Masked text within a response stands in these where there are no colours. A prompt is masked as a whole."""

INDENT = 19
MOST = 4000
"""Largest number of characters of a prompt or response that is shown, half of them from its end."""


@dataclass(frozen=True)
class Piece:
    """Printable text of a token, or of several tokens if they are parts of one character."""

    text: str
    is_special: bool = False
    is_masked: bool = False


def display(example: PreferenceExample, tokenizer: PreTrainedTokenizerBase, *, color: bool = False) -> str:
    r"""Returns an example as text: the row's name, and each side with its number of tokens.

    Line breaks are written as `\n` and followed by one. Control characters are written as escapes, because the text is
    data, and could move a terminal's cursor.

    Args:
        example: The example.
        tokenizer: Its tokenizer.
        color: Whether masked text is dim and special tokens are cyan. Without colours, masked text within a response
            stands in ⟪brackets⟫.
    """
    spans = [list(each) for each in example.spans]
    sides: list[tuple[str, Sequence[int], Spans]] = [
        ("prompt", example.prompt_ids, [(0, len(example.prompt_ids))] if color else [])
    ]
    sides += [
        (name, ids, context)
        for name, ids, context in zip(
            ["chosen"] * len(example.chosen_ids) + ["rejected"] * len(example.rejected_ids),
            [*example.chosen_ids, *example.rejected_ids],
            spans,
            strict=False,
        )
    ]
    lines = [printable(example.row_id)]
    for name, ids, context in sides:
        pieces = shortened(list(pieces_of(ids, context, tokenizer)))
        lines.append(f"  {name:<8}  {len(ids):>5}  {_written(pieces, color=color)}")
    return "\n".join(lines)


def pieces_of(ids: Sequence[int], masked: Spans, tokenizer: PreTrainedTokenizerBase) -> Iterator[Piece]:
    """Yields the pieces of a prompt or a response. `masked` are the spans of its tokens that are not scored."""
    special = set(tokenizer.all_special_ids)
    hidden = {index for begin, end in masked for index in range(begin, end)}
    parts: list[int] = []
    for index, token in enumerate(ids):
        parts.append(token)
        text = tokenizer.decode(parts, clean_up_tokenization_spaces=False)
        ends = index == len(ids) - 1 or (index in hidden) != (index + 1 in hidden)
        if not text.endswith("\ufffd") or ends:
            yield Piece("".join(map(_escaped, text)), len(parts) == 1 and token in special, index in hidden)
            parts = []


def _escaped(character: str) -> str:
    # A line feed is the only control character that stays, behind its escape.
    return character if character.isprintable() else repr(character)[1:-1] + "\n" * (character == "\n")


def shortened(pieces: list[Piece], most: int = MOST) -> list[Piece]:
    """Returns the pieces of at most about `most` characters, with a note in place of a middle that is left out.

    Example:
        >>> [piece.text for piece in shortened([Piece("ab"), Piece("cd"), Piece("ef"), Piece("gh")], most=4)]
        ['ab', ' [... 4 characters left out ...] ', 'gh']
    """
    if sum(len(piece.text) for piece in pieces) <= most:
        return pieces
    begin, end = _within(pieces, most // 2), _within(pieces[::-1], most // 2)
    middle = pieces[begin : len(pieces) - end]
    left_out = sum(len(piece.text) for piece in middle)
    note = Piece(f" [... {left_out} characters left out ...] ", is_masked=middle[0].is_masked)
    return [*pieces[:begin], note, *pieces[len(pieces) - end :]]


def _within(pieces: Sequence[Piece], most: int) -> int:
    """Returns how many of the first pieces have at most `most` characters together."""
    total = 0
    for number, piece in enumerate(pieces):
        total += len(piece.text)
        if total > most:
            return number
    return len(pieces)


def _written(pieces: Sequence[Piece], *, color: bool) -> str:
    text, was_masked = "", False
    if pieces:  # a break at the end would leave an empty line
        pieces = [*pieces[:-1], replace(pieces[-1], text=pieces[-1].text.removesuffix("\n"))]
    for piece in pieces:
        if not color and piece.is_masked != was_masked:
            text += MASKED[0 if piece.is_masked else 1]
        style = SPECIAL if piece.is_special else DIM if piece.is_masked else ""
        body = piece.text.replace("\n", "\n" + " " * INDENT)
        text += f"{style}{body}{RESET}" if color and style else body
        was_masked = piece.is_masked
    return text + (MASKED[1] if was_masked and not color else "")
