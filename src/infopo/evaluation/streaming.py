"""A response that is shown while it is drawn. Its tokens are those that `drawing` draws for the same seed."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from infopo.evaluation.drawing import Drawn, Request, draw_one
from infopo.evaluation.law import Law


def stream(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
    law: Law,
    *,
    ends: Sequence[int],
    on_text: Callable[[str], Any],
) -> Drawn:
    """Draws one response, and hands over its text piece by piece.

    Args:
        model: See `draw`.
        tokenizer: See `draw`.
        request: What to draw.
        law: The distribution, without stop texts.
        ends: Tokens that end a response.
        on_text: Takes each new piece. Together, the pieces are the text of the response. If a later token changes how
            earlier ones are decoded, all of it follows once more, on a new line.

    Raises:
        ModelError: The prompt does not fit into the accelerator's memory.
    """
    pieces = _Pieces(tokenizer, ends, on_text)
    drawn = draw_one(model, tokenizer, request, law, ends=ends, streamer=pieces)
    pieces.finish(drawn.text)
    return drawn


class _Pieces(BaseStreamer):
    """Turns tokens, which come one by one, into pieces of text that do not change any more.

    Args:
        tokenizer: What decodes them.
        ends: Tokens that end a response.
        on_text: Takes each new piece.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], on_text: Callable[[str], Any]
    ) -> None:
        self._tokenizer, self._ends, self._on_text = tokenizer, frozenset(ends), on_text
        self._ids: list[int] = []
        self._said = ""
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, and then a token at a time."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        self._ids += [token for token in value.flatten().tolist() if token not in self._ends]
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        # Half a character decodes to U+FFFD, which the next token replaces.
        self.rest(text[: len(text.rstrip("\ufffd"))])

    def end(self) -> None:
        """Is called after the last token."""

    def rest(self, text: str) -> None:
        """Hands over what was not handed over before of a text."""
        if text.startswith(self._said) and len(text) > len(self._said):
            piece, self._said = text[len(self._said) :], text
            self._on_text(piece)

    def finish(self, text: str) -> None:
        """Hands over the rest of the response, or all of it again if a later token has changed what was said."""
        if not text.startswith(self._said):
            self._said = ""
            self._on_text("\n")
        self.rest(text)
