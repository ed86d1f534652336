"""Text -> token ids, so that the tokens of a prompt with those of a response decode to the text of both.

A prompt and its response are tokenized as one text. Where tokens merge across the boundary the prompt keeps its own
tokens, as `generate()` sees them, and the response is tokenized **behind** them: not at the start of a text, where
tokenizers of the SentencePiece kind put a space, byte-level ones may, and WordPiece begins a word.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedTokenizerBase

from infopo.errors import DataError, ModelError

_MARKERS = ("\n", "=", ".", "0", "a", "e", "(", "|", ":", "x", "Z", "é", "中")
_VOCABULARY_MARKERS = 64
_PROBES = ("a", "0", "the", ".", "\n", "A")

_CHARACTERS_A_CALL = 2**20
"""Largest number of characters that the tokenizer gets at once. Its records of them take some 50 bytes each."""


class Tokenization:
    """A tokenizer under the rules above.

    Args:
        tokenizer: The policy's tokenizer.

    Attributes:
        tokenizer: The tokenizer.
        prefix: What it puts before every text (BOS; two tokens for GLM; nothing for many).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ModelError(
                f"expected a tokenizer, got {type(tokenizer).__name__}; of a processor, pass its .tokenizer"
            )
        self.tokenizer = tokenizer
        self.prefix = _prefix_of(tokenizer)
        self._ahead: dict[str, list[int]] = {}
        self._spaces: dict[int, bool] = {}

    @contextmanager
    def read_ahead(self, texts: Iterable[str]) -> Iterator[None]:
        """Tokenizes texts together, so that `bare` finds them within the block.

        The tokenizer reads many texts on all cores, and a call of it costs as much as some twenty words. A text that
        occurs several times, such as the prompt of several rows, is read once.

        Args:
            texts: Texts that will be asked for. It changes no result if some are missing, or never asked for.
        """
        for batch in _batches(dict.fromkeys(texts)):
            try:
                encoding = self.tokenizer(
                    batch, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
                )
            except Exception:
                # One of the texts cannot be read. `bare` reads each by itself, and names the row of that one.
                continue
            self._ahead.update(zip(batch, encoding["input_ids"], strict=True))
        try:
            yield
        finally:
            self._ahead = {}

    def bare(self, text: str, row_id: str) -> list[int]:
        """Token ids of a text that holds its special tokens itself, as the rendering of a template does.

        Raises:
            DataError: `not tokenizable`.
        """
        if text in self._ahead:
            return self._ahead[text]
        try:
            ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        except (TypeError, ValueError) as error:  # text that is not Unicode: half of a surrogate pair
            raise DataError(
                f"the tokenizer cannot read {text!r:.80}: {error}", row_id, "not tokenizable"
            ) from error
        return ids

    def text(self, text: str, row_id: str) -> list[int]:
        """Token ids of plain text behind `prefix`, which a text that begins with it gets no second time.

        Raises:
            DataError: `not tokenizable`.
        """
        ids, prefix = self.bare(text, row_id), self.prefix
        if ids[: len(prefix)] == prefix:
            return ids
        # A text may begin with the last of several tokens, its BOS.
        known = next((n for n in range(len(prefix) - 1, 0, -1) if ids[:n] == prefix[-n:]), 0)
        return [*prefix[: len(prefix) - known], *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def is_space(self, token: int) -> bool:
        """Whether the token is white space only."""
        if token not in self._spaces:
            self._spaces[token] = not self.decode([token]).strip()
        return self._spaces[token]

    def after(
        self, prompt: Sequence[int], text: str, whole: list[int], row_id: str
    ) -> tuple[list[int], bool]:
        """Token ids of a text behind a prompt, and whether tokens would merge across their boundary.

        Args:
            prompt: The prompt's token ids.
            text: What follows it.
            whole: Token ids of the prompt's text and `text` as one text.
            row_id: Name of the row in errors.

        Raises:
            DataError: `not tokenizable`.
        """
        if whole[: len(prompt)] == list(prompt):
            return whole[len(prompt) :], False
        if not text:
            return [], False
        wanted, first = self.decode(whole), None
        for ids in self._behind_markers(text, row_id):
            if self.decode([*prompt, *ids]) == wanted:
                return ids, True
            first = first or ids
        if first is None:
            problem = f"no tokens write {text!r:.80} behind its prompt: both merge into one token"
            raise DataError(problem, row_id, "not tokenizable")
        return first, True  # a tokenizer that loses text: what it makes of this one, with nothing added

    def _behind_markers(self, text: str, row_id: str) -> Iterator[list[int]]:
        """Tokens of the text behind texts that do not merge with it; which of them adds no space is to be tried."""
        for marker in self._markers():
            before, both = self.bare(marker, row_id), self.bare(marker + text, row_id)
            if before and both[: len(before)] == before and len(both) > len(before):
                yield both[len(before) :]

    def _markers(self) -> Iterator[str]:
        if self.tokenizer.eos_token:
            yield str(
                self.tokenizer.eos_token
            )  # merges with nothing, but some tokenizers put a space behind it
        yield from _MARKERS
        characters = (token for token in self.tokenizer.get_vocab() if len(token) == 1)
        yield from (token for _, token in zip(range(_VOCABULARY_MARKERS), characters, strict=False))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, characters = list[str](), 0
    for text in texts:
        if batch and characters + len(text) > _CHARACTERS_A_CALL:
            yield batch
            batch, characters = [], 0
        batch.append(text)
        characters += len(text)
    if batch:
        yield batch


def _prefix_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before any text."""
    for probe in _PROBES:
        bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
        full = tokenizer(probe)["input_ids"]
        for start in range(len(full) - len(bare) + 1):
            if bare and full[start : start + len(bare)] == bare:
                return list(full[:start])
    full = tokenizer(_PROBES[0])["input_ids"]  # it knows none of these
    return list(full[:1]) if full[:1] == [tokenizer.bos_token_id] else []
