"""A TRL script and its twin, in which only the import and two names changed, train alike: 20 steps on the lab.

Each runs as a user would run it, in a process of its own, in float32, with the same seed and so the same order of
rows. Losses, log-probs and rewards agree within 1e-4 of their size at every step; what differs is the order of
float32 sums (TRL pads chosen and rejected rows to one length and adds a response's tokens in float32).
"""

import difflib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from infopo.lab import policy_path
from infopo.lab.preferences import make_pairs

STEPS = 20
TOLERANCE = 1e-4

SCRIPT = """\
import json
import sys

from datasets import load_dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

model, data, output_dir = sys.argv[1:4]
settings = json.loads(sys.argv[4])
peft_config = LoraConfig(**settings.pop("lora")) if "lora" in settings else None

args = DPOConfig(
    output_dir=output_dir,
    per_device_train_batch_size=8,
    max_steps=20,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    bf16=False,
    use_cpu=True,
    disable_tqdm=True,
    seed=7,
    **{"learning_rate": 1e-4} | settings,
)
trainer = DPOTrainer(
    model=model,
    args=args,
    train_dataset=load_dataset("json", data_files=data, split="train"),
    peft_config=peft_config,
)
trainer.train()
with open(f"{output_dir}/history.json", "w") as file:
    json.dump(trainer.state.log_history, file)
"""

CHANGES = {
    "from trl import DPOConfig, DPOTrainer": "from infopo import InfoPOConfig, InfoPOTrainer",
    "args = DPOConfig(": "args = InfoPOConfig(",
    "trainer = DPOTrainer(": "trainer = InfoPOTrainer(",
}


def twin(script: str) -> str:
    for line, changed in CHANGES.items():
        assert script.count(line) == 1
        script = script.replace(line, changed)
    return script


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 pairs of the lab as a JSON-lines file."""
    policy = AutoModelForCausalLM.from_pretrained(policy_path(), dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(policy_path())
    rows = make_pairs(policy, tokenizer, labels="graded", n=96, seed=3).rows
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def run(script: str, data: Path, folder: Path, settings: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """Log records of the steps, and what was printed."""
    folder.mkdir()
    (folder / "script.py").write_text(script)
    command = [sys.executable, "script.py", policy_path(), data, folder, json.dumps(settings)]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((folder / "history.json").read_text())
    return [record for record in history if "loss" in record], done.stdout


def assert_same_training(data: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    theirs, _ = run(SCRIPT, data, tmp_path / "trl", settings)
    ours, _ = run(twin(SCRIPT), data, tmp_path / "infopo", settings)
    assert [r["step"] for r in theirs] == [r["step"] for r in ours] == list(range(1, STEPS + 1))
    # A reward is a difference of log-probs, some of them near zero: their size is that of the run's rewards.
    names = {"loss", "logps/chosen", "logps/rejected", "grad_norm"}
    if settings["loss_type"] != "sft":
        names |= {"rewards/chosen", "rewards/rejected", "rewards/margins"}
    for name in sorted(names):
        scale = max(abs(r[name]) for r in theirs) if name.startswith("rewards/") else 0.0
        relative = 1e-3 if name == "grad_norm" else TOLERANCE
        for a, b in zip(theirs, ours, strict=True):
            assert b[name] == pytest.approx(a[name], rel=relative, abs=TOLERANCE * scale), (name, a["step"])
    assert theirs[0]["loss"] != pytest.approx(theirs[-1]["loss"], rel=0.01)  # something was learnt


def test_the_twin_differs_in_its_import_and_two_names_only() -> None:
    matcher = difflib.unified_diff(SCRIPT.splitlines(), twin(SCRIPT).splitlines(), n=0, lineterm="")
    changed = [line for line in matcher if not line.startswith(("---", "+++", "@@"))]
    assert sorted(changed) == sorted([f"-{old}" for old in CHANGES] + [f"+{new}" for new in CHANGES.values()])


def test_dpo_trains_as_in_trl(data: Path, tmp_path: Path) -> None:
    assert_same_training(data, tmp_path, {"loss_type": "sigmoid"})


@pytest.mark.long
@pytest.mark.parametrize("settings", [
    {"loss_type": "ipo", "beta": 0.3},
    {"loss_type": "hinge"},
    {"loss_type": "sft"},
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    {"loss_type": ["sft", "sigmoid"]},
    # TRL averages the means of micro-batches, which are equal here because each holds 4 pairs.
    {"loss_type": "sigmoid", "gradient_accumulation_steps": 2},
    {"loss_type": "sigmoid", "train_sampling_strategy": "sequential"},
    {"loss_type": "sigmoid", "precompute_ref_log_probs": True},
    {"loss_type": "sigmoid", "max_length": 48},
    {"loss_type": "sigmoid", "learning_rate": 2e-3,
     "lora": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}},
], ids=["ipo", "hinge", "sft", "sigmoid+sft", "sft+sigmoid", "accumulation", "sequential", "precompute", "truncation",
        "LoRA"])  # fmt: skip
def test_so_do_other_settings(data: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    assert_same_training(data, tmp_path, settings)


def test_a_script_that_names_no_loss_trains_infopo_and_says_so(data: Path, tmp_path: Path) -> None:
    script = twin(SCRIPT) + 'print(*trainer.description(), sep="\\n")\n'
    records, printed = run(script, data, tmp_path / "infopo", {})
    assert "objective: InfoPO (beta=1.0, length_normalized=False, cap=5.0)\n" in printed
    assert "reference: the policy as it is now, for rejected responses\n" in printed
    assert len(records) == STEPS
    # -log π(w) + 1 while policy and reference are the same.
    assert records[0]["loss"] == pytest.approx(1 - records[0]["logps/chosen"], rel=1e-6)
