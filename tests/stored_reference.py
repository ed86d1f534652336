"""A trainer whose reference is stored, what was found and computed, and models and rows that differ a little."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from infopo.arguments import InfoPOConfig
from infopo.lab.tokenizer import build_tokenizer
from infopo.models import load_policy
from infopo.trainer import InfoPOTrainer
from worlds import PLAIN_SGD

TOKENIZER = build_tokenizer()

ROWS = [
    {
        "prompt": f"{i}+{i}+{i}+{i}+{i}+{i}=?",
        "chosen": f"{i}+{i}={2 * i}, {i}+{i}={2 * i}, {6 * i}",
        "rejected": f"={i}+{i}={2 * i}, {i}+{i}={2 * i}, {6 * i}",
    }
    for i in range(10, 16)
]

RESPONSES = 2 * len(ROWS)

BOTH = frozenset({"chosen", "rejected"})


def trainer_of(store: Path | None, folder: Path, model: Any = None, **settings: Any) -> InfoPOTrainer:
    """A trainer of the lab's policy on rows of text, with a store in a folder of its own."""
    arguments = {
        name: settings.pop(name) for name in ("peft_config", "ref_model", "eval_dataset") if name in settings
    }
    raw = settings.pop("train", None)
    return InfoPOTrainer(
        load_policy("lab:policy", dtype="float32") if model is None else model,
        args=InfoPOConfig(
            **{
                "output_dir": str(folder / "run"),
                "reference_store": None if store is None else str(store),
                **PLAIN_SGD,
                "max_steps": 1,
                "report_to": "none",
                "max_length": None,
                **settings,
            }
        ),
        train_dataset=datasets.Dataset.from_list(ROWS) if raw is None else raw,
        processing_class=TOKENIZER,
        **arguments,
    )


def counts(trainer: InfoPOTrainer) -> tuple[int, int]:
    """(found, computed)."""
    assert trainer.reference_store is not None
    return trainer.reference_store.reused, len(trainer.reference_store.computed)


def values(trainer: InfoPOTrainer) -> np.ndarray:
    assert trainer.train_dataset.reference is not None
    return trainer.train_dataset.reference


def lora(model: PreTrainedModel, seed: int, **settings: Any) -> Any:
    """The lab's policy with an adapter that does something."""
    torch.manual_seed(seed)
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return adapted


def lab(**settings: Any) -> PreTrainedModel:
    return load_policy("lab:policy", **{"dtype": "float32", **settings})


def changed(key: str, text: Callable[[str], str]) -> datasets.Dataset:
    return datasets.Dataset.from_list([{**row, key: text(row[key])} for row in ROWS])
