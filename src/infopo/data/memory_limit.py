"""A limit on the memory that a piece of Python adds to what its process has, on systems that tell how much that is."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

try:
    import resource
except ImportError:  # pragma: no cover - Windows
    resource = None  # type: ignore[assignment]


def _pages() -> int:
    """Returns what this process has, in pages. This comes before each rendering of each row, so it is quick."""
    state = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(state, 20).partition(b" ")[0])
    finally:
        os.close(state)


class MemoryLimit:
    """Ends what takes more than a number of bytes by a `MemoryError`, before the system ends the process.

    The system keeps the limit for the process as a whole, so it is for code that runs for moments. Where the system
    does not tell how much a process has (anywhere but on Linux), there is no limit.

    Args:
        bytes: What may be added to what the process has when the code begins.
    """

    def __init__(self, bytes: int) -> None:
        self.bytes = bytes
        self._lock = threading.Lock()
        self._inside = 0
        self._before: tuple[int, int] | None = None
        if hasattr(os, "register_at_fork"):  # a forked process has none of its parent's threads
            os.register_at_fork(after_in_child=self._start_anew)

    def _start_anew(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._lift()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Within, memory beyond the limit is a `MemoryError`."""
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._lower()
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._lift()

    def _lower(self) -> None:
        try:
            size = _pages() * resource.getpagesize() + self.bytes
        except (OSError, AttributeError):
            return
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        if soft == resource.RLIM_INFINITY or size < soft:
            self._before = soft, hard
            resource.setrlimit(resource.RLIMIT_AS, (size, hard))

    def _lift(self) -> None:
        if self._before is not None:
            resource.setrlimit(resource.RLIMIT_AS, self._before)
            self._before = None
