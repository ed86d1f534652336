"""A conversation in token ids: its prompt, and what of each response follows it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from infopo.data.endings import Endings, Response
from infopo.data.templates import ChatTemplate, common_pieces, common_start, text_of
from infopo.data.tokenization import Tokenization
from infopo.data.turns import (
    IN_CONTENT,
    REASONING,
    behind_generation_prompt,
    context_spans,
    drops_empty_block,
    is_left_open,
    missing,
    missing_in_prompt,
)
from infopo.errors import DataError
from infopo.records import Message, PreferenceRow, Text

_CLOSING = ("</think>", "[/THINK]")

NOT_A_PREFIX = "prompt rendering is not a prefix"
MERGED_TOKENS = "tokens merge across the boundary"
WRITTEN_AS_DATA = "reasoning that the template drops, kept: the response is written as the data have it"
REASONING_DROPPED = "reasoning of an earlier turn dropped by the template"
EMPTY_BLOCK_DROPPED = "empty think block dropped by the template"
USERS_BETWEEN = "a response with turns of users between the policy's: they are context, and not scored"
PROMPT_NOT_WRITTEN = "a turn of the prompt, or a tool, that the chat template does not write"


@dataclass(frozen=True, slots=True)
class _Draft:
    """A response as text.

    Attributes:
        text: What follows the prompt.
        context: Begin and end, within the text, of each span that is not the policy's.
    """

    text: str
    context: tuple[tuple[int, int], ...] = ()


class Conversation:
    """A prompt of messages and its responses, as the template writes them, and then in tokens.

    The texts are known before any of them is tokenized, so that those of many rows can be tokenized together.

    Attributes:
        prompt_text: The prompt as the template writes it for `generate()`.
    """

    def __init__(
        self,
        tokens: Tokenization,
        template: ChatTemplate,
        endings: Endings,
        row: PreferenceRow,
        prompt: list[Message],
        notes: list[str],
    ) -> None:
        """Renders prompt and responses.

        Args:
            tokens: The tokenizer.
            template: Its chat template.
            endings: What ends a turn.
            row: The row.
            prompt: Its prompt.
            notes: What happened is added.

        Raises:
            DataError: See `Encoder.encode`.
            ModelError: The tokenizer has no chat template.
        """
        self._tokens, self._template, self._endings = tokens, template, endings
        self._row, self._prompt = row, prompt
        self.prompt_text = self._render(prompt, True)
        self._end = template.end_of_turn(prompt, row.row_id, row.chat_template_kwargs)
        if missing_in_prompt(prompt, row.tools, self.prompt_text):
            notes.append(PROMPT_NOT_WRITTEN)
        self._drafts = [self._draft(response, notes) for response in (*row.chosen, *row.rejected)]

    @property
    def texts(self) -> list[str]:
        """What will be tokenized."""
        texts = [self.prompt_text]
        for draft in self._drafts:
            texts.append(self.prompt_text + draft.text)
            texts += [self.prompt_text + draft.text[:place] for span in draft.context for place in span]
        return texts

    def encoded(self, notes: list[str]) -> tuple[list[int], list[Response]]:
        """Returns tokens of the prompt and of the responses, chosen first.

        Args:
            notes: What happened is added.

        Raises:
            DataError: `not tokenizable`.
        """
        prompt_ids = self._tokens.bare(self.prompt_text, self._row.row_id)
        return prompt_ids, [self._response(draft, prompt_ids, notes) for draft in self._drafts]

    def _render(self, turns: Sequence[Message], add_generation_prompt: bool = False) -> str:
        return self._template.render(
            turns,
            self._row.row_id,
            tools=self._row.tools,
            variables=self._row.chat_template_kwargs,
            add_generation_prompt=add_generation_prompt,
        )

    def _draft(self, response: Text, notes: list[str]) -> _Draft:
        turns = _as_turns(response, self._row)
        full_text = self._render([*self._prompt, *turns])
        start = self._start_in(full_text, notes)
        spans = []
        if len(turns) > 1:
            spans = context_spans(self._render, self._prompt, turns, full_text, self._row.row_id)
            if any(turn["role"] == "user" for turn in turns):
                notes.append(USERS_BETWEEN)
        written = self._with_dropped_reasoning(turns, full_text[start:], notes)
        text = full_text[start:] if written is None else written
        return _Draft(text, tuple((begin - start, end - start) for begin, end in spans))

    def _response(self, draft: _Draft, prompt_ids: list[int], notes: list[str]) -> Response:
        ids, merged = self._behind(prompt_ids, draft.text)
        if merged:
            notes.append(MERGED_TOKENS)
        context = [
            (
                self._place(prompt_ids, draft.text[:begin], ids, 1),
                self._place(prompt_ids, draft.text[:end], ids, 0),
            )
            for begin, end in draft.context
        ]
        done = self._endings.ended(ids, self._endings.ids(self._end), notes)
        return replace(done, context=tuple((begin, end) for begin, end in context if begin < end))

    def _start_in(self, full_text: str, notes: list[str]) -> int:
        """Where the response begins in the rendering of the whole conversation."""
        prompt_text = self.prompt_text
        if full_text.startswith(prompt_text):
            return len(prompt_text)
        common = common_pieces(prompt_text, full_text)
        # Not the bare rendering's whole length: some templates close it in a way that the generation prompt does not.
        if common < common_pieces(prompt_text, self._render(self._prompt)):
            raise DataError(
                "the chat template renders the prompt's own turns differently once a response follows, from "
                f"{prompt_text[common : common + 60]!r} on; "
                "use a template that renders earlier turns the same way every time",
                self._row.row_id,
                "template rewrites the prompt",
            )
        closing = next(
            (tag for tag in _CLOSING if tag in prompt_text[common:] and tag in full_text[common:]), None
        )
        if closing is not None:
            raise DataError(
                f"the generation prompt closes the reasoning ({closing}), and the rendered response holds some, or "
                "closes it in a later turn only; set the template's variable for it (chat_template_kwargs, such as "
                "enable_thinking: true), or take the reasoning, or further rounds, out of the data",
                self._row.row_id,
                "generation prompt closes reasoning",
            )
        notes.append(NOT_A_PREFIX)
        return common

    def _behind(self, prompt_ids: list[int], text: str) -> tuple[list[int], bool]:
        tokens, row_id = self._tokens, self._row.row_id
        whole = tokens.bare(self.prompt_text + text, row_id)
        return tokens.after(prompt_ids, text, whole, row_id)

    def _place(self, prompt_ids: list[int], text: str, ids: list[int], merged: int) -> int:
        """How many of the response's tokens write the text that it begins with.

        A token that reaches beyond the text counts as `merged` says: one that holds what the policy wrote is scored.
        """
        before, _ = self._behind(prompt_ids, text)
        place = common_start(before, ids)
        return place + (merged if place < len(before) else 0)

    def _with_dropped_reasoning(
        self, turns: Sequence[Message], rendered: str, notes: list[str]
    ) -> str | None:
        """The response as the policy would write it, if the template drops reasoning of the last turn; else None.

        Raises:
            DataError: Something else is missing, or that cannot be written.
        """
        for turn in turns[:-1]:
            if turn["role"] == "assistant":
                self._note_dropped(turn, rendered, notes)
        lost = missing(turns[-1], rendered)
        if not lost and "</think>" not in text_of(turns[-1].get("content")):
            return None
        generating = self._render([*self._prompt, *turns[:-1]], True)
        last = rendered.removeprefix(generating[len(self.prompt_text) :])
        if not lost and is_left_open(turns[-1], generating, last):
            lost = [(IN_CONTENT, "</think>")]
        elif not lost and drops_empty_block(
            lambda turn: self._render([*self._prompt, *turns[:-1], turn]), turns[-1], generating, last
        ):
            if turns[-1].get("tool_calls") or not self._end:  # how the template writes the rest is not known
                notes.append(EMPTY_BLOCK_DROPPED)
                return None
            lost = [(IN_CONTENT, "</think>")]
        if not lost:
            return None
        behind = behind_generation_prompt(turns[-1], generating)
        if {name for name, _ in lost} != {IN_CONTENT} or behind is None or not self._end:
            self._refuse_missing(*lost[0])
        if not generating.startswith(self.prompt_text):
            self._refuse_missing(*lost[0])
        notes.append(WRITTEN_AS_DATA)
        return generating[len(self.prompt_text) :] + str(behind) + self._end

    def _note_dropped(self, turn: Message, rendered: str, notes: list[str]) -> None:
        """Counts what a template leaves out of an earlier turn of the policy, or refuses it if it is no reasoning."""
        lost = missing(turn, rendered)
        for name, text in lost:
            if name not in (*REASONING, IN_CONTENT):
                self._refuse_missing(name, text)
            notes.append(REASONING_DROPPED)
        if not lost and "</think>" in text_of(turn.get("content")) and "</think>" not in rendered:
            notes.append(EMPTY_BLOCK_DROPPED)

    def _refuse_missing(self, name: str, text: str) -> NoReturn:
        problem = (
            f"the chat template does not write the {name} of a response: {text.strip()!r:.100}; use a template that "
            "does, or set the variable that makes it (chat_template_kwargs, such as enable_thinking: true), or take "
            "it out of the data"
        )
        raise DataError(problem, self._row.row_id, "template drops content")


def _as_turns(turns: Text, row: PreferenceRow) -> list[Message]:
    if isinstance(turns, str):
        raise DataError(
            "expected a list of messages after a prompt of messages, got text", row.row_id, "wrong type"
        )
    return turns
