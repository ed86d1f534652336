"""What `infopo train` shows: a line per log step, verdicts among them, and one progress bar at the bottom.

The full record of a step is in `metrics.jsonl`. If the output is no terminal, there is no bar, and lines are plain.
"""

import contextlib
import logging
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils.logging import set_tqdm_hook

from infopo.judging import Judge
from infopo.output import shown
from infopo.trainer import InfoPOTrainer

CELL = 9
"""Width of a column of figures."""

SHORTEST_BAR = 16


@dataclass(frozen=True)
class Figure:
    """One column.

    Attributes:
        title: Its heading.
        names: Metrics that it can show, the best first. One of the probe set, once measured, is kept until it is
            measured again.
        signed: Whether a plus is shown.
    """

    title: str
    names: tuple[str, ...]
    signed: bool = False


FIGURES: Sequence[Figure] = (
    Figure("loss", ("loss",)),
    # Of one kind only: a margin of rewards has the factor β, and one of log-probs has another zero.
    Figure("margin", ("probe/margin", "logratios/margins"), signed=True),
    Figure("chosen", ("probe/change/chosen", "logratios/chosen"), signed=True),
    Figure("accuracy", ("probe/accuracy", "rewards/accuracies")),
    Figure("KL", ("kl/forward",)),
    Figure("grad", ("grad_norm",)),
)
"""The six figures of a line, of which a narrow terminal shows the first."""


def has_color(stream: Any) -> bool:
    """Whether the stream is a terminal whose user has not switched colours off (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def width_of(stream: Any) -> int:
    """Returns the number of columns of a terminal, and 80 if it has none."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def cell(value: float | None, *, signed: bool = False) -> str:
    """Returns a figure in a column of its own, with three decimals if there is room for them.

    Example:
        >>> cell(0.1234), cell(-12.5, signed=True), cell(123456.0), cell(None)
        ('    0.123', '  -12.500', '  1.2e+05', '        -')
    """
    if value is None:
        return "-".rjust(CELL)
    sign = "+" if signed else ""
    text = f"{value:{sign}.3f}" if 0.0005 <= abs(value) < 1000 or value == 0 else f"{value:{sign}.2g}"
    return text.rjust(CELL)


class Terminal(TrainerCallback):
    """Shows the progress of training on a stream.

    Args:
        stream: Where lines go. Standard output, unless a test passes another.
        bar: Whether there may be a progress bar. It needs a terminal, too.
    """

    def __init__(self, stream: Any = None, *, bar: bool = True) -> None:
        self.stream = stream or sys.stdout
        self.has_bar = bar and self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self._bar: tqdm[Any] | None = None
        self._known: dict[str, float] = {}
        self._drawn = 0.0
        self._titled = False
        self._began = 0.0
        self._first_step = 0
        self._evaluated = 0
        self._ended = False

    # ---- lines ---------------------------------------------------------------------------------------------------

    def write(self, line: str) -> None:
        """Prints a line above the bar."""
        if self._bar is None:
            print(shown(line), file=self.stream, flush=True)
        else:
            self._bar.write(shown(line), file=self.stream)

    def verdict(self, line: str) -> None:
        """Prints a verdict, as wide as the terminal, in bold yellow if it has colours."""
        if not self.stream.isatty():
            self.write(line)
            return
        lines = textwrap.wrap(shown(line), max(20, width_of(self.stream) - 1), subsequent_indent="  ")
        begin, end = ("\x1b[1;33m", "\x1b[0m") if has_color(self.stream) else ("", "")
        print_line = print if self._bar is None else self._bar.write
        for each in lines:
            print_line(f"{begin}{each}{end}", file=self.stream)
        self.stream.flush()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        logs = _with_margins(logs)
        # Before the first update nothing has changed. Zeros that stay until the next measurement would say that
        # nothing does.
        if state.global_step:
            self._known |= {name: logs[name] for figure in FIGURES for name in figure.names if name in logs}
        if "train_runtime" in logs:
            return
        # The last step is measured, and may be no log step.
        is_last = state.global_step >= state.max_steps and "probe/margin" in logs and not self._ended
        if "loss" in logs or is_last:
            self._ended = state.global_step >= state.max_steps
            self._line(f"{state.global_step}/{state.max_steps}", logs, state.max_steps)
        for prefix in _evaluations(logs):
            measured = {
                name.removeprefix(prefix): value for name, value in logs.items() if name.startswith(prefix)
            }
            measured = dict(_with_margins(measured))
            name = prefix.removeprefix("eval_").rstrip("_") or "eval"
            self._line(name, measured, state.max_steps, known={})
        self._show(state)

    def _line(
        self, label: str, logs: Mapping[str, Any], max_steps: int, known: Mapping[str, float] | None = None
    ) -> None:
        width = max(6, len(f"{max_steps}/{max_steps}"))
        columns = self._columns(width)
        if not self._titled:
            self.write("step".rjust(width) + "".join(figure.title.rjust(CELL) for figure in columns))
            self._titled = True
        values = (_value(figure, logs, self._known if known is None else known) for figure in columns)
        cells = (cell(value, signed=figure.signed) for value, figure in zip(values, columns, strict=True))
        self.write(label[:width].rjust(width) + "".join(cells))

    def _columns(self, width: int) -> Sequence[Figure]:
        """Returns the figures for which there is room."""
        if not self.stream.isatty():
            return FIGURES
        return FIGURES[: max(1, (width_of(self.stream) - 1 - width) // CELL)]

    # ---- the bar -------------------------------------------------------------------------------------------------

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The bar begins with the first step, because what is said before does not know of it.
        if self._bar is None and state.is_world_process_zero and self.has_bar:
            self._began, self._first_step = time.monotonic(), state.global_step
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                file=self.stream,
                dynamic_ncols=True,
                leave=False,
                bar_format="{desc}",
            )
            self._show(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._evaluated = 0
        if self._bar is not None:
            self._bar.n = state.global_step
            self._show(state)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._evaluated += 1
        if self._bar is not None:
            self._show(state, doing=f"evaluating, batch {self._evaluated}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show(self, state: TrainerState, doing: str = "") -> None:
        """Writes the bar anew: what is done, time left, and the figures for which there is room."""
        if self._bar is None:
            return
        done = state.global_step - self._first_step
        parts = [f"{state.global_step}/{state.max_steps}"]
        if doing:
            parts.append(doing)
        elif done:
            left = (time.monotonic() - self._began) / done * (state.max_steps - state.global_step)
            parts.append(f"{tqdm.format_interval(left)} left")
        for figure in FIGURES[:3]:
            if (value := _value(figure, self._known, self._known)) is not None:
                parts.append(f"{figure.title} {value:{'+' if figure.signed else ''}.3g}")
        room = width_of(self.stream) - 1
        while len("  ".join(parts)) > room and len(parts) > 1:
            parts.pop()
        text = "  ".join(parts)
        has_room = room - len(text) >= SHORTEST_BAR
        self._bar.bar_format = "{desc}  |{bar}|" if has_room else "{desc}"
        self._bar.set_description_str(text, refresh=False)
        # A terminal is written to ten times a second at most.
        now = time.monotonic()
        if now - self._drawn > 0.1 or state.global_step >= state.max_steps:
            self._drawn = now
            self._bar.refresh()


def _value(figure: Figure, logs: Mapping[str, Any], known: Mapping[str, float]) -> float | None:
    """Returns the figure of a record: of the probe set if that is measured at all, else of the record itself."""
    for name in figure.names:
        if name.startswith(("probe/", "kl/")) and name in known:
            return known[name]
        if name in logs:
            return float(logs[name])
    return None


def _with_margins(logs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a record with the difference of the sides' log-ratios (nats), which rewards have times β."""
    chosen, rejected = "logratios/chosen", "logratios/rejected"
    if chosen not in logs or rejected not in logs:
        return logs
    return {**logs, "logratios/margins": logs[chosen] - logs[rejected]}


def _evaluations(logs: Mapping[str, Any]) -> list[str]:
    """Returns the prefixes of the evaluations in a record: `eval_`, or `eval_near_` of the set `near`."""
    return [
        name.removesuffix("runtime")
        for name in logs
        if name.startswith("eval_") and name.endswith("_runtime")
    ]


def hush(trainer: InfoPOTrainer) -> None:
    """Takes away what transformers prints of its own accord: dictionaries, and bars between them."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)


def attach(trainer: InfoPOTrainer, stream: Any = None) -> Terminal:
    """Shows the training of a trainer on standard output, with its verdicts among the lines."""
    hush(trainer)
    terminal = Terminal(stream, bar=not trainer.args.disable_tqdm)
    trainer.add_callback(terminal)
    judge_of(trainer).announce = terminal.verdict
    return terminal


def judge_of(trainer: InfoPOTrainer) -> Judge:
    """Returns the callback that judges the run of a trainer."""
    return next(each for each in trainer.callback_handler.callbacks if isinstance(each, Judge))


@contextlib.contextmanager
def quiet_bars() -> Iterator[None]:
    """Within it, transformers' bars of loading and saving appear after a second, on terminals only, and do not stay."""

    def later(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return factory(*args, **{"disable": None, **kwargs, "delay": 1.0, "leave": False})

    before = set_tqdm_hook(later)
    try:
        yield
    finally:
        set_tqdm_hook(before)


@contextlib.contextmanager
def logging_above(terminal: Terminal) -> Iterator[None]:
    """Within it, warnings in the log are written above the bar, and do not break it."""
    if not terminal.has_bar:
        yield
        return
    with logging_redirect_tqdm([logging.getLogger(), logging.getLogger("transformers")]):
        yield
