"""A report as one plain tree, which knows no format: what `page.py` and `plain.py` write."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infopo.report import comparing
from infopo.report.completions import Completions, completions
from infopo.report.evaluations import Evaluations, evaluations
from infopo.report.headline import Headline, headline, progress
from infopo.report.numbers import number
from infopo.report.panels import Plot, read_plots
from infopo.report.reading import ReportRun, is_number, read_runs


@dataclass(frozen=True)
class Summary:
    """A run in a few words.

    Attributes:
        name: Its name in the report.
        directory: Path of the run directory as it was given.
        method: Objective and its parameters, or "".
        model: Name of the starting model, or "".
        data: Source and rows of the training data, or "".
        progress: State and step, e.g. `finished, step 60`.
        state: "finished", "running" or "stopped".
        verdicts: Verdicts that fired, most important first.
        unchecked: Names and reasons of verdicts that could not be checked.
        has_verdicts: Whether `verdicts.json` is there.
        data_facts: Facts of the training data in words, with their values.
        rows: What happened to the rows of each source.
        reproduce: Commands that run it again.
        notes: Sentences on what is missing or was left out.
    """

    name: str
    directory: str
    method: str
    model: str
    data: str
    progress: str
    state: str
    verdicts: list[dict[str, Any]]
    unchecked: list[tuple[str, str]]
    has_verdicts: bool
    data_facts: list[tuple[str, str]]
    rows: list[tuple[str, str]]
    reproduce: list[str]
    notes: list[str]


@dataclass(frozen=True)
class Report:
    """Everything that a report says.

    Attributes:
        created: UTC time of writing, ISO 8601.
        runs: The runs in the order given.
        headline: The table on top.
        evaluations: What `infopo evaluate` has found.
        plots: Panels with their curves.
        left_out: Titles of the panels that no run has data for.
        completions: Answers side by side.
        settings: Resolved recipes.
        environment: Versions and hardware.
    """

    created: str
    runs: list[Summary]
    headline: Headline
    evaluations: Evaluations
    plots: list[Plot]
    left_out: list[str]
    completions: Completions
    settings: comparing.Comparison
    environment: comparing.Comparison

    @property
    def is_running(self) -> bool:
        """Whether a run of the report is not over."""
        return any(run.state == "running" for run in self.runs)


def read_report(directories: Sequence[str | Path]) -> Report:
    """Returns the report of some run directories.

    Raises:
        ConfigError: A directory is given twice.
        RunDirectoryError: A directory has nothing of a run, or a file in it is damaged.
    """
    runs = read_runs(directories)
    settings = [comparing.settings_of(run) for run in runs]
    plots, left_out = read_plots(runs)
    return Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        runs=[_summary(run, tree) for run, tree in zip(runs, settings, strict=True)],
        headline=headline(runs),
        evaluations=evaluations(runs),
        plots=plots,
        left_out=left_out,
        completions=completions(runs),
        settings=comparing.compare(settings),
        environment=comparing.compare([comparing.environment_of(run) for run in runs]),
    )


def _summary(run: ReportRun, settings: dict[str, str]) -> Summary:
    verdicts = run.verdicts or {}
    return Summary(
        name=run.name,
        directory=str(run.run.directory),
        method=comparing.method_of(run),
        model=comparing.model_of(run),
        data=comparing.data_of(run),
        progress=progress(run, settings),
        state=run.state,
        verdicts=_objects(verdicts.get("verdicts")),
        unchecked=[
            (str(v.get("name")), str(v["not_checked"]))
            for v in _objects(verdicts.get("checked"))
            if v.get("not_checked")
        ],
        has_verdicts=run.verdicts is not None,
        data_facts=_data_facts(run.data or {}),
        rows=comparing.row_counts(run),
        reproduce=comparing.reproduce(run),
        notes=list(run.notes),
    )


def _objects(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def verdict_size(verdict: dict[str, Any]) -> str:
    """Returns effect, interval and unit of a verdict, e.g. `−0.51 [−0.60, −0.42] nats`, or ""."""
    if not is_number(verdict.get("effect")):
        return ""
    text = f"{number(verdict['effect'])}{_interval(verdict.get('interval'))}"
    return f"{text} {verdict.get('unit') or ''}".strip()


def _interval(ends: Any) -> str:
    """Returns the two ends of an interval in brackets, behind a space, or "" if they are not known."""
    if isinstance(ends, list) and len(ends) == 2 and all(map(is_number, ends)):
        return f" [{number(ends[0])}, {number(ends[1])}]"
    return ""


def _data_facts(data: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns what `data.json` says, in words."""
    facts = []
    if is_number(data.get("pairs")):
        facts.append(("pairs", number(data["pairs"])))
    length = data.get("length")
    if isinstance(length, dict):
        facts += [
            (f"mean length of {side} responses, tokens", number(length[f"{side}_mean"]))
            for side in ("chosen", "rejected")
            if is_number(length.get(f"{side}_mean"))
        ]
        if is_number(d := length.get("cohens_d")):
            interval = _interval(length.get("cohens_d_ci95"))
            facts.append(("chosen longer than rejected, Cohen's d", f"{number(d, sign=True)}{interval}"))
    for key, words in (
        ("near_duplicates", "pairs with nearly equal sides"),
        ("conflicts", "rows that contradict others"),
    ):
        if isinstance(found := data.get(key), dict) and is_number(found.get("count")):
            facts.append((words, _count(found)))
    prefers = data.get("reference_prefers_rejected")
    if isinstance(prefers, dict) and is_number(prefers.get("share")):
        n = f" of {number(prefers['n'])}" if is_number(prefers.get("n")) else ""
        facts.append(
            ("pairs whose rejected response the reference finds likelier", f"{prefers['share']:.1%}{n}")
        )
    return facts


def _count(found: dict[str, Any]) -> str:
    share = f" ({found['share']:.1%})" if is_number(found.get("share")) else ""
    rows = found.get("rows")
    named = ", ".join(map(str, rows[:10])) if isinstance(rows, list) and rows else ""
    return f"{number(found['count'])}{share}{f': {named}' if named else ''}"


def in_words(plot: Plot, names: Sequence[str]) -> str:
    """Returns where the curves of a panel end, in a sentence, for those who cannot see them."""
    parts = []
    for index, line in enumerate(plot.panel.lines):
        series = sorted((s for s in plot.series if s.line == index), key=lambda s: s.last)
        if not series:
            continue
        if len(series) <= 4:
            ends = ", ".join(
                f"{number(s.last)} ({names[s.run]})" for s in sorted(series, key=lambda s: s.run)
            )
        else:
            least, most = series[0], series[-1]
            ends = (
                f"from {number(least.last)} ({names[least.run]}) to {number(most.last)} ({names[most.run]})"
            )
        parts.append(f"{line.label}: {ends}" if len(plot.panel.lines) > 1 else ends)
    return f"Last values: {'; '.join(parts)}."
