"""The command `report`."""

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Adds the command."""
    report = commands.add_parser(
        "report",
        help="write one HTML file about runs: results, curves, completions, settings side by side",
        description="Writes one self-contained file about run directories of finished, running or killed runs.",
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="a run directory (output_dir)")
    report.add_argument(
        "--output",
        metavar="FILE",
        help="where it goes (default: report.html; markdown and json: the terminal)",
    )
    report.add_argument(
        "--format",
        choices=("html", "markdown", "json"),
        default="html",
        help="default: %(default)s; markdown is for a pull request, json for a script",
    )
    report.add_argument("--watch", action="store_true", help="write it again until no run is running")
    report.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from infopo.workflows.report import report

    report(arguments.runs, arguments.output, format=arguments.format, watch=arguments.watch)
