"""Comparisons of contenders, task by task: what is paired, what is refused, what is said. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from infopo.errors import ConfigError, DataError
from infopo.evaluation.contenders import Contender, Scored
from infopo.output import counted
from infopo.paired import ALPHA, Paired, compare_scores, holm, mean_score


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
    shared = [item for item in a.scores if item in b.scores]
    if not shared:
        raise DataError(
            f"has no item of {task} in common with {first.name}, e.g. {next(iter(b.scores), '')!r:.60} against "
            f"{next(iter(a.scores), '')!r:.60}",
            other.name,
            "no items in common",
        )
    notes = _differences(task, a, b)
    if otherwise := _graded_otherwise(a, b, shared):
        example = f"{otherwise[0]}: {a.golds[otherwise[0]]:.60} against {b.golds[otherwise[0]]:.60}"
        if len(otherwise) == len(shared):
            raise DataError(
                f"all {len(shared)} items of {task} that {first.name} has too were graded against other answers, e.g. "
                f"{example}; grade both against the same data",
                other.name,
                "other answers",
            )
        notes.append(
            f"{task}: {len(otherwise)} items were graded against other answers, e.g. {example}; they are left out"
        )
        a, b = _without(a, otherwise), _without(b, otherwise)
        shared = [item for item in a.scores if item in b.scores]
    found = compare_scores(a.scores, b.scores, seed)
    mean = {item: (mean_score(a.scores[item]), mean_score(b.scores[item])) for item in shared}
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
        notes=notes,
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


def _graded_otherwise(a: Scored, b: Scored, shared: Sequence[str]) -> list[str]:
    """Returns the items that are known to have been graded against different answers."""
    return [item for item in shared if item in a.golds and item in b.golds and a.golds[item] != b.golds[item]]


def _without(scored: Scored, items: Sequence[str]) -> Scored:
    left_out = set(items)
    return replace(
        scored, scores={item: each for item, each in scored.scores.items() if item not in left_out}
    )


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
            # Otherwise each item was compared by itself, and other items that only one has, as of a limit, are counted.
            if unknown := [
                item for item in a.scores if item in b.scores and not (item in a.golds and item in b.golds)
            ]:
                notes.append(
                    f"{task}: the data differ (another file, other answers or a limit). Items that both have ask the "
                    f"same, but what {len(unknown)} of them were graded against is not known, because an older version "
                    "wrote the file"
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


def sentence(row: Row, first: str = "A") -> str:
    """Returns what a comparison says, in words.

    Args:
        row: The comparison.
        first: What the first one is called.
    """
    f = row.found
    what = "samples are right" if f.samples > 1 else "items are right"
    if 0 <= f.mean_a <= 1 and 0 <= f.mean_b <= 1:
        means = f"{f.mean_a:.1%} of {what} with {first}, {f.mean_b:.1%} with {row.other}"
    else:
        means = f"the mean score is {f.mean_a:.3f} with {first}, {f.mean_b:.3f} with {row.other}"
    if row.p_holm <= ALPHA:
        verdict = f"{first if f.difference > 0 else row.other} is better (p = {p_text(row.p_holm)})"
    else:
        verdict = f"the difference may be chance (p = {p_text(row.p_holm)})"
    wins = f"{first} wins {counted(f.wins, 'item')}, loses {f.losses} and ties {f.ties}"
    return f"{row.task}: {means}; {verdict}. {wins}{_power(f)}."


def _power(found: Paired) -> str:
    """Returns what so many items could have shown, as a clause, or nothing if equal differences do not tell."""
    if found.smallest is not None:
        return f"; {found.n} items show a difference of {found.smallest:.3f} or more in 80 % of cases"
    if found.n < 6:
        return f"; {found.n} items are too few to show any difference"
    return "" if found.wins or found.losses else "; no item tells them apart"


def left_out(row: Row, first: str = "A") -> list[str]:
    """Returns a sentence on the items that only one of the two has, if there are any."""
    parts = []
    if row.only_first:
        parts.append(f"{counted(row.only_first, 'item')} only {first} has")
    if row.only_other:
        parts.append(f"{counted(row.only_other, 'item')} only {row.other} has")
    return [f"{row.task}: {' and '.join(parts)}; they are left out"] if parts else []


def p_text(value: float) -> str:
    """Returns a p-value with three decimals, or its order of magnitude if it is small.

    Example:
        >>> p_text(0.0123), p_text(4e-7)
        ('0.012', '4e-07')
    """
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}" if value > 0 else "0"
