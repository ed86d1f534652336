"""A function over many items in worker processes, in order and without holding all of them."""

import multiprocessing
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_ITEMS_A_CHUNK = 64
_CHUNKS_AHEAD = 4
_worker_function: Callable[[Any], Any]


def in_processes(
    function: Callable[[Item], Result], items: Iterable[Item], num_proc: int
) -> Generator[Result, None, None]:
    """Results of the function, in the order of the items.

    Args:
        function: What is done with each item; it, items and results are pickled if there are several processes.
        items: Taken as they are needed: at most a few chunks wait for a process.
        num_proc: Number of worker processes; 1: none, the work is done here.
    """
    if num_proc == 1:
        yield from map(function, items)
        return
    iterator = iter(items)
    # Fork as `datasets` does: a spawned worker imports torch again and needs a guarded main module.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pending: deque[Future[list[Result]]] = deque()
    with ProcessPoolExecutor(num_proc, context, _start_worker, (function,)) as pool:
        try:
            while chunk := list(islice(iterator, _ITEMS_A_CHUNK)):
                pending.append(pool.submit(_run_chunk, chunk))
                # Bounded, so that a file larger than memory does not queue up here.
                if len(pending) >= _CHUNKS_AHEAD * num_proc:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _worker_function
    _worker_function = function


def _run_chunk(items: list[Any]) -> list[Any]:
    return [_worker_function(item) for item in items]
