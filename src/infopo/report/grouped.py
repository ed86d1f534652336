"""A table of groups of runs that differ in their seeds only: mean and 95 % interval over the runs of a group."""

import math
import statistics
from collections.abc import Sequence

from scipy import special

from infopo.report.headline import headline
from infopo.report.numbers import Estimate, number
from infopo.report.plain import cell
from infopo.report.reading import ReportRun


def grouped_table(runs: Sequence[ReportRun], groups: Sequence[str]) -> str:
    """Returns the report's headline as Markdown, one row per group.

    Of several runs a value is their mean ± half of Student's 95 % interval over them. Of a single run it is the run's
    value with its own interval, which is over examples.

    Args:
        runs: The runs.
        groups: The group of each.
    """
    found = headline(runs)
    columns = [f"{each.title} ({each.unit})" for each in found.columns]
    lines = [_row(["settings", "runs", *columns]), _row(["---"] * (len(columns) + 2))]
    for group in dict.fromkeys(groups):
        rows = [row for row, other in zip(found.rows, groups, strict=True) if other == group]
        values = [
            _over_runs([row[place] for row in rows], sign=column.sign)
            for place, column in enumerate(found.columns)
        ]
        lines.append(_row([cell(group), str(len(rows)), *values]))
    return "\n".join(lines) + "\n"


def _over_runs(estimates: Sequence[Estimate | None], *, sign: bool) -> str:
    known = [each for each in estimates if each is not None]
    if not known:
        return "-"
    if len(estimates) == 1:
        return known[0].text(sign)
    values = [each.value for each in known]
    text = number(statistics.fmean(values), sign=sign)
    if len(values) > 1:
        half = special.stdtrit(len(values) - 1, 0.975) * statistics.stdev(values) / math.sqrt(len(values))
        text += f" ± {number(float(half))}"
    return text if len(known) == len(estimates) else f"{text} (of {len(known)})"


def _row(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"
