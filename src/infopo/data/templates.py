"""A tokenizer's chat template: what it writes for a conversation, what ends a turn in it, which date it gets.

A template is a program that came with a model. It runs in transformers' sandbox, for a limited time and with limited
memory, and whatever it raises is a `DataError` of the row.

**Dates.** Some templates (Llama 3.2's, gpt-oss's) write today's date. Tokens that change at midnight would end a
resumed run and the use of stored reference log-probs, so "today" is always `TODAY` here, the date that Llama 3.2's
template falls back to, unless the template variable `strftime_now` names another: `{"strftime_now": "2026-11-26"}`.
"""

import gc
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from inspect import signature
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes
from transformers import PreTrainedTokenizerBase

from infopo.data.memory_limit import MemoryLimit
from infopo.data.time_limit import TimeLimit, TimeLimitError
from infopo.errors import DataError, ModelError
from infopo.records import Message

TEMPLATE_ARGUMENTS = frozenset(signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {
    "self",
    "documents",
    "kwargs",
} | {"messages"}
"""Arguments of `apply_chat_template` that `chat_template_kwargs` may not set: they are this module's."""

DATE = "strftime_now"
"""Name under which a template asks for today's date, and under which `chat_template_kwargs` may fix it."""

TODAY = "2024-07-26"

SECONDS_PER_RENDERING = 10.0
_time_limit = TimeLimit(SECONDS_PER_RENDERING)

TAKES_TOO_LONG = "template takes too long"
"""Reason of a row that the template has not rendered in `SECONDS_PER_RENDERING`."""

BYTES_PER_RENDERING = 2**31
_memory_limit = MemoryLimit(BYTES_PER_RENDERING)
_LONGEST = 2**27
"""Characters of a rendering. A row has at most half as many bytes."""

TAKES_TOO_MUCH = "template takes too much memory"
"""Reason of a row for which the template needs more than `BYTES_PER_RENDERING`, or writes more than `_LONGEST`."""

_DIRECTIVES = "aAbBdHIjmMpSUwWxXyYcfGuVZz"

_PIECE = re.compile(r"<[^<>\s]{1,80}>|\[[^\[\]\s]{1,80}\]|\w+|\s|.", re.DOTALL)
"""What is never split where two renderings part: a tag or special token, a word, or one other character."""


class ChatTemplate:
    """Renders conversations with a tokenizer's template.

    Args:
        tokenizer: Whose template it is.
        variables: Template variables for all rows; those of a row come before them.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.variables = dict(variables or {})
        self._ends: dict[str, str] = {}
        self._known_reads: dict[str, tuple[bool, bool]] = {}
        self._known_bounded = set[str]()

    def render(
        self,
        turns: Sequence[Message],
        row_id: str,
        *,
        tools: list[Any] | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """What the template writes.

        Args:
            turns: The conversation.
            row_id: Name of the row in errors.
            tools: Schemas of the tools that the template may describe.
            variables: The row's own template variables.
            add_generation_prompt: Whether it ends with what a policy continues.

        Raises:
            DataError: `template refuses the row`, `reserved template argument`.
            ModelError: The tokenizer has no chat template, or it is not valid.
        """
        if reserved := TEMPLATE_ARGUMENTS.intersection(variables or ()):
            problem = f"chat_template_kwargs: {', '.join(sorted(reserved))} cannot be set by a row"
            raise DataError(problem, row_id, "reserved template argument")
        values = {**self.variables, **(variables or {})}
        template = self._source(tools)
        turns = [self._as_read(turn, template, values) for turn in turns]
        return self._run(template, turns, row_id, tools, values, add_generation_prompt)

    def end_of_turn(
        self, prompt: Sequence[Message], row_id: str, variables: Mapping[str, Any] | None = None
    ) -> str:
        """What the template writes after the content of a conversation's last turn, learned by rendering two of them.

        `<|im_end|>` and a line break for ChatML, two end tokens for Phi-3, nothing for GLM.

        Args:
            prompt: A prompt for which the template is known to work, should it refuse the plainest one.
            row_id: Name of the row in errors.
            variables: The row's own template variables.

        Raises:
            DataError: `template refuses the row`.
        """
        key = repr(sorted((variables or {}).items()))
        if key not in self._ends:
            plainest: Sequence[Message] = [{"role": "user", "content": "0"}]
            try:
                self._ends[key] = self._common_end(plainest, row_id, variables)
            except DataError:
                self._ends[key] = self._common_end(prompt, row_id, variables)
        return self._ends[key]

    def _common_end(self, prompt: Sequence[Message], row_id: str, variables: Mapping[str, Any] | None) -> str:
        zero, one = (
            self.render([*prompt, {"role": "assistant", "content": text}], row_id, variables=variables)
            for text in ("0", "1")
        )
        return "" if zero == one else common_end(zero, one)

    def writes_a_date(self) -> bool:
        """Whether the template writes today's date, which no variable fixes."""
        if DATE in self.variables or DATE not in str(self.tokenizer.chat_template):
            return False
        turns = [{"role": "user", "content": "0"}]
        try:
            template = self._source(None)
            days = (self._run(template, turns, "", None, {**self.variables, DATE: day}, True) for day in
                    ("2001-01-01", "2022-12-22"))  # fmt: skip
            return len(set(days)) > 1
        except DataError:
            return True

    def _source(self, tools: list[Any] | None) -> str:
        name = self.tokenizer.name_or_path
        if not self.tokenizer.chat_template:
            raise ModelError(
                f"tokenizer {name!r} has no chat template, and the data are conversations; "
                "use an instruction-tuned model's tokenizer, set tokenizer.chat_template, or give the data as text"
            )
        try:
            return str(self.tokenizer.get_chat_template(None, tools))
        except ValueError as error:
            raise ModelError(f"tokenizer {name!r}: {error}") from error

    def _run(
        self,
        template: str,
        turns: Sequence[Message],
        row_id: str,
        tools: list[Any] | None,
        values: dict[str, Any],
        add_generation_prompt: bool,
    ) -> str:
        try:
            self._check_bounded(template)
            if DATE in template:
                template = _with_date(template, str(values.get(DATE, TODAY)))
            values = {name: value for name, value in values.items() if name != DATE}
            with _memory_limit(), _time_limit():
                text = str(
                    self.tokenizer.apply_chat_template(
                        list(turns),
                        tools=tools,
                        chat_template=template,
                        add_generation_prompt=add_generation_prompt,
                        tokenize=False,
                        **values,
                    )
                )
            if len(text) > _LONGEST:
                raise MemoryError
            return text
        except TemplateSyntaxError as error:
            raise ModelError(
                f"the chat template of {self.tokenizer.name_or_path!r} is not valid: {error}"
            ) from error
        except TimeLimitError:
            problem = (
                f"the tokenizer's chat template has not rendered it in {_time_limit.seconds:g} seconds; "
                "it may loop for ever: use another template"
            )
            raise DataError(problem, row_id, TAKES_TOO_LONG) from None
        except MemoryError as error:
            # What the template has made would live as long as the error that is raised here.
            error.__traceback__ = error.__context__ = None
            gc.collect()
            problem = (
                f"the tokenizer's chat template takes more than {_memory_limit.bytes >> 20} MiB for it, or writes more "
                f"than {_LONGEST >> 20} million characters: use another template"
            )
            raise DataError(problem, row_id, TAKES_TOO_MUCH) from None
        except ModelError:
            raise
        # Templates are programs: on data they were not written for they fail in any way.
        except Exception as error:
            problem = (
                f"the tokenizer's chat template cannot render it: {str(error) or type(error).__name__:.300}"
            )
            raise DataError(problem, row_id, "template refuses the row") from error

    def _check_bounded(self, template: str) -> None:
        """Refuses what is a single step for Python, takes for ever, and cannot be interrupted: `9 ** 9 ** 9`."""
        if template in self._known_bounded:
            return
        if "**" in template and Environment(autoescape=True).parse(template).find(nodes.Pow):
            raise ModelError(
                f"the chat template of {self.tokenizer.name_or_path!r} computes a power (`**`), which may take for "
                "ever and which no conversation needs: use another template"
            )
        self._known_bounded.add(template)

    def _as_read(self, turn: Message, template: str, values: dict[str, Any]) -> Message:
        """The turn with its content as text or as a list of parts, whichever the template reads."""
        content = turn.get("content")
        if isinstance(content, list) and not self._reads(template, values)[1]:
            return {**turn, "content": text_of(content)}
        if isinstance(content, str) and self._reads(template, values) == (False, True):
            return {**turn, "content": [{"type": "text", "text": content}]}
        return turn

    def _reads(self, template: str, values: dict[str, Any]) -> tuple[bool, bool]:
        """Whether the template writes content that is text, and content in parts as if it were text.

        Templates of models that see pictures may know parts only, and write nothing, or a list, for the other.
        """
        if template not in self._known_reads:
            texts, parts = (
                [self._tried(template, values, content(letter)) for letter in "01"]
                for content in (str, lambda letter: [{"type": "text", "text": letter}])
            )
            reads_text = None not in texts and texts[0] != texts[1]
            reads_parts = None not in parts and parts[0] != parts[1] and "'" + "text" not in str(parts[0])
            self._known_reads[template] = reads_text, reads_parts and (not reads_text or texts == parts)
        return self._known_reads[template]

    def _tried(self, template: str, values: dict[str, Any], content: object) -> str | None:
        try:
            return self._run(template, [{"role": "user", "content": content}], "", None, values, True)
        except DataError:
            return None


def text_of(content: object) -> str:
    """The text of a message's content: itself, or that of its parts one after the other."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


def common_end(a: str, b: str) -> str:
    """The longest text with which both end."""
    limit = min(len(a), len(b))
    return a[len(a) - common_start(a[::-1][:limit], b[::-1][:limit]) :]


def common_start(a: Sequence[object], b: Sequence[object]) -> int:
    """Number of characters, or tokens, with which both begin.

    >>> common_start("abc", "abd")
    2
    """
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (left, right) in pairs if left != right), min(len(a), len(b)))


def common_pieces(a: str, b: str) -> int:
    """Number of characters with which both begin, without splitting a tag or a word of either.

    >>> common_pieces("<think> so", "<think> such"), common_pieces("<think>", "<table>")
    (8, 0)
    """
    end = common_start(a, b)
    start = next((i + 1 for i in range(end - 1, -1, -1) if a[i].isspace()), 0)
    common = start
    for left, right in zip(_PIECE.finditer(a, start), _PIECE.finditer(b, start), strict=False):
        if left.group() != right.group() or common >= end:
            break
        common = left.end()
    return common


def check_variables(variables: Mapping[str, Any], name: str) -> list[str]:
    """What is wrong with template variables that are set for all rows: one sentence a problem.

    Args:
        variables: The setting.
        name: What it is called, for the sentences.
    """
    problems = []
    if reserved := TEMPLATE_ARGUMENTS.intersection(variables):
        problems.append(
            f"{name}: {', '.join(sorted(reserved))} cannot be set: infopo itself sets it for each row"
        )
    try:
        json.dumps(variables)
    except (TypeError, ValueError) as error:
        problems.append(f"{name}: expected values that JSON can hold, which templates can read: {error}")
    try:
        datetime.fromisoformat(str(variables.get(DATE, TODAY)))
    except ValueError:
        problems.append(f"{name}.{DATE}: expected a date like {TODAY}, got {variables[DATE]!r}")
    return problems


def _with_date(template: str, date: str) -> str:
    """The template with a `strftime_now` of its own: variables of a template cannot be functions, its macros can."""
    now = datetime.fromisoformat(date)
    codes = [f"%-{code}" for code in "dmHIMSjy"] + [f"%{code}" for code in _DIRECTIVES]
    filters = "".join(f" | replace({code!r}, {now.strftime(code)!r})" for code in codes)
    return f"{{%- macro {DATE}(format) -%}}{{{{- format{filters} -}}}}{{%- endmacro %}}\n{template}"
