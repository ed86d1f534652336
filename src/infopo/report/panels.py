"""Which curves a report has: a table of panels, and the reading of their series. docs/metrics.md has the names."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from infopo.intervals import Z_95
from infopo.report.reading import ReportRun, is_number
from infopo.report.thinning import thinned

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Line:
    """One curve of a panel, for every run that has it.

    Attributes:
        label: Words for the legend.
        names: Metrics in the order of preference. A run shows the first that it has.
        dash: Bokeh's name of the dash.
        ci: Suffix of the metric that is the half-width of its 95 % interval, or "" for none.
        se: Suffix of the metric that is its standard error, or "".
    """

    label: str
    names: tuple[str, ...]
    dash: str = "solid"
    ci: str = "_ci95"
    se: str = "_se"


@dataclass(frozen=True)
class Panel:
    """A plot: its lines, which share a unit.

    Attributes:
        key: Short name, unique.
        title: Heading.
        unit: Label of the vertical axis.
        about: One or two sentences on how to read it.
        lines: The curves.
        log: Whether the vertical axis is logarithmic at first.
        zero: Whether a line is drawn at 0.
    """

    key: str
    title: str
    unit: str
    about: str
    lines: tuple[Line, ...]
    log: bool = False
    zero: bool = False


PANELS: tuple[Panel, ...] = (
    Panel(
        "change", "Likelihood: change since the start", "nats per response",
        "How much more (above 0) or less likely the policy has made chosen (solid) and rejected (dashed) responses. "
        "A method that learns by lowering both shows two falling lines (the paper's Figure 1).",
        (
            Line("chosen", ("probe/change/chosen", "logratios/chosen")),
            Line("rejected", ("probe/change/rejected", "logratios/rejected"), "dashed"),
        ),
        zero=True,
    ),
    Panel(
        "logps", "Likelihood: log-prob", "nats per response",
        "Mean log π of chosen (solid) and rejected (dashed) responses (the paper's Figure 2).",
        (
            Line("chosen", ("probe/logps/chosen", "logps/chosen", "eval_logps/chosen")),
            Line("rejected", ("probe/logps/rejected", "logps/rejected", "eval_logps/rejected"), "dashed"),
        ),
    ),
    Panel(
        "change_per_token", "Likelihood: change per token", "nats per token",
        "The change since the start divided by each response's length, so that long responses count as short ones do.",
        (
            Line("chosen", ("probe/change/chosen_per_token",)),
            Line("rejected", ("probe/change/rejected_per_token",), "dashed"),
        ),
        zero=True,
    ),
    Panel(
        "fell", "Chosen responses that fell", "share of chosen responses",
        "The share of chosen responses that are less likely than at the start (solid), and the share that the next "
        "step on each pair alone would lower (dashed), which is no forecast: far more fall in the end.",
        (
            Line("fell so far", ("probe/chosen_fell",)),
            Line("by one pair alone", ("forecast/chosen_falls",), "dashed"),
        ),
    ),
    Panel(
        "margin", "Margin", "nats per pair",
        "The log-ratio of chosen minus that of rejected responses. It grows while the policy learns to tell them "
        "apart, whether chosen responses rise or not.",
        (Line("margin", ("probe/margin",)),),
        zero=True,
    ),
    Panel(
        "rewards", "Reward margin", "nats × β",
        "The margin in the units of the loss: the reward of chosen minus that of rejected responses. Runs with "
        "different β cannot be compared by it.",
        (Line("training", ("rewards/margins",)), Line("evaluation", ("eval_rewards/margins",), "dashed")),
        zero=True,
    ),
    Panel(
        "accuracy", "Accuracy on pairs", "share of pairs",
        "The share of pairs whose chosen response has the larger reward (solid), and the share whose chosen response "
        "is simply more likely (dashed, no reference).",
        (
            Line("by reward", ("probe/accuracy", "rewards/accuracies", "eval_rewards/accuracies")),
            Line("by likelihood", ("probe/ranking_accuracy", "logps/accuracies", "eval_logps/accuracies"), "dashed"),
        ),
    ),
    Panel(
        "kl", "Divergence from the start", "nats per response",
        "KL on responses sampled from the starting policy (forward, solid) and on the policy's own (reverse, dashed). "
        "The policy has moved further where they are larger.",
        (Line("forward KL", ("kl/forward",)), Line("reverse KL", ("kl/reverse",), "dashed")),
        zero=True,
    ),
    Panel(
        "drift", "Drift on the probe set", "nats per response",
        "Mean log π/π_ref of chosen (solid) and rejected (dashed) responses of the probe set. This is no KL, because "
        "the policy did not write these responses.",
        (Line("chosen", ("drift/chosen",)), Line("rejected", ("drift/rejected",), "dashed")),
        zero=True,
    ),
    Panel(
        "gradients", "Gradient norms", "norm",
        "The norm of the pull on chosen (solid) and of the push on rejected responses (dashed). Dotted: the norm of "
        "the whole gradient before clipping.",
        (
            Line("chosen", ("gradients/chosen",)),
            Line("rejected", ("gradients/rejected",), "dashed"),
            Line("all", ("grad_norm",), "dotted"),
        ),
        log=True,
    ),
    Panel(
        "cosine", "Gradients of chosen and rejected: cosine", "cosine",
        "Near 1 the two sides share their direction, so that pushing rejected responses down takes chosen ones along.",
        (Line("cosine", ("gradients/cosine",)),),
        zero=True,
    ),
    Panel(
        "band", "Gradient weights and their band", "d_w / d_l",
        "While the ratio of the weights (solid) is between the edges (dotted, dash-dotted), a step neither lowers "
        "chosen nor raises rejected responses, to first order.",
        (
            Line("weight ratio", ("gradients/weight_ratio",)),
            Line("lower edge", ("gradients/band_low",), "dotted"),
            Line("upper edge", ("gradients/band_high",), "dotdash"),
        ),
        log=True,
    ),
    Panel(
        "inverse", "1/π of rejected responses", "nats",
        "Mean −log π_θ (solid) and −log π_ref (dashed) of rejected responses: the factor that the paper compares.",
        (
            Line("policy", ("gradients/log_inverse_policy",)),
            Line("reference", ("gradients/log_inverse_reference",), "dashed"),
        ),
    ),
    Panel(
        "tail", "Ratio tail", "log r, nats",
        "Quantiles of the log-ratio of rejected responses. A tail that fades is InfoPO at work. A maximum that rises "
        "means that a few responses carry the gradient.",
        (
            Line("median", ("ratio_tail/q50",)),
            Line("90 %", ("ratio_tail/q90",), "dashed"),
            Line("99 %", ("ratio_tail/q99",), "dotdash"),
            Line("maximum", ("ratio_tail/max",), "dotted"),
        ),
        zero=True,
    ),
    Panel(
        "ratio", "Ratio of rejected responses", "r^β",
        "Mean (solid) and maximum (dashed) of r^β of rejected responses in training. Both are 1 at the start and "
        "should fall.",
        (Line("mean", ("ratio/mean",)), Line("maximum", ("ratio/max",), "dashed")),
        log=True,
    ),
    Panel(
        "trust", "Ratio tail: effective samples", "share, k̂",
        "The effective sample size as a share of the responses (solid), the Pareto k̂ of the tail (dashed; the mean is "
        "unreliable above 0.7), and the share beyond the cap (dotted).",
        (
            Line("effective samples", ("ratio_tail/ess",)),
            Line("k̂", ("ratio_tail/k_hat",), "dashed"),
            Line("capped", ("ratio_tail/capped",), "dotted"),
        ),
    ),
    Panel(
        "length", "Length of sampled responses", "tokens",
        "Mean length of responses sampled now (solid) and of those of the starting policy (dashed).",
        (Line("now", ("length/sampled",)), Line("at the start", ("length/anchor",), "dashed")),
    ),
    Panel(
        "length_r2", "Reward explained by length", "R²",
        "The share of the variance of the implicit reward that the length of a response explains.",
        (Line("R²", ("length/r2",)),),
    ),
    Panel(
        "entropy", "Entropy of the next token", "nats per token",
        "Of responses of the starting policy (solid) and of chosen responses (dashed). A collapse means that the "
        "policy has stopped to vary.",
        (Line("anchor set", ("anchor/entropy",)), Line("chosen", ("probe/entropy",), "dashed")),
    ),
    Panel(
        "p_max", "Likelihood of the likeliest token", "log p, nats",
        "Mean log-prob of the likeliest next token along chosen responses. If it rises while chosen responses fall, "
        "their mass goes to what the policy already says.",
        (Line("log p_max", ("probe/p_max",)),),
    ),
    Panel(
        "diversity", "Diversity of sampled responses", "share",
        "The share of different word pairs (solid), and of responses that ended by themselves (dashed).",
        (
            Line("distinct-2", ("generations/distinct_2",)),
            Line("finished", ("generations/finished",), "dashed"),
        ),
    ),
    Panel(
        "loss", "Loss", "loss",
        "The objective in training (solid) and in evaluation (dashed). Values of different objectives cannot be "
        "compared.",
        (Line("training", ("loss",)), Line("evaluation", ("eval_loss",), "dashed")),
    ),
    Panel(
        "learning_rate", "Learning rate", "learning rate",
        "The learning rate that the schedule gave.",
        (Line("learning rate", ("learning_rate",)),),
    ),
    Panel(
        "throughput", "Throughput", "optimizer steps per second",
        "From the times of the records, so that evaluation and saving count as well.",
        (Line("steps per second", ("throughput",)),),
    ),
    Panel(
        "memory", "Memory", "GiB",
        "Peak memory of the accelerator, or of the process without one.",
        (Line("peak", ("memory/peak_gib",)),),
    ),
)  # fmt: skip
"""All panels in the order of the page."""

POINTS = 600
"""Most points of a series."""

ALL_POINTS = 120_000
"""Most points of a report, so that its size stays below 3 MB however many runs are compared."""


@dataclass(frozen=True)
class Series:
    """One curve of one run.

    Attributes:
        run: Index of the run.
        line: Index of the line in its panel.
        metric: The metric that it shows.
        steps: Optimizer steps of the points kept.
        values: Their values.
        low: Lower ends of their 95 % intervals, or None if the run has no intervals.
        high: Upper ends.
        points: Number of finite points before thinning.
        not_finite: Number of values that are NaN or infinite, and are left out.
        first: First value. Like all below, it is over all points.
        last: Last value.
        last_step: Its step.
        least: Smallest value.
        most: Largest value.
    """

    run: int
    line: int
    metric: str
    steps: list[int]
    values: list[float]
    low: list[float] | None
    high: list[float] | None
    points: int
    not_finite: int
    first: float
    last: float
    last_step: int
    least: float
    most: float


@dataclass(frozen=True)
class Plot:
    """A panel with the series of the runs."""

    panel: Panel
    series: list[Series] = field(default_factory=list)


@dataclass(frozen=True)
class Points:
    """All finite points of a curve, in the order of their steps, each (points,).

    Attributes:
        steps: Optimizer steps.
        values: Values.
        widths: Half-widths of their 95 % intervals, or None without intervals.
        not_finite: Number of values that are NaN or infinite, which are left out.
    """

    steps: Array
    values: Array
    widths: Array | None = None
    not_finite: int = 0

    def __len__(self) -> int:
        return len(self.steps)


def read_plots(runs: Sequence[ReportRun]) -> tuple[list[Plot], list[str]]:
    """Returns the panels that have data, thinned, and the titles of the others."""
    found: list[tuple[Panel, list[tuple[int, int, str, Points]]]] = []
    left_out = []
    for panel in PANELS:
        curves = [
            (index, number, *curve)
            for index, run in enumerate(runs)
            for number, line in enumerate(panel.lines)
            if (curve := _read_line(run, line)) is not None
        ]
        if curves:
            found.append((panel, curves))
        else:
            left_out.append(panel.title)
    # Beside its values, a series with intervals has two columns more.
    weights = [
        len(points) * (1 if points.widths is None else 2) for _, curves in found for *_, points in curves
    ]
    limit = points_per_series(weights)
    return [Plot(panel, [_series(*curve, limit) for curve in curves]) for panel, curves in found], left_out


def points_per_series(lengths: Sequence[int]) -> int:
    """Returns how many points each series may have, so that all together stay within `ALL_POINTS`.

    Example:
        >>> points_per_series([10_000] * 100), points_per_series([10_000] * 1_000)
        (600, 120)
    """
    limit = POINTS
    while limit > 20 and sum(min(length, limit) for length in lengths) > ALL_POINTS:
        limit -= 20
    return limit


def _read_line(run: ReportRun, line: Line) -> tuple[str, Points] | None:
    for name in line.names:
        points = _throughput(run) if name == "throughput" else _points(run, name, line)
        if len(points):
            return name, points
    return None


def _points(run: ReportRun, name: str, line: Line) -> Points:
    """Returns the points of one metric. There may be millions of values, so it looks at columns of them."""
    records = run.having(name)
    column = [record[name] for record in records]
    if not set(map(type, column)) <= {float}:
        records = [record for record in records if is_number(record[name])]
        column = [record[name] for record in records]
    values = np.asarray(column, dtype=np.float64)
    steps = np.asarray([record["step"] for record in records], dtype=np.int64)
    finite = np.flatnonzero(np.isfinite(values))
    order = finite[np.argsort(steps[finite], kind="stable")]
    widths = None
    if any(run.having(name + suffix) for suffix in (line.ci, line.se)):
        widths = np.asarray([_half_width(record, name, line) for record in records])[order]
    has_interval = widths is not None and bool(widths.any())
    return Points(steps[order], values[order], widths if has_interval else None, len(values) - len(finite))


def _half_width(record: dict[str, float], name: str, line: Line) -> float:
    for suffix, factor in ((line.ci, 1.0), (line.se, Z_95)):
        width = record.get(name + suffix)
        if is_number(width) and width is not None and math.isfinite(width):
            return factor * width
    return 0.0


def _throughput(run: ReportRun) -> Points:
    """Returns optimizer steps per second between records, over at least half a second each."""
    times = sorted((r["step"], r["time"]) for r in run.having("loss") if is_number(r.get("time")))
    steps: list[int] = []
    rates: list[float] = []
    begin, since = times[0] if times else (0, 0.0)
    for step, now in times:
        if now - since >= 0.5 and step > begin:
            rates.append((step - begin) / (now - since))
            steps.append(step)
            begin, since = step, now
    return Points(np.asarray(steps), np.asarray(rates))


def _series(run: int, line: int, metric: str, points: Points, limit: int) -> Series:
    keep = thinned(points.values, limit)
    steps, values = points.steps[keep], points.values[keep]
    low = high = None
    if points.widths is not None:
        low, high = values - points.widths[keep], values + points.widths[keep]
    return Series(
        run=run,
        line=line,
        metric=metric,
        steps=steps.tolist(),
        values=values.tolist(),
        low=None if low is None else low.tolist(),
        high=None if high is None else high.tolist(),
        points=len(points),
        not_finite=points.not_finite,
        first=float(points.values[0]),
        last=float(points.values[-1]),
        last_step=int(points.steps[-1]),
        least=float(points.values.min()),
        most=float(points.values.max()),
    )
