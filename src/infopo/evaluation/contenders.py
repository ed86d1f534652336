"""What can be compared: evaluations, run directories, files of results and files of responses, as scores by item.

Imports no torch. What grades responses does, and is passed in.
"""

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from infopo.data.files import SUFFIXES, object_rows
from infopo.errors import ConfigError, DataError
from infopo.evaluation.given import IDS, PROMPTS, TEXTS
from infopo.evaluation.items import shown_text
from infopo.evaluation.results import (
    ITEMS,
    SCHEMA_VERSION,
    Evaluation,
    Response,
    default_folder,
    folder_of_run,
    gold_text,
    read_evaluation,
    read_items,
)
from infopo.runs import EVALUATION, GENERATIONS, holds_run_files, read_object, read_records, runs_beneath

SCORES = ("score", "correct", "is_correct", "passed", "is_solved", "exact_match", "acc", "accuracy", "reward")
"""Columns that may hold the score of a row, if it does not name its `metrics`."""

_RIGHT = ("true", "yes", "t", "y", "pass", "passed", "correct", "right")
_WRONG = ("false", "no", "f", "n", "fail", "failed", "incorrect", "wrong")
"""Scores as people write them into tables, in lower case."""

RESULT_IDS = (*IDS, "doc_id")

_NO_FILTER = "none"
"""The harness's name for the response as it is. A rule of it has the metric's name alone."""

GENERATED = "generations"
"""Name under which marks of a run's last samples are compared, if the run was not evaluated."""

ABOUT = ("prompting", "num_fewshot", "law", "samples")
"""Settings of a task that are named if they differ between two evaluations."""


@dataclass(frozen=True)
class Scored:
    """Scores of one model on one task by one rule.

    Attributes:
        rule: Name of the rule.
        scores: Score of each sample, by item.
        prompts: What was asked, by item. Empty if it is not known.
        about: Settings that are named if they differ, and the hash of the data under `data`.
        rules: Names of all rules that there are scores of.
        golds: What each item was graded against (`gold_text`), if it is known.
    """

    rule: str
    scores: Mapping[str, Sequence[float]]
    prompts: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    rules: Sequence[str] = ()
    golds: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Contender:
    """One of the things that are compared.

    Attributes:
        name: Name, as the user gave it.
        tasks: Scores by task.
        note: What is compared, if that is not the whole of it.
    """

    name: str
    tasks: Mapping[str, Scored]
    note: str | None = None


Grader = Callable[[Path, str, str | None], Scored]
"""Grades a file of responses by a task: file, task and rule -> scores."""


def read_contender(
    source: str, tasks: Sequence[str] = (), rule: str | None = None, grade: Grader | None = None
) -> Contender:
    """Reads the scores of one contender.

    Args:
        source: A folder of `infopo evaluate`, a run directory, its `eval.json` or `items.jsonl`, a file with a score
            per row, a file of responses, or the name of a model that was evaluated in this folder.
        tasks: Tasks that are compared; all if empty. Responses without scores are graded by them.
        rule: Name of the rule. By default it is the headline of each task.
        grade: Grades files of responses. Without it, they are refused.

    Raises:
        ConfigError: There is nothing to compare.
        DataError: A file is damaged.
    """
    path = Path(source)
    if path.is_dir():
        found = _of_folder(source, path, rule)
    elif path.is_file():
        found = _of_file(source, path, tasks, rule, grade)
    elif default_folder(source).is_dir():
        found = _of_folder(source, default_folder(source), rule)
    else:
        raise ConfigError(
            f"{source}: is no file or folder, and was not evaluated here; run `infopo evaluate {source} --tasks ...`"
        )
    if missing := [name for name in tasks if name not in found.tasks]:
        raise ConfigError(f"{source}: has no task {missing[0]!r}; it has {', '.join(found.tasks) or 'none'}")
    chosen = {name: found.tasks[name] for name in tasks} if tasks else found.tasks
    return Contender(found.name, chosen, found.note)


def _of_folder(source: str, folder: Path, rule: str | None) -> Contender:
    for place in dict.fromkeys((folder, folder_of_run(folder), default_folder(source))):
        record = read_object(place / EVALUATION)
        if record is not None and record.get("schema_version") == SCHEMA_VERSION:
            return _of_evaluation(source, read_evaluation(place), rule)
    records, _ = read_records(folder / GENERATIONS)
    marks = _last_marks(records)
    if not marks.scores and not holds_run_files(folder) and (runs := runs_beneath(folder)):
        raise ConfigError(f"{source}: is no run directory{runs}")
    if not marks.scores:
        raise ConfigError(
            f"{source}: has no evaluation and no marked samples; run "
            f"`infopo evaluate {shlex.quote(source)} --tasks ...` first"
        )
    note = f"{source} was not evaluated: marks of its last samples ({GENERATIONS}) are compared"
    return Contender(source, {GENERATED: marks}, note)


def _last_marks(records: Sequence[Mapping[str, Any]]) -> Scored:
    """Returns the marks of the last samples of a run, of prompts that have a verifier."""
    step = max((record["step"] for record in records), default=0)
    last = [
        (f"{record.get('row_id')}#{record.get('index')}", record)
        for record in records
        if record["step"] == step and isinstance(record.get("mark"), bool)
    ]
    scores = {item: [float(record["mark"])] for item, record in last}
    return Scored(
        "verifier", scores, {item: str(record.get("prompt")) for item, record in last}, {"step": step}
    )


def _of_evaluation(source: str, evaluation: Evaluation, rule: str | None) -> Contender:
    tasks, left_out = {}, []
    for name, record in evaluation.record["tasks"].items():
        rules = list(record["rules"])
        chosen = rule or record["headline"]
        # Figures of a whole task, such as a perplexity, have no marks by item.
        if not chosen or not evaluation.scores(name, chosen):
            left_out.append(f"{name} (rules: {', '.join(rules) or 'none'})")
            continue
        about = {key: record[key] for key in ABOUT if key in record}
        about["data"] = (record.get("data") or {}).get("sha256")
        responses = [each for each in evaluation.responses if each.task == name]
        tasks[name] = replace(_of_responses(responses, chosen, about), rules=rules)
    what = f"marks by rule {rule!r}" if rule else "marks by item"
    if not tasks:
        raise ConfigError(f"{source}: no task has {what}: {'; '.join(left_out) or 'there are no tasks'}")
    return Contender(
        source, tasks, f"{source}: left out without {what}: {'; '.join(left_out)}" if left_out else None
    )


def _of_file(
    source: str, path: Path, tasks: Sequence[str], rule: str | None, grade: Grader | None
) -> Contender:
    if path.name in (EVALUATION, ITEMS) and (path.parent / EVALUATION).is_file():
        record = read_object(path.parent / EVALUATION) or {}
        if record.get("schema_version") == SCHEMA_VERSION:
            return _of_evaluation(source, read_evaluation(path.parent), rule)
    if path.name == EVALUATION:
        raise ConfigError(f"{source}: has totals only, no scores by item; run `infopo evaluate` first")
    if path.name == ITEMS:
        return _of_items(source, path, rule)
    if not str(path).endswith(SUFFIXES):
        raise ConfigError(f"{source}: expected a folder, or a file that ends in {', '.join(SUFFIXES)}")
    rows = _rows(path)
    if (found := _of_scores(rows, tasks, rule)) is not None:
        return Contender(source, found)
    if not any(name in rows[0][1] for name in TEXTS):
        raise ConfigError(
            f"{source}: has neither scores ({', '.join(SCORES)}) nor responses ({', '.join(TEXTS)}); it has "
            f"the columns {', '.join(map(str, rows[0][1]))}"
        )
    if not tasks or grade is None:
        raise ConfigError(f"{source}: has responses without scores; name what grades them with --tasks")
    return Contender(source, {name: grade(path, name, rule) for name in tasks})


def _of_items(source: str, path: Path, rule: str | None) -> Contender:
    """Returns the scores of an `items.jsonl` without its `eval.json`. The first rule of a task is its headline."""
    by_task: dict[str, list[Response]] = {}
    chosen: dict[str, str] = {}
    for each in read_items(path):
        rules = list(each.marks)
        by_task.setdefault(each.task, []).append(each)
        if chosen.setdefault(each.task, rule or rules[0]) not in each.marks:
            raise ConfigError(
                f"--rule: {source} has no rule {chosen[each.task]!r} of {each.task}; it has {', '.join(rules)}"
            )
    return Contender(source, {name: _of_responses(by_task[name], by) for name, by in chosen.items()})


def _of_responses(responses: Sequence[Response], rule: str, about: Mapping[str, Any] | None = None) -> Scored:
    """Returns the scores of marked responses to one task by a rule that they have."""
    scores: dict[str, list[float]] = {}
    for each in responses:
        if rule in each.marks:
            scores.setdefault(each.item, []).append(float(each.marks[rule].correct))
    return Scored(
        rule,
        scores,
        {each.item: each.prompt for each in responses},
        about or {},
        list(responses[0].marks),
        {each.item: each.gold for each in responses if each.gold is not None},
    )


def _rows(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    rows = list(object_rows(path))
    if not rows:
        raise DataError("has no rows", str(path), "no rows")
    return rows


def _of_scores(
    rows: Sequence[tuple[str, Mapping[str, Any]]], tasks: Sequence[str], rule: str | None
) -> dict[str, Scored] | None:
    """Returns the scores of rows that have an id and a score, or None if they do not.

    Files of samples of lm-evaluation-harness are among them: rows name their `metrics`, and there is a row for each
    `filter`, which is taken for a rule of its own.
    """
    first = rows[0][1]
    named = first.get("metrics")
    metrics = [name for name in named if name in first] if isinstance(named, list) else []
    columns = metrics or [name for name in SCORES if name in first]
    ids = next((name for name in (*RESULT_IDS, *PROMPTS) if first.get(name) is not None), None)
    if not columns or ids is None:
        return None
    filters = list(dict.fromkeys(_filter(row) for _, row in rows))
    rules = {
        column if each == _NO_FILTER else f"{column},{each}": (column, each)
        for column in columns
        for each in filters
    }
    chosen = rule or next(iter(rules))
    if chosen not in rules:
        raise ConfigError(f"--rule: there is no rule {chosen!r}; there are {', '.join(rules)}")
    column, wanted = rules[chosen]
    found: dict[str, dict[str, list[float]]] = {}
    prompts: dict[str, dict[str, str]] = {}
    golds: dict[str, dict[str, str]] = {}
    prompt = next((name for name in PROMPTS if first.get(name) is not None), None)
    for row_id, row in rows:
        if _filter(row) != wanted:
            continue
        name = str(row.get("task") or (tasks[0] if len(tasks) == 1 else "results"))
        if row.get(ids) is None:
            raise DataError(f"column {ids!r}: expected the item, got nothing", row_id, "no item")
        item = str(row[ids])
        found.setdefault(name, {}).setdefault(item, []).append(_score(row.get(column), column, row_id))
        if prompt is not None:
            prompts.setdefault(name, {})[item] = shown_text(row[prompt])
        if metrics and row.get("target") is not None:
            golds.setdefault(name, {})[item] = gold_text(str(row["target"]))
    return {
        name: Scored(chosen, scores, prompts.get(name, {}), {}, list(rules), golds.get(name, {}))
        for name, scores in found.items()
    }


def _filter(row: Mapping[str, Any]) -> str:
    """Returns the filter that a row's response went through, as lm-evaluation-harness names it."""
    found = row.get("filter")
    return _NO_FILTER if found is None else str(found)


def _score(value: Any, column: str, row_id: str) -> float:
    if isinstance(value, str) and (word := value.strip().lower()) in (*_RIGHT, *_WRONG):
        return float(word in _RIGHT)
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = float("nan")
    if not math.isfinite(score):
        raise DataError(
            f"column {column!r}: expected a score, got {value!r:.60}; scores are finite numbers, or true and "
            "false, yes and no, pass and fail, correct and incorrect",
            row_id,
            "no score",
        )
    return score
