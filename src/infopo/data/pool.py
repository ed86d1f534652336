"""A function over many items in worker processes, in order and without holding all of them."""

import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, Literal, TypeVar

from infopo.errors import TrainingError
from infopo.workers import WorkerPool

Item = TypeVar("Item")
Result = TypeVar("Result")

_ITEMS_A_CHUNK = 64
_CHUNKS_AHEAD = 4
# As `datasets` does: a spawned worker imports torch again and needs a guarded main module.
_METHOD: Literal["fork"] | None = "fork" if sys.platform == "linux" else None
_worker_function: Callable[[Any], Any]


def in_processes(
    function: Callable[[Item], Result], items: Iterable[Item], num_proc: int
) -> Generator[Result, None, None]:
    """Yields the results of the function, in the order of the items.

    Args:
        function: What is done with each item; it, items and results are pickled if there are several processes.
        items: Taken as they are needed: at most a few chunks wait for a process.
        num_proc: Number of worker processes; 1: none, the work is done here.

    Raises:
        TrainingError: A worker process was killed.
    """
    if num_proc == 1:
        yield from map(function, items)
        return
    iterator = iter(items)
    pending: deque[Future[list[Result]]] = deque()
    try:
        with WorkerPool(num_proc, _METHOD, _start_worker, (function,)) as pool:
            while chunk := list(islice(iterator, _ITEMS_A_CHUNK)):
                pending.append(pool.submit(_run_chunk, chunk))
                # Bounded, so that a file larger than memory does not queue up here.
                if len(pending) >= _CHUNKS_AHEAD * num_proc:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
    except BrokenProcessPool as error:
        raise TrainingError(
            f"one of {num_proc} processes that tokenize ended before its work did (killed, or out of memory?); "
            "try fewer of them: data.num_proc, or dataset_num_proc in a script"
        ) from error


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _worker_function
    _worker_function = function


def _run_chunk(items: list[Any]) -> list[Any]:
    return [_worker_function(item) for item in items]
