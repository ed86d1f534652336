"""Results of an evaluation: marks of every item, what they add up to, and the two files that hold them.

`items.jsonl` has a line per response with its marks, `eval.json` the record: what was evaluated, with what, and the
figures with their intervals. Imports no torch.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from infopo.errors import ConfigError, DataError
from infopo.evaluation.items import Mark
from infopo.evaluation.pass_at_k import pass_at_k
from infopo.intervals import wilson
from infopo.output import counted
from infopo.paired import mean_interval
from infopo.runs import (
    EVALUATION,
    RECIPE,
    Record,
    RunDirectoryError,
    read_object,
    to_json,
    write_json_atomic,
    write_text_atomic,
)

ITEMS = "items.jsonl"

FOLDER = "evaluation"
"""Folder of a run directory that an evaluation of it goes to."""

DURING = "tasks"
"""Folder of a run directory with an evaluation per step of training, of the recipe's `evaluate.tasks`."""

SCHEMA_VERSION = 2

LONGEST_GOLD = 200
"""Largest number of characters of what an item is graded against that `items.jsonl` has as it is."""


@dataclass(frozen=True)
class Response:
    """A response with its marks.

    Attributes:
        task: Name of the task.
        item: Id of the item.
        sample: Its number among the samples of this item, from 0.
        prompt: What was asked, as people read it.
        response: What was answered.
        tokens: Number of tokens, or None if it is not known.
        finished: Whether the model ended the response itself.
        marks: What each rule makes of it.
        gold: What it was graded against (`gold_text`), or None if that is not known.
    """

    task: str
    item: str
    sample: int
    prompt: str
    response: str
    tokens: int | None
    finished: bool
    marks: Mapping[str, Mark]
    gold: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that was read.

    Attributes:
        folder: Where it is.
        record: Content of `eval.json`.
        responses: All responses with their marks.
    """

    folder: Path
    record: Record
    responses: Sequence[Response]

    def scores(self, task: str, rule: str | None = None) -> dict[str, list[float]]:
        """Returns for each item of a task the scores of its samples, 1 if right.

        Args:
            task: Name of the task.
            rule: Name of the rule, by default the headline.
        """
        rule = rule or self.record["tasks"][task]["headline"]
        found: dict[str, list[float]] = {}
        for each in self.responses:
            if each.task == task and rule in each.marks:
                found.setdefault(each.item, []).append(float(each.marks[rule].correct))
        return found


def summary(responses: Sequence[Response], rule: str) -> Record:
    """Returns what a rule's marks of a task add up to.

    The interval of one sample an item is Wilson's. Several samples of an item depend on each other, so that the
    interval is then that of a bootstrap over items, or Wilson's of so many items if they do not differ.

    Returns:
        accuracy (the mean over items of the share of samples that are right), correct, n (responses), ci95, notes (why
        responses have no answer, with counts), and with k > 1 samples an item pass@k for powers of two, and majority.
    """
    by_item: dict[str, list[Mark]] = {}
    for each in responses:
        by_item.setdefault(each.item, []).append(each.marks[rule])
    groups = list(by_item.values())
    right = [sum(mark.correct for mark in marks) for marks in groups]
    n, correct = len(responses), sum(right)
    notes = Counter(mark.note for marks in groups for mark in marks if mark.note)
    found: Record = {"accuracy": None, "correct": correct, "n": n, "ci95": None, "notes": dict(notes)}
    if not groups:
        return found
    shares = np.array([c / len(marks) for c, marks in zip(right, groups)])
    found["accuracy"] = float(shares.mean())
    fewest = min(map(len, groups))
    if max(map(len, groups)) == 1:
        found["ci95"] = wilson(correct / n, n)
        return found
    found["ci95"] = mean_interval(shares)
    for k in (2**power for power in range(fewest.bit_length())):
        found[f"pass@{k}"] = _with_interval([pass_at_k(len(m), c, k) for c, m in zip(right, groups)])
    found["majority"] = _with_interval([float(majority(marks)) for marks in groups])
    return found


def majority(marks: Sequence[Mark]) -> bool:
    """Returns whether the answer that most samples of an item agree on is right. Of equally many, the first counts.

    Example:
        >>> majority([Mark(False, "7"), Mark(True, "8"), Mark(True, "8"), Mark(False, None, "no answer")])
        True
    """
    answers = Counter(mark.answer for mark in marks if mark.answer is not None)
    if not answers:
        return False
    most = answers.most_common(1)[0][0]
    return next(mark.correct for mark in marks if mark.answer == most)


def _with_interval(values: Sequence[float]) -> Record:
    return {"value": float(np.mean(values)), "ci95": mean_interval(values)}


def gold_text(gold: Any) -> str:
    """Returns what an item is graded against as JSON, or its SHA-256 if that is long, as tests of code are.

    Two evaluations graded an item alike only if these agree.

    Example:
        >>> gold_text("18"), gold_text({"test": 100 * "x = 1"})[:15]
        ('"18"', 'sha256:62d0d18b')
    """
    text = to_json(gold)
    if len(text) <= LONGEST_GOLD:
        return text
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def default_folder(name: str) -> Path:
    """Returns the folder that an evaluation goes to if the user names none.

    Example:
        >>> default_folder("lab:policy").as_posix()
        'infopo-eval/lab-policy'
    """
    folder = Path(name)
    if (folder / RECIPE).is_file():
        return folder / FOLDER
    return Path("infopo-eval") / re.sub(r"[^\w.-]+", "-", name).strip("-.")


def folder_of_run(directory: Path) -> Path:
    """Returns the folder of a run's evaluation: that of `infopo evaluate`, else the last one of training.

    It need not exist.
    """
    during = directory / DURING
    steps = (path for path in during.glob("step-*") if path.name[5:].isdecimal())
    last = sorted(steps, key=lambda path: int(path.name[5:]), reverse=True)
    found = (directory / FOLDER, during / "final", *last)
    return next((folder for folder in found if (folder / EVALUATION).is_file()), directory / FOLDER)


@dataclass(frozen=True)
class TaskFigure:
    """What stands for a task in an evaluation: its headline rule's figure.

    Attributes:
        task: Name of the task.
        rule: Name of the rule.
        accuracy: Mean over items of the share of samples that are right.
        ci95: Ends of its 95 % interval.
        items: Number of items.
        samples: Number of samples of each.
        source: Where the task's data are from, or None if that is not known.
    """

    task: str
    rule: str
    accuracy: float
    ci95: tuple[float, float]
    items: int
    samples: int
    source: str | None

    def text(self) -> str:
        """Returns the figure for people.

        Example:
            >>> TaskFigure("lab", "exact", 0.5, (0.4, 0.6), 96, 1, None).text()
            'lab: 0.500 [0.400, 0.600] of 96 items (exact)'
        """
        several = f", {self.samples} samples each" if self.samples > 1 else ""
        low, high = self.ci95
        items = f"{counted(self.items, 'item')}{several}"
        return f"{self.task}: {self.accuracy:.3f} [{low:.3f}, {high:.3f}] of {items} ({self.rule})"


def task_figures(record: Mapping[str, Any] | None) -> list[TaskFigure]:
    """Returns the headline figure of each task of an `eval.json`. Tasks without one are left out."""
    if (
        record is None
        or record.get("schema_version") != SCHEMA_VERSION
        or not isinstance(record.get("tasks"), dict)
    ):
        return []
    figures = []
    for name, task in record["tasks"].items():
        try:
            found = task["rules"][task["headline"]]
            low, high = found["ci95"]
            figures.append(
                TaskFigure(
                    name,
                    task["headline"],
                    float(found["accuracy"]),
                    (float(low), float(high)),
                    int(task["items"]),
                    int(task.get("samples") or 1),
                    (task.get("data") or {}).get("source"),
                )
            )
        except (KeyError, TypeError, ValueError):
            continue
    return figures


def refuse_other_subject(folder: Path, name: str) -> None:
    """Refuses a folder that has the results of another model, or of other responses.

    Raises:
        ConfigError: There is such an evaluation.
    """
    record = read_object(folder / EVALUATION)
    there = (record or {}).get("model")
    # A server can have one model after another under one address.
    known = there.get("server") or there.get("name") if isinstance(there, dict) else None
    if known is not None and _place(known) != _place(name):
        raise ConfigError(
            f"--output: {folder} holds the evaluation of {known}; name another folder for {name}, or remove that one"
        )


def _place(name: str) -> str:
    """Returns the path of what exists, and any other name unchanged."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def refuse_smaller(folder: Path, model: Mapping[str, Any], sizes: Mapping[str, tuple[int, int]]) -> None:
    """Refuses to replace results of a model by results of the same model on less.

    Args:
        folder: The folder of both.
        model: What `eval.json` is to say of the model.
        sizes: Task -> number of items and of samples per item. Of lm-evaluation-harness, it may be a task's group.

    Raises:
        ConfigError: A task has more items or samples there.
    """
    earlier, is_same = _earlier(folder, model)
    for name, task in earlier.items() if is_same else ():
        asked = next(
            (key for key in sizes if name == key or ("harness" in task and name.startswith(f"{key}_"))), ""
        )
        items, samples = sizes.get(asked, (0, 0))
        there = int(task.get("items") or 0), int(task.get("samples") or 1)
        if asked and (items < there[0] or samples < there[1]):
            raise ConfigError(
                f"--output: {folder} holds the result of {name} on {_of_size(there)}, which one on "
                f"{_of_size((items, samples))} would replace; name another folder, remove that one, or leave out "
                "--limit and --num-samples"
            )


def _of_size(size: tuple[int, int]) -> str:
    items, samples = size
    return counted(items, "item") + (f" with {samples} samples each" if samples > 1 else "")


def replaced_lines(folder: Path, record: Record) -> list[str]:
    """Returns a line for each result in a folder that a record is about to replace by another one."""
    now = {figure.text() for figure in task_figures({"schema_version": SCHEMA_VERSION, **record})}
    before = task_figures(read_object(folder / EVALUATION))
    return [
        f"replaced: {figure.text()}"
        for figure in before
        if figure.task in record["tasks"] and figure.text() not in now
    ]


def _earlier(folder: Path, model: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Returns the tasks of the evaluation in a folder by name, and whether it is of the same model."""
    record = read_object(folder / EVALUATION) or {}
    before, tasks = record.get("model") or {}, record.get("tasks")
    if record.get("schema_version") != SCHEMA_VERSION or not isinstance(tasks, dict):
        return {}, False
    return tasks, all(before.get(key) == model.get(key) for key in ("weights", "sha256", "server"))


def with_earlier_tasks(
    folder: Path, record: Record, responses: Sequence[Response]
) -> tuple[Record, list[Response], list[str]]:
    """Adds the tasks that a folder has of the same model and that were not evaluated again.

    Returns:
        The record, the responses, and the names of tasks that are dropped, because the model is not known to be the
        same, or their responses cannot be read.
    """
    earlier, is_same = _earlier(folder, record["model"])
    others = {name: task for name, task in earlier.items() if name not in record["tasks"]}
    if not is_same:
        return record, list(responses), sorted(others)
    try:
        kept = [each for each in read_items(folder / ITEMS) if each.task in others]
    except DataError:
        return record, list(responses), sorted(others)
    return {**record, "tasks": {**others, **record["tasks"]}}, [*kept, *responses], []


def write_evaluation(folder: Path, record: Mapping[str, Any], responses: Iterable[Response]) -> None:
    """Writes both files of an evaluation, each as a whole or not at all.

    Raises:
        RunDirectoryError: A file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"cannot be made: {error.strerror}", str(folder)) from error
    write_text_atomic(folder / ITEMS, "".join(f"{to_json(_to_line(each))}\n" for each in responses))
    write_json_atomic(folder / EVALUATION, {"schema_version": SCHEMA_VERSION, **record})


def read_evaluation(folder: str | Path) -> Evaluation:
    """Reads the evaluation in a folder.

    Raises:
        DataError: There is none, or it is of another version.
        RunDirectoryError: A file is damaged.
    """
    folder = Path(folder)
    record = read_object(folder / EVALUATION)
    if record is None or record.get("schema_version") != SCHEMA_VERSION or "tasks" not in record:
        raise DataError(
            f"holds no evaluation; expected {EVALUATION} of `infopo evaluate`", str(folder), "no evaluation"
        )
    return Evaluation(folder, record, list(read_items(folder / ITEMS)))


def read_items(path: Path) -> Iterable[Response]:
    """Yields the responses of a file.

    Raises:
        DataError: The file is missing, or a line is none.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}", str(path), "no such file")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield _of_line(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise DataError(
                    f"is no marked response: {type(error).__name__}: {error}",
                    f"{path}:{number}",
                    "damaged line",
                ) from error


def _to_line(each: Response) -> Record:
    return {**vars(each), "marks": {rule: vars(mark) for rule, mark in each.marks.items()}}


def _of_line(record: Record) -> Response:
    marks = {
        rule: Mark(bool(mark["correct"]), mark["answer"], mark["note"])
        for rule, mark in record["marks"].items()
    }
    return Response(**{**record, "marks": marks})
