"""Runs of a whole model, with which those of a model that is cut up over two processes are compared."""

from pathlib import Path
from typing import Any

from peft import LoraConfig

from infopo.arguments import InfoPOConfig
from infopo.lab.tokenizer import build_tokenizer
from infopo.trainer import InfoPOTrainer
from worlds import PLAIN_SGD, random_dataset, tiny_llama

MEASURED = {"probe_size": 4, "probe_steps": 1, "gradient_size": 2, "gradient_steps": 1, "anchor_size": 0}


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
