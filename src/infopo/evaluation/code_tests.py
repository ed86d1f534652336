"""Runs the tests of a problem in a sandbox of their own, against stand-ins for the functions of a response.

It is passed to the interpreter as text. The response runs in another sandbox and is never loaded here. A stand-in sends
its arguments there, and returns the plain value that comes back, so that an object that is equal to everything, or an
`assert` that was replaced, is of no use. The verdict is one line of JSON on standard output.
"""

import builtins
import collections
import io
import json
import os
import random
import sys
import traceback
from collections.abc import Callable
from typing import Any

from infopo.evaluation.code_values import Channel, NotPlainError, decode, encode

job: dict[str, Any]


class Stopped(BaseException):
    """The response cannot be asked any more. Tests that catch exceptions do not catch this."""


class _Asked:
    """The response in the other sandbox."""

    def __init__(self, channel: Channel, names: dict[str, Any]) -> None:
        self._channel = channel
        self._names = names
        self._functions: list[Callable[..., Any]] = []
        self.stopped: tuple[str, str] | None = None

    def stop(self, note: str, detail: str = "") -> Stopped:
        """Keeps why there is no verdict on the merits. The first reason is the one that counts."""
        self.stopped = self.stopped or (note, detail)
        return Stopped()

    def receive(self) -> list[Any]:
        """Returns the next message."""
        try:
            message = self._channel.receive()
        except EOFError:
            raise self.stop("ended itself") from None
        except NotPlainError as error:
            raise self.stop("no plain value", str(error)) from None
        if type(message) is not list or not message:
            raise self.stop("no plain value", "a message that is none")
        return message

    def begin(self) -> None:
        """Waits until the response is loaded."""
        try:
            message = self._channel.receive()
        except (EOFError, NotPlainError):
            message = None
        if message != ["begun"]:
            raise self.stop("did not start")
        match self.receive():
            case ["ready", []]:
                return
            case ["ready", missing]:
                raise self.stop("no such function", f"{missing!r:.200}")
            case ["failed", "SyntaxError" | "IndentationError" | "TabError" as kind, text]:
                raise self.stop("does not compile", f"{kind}: {text!s:.200}")
            case ["failed", "SystemExit" | "KeyboardInterrupt" | "GeneratorExit" as kind, _]:
                raise self.stop("ended itself", kind)
            case ["failed", kind, text]:
                raise self.stop("fails when loaded", f"{kind!s:.50}: {text!s:.200}")
        raise self.stop("no plain value", "a message that is none")

    def stand_in(self, name: str) -> Callable[..., Any]:
        """Returns what the tests call in place of the function."""

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._call(name, args, kwargs)

        call.__name__ = call.__qualname__ = name
        return call

    def _call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.stopped:
            raise Stopped
        try:
            sent = [encode(arg, self._other) for arg in args]
            named = {key: encode(value, self._other) for key, value in kwargs.items()}
            self._channel.send(["call", name, sent, named])
        except NotPlainError as error:
            raise self.stop("tests pass no plain value", str(error)) from None
        except OSError:
            raise self.stop("ended itself") from None
        while True:
            match self.receive():
                case ["callback", int(number), list(given), dict(given_by_name)]:
                    self._call_back(number, given, given_by_name)
                case ["value", value, dict(changed)]:
                    result = self._decoded(value)
                    for position, arg in enumerate(args):
                        if str(position) in changed:
                            _update(arg, self._decoded(changed[str(position)]))
                    return result
                case ["raised", str(kind), str(text)]:
                    raise self._exception(kind, text)
                case ["refused", why]:
                    raise self.stop("no plain value", f"{why!s:.200}")
                case _:
                    raise self.stop("no plain value", "a message that is none")

    def _decoded(self, value: Any) -> Any:
        try:
            return decode(value)
        except NotPlainError as error:
            raise self.stop("no plain value", str(error)) from None

    def _exception(self, kind: str, text: str) -> BaseException:
        found = getattr(builtins, kind, None)
        if kind in ("SystemExit", "KeyboardInterrupt", "GeneratorExit"):
            return self.stop("ended itself", kind)
        if type(found) is not type or not issubclass(found, Exception):
            return Exception(f"{kind}: {text}")
        try:
            return found(text)
        except TypeError:  # UnicodeDecodeError and its like cannot be made of a text
            return Exception(f"{kind}: {text}")

    def _other(self, value: Any) -> Any:
        """Encodes what has no plain value on its way to the response: functions, types, objects of the tests."""
        name = getattr(value, "__name__", "")
        if getattr(builtins, name, None) is value:
            return ["builtin", name]
        kind = type(value)
        if self._names.get(kind.__name__) is kind and hasattr(value, "__dict__"):
            return ["object", [kind.__name__, encode(value.__dict__, self._other)]]
        if callable(value):
            self._functions.append(value)
            return ["function", len(self._functions) - 1]
        return None

    def _call_back(self, number: int, args: list[Any], kwargs: dict[str, Any]) -> None:
        if not 0 <= number < len(self._functions):
            raise self.stop("no plain value", "a message that is none")
        try:
            given = [self._decoded(arg) for arg in args]
            named = {key: self._decoded(value) for key, value in kwargs.items()}
            self._channel.send(["value", encode(self._functions[number](*given, **named))])
        except NotPlainError as error:
            raise self.stop("tests pass no plain value", str(error)) from None
        except Exception as error:
            self._channel.send(["raised", type(error).__name__, f"{error!s:.200}"])


def _update(arg: Any, now: Any) -> None:
    """Makes an argument what the function has made of its copy."""
    if type(arg) is not type(now):
        return
    if isinstance(arg, (list, bytearray)):
        arg[:] = now
    elif isinstance(arg, collections.deque):
        arg.clear()
        arg.extend(now)
    elif isinstance(arg, (dict, set)):
        arg.clear()
        arg.update(now)


def _verdict(asked: _Asked, names: dict[str, Any]) -> dict[str, Any]:
    try:
        asked.begin()
        random.seed(0)
        exec(compile(job["setup"], "<setup>", "exec"), names)
        for name in job["functions"]:
            names[name] = asked.stand_in(name)
        exec(compile(job["test"], "<tests>", "exec"), names)
        if job["call_check"]:
            names["check"](names[job["functions"][0]])
        passed, detail = True, ""
    except BaseException as error:
        passed, detail = False, _where(error)
    if asked.stopped:
        return {"passed": False, "note": asked.stopped[0], "detail": asked.stopped[1]}
    return {"passed": passed, "note": None, "detail": detail}


def _where(error: BaseException) -> str:
    """Returns what failed, with the line of the tests."""
    lines = job["test"].splitlines()
    frames = traceback.extract_tb(error.__traceback__)
    numbers = [frame.lineno or 0 for frame in frames if frame.filename == "<tests>"]
    line = lines[numbers[-1] - 1].strip() if numbers and 0 < numbers[-1] <= len(lines) else ""
    return f"{type(error).__name__}: {error!s:.200} in {line:.200}"


def _main() -> None:
    report = os.dup(1)
    sys.stdout = sys.stderr = io.StringIO()
    os.write(report, b"begun\n")
    names: dict[str, Any] = {"__name__": "tests"}
    verdict = _verdict(_Asked(Channel(job["fd"]), names), names)
    os.write(report, json.dumps(verdict).encode() + b"\n")
    # Threads and handlers of the tests have nothing to add.
    os._exit(0)


if __name__ == "__main__":
    _main()
