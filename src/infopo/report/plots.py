"""The plots of a report as Bokeh's JSON, and their curves, which the page's script adds. Needs the `report` extra."""

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from infopo.errors import ConfigError, printable
from infopo.preflight import is_installed
from infopo.report.panels import Plot, Series

COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F", "#9467BD", "#BCBD22",
    "#17BECF", "#E7298A", "#66A61E", "#B15928", "#6A8CFF",
)  # fmt: skip
"""Colours of the runs. The first six are Okabe and Ito's; all are visible on white and on black."""

HEIGHT = 300
"""Height of a plot in pixels."""


def colour(run: int) -> str:
    return COLOURS[run % len(COLOURS)]


def require_bokeh() -> None:
    """Refuses to begin without Bokeh.

    Raises:
        ConfigError: It is not installed.
    """
    if not is_installed("bokeh"):
        raise ConfigError(
            "a report in HTML needs Bokeh: pip install 'infopo[report]', or use --format markdown"
        )


def bokeh_script() -> str:
    """Returns BokehJS with what plots need, and without widgets and tables."""
    from bokeh.resources import Resources

    library, *_ = Resources(mode="inline", components=["bokeh"], minified=True).js_raw
    return library


def plots_json(plots: Sequence[Plot]) -> str:
    """Returns the plots as one Bokeh document, whose roots have the keys of the panels as names.

    They share a horizontal range, so that zooming one zooms all, and have no curves yet (see `curves_json`).
    """
    from bokeh.document import Document
    from bokeh.models import Range1d

    last = max((series.last_step for plot in plots for series in plot.series), default=1)
    first = min((min(series.steps) for plot in plots for series in plot.series), default=0)
    margin = max(last - first, 1) * 0.02
    begin, end = first - margin, last + margin
    x_range = Range1d(begin, end, reset_start=begin, reset_end=end)
    document = Document()
    with document.models.freeze():  # or it would collect all models again after each root
        for plot in plots:
            document.add_root(_figure(plot, x_range))
    return json.dumps(document.to_json(deferred=False), separators=(",", ":"), allow_nan=False)


def can_be_log(plot: Plot) -> bool:
    """Whether every value of a panel is above 0, as a logarithmic axis needs.

    A curve that is 0 throughout, such as the push of a loss without rejected responses, is not drawn on such an axis.
    """
    return all(series.least > 0 for series in _not_zero(plot)) and bool(_not_zero(plot))


def _not_zero(plot: Plot) -> list[Series]:
    return [series for series in plot.series if series.least or series.most]


def _figure(plot: Plot, x_range: Any) -> Any:
    from bokeh.models import BasicTickFormatter, HoverTool, Range1d, Span, WheelZoomTool
    from bokeh.plotting import figure

    panel = plot.panel
    scale = "log" if panel.log and can_be_log(plot) else "linear"
    low, high = ranges(plot)[scale]
    fig: Any = figure(
        name=panel.key,
        height=HEIGHT,
        sizing_mode="stretch_width",
        x_range=x_range,
        y_range=Range1d(low, high, reset_start=low, reset_end=high),
        x_axis_label="optimizer step",
        y_axis_label=panel.unit,
        y_axis_type=scale,
        tools="box_zoom,pan,reset,save",
        active_drag="box_zoom",
        toolbar_location="above",
        output_backend="canvas",
    )
    fig.toolbar.logo = None
    fig.toolbar.autohide = True
    # Active from the start, it would take the wheel from a reader who scrolls.
    fig.add_tools(WheelZoomTool())
    fig.background_fill_alpha = fig.border_fill_alpha = 0
    fig.min_border_right = 16
    fig.yaxis.formatter = BasicTickFormatter()
    if panel.zero:
        fig.add_layout(
            Span(location=0, dimension="width", line_color="#888888", line_width=1, level="underlay")
        )
    tooltips = [("run", "$name"), ("step", "@x"), (panel.unit, "@y{%.4g}")]
    fig.add_tools(HoverTool(tooltips=tooltips, formatters={"@y": "printf"}, mode="mouse"))
    return fig


def curves_json(plots: Sequence[Plot], names: Sequence[str]) -> str:
    """Returns what the page's script adds to the plots: of each panel its curves and its vertical ranges.

    A curve as a Bokeh model of its own would be 3 kB of JSON and some milliseconds of Python beside its points. Columns
    are little-endian int32 (steps) and float32 (values) in base64.
    """
    tree = {
        plot.panel.key: {
            "ranges": ranges(plot),
            "curves": [_curve(plot, series, names) for series in plot.series],
        }
        for plot in plots
    }
    return json.dumps(tree, separators=(",", ":"), allow_nan=False)


def _curve(plot: Plot, series: Series, names: Sequence[str]) -> dict[str, Any]:
    line = plot.panel.lines[series.line]
    label = f"{names[series.run]}, {line.label}" if len(plot.panel.lines) > 1 else names[series.run]
    return {
        "run": series.run,
        "name": printable(label),
        "dash": line.dash,
        "x": _packed(np.asarray(series.steps, dtype="<i4")),
        "y": _packed(_float32(series.values)),
        "low": None if series.low is None else _packed(_float32(series.low)),
        "high": None if series.high is None else _packed(_float32(series.high)),
    }


def _packed(values: npt.NDArray[Any]) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _float32(values: Sequence[float]) -> npt.NDArray[np.float32]:
    """Returns values as the file stores them. What float32 cannot hold is at its limit, and not infinite."""
    limit = float(np.finfo(np.float32).max)
    return np.clip(np.asarray(values, dtype=np.float64), -limit, limit).astype("<f4")


def ranges(plot: Plot) -> dict[str, tuple[float, float]]:
    """Returns the vertical ranges of a panel: all values with a margin, and of intervals what is not far beyond them.

    Returns:
        Under "linear" the two ends for a linear axis, and under "log" those for a logarithmic one, if it can be.
    """
    low, high = min(s.least for s in plot.series), max(s.most for s in plot.series)
    reach = (high - low) or abs(high) or 1.0
    ends = [end for s in plot.series for end in (*(s.low or ()), *(s.high or ()))]
    bottom, top = max(min([low, *ends]), low - reach), min(max([high, *ends]), high + reach)
    margin = 0.05 * (top - bottom) or 0.05 * abs(top) or 1.0
    found = {"linear": _finite(bottom - margin, top + margin)}
    if can_be_log(plot):
        low = min(series.least for series in _not_zero(plot))
        factor = (high / low) ** 0.05 if high > low else 1.5
        found["log"] = _finite(low / factor, high * factor)
    return found


def _finite(low: float, high: float) -> tuple[float, float]:
    limit = float(np.finfo(np.float32).max)
    return max(low, -limit), min(high, limit)
