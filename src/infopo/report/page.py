"""A report as one HTML file: nothing is fetched when it is opened, and no script runs in it but its own.

Text of models and data is escaped by the template engine (`autoescape`), control characters are shown as escapes, and a
Content-Security-Policy with the hashes of the two scripts holds if something slips through all the same.
"""

import base64
import functools
import hashlib
from pathlib import Path

import jinja2
from markupsafe import Markup

from infopo import __version__
from infopo.errors import printable
from infopo.report import plots
from infopo.report.document import Report, in_words, verdict_size
from infopo.report.numbers import number
from infopo.report.panels import Plot

_FILES = Path(__file__).parent / "page_files"


def to_html(report: Report, *, command: str = "", refresh: int | None = None) -> str:
    """Returns the page.

    Args:
        report: What it says.
        command: The command line that writes it, for the reader who wants it again.
        refresh: Seconds after which the page loads itself again, or None for never.
    """
    script = (_FILES / "page.js").read_text(encoding="utf-8")
    library = plots.bokeh_script() if report.plots else ""
    names = [run.name for run in report.runs]
    values = {
        "report": report,
        "names": names,
        "title": f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}: infopo report",
        "version": __version__,
        "command": command,
        "refresh": refresh,
        "policy": policy([script, library]),
        "style": Markup(_style()),
        "script": Markup(script),
        "bokeh": Markup(library),
        "plots": Markup(for_script(plots.plots_json(report.plots))) if report.plots else "",
        "curves": Markup(for_script(plots.curves_json(report.plots, names))),
        "colours": plots.COLOURS,
        "number": number,
        "in_words": in_words,
        "verdict_size": verdict_size,
        "can_be_log": plots.can_be_log,
        "lines_of": _lines_of,
    }
    return _environment().get_template("page.html").render(values)


def policy(scripts: list[str]) -> str:
    """Returns the Content-Security-Policy under which these scripts run, and nothing else runs or is loaded.

    Example:
        >>> policy([""])
        "default-src 'none'; script-src 'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='; \
style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    """
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def for_script(data: str) -> str:
    r"""Returns JSON that may stand in a script element, whatever its texts contain.

    Example:
        >>> print(for_script('"</script>"'))
        "\u003c/script>"
    """
    return data.replace("<", "\\u003c")


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FILES),
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=False,
    )


def _style() -> str:
    swatches = (f".c{index} {{ background: {colour}; }}" for index, colour in enumerate(plots.COLOURS))
    return (_FILES / "page.css").read_text(encoding="utf-8") + "\n".join(swatches)


def _lines_of(plot: Plot) -> set[int]:
    return {series.line for series in plot.series}
