"""`PreferenceRow` -> `PreferenceExample`: chat template, special tokens, truncation; and what happened, in counts.

**Special tokens** are those that the tokenizer or its chat template adds, never twice. Plain text: what the tokenizer
puts before a text (BOS) stands before the prompt, what it puts behind a text is left out, and the response ends with
EOS. Conversations: what the template writes; a template that ends an assistant turn with no special token gets EOS.

**Boundary.** Prompt, and prompt with response, are tokenized whole. Where the first is a prefix of the second, token by
token, the rest is the response: this is the ordinary case, and TRL's. Otherwise the prompt stays as `generate()` will
see it, to its last token, and

- where the texts agree, so that only tokens merge across the boundary, the response is tokenized on its own;
- where the template writes the prompt with and without response differently (a generation prompt that ends with
  `<think>`), the response is what follows the longest common prefix of tokens;
- where the template changes the prompt's own turns, the row is refused.

**Truncation.** `max_prompt_length` keeps the end of a prompt, where the question and the generation prompt are, and its
BOS. Then prompt and response together get `max_length` tokens: the end of the response is cut. A prompt that leaves no
room for a response is refused. (TRL's `keep_start` with `max_length` only is the same.) With `on_too_long="drop"`
nothing is cut: a row with a prompt or a response beyond these limits is left out and counted, as `too long`.

Notes, counted in `DataCounts.notes` once a response (`PROMPT_CUT`: once a row), are the constants below.
"""

import multiprocessing
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from inspect import signature
from itertools import islice
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from infopo.catalog import ON_TOO_LONG
from infopo.data.counts import TOO_LONG, DataCounts
from infopo.data.examples import ExampleDataset
from infopo.errors import DataError, ModelError, RecipeError
from infopo.records import Message, PreferenceExample, PreferenceRow, Text

PROMPT_CUT = "prompt cut"
RESPONSE_CUT = "response cut"
END_OF_TURN_LOST = "end of turn lost"
END_OF_TURN_DOUBLED = "end of turn stood twice, one kept"
END_OF_TURN_APPENDED = "end of turn appended"
NOT_A_PREFIX = "prompt rendering is not a prefix"
MERGED_TOKENS = "tokens merge across the boundary"

TEMPLATE_ARGUMENTS = frozenset(signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {
    "self",
    "documents",
    "kwargs",
}
"""Arguments of `apply_chat_template` that a row's `chat_template_kwargs` may not set: they are this module's."""


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row's token ids, and what was changed or found on the way.

    Attributes:
        example: The token ids.
        notes: Names of what happened, one entry an occurrence.
    """

    example: PreferenceExample
    notes: tuple[str, ...] = ()


class Encoder:
    """Turns rows into token ids by the rules at the top of the module.

    Args:
        tokenizer: The policy's tokenizer.
        max_length: Largest number of tokens of a prompt with one of its responses; None: no limit.
        max_prompt_length: Largest number of tokens of a prompt; None: no limit of its own.
        on_too_long: `cut` what is longer, or `drop` the row.

    Raises:
        ModelError: The tokenizer has no EOS token, or is no tokenizer.
        RecipeError: A length is not positive, or the prompt's leaves no room for a response; `on_too_long` is neither.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = 1024,
        max_prompt_length: int | None = None,
        on_too_long: str = "cut",
    ) -> None:
        _check_lengths(max_length, max_prompt_length, on_too_long)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ModelError(
                f"expected a tokenizer, got {type(tokenizer).__name__}; of a processor, pass its .tokenizer"
            )
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"tokenizer {tokenizer.name_or_path!r} has no EOS token, so a response could not end; "
                "set tokenizer.eos_token to the token that ends a turn"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.on_too_long = on_too_long
        self._eos: int = tokenizer.eos_token_id
        self._text_prefix = _text_prefix(tokenizer)
        self._end_tokens = _end_tokens(tokenizer)

    def encode(self, row: PreferenceRow) -> EncodedRow:
        """Token ids of one row.

        Raises:
            DataError: The row cannot be used; reasons are `empty prompt`, `empty chosen`, `empty rejected`,
                `prompt too long`, `too long`, `chosen = rejected`, `chosen = rejected after truncation`, `template
                refuses the row`, `template rewrites the prompt`, `reserved template argument`, `not tokenizable`.
            ModelError: The row is a conversation, and the tokenizer has no chat template.
        """
        notes: list[str] = []
        prompt, responses = self._tokenize(row, notes)
        if self.on_too_long == "drop":
            self._check_fits(prompt, responses, row.row_id)
        prompt = self._cut_prompt(prompt, row.row_id, notes)
        sides = ["chosen"] * len(row.chosen) + ["rejected"] * len(row.rejected)
        for ids, side in zip(responses, sides, strict=True):
            # An end of turn alone is no response: nothing in it could be preferred.
            if not self._content_length(ids):
                raise DataError(f"expected a {side} response, it has no tokens", row.row_id, f"empty {side}")
        cut = [self._cut_response(ids, len(prompt), notes) for ids in responses]
        chosen, rejected = cut[: len(row.chosen)], cut[len(row.chosen) :]
        _check_different(chosen, rejected, cut != responses, row.row_id)
        return EncodedRow(PreferenceExample(prompt, chosen, rejected, row.row_id), tuple(notes))

    def _check_fits(self, prompt: list[int], responses: list[list[int]], row_id: str) -> None:
        longest = len(prompt) + max(map(len, responses))
        limits = [
            (len(prompt), self.max_prompt_length, "prompt", "max_prompt_length"),
            (longest, self.max_length, "prompt with its longest response", "max_length"),
        ]
        for tokens, limit, what, name in limits:
            if limit is not None and tokens > limit:
                raise DataError(f"the {what} has {tokens} tokens, more than {name}={limit}", row_id, TOO_LONG)

    def _tokenize(self, row: PreferenceRow, notes: list[str]) -> tuple[list[int], list[list[int]]]:
        """Prompt and responses before truncation."""
        if isinstance(row.prompt, str):
            prompt = self._text_ids(row.prompt, row.row_id)
            return prompt, [self._text_response(row, prompt, r, notes) for r in [*row.chosen, *row.rejected]]
        prompt = self._chat_ids(row, row.prompt, add_generation_prompt=True)
        return prompt, [self._chat_response(row, prompt, r, notes) for r in [*row.chosen, *row.rejected]]

    def _text_ids(self, text: str, row_id: str) -> list[int]:
        ids = self._bare_ids(text, row_id)
        prefix = self._text_prefix
        return ids if prefix and ids[: len(prefix)] == prefix else [*prefix, *ids]

    def _bare_ids(self, text: str, row_id: str) -> list[int]:
        try:
            ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        except (TypeError, ValueError) as error:  # text that is not Unicode: half of a surrogate pair
            raise DataError(
                f"the tokenizer cannot read {text!r:.80}: {error}", row_id, "not tokenizable"
            ) from error
        return ids

    def _text_response(
        self, row: PreferenceRow, prompt: list[int], response: Text, notes: list[str]
    ) -> list[int]:
        text = _as_text(response, row)
        if not text.strip():
            return []
        eos_text = self.tokenizer.eos_token
        if not text.endswith(eos_text):
            text += eos_text
        full = self._text_ids(f"{row.prompt}{text}", row.row_id)
        if full[: len(prompt)] == prompt:
            ids = full[len(prompt) :]
        else:
            ids = self._bare_ids(text, row.row_id)
            notes.append(MERGED_TOKENS)
        return self._with_end_of_turn(ids, notes)

    def _chat_response(
        self, row: PreferenceRow, prompt: list[int], response: Text, notes: list[str]
    ) -> list[int]:
        turns = [*_as_turns(row.prompt, row), *_as_turns(response, row)]
        full = self._chat_ids(row, turns)
        if full[: len(prompt)] == prompt:
            return self._with_end_of_turn(full[len(prompt) :], notes)
        prompt_text, full_text = (
            self._chat_text(row, row.prompt, add_generation_prompt=True),
            self._chat_text(row, turns),
        )
        if full_text.startswith(prompt_text):
            notes.append(MERGED_TOKENS)
            return self._with_end_of_turn(self._bare_ids(full_text[len(prompt_text) :], row.row_id), notes)
        common = _common_prefix(prompt, full)
        # Not the bare rendering's whole length: some templates close it in a way that the generation prompt does not.
        if common < _common_prefix(prompt, self._chat_ids(row, row.prompt)):
            raise DataError(
                "the chat template renders the prompt's own turns differently once a response follows, from "
                f"{self.tokenizer.decode(prompt[common : common + 20])!r} on; "
                "use a template that renders earlier turns the same way every time",
                row.row_id,
                "template rewrites the prompt",
            )
        notes.append(NOT_A_PREFIX)
        header = self._assistant_header(row)
        if not full_text.startswith(header):  # the turn begins with something else than text: a tool call
            return self._with_end_of_turn(full[common:], notes)
        return self._with_end_of_turn(self._bare_ids(full_text[len(header) :], row.row_id), notes)

    def _assistant_header(self, row: PreferenceRow) -> str:
        """What a conversation's rendering holds before the text of the turn that follows the prompt.

        Where it differs from the generation prompt, the longest common prefix of the two could reach into the
        response (`<think>` and `<table>` begin alike); that of two turns which differ in their first character cannot.
        """
        prompt = _as_turns(row.prompt, row)
        zero, one = (
            self._chat_text(row, [*prompt, {"role": "assistant", "content": text}]) for text in ("0", "1")
        )
        return zero[: _common_prefix(zero, one)]

    def _chat_ids(self, row: PreferenceRow, turns: Text, *, add_generation_prompt: bool = False) -> list[int]:
        encoding = self._apply_template(row, turns, add_generation_prompt, tokenize=True, return_dict=True)
        return list(encoding["input_ids"])

    def _chat_text(self, row: PreferenceRow, turns: Text, *, add_generation_prompt: bool = False) -> str:
        return str(self._apply_template(row, turns, add_generation_prompt, tokenize=False))

    def _apply_template(
        self, row: PreferenceRow, turns: Text, add_generation_prompt: bool, **how: Any
    ) -> Any:
        if reserved := TEMPLATE_ARGUMENTS.intersection(row.chat_template_kwargs):
            problem = f"chat_template_kwargs: {', '.join(sorted(reserved))} cannot be set by a row"
            raise DataError(problem, row.row_id, "reserved template argument")
        self._check_template(row.tools)
        try:
            return self.tokenizer.apply_chat_template(
                turns,
                tools=row.tools,
                add_generation_prompt=add_generation_prompt,
                **row.chat_template_kwargs,
                **how,
            )
        except TemplateSyntaxError as error:
            raise ModelError(
                f"the chat template of {self.tokenizer.name_or_path!r} is not valid: {error}"
            ) from error
        except (
            Exception
        ) as error:  # templates are programs: on data they were not written for they fail in any way
            problem = f"the tokenizer's chat template cannot render it: {error or type(error).__name__}"
            raise DataError(problem, row.row_id, "template refuses the row") from error

    def _check_template(self, tools: list[Any] | None) -> None:
        if not self.tokenizer.chat_template:
            raise ModelError(
                f"tokenizer {self.tokenizer.name_or_path!r} has no chat template, and the data are conversations; "
                "use an instruction-tuned model's tokenizer, set tokenizer.chat_template, or give the data as text"
            )
        try:
            self.tokenizer.get_chat_template(None, tools)
        except ValueError as error:
            raise ModelError(f"tokenizer {self.tokenizer.name_or_path!r}: {error}") from error

    def _with_end_of_turn(self, ids: list[int], notes: list[str]) -> list[int]:
        end = self._end_of_turn(ids)
        if not ids:
            return ids
        if end is None:
            notes.append(END_OF_TURN_APPENDED)
            return [*ids, self._eos]
        first = end
        while (earlier := self._end_of_turn(ids[:first])) is not None:
            first = earlier
        if first < end:  # data that hold the end of turn as text, where the template adds it
            notes.append(END_OF_TURN_DOUBLED)
        return [*ids[:first], *ids[end:]]

    def _end_of_turn(self, ids: Sequence[int]) -> int | None:
        """Position of the token that ends the response; only white space may follow it."""
        for position in range(len(ids) - 1, -1, -1):
            if ids[position] in self._end_tokens:
                return position
            if self.tokenizer.decode([ids[position]]).strip():
                return None
        return None

    def _content_length(self, ids: Sequence[int]) -> int:
        end = self._end_of_turn(ids)
        return len(ids) if end is None else end

    def _cut_prompt(self, prompt: list[int], row_id: str, notes: list[str]) -> list[int]:
        if not prompt:
            problem = "expected a prompt, it has no tokens (and the tokenizer adds none): nothing predicts the response"
            raise DataError(problem, row_id, "empty prompt")
        limit = self.max_prompt_length
        if limit is not None and len(prompt) > limit:
            notes.append(PROMPT_CUT)
            bos = prompt[:1] if prompt[0] == self.tokenizer.bos_token_id else []
            prompt = [*bos, *prompt[len(prompt) - limit + len(bos) :]]
        if self.max_length is not None and len(prompt) >= self.max_length:
            problem = (
                f"the prompt's {len(prompt)} tokens leave no room for a response in max_length={self.max_length}; "
                "raise max_length, or set max_prompt_length to keep the prompt's end"
            )
            raise DataError(problem, row_id, "prompt too long")
        return prompt

    def _cut_response(self, ids: list[int], prompt_length: int, notes: list[str]) -> list[int]:
        if self.max_length is None or prompt_length + len(ids) <= self.max_length:
            return ids
        room = self.max_length - prompt_length
        notes.append(RESPONSE_CUT)
        end = self._end_of_turn(ids)
        if end is not None and end >= room:
            notes.append(END_OF_TURN_LOST)
        return ids[:room]


def _check_lengths(max_length: int | None, max_prompt_length: int | None, on_too_long: str) -> None:
    problems = []
    if on_too_long not in ON_TOO_LONG:
        problems.append(f"data.on_too_long: expected {' or '.join(ON_TOO_LONG)}, got {on_too_long!r}")
    if max_length is not None and max_length < 2:
        problems.append(f"data.max_length: expected at least 2 (a prompt and a response), got {max_length}")
    if max_prompt_length is not None and max_prompt_length < 1:
        problems.append(f"data.max_prompt_length: expected at least 1, got {max_prompt_length}")
    if max_length is not None and max_prompt_length is not None and max_prompt_length >= max_length:
        problems.append(
            f"data.max_prompt_length: expected less than max_length={max_length}, to leave room for a response, "
            f"got {max_prompt_length}"
        )
    if problems:
        raise RecipeError(problems)


def _text_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before any text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    if not bare:  # "a" is not in its vocabulary
        return list(full[:1]) if full[:1] == [tokenizer.bos_token_id] else []
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start])
    return []


def _end_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that may end a turn: special ones, and added ones that the chat template writes.

    The latter because some tokenizers add their end-of-turn token without calling it special.
    """
    template = str(tokenizer.chat_template or "")
    added = tokenizer.added_tokens_decoder.items()
    special = {
        *tokenizer.all_special_ids,
        *(i for i, token in added if token.special or token.content in template),
    }
    return frozenset(special - {tokenizer.unk_token_id, tokenizer.bos_token_id} | {tokenizer.eos_token_id})


def _as_text(response: Text, row: PreferenceRow) -> str:
    if isinstance(response, str):
        return response
    raise DataError("expected text responses to a text prompt, got messages", row.row_id, "wrong type")


def _as_turns(turns: Text, row: PreferenceRow) -> list[Message]:
    if isinstance(turns, str):
        raise DataError(
            "expected a list of messages after a prompt of messages, got text", row.row_id, "wrong type"
        )
    return turns


def _check_different(chosen: list[list[int]], rejected: list[list[int]], was_cut: bool, row_id: str) -> None:
    if not any(ids in rejected for ids in chosen):
        return
    reason = "chosen = rejected after truncation" if was_cut else "chosen = rejected"
    problem = "expected different responses, but chosen and rejected are the same tokens"
    remedy = "once cut to max_length; raise it" if was_cut else "as the tokenizer and its template write them"
    raise DataError(f"{problem} {remedy}", row_id, reason)


def _common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (left, right) in pairs if left != right), min(len(a), len(b)))


def encode_rows(
    rows: Iterable[PreferenceRow],
    encoder: Encoder,
    counts: DataCounts,
    *,
    num_proc: int | None = None,
) -> ExampleDataset:
    """Encodes all rows, in their order, and keeps the ledger.

    Args:
        rows: What `read_rows` gives.
        encoder: The rules.
        counts: Ledger; gets used rows, notes and bad rows.
        num_proc: Number of worker processes; None or 1: none.

    Raises:
        DataError: A row cannot be used and `counts.on_bad_row` is `raise`, or no row can be used.
    """
    results = (
        _encode_serially(rows, encoder)
        if (num_proc or 1) == 1
        else _encode_in_pool(rows, encoder, num_proc or 1)
    )
    # Closed here, for the traceback of a bad row would keep the generator, and with it the pool, alive.
    with closing(results):
        dataset = ExampleDataset.from_examples(_tallied(results, counts))
    if not len(dataset):
        reasons = (
            ", ".join(f"{n} x {reason}" for reason, n in counts.skipped.most_common()) or "there are none"
        )
        raise DataError(f"no row can be used: {reasons}", counts.source or "data", "no usable row")
    return dataset


def encoded(
    rows: Iterable[PreferenceRow], encoder: Encoder, counts: DataCounts
) -> Iterator[PreferenceExample]:
    """Encodes rows when they are asked for, one by one, and keeps the ledger.

    Raises:
        DataError: A row cannot be used and `counts.on_bad_row` is `raise`.
    """
    return _tallied(_encode_serially(rows, encoder), counts)


def _tallied(results: Iterable[EncodedRow | DataError], counts: DataCounts) -> Iterator[PreferenceExample]:
    for result in results:
        if isinstance(result, DataError):
            counts.bad_row(result)
            continue
        counts.used += 1
        counts.notes.update(result.notes)
        yield result.example


Results = Generator[EncodedRow | DataError, None, None]


def _encode_one(encoder: Encoder, row: PreferenceRow) -> EncodedRow | DataError:
    """The result or the row's fault as a value: the ledger is the caller's, who may be in another process."""
    try:
        return encoder.encode(row)
    except DataError as error:
        return error


def _encode_serially(rows: Iterable[PreferenceRow], encoder: Encoder) -> Results:
    return (_encode_one(encoder, row) for row in rows)


_ROWS_A_CHUNK = 64
_CHUNKS_AHEAD = 4
_worker_encoder: Encoder


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder


def _encode_chunk(rows: list[PreferenceRow]) -> list[EncodedRow | DataError]:
    return [_encode_one(_worker_encoder, row) for row in rows]


def _encode_in_pool(rows: Iterable[PreferenceRow], encoder: Encoder, num_proc: int) -> Results:
    iterator = iter(rows)
    # Fork as `datasets` does: a spawned worker imports torch again and needs a guarded main module.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pending: deque[Future[list[EncodedRow | DataError]]] = deque()
    with ProcessPoolExecutor(num_proc, context, _start_worker, (encoder,)) as pool:
        try:
            while chunk := list(islice(iterator, _ROWS_A_CHUNK)):
                pending.append(pool.submit(_encode_chunk, chunk))
                # Bounded, so that a file larger than memory does not queue up here.
                if len(pending) >= _CHUNKS_AHEAD * num_proc:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
