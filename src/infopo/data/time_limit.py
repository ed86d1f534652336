"""A limit on the time that a piece of Python takes, in any thread and without signals."""

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class TimeLimitError(Exception):
    """The piece of code took longer than it may."""


class TimeLimit:
    """Interrupts Python code that runs for longer than a number of seconds, by the clock and of computing.

    One thread watches for all calls, so that a call costs no more than a note that it runs. A single call of C
    code cannot be interrupted, only what follows it.

    Args:
        seconds: The limit. A process that is stopped, or a busy machine, does not reach it.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._lock = threading.Lock()
        self._running: dict[int, object] = {}
        self._watcher: threading.Thread | None = None
        if hasattr(os, "register_at_fork"):  # a forked process has none of its parent's threads
            os.register_at_fork(after_in_child=self._start_anew)

    def _start_anew(self) -> None:
        self._lock, self._running, self._watcher = threading.Lock(), {}, None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Within, code is interrupted by a `TimeLimitError` once it has taken too long."""
        me = threading.get_ident()
        with self._lock:
            self._running[me] = object()  # no clock is read here: that would cost more than many a call
            self._watch()
        try:
            yield
        finally:
            with self._lock:
                self._running.pop(me, None)

    def _watch(self) -> None:
        if self._watcher is None or not self._watcher.is_alive():
            self._watcher = threading.Thread(target=self._look, name="infopo-time-limit", daemon=True)
            self._watcher.start()

    def _look(self) -> None:
        """Looks at what runs a few times within the limit; a call first seen now began before."""
        first_seen: dict[int, tuple[object, float, float]] = {}
        idle_since = time.monotonic()
        while time.monotonic() - idle_since < 10 * self.seconds:
            time.sleep(self.seconds / 4)
            clock, computing = time.monotonic(), time.process_time()
            with self._lock:
                idle_since = clock if self._running else idle_since
                for thread, call in list(self._running.items()):
                    if thread not in first_seen or first_seen[thread][0] is not call:
                        first_seen[thread] = call, clock, computing
                    _, since, computed = first_seen[thread]
                    if min(clock - since, computing - computed) > self.seconds:
                        del self._running[thread]
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(
                            ctypes.c_ulong(thread), ctypes.py_object(TimeLimitError)
                        )
