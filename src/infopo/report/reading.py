"""Reads run directories for a report: finished, running or killed, and those of scripts without `metrics.jsonl`."""

import json
import os
import re
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from infopo.errors import ConfigError
from infopo.run_state import LOCK, STATE, checkpoints_in
from infopo.runs import (
    GENERATIONS,
    METRICS,
    Record,
    Run,
    RunDirectoryError,
    holds_run_files,
    parse_record,
    read_object,
    read_records,
    read_run,
)
from infopo.verdicts import DATA, VERDICTS

FRESH = 600.0
"""Seconds since the last record within which a run on another machine counts as running."""


@dataclass(frozen=True)
class ReportRun:
    """A run directory as the report shows it.

    Attributes:
        name: Short name, which no other run of the report has.
        run: The files that every run has.
        state: "finished", "running" or "stopped".
        source: The file that the metrics are from.
        generations: Records of `generations.jsonl`.
        verdicts: Content of `verdicts.json`. None if the file is missing, as for `data`.
        data: Content of `data.json`.
        notes: Sentences on what is missing or was left out.
    """

    name: str
    run: Run
    state: str
    source: str = METRICS
    generations: list[Record] = field(default_factory=list)
    verdicts: Record | None = None
    data: Record | None = None
    notes: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """The last step that a record of the metrics has, or 0."""
        return max((record["step"] for record in self.run.metrics), default=0)

    def last(self, name: str) -> float | None:
        """Returns the last value of a metric that is a number, or None."""
        return next((v for r in reversed(self.having(name)) if is_number(v := r[name])), None)

    def having(self, name: str) -> list[Record]:
        """Returns the records that have a metric, in their order."""
        return self._by_name.get(name, [])

    @cached_property
    def _by_name(self) -> dict[str, list[Record]]:
        found: defaultdict[str, list[Record]] = defaultdict(list)
        for record in self.run.metrics:
            for name in record:
                found[name].append(record)
        return found


def is_number(value: Any) -> TypeGuard[float]:
    """Returns whether a value of a JSON file is a number that a float can be. True and false are none.

    Example:
        >>> is_number(1), is_number(float("nan")), is_number(True), is_number("1"), is_number(10**400)
        (True, True, False, False, False)
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value.bit_length() < 1000
    return isinstance(value, float)


def read_runs(directories: Sequence[str | Path]) -> list[ReportRun]:
    """Reads the runs of a report, in the order given.

    Raises:
        ConfigError: A directory is given twice.
        RunDirectoryError: A directory is not there or has nothing of a run, or a file in it is damaged.
    """
    paths = [Path(directory) for directory in directories]
    resolved = Counter(path.resolve() for path in paths)
    twice = [str(path) for path in paths if resolved[path.resolve()] > 1]
    if twice:
        raise ConfigError(f"RUN: {', '.join(twice)} are the same directory; name each run once")
    runs = [_read(path) for path in paths]
    return [replace(run, name=name) for run, name in zip(runs, distinct_names(paths), strict=True)]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Returns the last folder of each path, with as many folders before it as tell it from the others.

    Example:
        >>> distinct_names([Path("a/seed0/dpo"), Path("b/seed0/dpo"), Path("b/sft")])
        ['a/seed0/dpo', 'b/seed0/dpo', 'sft']
    """
    parts = [path.resolve().parts for path in paths]
    depth = [1] * len(parts)
    for _ in range(max(map(len, parts), default=0)):
        names = ["/".join(part[-d:]) for part, d in zip(parts, depth, strict=True)]
        counts = Counter(names)
        depth = [d + (counts[name] > 1) for d, name in zip(depth, names, strict=True)]
    return ["/".join(part[-d:]) or "/" for part, d in zip(parts, depth, strict=True)]


def _read(directory: Path) -> ReportRun:
    notes = []
    checkpoint = _last_checkpoint(directory)
    has_metrics = (directory / METRICS).is_file()
    if not has_metrics and checkpoint is not None:
        run, source = (
            _read_without_metrics(directory, checkpoint),
            str(checkpoint.relative_to(directory) / STATE),
        )
        notes.append(f"There is no {METRICS}, so the metrics are those of {source}.")
    elif not holds_run_files(directory) and _read_lock(directory / LOCK) is not None:
        # Loading the model and computing the reference come before anything is written.
        run, source = Run(directory), METRICS
        notes.append("The run has not begun to train.")
    else:
        run, source = read_run(directory), METRICS
        if not run.metrics:
            notes.append(f"{METRICS} has no record yet." if has_metrics else f"There is no {METRICS}.")
    if run.lost_last_line:
        notes.append(f"The last line of {METRICS} was half-written, and is left out.")
    generations, lost = read_records(directory / GENERATIONS)
    if lost:
        notes.append(f"The last line of {GENERATIONS} was half-written, and is left out.")
    return ReportRun(
        name=directory.name,
        run=run,
        state=_state(run),
        source=source,
        generations=generations,
        verdicts=read_object(directory / VERDICTS),
        data=read_object(directory / DATA),
        notes=tuple(notes),
    )


# --- runs of scripts, whose metrics are in their checkpoints ---


def _last_checkpoint(directory: Path) -> Path | None:
    """Returns the newest folder with a `trainer_state.json`, which may be the directory itself."""
    folders = [*checkpoints_in(directory), directory]
    return next((folder for folder in folders if (folder / STATE).is_file()), None)


def _read_without_metrics(directory: Path, checkpoint: Path) -> Run:
    state = read_object(checkpoint / STATE) or {}
    history = state.get("log_history")
    if not isinstance(history, list):
        found = type(history).__name__
        raise RunDirectoryError(f"expected a list under 'log_history', got {found}", str(checkpoint / STATE))
    metrics = [record for entry in history if (record := parse_record(json.dumps(entry).encode()))]
    return replace(read_run(directory) if holds_run_files(directory) else Run(directory), metrics=metrics)


# --- is it still running? ---


def _state(run: Run) -> str:
    """Returns whether a run is finished, running or stopped. Takes no lock, which would stop a run that starts."""
    holder = _read_lock(run.directory / LOCK)
    if holder is not None and _is_alive(*holder, run):
        return "running"
    summary = any("train_runtime" in record for record in run.metrics)
    return "finished" if summary or run.evaluation is not None else "stopped"


def _read_lock(path: Path) -> tuple[int, str] | None:
    """Returns process and host of a run's lock, or None if no run has it."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    match = re.match(r"process (\d{1,9}) on (\S+)", text)
    return (int(match[1]), match[2]) if match else None


def _is_alive(process: int, host: str, run: Run) -> bool:
    if host == socket.gethostname():
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
        except OSError:
            return True  # it belongs to another user
        return True
    last = next((r["time"] for r in reversed(run.metrics) if is_number(r.get("time"))), None)
    return last is not None and time.time() - last < FRESH
