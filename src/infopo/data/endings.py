"""What ends a response: which tokens, and each once."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from infopo.data.tokenization import Tokenization

END_OF_TURN_DOUBLED = "end of turn stood twice, one kept"
END_OF_TURN_APPENDED = "end of turn appended"


@dataclass(frozen=True, slots=True)
class Response:
    """A response on its way.

    Attributes:
        ids: Its tokens.
        end: Those of them, at its end, that end a turn.
        context: See `PreferenceExample`.
    """

    ids: list[int]
    end: tuple[int, ...] = ()
    context: tuple[tuple[int, int], ...] = ()


class Endings:
    """The ends of turns of a tokenizer.

    Args:
        tokens: The tokenizer.

    Attributes:
        special: Tokens that may end a turn.
    """

    def __init__(self, tokens: Tokenization) -> None:
        self._tokens = tokens
        self._eos: int = tokens.tokenizer.eos_token_id
        self.special = end_tokens(tokens.tokenizer)
        self._ids: dict[str, tuple[int, ...]] = {}

    def ended(self, ids: list[int], end: tuple[int, ...], notes: list[str]) -> Response:
        """The response with its end of turn, once.

        Args:
            ids: Its tokens.
            end: Tokens with which a turn ends, the first of them special; none: the template has no such token.
            notes: What happened is added.
        """
        if not ids:
            return Response(ids)
        if not end:
            end = (self._eos,)
            if ids[-1] != self._eos:
                notes.append(END_OF_TURN_APPENDED)
                ids = [*ids, self._eos]
        if ids[-len(end) :] != list(
            end
        ):  # a turn of another kind, such as a tool call, may end in another way
            last = self.last_but_space(ids)
            return Response(ids, tuple(ids[last:]) if ids[last] in self.special else ())
        first = stop = len(ids) - len(end)
        core = self.last_but_space(end) + 1
        while True:  # data that hold as text what is added
            before = self.last_but_space(ids[:first]) + 1
            if ids[max(0, before - core) : before] == list(end[:core]):
                first = before - core
            elif before and ids[before - 1] == end[0]:
                first = before - 1
            else:
                break
        if first < stop:
            notes.append(END_OF_TURN_DOUBLED)
        return Response([*ids[:first], *ids[stop:]], end)

    def ids(self, end: str) -> tuple[int, ...]:
        """Tokens of what ends a turn, from the first that is special; none if none is."""
        if end not in self._ids:
            ids = self._tokens.bare(end, "chat template") if end else []
            first = next((i for i, token in enumerate(ids) if token in self.special), len(ids))
            self._ids[end] = tuple(ids[first:])
        return self._ids[end]

    def last_but_space(self, ids: Sequence[int]) -> int:
        """Position of the last token that is not white space; -1: there is none."""
        return next((i for i in range(len(ids) - 1, -1, -1) if not self._tokens.is_space(ids[i])), -1)


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that may end a turn: special and added ones.

    The latter because some tokenizers add their end-of-turn token without calling it special.
    """
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return frozenset(special - {tokenizer.unk_token_id, tokenizer.bos_token_id} | {tokenizer.eos_token_id})
