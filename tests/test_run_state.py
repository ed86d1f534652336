"""Who may use a run directory, and which of its checkpoints are sound. Real processes, real damage."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from infopo import run_state
from infopo.errors import CheckpointError, RecipeError

HOLDER = """
import sys, time
from infopo.run_state import in_use
with in_use(sys.argv[1]):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def hold(folder: Path, seconds: float = 60) -> "subprocess.Popen[str]":
    """A process that uses the folder."""
    command = [sys.executable, "-c", HOLDER, str(folder), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


# --- the lock ---


def test_a_second_process_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
    process = hold(tmp_path / "run")
    try:
        with (
            pytest.raises(RecipeError, match=rf"output_dir: .*run is in use by .*process {process.pid} on"),
            run_state.in_use(tmp_path / "run"),
        ):
            pass
    finally:
        process.kill()
        process.wait()


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    process = hold(tmp_path / "run")
    process.send_signal(signal.SIGKILL)
    process.wait()
    with run_state.in_use(tmp_path / "run"):
        pass


def test_the_lock_is_not_inherited_by_processes_that_its_holder_has_forked(tmp_path: Path) -> None:
    """Workers of a data loader outlive a parent that was killed by some seconds."""
    script = """
import os, sys, time
from infopo.run_state import in_use
with in_use(sys.argv[1]):
    if not os.fork():
        print(os.getpid(), flush=True)  # not before it has let go of what it inherited
    time.sleep(60)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    try:
        with run_state.in_use(tmp_path):
            os.kill(child, 0)  # it is still there
    finally:
        os.kill(child, signal.SIGKILL)


def test_the_same_process_may_enter_again_and_leaves_nothing(tmp_path: Path) -> None:
    with run_state.in_use(tmp_path):
        with run_state.in_use(tmp_path):
            assert (tmp_path / run_state.LOCK).read_text().startswith(f"process {os.getpid()} on ")
        assert (tmp_path / run_state.LOCK).exists()
    assert list(tmp_path.iterdir()) == []


def test_files_that_a_killed_run_was_writing_are_removed_by_the_next(tmp_path: Path) -> None:
    killed = "import sys; from infopo import durable; from pathlib import Path\n"
    killed += "def parts():\n    yield b'half'\n    import os; os.kill(os.getpid(), 9)\n"
    killed += "durable.write(Path(sys.argv[1]) / 'recipe.yaml', parts())"
    assert subprocess.run([sys.executable, "-c", killed, str(tmp_path)], check=False).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    with run_state.in_use(tmp_path):
        (tmp_path / "recipe.yaml").touch()
        (tmp_path / ".half.tmp").touch()
        with run_state.in_use(tmp_path):  # which may be writing itself
            assert sorted(path.name for path in tmp_path.iterdir()) == [".half.tmp", ".lock", "recipe.yaml"]


def test_of_many_that_start_at_once_one_gets_the_directory_and_then_the_next(tmp_path: Path) -> None:
    """Each appends to one file while it holds the lock; the file's removal by one must not let two others in."""
    script = """
import sys, time
from pathlib import Path
from infopo.errors import RecipeError
from infopo.run_state import in_use
folder, own, done = Path(sys.argv[1]), sys.argv[2], 0
while done < 40:
    try:
        with in_use(folder):
            mark = folder / "busy"
            mark.touch(exist_ok=False)  # fails if another is within
            mark.unlink()
            done += 1
    except RecipeError:
        time.sleep(0.001)
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), str(number)]) for number in range(3)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]


def test_a_file_in_place_of_the_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(RecipeError, match=r"output_dir: .*file cannot be made"),
        run_state.in_use(tmp_path / "file"),
    ):
        pass


# --- checkpoints ---


def checkpoint(run_dir: Path, step: int) -> Path:
    folder = run_dir / f"checkpoint-{step}"
    (folder / "adapter").mkdir(parents=True)
    (folder / run_state.STATE).write_text(json.dumps({"global_step": step}))
    (folder / "optimizer.pt").write_bytes(b"state" * 1000)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / run_state.IDENTITY).write_text(json.dumps({"objective": []}))
    run_state.seal(folder)
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink], ids=["cut", "flipped", "missing"])
@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", "adapter/adapter_model.safetensors"])
def test_any_damage_to_any_file_is_found_and_the_checkpoint_before_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: object
) -> None:
    sound, newest = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    assert run_state.find(True, tmp_path) == newest
    damage(newest / name)  # type: ignore[operator]
    assert run_state.find(True, tmp_path) == sound
    assert f"{newest}" in caplog.text
    assert f"{sound} is taken instead" in caplog.text
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        run_state.find(str(newest), tmp_path)


def test_without_a_sound_checkpoint_the_newest_ones_fault_is_told(tmp_path: Path) -> None:
    for step in (1, 2):
        cut(checkpoint(tmp_path, step) / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"checkpoint-2/optimizer.pt: is damaged"):
        run_state.find(True, tmp_path)


def test_checkpoints_are_ordered_by_step_and_nothing_else_is_one(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", "checkpoint-11.old"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-12").touch()
    assert [path.name for path in run_state.checkpoints_in(tmp_path)] == ["checkpoint-10", "checkpoint-9"]
    assert run_state.checkpoints_in(tmp_path / "nowhere") == []


def test_metrics_of_a_run_that_saved_nothing_are_set_aside(tmp_path: Path) -> None:
    for text in ("one", "two"):
        (tmp_path / "metrics.jsonl").write_text(text)
        assert not run_state.holds_run(tmp_path)
        run_state.set_aside_metrics(tmp_path)
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"metrics.before-1.jsonl": "one", "metrics.before-2.jsonl": "two"}
    (tmp_path / "adapter_model.safetensors").touch()
    assert run_state.holds_run(tmp_path)
