"""A row of plain text in token ids: nothing stands in it but the data, and the end of sequence behind each response."""

from infopo.data.conversation import MERGED_TOKENS
from infopo.data.endings import Endings, Response
from infopo.data.tokenization import Tokenization
from infopo.errors import DataError
from infopo.records import PreferenceRow, Text


class PlainText:
    """A prompt of text and its responses. Like `Conversation`, it knows its texts before they are tokenized.

    Args:
        tokens: The tokenizer.
        endings: What ends a turn.
        row: The row.
        prompt: Its prompt.

    Raises:
        DataError: A response is no text.
    """

    def __init__(self, tokens: Tokenization, endings: Endings, row: PreferenceRow, prompt: str) -> None:
        self._tokens, self._endings, self._row, self._prompt = tokens, endings, row, prompt
        self._responses = [self._ended(as_text(each, row)) for each in (*row.chosen, *row.rejected)]

    def _ended(self, text: str) -> str:
        """The response with EOS, which is written once; nothing of one that is white space only."""
        eos = self._tokens.tokenizer.eos_token
        if not text.strip():
            return ""
        return text if text.endswith(eos) else text + eos

    @property
    def texts(self) -> list[str]:
        """What will be tokenized."""
        return [self._prompt, *(self._prompt + text for text in self._responses if text)]

    def encoded(self, notes: list[str]) -> tuple[list[int], list[Response]]:
        """Returns tokens of the prompt and of the responses, chosen first.

        Args:
            notes: What happened is added.

        Raises:
            DataError: `not tokenizable`.
        """
        prompt_ids = self._tokens.text(self._prompt, self._row.row_id)
        return prompt_ids, [self._response(prompt_ids, text, notes) for text in self._responses]

    def _response(self, prompt_ids: list[int], text: str, notes: list[str]) -> Response:
        if not text:
            return Response([])
        whole = self._tokens.text(self._prompt + text, self._row.row_id)
        ids, merged = self._tokens.after(prompt_ids, text, whole, self._row.row_id)
        if merged:
            notes.append(MERGED_TOKENS)
        return self._endings.ended(ids, (self._tokens.tokenizer.eos_token_id,), notes)


def as_text(response: Text, row: PreferenceRow) -> str:
    """Returns a response to a prompt of text.

    Raises:
        DataError: It is a list of messages.
    """
    if isinstance(response, str):
        return response
    raise DataError("expected text responses to a text prompt, got messages", row.row_id, "wrong type")
