r"""Numbers as models write them: currency, commas, units, LaTeX, fractions, Unicode minus. Imports no torch.

What counts as a number, and what it is worth:

- `1,234`, `1{,}234`, `1\,234` and `1 234` with a narrow space are 1234, `18 000` is 18000. A comma that no three digits
  follow separates.
- `$18.00`, `18 dollars`, `18kg` and `**18**` are 18: currency, units and markup say nothing about the value.
- `50%` is 50. A percent sign is a unit, too, on both sides of a comparison, so `50%` is never 0.5.
- `1/2`, `\frac{1}{2}` and `2 1/2` are fractions, compared exactly. `1.5e6` and `1.5 \times 10^6` are powers of ten.
- `4 million` is 4, and also 4000000: problems ask for either, and no other answer comes close to both.
- The minus signs of Unicode are minus signs, unless a number stands before them.
- `3:30`, `2nd`, `x2`, `m^2`, `step 3` and the `3.` of a numbered list are no numbers.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction

_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

_LONGEST = 400
"""Largest number of digits, and of zeros of a power of ten. A loop that repeats a digit is no answer."""

MINUS = str.maketrans({"\u2212": "-", "\ufe63": "-", "\uff0d": "-", "\u2010": "-", "\u2011": "-"})
_WIDE = str.maketrans(
    {0xFF10 + digit: str(digit) for digit in range(10)} | {"％": "%", "．": ".", "，": ",", "：": ":"}
)

_CLEANING = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"<<[^<>]*>>", ""),  # the calculator annotations of GSM8K
        (r"\{,\}|,\\!", ","),
        (r"(?<=\d)(?:\\[,;: ]|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))", ""),
        (r"(?<![\w)%])(?<!\d\s)\u2013(?=[$\d])", "-"),  # a dash between numbers is a range
        (r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
        (r"-\s*\\[dtc]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", r"-\1/\2 "),
        (r"\\[dtc]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}", r" \1/\2 "),
        (r"\\[dtc]?frac\s*(\d)\s*(\d)", r" \1/\2 "),
        (r"\\times|\\cdot|[×·⋅]", " * "),
        (r"\\div|÷", " / "),
        (r"\\approx|\\simeq|≈|\\equiv|\b(?:equals|is equal to)\b", " = "),
        (r"\\([$%#&])", r"\1"),
        (r"\\[()\[\],;:! ]|\\(?:left|right|displaystyle|quad|qquad)\b|~", " "),
        (r"(?<!\d)\*\*|\*\*(?!\d)|_{2,}|`", ""),
    )
)

_HALVES = {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "⅕": "1/5", "⅛": "1/8"}

_CURRENCY = r"[$€£¥₹]"

NUMBER = re.compile(
    rf"""
    (?<![A-Za-z\d^_])(?<!\d[.,:/])
    (?P<sign>(?<![\w)%$])(?<![\d)%]\ )(?:-(?!\s)|(?<=[=:(])-\ |(?<=[=:(]\ )-\ |\+))?
    (?:{_CURRENCY}\s?)?(?P<inner>-)?
    (?:
        (?P<digits>
            (?:\d{{1,3}}(?:,\d{{3}})+|\d{{1,2}}(?:,\d{{2}})+,\d{{3}}|\d{{1,3}}(?:\ 000)+|\d+)(?!\d)(?:\.\d+)?
          | \.\d+
        )
        (?:
            \s*\*\s*10\s*\^\s*\{{?\s*(?P<power>-?\d{{1,3}})\s*\}}?
          | [eE](?P<exponent>[-+]?\d{{1,3}})(?!\w)
          | \s?/\s?(?P<under>\d+)(?![\d/.,]\d|/)
          | \s{{1,2}}(?P<part>\d+)\s?/\s?(?P<below>\d+)(?![\d/])
        )?
    )
    (?!:\d)(?![eE][-+]?\d)(?!(?:st|nd|rd|th)\b)
    (?:\s*(?P<scale>thousand|million|billion|trillion)s?\b)?
    """,
    re.VERBOSE,
)

_LABEL = re.compile(
    r"(?:\b(?:step|question|problem|part|equation|example)s?\s*[#(]?\s*|(?<!#)#)$", re.IGNORECASE
)
LIST_ITEM = re.compile(r"[.):]\s+[^\W\d]")
"""What stands behind the number of an item of a list, or of a heading."""


@dataclass(frozen=True)
class Number:
    """A number in a text.

    Attributes:
        value: What it is worth.
        scale: What `thousand`, `million`, ... behind it multiplies it by. 1 if there is none.
        start: Where it begins in the plain text.
        end: Where it ends.
    """

    value: Fraction
    scale: int
    start: int
    end: int

    def equals(self, gold: "Number") -> bool:
        """Returns whether it is the number of the solution, as written or multiplied by its scale."""
        return bool({self.value, self.value * self.scale} & {gold.value, gold.value * gold.scale})

    def __str__(self) -> str:
        """Returns one text for all ways to write the number, so that equal answers are equal texts."""
        value = self.value
        tens = value.denominator
        for factor in (2, 5):
            while tens % factor == 0:
                tens //= factor
        # Only a fraction of powers of two and five ends as a decimal.
        written = str(value) if tens != 1 else f"{_decimal(value):f}"
        name = next((name for name, scale in _SCALES.items() if scale == self.scale), None)
        return f"{written} {name}" if name else written


def plain(text: str) -> str:
    r"""Returns the text with markup, LaTeX and the signs of other alphabets in the form that `NUMBER` reads.

    Example:
        >>> plain(r"**Total:** $9 \times 2 = \frac{36}{2}$, or \u221218")
        'Total: $9  *  2 =  36/2 $, or \\u221218'
    """
    text = text.translate(MINUS).translate(_WIDE)
    for sign, fraction in _HALVES.items():
        if sign in text:
            text = re.sub(rf"(?<=\d)\s?{sign}", f" {fraction}", text).replace(sign, fraction)
    for pattern, replacement in _CLEANING:
        text = pattern.sub(replacement, text)
    return text


def numbers(text: str) -> Iterator[Number]:
    """Yields the numbers of a plain text in their order.

    Example:
        >>> [str(number) for number in numbers("16 - 3 = $13.00, 1/2 of 1,234 or 50% of -5.")]
        ['16', '3', '13', '0.5', '1234', '50', '-5']
    """
    for match in NUMBER.finditer(text):
        if (number := _number(match)) is not None and not _is_label(match, text):
            yield number


def number_at(text: str, at: int) -> Number | None:
    """Returns the number that begins at that place of a plain text, whatever stands before it, or None."""
    match = NUMBER.match(text[at : at + 2 * _LONGEST])
    number = None if match is None else _number(match)
    return number and replace(number, start=number.start + at, end=number.end + at)


def _number(match: re.Match[str]) -> Number | None:
    digits = match["digits"].replace(",", "").replace(" ", "")
    ten = int(match["power"] or match["exponent"] or 0)
    if len(digits) > _LONGEST or abs(ten) > _LONGEST:
        return None
    value = Fraction(Decimal(digits)) * Fraction(10) ** ten
    if match["under"] or match["below"]:
        above, below = match["part"] or "0", match["under"] or match["below"]
        if max(len(above), len(below)) > _LONGEST or not int(below):
            return None
        value = value / int(below) if match["under"] else value + Fraction(int(above), int(below))
    is_negative = ((match["sign"] or "").strip() == "-") != bool(match["inner"])
    scale = _SCALES[match["scale"]] if match["scale"] else 1
    return Number(-value if is_negative else value, scale, match.start(), match.end())


def _is_label(match: re.Match[str], text: str) -> bool:
    """Whether the number counts something in the text itself: a step, or an item of a list."""
    if _LABEL.search(text, max(0, match.start() - 12), match.start()):
        return True
    before = text[max(0, match.start() - 8) : match.start()].rpartition("\n")
    starts_line = not before[2].strip() and (bool(before[1]) or match.start() < 8)
    return starts_line and LIST_ITEM.match(text, match.end()) is not None


def _decimal(value: Fraction) -> Decimal:
    digits = len(str(value.denominator)) + len(str(abs(value.numerator)))
    shift = 0
    while value.denominator > 1 and shift <= 4 * digits:
        value, shift = value * 10, shift + 1
    return Decimal(value.numerator).scaleb(-shift)
