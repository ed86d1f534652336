"""Processes that Ctrl-C ends at once, and that never outlive the process which started them.

`WorkerPool` is for functions, and `Commands` for commands of `infopo`. Sandboxes for code of models have their own
(`evaluation/sandbox.py`), for they trust nothing that runs in them.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import IO, Any, Literal, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

ENDS_WITH_INPUT = "INFOPO_ENDS_WITH_INPUT"
"""Environment variable by which `python -m infopo` knows that it ends when its standard input does."""


class WorkerPool(ProcessPoolExecutor):
    """A pool of processes whose work ends with the block that uses it, however that block is left.

    A terminal sends Ctrl-C to every process of the command. Were workers to act on it, their end and the parent's
    `KeyboardInterrupt` would race, and the user would read of a broken pool whenever the workers won. So workers
    never see it: the parent alone does, and ends them. A parent that is killed can end nobody, so each worker watches
    for that itself.

    Args:
        processes: Number of workers.
        method: How they are started, `fork` or `spawn`. None is the platform's default.
        initializer: Called once in each worker, with `initargs`.
        initargs: Its arguments.

    Example:
        >>> with WorkerPool(2, "fork") as pool:
        ...     pool.submit(sum, [1, 2]).result()
        3
    """

    def __init__(
        self,
        processes: int,
        method: Literal["fork", "spawn"] | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
    ) -> None:
        self._others = multiprocessing.active_children()
        context = multiprocessing.get_context(method)
        super().__init__(processes, context, begin_worker, (initializer, initargs))

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        # Workers start here, and a process has the signal mask of the thread that starts it.
        with _without_interrupts():
            return super().submit(fn, *args, **kwargs)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> bool | None:
        if exc_type is not None:
            # What is queued or half done is of no use to anybody any more.
            for process in multiprocessing.active_children():
                if process not in self._others:
                    process.kill()
        self.shutdown(wait=True, cancel_futures=True)
        return None


def begin_worker(initializer: Callable[..., object] | None = None, initargs: tuple[Any, ...] = ()) -> None:
    """Is what a worker process does first: it leaves Ctrl-C to its parent, and ends if that ends."""
    # The mask of `submit` does this from the first instruction on, where there are such masks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(*initargs)


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        # Without its parent, a worker would finish what it does and then wait for more for ever.
        os._exit(1)


class Commands:
    """Runs `infopo` in processes of their own, all of which end with the block that uses it.

    The standard input of each is a pipe whose other end this process holds and never writes to. The system closes it
    when this process ends, however that happens, on every platform. Like workers, they leave Ctrl-C to this process.

    Example:
        >>> with Commands() as commands, open(os.devnull, "wb") as output:
        ...     commands.run(["--version"], output)
        0
    """

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self.is_ended = False

    def __enter__(self) -> "Commands":
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def run(
        self, arguments: Sequence[str], output: IO[bytes], environment: Mapping[str, str] | None = None
    ) -> int:
        """Runs a command to its end and returns its exit status, or 1 if `end` was called. Threads may call it.

        Args:
            arguments: What follows `infopo`.
            output: File for what it prints.
            environment: Its environment variables. By default they are those of this process.
        """
        with self._lock:
            if self.is_ended:
                return 1
            with _without_interrupts():
                process = subprocess.Popen(
                    [sys.executable, "-m", "infopo", *arguments],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**(os.environ if environment is None else environment), ENDS_WITH_INPUT: "1"},
                )
            self._running.add(process)
        status = process.wait()
        with self._lock:
            self._running.remove(process)
            _close_input(process)
        return status

    def end(self) -> None:
        """Ends all that run, and begins no other."""
        with self._lock:
            self.is_ended = True
            for process in self._running:
                _close_input(process)


def _close_input(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()


def end_with_input() -> None:
    """Ends this process when its standard input does, if `Commands` has started it."""
    if os.environ.pop(ENDS_WITH_INPUT, None) is None:
        return
    # Nothing else can take what it reads for the end, nor hand it on to a process of its own.
    source = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    threading.Thread(target=_end_with, args=(source,), daemon=True).start()


def _end_with(source: int) -> None:
    while os.read(source, 1):
        pass
    os._exit(1)


@contextmanager
def _without_interrupts() -> Generator[None, None, None]:
    """Blocks SIGINT in this thread. What arrives meanwhile is delivered at the end."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
