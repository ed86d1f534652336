"""`infopo init`: a commented recipe for the user's case, written after a look at the data and at the machine."""

import shlex
import sys
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from infopo.data.counts import DataCounts
from infopo.data.sources import read_rows
from infopo.errors import ConfigError, InfoPOError
from infopo.machine import BYTES_PER_PARAMETER, Accelerators, accelerators, number_of_parameters
from infopo.output import counted, say
from infopo.preflight import is_installed, model_problem, preflight
from infopo.scaffold import (
    KIND_OF_SHAPE,
    KINDS,
    METHODS,
    PARALLEL,
    Case,
    launcher,
    recipe_for,
    without_sharding,
)
from infopo.workflows.new_file import write_new

ROWS_READ = 1280
"""Rows that are read to see what the data are. Fewer than this are all of them."""


def init(path: str | Path, given: Mapping[str, Any], ask: Callable[[str], str] | None = None) -> None:
    """Writes a recipe to a new file, and says what stands between it and a run.

    Args:
        path: The recipe's file, which must not exist.
        given: Settings of `Case` that are known. Those that are missing or None are asked for, or take their defaults.
        ask: Returns the answer to a question, or None if nobody can be asked.

    Raises:
        ConfigError: The file is there already, settings do not go together, or what is needed is not given.
    """
    path = Path(path)
    if path.exists():
        raise ConfigError(f"{path} is there already, and is not overwritten; name another file")
    settings = {name: value for name, value in given.items() if value is not None}
    if ask is None and (missing := [f"--{name}" for name in ("model", "data") if name not in settings]):
        raise ConfigError(
            f"{' and '.join(missing)}: {'is' if len(missing) == 1 else 'are'} required where nobody can be asked"
        )
    questions = _Questions(settings, ask)
    questions.text("model", "Model to train (folder or hub name of an SFT model)", "lab:policy")
    if ask is not None and (problem := model_problem(settings["model"])):
        say(f"to mend: {problem}")
    questions.text("data", "Preference data (file, folder, glob or hub name)", "lab:verified")
    seen = _look_at(settings["data"])
    say(seen.line)
    settings = seen.settings | settings
    questions.settings = settings
    if "kind" not in settings:
        questions.choice("kind", "Kind of data", tuple(KINDS))
    questions.choice("method", "What to train", METHODS)
    machine = accelerators()
    if machine.count > 1:
        questions.choice("parallel", f"How {machine.count} devices share the model", PARALLEL)
    questions.text("objective", "Objective (`infopo objectives` lists them)", "infopo")
    questions.text("output_dir", "Run directory", f"runs/{path.stem}")
    case = Case(devices=max(1, machine.count), bf16=machine.bf16, **settings)
    write_new(path, recipe_for(case, path.name))
    say(f"{path} is written: {case.objective}, {case.method}, {case.kind} data, {_described(machine)}")
    for line in (
        *(f"note: {note}" for note in _notes(case, machine, seen.settings)),
        *(f"to mend: {p}" for p in _problems(path)),
    ):
        say(line)
    name = shlex.quote(str(path))
    say(f"Next: infopo check {name}{without_sharding(case)}, then {launcher(case)} train {name}")


class _Questions:
    """Asks for what is not given. Each answer that is empty is the default, and a wrong one is asked for again."""

    def __init__(self, settings: dict[str, Any], ask: Callable[[str], str] | None) -> None:
        self.settings = settings
        self._ask = ask

    def text(self, name: str, question: str, default: str) -> None:
        if name not in self.settings:
            answer = self._ask(f"{question} [{default}]: ").strip() if self._ask else ""
            self.settings[name] = answer or default

    def choice(self, name: str, question: str, choices: tuple[str, ...]) -> None:
        while name not in self.settings:
            self.text(name, f"{question} ({', '.join(choices)})", choices[0])
            if self._ask and self.settings[name] not in choices:
                say(f"expected one of {', '.join(choices)}")
                del self.settings[name]


class _Seen:
    """What the first rows of the data tell: settings of `Case`, and a line to show."""

    def __init__(self, settings: dict[str, Any], line: str) -> None:
        self.settings = settings
        self.line = line


def _look_at(source: str) -> _Seen:
    if source in ("lab:verified", "lab:graded"):
        return _Seen(
            {"kind": "paired", "is_text": True, "eval_split": "test"}, f"{source}: paired data of the lab"
        )
    if not Path(source).expanduser().exists() and "*" not in source:
        return _Seen({}, f"{source}: no file here, so its rows are not looked at (a name on the hub?)")
    counts = DataCounts(on_bad_row="skip")
    try:
        rows = list(islice(read_rows(source, counts), ROWS_READ))
    except InfoPOError as error:
        return _Seen({}, f"{source}: the rows cannot be read yet: {error}")
    shape = next(iter(counts.shapes.values()), "").partition(" ")[0]
    kind = KIND_OF_SHAPE.get(shape, "paired")
    number = counted(len(rows), "row") if len(rows) < ROWS_READ else f"{ROWS_READ} rows or more"
    settings: dict[str, Any] = {"kind": kind, "is_text": any(isinstance(row.prompt, str) for row in rows)}
    if len(rows) < ROWS_READ:
        settings["rows"] = len(rows)
    return _Seen(settings, f"{source}: {number}, {kind}: {KINDS[kind]} (shape {shape})")


def _described(machine: Accelerators) -> str:
    if not machine.count:
        return "no accelerator here"
    return f"{machine.count} x {machine.names[0]}{'' if machine.bf16 else ', without bfloat16'}"


def _notes(case: Case, machine: Accelerators, seen: Mapping[str, Any]) -> list[str]:
    """Returns what of this machine does not suit the recipe, which may be meant for another one."""
    notes = []
    if case.method == "qlora" and not machine.count:
        notes.append("weights of 4 bits need an accelerator, and there is none here")
    if case.parallel != "none" and machine.count < 2:
        notes.append(
            f"{case.parallel} shares a model out over several accelerators; there are {machine.count} here"
        )
    if case.parallel == "deepspeed" and not is_installed("deepspeed"):
        notes.append("deepspeed is not installed: pip install deepspeed")
    if not seen:
        notes.append(f"the rows could not be looked at: the data are taken for {case.kind} (--data-kind)")
    elif case.is_text:
        notes.append("prompts are plain text: set data.as_chat to true if the model is a chat model")
    parameters = number_of_parameters(Path(case.model).expanduser()) if Path(case.model).is_dir() else None
    if parameters:
        taken = parameters * BYTES_PER_PARAMETER[case.method]
        what = "weights, gradients and Adam's moments" if case.method == "full" else "the frozen weights"
        there = (
            f"; a device here has {machine.memory[0] / 1e9:.1f} GB"
            if machine.count and machine.memory[0]
            else ""
        )
        notes.append(f"{what} take about {taken / 1e9:.2g} GB in all, and activations more{there}")
    return notes


def _problems(path: Path) -> list[str]:
    """Returns what keeps the recipe from running here, as `infopo check` would say it first."""
    try:
        preflight(path)
    except ConfigError as error:
        return list(error.problems)
    except InfoPOError as error:
        return [str(error)]
    return []


def asker() -> Callable[[str], str] | None:
    """Returns what asks the person at the terminal, or None if there is none."""

    def ask(question: str) -> str:
        try:
            return input(question)
        except EOFError as error:
            raise ConfigError("the answers ended before the questions; nothing is written") from error

    return ask if sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty() else None
