"""What a terminal shows of training, on real pseudo-terminals of several widths, and what a log file gets."""

import fcntl
import io
import os
import pty
import re
import struct
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pytest
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from infopo.printing import ShortPrinter, ShortProgress
from infopo.ranks import StartLine
from infopo.workflows.terminal import FIGURES, Terminal, attach, cell
from test_judging import biased
from trainers import trainer_of
from worlds import random_dataset

WIDTHS = (40, 80, 200)


class Screen:
    """The bytes of a pseudo-terminal, and what they leave on its screen."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.raw = b""

    def lines(self) -> list[str]:
        """Replays line feeds, carriage returns, the escapes that move or clear, and the wrapping of a row."""
        rows: list[list[str]] = [[]]
        y = x = 0
        text = self.raw.decode()
        tokens = re.finditer(r"\x1b\[([0-9;]*)([A-Za-z])|[^\x1b]", text)
        for match in tokens:
            if match[2] == "A":
                y -= int(match[1] or 1)
            elif match[2] is not None:
                assert match[2] in "mK", match[0]
                if match[2] == "K":
                    del rows[y][x:]
            elif match[0] == "\r":
                x = 0
            elif match[0] == "\n":
                y += 1
                rows += [[] for _ in range(y + 1 - len(rows))]
            else:
                if x == self.width:
                    y, x = y + 1, 0
                    rows += [[] for _ in range(y + 1 - len(rows))]
                rows[y][x:] = [*([" "] * (x - len(rows[y]))), match[0], *rows[y][x + 1 :]]
                x += 1
        return [line for row in rows if (line := "".join(row).rstrip())]


@contextmanager
def terminal_of(width: int) -> Iterator[tuple[TextIO, Screen]]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    screen = Screen(width)

    def read() -> None:
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:  # the other end is closed
                return
            if not data:
                return
            screen.raw += data

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with os.fdopen(theirs, "w", encoding="utf-8") as stream:
            yield stream, screen
    finally:
        reader.join()
        os.close(ours)


class Probe(TrainerCallback):
    """Logs what a probe set would measure."""

    trainer: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % 2 == 0:
            self.trainer.log({"probe/margin": 1.25, "probe/change/chosen": -0.5, "kl/forward": 0.02})


def shown_on(stream: Any, folder: Path, train: Any = None, **settings: Any) -> None:
    probe = Probe()
    settings = {"save_strategy": "no", "max_steps": 4, "disable_tqdm": False} | settings
    probe.trainer = trainer_of(folder, train or random_dataset(12), callbacks=[probe], **settings)
    terminal = attach(probe.trainer, stream)
    probe.trainer.remove_callback(StartLine)
    probe.trainer.add_callback(StartLine(terminal.write))
    probe.trainer.train()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_terminal_has_one_aligned_line_per_log_step_and_a_bar_that_leaves_nothing(
    width: int, tmp_path: Path
):
    with terminal_of(width) as (stream, screen):
        shown_on(stream, tmp_path)
    start, *more = screen.lines()
    assert start.startswith("1 process, cpu")
    title, *lines = more[width == 40 :]  # the first line is wider than 40
    names = [figure.title for figure in FIGURES]
    assert title.split() == ["step", *names[: 3 if width == 40 else 6]]
    assert [line.split()[0] for line in lines] == ["1/4", "2/4", "3/4", "4/4"]
    assert {len(line) for line in lines} == {len(title)}
    # What was measured before the first update is no news, and what is measured after step 2 stays.
    assert all(
        (line.split()[2:4] == ["+1.250", "-0.500"]) == (line[:8].strip() >= "3/4") for line in lines
    ), lines
    # The bar was there, with what is wanted of it.
    assert "left  loss" in screen.raw.decode()
    last = screen.raw.decode().split("/4  00")[-1]
    assert ("margin +1.25  chosen -0.5" in last) == (width > 40)
    assert ("█" in last) == (width > 40)


def test_verdicts_are_in_place_and_wrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with terminal_of(40) as (stream, screen):
        shown_on(stream, tmp_path, biased(12))
    lines = screen.lines()
    assert lines[0].startswith("verdict: length bias (before")
    assert lines[1].startswith("  ")
    assert b"\x1b[1;33m" in screen.raw


def test_no_color_is_honoured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NO_COLOR", "1")
    with terminal_of(80) as (stream, screen):
        shown_on(stream, tmp_path, biased(12))
    assert b"\x1b[1;33m" not in screen.raw
    assert any(line.startswith("verdict: length bias") for line in screen.lines())


def test_disable_tqdm_leaves_lines_and_no_bar(tmp_path: Path):
    with terminal_of(80) as (stream, screen):
        shown_on(stream, tmp_path, disable_tqdm=True)
    assert b"left" not in screen.raw
    assert len(screen.lines()) == 6  # what starts, the title and four steps


def test_a_file_gets_plain_lines_of_full_width(tmp_path: Path):
    stream = io.StringIO()
    shown_on(stream, tmp_path, eval_dataset=random_dataset(4), eval_strategy="steps", eval_steps=2)
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()
    assert [line.split()[0] for line in lines[1:]] == ["step", "1/4", "2/4", "eval", "3/4", "4/4", "eval"]
    assert {len(line) for line in lines[1:]} == {len(lines[1])}


def test_dictionaries_of_transformers_are_gone_and_a_script_keeps_them(tmp_path: Path):
    for disabled, own in ((True, ShortPrinter), (False, ShortProgress)):
        trainer = trainer_of(tmp_path, disable_tqdm=disabled)
        kinds = [type(each) for each in trainer.callback_handler.callbacks]
        assert own in kinds
        attach(trainer, io.StringIO())
        kinds = [type(each) for each in trainer.callback_handler.callbacks]
        assert not [kind for kind in kinds if issubclass(kind, PrinterCallback | ProgressCallback)]


def test_figures_fit_their_column():
    for value in (
        0,
        1e-9,
        -1e-9,
        0.0004,
        999.9994,
        -999.9996,
        1e6,
        -1.5e300,
        float("nan"),
        float("inf"),
        -1e-300,
    ):
        for signed in (True, False):
            text = cell(value, signed=signed)
            assert len(text) == 9, text
            assert float(text) == pytest.approx(value, rel=0.01, abs=1e-3, nan_ok=True)


def test_a_dumb_terminal_has_no_bar(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "dumb")
    with terminal_of(80) as (stream, _):
        assert not Terminal(stream).has_bar
