"""Ranks share the work or are refused: never does each train a copy into the same directory. And the first line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infopo import ranks
from infopo.arguments import InfoPOConfig
from infopo.errors import RecipeError
from infopo.lab.tokenizer import build_tokenizer
from infopo.trainer import InfoPOTrainer
from infopo.workflows.train import run
from worlds import random_dataset, tiny_llama

needs_no_accelerator = pytest.mark.skipif(
    torch.accelerator.is_available(), reason="ranks find each other by their accelerators"
)
SCRIPT = """
import atexit
import logging
import sys
import torch.distributed as dist
atexit.register(lambda: print("left the group" if not dist.is_initialized() else "still in the group"))
logging.basicConfig(level=logging.INFO, format="%(message)s")
sys.path.insert(0, {tests!r})
import torch
from infopo.arguments import InfoPOConfig
from infopo.lab.tokenizer import build_tokenizer
from infopo.trainer import InfoPOTrainer
from worlds import random_dataset, tiny_llama
args = InfoPOConfig(output_dir={run!r}, max_steps=2, disable_tqdm=True, report_to="none", save_steps=1)
trainer = InfoPOTrainer(
    tiny_llama(), args=args, train_dataset=random_dataset(21), processing_class=build_tokenizer()
)
trainer.train()
trainer.save_final_model()
"""


def torchrun(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*launcher, *command],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.long
@needs_no_accelerator
def test_the_command_line_shares_the_work_without_being_told_use_cpu(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}+1=?", "chosen": f"{i + 1}", "rejected": f"{i}"} for i in range(16)]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{name_or_path: 'lab:policy'}}\ndata: {{path: {tmp_path}/pairs.jsonl, max_length: 64}}\n"
        f"train: {{per_device_train_batch_size: 4, logging_steps: 1, max_steps: 2}}\noutput_dir: {tmp_path}/run\n"
    )
    done = torchrun("-m", "infopo", "train", str(tmp_path / "recipe.yaml"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("objective: ") == 1
    assert done.stdout.count("\n2 processes, cpu, float32, 2 steps of 8 pairs\n") == 1
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2]
    assert json.loads((tmp_path / "run/environment.json").read_text())["processes"] == 2


@pytest.mark.long
@needs_no_accelerator
def test_a_script_shares_the_work_without_being_told_use_cpu(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), run=str(tmp_path / "run")))
    done = torchrun(str(script))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("2 processes, cpu, float32, 2 steps of 16 pairs\n") == 1
    assert done.stdout.count("left the group") == 2
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


@pytest.mark.parametrize("size", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_ranks_that_have_not_found_each_other_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    monkeypatch.setenv(size, "4")
    with pytest.raises(RecipeError, match=r"WORLD_SIZE is 4 .* sees 1 process: .*use_cpu"):
        InfoPOConfig(output_dir=str(tmp_path))


def test_a_launcher_that_starts_fewer_processes_than_it_was_asked_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    InfoPOConfig(output_dir=str(tmp_path))  # `accelerate launch --cpu --num_processes 1`
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(RecipeError, match="torchrun --nproc-per-node N"):
        InfoPOConfig(output_dir=str(tmp_path))


@pytest.mark.parametrize("value", ["", "1", "none", "0"])
def test_a_size_that_names_no_launcher_is_no_launcher(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    assert ranks.launched() == 1
    assert not ranks.must_use_cpu()


@pytest.mark.parametrize("name", ["RANK", "OMPI_COMM_WORLD_RANK"])
def test_the_first_rank_is_known_before_the_ranks_are_connected(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert ranks.is_first()
    for value in ("0", "1"):
        monkeypatch.setenv(name, value)
        assert ranks.is_first() == (value == "0")


@pytest.mark.parametrize(
    ("settings", "chosen", "line"),
    [
        ({}, (1,), "1 process, cpu, float32, 3 steps of 8 pairs"),
        ({"gradient_accumulation_steps": 2}, (1, 2), "1 process, cpu, float32, 3 steps of 16 rows"),
        ({"bf16": True}, (1,), "1 process, cpu, float32 with bf16 autocast, 3 steps of 8 pairs"),
    ],
)
def test_the_first_line_says_what_runs(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, object],
    chosen: tuple[int],
    line: str,
) -> None:
    args = InfoPOConfig(
        output_dir=str(tmp_path), max_steps=3, use_cpu=True, disable_tqdm=True, report_to="none",
        save_strategy="no", activation_checkpointing=False, **settings,
    )  # fmt: skip
    data = random_dataset(16, chosen=chosen)
    with caplog.at_level("INFO", "infopo"):
        InfoPOTrainer(tiny_llama(), args=args, train_dataset=data, processing_class=build_tokenizer()).train()
    assert line in caplog.messages


def test_a_workflow_prints_the_first_line_in_place_of_the_trainers_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once: transformers warns in every run about two callbacks of a class."""
    args = InfoPOConfig(
        output_dir=str(tmp_path), max_steps=1, use_cpu=True, disable_tqdm=True, report_to="none",
        save_strategy="no", activation_checkpointing=False,
    )  # fmt: skip
    data = random_dataset(16, chosen=(1,))
    trainer = InfoPOTrainer(tiny_llama(), args=args, train_dataset=data, processing_class=build_tokenizer())
    with caplog.at_level("INFO", "infopo"):
        run(trainer)
    line = "1 process, cpu, float32, 1 step of 8 pairs"
    assert capsys.readouterr().out.splitlines().count(line) == 1
    assert line not in caplog.messages
