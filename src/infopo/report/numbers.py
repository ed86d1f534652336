"""Numbers as the report writes them."""

import math
from dataclasses import dataclass

from infopo.intervals import wilson
from infopo.runs import Record


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """Returns a number with so many significant digits, a true minus sign, and "–" for none.

    Example:
        >>> number(0.0123456), number(-1234.5678), number(1e-6), number(0.5, sign=True), number(None), number(12345678)
        ('0.0123', '−1235', '1.00e−6', '+0.500', '–', '1.23e+7')
    """
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    size = abs(value)
    if isinstance(value, int) and size < 10**7:
        text = str(size)
    elif size == 0:
        text = "0"
    elif not 1e-3 <= size < 1e6:
        mantissa, _, exponent = f"{size:.{digits - 1}e}".partition("e")
        text = f"{mantissa}e{'−' if exponent[0] == '-' else '+'}{exponent[1:].lstrip('0') or '0'}"
    else:
        text = f"{size:.{max(0, digits - 1 - math.floor(math.log10(size)))}f}"
    return f"{'−' if value < 0 else '+' if sign and value > 0 else ''}{text}"


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, if there is one.

    Attributes:
        value: The value.
        low: Lower end of the interval, or None.
        high: Upper end.
        source: The file and the name that it is from.
        n: Number of observations, if it is known.
    """

    value: float
    low: float | None = None
    high: float | None = None
    source: str = ""
    n: int | None = None

    def text(self, sign: bool = False) -> str:
        """Returns value and interval for people.

        Example:
            >>> Estimate(0.5, 0.45, 0.55).text()
            '0.500 [0.450, 0.550]'
        """
        value = number(self.value, sign=sign)
        if self.low is None or self.high is None:
            return value
        return f"{value} [{number(self.low, sign=sign)}, {number(self.high, sign=sign)}]"


def proportion(record: Record, name: str, n: int | None, source: str) -> Estimate | None:
    """Returns the estimate of a share that a record has, with its Wilson interval if n is known."""
    value = record.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        return None
    low, high = wilson(value, n) if n else (None, None)
    return Estimate(value, low, high, source, n)
