"""`infopo sweep` trains a recipe with every combination of some values, and puts the runs side by side.

Each run is an ordinary run directory. One that is finished has a file which says so and with which settings, so that a
killed command goes on where it stood.
"""

import gc
import hashlib
import math
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue

import torch

from infopo import run_state
from infopo.build import build_arguments, train_fields
from infopo.config import Recipe, load_recipe, to_yaml
from infopo.errors import ConfigError, InfoPOError, TrainingError
from infopo.evaluation.results import folder_of_run
from infopo.output import counted, say
from infopo.preflight import check_writable, preflight
from infopo.report.grouped import grouped_table
from infopo.report.reading import read_runs
from infopo.runs import EVALUATION, read_object, write_json_atomic, write_text_atomic
from infopo.sweep_grid import Cell, cells
from infopo.workers import Commands
from infopo.workflows.compare import compare
from infopo.workflows.report import report_if_possible
from infopo.workflows.train import train_recipe

MARKER = "sweep.json"
"""File of a finished run: its values, and a hash of its whole recipe."""

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Planned:
    """One run of a sweep.

    Attributes:
        cell: Its values.
        recipe: Its whole recipe.
        command: Arguments of `infopo train` that mean the same.
    """

    cell: Cell
    recipe: Recipe
    command: Sequence[str]

    @property
    def folder(self) -> Path:
        """Its run directory."""
        return Path(self.recipe.output_dir)

    @property
    def digest(self) -> str:
        """Hash of its recipe, wherever it is written."""
        recipe = replace(self.recipe.without_resume(), output_dir="run")
        return hashlib.sha256(to_yaml(recipe).encode()).hexdigest()

    @property
    def is_finished(self) -> bool:
        """Whether it was trained to its end.

        Raises:
            ConfigError: It was, with other settings.
        """
        done = read_object(self.folder / MARKER)
        if done is not None and done.get("recipe_sha256") != self.digest:
            raise ConfigError(
                f"{self.folder}: was trained with other settings; name another output_dir, or remove the folder"
            )
        return done is not None

    def note_finished(self) -> None:
        """Writes down that it was trained to its end."""
        values = {key: str(value) for key, value in self.cell.values.items()}
        write_json_atomic(
            self.folder / MARKER,
            {"schema_version": SCHEMA_VERSION, "values": values, "recipe_sha256": self.digest},
        )


def sweep(recipe_path: str | Path, overrides: Sequence[str] = (), *, workers: int | None = None) -> Path:
    """Trains the runs that the section `sweep` of a recipe names, or goes on where a killed command stood.

    Args:
        recipe_path: The recipe.
        overrides: See `parse_recipe`.
        workers: Number of runs at a time, each on an accelerator of its own. By default there are as many as
            accelerators; without one, runs follow each other in this process.

    Returns:
        `output_dir`, with a run directory per combination, `sweep.md` (a table, means over seeds), `report.html`, and
        `comparison.md` if the runs evaluate tasks.

    Raises:
        ConfigError: A combination is no valid recipe. Nothing is trained then.
        TrainingError: Some runs failed. The others are trained, and the same command tries those again.
        KeyboardInterrupt: The user pressed Ctrl-C. The same command continues.
    """
    if os.environ.get("WORLD_SIZE", "") not in ("", "1"):
        raise ConfigError("infopo sweep starts its own processes; start it once, without torchrun")
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers: expected at least 1, got {workers}")
    base = preflight(recipe_path, overrides, makes_a_run=False, section="sweep")
    folder = Path(base.output_dir)
    check_writable(folder, "output_dir")
    run_state.refuse_to_hold_runs(folder)
    if isinstance(base.train.get("resume_from_checkpoint"), str):
        raise ConfigError("train.resume_from_checkpoint: a sweep goes on by itself where it stood; remove it")
    assert base.sweep is not None
    say(
        f"{folder}: {counted(math.prod(map(len, base.sweep.values())), 'combination')}, each of which is judged first"
    )
    planned = _planned(base, str(recipe_path), overrides)
    missing = [each for each in planned if not each.is_finished]
    say(f"{folder}: {counted(len(planned), 'run')}, {len(planned) - len(missing)} of which are finished")
    count = min(workers or max(torch.cuda.device_count(), 1), max(len(missing), 1))
    with run_state.in_use(folder):
        try:
            failed = _one_by_one(missing) if count == 1 else _side_by_side(missing, count)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command goes on where this one stood") from None
        _show(folder, [each for each in planned if each.is_finished])
    if failed:
        raise TrainingError(
            f"{len(failed)} of {counted(len(planned), 'run')} failed, and the same command tries them again: "
            + ", ".join(failed)[:1000]
        )
    return folder


def _planned(base: Recipe, path: str, overrides: Sequence[str]) -> list[Planned]:
    """Returns the runs, each of which is judged as `infopo train` would judge it."""
    assert base.sweep is not None
    found, problems = [], []
    for cell in cells(base.sweep):
        output = Path(base.output_dir) / cell.name
        own = [*overrides, *cell.overrides, "sweep=null", f"output_dir={output}"]
        try:
            preflight(path, own, makes_a_run=False)
            recipe = load_recipe(path, own, train_fields())
            build_arguments(recipe)
        except InfoPOError as error:
            told = error.problems if isinstance(error, ConfigError) else [str(error)]
            problems += [f"{cell.name}: {problem}" for problem in told]
            continue
        found.append(Planned(cell, recipe, [path, *own]))
    if problems:
        raise ConfigError(problems[:10], path)
    return found


def _one_by_one(missing: Sequence[Planned]) -> list[str]:
    """Trains in this process. Returns the names of runs that failed, which it says why."""
    failed = []
    for number, each in enumerate(missing, 1):
        say(f"run {number} of {len(missing)}: {each.cell.name}")
        recipe = each.recipe
        if run_state.holds_run(each.folder):
            recipe = replace(recipe, train={**recipe.train, "resume_from_checkpoint": True})
        try:
            train_recipe(recipe)
            each.note_finished()
        except InfoPOError as error:
            say(f"{each.cell.name}: {error}", file=sys.stderr)
            failed.append(each.cell.name)
        gc.collect()
    return failed


def _side_by_side(missing: Sequence[Planned], count: int) -> list[str]:
    """Trains in processes, each with one accelerator. Returns the names of runs that failed, which it says why."""
    devices: SimpleQueue[int] = SimpleQueue()
    for device in range(count):
        devices.put(device)

    def run(each: Planned) -> bool:
        device = devices.get()
        try:
            return _in_a_process(each, device, commands)
        finally:
            devices.put(device)

    # Commands end first, for which the threads wait.
    with ThreadPoolExecutor(count) as pool, Commands() as commands:
        try:
            succeeded = list(pool.map(run, missing))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [each.cell.name for each, well in zip(missing, succeeded, strict=True) if not well]


def _in_a_process(each: Planned, device: int, commands: Commands) -> bool:
    """Runs `infopo train`, whose output goes to a file. Returns whether it went well."""
    each.folder.parent.mkdir(parents=True, exist_ok=True)
    log = each.folder.with_suffix(each.folder.suffix + ".log")
    say(f"{each.cell.name}: begins, its output is in {log}")
    command = ["train", *each.command]
    if run_state.holds_run(each.folder):
        command.append("train.resume_from_checkpoint=true")
    environment = dict(os.environ)
    if torch.cuda.device_count():
        environment["CUDA_VISIBLE_DEVICES"] = _visible(device, environment)
    with log.open("ab") as output:
        status = commands.run(command, output, environment)
    if status == 0:
        each.note_finished()
        say(f"{each.cell.name}: is trained")
        return True
    if not commands.is_ended:
        say(f"{each.cell.name}: exit status {status}, see {log}", file=sys.stderr)
    return False


def _visible(device: int, environment: dict[str, str]) -> str:
    """Returns the name of a device among those that this process may use."""
    names = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return names[device] if len(names) > device and names[device] else str(device)


def _show(folder: Path, finished: Sequence[Planned]) -> None:
    """Writes table, report and comparison of the runs that are finished."""
    if not finished:
        return
    directories = [str(each.folder) for each in finished]
    table = grouped_table(read_runs(directories), [each.cell.group for each in finished])
    write_text_atomic(folder / "sweep.md", table)
    say(table.rstrip(), f"written: {folder / 'sweep.md'}")
    if others := sorted(
        {mark.parent for mark in folder.glob(f"*/{MARKER}")} - {each.folder for each in finished}
    ):
        names = ", ".join(each.name for each in others)
        say(
            f"left out, because the recipe has their values no longer: {names}; `infopo report` takes their folders"
        )
    if len(finished) > 1 and all(_is_evaluated(each.folder) for each in finished):
        compare(directories, format="markdown", output=folder / "comparison.md")
    report_if_possible(directories, folder / "report.html")


def _is_evaluated(run_directory: Path) -> bool:
    return (folder_of_run(run_directory) / EVALUATION).is_file()
