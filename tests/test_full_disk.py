"""A disk that is full, wherever in a run: one line that says what is kept; whole checkpoints stay, halves go."""

import json
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from infopo import run_state
from infopo.cli import main

RECIPE = """\
model: {name_or_path: lab:policy}
data: {path: pairs.jsonl, max_length: 64}
train: {per_device_train_batch_size: 4, logging_steps: 1, max_steps: 2, save_strategy: steps, save_steps: 1,
        activation_checkpointing: false, use_cpu: true, disable_tqdm: true, probe_size: 4, anchor_size: 2,
        anchor_tokens: 8, gradient_size: 1}
output_dir: run
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i}+1=?", "chosen": f"{i + 1}", "rejected": f"{i}"} for i in range(16)]
    Path("pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    Path("recipe.yaml").write_text(RECIPE)
    return tmp_path


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Within it, the system refuses to write more than so many bytes into one file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a run that was refused."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert len(lines[0]) < 500
    return lines[0]


def assert_nothing_half_written(run_dir: Path) -> None:
    assert not [path for path in run_dir.rglob(".*") if path.name != run_state.LOCK]
    for checkpoint in run_state.checkpoints_in(run_dir):
        run_state.verify(checkpoint)


@pytest.mark.parametrize(
    ("size", "more", "said"),
    [
        (100_000, [], "run: checkpoint-1 cannot be written: "),  # its weights, by safetensors
        (1_900_000, [], "run: checkpoint-1 cannot be written: "),  # the optimizer, by torch
        (100_000, ["train.save_strategy=no"], "run: the trained model cannot be written: "),
        (600, ["reference.store=off"], "run/recipe.yaml: File too large"),
        (600, ["reference.store=store"], "File too large. The reference store needs a folder"),
    ],
)
def test_a_file_that_cannot_be_written_is_told_in_one_line(
    work: Path, capsys: pytest.CaptureFixture[str], size: int, more: list[str], said: str
) -> None:
    Path("run").mkdir()
    with files_of_at_most(size):
        assert main(["train", "recipe.yaml", *more]) == 2
    assert said in error_of(capsys)
    assert_nothing_half_written(Path("run"))


def test_the_checkpoint_before_is_kept_and_said_to_be(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "recipe.yaml", "train.max_steps=1"]) == 0
    capsys.readouterr()
    resume = ["train", "recipe.yaml", "train.resume_from_checkpoint=true"]
    with files_of_at_most(1_900_000):
        assert main(resume) == 2
    assert "run/checkpoint-1 is whole and kept; resume_from_checkpoint=true goes on from it" in error_of(
        capsys
    )
    assert_nothing_half_written(Path("run"))
    assert main(resume) == 0
    assert [path.name for path in run_state.checkpoints_in("run")] == ["checkpoint-2", "checkpoint-1"]


@pytest.mark.long
@pytest.mark.parametrize("kibibytes", [4, 8, 16, 20, 24, 1000, 2000, 4400, 5000, 8800, 9200, 10000])
def test_a_small_file_system_at_any_size(
    work: Path, capsys: pytest.CaptureFixture[str], kibibytes: int
) -> None:
    """A real one, so that names and folders run out as well as bytes."""
    folder = work / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system can be mounted by root alone, and not here")
    try:
        status = main(["train", "recipe.yaml", f"output_dir={folder / 'run'}"])
        if status:
            assert status == 2
            error_of(capsys)
        assert_nothing_half_written(folder / "run")
        saved = run_state.checkpoints_in(folder / "run")
        assert bool(saved) == (kibibytes > 4200)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
