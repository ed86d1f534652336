"""The end of a run in a terminal: what changed, the verdicts, where things are, and what to do next.

Its figures are those of the report's headline, read from the same files.
"""

import contextlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from infopo.errors import InfoPOError
from infopo.evaluation.results import TaskFigure, folder_of_run, task_figures
from infopo.preflight import is_installed
from infopo.report.comparing import flat, model_of, recipe_tree
from infopo.report.headline import Column, column, metric, metric_at_start
from infopo.report.numbers import Estimate
from infopo.report.reading import ReportRun, is_number, read_runs
from infopo.run_state import MODELS, checkpoints_in
from infopo.runs import EVALUATION, METRICS, RECIPE, RunDirectoryError, read_object
from infopo.settings import EvaluateSettings
from infopo.verdicts import VERDICTS, Verdict, in_words, verdicts_in


@dataclass(frozen=True)
class Change:
    """A quantity before and after training.

    Attributes:
        title: What it is.
        unit: Its unit and what it is averaged over.
        before: Its value before the first update, or None.
        after: Its last value, or None.
        change: Its change with its interval, or None if only the values themselves are known.
        signed: Whether a plus sign is written.
    """

    title: str
    unit: str
    before: Estimate | None
    after: Estimate | None
    change: Estimate | None = None
    signed: bool = False

    @property
    def is_measured(self) -> bool:
        """Whether anything is known of it."""
        return self.after is not None or self.change is not None


def changes(run: ReportRun) -> list[Change]:
    """Returns what training did to the policy: likelihood of both sides, margin, accuracies, drift.

    Every value is that of the report's headline, or of the same metric at step 0.
    """
    found = []
    for side in ("Chosen", "Rejected"):
        name = f"probe/logps/{side.lower()}"
        found.append(
            Change(
                f"{side.lower()} log-prob",
                "nats per response",
                metric_at_start(run, name=name),
                metric(run, name=name),
                column(side).estimate(run),
                signed=True,
            )
        )
    for title, name in (
        ("Margin", "probe/margin"),
        ("Reward accuracy", "probe/accuracy"),
        ("Ranking accuracy", "probe/ranking_accuracy"),
        ("Forward KL", "kl/forward"),
    ):
        found.append(_of_column(run, column(title), name))
    return [_without_start(each) for each in found] if run.step else found


def _without_start(row: Change) -> Change:
    """Returns a row that is not measured if its last value is the one before training, as in a killed run."""
    last = row.after or row.change
    is_start = last is not None and ", step 0: " in last.source
    return replace(row, after=None, change=None) if is_start else row


def _of_column(run: ReportRun, of: Column, name: str) -> Change:
    after = of.estimate(run)
    is_same = after is not None and after.source.endswith(f": {name}")
    before = metric_at_start(run, name=name) if is_same else None
    title = of.title[0].lower() + of.title[1:]
    return Change(title, of.unit, before, after, signed=of.sign)


def ending(run_dir: str | Path, base: str | None = None) -> list[str]:
    """Returns `closing_lines`, or one that says why there are none: a run has ended well even if a file is damaged."""
    try:
        return closing_lines(run_dir, base)
    except (InfoPOError, OSError) as error:
        return [f"no summary of the run: {error}"]


def closing_lines(run_dir: str | Path, base: str | None = None) -> list[str]:
    """Returns the end of a run as lines for people.

    Args:
        run_dir: The run directory, as it is written in the commands to run next.
        base: Name of the model that training started from. By default it is the one that the run's files name.

    Raises:
        RunDirectoryError: There is no such run, or a file of it is damaged.
    """
    [run] = read_runs([run_dir])
    folder = Path(run_dir)
    tasks = task_figures(read_object(folder_of_run(folder) / EVALUATION))
    return [
        *_changed(run),
        *_evaluated(run, tasks),
        *_verdicts(run),
        _where(folder),
        *_next(folder, run, base),
    ]


def _changed(run: ReportRun) -> list[str]:
    rows = changes(run)
    n = next((r["probe/n"] for r in reversed(run.having("probe/n")) if is_number(r["probe/n"])), None)
    measured = [row for row in rows if row.is_measured]
    missing = [row.title for row in rows if not row.is_measured]
    where = f", on {n:.0f} examples of the probe set" if n is not None else ""
    lines = [f"what changed until step {run.step}{where}:"] if measured else []
    width = max((len(row.title) for row in rows), default=0)
    for row in measured:
        lines.append(f"  {row.title.ljust(width)}  {_in_words(row)} {row.unit}".rstrip())
    if missing:
        lines.append(f"not measured: {', '.join(missing)}{'' if n is not None else ' (probe_size is 0)'}")
    return lines


def _in_words(row: Change) -> str:
    after = row.after
    if row.change is None:
        assert after is not None
        text = after.text(row.signed)
        return text if row.before is None else f"{row.before.text()} → {text}"
    change = row.change.text(row.signed)
    if row.before is None or after is None:
        return f"{change} ({row.change.source})"
    return f"{Estimate(row.before.value).text()} → {Estimate(after.value).text()}, change {change}"


def _evaluated(run: ReportRun, tasks: Sequence[TaskFigure]) -> list[str]:
    loss = (run.run.evaluation or {}).get("eval_loss")
    lines = [f"loss on the evaluation data: {column('Loss').estimate(run).text()}"] if is_number(loss) else []  # type: ignore[union-attr]
    return lines + [f"task {figure.text()}" for figure in tasks]


def _verdicts(run: ReportRun) -> list[str]:
    if run.verdicts is None:
        return [f"verdicts: not judged (there is no {VERDICTS})"]
    found = verdicts_in(run.verdicts)
    fired = [verdict for verdict in found if verdict.fired]
    return [in_words(found), *(f"  {_meaning(verdict)}" for verdict in fired)]


def _meaning(verdict: Verdict) -> str:
    return f"{verdict.name}: {verdict.text} {verdict.advice}"


def _where(folder: Path) -> str:
    """Returns where model and records are."""
    has_model = any((folder / name).is_file() for name in MODELS)
    newest = next(iter(checkpoints_in(folder)), None)
    names = [
        name
        for name in (METRICS, VERDICTS, RECIPE, "environment.json", EVALUATION)
        if (folder / name).is_file()
    ]
    what = [*(["model"] if has_model else []), *names]
    text = (
        f"{folder}: {', '.join(what[:-1])} and {what[-1]} written"
        if len(what) > 1
        else f"{folder}: nothing written"
    )
    if has_model:
        return text
    return f"{text}; " + (
        f"the newest model is {newest.name}" if newest is not None else "no model is saved yet (save_model)"
    )


def _next(folder: Path, run: ReportRun, base: str | None) -> list[str]:
    """Returns the commands to run next, as a shell takes them: what this run has is what they need."""
    report = _command("report", folder, *([] if is_installed("bokeh") else ["--format", "markdown"]))
    if not any((folder / name).is_file() for name in MODELS) and not checkpoints_in(folder):
        return [f"next: {report}"]
    recipe, model = recipe_tree(run), model_of(run)
    asked = _asked(recipe, model)
    return [
        "next:",
        f"  {_command('chat', folder, *_against(recipe, base or model))}",
        f"  {_command('evaluate', folder, *asked) if asked else _command('export', folder)}",
        f"  {report}",
    ]


def _against(recipe: Mapping[str, Any], base: str) -> list[str]:
    """Returns the argument that names the model which training started from, if a name is enough."""
    model = recipe.get("model")
    revision = model.get("revision") if isinstance(model, dict) else None
    return [] if base in ("", "null") or revision else [_option("against", base)]


_OWN_TASKS = ("lab", "expressions")
"""Tasks that need no data from elsewhere."""


def _asked(recipe: Mapping[str, Any], model: str) -> list[str]:
    """Returns the arguments of an evaluation: as the recipe evaluates, or else by the task that the data are from.

    They are empty if no task is known to fit, because one that does not says nothing of the run.
    """
    evaluate = recipe.get("evaluate")
    evaluate = evaluate if isinstance(evaluate, dict) else {"tasks": evaluate}
    tasks = evaluate.get("tasks") or []
    tasks = [tasks] if isinstance(tasks, str) else list(tasks)
    if not tasks:
        own = _task_of_data(recipe, model)
        return [] if own is None else [_option("tasks", own)]
    given = evaluate.get("data") or {}
    words = [_option("tasks", ",".join(tasks))]
    words += [_option("data", f"{name}={given[name]}") for name in tasks if name in given]
    defaults = EvaluateSettings.defaults()
    for key in _OPTIONS:
        if (value := evaluate.get(key)) not in (None, defaults[key]):
            words.append(_option(key.replace("_", "-"), value))
    return [*words, *(["--allow-code-execution"] if evaluate.get("allow_code_execution") else [])]


_OPTIONS = (
    "limit", "num_samples", "temperature", "max_new_tokens", "prompting", "num_fewshot", "seed", "isolation",
)  # fmt: skip
"""Settings of a recipe's evaluation that `infopo evaluate` takes under the same names, with the same defaults."""


def _task_of_data(recipe: Mapping[str, Any], model: str) -> str | None:
    """Returns the built-in task that model or data are from, or that has marked the data, or None."""
    path = flat(recipe).get("data.path", "")
    if path.startswith("lab:") or model.startswith("lab:"):
        return "lab"
    with contextlib.suppress(RunDirectoryError, OSError, ValueError):
        made = read_object(Path(path).with_suffix(".provenance.json")) or {}
        return made["verifier"] if made.get("verifier") in _OWN_TASKS else None
    return None


def _option(name: str, value: object) -> str:
    text = str(value)
    return shlex.quote(f"--{name}={text}") if text.startswith("-") else f"--{name} {shlex.quote(text)}"


def _command(name: str, folder: Path, *options: str) -> str:
    run = str(folder)
    return " ".join(["infopo", name, shlex.quote(f"./{run}" if run.startswith("-") else run), *options])
