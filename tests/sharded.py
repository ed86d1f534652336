"""Starts runs of a model that is cut up over processes, and the runs of a whole model that they are compared with."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

import infopo
from infopo.arguments import InfoPOConfig
from infopo.lab.tokenizer import build_tokenizer
from infopo.trainer import InfoPOTrainer
from worlds import PLAIN_SGD, random_dataset, tiny_llama

MEASURED = {"probe_size": 4, "probe_steps": 1, "gradient_size": 2, "gradient_steps": 1, "anchor_size": 0}


def save_models(folder: Path) -> Path:
    """Saves the policy and another model into a folder, which is returned."""
    tiny_llama().save_pretrained(folder / "policy")
    tiny_llama(seed=1).save_pretrained(folder / "other")
    return folder


def launch(
    script: Path, folder: Path, cases: dict[str, Any], ranks: int = 2, **environment: str
) -> list[dict[str, Any]]:
    """Returns what each case gave, for each rank. The script runs them one after the other in one launch."""
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    source = {"PYTHONPATH": str(Path(infopo.__file__).parents[1])}
    subprocess.run(
        [*command, str(script), str(folder)], check=True, timeout=500, env=os.environ | source | environment
    )
    return [
        {name: torch.load(folder / f"{name}.rank{rank}.pt", weights_only=True) for name in cases}
        for rank in range(ranks)
    ]


def placed(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The case with its folders."""
    folders = {"model", "reference_store"}
    if case.get("reference") == "other":
        folders |= {"reference"}
    return {key: str(folder / value) if key in folders else value for key, value in case.items()}


def whole(case: dict[str, Any], folder: Path) -> tuple[InfoPOTrainer, dict[str, float]]:
    """The same run of one process that holds the whole model, and its evaluation before training."""
    case = {k: v for k, v in placed(case, folder).items() if k not in ("version", "fsdp_config", "late")}
    model, data = case.pop("model", None), case.pop("data", {})
    lora = (
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        if case.pop("lora", 0)
        else None
    )
    reference = tiny_llama(seed=1) if case.pop("ref_model", False) else None
    settings = PLAIN_SGD | {"num_train_epochs": 1, "per_device_train_batch_size": 8} | case
    trainer = InfoPOTrainer(
        model=tiny_llama() if model is None else model,
        ref_model=reference,
        args=InfoPOConfig(output_dir=str(folder / "whole"), **settings | {"reference_store": "off"}),
        train_dataset=random_dataset(21, **data),
        eval_dataset=random_dataset(5, seed=9),
        processing_class=build_tokenizer(),
        peft_config=lora,
    )
    return trainer, trainer.evaluate()
