"""The run directory: readable after a kill at any moment, strict JSON, and the same hash for the same content."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infopo import runs
from infopo.errors import DataError
from infopo.runs import RunDirectoryError, RunWriter, read_run

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}


def steps_of(directory: Path) -> list[int]:
    return [record["step"] for record in read_run(directory).metrics]


@pytest.fixture
def ten_steps(tmp_path: Path) -> RunWriter:
    writer = RunWriter(tmp_path / "run")
    for step in range(1, 11):
        writer.append_metrics({"step": step, "loss": 1 / step})
    return writer


# --- writing and reading ---


def test_what_is_written_is_read(tmp_path: Path):
    writer = RunWriter(tmp_path / "deep" / "run")
    writer.write_recipe("output_dir: Läufe\n")
    writer.write_environment({"seed": 3})
    writer.write_evaluation({"accuracy": 0.5})
    writer.append_metrics({"step": 1, "loss": 0.25, "rewards/margins": 2})
    run = read_run(writer.directory)
    assert run == runs.Run(
        writer.directory,
        recipe="output_dir: Läufe\n",
        environment={"seed": 3},
        evaluation={"accuracy": 0.5},
        metrics=[{"step": 1, "loss": 0.25, "rewards/margins": 2}],
    )


def test_missing_files_are_none(ten_steps: RunWriter):
    run = read_run(ten_steps.directory)
    assert (run.recipe, run.environment, run.evaluation, run.lost_last_line) == (None, None, None, False)


def test_series_takes_records_that_hold_the_metric(tmp_path: Path):
    writer = RunWriter(tmp_path)
    for record in ({"step": 1, "loss": 3.0}, {"step": 1, "eval_loss": 2.0}, {"step": 2, "loss": 1.0}):
        writer.append_metrics(record)
    assert read_run(tmp_path).series("loss") == ([1, 2], [3.0, 1.0])
    assert read_run(tmp_path).series("absent") == ([], [])


def test_each_record_is_one_line_of_strict_json(tmp_path: Path):
    RunWriter(tmp_path).append_metrics(
        {"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "note": "x\ny"}
    )
    (line,) = (tmp_path / runs.METRICS).read_text().splitlines()
    strict = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict == {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity", "note": "x\ny"}


def test_non_finite_numbers_come_back_as_numbers(tmp_path: Path):
    RunWriter(tmp_path).append_metrics({"step": 1, "a": math.nan, "b": -math.inf})
    (record,) = read_run(tmp_path).metrics
    assert math.isnan(record["a"])
    assert record["b"] == -math.inf


def test_numpy_numbers_are_written_as_numbers(tmp_path: Path):
    RunWriter(tmp_path).append_metrics(
        {"step": 1, "a": np.float32(0.5), "b": np.int64(3), "c": np.float32("nan")}
    )
    assert json.loads((tmp_path / runs.METRICS).read_text()) == {"step": 1, "a": 0.5, "b": 3, "c": "NaN"}


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(TypeError, match="object has no place in JSON"):
        runs.to_json({"x": object()})


@pytest.mark.parametrize("record", [{}, {"step": 1.5}, {"step": None}])
def test_a_record_needs_an_integer_step(tmp_path: Path, record: dict):
    with pytest.raises(ValueError, match="integer step"):
        RunWriter(tmp_path).append_metrics(record)


# --- kills and resuming ---

APPEND_FOREVER = """
import itertools, sys
from infopo.runs import RunWriter
writer = RunWriter(sys.argv[1])
for step in itertools.count(1):
    writer.append_metrics({"step": step, "loss": 1 / step, "filler": "x" * (step % 5000)})
    if step == 50:
        print("going", flush=True)
"""


def test_killed_while_appending_leaves_a_readable_file(tmp_path: Path):
    child = subprocess.Popen(
        [sys.executable, "-c", APPEND_FOREVER, str(tmp_path)], env=ENVIRONMENT, stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(signal.SIGKILL)
    steps = steps_of(tmp_path)
    assert len(steps) >= 50
    assert steps == list(range(1, len(steps) + 1))


REWRITE_FOREVER = """
import sys
from infopo.runs import write_json_atomic
for count in range(10**9):
    write_json_atomic(sys.argv[1], {"count": count, "filler": ["x" * 100] * 2000})
    if count == 5:
        print("going", flush=True)
"""


def test_killed_while_rewriting_leaves_the_old_or_the_new_file(tmp_path: Path):
    path = tmp_path / runs.EVALUATION
    child = subprocess.Popen(
        [sys.executable, "-c", REWRITE_FOREVER, str(path)], env=ENVIRONMENT, stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(signal.SIGKILL)
    assert json.loads(path.read_text())["count"] >= 5


def test_a_reader_of_the_old_file_sees_all_of_it_after_a_rewrite(tmp_path: Path):
    path = tmp_path / runs.RECIPE
    runs.write_text_atomic(path, "old " * 1000)
    with path.open() as reader:
        runs.write_text_atomic(path, "new")
        assert reader.read() == "old " * 1000
    assert path.read_text() == "new"


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_half_written_last_line_is_left_out_and_said(tmp_path: Path, cut: int):
    writer = RunWriter(tmp_path)
    writer.append_metrics({"step": 1})
    writer.append_metrics({"step": 2, "loss": 0.5})
    path = tmp_path / runs.METRICS
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut])
    run = read_run(tmp_path)
    only_the_line_end_is_missing = cut == 1
    assert [record["step"] for record in run.metrics] == ([1, 2] if only_the_line_end_is_missing else [1])
    assert run.lost_last_line == (
        not only_the_line_end_is_missing and cut < len('{"step": 2, "loss": 0.5}\n')
    )


def test_appending_after_a_kill_does_not_grow_onto_half_a_line(tmp_path: Path):
    (tmp_path / runs.METRICS).write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    RunWriter(tmp_path).append_metrics({"step": 2})
    assert (tmp_path / runs.METRICS).read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_truncation_drops_later_steps_and_the_half_line(ten_steps: RunWriter):
    path = ten_steps.directory / runs.METRICS
    path.write_bytes(path.read_bytes() + b'{"step": 11, "lo')
    before = path.read_bytes().splitlines(keepends=True)
    RunWriter(ten_steps.directory).truncate_metrics_after(4)
    assert path.read_bytes() == b"".join(before[:4])


def test_truncation_without_metrics_does_nothing(tmp_path: Path):
    RunWriter(tmp_path).truncate_metrics_after(3)
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.integers(0, 20), max_size=12), st.integers(0, 20), st.binary(max_size=5))
def test_resuming_writes_what_an_uninterrupted_run_writes(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], last: int, torn: bytes
):
    steps = sorted(steps)
    straight = RunWriter(tmp_path_factory.mktemp("straight"))
    resumed = RunWriter(tmp_path_factory.mktemp("resumed"))
    for step in steps:
        straight.append_metrics({"step": step})
        resumed.append_metrics({"step": step})
    path = resumed.directory / runs.METRICS
    path.write_bytes((path.read_bytes() if steps else b"") + torn.replace(b"\n", b""))
    again = RunWriter(resumed.directory)
    again.truncate_metrics_after(last)
    for step in steps:
        if step > last:
            again.append_metrics({"step": step})
    written = straight.directory / runs.METRICS
    assert path.read_bytes() == (written.read_bytes() if steps else b"")


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / runs.RECIPE
    runs.write_text_atomic(path, "old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(RunDirectoryError, match="No space left on device"):
        runs.write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# --- damage ---


@pytest.mark.parametrize("line", [b"{", b"[1]", b'{"loss": 1}', b'{"step": "1"}', b"\xff\xfe"])
def test_damage_before_the_last_line_names_its_line(tmp_path: Path, line: bytes):
    (tmp_path / runs.METRICS).write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl:2: is no JSON object with an integer step"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"), [("{", "is not valid JSON"), ("[]", "expected a JSON object, got list")]
)
@pytest.mark.parametrize("name", [runs.ENVIRONMENT, runs.EVALUATION])
def test_damaged_json_names_its_file(tmp_path: Path, name: str, text: str, said: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(RunDirectoryError, match=f"{name}: {said}"):
        read_run(tmp_path)


def test_recipe_that_is_not_utf8_names_its_file(tmp_path: Path):
    (tmp_path / runs.RECIPE).write_bytes(b"\xff")
    with pytest.raises(RunDirectoryError, match=r"recipe\.yaml: cannot be read"):
        read_run(tmp_path)


def test_a_folder_of_something_else_is_no_run(tmp_path: Path):
    with pytest.raises(RunDirectoryError, match="is no run directory: it holds no recipe"):
        read_run(tmp_path)


def test_a_missing_folder_is_no_run(tmp_path: Path):
    with pytest.raises(RunDirectoryError, match="is no directory"):
        read_run(tmp_path / "absent")


def test_a_run_cannot_be_written_where_a_file_stands(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="File exists"):
        RunWriter(tmp_path / "file")


def test_run_directory_error_is_one_of_ours():
    assert issubclass(RunDirectoryError, DataError)
