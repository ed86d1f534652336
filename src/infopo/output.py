"""What the package logs and prints: secrets are masked, and control characters are escaped."""

import logging
import sys
from typing import Any

from infopo.errors import printable
from infopo.secrets import masked


def shown(text: str) -> str:
    r"""Returns the text as a terminal, a log file or a tracker may have it.

    Example:
        >>> print(shown("read https://me:password@host/\x1b[31mrows.jsonl"))
        read https://***@host/\x1b[31mrows.jsonl
    """
    return printable(masked(text))


def get_logger(name: str) -> logging.Logger:
    """Returns the logger of a module, whose records are `shown`, whatever handlers the user attaches.

    It replaces `logging.getLogger` in this package: handlers belong to the user, and a filter of a parent logger does
    not see what its children log.

    Args:
        name: The module's `__name__`.
    """
    logger = logging.getLogger(name)
    if not any(isinstance(each, _Shown) for each in logger.filters):
        logger.addFilter(_Shown())
    return logger


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun.

    Example:
        >>> counted(1, "row"), counted(2, "row"), counted(0, "process"), counted(3, "try")
        ('1 row', '2 rows', '0 processes', '3 tries')
    """
    if number == 1:
        return f"1 {noun}"
    stem, end = (noun[:-1], "ies") if noun.endswith("y") else (noun, "es" if noun.endswith("s") else "s")
    return f"{number} {stem}{end}"


def say(*lines: str, file: Any = None) -> None:
    """Prints lines to standard output, or to another stream, as they are `shown`."""
    print(*map(shown, lines), sep="\n", file=file or sys.stdout, flush=True)


class _Shown(logging.Filter):
    """Replaces the text of a record. It leaves no record out."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = shown(record.getMessage()), None
        return True
