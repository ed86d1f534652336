"""What a rendered response consists of: what the policy writes, what stands between its turns, and what is missing.

A response may hold several turns of the policy, between which tools or users answer. The policy writes an assistant
turn from the end of its generation prompt to the end of the turn, white space behind it included: what it writes when
the turn stands alone as a response. Everything else (what others answer, headers of turns) is context.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any

from infopo.data.templates import common_end, common_pieces, text_of
from infopo.errors import DataError
from infopo.records import Message

Render = Callable[[Sequence[Message], bool], str]
"""Turns, and whether a generation prompt follows them -> what the template writes."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message under which templates look for what was thought before its content."""

IN_CONTENT = "reasoning in content"

_THINK = re.compile(r"</?think>|\[/?THINK\]")
_EMPTY_BLOCK = re.compile(r"(?:<think>|\A)\s*</think>")
_FILLING = "what-was-thought"


def context_spans(
    render: Render, prompt: Sequence[Message], response: Sequence[Message], text: str, row_id: str
) -> list[tuple[int, int]]:
    """Where the rendering of a conversation holds context within its response: begin and end of each span.

    A turn is found in the whole from behind: what follows its content is what two renderings have in common that
    differ in this content alone. So it does not matter whether a template writes earlier turns differently once others
    follow, as those do that drop their reasoning.

    Args:
        render: The template.
        prompt: The turns before the response.
        response: Its turns.
        text: The rendering of all of them.
        row_id: Name of the row in errors.

    Raises:
        DataError: `turns cannot be told apart`; what `render` raises.
    """
    turns = [*prompt, *response]
    policys = [i for i in range(len(prompt), len(turns)) if turns[i]["role"] == "assistant"]
    spans: list[tuple[int, int]] = []
    for before, after in pairwise(policys):
        start = spans[-1][1] if spans else 0
        begins = _ends_of(render, turns, before, turns[: before + 1], False, text)
        ends = list(_ends_of(render, turns, after - 1, turns[:after], True, text))
        fitting = (
            (begin, end)
            for begin in begins
            for end in ends
            if begin <= end and _parts_as_turns(turns, before, after, text, (start, begin, end))
        )
        span = next(fitting, None)
        if span is None:
            problem = (
                "the chat template writes the turns of this response so that what the policy says cannot be told from "
                "what others answer; use a template that writes the content of each turn, or responses of one turn"
            )
            raise DataError(problem, row_id, "turns cannot be told apart")
        spans.append(span)
    return spans


def _ends_of(
    render: Render,
    turns: Sequence[Message],
    index: int,
    first: Sequence[Message],
    add_generation_prompt: bool,
    text: str,
) -> Iterator[int]:
    """Where a turn may end in the rendering `text` of all turns, if it ends as in the rendering of the `first` ones."""
    try:
        beginning = render(first, add_generation_prompt)
    except DataError:  # a conversation that a template refuses to end here
        return
    for pair in _variants(turns[index]):
        whole = _behind(render, turns, index, pair, False)
        alone = _behind(render, first, index, pair, add_generation_prompt)
        if whole is not None and alone is not None and text.endswith(whole) and beginning.endswith(alone):
            yield len(text) - len(whole) + common_pieces(alone, whole)


def _behind(
    render: Render,
    turns: Sequence[Message],
    index: int,
    pair: tuple[Message, Message],
    add_generation_prompt: bool,
) -> str | None:
    """What both renderings have in common behind the turn in which they differ."""
    try:
        zero, one = (
            render([*turns[:index], turn, *turns[index + 1 :]], add_generation_prompt) for turn in pair
        )
    except DataError:  # a template may refuse content beside tool calls
        return None
    return None if zero == one else common_end(zero, one)


def _variants(turn: Message) -> Iterator[tuple[Message, Message]]:
    """Pairs of turns that differ in one character, after which stands what ends them."""
    yield {**turn, "content": "0"}, {**turn, "content": "1"}
    if turn.get("tool_calls"):
        pair = deepcopy(turn), deepcopy(turn)
        for each, number in zip(pair, (0, 1), strict=True):
            call = each["tool_calls"][-1]
            function = call.get("function") or call
            arguments = {"0": number}
            is_text = isinstance(function.get("arguments"), str)
            function["arguments"] = json.dumps(arguments) if is_text else arguments
        yield pair


def _parts_as_turns(
    turns: Sequence[Message], before: int, after: int, text: str, places: tuple[int, int, int]
) -> bool:
    """Whether what two turns of the policy say stands before and behind a span, and what others say between in it."""
    start, begin, end = places
    context = _squeezed(text[begin:end])
    between = [text_of(turn.get("content")) for turn in turns[before + 1 : after]]
    return (
        all(_stands_in(said, context) for said in between)
        and missing(turns[before], text[start:begin]) == missing(turns[before], text)
        and missing(turns[after], text[end:]) == missing(turns[after], text)
    )


def missing(turn: Message, text: str) -> list[tuple[str, str]]:
    """What of an assistant turn does not stand in a rendering: where it comes from, and its text.

    White space does not count, nor do tags around reasoning, which templates write in their own way. What was thought
    stands before what is said: a short thought is not found in the words of the answer, or in a tag behind them.

    Args:
        turn: The message.
        text: The rendering in which it should stand.
    """
    pieces = list(_thoughts_and_answer(turn))
    # The ordinary turn stands there word for word.
    if len(pieces) == 1 and not turn.get("tool_calls") and pieces[0][1].strip() in text:
        return []
    squeezed = _squeezed(text)
    lost: list[tuple[str, str]] = []
    before = _THINK.sub("", squeezed)
    for name, piece in reversed(pieces):
        place = _place_in(_THINK.sub("", piece), before)
        if place < 0:
            lost.insert(0, (name, piece))
        else:
            before = before[:place]
    return lost + [(name, piece) for name, piece in _calls(turn) if not _stands_in(piece, squeezed)]


def missing_in_prompt(turns: Sequence[Message], tools: Sequence[Any] | None, text: str) -> bool:
    """Whether a template leaves out what a system, a user or a tool says, or a tool that there is.

    What it leaves out of earlier turns of the assistant is its own affair: many drop their reasoning.

    Args:
        turns: The prompt.
        tools: Schemas of the tools.
        text: The prompt's rendering.
    """
    said = [text_of(turn.get("content")) for turn in turns if turn["role"] != "assistant"]
    functions = [tool.get("function") or tool for tool in tools or () if isinstance(tool, Mapping)]
    names = [str(function.get("name", "")) for function in functions if isinstance(function, Mapping)]
    pieces = [piece for piece in (*said, *names) if piece.strip() not in text]
    squeezed = _squeezed(text) if pieces else ""
    return not all(_stands_in(piece, squeezed) for piece in pieces)


def _stands_in(piece: str, squeezed: str) -> bool:
    return _place_in(piece, squeezed) >= 0


def _place_in(piece: str, squeezed: str) -> int:
    """Where the last occurrence of a piece begins, as it is or with JSON's escapes; -1: nowhere."""
    forms = {piece}
    # Most texts hold nothing that JSON escapes, and this is asked for all text of all rows.
    if not (piece.isascii() and piece.isprintable()) or '"' in piece or "\\" in piece:
        forms.update(json.dumps(piece, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))
    return max(squeezed.rfind(_squeezed(each)) for each in forms)


def _thoughts_and_answer(turn: Message) -> Iterator[tuple[str, str]]:
    """What a turn's text consists of, in the order in which it is written."""
    for key in REASONING:
        if isinstance(turn.get(key), str):
            yield key, turn[key]
    *thoughts, answer = _THINK.split(text_of(turn.get("content")))
    yield from ((IN_CONTENT, thought) for thought in thoughts)
    yield "content", answer


def _calls(turn: Message) -> Iterator[tuple[str, str]]:
    for call in turn.get("tool_calls") or ():
        function = call.get("function") or call if isinstance(call, Mapping) else {}
        yield "tool_calls", str(function.get("name", ""))
        yield from (("tool_calls", value) for value in _texts(function.get("arguments")))


def _texts(value: Any) -> Iterator[str]:
    """All texts within arguments of a tool call, which may be JSON themselves."""
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        if isinstance(parsed, Mapping | list):
            yield from _texts(parsed)
        else:
            yield value
    elif isinstance(value, Mapping):
        yield from value
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def is_left_open(turn: Message, generation_prompt: str, rendered: str) -> bool:
    """Whether a generation prompt opens a think block which the turn closes, and its rendering does not."""
    opens, closes = generation_prompt.rstrip().endswith("<think>"), "</think>" in text_of(turn.get("content"))
    return opens and closes and "</think>" not in rendered


def drops_empty_block(
    render_last: Callable[[Message], str], turn: Message, generation_prompt: str, rendered: str
) -> bool:
    """Whether a template leaves out an empty think block, such as `<think></think>`, which has no text to look for.

    A template may also write such a block with tags of its own. Whether it does is seen from a block with a word in it.

    Args:
        render_last: The template, for the conversation with another last turn.
        turn: The last turn.
        generation_prompt: What the template writes before it.
        rendered: What the template writes of it.
    """
    content = text_of(turn.get("content"))
    written = rendered.count("</think>") + generation_prompt.rstrip().endswith("</think>")
    if written >= content.count("</think>") or not _EMPTY_BLOCK.search(content):
        return False
    filled = render_last({**turn, "content": _EMPTY_BLOCK.sub(f"<think>{_FILLING}</think>", content)})
    return _FILLING not in filled or re.search(rf"{_FILLING}\s*</think>", filled) is not None


def behind_generation_prompt(turn: Message, generation_prompt: str) -> str | None:
    r"""A turn's text as the policy would write it behind its generation prompt; None: only a template can say.

    A generation prompt may end with what the text begins with: `<think>`.

    >>> behind_generation_prompt({"role": "assistant", "content": "<think>so</think>2"}, "assistant\n<think>\n")
    'so</think>2'
    """
    content = text_of(turn.get("content"))
    if turn.get("tool_calls") or any(turn.get(key) for key in REASONING):
        return None
    tail = generation_prompt.rstrip().rpartition("\n")[2]
    if tail.endswith("</think>"):  # it says that there is none
        return None
    if tail.endswith("<think>"):
        opened, tag, rest = content.partition("<think>")
        if not tag and "</think>" in content:  # data that were written behind such a prompt
            return content
        if opened.strip() or not rest:
            return None
        return rest.lstrip() if generation_prompt[-1].isspace() else rest
    return content
