r"""Rules that read a number from a response and compare it with that of the solution. Imports no torch.

`numeric` is ours: the number behind the last answer marker, or the last number of a response without one. What counts
as a number stands in `numbers`. `lm_eval_strict` and `lm_eval_flexible` are those of lm-evaluation-harness for GSM8K,
so that the same outputs can be compared with published scores.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from infopo.evaluation.items import Answered, Mark, Rule
from infopo.evaluation.numbers import LIST_ITEM, Number, number_at, numbers, plain

NO_ANSWER = "no answer"
UNFINISHED = "unfinished"

_MARKER = re.compile(
    r"""
    (?P<hashes>\#{4}(?!\#))
  | (?P<boxed>\\[bf]?box(?:ed)?\s*\{)
  | (?P<tag><answer>)
  | (?P<is>\banswers?\b[^\n.!?:=]{0,80}?\b(?:is|are|was|be|equals)(?![a-z])(?:[ ]*:)?)
  | (?P<colon>\b(?:answer|ans|final[ ]result)\b[^\n.!?:=\d]{0,60}?[:=]
            | \bfinal[ ]answer\b(?=[ ]*(?:\n|-|$))
            | (?:^|(?<=\n))[ ]*A:)
    """,
    re.VERBOSE | re.IGNORECASE,
)

_FILLERS = re.compile(
    r"(?:[\s:=~*$({\[]|-(?=[\s*])|\b(?:about|approximately|approx\.?|around|roughly|exactly|only|just|simply|now|thus|"
    r"therefore|so|that|a\ total\ of|in\ total|[a-z]\s*=)\b)*",
    re.IGNORECASE,
)

_OPERATION = re.compile(r"(?:[\s%)$}]|\b[^\W\d]{1,12}\b){0,6}?(?:[+*/^=]|\bx\b|-)\s*[\s($]*(?:\d|[a-zA-Z]\b)")
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$)|</answer>", re.IGNORECASE)
_LONGEST_BOX = 1000
"""Characters that a box may have, so that a model that repeats its beginning costs no time."""

_BRACE = re.compile("[{}]")
_REMARK = re.compile(r"\([^()]*\)")


def numeric_marks(answers: Sequence[Answered]) -> list[Mark]:
    r"""Marks responses by the rule `numeric`: the number behind the last answer marker equals that of the solution.

    Markers are `####`, `\boxed{...}`, `the answer is`, `Answer:`, `A:` at the beginning of a line, and their like. A
    number that stands right behind the marker is the answer, unless it begins an equation, whose right side is the
    answer then. A marker without a number says nothing, and the one before it counts. In a response without a marker,
    the answer is the last number outside of brackets. Such a response is wrong if it was cut off, since its last number
    is that of some step.

    Example:
        >>> from infopo.evaluation.items import Item
        >>> item = Item("gsm8k/0", "How many?", "18")
        >>> numeric_marks([Answered(item, "16 - 3 - 4 = 9, and 9 * 2 = $18.00 (step 2)."), Answered(item, "Many.")])
        [Mark(correct=True, answer='18', note=None), Mark(correct=False, answer=None, note='no answer')]
    """
    return [_numeric(answered) for answered in answers]


def read_number(response: str, *, finished: bool = True) -> Number | None:
    """Returns the number that a response gives as its answer, or None if there is none.

    Args:
        response: Text of the response.
        finished: Whether the model ended it. A number at the very end of a text that was cut off may lack digits.
    """
    text = plain(response)
    found = _marked(text) or (_last(text) if finished else None)
    if found is not None and not finished and found.end == len(text.rstrip(" .")):
        return None
    return found


def last_box(text: str) -> str | None:
    r"""Returns what stands in the last `\boxed{...}` of a text, or None if there is none.

    Example:
        >>> last_box(r"so $x = \boxed{\frac{1}{2}}$")
        '\\frac{1}{2}'
    """
    boxes = [marker for marker in _MARKER.finditer(text) if marker["boxed"]]
    return text[boxes[-1].end() : _closing_brace(text, boxes[-1].end())].strip() if boxes else None


def _numeric(answered: Answered) -> Mark:
    found = read_number(answered.response, finished=answered.finished)
    if found is None:
        return Mark(False, None, NO_ANSWER if answered.finished else UNFINISHED)
    gold = _last(plain(str(answered.item.gold)))
    return Mark(gold is not None and found.equals(gold), str(found))


def _marked(text: str) -> Number | None:
    """Returns the number behind the last marker that has one."""
    end = len(text)
    for marker in reversed(list(_MARKER.finditer(text))):
        if (found := _behind(marker, text, end)) is not None:
            return found
        end = marker.start()
    return None


def _behind(marker: re.Match[str], text: str, end: int) -> Number | None:
    if marker["boxed"]:
        return _stated(text, marker.end(), _closing_brace(text, marker.end()))
    start = _skip_fillers(text, marker.end(), end)
    if marker["hashes"]:
        # Others write headings with it: "#### Step 2", "#### 2. Add them".
        found = number_at(text, start) if "\n" not in text[marker.end() : start] else None
        is_heading = found is not None and LIST_ITEM.match(text, found.end)
        return None if is_heading else found
    stop = _SENTENCE_END.search(text, start, end)
    sentence_end = stop.start() if stop else end
    found = _stated(text, start, sentence_end)
    if marker["colon"] and (found is None or not _stands_alone(text, start, sentence_end)):
        # Prompts that end in "Answer:" make models begin with it, and reason behind it.
        return _last(text, start, end)
    return found or (_last(text, start, end) if marker["tag"] else None)


def _stated(text: str, start: int, end: int) -> Number | None:
    """Returns the number that a piece of text states: its first if it begins with it, else that of its equation."""
    start = _skip_fillers(text, start, end)
    first = number_at(text, start)
    if first is not None and first.end > end:
        first = None
    if first is not None and not _OPERATION.match(text, first.end, end):
        return first
    equals = text.rfind("=", start, end)
    if equals >= 0 and (result := next(_outside_brackets(text, equals + 1, end), None)) is not None:
        return result
    return first or _last(text, start, end)


def _stands_alone(text: str, start: int, end: int) -> bool:
    """Whether a sentence has one number and no equation."""
    return "=" not in text[start:end] and len(list(numbers(text[start:end]))) == 1


def _last(text: str, start: int = 0, end: int | None = None) -> Number | None:
    """Returns the last number, of those outside of brackets if there is one."""
    end = len(text) if end is None else end
    found = [*_outside_brackets(text, start, end)] or [*numbers(text[start:end])]
    return found[-1] if found else None


def _outside_brackets(text: str, start: int, end: int) -> Iterator[Number]:
    # As many blanks as there were characters, so that places stay what they are.
    piece = _REMARK.sub(lambda remark: " " * len(remark[0]), text[start:end])
    for number in numbers(piece):
        yield replace(number, start=number.start + start, end=number.end + start)


def _skip_fillers(text: str, start: int, end: int) -> int:
    match = _FILLERS.match(text, start, end)
    assert match is not None  # it matches nothing, too
    at = match.end()
    # A currency sign and the minus before it belong to the number.
    while at > start and text[at - 1] in "$-":
        at -= 1
    return at


def _closing_brace(text: str, start: int) -> int:
    """Returns where the brace is closed that was opened before `start`. An open one ends with its line."""
    depth, end = 1, min(len(text), start + _LONGEST_BOX)
    for brace in _BRACE.finditer(text, start, end):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    line_end = text.find("\n", start, end)
    return end if line_end < 0 else line_end


_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = tuple(map(re.compile, (",", r"\$", "(?s).*#### ", r"\.$")))


def lm_eval_strict_marks(answers: Sequence[Answered]) -> list[Mark]:
    """Marks responses as `strict-match` of the task `gsm8k` in lm-evaluation-harness 0.4.13 does.

    It takes the *first* `#### ` that a number follows, and compares texts: `18.0` is not `18`.
    """
    return [_lm_eval(answered, lambda text: next(iter(_STRICT.findall(text)), None)) for answered in answers]


def lm_eval_flexible_marks(answers: Sequence[Answered]) -> list[Mark]:
    """Marks responses as `flexible-extract` of the task `gsm8k` in lm-evaluation-harness 0.4.13 does.

    It takes the last piece of digits, `$`, `.` and `,`, and compares texts: `$18.00` is not `18`, and of `18 eggs...`
    it takes the dots.
    """

    def last(text: str) -> str | None:
        found = _FLEXIBLE.findall(text)
        return next(filter(None, found[-1])) if found else None

    return [_lm_eval(answered, last) for answered in answers]


def _lm_eval(answered: Answered, extract: Callable[[str], str | None]) -> Mark:
    answer = extract(answered.response)
    if answer is None:
        return Mark(False, None, NO_ANSWER)
    return Mark(_compared(answer) == _compared(str(answered.item.gold)), answer)


def _compared(text: str) -> str:
    for pattern in _IGNORED:
        text = pattern.sub("", text)
    return text.lower()


NUMBER_RULES: dict[str, Rule] = {
    "numeric": numeric_marks,
    "lm_eval_strict": lm_eval_strict_marks,
    "lm_eval_flexible": lm_eval_flexible_marks,
}
"""The rules that need no library. The first is the headline of GSM8K and SVAMP."""
