"""Grades programs by value: the tests run in one sandbox, the response in another, and plain values go between them.

Whatever judges a response must not share a process with it: an object whose `__eq__` is always true, a replaced
`assert` or a forged report would otherwise make it right.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from infopo.errors import TrainingError
from infopo.evaluation import sandbox

TIME_OUT = "time-out"
"""Note of a program that took longer than the limits. It was tried twice, the second time alone."""

_AGAIN = (TIME_OUT, "did not start", "ended itself", "tests ended early")
"""Notes that a busy machine can cause. Such a program is tried once more, alone."""


@dataclass(frozen=True)
class Program:
    """A response that can be run, and its tests.

    Attributes:
        code: The whole program, which defines the functions.
        functions: Names of the functions that the tests call. `check(candidate)` gets the first.
        test: Text of the tests. They pass if it runs to its end, with `check`, if it defines that.
        setup: Text that runs before the tests: imports, and functions of the problem that they use.
    """

    code: str
    functions: tuple[str, ...]
    test: str
    setup: str = ""


@dataclass(frozen=True)
class Graded:
    """What became of a program.

    Attributes:
        passed: Whether all tests passed.
        note: Why there is no verdict on the merits, or None.
        detail: The test that failed, or the error.
    """

    passed: bool
    note: str | None = None
    detail: str = ""


def grade(programs: Sequence[Program], processes: int | None = None) -> list[Graded]:
    """Runs programs against their tests, several at a time.

    A program that takes longer than the limits, or ends itself, is tried once more when nothing else runs.

    Args:
        programs: The programs.
        processes: How many run at the same time. None: one per core.

    Raises:
        ConfigError: Nobody has allowed to run what models write.
        TrainingError: Sandboxes do not start any more.
    """
    sandbox.allowed()
    at_once = max(1, min(processes or _cores(), len(programs), 100))
    ended = threading.Event()
    seats = _Seats()
    pool = ThreadPoolExecutor(at_once)
    try:
        graded = list(pool.map(lambda program: _grade(program, seats, ended), programs))
    finally:
        # Ctrl-C leaves no process behind, and does not wait for the time limits.
        ended.set()
        pool.shutdown(wait=True, cancel_futures=True)
    again = threading.Event()
    try:
        for position, found in enumerate(graded):
            if found.note in _AGAIN:
                graded[position] = _grade(programs[position], seats, again)
                _refuse_broken(graded[position])
    finally:
        again.set()
    return graded


def _cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _refuse_broken(graded: Graded) -> None:
    if graded.note == "did not start":
        raise TrainingError(
            f"a sandbox started before and does not start any more ({graded.detail or 'no reason is known'}); is the "
            "machine out of memory or processes? Nothing was graded"
        )


class _Seats:
    """Numbers of sandboxes that run at the same time. Each has a user of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free = deque(range(250))

    @contextlib.contextmanager
    def two(self) -> Iterator[tuple[int, int]]:
        """Takes two numbers for a while."""
        with self._lock:
            # The one that was left longest ago, whose processes are gone for sure.
            taken = self._free.popleft(), self._free.popleft()
        try:
            yield taken
        finally:
            with self._lock:
                self._free.extend(taken)


def _grade(program: Program, seats: _Seats, ended: threading.Event) -> Graded:
    job = {"functions": list(program.functions)}
    tests = {**job, "setup": program.setup, "test": program.test, "call_check": _waits(program.test)}
    ours, theirs = socket.socketpair()
    with seats.two() as (first, second), contextlib.ExitStack() as stack:
        with ours, theirs:
            response = _running("code_candidate", {**job, "code": program.code}, theirs, first)
            stack.callback(response.kill)
            judge = _running("code_tests", tests, ours, second, subprocess.PIPE)
            stack.callback(judge.kill)
        assert judge.process.stdout is not None
        with judge.process.stdout:
            read = _read(judge.process.stdout.fileno(), ended)
        graded = _graded(read, response, judge)
        response.kill()
        judge.kill()
        complaints = response.complaint(), judge.complaint()
    return replace(graded, detail=" ".join(complaints)) if graded.note == "did not start" else graded


def _running(
    module: str, job: Mapping[str, Any], end: socket.socket, seat: int, output: int = subprocess.DEVNULL
) -> sandbox.Running:
    return sandbox.start(sandbox.source_of(module), job, end.fileno(), seat, output, ("code_values",))


def _waits(test: str) -> bool:
    """Returns whether tests define `check(candidate)` and wait for it to be called. Those of some files call it."""
    lines = test.splitlines()
    return any(line.startswith("def check(") for line in lines) and not any(
        line.startswith("check(") for line in lines
    )


_LONGEST_VERDICT = 2**16


@dataclass(frozen=True)
class _Read:
    """Lines that the tests reported, whether they ended in time, and after how many seconds."""

    lines: list[bytes]
    in_time: bool
    seconds: float


def _read(fd: int, ended: threading.Event) -> _Read:
    started = time.monotonic()
    read = b""
    while len(read) < _LONGEST_VERDICT:
        seconds = time.monotonic() - started
        if seconds >= sandbox.WALL_SECONDS or ended.is_set():
            return _Read([], False, seconds)
        if select.select([fd], [], [], min(sandbox.WALL_SECONDS - seconds, 0.2))[0]:
            part = os.read(fd, 2**14)
            if not part:
                break
            read += part
    return _Read(read.splitlines(), True, time.monotonic() - started)


def _graded(read: "_Read", response: sandbox.Running, judge: sandbox.Running) -> Graded:
    if not read.in_time:
        return Graded(False, TIME_OUT)
    if not read.lines or read.lines[0] != b"begun":
        return Graded(False, "did not start")
    if len(read.lines) < 2:
        return Graded(False, TIME_OUT if _used_up(judge, read.seconds) else "tests ended early")
    verdict = json.loads(read.lines[1])
    note = verdict["note"]
    if note == "ended itself" and _used_up(response, read.seconds):
        note = TIME_OUT
    return Graded(verdict["passed"], note, verdict["detail"])


def _used_up(running: sandbox.Running, seconds: float) -> bool:
    """Returns whether a process ended because its CPU time did.

    The second signal of that limit is the one that anybody may send, so it counts if there was time for it.
    """
    for _ in range(50):
        if (by := running.ended_by()) is not None:
            return by == signal.SIGXCPU or (by == signal.SIGKILL and seconds >= sandbox.CPU_SECONDS)
        time.sleep(0.02)
    return False
