"""`infopo compare` compares models on the items that both answered, and says what so many items could have shown."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from infopo.errors import ConfigError, DataError
from infopo.evaluation.contenders import Contender, Scored, read_contender
from infopo.output import say, shown
from infopo.paired import ALPHA, Paired, compare_scores, holm
from infopo.runs import to_json, write_text_atomic
from infopo.workflows.report import check_output

FORMATS = ("markdown", "json")

SHOWN_ITEMS = 5
"""Number of won and of lost items that are listed."""


@dataclass(frozen=True)
class Row:
    """The comparison of one model with the first on one task.

    Attributes:
        first: Name of the first one.
        other: Name of the other.
        task: Name of the task.
        rule: Rule that scores are by.
        found: What the comparison found, as differences of the first minus the other.
        p_holm: p-value, adjusted for the number of comparisons in the table.
        wins: Items on which the first has the higher score.
        losses: Items on which the other has it.
        only_first: Number of items that only the first has.
        only_other: Number of items that only the other has.
        notes: What else differs, a sentence each.
    """

    first: str
    other: str
    task: str
    rule: str
    found: Paired
    p_holm: float
    wins: Sequence[str]
    losses: Sequence[str]
    only_first: int
    only_other: int
    notes: Sequence[str]


def compare(
    sources: Sequence[str],
    tasks: Sequence[str] = (),
    *,
    data: Mapping[str, str] | None = None,
    rule: str | None = None,
    seed: int = 0,
    format: str = "markdown",
    output: str | Path | None = None,
    items: int = SHOWN_ITEMS,
) -> list[Row]:
    """Compares each source with the first, task by task, and prints or writes the result.

    Args:
        sources: Two or more of what `read_contender` reads.
        tasks: Tasks that are compared. By default all that the first and the other have.
        data: Data of tasks that grade files of responses, by name.
        rule: Rule that scores are by, instead of each task's headline.
        seed: Seed of bootstrap and sign flips.
        format: "markdown" or "json".
        output: A file, or None for the terminal.
        items: Number of won and of lost items that Markdown lists. JSON has all.

    Raises:
        ConfigError: There is nothing to compare, or two evaluations asked different questions under one name.
        DataError: A file is damaged.
    """
    if len(sources) < 2:
        raise ConfigError("expected two or more to compare, got one")
    if format not in FORMATS:
        raise ConfigError(f"--format: expected {' or '.join(FORMATS)}, got {format!r}")
    if output is not None:
        check_output(Path(output))
    contenders = [read_contender(source, tasks, data, rule) for source in sources]
    rows = comparisons(contenders, seed)
    notes = [each.note for each in contenders if each.note]
    text = as_json(rows, notes) if format == "json" else "\n".join([*as_markdown(rows, notes, items), ""])
    if output is None:
        sys.stdout.write(shown(text))
    else:
        write_text_atomic(output, shown(text))
        say(f"written: {output}")
    return rows


def comparisons(contenders: Sequence[Contender], seed: int = 0) -> list[Row]:
    """Returns a row per task and contender but for the first, with p-values adjusted over all of them."""
    first, *others = contenders
    rows = []
    for other in others:
        shared = [name for name in first.tasks if name in other.tasks]
        if not shared:
            raise ConfigError(
                f"{first.name} and {other.name} have no task in common: {', '.join(first.tasks)} against "
                f"{', '.join(other.tasks)}; a file without task names is taken for that of --tasks"
            )
        rows += [_row(first, other, name, seed) for name in shared]
    adjusted = holm([row.found.p for row in rows])
    return [replace(row, p_holm=p) for row, p in zip(rows, adjusted, strict=True)]


def _row(first: Contender, other: Contender, task: str, seed: int) -> Row:
    a, b = first.tasks[task], other.tasks[task]
    if a.rule != b.rule:
        common = [rule for rule in a.rules if rule in b.rules]
        advice = f"name one that both have: --rule {common[0]}" if common else "they have no rule in common"
        raise ConfigError(
            f"{task}: {first.name} is marked by {a.rule!r} and {other.name} by {b.rule!r}; {advice}"
        )
    _refuse_other_questions(first, other, task)
    found = compare_scores(a.scores, b.scores, seed)
    shared = [item for item in a.scores if item in b.scores]
    if not shared:
        raise DataError(
            f"has no item of {task} in common with {first.name}, e.g. {next(iter(b.scores), '')!r:.60} against "
            f"{next(iter(a.scores), '')!r:.60}",
            other.name,
            "no items in common",
        )
    mean = {item: (_mean(a.scores[item]), _mean(b.scores[item])) for item in shared}
    return Row(
        first.name,
        other.name,
        task,
        a.rule,
        found,
        p_holm=found.p,
        wins=[item for item in shared if mean[item][0] > mean[item][1]],
        losses=[item for item in shared if mean[item][0] < mean[item][1]],
        only_first=len(a.scores) - len(shared),
        only_other=len(b.scores) - len(shared),
        notes=_differences(task, a, b),
    )


def _refuse_other_questions(first: Contender, other: Contender, task: str) -> None:
    """Refuses items of one name that are other questions. Those of the same data are the same, however they are put."""
    if is_same_data(first.tasks[task], other.tasks[task]):
        return
    a, b = first.tasks[task].prompts, other.tasks[task].prompts
    differing = _put_otherwise(a, b)
    if differing:
        raise DataError(
            f"{len(differing)} items of {task} ask something else than in {first.name}, e.g. {differing[0]}: "
            f"{b[differing[0]]!r:.60} against {a[differing[0]]!r:.60}; evaluate both on the same data with "
            "the same prompting",
            other.name,
            "other questions",
        )


def is_same_data(a: Scored, b: Scored) -> bool:
    """Whether two evaluations are known to be of the same data."""
    return a.about.get("data") is not None and a.about.get("data") == b.about.get("data")


def _put_otherwise(a: Mapping[str, str], b: Mapping[str, str]) -> list[str]:
    return [item for item in a if item in b and " ".join(a[item].split()) != " ".join(b[item].split())]


def _differences(task: str, a: Scored, b: Scored) -> list[str]:
    """Returns a sentence for each setting in which two evaluations of a task differ."""
    notes = []
    if differing := _put_otherwise(a.prompts, b.prompts):
        notes.append(
            f"{task}: {len(differing)} items are put in other words (chat template, worked examples)"
        )
    for key in dict.fromkeys([*a.about, *b.about]):
        mine, theirs = a.about.get(key), b.about.get(key)
        if mine is None or theirs is None or mine == theirs:
            continue
        if key == "data":
            notes.append(
                f"{task}: the data differ in part (another file, answer or limit); items that both have ask the same"
            )
        elif isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            parts = [
                f"{name} {mine.get(name)} against {theirs.get(name)}"
                for name in mine
                if mine.get(name) != theirs.get(name)
            ]
            notes.append(f"{task}: sampling differs: {', '.join(parts)}")
        else:
            notes.append(f"{task}: {key} differs: {mine} against {theirs}")
    return notes


def as_markdown(rows: Sequence[Row], notes: Sequence[str] = (), items: int = SHOWN_ITEMS) -> list[str]:
    """Returns a table, a sentence per row, what else differs, and some items, as lines of Markdown."""
    first = rows[0].first
    lines = [
        f"A: {first}; each B is compared with it on the items that both answered. A difference is A − B with its 95 % "
        "interval.",
        "",
        "| task | B | n | A | B | difference [95 %] | p | wins / losses of A | smallest difference shown |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        f = row.found
        smallest = "none" if f.smallest is None else f"{f.smallest:.3f}"
        lines.append(
            f"| {_cell(row.task)} ({_cell(row.rule)}) | {_cell(row.other)} | {f.n} | {f.mean_a:.3f} | {f.mean_b:.3f} "
            f"| {f.difference:+.3f} [{f.ci95[0]:+.3f}, {f.ci95[1]:+.3f}] | {_p(row.p_holm)} | {f.wins} / {f.losses} "
            f"| {smallest} |"
        )
    if len(rows) > 1:
        lines += ["", f"p-values are adjusted for {len(rows)} comparisons (Holm)."]
    lines += ["", *(f"- {sentence(row)}" for row in rows)]
    said = [*notes, *dict.fromkeys(note for row in rows for note in [*_left_out(row), *row.notes])]
    lines += ["", *(f"- {note}" for note in said)] if said else []
    for row in rows:
        lines += _listed(row, items)
    return lines


def sentence(row: Row) -> str:
    """Returns what a comparison says, in words."""
    f = row.found
    what = "samples are right" if f.samples > 1 else "items are right"
    if f.test == "mcnemar" or (0 <= f.mean_a <= 1 and 0 <= f.mean_b <= 1):
        means = f"{f.mean_a:.1%} of {what} with A, {f.mean_b:.1%} with {row.other}"
    else:
        means = f"the mean score is {f.mean_a:.3f} with A, {f.mean_b:.3f} with {row.other}"
    if row.p_holm <= ALPHA:
        better = "A is better" if f.difference > 0 else f"{row.other} is better"
        verdict = f"{better} (p = {_p(row.p_holm)})"
    else:
        verdict = f"the difference may be chance (p = {_p(row.p_holm)})"
    if f.smallest is None:
        power = f"{f.n} items are too few to show any difference" if f.n < 6 else "no item tells them apart"
    else:
        power = f"{f.n} items show a difference of {f.smallest:.3f} or more in 80 % of cases"
    return (
        f"{row.task}: {means}; {verdict}. A wins {f.wins} items, loses {f.losses} and ties {f.ties}; {power}."
    )


def as_json(rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
    """Returns all numbers and items as JSON, with a `schema_version`."""
    tree: dict[str, Any] = {
        "schema_version": 1,
        "notes": list(notes),
        "comparisons": [asdict(row) for row in rows],
    }
    return f"{to_json(tree, indent=2)}\n"


def _left_out(row: Row) -> list[str]:
    parts = []
    if row.only_first:
        parts.append(f"{row.only_first} items only A has")
    if row.only_other:
        parts.append(f"{row.only_other} items only {row.other} has")
    return [f"{row.task}: {' and '.join(parts)}; they are left out"] if parts else []


def _listed(row: Row, count: int) -> list[str]:
    lines = []
    for title, found in (("A wins", row.wins), (f"{row.other} wins", row.losses)):
        if found and count > 0:
            more = f" and {len(found) - count} more" if len(found) > count else ""
            lines.append(f"- {row.task}, {title}: {', '.join(map(_cell, found[:count]))}{more}")
    return ["", *lines] if lines else []


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}" if value > 0 else "0"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _mean(scores: Sequence[float]) -> float:
    return math.fsum(scores) / len(scores)
