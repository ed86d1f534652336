"""The run directory, which is written so that a kill at any moment leaves it readable.

    recipe.yaml        the resolved recipe (recipe-from-step-N.yaml for a part that was resumed with another one)
    environment.json   versions, commit, hardware, seed, command line
    metrics.jsonl      one JSON object per line, each with its `step`
    eval.json          results of evaluation
    probe.json         examples and samples that training is measured on, with their log-probs at the start
    generations.jsonl  sampled responses to fixed prompts, one per line, each with its `step`
    forecast.jsonl     gradients of single examples, one line per measurement

All JSON is strict. NaN and infinities, which JSON lacks, are the texts "NaN", "Infinity" and "-Infinity". `read_run`
turns them back into numbers in the metrics. This module imports neither torch nor transformers.
"""

import contextlib
import errno
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infopo import durable
from infopo.errors import DataError
from infopo.secrets import masked_tree

METRICS = "metrics.jsonl"
RECIPE = "recipe.yaml"
ENVIRONMENT = "environment.json"
EVALUATION = "eval.json"
PROBE = "probe.json"
GENERATIONS = "generations.jsonl"
FORECAST = "forecast.jsonl"

Record = dict[str, Any]
"""One line of metrics, which is `step` and numbers by name."""

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RunDirectoryError(DataError):
    """A file of a run directory cannot be read or written. The message names the file, and the line if there is one."""


@dataclass(frozen=True)
class Run:
    """The contents of a run directory.

    Attributes:
        directory: Path of the directory.
        recipe: Text of the resolved recipe. It is None if the file is missing, as for each file below.
        environment: Versions, hardware, seed.
        evaluation: Results of evaluation.
        metrics: Records in the order in which they were written.
        lost_last_line: Whether the last line of metrics was half-written, and is left out.
    """

    directory: Path
    recipe: str | None = None
    environment: Record | None = None
    evaluation: Record | None = None
    metrics: list[Record] = field(default_factory=list)
    lost_last_line: bool = False

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Returns steps and values of one metric, from the records that have it.

        Example:
            >>> Run(Path("run"), metrics=[{"step": 1, "loss": 0.7}, {"step": 2}]).series("loss")
            ([1], [0.7])
        """
        points = [(record["step"], record[name]) for record in self.metrics if name in record]
        return [step for step, _ in points], [value for _, value in points]


class RunWriter:
    """Writes a run directory. A run has one writer, on rank 0.

    Args:
        directory: Path of the directory, which is made if it does not exist.

    Raises:
        RunDirectoryError: The directory cannot be written to. So do all methods.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._metrics = JsonLines(self.directory / METRICS)
        with os_errors_named(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)

    def write_recipe(self, text: str, done: int = 0) -> None:
        """Writes the recipe. `recipe.yaml` is the one that a run began with, and never changes.

        Args:
            text: The resolved recipe.
            done: Number of optimizer steps before a resumed run. If its recipe differs, it is written to a file of its
                own, named by the first step that it is for.
        """
        # Recipes of later steps belong to a part of the run that is now repeated.
        for path in self.directory.glob("recipe-from-step-*.yaml"):
            number = path.stem.rpartition("-")[2]
            if done and number.isdecimal() and int(number) > done:
                path.unlink()
        first = _read_text(self.directory / RECIPE) if done else None
        if first is None:
            write_text_atomic(self.directory / RECIPE, text)
        elif first != text:
            write_text_atomic(self.directory / f"recipe-from-step-{done + 1}.yaml", text)

    def write_environment(self, environment: Mapping[str, Any], done: int = 0) -> None:
        """Writes the environment. A resumed part adds an entry to `resumed`, with what differs.

        Args:
            environment: The result of `environment()`.
            done: Number of optimizer steps before a resumed run.
        """
        path = self.directory / ENVIRONMENT
        record = json.loads(to_json(masked_tree(environment)))
        first = read_object(path) if done else None
        if first is not None:
            earlier = [part for part in first.get("resumed", []) if part["from_step"] <= done]
            differing = {key: value for key, value in record.items() if first.get(key) != value}
            record = {**first, "resumed": [*earlier, {"from_step": done + 1, **differing}]}
        write_json_atomic(path, record)

    def write_evaluation(self, results: Mapping[str, Any]) -> None:
        write_json_atomic(self.directory / EVALUATION, results)

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Adds one line. It survives the end of the process at once, and that of the machine when it is synced.

        Args:
            record: Values by name, with an integer `step`.
        """
        if not isinstance(record.get("step"), int):
            raise ValueError(f"a record of metrics has an integer step, got {record.get('step')!r}")
        self._metrics.append(record)

    def truncate_metrics_after(self, step: int) -> None:
        """Removes what a resumed run will write again.

        These are records of later steps, a half-written last line, and the summary (`train_runtime`) of a run that
        ended, with all that follows it.
        """
        self._metrics.truncate_after(step)


class Dispensable:
    """Writes files without which training goes on: that one cannot be written is said once, as a warning.

    Args:
        warn: Takes the warning, as a format and its argument.
        what: What is not written, with its verb.
    """

    def __init__(self, warn: Callable[[str, object], None], what: str) -> None:
        self._warn = warn
        self._what = what
        self._is_said = False

    def write(self, write: Callable[[], None]) -> None:
        """Calls a function that writes a file."""
        try:
            write()
        except (RunDirectoryError, OSError) as error:
            if not self._is_said:
                self._warn(f"{self._what} not written: %s", error)
            self._is_said = True


class JsonLines:
    """A file of one JSON object per line, each with an integer `step`, that is only added to.

    Args:
        path: The file, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last_line_is_whole = False

    def append(self, *records: Mapping[str, Any]) -> None:
        """Adds lines. They survive the end of the process at once, and that of the machine when it is synced.

        Raises:
            RunDirectoryError: The file cannot be written to.
        """
        lines = "".join(f"{to_json(record)}\n" for record in records).encode()
        with os_errors_named(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self._last_line_is_whole:
                _cut_partial_line(self.path)
                self._last_line_is_whole = True
            # With one write to a file that is opened for appending, a kill leaves the lines whole, or the last cut off.
            with self.path.open("ab", buffering=0) as file:
                if file.write(lines) != len(lines):
                    self._last_line_is_whole = False
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def truncate_after(self, step: int) -> None:
        """Removes what a resumed run will write again.

        These are records of later steps, a half-written last line, and the summary (`train_runtime`) of a run that
        ended, with all that follows it.
        """
        if not self.path.exists():
            return
        lines = itertools.takewhile(
            lambda pair: "train_runtime" not in (pair[1] or {}), _metric_lines(self.path)
        )
        kept = [line for line, record in lines if record is not None and record["step"] <= step]
        write_text_atomic(self.path, "".join(f"{line}\n" for line in kept))
        self._last_line_is_whole = True


def holds_run_files(directory: Path) -> bool:
    """Returns whether a directory has a file that `read_run` reads."""
    return any((directory / name).is_file() for name in (METRICS, RECIPE, ENVIRONMENT, EVALUATION))


def runs_beneath(directory: Path) -> str:
    """Returns the end of a message that names the runs in the folders of a directory, or "" if there are none."""
    found = runs_named(directory)
    return f"; runs in its folders are {found}" if found else ""


def runs_named(directory: Path) -> str:
    """Returns the folders of a directory that hold runs, as a text names them: three, and how many more."""
    files = (path for name in (METRICS, RECIPE) for path in directory.glob(f"*/{name}"))
    found = sorted({str(path.parent) for path in files})
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"{', '.join(found[:3])}{more}"


def read_run(directory: str | Path) -> Run:
    """Reads a run directory. Files may be missing, and the last line of metrics may be half-written.

    Raises:
        RunDirectoryError: There is no such directory, it has nothing of a run, or a file in it is damaged.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise RunDirectoryError("is no directory; expected the output_dir of a run", str(directory))
    if not holds_run_files(directory):
        expected = f"{RECIPE}, {METRICS}, {ENVIRONMENT} or {EVALUATION}"
        raise RunDirectoryError(
            f"is no run directory: it holds no {expected}{runs_beneath(directory)}", str(directory)
        )
    metrics, lost = read_records(directory / METRICS)
    return Run(
        directory,
        recipe=_read_text(directory / RECIPE),
        environment=read_object(directory / ENVIRONMENT),
        evaluation=read_object(directory / EVALUATION),
        metrics=metrics,
        lost_last_line=lost,
    )


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise RunDirectoryError(f"cannot be read: {error}", str(path)) from error


def read_object(path: Path) -> Record | None:
    """Returns the JSON object in a file, or None if there is no file.

    Raises:
        RunDirectoryError: The file cannot be read, or holds something else.
    """
    text = _read_text(path)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunDirectoryError(f"is not valid JSON: {error}", str(path)) from error
    if not isinstance(value, dict):
        raise RunDirectoryError(f"expected a JSON object, got {type(value).__name__}", str(path))
    return value


def read_records(path: Path) -> tuple[list[Record], bool]:
    """Returns the records of a file with one per line, and whether a last line was cut off and left out.

    Without a file there are none.

    Raises:
        RunDirectoryError: The file cannot be read, or a line is no record.
    """
    if not path.exists():
        return [], False
    with os_errors_named(path):
        content = path.read_bytes()
    lines = content.split(b"\n")[:-1]
    # Whole files without a damaged line or a NaN are parsed at once, in two thirds of the time.
    if content.endswith(b"\n") and b"NaN" not in content and b"Infinity" not in content:
        try:
            records = json.loads(b"[%s]" % b",".join(lines))
        except (ValueError, RecursionError):
            records = []
        if len(records) == len(lines) and all(
            isinstance(r, dict) and isinstance(r.get("step"), int) for r in records
        ):
            return records, False
    found = [record for _, record in _metric_lines(path)]
    return [record for record in found if record is not None], None in found


def _metric_lines(path: Path) -> list[tuple[str, Record | None]]:
    """Returns the lines of metrics with their records. The record of a last line that was cut off is None."""
    with os_errors_named(path):
        lines = path.read_bytes().split(b"\n")
    is_whole = lines[-1] == b""
    if is_whole:
        lines.pop()
    records: list[tuple[str, Record | None]] = []
    for number, raw in enumerate(lines, start=1):
        record = parse_record(raw)
        if record is None and (is_whole or number < len(lines)):
            raise RunDirectoryError("is no JSON object with an integer step", f"{path}:{number}")
        records.append((raw.decode("utf-8", errors="replace"), record))
    return records


def parse_record(line: bytes) -> Record | None:
    """Returns the record of a line, with non-finite texts as numbers, or None if the line is not a record."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    if b"NaN" not in line and b"Infinity" not in line:
        return record  # which nearly every line is, of the many that a report reads
    return {
        key: _NON_FINITE.get(value, value) if isinstance(value, str) else value
        for key, value in record.items()
    }


def _cut_partial_line(path: Path) -> None:
    """Ends the file at its last whole line, so that the next record does not continue half of one."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


# --- durable files ---


def to_json(value: Any, indent: int | None = None) -> str:
    """Returns strict JSON, with NaN and infinities as text, and arrays and tensors of one number as that number.

    Example:
        >>> to_json({"loss": math.nan, "steps": (1, 2)})
        '{"loss": "NaN", "steps": [1, 2]}'
    """
    return json.dumps(_jsonable(value), indent=indent, allow_nan=False)


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_jsonable(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return _jsonable(value.item())
    raise TypeError(f"{type(value).__name__} has no place in JSON: {value!r}")


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Writes indented JSON (see `write_text_atomic`)."""
    write_text_atomic(path, f"{to_json(value, indent=2)}\n")


def write_text_atomic(path: str | Path, text: str) -> None:
    """Writes a file that exists as a whole or not at all, and that is durable once this returns.

    Raises:
        RunDirectoryError: The file cannot be written. A file that was there before is unchanged.
    """
    path = Path(path)
    with os_errors_named(path):
        durable.write(path, [text.encode("utf-8", errors="backslashreplace")])


@contextlib.contextmanager
def os_errors_named(path: Path) -> Iterator[None]:
    """Turns errors of the system into an error that names the file."""
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(f"{error.strerror or error}", str(path)) from error
