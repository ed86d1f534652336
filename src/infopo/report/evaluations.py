"""What runs were evaluated on: a table of tasks, each run compared with the first in pairs, and items side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from infopo.errors import InfoPOError
from infopo.evaluation.comparison import Row, comparisons, left_out, sentence
from infopo.evaluation.contenders import Contender, read_contender
from infopo.evaluation.results import SCHEMA_VERSION, Evaluation, Response, folder_of_run, read_evaluation
from infopo.report.numbers import Estimate
from infopo.report.reading import ReportRun, is_number
from infopo.runs import EVALUATION, read_object

ITEMS_SHOWN = 5
"""Number of items shown in full that one run gets right and the other does not, for each side."""

LONGEST_TEXT = 1500
"""Characters of a prompt or response that are shown."""


@dataclass(frozen=True)
class Differing:
    """An item that one of two runs gets right and the other does not.

    Attributes:
        task: Name of the task.
        item: Its id.
        prompt: What was asked.
        first_name: Name of the first run.
        first: Response of the first run.
        other_name: Name of the other run.
        other: Response of the other run.
        first_is_right: Whether the first run is the one that is right.
    """

    task: str
    item: str
    prompt: str
    first_name: str
    first: str
    other_name: str
    other: str
    first_is_right: bool


@dataclass(frozen=True)
class Evaluations:
    """The evaluations of the runs of a report.

    Attributes:
        rows: Task, rule, and the figure of each run, None if it has none. The headline of a task stands first.
        comparisons: A sentence for each task and run but the first.
        differing: Items on which two runs differ.
        notes: What could not be read or compared.
    """

    rows: list[tuple[str, str, list[Estimate | None]]]
    comparisons: list[str]
    differing: list[Differing]
    notes: list[str]


def evaluations(runs: Sequence[ReportRun]) -> Evaluations:
    """Returns what `infopo evaluate` has found of the runs, or else the last evaluation of their training."""
    notes: list[str] = []
    found = [_read(run, notes) for run in runs]
    rows = []
    for task, rule in dict.fromkeys(pair for each in found if each for pair in _rules(each)):
        rows.append((task, rule, [_estimate(each, task, rule) if each else None for each in found]))
    paired = _paired(runs, found, notes)
    said = []
    for row in paired:
        said.append(sentence(row, row.first))
        notes += [note for note in (*left_out(row, row.first), *row.notes) if note not in notes]
    by_name = {run.name: each for run, each in zip(runs, found, strict=True) if each}
    return Evaluations(rows, said, [item for row in paired for item in _differing(row, by_name)], notes)


def _read(run: ReportRun, notes: list[str]) -> Evaluation | None:
    folder = folder_of_run(run.run.directory)
    try:
        record = read_object(folder / EVALUATION)
        if record is None or record.get("schema_version") != SCHEMA_VERSION:
            return None
        return read_evaluation(folder)
    except InfoPOError as error:
        notes.append(str(error))
        return None


def _rules(evaluation: Evaluation) -> list[tuple[str, str]]:
    found = []
    for task, record in evaluation.record["tasks"].items():
        headline = record.get("headline")
        found += [(task, rule) for rule in sorted(record["rules"], key=lambda rule: rule != headline)]
    return found


def _estimate(evaluation: Evaluation, task: str, rule: str) -> Estimate | None:
    figures: dict[str, Any] = evaluation.record["tasks"].get(task, {}).get("rules", {}).get(rule) or {}
    value, ends = figures.get("accuracy"), figures.get("ci95")
    source = f"{evaluation.folder.name}/{EVALUATION}: {task}, {rule}"
    if not is_number(value):
        return None
    if isinstance(ends, list) and len(ends) == 2 and all(map(is_number, ends)):
        return Estimate(value, ends[0], ends[1], source, figures.get("n"))
    return Estimate(value, source=source)


def _paired(runs: Sequence[ReportRun], found: Sequence[Evaluation | None], notes: list[str]) -> list[Row]:
    """Returns the comparisons of each run that was evaluated with the first of them."""
    contenders: list[Contender] = []
    for run, evaluation in zip(runs, found, strict=True):
        if evaluation is None:
            continue
        try:
            one = read_contender(str(run.run.directory))
            contender = Contender(run.name, one.tasks, one.note)
            if contenders:
                comparisons([contenders[0], contender])  # whether they can be compared at all
            contenders.append(contender)
        except InfoPOError as error:
            notes.append(f"{run.name} is not compared: {error}")
    return comparisons(contenders) if len(contenders) > 1 else []


def _differing(row: Row, evaluations: dict[str, Evaluation]) -> list[Differing]:
    first, other = (_by_item(evaluations[name], row.task) for name in (row.first, row.other))
    found = []
    for items, is_right in ((row.wins, True), (row.losses, False)):
        for item in items[:ITEMS_SHOWN]:
            a, b = first[item], other[item]
            prompt, mine, theirs = map(_clipped, (a.prompt, a.response, b.response))
            found.append(
                Differing(row.task, item, prompt, row.first, mine, row.other, theirs, first_is_right=is_right)
            )
    return found


def _by_item(evaluation: Evaluation, task: str) -> dict[str, Response]:
    return {each.item: each for each in reversed(evaluation.responses) if each.task == task}


def _clipped(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} …"
