"""The headline table: what each run came to, with intervals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from infopo.intervals import Z_95
from infopo.report.numbers import Estimate, number, proportion
from infopo.report.reading import ReportRun, is_number
from infopo.runs import EVALUATION, Record

Finder = Callable[[ReportRun], Estimate | None]


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        title: Heading.
        unit: Unit and what is averaged.
        finders: Places of the value in the order of preference.
        sign: Whether a plus sign is written.
    """

    title: str
    unit: str
    finders: tuple[Finder, ...]
    sign: bool = False

    def estimate(self, run: ReportRun) -> Estimate | None:
        """Returns the first value that the run has, or None."""
        return next((found for find in self.finders if (found := find(run)) is not None), None)


def metric(run: ReportRun, *, name: str) -> Estimate | None:
    """Returns the last value of a metric, with the interval that stands beside it."""
    for record in reversed(run.having(name)):
        if is_number(record[name]):
            return _with_interval(record, name, f"{run.source}, step {record['step']}: {name}")
    return None


def metric_at_start(run: ReportRun, *, name: str) -> Estimate | None:
    """Returns the value of a metric before the first update, or None if it was not measured then."""
    record = next((record for record in run.having(name) if record["step"] == 0), None)
    return (
        Estimate(record[name], source=f"{run.source}, step 0: {name}")
        if record and is_number(record[name])
        else None
    )


def _evaluation(run: ReportRun, *, name: str) -> Estimate | None:
    """Returns a value of `eval.json`, with the interval that stands beside it."""
    record = run.run.evaluation or {}
    return _with_interval(record, name, f"{EVALUATION}: {name}") if is_number(record.get(name)) else None


def _with_interval(record: Record, name: str, source: str) -> Estimate:
    """Returns a value with its interval, given as two ends, as half a width, or as a standard error."""
    value = record[name]
    ends = record.get(f"{name}_ci95")
    if isinstance(ends, list) and len(ends) == 2 and all(map(is_number, ends)):
        return Estimate(value, ends[0], ends[1], source)
    errors = (record.get(f"{name}_se"), record.get(f"{name.removesuffix('_from_reference')}_standard_error"))
    half = next((Z_95 * error for error in errors if is_number(error)), ends if is_number(ends) else None)
    return (
        Estimate(value, value - half, value + half, source)
        if half is not None
        else Estimate(value, source=source)
    )


def _probe_share(run: ReportRun, *, name: str, of: str) -> Estimate | None:
    """Returns a share of the probe set, whose denominator stands in the same record under the name `of`."""
    for record in reversed(run.having(name)):
        if is_number(record[name]):
            n = record.get(of)
            n = int(n) if is_number(n) and n > 0 else None
            return proportion(record, name, n, f"{run.source}, step {record['step']}: {name}")
    return None


def _evaluation_share(run: ReportRun, *, name: str) -> Estimate | None:
    """Returns a share of the evaluation's pairs, whose number follows from its time and its speed."""
    record = run.run.evaluation or {}
    seconds, rate = record.get("eval_runtime"), record.get("eval_samples_per_second")
    n = None
    # Both are rounded, to 4 and to 3 digits. The number of pairs is known if no other whole number is as near.
    if is_number(seconds) and is_number(rate) and 5e-5 * rate + 5e-4 * seconds < 0.5:
        n = round(seconds * rate)
    return proportion(record, name, n, f"{EVALUATION}: {name}")


def _marks(run: ReportRun) -> Estimate | None:
    """Returns the share of the last step's sampled responses that a verifier calls right."""
    marked = [record for record in run.generations if isinstance(record.get("mark"), bool)]
    step = max((record["step"] for record in marked), default=None)
    marks = [record["mark"] for record in marked if record["step"] == step]
    if not marks:
        return None
    share = {"right": sum(marks) / len(marks)}
    return proportion(share, "right", len(marks), f"generations.jsonl, step {step}")


def _last(*names: str) -> tuple[Finder, ...]:
    return tuple(partial(metric, name=name) for name in names)


def _evaluated(*names: str) -> tuple[Finder, ...]:
    return tuple(partial(_evaluation, name=name) for name in names)


def _shares(probe: str, of: str, *evaluated: str) -> tuple[Finder, ...]:
    of_evaluation = (partial(_evaluation_share, name=name) for name in evaluated)
    return (partial(_probe_share, name=probe, of=of), *of_evaluation)


_CHOSEN = (*_last("probe/change/chosen"), *_evaluated("chosen_logp_change", "eval_logratios/chosen"))
_REJECTED = (*_last("probe/change/rejected"), *_evaluated("rejected_logp_change", "eval_logratios/rejected"))

COLUMNS: tuple[Column, ...] = (
    Column("Accuracy", "share of held-out tasks", _evaluated("accuracy")),
    Column("Samples right", "share of sampled responses", (_marks,)),
    Column(
        "Chosen", "change of log-prob, nats per response", (*_CHOSEN, *_last("logratios/chosen")), sign=True
    ),
    Column(
        "Rejected",
        "change of log-prob, nats per response",
        (*_REJECTED, *_last("logratios/rejected")),
        sign=True,
    ),
    Column("Chosen that fell", "share of chosen responses", _shares("probe/chosen_fell", "probe/n_chosen")),
    Column("Margin", "nats per pair", _last("probe/margin"), sign=True),
    Column(
        "Reward accuracy",
        "share of pairs",
        _shares("probe/accuracy", "probe/n_pairs", "eval_rewards/accuracies"),
    ),
    Column(
        "Ranking accuracy",
        "share of pairs, no reference",
        _shares("probe/ranking_accuracy", "probe/n_pairs", "eval_logps/accuracies"),
    ),
    Column("Forward KL", "nats per response", _last("kl/forward")),
    Column("Reverse KL", "nats per response", (*_last("kl/reverse"), *_evaluated("kl_from_reference"))),
    Column("Length", "tokens per sampled response", _last("length/sampled")),
    Column("Loss", "evaluation", (*_evaluated("eval_loss"), *_last("eval_loss"))),
    Column("Training time", "seconds", (*_last("train_runtime"), *_evaluated("seconds"))),
)
"""All columns. One that no run has a value for is left out."""


def column(title: str) -> Column:
    """Returns the column with this heading."""
    return next(each for each in COLUMNS if each.title == title)


@dataclass(frozen=True)
class Headline:
    """The table: columns that some run has a value for, and a row of estimates per run."""

    columns: list[Column]
    rows: list[list[Estimate | None]]


def headline(runs: Sequence[ReportRun]) -> Headline:
    """Returns the headline table of some runs."""
    columns = [column for column in COLUMNS if any(column.estimate(run) for run in runs)]
    return Headline(columns, [[column.estimate(run) for column in columns] for run in runs])


def progress(run: ReportRun, settings: Mapping[str, str]) -> str:
    """Returns how far a run came, e.g. `running, step 40 of 100`."""
    total = settings.get("train.max_steps", "")
    of = f" of {total}" if total.isdecimal() and int(total) >= run.step > 0 else ""
    return f"{run.state}, step {number(run.step)}{of}"
