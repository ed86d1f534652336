r"""Rules for answers that are expressions: math-verify in processes of its own, and the text of the last box.

math-verify stops itself with signals. They raise an error outside of the main thread, and stop no computation that is
within one operation (`10^{10^{10}}`). So comparisons run in worker processes, which are ended if they take too long.

A percent sign is a unit and dropped on both sides, so that `50%` is 50 and never 0.5, as in the rule `numeric`. The
minus signs of Unicode are minus signs. Imports no torch.
"""

import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from typing import Any

from infopo.errors import ConfigError
from infopo.evaluation.answers import NO_ANSWER
from infopo.evaluation.items import Answered, Mark
from infopo.evaluation.numbers import MINUS
from infopo.workers import begin_worker

TIME_OUT = "time-out"
FAILED = "comparison failed"

_SECONDS = 5
"""Time that math-verify takes for reading an answer, and again for comparing it."""

_GRACE = 5
"""Time on top of that, after which its process is ended."""

_MEMORY = 2**31
"""Bytes that a comparison may take on top of what its process began with."""

_LONGEST_SHOWN = 200

_PERCENT = re.compile(r"\s*(?:\\?%|(?<=[\d}$.])\s*(?:percent(?:age)?|pct)\b)", re.IGNORECASE)
_ANNOTATION = re.compile(r"<<[^<>]*>>")

_Job = tuple[str, str]
"""Gold answer and response."""


def has_math_verify() -> bool:
    """Returns whether math-verify is installed."""
    return find_spec("math_verify") is not None


def math_verify_marks(answers: Sequence[Answered]) -> list[Mark]:
    r"""Marks responses with math-verify, which reads LaTeX and compares expressions.

    Raises:
        ConfigError: math-verify is not installed.

    Example:
        >>> from infopo.evaluation.items import Item
        >>> item = Item("math/0", "How much?", r"\frac{1}{2}")
        >>> [mark.correct for mark in math_verify_marks([Answered(item, r"\boxed{2/4}"), Answered(item, "2")])]
        [True, False]
    """
    if not has_math_verify():
        raise ConfigError("rule math_verify: math-verify is not installed; pip install 'infopo[eval]'")
    jobs = [(str(each.item.gold), each.response) for each in answers]
    return list(_in_processes(_compare, jobs, 2 * _SECONDS + _GRACE))


def boxed_marks(answers: Sequence[Answered]) -> list[Mark]:
    r"""Marks responses by the text of their last `\boxed{...}`, which is how MATH was published.

    Texts are normalised before they are compared. The comparison is `is_equiv` of lm-evaluation-harness.

    References:
        Hendrycks et al., 2021, "Measuring Mathematical Problem Solving With the MATH Dataset", arXiv 2103.03874.

    Raises:
        ConfigError: lm-eval is not installed.
    """
    hendrycks = _hendrycks()

    def mark(answered: Answered) -> Mark:
        box = hendrycks.last_boxed_only_string(answered.response)
        if not box:
            return Mark(False, None, NO_ANSWER)
        answer = box.removeprefix("\\fbox").removeprefix("\\boxed").strip()
        answer = answer[1:-1] if answer.startswith("{") else answer
        return Mark(bool(hendrycks.is_equiv(answer, str(answered.item.gold))), answer)

    return [mark(answered) for answered in answers]


def lm_eval_hendrycks_marks(answers: Sequence[Answered]) -> list[Mark]:
    """Marks responses as the task `hendrycks_math` of lm-evaluation-harness does: what is between its dollar signs.

    Raises:
        ConfigError: lm-eval is not installed.
    """
    hendrycks = _hendrycks()

    def mark(answered: Answered) -> Mark:
        document = {"solution": f"\\boxed{{{answered.item.gold}}}"}
        return Mark(bool(hendrycks.process_results(document, [answered.response])["exact_match"]))

    return [mark(answered) for answered in answers]


def _hendrycks() -> Any:
    if find_spec("lm_eval") is None:
        raise ConfigError("task math: lm-eval is not installed; pip install 'infopo[eval]'")
    from lm_eval.tasks.hendrycks_math import utils

    return utils


def _compare(job: _Job) -> Mark:
    """Compares an answer with math-verify, in this process."""
    from math_verify import parse, verify

    gold, response = (_PERCENT.sub("", _ANNOTATION.sub("", text).translate(MINUS)) for text in job)
    expected = parse(gold if "\\boxed" in gold or "$" in gold else f"${gold}$", parsing_timeout=_SECONDS)
    found = parse(response, parsing_timeout=_SECONDS)
    if not found:
        return Mark(False, None, NO_ANSWER)
    return Mark(bool(verify(expected, found, timeout_seconds=_SECONDS)), str(found[0])[:_LONGEST_SHOWN])


class _Worker:
    """A process that takes one job at a time."""

    def __init__(self, work: Callable[[_Job], Mark]) -> None:
        # A forked process has the package loaded already.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(work, other), daemon=True)
        self.process.start()
        other.close()
        self.place = -1
        self.deadline = 0.0

    def take(self, place: int, job: _Job, seconds: float) -> None:
        self.place, self.deadline = place, time.monotonic() + seconds
        self.pipe.send(job)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(work: Callable[[_Job], Mark], pipe: Connection) -> None:
    begin_worker()
    _limit_memory()
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            mark = work(job)
        except Exception as error:  # sympy fails in as many ways as it has classes
            mark = Mark(False, None, f"{FAILED} ({type(error).__name__})")
        pipe.send(mark)


def _limit_memory() -> None:
    try:
        import resource
        from pathlib import Path

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * os.sysconf("SC_PAGE_SIZE") + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    except (ImportError, OSError, ValueError):  # another system, or a limit that is lower already
        return


def _in_processes(work: Callable[[_Job], Mark], jobs: Sequence[_Job], seconds: float) -> Iterator[Mark]:
    """Yields what the work makes of each job, in their order. A job that takes longer than `seconds` is a time-out."""
    marks: list[Mark | None] = [None] * len(jobs)
    left = iter(enumerate(jobs))
    workers: list[_Worker] = []
    try:
        for _ in range(
            min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, len(jobs))
        ):
            workers.append(_Worker(work))
            _next(workers[-1], left, seconds)
        while busy := [worker for worker in workers if worker.place >= 0]:
            patience = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
            ready = wait([worker.pipe for worker in busy], patience)
            for worker in busy:
                if worker.pipe in ready:
                    marks[worker.place], is_alive = _received(worker)
                elif time.monotonic() >= worker.deadline:
                    marks[worker.place], is_alive = Mark(False, None, TIME_OUT), False
                else:
                    continue
                if not is_alive:
                    worker.end()
                    place = workers.index(worker)
                    workers[place] = worker = _Worker(work)
                _next(worker, left, seconds)
    finally:
        for worker in workers:
            worker.end()
    for mark in marks:
        assert mark is not None
        yield mark


def _next(worker: _Worker, left: Iterable[tuple[int, _Job]], seconds: float) -> None:
    place, job = next(iter(left), (-1, ("", "")))
    if place < 0:
        worker.place = -1
    else:
        worker.take(place, job, seconds)


def _received(worker: _Worker) -> tuple[Mark, bool]:
    """Returns the mark, and whether the process that sent it lives."""
    try:
        return worker.pipe.recv(), True
    except (EOFError, OSError):  # killed, for its memory as a rule
        return Mark(False, None, FAILED), False
