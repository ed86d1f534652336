"""Turns a `PreferenceRow` into a `PreferenceExample`: chat template, special tokens, truncation, and their counts.

Training sees what the data or the template wrote, token for token.

**Special tokens** are those that the tokenizer or its chat template adds, and are never doubled. In plain text, what
the tokenizer puts before a text (BOS) is put before the prompt, what it puts behind a text is left out, and the
response ends with EOS. In conversations, they are what the template writes. What ends a turn is learned by rendering
two conversations that differ in their last content. A template that ends a turn with no token of its own (GLM) gets
EOS. If the data contain as text what the template or this module adds, it is written once.

**Boundary.** The prompt stays as `generate()` will see it, to its last token. The response is

- what follows the prompt in the text of both. Its tokens are those that follow the prompt's in the tokens of both. This
  is the ordinary case, and TRL's. If tokens merge across the boundary, see `tokenization.py`.
- what follows the longest common beginning, in which no tag or word is split, if the template writes the prompt
  differently with and without a response (as with a generation prompt that ends with `<think>`).

If the template changes the prompt's own turns, the row is refused.

**Content.** Each assistant turn's content, reasoning and tool calls must be in its rendering. If a template drops
reasoning, or an empty think block, from the content of the last turn, the turn is written as the policy will write it:
behind the generation prompt, word for word. If anything else is missing, the row is refused. Reasoning of earlier
turns, which many templates drop, is counted.

**Scored tokens.** In a response with several turns, the tokens that the policy writes are scored (see `turns.py`).

**Truncation.** `max_prompt_length` keeps the end of a prompt, where the question and the generation prompt are, and its
BOS. Then prompt and response together are limited to `max_length` tokens, and the end of the response is cut off. A
prompt that leaves no room for a response is refused. (TRL's `keep_start` with `max_length` only is the same.) With
`on_too_long="drop"` nothing is cut off: a row with a prompt or a response beyond these limits is left out and counted
as `too long`.

Changes and findings are counted in `DataCounts.notes`, once per response (`PROMPT_CUT` once per row).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from transformers import PreTrainedTokenizerBase

from infopo.data.conversation import (
    Conversation,
)
from infopo.data.counts import TOO_LONG, DataCounts
from infopo.data.endings import Endings, Response
from infopo.data.examples import ExampleDataset
from infopo.data.plain_text import PlainText, as_text
from infopo.data.pool import in_processes
from infopo.data.survey import render
from infopo.data.templates import DATE, TODAY, ChatTemplate, check_variables
from infopo.data.tokenization import Tokenization
from infopo.errors import ConfigError, DataError, ModelError
from infopo.records import Message, PreferenceExample, PreferenceRow, Text, cut_response
from infopo.settings import RowSettings

PROMPT_CUT = "prompt cut"
RESPONSE_CUT = "response cut"
END_OF_TURN_LOST = "end of turn lost"
UNKNOWN_TEXT = "text that the tokenizer cannot write: its unknown token stands there"
PLAIN_TEXT = (
    "the rows are plain text, and the tokenizer's chat template is not applied to them; for a chat model, as_chat: "
    "true takes a prompt for the user's turn and a response for the assistant's"
)
DATE_FIXED = (
    f"the chat template writes today's date, which is {TODAY} on every day, so that a run can be resumed on another; "
    f"chat_template_kwargs: {{{DATE}: ...}} sets one"
)

_SHOWN = 400
"""Number of characters of a row that a warning shows."""


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row's token ids, and the changes and findings that are counted.

    Attributes:
        example: The token ids.
        notes: Names of changes and findings, one entry per occurrence.
        warnings: Sentences about all rows like this one, which are shown once.
    """

    example: PreferenceExample
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Draft:
    """A row whose texts are known, and what has been noted of it so far."""

    row: PreferenceRow
    texts: PlainText | Conversation
    notes: list[str]


class Encoder:
    """Turns rows into token ids by the rules at the top of the module.

    Args:
        tokenizer: The policy's tokenizer.
        max_length: Largest number of tokens of a prompt with one of its responses, or None for no limit.
        max_prompt_length: Largest number of tokens of a prompt, or None for no limit of its own.
        on_too_long: `cut` what is longer, or `drop` the row.
        chat_template_kwargs: Template variables of all rows. A row's own take precedence.
        as_chat: Whether plain text is taken as a conversation, with the prompt as the user's turn and a response as the
            assistant's.

    Raises:
        ModelError: The tokenizer has no EOS token, or is no tokenizer.
        ConfigError: These settings are none that `RowSettings` takes, or a template variable cannot be set.

    Example:
        >>> from infopo.lab.tokenizer import build_tokenizer
        >>> encoder = Encoder(build_tokenizer())
        >>> encoded_row = encoder.encode(PreferenceRow("1+1=", ["2"], ["3"], "pairs.jsonl:1"))
        >>> encoder.tokenizer.convert_ids_to_tokens(encoded_row.example.chosen_ids[0])
        ['2', '<|end|>']
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = 1024,
        max_prompt_length: int | None = None,
        on_too_long: str = "cut",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        as_chat: bool = False,
    ) -> None:
        RowSettings(max_length=max_length, max_prompt_length=max_prompt_length, on_too_long=on_too_long)
        if problems := check_variables(chat_template_kwargs or {}, "data.chat_template_kwargs"):
            raise ConfigError(problems)
        self.tokens = Tokenization(tokenizer)
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"tokenizer {tokenizer.name_or_path!r} has no EOS token, so a response could not end; "
                "set tokenizer.eos_token to the token that ends a turn"
            )
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, chat_template_kwargs)
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.on_too_long = on_too_long
        self.as_chat = as_chat
        self._endings = Endings(self.tokens)
        # In GPT-2's tokenizer, which knows all text, the unknown token is that of the end.
        known = {None, tokenizer.eos_token_id, tokenizer.bos_token_id}
        self._unknown = None if tokenizer.unk_token_id in known else tokenizer.unk_token_id
        self._writes_a_date = bool(tokenizer.chat_template) and self.template.writes_a_date()

    def settings(self) -> dict[str, Any]:
        """Returns all but the tokenizer that decides what becomes of a row."""
        return {
            "max_length": self.max_length,
            "max_prompt_length": self.max_prompt_length,
            "on_too_long": self.on_too_long,
            "chat_template_kwargs": self.template.variables,
            "as_chat": self.as_chat,
        }

    def encode(self, row: PreferenceRow) -> EncodedRow:
        """Returns the token ids of one row.

        Raises:
            DataError: The row cannot be used. Reasons are `empty prompt`, `empty chosen`, `empty rejected`,
                `prompt too long`, `too long`, `chosen = rejected`, `chosen = rejected after truncation`, `template
                refuses the row`, `template takes too long`, `template takes too much memory`, `template rewrites the
                prompt`, `template drops content`, `turns cannot be told apart`, `generation prompt closes reasoning`,
                `reserved template argument`, `not tokenizable`.
            ModelError: The row is a conversation, and the tokenizer has no chat template.
        """
        [result] = self.encode_all([row])
        if isinstance(result, DataError):
            raise result
        return result

    def encode_all(self, rows: Sequence[PreferenceRow]) -> list[EncodedRow | DataError]:
        """Returns for each row what `encode` returns or, as a value, the `DataError` that it raises.

        The texts of all rows are tokenized together, which is why this is faster than row by row.

        Raises:
            ModelError: As for `encode`.
        """
        drafts = [self._drafted(row) for row in rows]
        texts = (text for draft in drafts if isinstance(draft, _Draft) for text in draft.texts.texts)
        with self.tokens.read_ahead(texts):
            return [self._finished(draft) if isinstance(draft, _Draft) else draft for draft in drafts]

    def _drafted(self, row: PreferenceRow) -> _Draft | DataError:
        """The texts of a row, before any of them is tokenized."""
        notes = list[str]()
        try:
            row = _as_conversation(row) if self.as_chat else row
            texts: PlainText | Conversation
            if isinstance(row.prompt, str):
                texts = PlainText(self.tokens, self._endings, row, row.prompt)
            else:
                texts = Conversation(self.tokens, self.template, self._endings, row, row.prompt, notes)
        except DataError as error:
            return error
        return _Draft(row, texts, notes)

    def _finished(self, draft: _Draft) -> EncodedRow | DataError:
        try:
            return self._encoded(draft.row, draft.texts, draft.notes)
        except DataError as error:
            return error

    def _encoded(self, row: PreferenceRow, texts: PlainText | Conversation, notes: list[str]) -> EncodedRow:
        prompt, responses = texts.encoded(notes)
        if self._unknown is not None:
            lost = [self._unknown in ids for ids in (prompt, *(response.ids for response in responses))]
            notes += [UNKNOWN_TEXT] * sum(lost)
        if self.on_too_long == "drop":
            self._check_fits(prompt, responses, row.row_id)
        prompt = self._cut_prompt(prompt, row.row_id, notes)
        sides = ["chosen"] * len(row.chosen) + ["rejected"] * len(row.rejected)
        for response, side in zip(responses, sides, strict=True):
            # An end of turn alone is no response, because nothing in it could be preferred.
            if len(response.ids) <= len(response.end):
                raise DataError(f"expected a {side} response, it has no tokens", row.row_id, f"empty {side}")
        cut = [self._cut_response(response, len(prompt), notes) for response in responses]
        ids = [response.ids for response in cut]
        chosen, rejected = ids[: len(row.chosen)], ids[len(row.chosen) :]
        _check_different(chosen, rejected, cut != responses, row.row_id)
        context = [response.context for response in cut]
        example = PreferenceExample(
            prompt, chosen, rejected, row.row_id, context=tuple(context) if any(context) else ()
        )
        return EncodedRow(example, tuple(notes), self._warnings(row))

    def _check_fits(self, prompt: list[int], responses: list[Response], row_id: str) -> None:
        longest = len(prompt) + max(len(response.ids) for response in responses)
        limits = [
            (len(prompt), self.max_prompt_length, "prompt", "max_prompt_length"),
            (longest, self.max_length, "prompt with its longest response", "max_length"),
        ]
        for tokens, limit, what, name in limits:
            if limit is not None and tokens > limit:
                raise DataError(f"the {what} has {tokens} tokens, more than {name}={limit}", row_id, TOO_LONG)

    def _warnings(self, row: PreferenceRow) -> tuple[str, ...]:
        if isinstance(row.prompt, str):
            return (PLAIN_TEXT,) if self.tokenizer.chat_template else ()
        return (DATE_FIXED,) if self._writes_a_date else ()

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

    def _cut_response(self, response: Response, prompt_length: int, notes: list[str]) -> Response:
        length = len(response.ids)
        if self.max_length is None or prompt_length + length <= self.max_length:
            return response
        room = self.max_length - prompt_length
        notes.append(RESPONSE_CUT)
        ids, context = cut_response(response.ids, response.context, room)
        end = response.end[: self._endings.last_but_space(response.end) + 1]
        if end and len(ids) < length - len(response.end) + len(end):
            notes.append(END_OF_TURN_LOST)
        return Response(list(ids), (), tuple(context))


def prompt_ids(
    tokens: Tokenization,
    template: ChatTemplate,
    prompt: Text,
    row_id: str,
    *,
    tools: list[Any] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Returns the prompt as a policy sees it, in training and in generation.

    Args:
        tokens: Rules of the tokenizer.
        template: Chat template of the tokenizer.
        prompt: Text, or messages, behind which the generation prompt is written.
        row_id: Name of the prompt in errors.
        tools: Schemas for the template.
        variables: Further template variables.

    Raises:
        DataError: See `Encoder.encode`.
        ModelError: The prompt is a conversation, and the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        return tokens.text(prompt, row_id)
    text = template.render(prompt, row_id, tools=tools, variables=variables, add_generation_prompt=True)
    return tokens.bare(text, row_id)


def _as_conversation(row: PreferenceRow) -> PreferenceRow:
    """Returns a row of plain text as a conversation: the user's turn, and the assistant's for each response."""
    if not isinstance(row.prompt, str):
        return row

    def said(role: str, text: Text) -> list[Message]:
        return [{"role": role, "content": as_text(text, row)}]

    return replace(
        row,
        prompt=said("user", row.prompt),
        chosen=[said("assistant", response) for response in row.chosen],
        rejected=[said("assistant", response) for response in row.rejected],
    )


def _check_different(chosen: list[list[int]], rejected: list[list[int]], was_cut: bool, row_id: str) -> None:
    if not any(ids in rejected for ids in chosen):
        return
    reason = "chosen = rejected after truncation" if was_cut else "chosen = rejected"
    problem = "expected different responses, but chosen and rejected are the same tokens"
    remedy = "once cut to max_length; raise it" if was_cut else "as the tokenizer and its template write them"
    raise DataError(f"{problem} {remedy}", row_id, reason)


def encode_rows(
    rows: Iterable[PreferenceRow],
    encoder: Encoder,
    counts: DataCounts,
    *,
    num_proc: int | None = None,
) -> ExampleDataset:
    """Encodes all rows, in their order, and counts what happens to them.

    Args:
        rows: Rows, e.g. from `read_rows`.
        encoder: Encoder of the rows.
        counts: Ledger that counts used rows, notes and bad rows.
        num_proc: Number of worker processes. With None or 1, rows are encoded in this process.

    Raises:
        DataError: A row cannot be used and `counts.on_bad_row` is `raise`, or no row can be used.
    """
    results = in_processes(encoder.encode_all, rows, num_proc or 1)
    # The generator is closed here, because the traceback of a bad row would keep it, and with it the pool, alive.
    with closing(results):
        dataset = ExampleDataset.from_examples(_tallied(results, counts, encoder))
    if not len(dataset):
        reasons = (
            ", ".join(f"{n} x {reason}" for reason, n in counts.skipped.most_common()) or "there are none"
        )
        raise DataError(f"no row can be used: {reasons}", counts.source or "data", "no usable row")
    return dataset


def encoded(
    rows: Iterable[PreferenceRow], encoder: Encoder, counts: DataCounts
) -> Iterator[PreferenceExample]:
    """Encodes rows one by one when they are asked for, and counts what happens to them.

    Raises:
        DataError: A row cannot be used and `counts.on_bad_row` is `raise`.
    """
    return _tallied(chain.from_iterable(encoder.encode_all([row]) for row in rows), counts, encoder)


def _tallied(
    results: Iterable[EncodedRow | DataError], counts: DataCounts, encoder: Encoder
) -> Iterator[PreferenceExample]:
    for result in results:
        if isinstance(result, DataError):
            counts.bad_row(result)
            continue
        counts.used += 1
        for note in result.notes:
            counts.note(note, result.example.row_id)
        for warning in result.warnings:
            if not any(earlier.startswith(warning) for earlier in counts.warnings):
                first = " | ".join(
                    line.strip() for line in render(result.example, encoder.tokenizer).split("\n")
                )
                counts.warnings.append(f"{warning}. The first row: {first:.{_SHOWN}}")
        yield result.example
