"""A strict codec for the values that cross the wall of a sandbox: plain builtins and a few types of the library.

The source of this module runs inside sandboxes too, under an interpreter that has nothing but the standard library, so
it imports nothing of this package. Types are compared with `is`: an object of a subclass, whatever its `__eq__` or
`__class__` say, has no value here. What arrives is rebuilt from tags, so a sender that lies can only have sent another
plain value. Limits hold in both directions.

A value is JSON: null, true, false and text stand for themselves, everything else is `[tag, content]`.
"""

import collections
import datetime
import decimal
import fractions
import itertools
import json
import os
import re
import types
from collections.abc import Callable, Iterable
from typing import Any

LARGEST = 4 * 2**20
"""Largest number of bytes of an encoded message."""

DEEPEST = 100
"""Largest depth of a value."""

MOST = 200_000
"""Largest number of parts of a value."""


class NotPlainError(Exception):
    """A value cannot cross: its type is not plain, or it is too large or too deep."""


class Matched:
    """What is known of a `re.Match` on the other side: that there is one, and its text."""

    def __init__(self, span: tuple[int, int], groups: tuple[str | None, ...]) -> None:
        self._span, self._groups = span, groups

    def group(self, *numbers: int) -> Any:
        """Returns the text of a group, or of several."""
        texts = [self._groups[number] for number in numbers or (0,)]
        return texts[0] if len(texts) == 1 else tuple(texts)

    def groups(self) -> tuple[str | None, ...]:
        """Returns the text of all groups but the whole match."""
        return self._groups[1:]

    def span(self) -> tuple[int, int]:
        """Returns where the match begins and ends."""
        return self._span

    def start(self) -> int:
        """Returns where the match begins."""
        return self._span[0]

    def end(self) -> int:
        """Returns where the match ends."""
        return self._span[1]


_ITERATORS: tuple[type, ...] = (
    types.GeneratorType, map, filter, zip, enumerate, reversed, itertools.chain, itertools.islice, itertools.product,
    itertools.permutations, itertools.combinations, itertools.accumulate, itertools.starmap, itertools.takewhile,
    itertools.dropwhile, itertools.compress, itertools.zip_longest, itertools.combinations_with_replacement,
    type(iter([])), type(iter(())), type(iter({})), type(iter({}.values())), type(iter({}.items())), type(iter(set())),
    type(iter(range(0))), type(iter("")), type(iter("ä")), type(reversed([])), type(iter(b"")),
)  # fmt: skip
_SEQUENCES: dict[type, str] = {
    list: "list", tuple: "tuple", set: "set", frozenset: "frozenset", collections.deque: "deque",
    type({}.keys()): "keys", type({}.values()): "values", **dict.fromkeys(_ITERATORS, "iterator"),
}  # fmt: skip
_MAPPINGS: dict[type, str] = {
    dict: "dict", collections.Counter: "counter", collections.OrderedDict: "ordered",
    collections.defaultdict: "dict", type({}.items()): "items",
}  # fmt: skip
_TEXTS: dict[type, tuple[str, Callable[[Any], Any]]] = {
    int: ("int", hex), float: ("float", float.hex),
    complex: ("complex", lambda value: [value.real.hex(), value.imag.hex()]),
    bytes: ("bytes", bytes.hex), bytearray: ("bytearray", bytearray.hex),
    range: ("range", lambda value: [hex(value.start), hex(value.stop), hex(value.step)]),
    decimal.Decimal: ("decimal", str),
    fractions.Fraction: ("fraction", lambda value: [hex(value.numerator), hex(value.denominator)]),
    datetime.date: ("date", datetime.date.isoformat),
    datetime.time: ("time", lambda value: [value.isoformat(), value.fold]),
    datetime.datetime: ("datetime", lambda value: [value.isoformat(), value.fold]),
    datetime.timedelta: ("timedelta", lambda value: [value.days, value.seconds, value.microseconds]),
    re.Match: ("match", lambda value: [list(value.span()), [value.group(0), *value.groups()]]),
}  # fmt: skip


def encode(value: Any, other: Callable[[Any], Any] | None = None) -> Any:
    """Returns a value as JSON can have it.

    Args:
        value: The value.
        other: Called with what has no plain value. It returns `[tag, content]`, or None to refuse it.

    Raises:
        NotPlainError: It has no plain value.
    """
    left = [MOST]
    try:
        return _encode(value, DEEPEST, left, other)
    except RecursionError:
        raise NotPlainError(f"a value deeper than {DEEPEST}") from None


def _encode(value: Any, depth: int, left: list[int], other: Callable[[Any], Any] | None) -> Any:
    kind = type(value)
    left[0] -= 1
    if left[0] < 0:
        raise NotPlainError(f"a value of more than {MOST} parts")
    if depth < 0:
        raise NotPlainError(f"a value deeper than {DEEPEST}")
    if value is None or value is True or value is False:
        return value
    if kind is str:
        if len(value) > LARGEST:
            raise NotPlainError(f"a text of more than {LARGEST >> 20} MiB")
        return value
    if kind in _TEXTS:
        tag, write = _TEXTS[kind]
        return [tag, write(value)]
    if kind in _SEQUENCES:
        # One part at a time, since an iterator may have no end.
        return [_SEQUENCES[kind], [_encode(part, depth - 1, left, other) for part in value]]
    if kind in _MAPPINGS:
        pairs = value if _MAPPINGS[kind] == "items" else value.items()
        return [_MAPPINGS[kind], [[_encode(part, depth - 1, left, other) for part in pair] for pair in pairs]]
    found = other(value) if other is not None else None
    if found is None:
        raise NotPlainError(f"an object of type {type.__dict__['__name__'].__get__(kind)}")
    return found


def decode(data: Any, other: Callable[[str, Any], Any] | None = None) -> Any:
    """Returns the value that was encoded.

    Args:
        data: What `encode` returned, or what somebody says that it returned.
        other: Called with tag and content of what has no plain value.

    Raises:
        NotPlainError: It is not the form of a value.

    Example:
        >>> decode(encode({"a": [1, (2.5, {3})]}))
        {'a': [1, (2.5, {3})]}
    """
    try:
        return _decode(data, DEEPEST, other)
    except NotPlainError:
        raise
    except Exception as error:
        raise NotPlainError(f"a message that is none: {type(error).__name__}") from None


def _decode(data: Any, depth: int, other: Callable[[str, Any], Any] | None) -> Any:
    if depth < 0:
        raise NotPlainError(f"a value deeper than {DEEPEST}")
    if data is None or data is True or data is False or type(data) is str:
        return data
    tag, content = data
    if tag in _PLAIN:
        return _PLAIN[tag](content)
    if tag in _GROUPS:
        return _GROUPS[tag]([_decode(part, depth - 1, other) for part in content])
    if tag in _PAIRS:
        pairs = [(_decode(key, depth - 1, other), _decode(value, depth - 1, other)) for key, value in content]
        return _PAIRS[tag](pairs)
    if other is None:
        raise NotPlainError("a value of no known type")
    return other(tag, content)


def _integer(text: str) -> int:
    return int(text, 16)


def _values(parts: list[Any]) -> Any:
    return dict(enumerate(parts)).values()


def _set(parts: list[Any]) -> Any:
    """Returns a set whose parts come in the order in which they came from the other one, if there is a way to it.

    The order depends on how a set was made: a literal is filled from a constant, and has another size then.
    """
    plain = set(parts)
    if list(plain) == parts:
        return plain
    filled: set[Any] = set()
    filled |= frozenset(parts)
    backwards: set[Any] = set()
    backwards.update(reversed(parts))
    return next((made for made in (filled, backwards) if list(made) == parts), plain)


def _counter(pairs: Iterable[tuple[Any, Any]]) -> Any:
    return collections.Counter(dict(pairs))


_PLAIN: dict[str, Callable[[Any], Any]] = {
    "int": _integer,
    "float": float.fromhex,
    "complex": lambda parts: complex(*map(float.fromhex, parts)),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "range": lambda parts: range(*map(_integer, parts)),
    "decimal": lambda text: decimal.Decimal(_text(text)),
    "fraction": lambda parts: fractions.Fraction(*map(_integer, parts)),
    "date": datetime.date.fromisoformat,
    "time": lambda parts: datetime.time.fromisoformat(parts[0]).replace(fold=parts[1]),
    "datetime": lambda parts: datetime.datetime.fromisoformat(parts[0]).replace(fold=parts[1]),
    "timedelta": lambda parts: datetime.timedelta(*parts),
    "match": lambda parts: Matched(
        (int(parts[0][0]), int(parts[0][1])),
        tuple(None if text is None else _text(text) for text in parts[1]),
    ),
}
_GROUPS: dict[str, Callable[[list[Any]], Any]] = {
    "list": list, "tuple": tuple, "set": _set, "frozenset": frozenset, "deque": collections.deque, "iterator": iter,
    "keys": lambda parts: dict.fromkeys(parts).keys(), "values": _values,
}  # fmt: skip
_PAIRS: dict[str, Callable[[list[tuple[Any, Any]]], Any]] = {
    "dict": dict, "counter": _counter, "ordered": collections.OrderedDict, "items": lambda pairs: dict(pairs).items(),
}  # fmt: skip


def _text(value: Any) -> str:
    if type(value) is not str:
        raise NotPlainError("a value that is no text")
    return value


class Channel:
    """Messages over a file descriptor, one after the other."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def send(self, message: Any) -> None:
        """Sends a message. If it is too large, nothing is sent.

        Raises:
            NotPlainError: It is larger than `LARGEST`.
            OSError: The other side is gone.
        """
        data = memoryview(pack(message))
        while data:
            data = data[os.write(self._fd, data) :]

    def receive(self) -> Any:
        """Returns the next message, once it is there.

        Raises:
            EOFError: The other side is gone.
            NotPlainError: What comes is no message.
        """
        try:
            return unpack(self._read)
        except OSError:
            raise EOFError from None

    def _read(self, size: int) -> bytes:
        parts = []
        while size and (part := os.read(self._fd, min(size, 2**16))):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def pack(message: Any) -> bytes:
    """Returns a message as bytes behind their number.

    Raises:
        NotPlainError: It is larger than `LARGEST`.
    """
    body = json.dumps(message).encode()
    if len(body) > LARGEST:
        raise NotPlainError(f"a value of more than {LARGEST >> 20} MiB")
    return len(body).to_bytes(8, "big") + body


def unpack(read: Callable[[int], bytes]) -> Any:
    """Reads a message with a function that returns exactly so many bytes, or fewer at the end.

    Raises:
        EOFError: The other side is gone.
        NotPlainError: What comes is no message.
    """
    head = read(8)
    if len(head) < 8:
        raise EOFError
    size = int.from_bytes(head, "big")
    if size > LARGEST:
        raise NotPlainError(f"a value of more than {LARGEST >> 20} MiB")
    body = read(size)
    if len(body) < size:
        raise EOFError
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise NotPlainError("a message that is none") from None
