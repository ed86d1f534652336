"""Worker processes that Ctrl-C ends at once, and that never outlive the process which started them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


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
