"""`infopo sweep`: what it refuses, what runs it makes, and that a stopped one goes on."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from infopo.cli import main
from infopo.config import parse_recipe, to_yaml
from infopo.errors import ConfigError
from infopo.report.grouped import grouped_table
from infopo.report.reading import ReportRun
from infopo.runs import Run
from infopo.sweep_grid import Cell, cells, grid_problems
from infopo.yaml_tree import Problems, apply_override
from worlds import interruptible

RECIPE: dict[str, Any] = {
    "model": "lab:policy",
    "data": {"path": "lab:verified", "limit": 32},
    "reference": {"store": "off"},
    "train": {
        "max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "use_cpu": True, "probe_size": 4,
        "anchor_size": 0, "gradient_size": 0, "save_strategy": "steps", "save_steps": 1, "disable_tqdm": True,
    },
    "sweep": {"objective": ["infopo", "sft"], "train.seed": [1, 2]},
}  # fmt: skip


def write(folder: Path, **changes: Any) -> str:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "output_dir": str(folder / "runs"), **changes}))
    return str(path)


def test_all_combinations_are_made_and_the_last_key_varies_fastest() -> None:
    found = cells({"objective": ["infopo", "sft"], "train.learning_rate": [1e-6, 5e-6], "train.seed": [1, 2]})
    assert [dict(cell.values) for cell in found][:3] == [
        {"objective": "infopo", "train.learning_rate": 1e-6, "train.seed": 1},
        {"objective": "infopo", "train.learning_rate": 1e-6, "train.seed": 2},
        {"objective": "infopo", "train.learning_rate": 5e-6, "train.seed": 1},
    ]
    assert len({cell.name for cell in found}) == 8
    assert all(re.fullmatch(r"[\w.+-]+", cell.name) for cell in found)
    assert len({cell.group for cell in found}) == 4  # seeds share a group


def test_a_sweep_survives_the_written_recipe() -> None:
    recipe = parse_recipe(yaml.safe_dump({**RECIPE, "output_dir": "runs"}), source="sweep.yaml")
    assert recipe.sweep == RECIPE["sweep"]
    assert parse_recipe(to_yaml(recipe), source="sweep.yaml") == recipe


def test_an_override_changes_the_values_of_one_key() -> None:
    text = yaml.safe_dump({**RECIPE, "output_dir": "runs"})
    recipe = parse_recipe(
        text, source="sweep.yaml", overrides=["sweep.train.seed=[7]", "sweep.train.max_steps=[1, 2]"]
    )
    assert recipe.sweep == {"objective": ["infopo", "sft"], "train.seed": [7], "train.max_steps": [1, 2]}


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"train.seed": 1}, r"sweep\.train\.seed.*expected a list of values, got 1"),
        ({"train.seed": []}, r"sweep\.train\.seed.*expected a list of values"),
        ({"train.seed": [1, 1]}, r"sweep\.train\.seed.*has a value twice"),
        ({"output_dir": ["a", "b"]}, r"sweep\.output_dir.*cannot be swept"),
        ({"train.resume_from_checkpoint": [True]}, "cannot be swept"),
        ([1, 2], "sweep.*expected keys of the recipe"),
        ({}, "sweep.*expected keys of the recipe"),
    ],
)
def test_a_wrong_section_is_refused_by_its_key(tmp_path: Path, sweep: Any, message: str) -> None:
    text = yaml.safe_dump({**RECIPE, "output_dir": str(tmp_path / "runs"), "sweep": sweep})
    with pytest.raises(ConfigError, match=message):
        parse_recipe(text, source="sweep.yaml")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=90),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc_", min_size=1), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(value=VALUES)
def test_a_value_reaches_its_run_whole(value: Any) -> None:
    tree: dict[str, Any] = {}
    problems = Problems("sweep.yaml")
    for override in Cell("run", {"train.note": value}).overrides:
        apply_override(tree, override, problems)
    assert not problems
    assert tree == {"train": {"note": value}}


def test_long_values_that_differ_at_their_ends_are_two_runs() -> None:
    paths = [f"/data/{'x' * 200}/{end}.jsonl" for end in "ab"]
    assert list(grid_problems({"data.path": paths})) == []
    names = [cell.name for cell in cells({"data.path": paths})]
    assert len(set(names)) == 2
    assert all(len(name.encode()) <= 120 for name in names)


def test_two_values_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="would both be written to"):
        cells({"data.path": ["a/b.jsonl", "a b.jsonl"]})


def test_every_combination_is_judged_before_the_first_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, sweep={"objective": ["infopo", "dppo"], "train.learning_rate": [1e-6, -1.0]})
    assert main(["sweep", path]) == 2
    said = capsys.readouterr().err
    assert "dppo-learning_rate" in said
    assert "did you mean" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["train", "check"])
def test_other_commands_name_the_one_for_sweeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert main([command, write(tmp_path)]) == 2
    assert "infopo sweep RECIPE" in capsys.readouterr().err


def test_a_recipe_without_the_section_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", write(tmp_path, sweep=None)]) == 2
    assert "sweep: is required" in capsys.readouterr().err


def run_with(**metrics: float) -> ReportRun:
    records = [{"step": 1, **metrics}]
    return ReportRun("name", Run(Path("name"), metrics=records), "finished")


def test_the_table_has_means_and_students_intervals_over_seeds() -> None:
    """Of 1, 2, 3: mean 2, deviation 1, t(2, 0.975) = 4.3027, so ± 4.3027/√3 = 2.484."""
    runs = [run_with(**{"kl/reverse": value}) for value in (1.0, 2.0, 3.0, 5.0)]
    lines = grouped_table(runs, ["a", "a", "a", "b"]).splitlines()
    assert lines[0] == "| settings | runs | Reverse KL (nats per response) |"
    assert lines[2] == "| a | 3 | 2.00 ± 2.48 |"
    assert lines[3].startswith("| b | 1 | 5.00 |")


def started(path: str, *arguments: str) -> subprocess.Popen[bytes]:
    with interruptible():
        return subprocess.Popen(
            [sys.executable, "-m", "infopo", "sweep", path, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    output: str


def finished(path: str, *arguments: str) -> Finished:
    process = started(path, *arguments)
    output, _ = process.communicate(timeout=500)
    return Finished(process.returncode, output.decode())


def weights(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in folder.glob("*/model.safetensors")}


@pytest.mark.long
def test_a_killed_sweep_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    of_objectives = {"objective": ["infopo", "sft"]}
    assert finished(write(whole, sweep=of_objectives)).code == 0
    path = write(parts, sweep=of_objectives)
    first, second = parts / "runs" / "infopo", parts / "runs" / "sft"
    killed = started(path)
    deadline = time.monotonic() + 300
    while not (second / "checkpoint-1").exists():
        assert time.monotonic() < deadline
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = (first / "sweep.json").stat().st_mtime_ns
    again = finished(path)
    assert again.code == 0, again.output
    assert "2 runs, 1 of which are finished" in again.output
    assert (first / "sweep.json").stat().st_mtime_ns == before  # was not trained again
    assert weights(parts / "runs") == weights(whole / "runs")
    assert len(weights(parts / "runs")) == 2
    for name in ("sweep.md", "report.html"):
        assert (parts / "runs" / name).is_file()
    # With another rate, what is finished is refused by name and left as it was.
    refused = finished(path, "train.learning_rate=1e-3")
    assert refused.code == 2
    assert "infopo: was trained with other settings" in refused.output
    assert weights(parts / "runs") == weights(whole / "runs")


@pytest.mark.long
def test_runs_end_with_a_sweep_that_is_killed_and_go_on_with_the_next(tmp_path: Path) -> None:
    train = {**RECIPE["train"], "max_steps": 24}
    path = write(tmp_path, sweep={"train.learning_rate": [1e-5, 1e-4]}, train=train)
    killed = started(path, "--workers", "2")
    deadline = time.monotonic() + 300
    while not list((tmp_path / "runs").glob("*/checkpoint-*")):
        assert time.monotonic() < deadline
        assert killed.poll() is None
        time.sleep(0.02)
    sweep = psutil.Process(killed.pid)
    runs = sweep.children()
    begun = sweep.children(recursive=True)  # a run may just be asking git for the commit
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert len(runs) == 2
    _, alive = psutil.wait_procs(begun, timeout=30)
    assert not alive
    again = finished(path, "--workers", "2")
    assert again.code == 0, again.output
    alone = tmp_path / "alone"
    alone.mkdir()
    assert finished(write(alone, sweep={"train.learning_rate": [1e-4]}, train=train)).code == 0
    (name, expected), *_ = weights(alone / "runs").items()
    assert weights(tmp_path / "runs")[name] == expected


@pytest.mark.long
def test_runs_side_by_side_are_those_that_follow_each_other_and_a_failure_stops_no_other(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, sweep={"train.learning_rate": [1e-5, 1e30, 1e-4]})
    found = finished(path, "--workers", "2")
    assert found.code == 2
    assert "1 of 3 runs failed" in found.output
    assert "learning_rate-1e+30" in found.output
    assert "is NaN or infinite" in (tmp_path / "runs" / "learning_rate-1e+30.log").read_text()
    assert len(list((tmp_path / "runs").glob("*/sweep.json"))) == 2
    alone = tmp_path / "alone"
    alone.mkdir()
    assert finished(write(alone, sweep={"train.learning_rate": [1e-4]})).code == 0
    (name, expected), *_ = weights(alone / "runs").items()
    assert weights(tmp_path / "runs")[name] == expected
