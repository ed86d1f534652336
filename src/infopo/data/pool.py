"""A function over many items in worker processes, in order and without holding all of them."""

import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal, TypeVar

from infopo.errors import TrainingError
from infopo.workers import WorkerPool

Item = TypeVar("Item")
Result = TypeVar("Result")

_ITEMS_A_CHUNK = 64
"""Items that one process takes at a time."""

_CHUNKS_HERE = 4
"""Chunks that are taken at a time if the work is done here, where the tokenizer itself uses all cores."""

_CHUNKS_AHEAD = 4
# As `datasets` does: a spawned worker imports torch again and needs a guarded main module.
_METHOD: Literal["fork"] | None = "fork" if sys.platform == "linux" else None
_worker_function: Callable[[list[Any]], list[Any]]


def in_processes(
    function: Callable[[list[Item]], list[Result]], items: Iterable[Item], num_proc: int
) -> Generator[Result, None, None]:
    """Yields the results of the function, in the order of the items.

    Args:
        function: Takes several items, and gives their results. It, items and results are pickled if there are several
            processes.
        items: Taken as they are needed: at most a few chunks wait for a process. If taking one fails, the results of
            those before it come first.
        num_proc: Number of worker processes; 1: none, the work is done here.

    Raises:
        TrainingError: A worker process was killed.
    """
    if num_proc == 1:
        for chunk in _chunks(items, _CHUNKS_HERE * _ITEMS_A_CHUNK):
            if isinstance(chunk, Exception):
                raise chunk
            yield from function(chunk)
        return
    pending: deque[Future[list[Result]]] = deque()
    failure: Exception | None = None
    try:
        with WorkerPool(num_proc, _METHOD, _start_worker, (function,)) as pool:
            for chunk in _chunks(items, _ITEMS_A_CHUNK):
                if isinstance(chunk, Exception):
                    failure = chunk
                    break
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
    if failure is not None:
        raise failure


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item] | Exception]:
    """Lists of `size` items. An error of the iterable comes as a value, behind the items that stand before it."""
    iterator, chunk, failure = iter(items), list[Item](), None
    while failure is None:
        try:
            chunk.append(next(iterator))
        except StopIteration:
            break
        except Exception as error:
            failure = error
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
    if failure is not None:
        yield failure


def _start_worker(function: Callable[[list[Any]], list[Any]]) -> None:
    global _worker_function
    _worker_function = function


def _run_chunk(items: list[Any]) -> list[Any]:
    return _worker_function(items)
