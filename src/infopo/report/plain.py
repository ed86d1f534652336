"""A report as Markdown, for a pull request, or as JSON, for a script."""

from dataclasses import asdict
from typing import Any

from infopo.errors import printable
from infopo.output import counted
from infopo.report.comparing import ABSENT, Comparison
from infopo.report.document import Report, in_words, verdict_size
from infopo.runs import to_json

SCHEMA_VERSION = 1
"""Version of the JSON, which rises if a reader must know about a change."""


def to_json_text(report: Report) -> str:
    """Returns the whole report as one JSON object, with the points of all curves as they would be drawn."""
    tree: dict[str, Any] = {"schema_version": SCHEMA_VERSION, **asdict(report)}
    columns = [{"title": column.title, "unit": column.unit} for column in report.headline.columns]
    tree["headline"] = {"columns": columns, "rows": tree["headline"]["rows"]}
    tree["plots"] = [
        {
            "key": plot.panel.key,
            "title": plot.panel.title,
            "unit": plot.panel.unit,
            "series": [
                {**asdict(series), "line": plot.panel.lines[series.line].label} for series in plot.series
            ],
        }
        for plot in report.plots
    ]
    return f"{to_json(tree, indent=1)}\n"


def to_markdown(report: Report) -> str:
    """Returns results, verdicts, the last values of all curves, and the settings that differ, as Markdown."""
    names = [run.name for run in report.runs]
    lines = [f"## {cell(', '.join(names))}", "", *_headline(report), ""]
    lines += [*_evaluations(report, names), *_verdicts(report), ""]
    lines += ["### Curves", ""]
    lines += [
        f"- {plot.panel.title} ({plot.panel.unit}). {cell(in_words(plot, names))}" for plot in report.plots
    ]
    if report.left_out:
        lines += ["", f"No run has data for: {'; '.join(report.left_out)}."]
    if len(names) > 1:
        lines += ["", "### Settings that differ", "", *_differences(report.settings, names)]
    facts = [
        f"- {cell(run.name)}: {cell(words)}: {cell(value)}"
        for run in report.runs
        for words, value in (*run.rows, *run.data_facts)
    ]
    lines += ["", "### Data", "", *facts] if facts else []
    notes = [f"- {cell(run.name)}: {cell(note)}" for run in report.runs for note in run.notes]
    lines += ["", "### Notes", "", *notes] if notes else []
    return "\n".join(lines).rstrip() + "\n"


def _headline(report: Report) -> list[str]:
    columns = report.headline.columns
    head = ["run", "trained", "state", *(f"{column.title} ({column.unit})" for column in columns)]
    rows = [
        [run.name, run.method or ABSENT, run.progress,
         *(e.text(column.sign) if e else ABSENT for e, column in zip(estimates, columns, strict=True))]
        for run, estimates in zip(report.runs, report.headline.rows, strict=True)
    ]  # fmt: skip
    return _table(head, rows)


def _evaluations(report: Report, names: list[str]) -> list[str]:
    found = report.evaluations
    if not found.rows and not found.notes:
        return []
    rows = [
        [task, rule, *(estimate.text() if estimate else ABSENT for estimate in estimates)]
        for task, rule, estimates in found.rows
    ]
    lines = ["### Evaluation", "", *_table(["task", "rule", *names], rows), ""]
    lines += [f"- {cell(text)}" for text in (*found.comparisons, *found.notes)]
    return [*lines, ""]


def _verdicts(report: Report) -> list[str]:
    lines = ["### Verdicts", ""]
    for run in report.runs:
        for verdict in run.verdicts:
            size = verdict_size(verdict)
            parts = [
                f"**{cell(run.name)}: {cell(str(verdict.get('name')))}**",
                str(verdict.get("text") or ""),
            ]
            parts += [f"({size})" if size else "", str(verdict.get("advice") or "")]
            lines.append(f"- {' '.join([parts[0], *(cell(part) for part in parts[1:] if part)])}")
        if not run.verdicts:
            found = "nothing was found" if run.has_verdicts else "no verdicts were recorded"
            missing = f" ({counted(len(run.unchecked), 'check')} could not be made)" if run.unchecked else ""
            lines.append(f"- {cell(run.name)}: {found}{missing}")
    return lines


def _differences(table: Comparison, names: list[str]) -> list[str]:
    rows = [
        [key, *values]
        for key, values, differs in zip(table.keys, table.values, table.differs, strict=True)
        if differs
    ]
    return _table(["key", *names], rows) if rows else ["None."]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cell(text) for text in line)} |" for line in lines]


def cell(text: str) -> str:
    """Returns a text that stays in its cell, and that a renderer of Markdown shows as it is."""
    text = " ".join(printable(text).split())
    for character in "\\`*_[]|":
        text = text.replace(character, f"\\{character}")
    return text.replace("&", "&amp;").replace("<", "&lt;")
