"""`infopo report` writes one file about one or more runs, once, or again and again while they train."""

import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from infopo.errors import ConfigError
from infopo.output import say
from infopo.preflight import is_installed
from infopo.report import page, plain, plots
from infopo.report.document import Report, read_report
from infopo.runs import write_text_atomic

FORMATS = ("html", "markdown", "json")
DEFAULT_OUTPUT = "report.html"

EVERY = 20
"""Seconds between two versions of a report that is watched."""


def report(
    directories: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    format: str = "html",
    watch: bool = False,
    every: float = EVERY,
) -> None:
    """Writes a report of some run directories.

    Args:
        directories: Run directories, of finished, running or killed runs.
        output: The file. By default it is `report.html` here for HTML, and the terminal for the other formats.
        format: "html", "markdown" or "json".
        watch: Whether to write it again every few seconds until no run is running.
        every: Those seconds.

    Raises:
        ConfigError: The output cannot be written, Bokeh is missing, or a run is given twice.
        RunDirectoryError: A directory has nothing of a run, or a file in it is damaged.
    """
    if output is None and format == "html":
        output = DEFAULT_OUTPUT
    if watch and output is None:
        raise ConfigError("--watch: expected --output FILE, which is written again and again")
    if format == "html":
        plots.require_bokeh()
    path = Path(output) if output is not None else None
    if path is not None:
        check_output(path, directories)
    while True:
        found = read_report(directories)
        goes_on = watch and found.is_running
        text = _render(found, format, directories, path, refresh=int(every) if goes_on else None)
        if path is None:
            sys.stdout.write(text)
            return
        write_text_atomic(path, text)
        if not goes_on:
            say(f"{path}: {_size(path)}, {_what(found)}")
            return
        say(f"{path}: {_what(found)}; it is written again in {every:g} s (Ctrl-C ends this)")
        time.sleep(every)


def report_if_possible(directories: Sequence[str | Path], output: Path) -> None:
    """Writes a report beside other results, or says that Bokeh is missing, without which the others are whole."""
    if is_installed("bokeh"):
        report(directories, output)
    else:
        say("no report is written: it needs Bokeh (pip install 'infopo[report]')")


def _render(
    found: Report, format: str, directories: Sequence[str | Path], path: Path | None, refresh: int | None
) -> str:
    writers: dict[str, Callable[[Report], str]] = {"markdown": plain.to_markdown, "json": plain.to_json_text}
    if format in writers:
        return writers[format](found)
    command = shlex.join(["infopo", "report", *map(str, directories), "--output", str(path)])
    return page.to_html(found, command=command, refresh=refresh)


def check_output(path: Path, directories: Sequence[str | Path] = ()) -> None:
    """Refuses a file that cannot be written, before anything is read.

    Raises:
        ConfigError: It is a folder, its folder is missing or not writable, or it is a file of a run.
    """
    folder = path.parent
    if path.is_dir():
        raise ConfigError(f"--output: {path} is a folder; expected a file, e.g. {path / DEFAULT_OUTPUT}")
    if not folder.is_dir():
        raise ConfigError(f"--output: there is no folder {folder} to write {path.name} to; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"--output: {folder} cannot be written to: no permission")
    is_of_run = any(folder.resolve() == Path(run).resolve() for run in directories)
    if is_of_run and path.exists() and path.suffix not in (".html", ".md"):
        raise ConfigError(f"--output: {path} is a file of the run; name another one")


def _what(found: Report) -> str:
    states = ", ".join(f"{run.name} ({run.progress})" for run in found.runs[:4])
    return f"{states}{f' and {len(found.runs) - 4} more' if len(found.runs) > 4 else ''}"


def _size(path: Path) -> str:
    size = path.stat().st_size
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
