"""Runs a response in a sandbox, and calls its functions when the tests in another sandbox ask for it.

It is passed to the interpreter as text. Whatever the response does to this process, it can do no more than send values.
"""

import builtins
import os
import sys
import types
from collections.abc import Callable
from typing import Any

from infopo.evaluation.code_values import Channel, NotPlainError, decode, encode

job: dict[str, Any]

_MUTABLE = ("list", "dict", "set", "bytearray", "deque", "counter", "ordered")


def _main() -> None:
    for output in (1, 2):
        os.dup2(0, output)
    channel = Channel(job["fd"])
    channel.send(["begun"])
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    try:
        exec(compile(job["code"], "solution.py", "exec"), module.__dict__)
    except BaseException as error:
        return channel.send(["failed", type(error).__name__, _text(error)])
    missing = [name for name in job["functions"] if not callable(module.__dict__.get(name))]
    channel.send(["ready", missing])
    while True:
        _, name, args, kwargs = channel.receive()
        try:
            channel.send(_answer(channel, module.__dict__, name, args, kwargs))
        except NotPlainError as error:
            channel.send(["refused", str(error)])


def _answer(
    channel: Channel, names: dict[str, Any], name: str, args: list[Any], kwargs: dict[str, Any]
) -> Any:
    """Calls a function, and returns the message about what it returned or raised."""

    def other(tag: str, content: Any) -> Any:
        if tag == "builtin":
            return getattr(builtins, content)
        if tag == "object":
            return _object(names[content[0]], decode(content[1], other))
        return _remote(channel, content)

    try:
        given = [decode(arg, other) for arg in args]
        result = names[name](*given, **{key: decode(value, other) for key, value in kwargs.items()})
        return ["value", encode(result), _changes(args, given)]
    except NotPlainError as error:
        return ["refused", str(error)]
    except BaseException as error:
        return ["raised", type(error).__name__, _text(error)]


def _changes(args: list[Any], given: list[Any]) -> dict[str, Any]:
    """Returns the arguments that the function has changed, by position."""
    changed = {}
    for position, (arg, value) in enumerate(zip(args, given, strict=True)):
        if type(arg) is list and arg[0] in _MUTABLE:
            try:
                now = encode(value)
            except NotPlainError:
                continue
            if now != arg:
                changed[str(position)] = now
    return changed


def _object(kind: Any, state: Any) -> Any:
    made = object.__new__(kind)
    made.__dict__.update(state)
    return made


def _remote(channel: Channel, number: int) -> Callable[..., Any]:
    """Returns a stand-in for a function that the tests passed."""

    def call(*args: Any, **kwargs: Any) -> Any:
        encoded = {key: encode(value) for key, value in kwargs.items()}
        channel.send(["callback", number, [encode(arg) for arg in args], encoded])
        kind, *content = channel.receive()
        if kind == "raised":
            raise getattr(builtins, content[0], Exception)(content[1])
        return decode(content[0])

    return call


def _text(error: BaseException) -> str:
    try:
        return str(error)[:500]
    except BaseException:
        return ""


if __name__ == "__main__":
    _main()
