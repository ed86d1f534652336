"""A run that saves, the files of its checkpoints, and what stands for a kill."""

from pathlib import Path
from typing import Any

from infopo.arguments import InfoPOConfig
from infopo.lab.tokenizer import build_tokenizer
from infopo.trainer import InfoPOTrainer
from worlds import random_dataset, tiny_llama

FILES = ("model.safetensors", "trainer_state.json", "infopo_state.json")


class Killed(BaseException):
    """Stands for the end of the process: nothing but `finally` sees it."""


def tiny_trainer(folder: Path, **settings: Any) -> InfoPOTrainer:
    values = {
        "max_steps": 2, "save_steps": 1, "use_cpu": True, "disable_tqdm": True, "save_strategy": "steps",
        "activation_checkpointing": False, "report_to": "none", "logging_steps": 1, **settings,
    }  # fmt: skip
    return InfoPOTrainer(
        tiny_llama(),
        args=InfoPOConfig(output_dir=str(folder), **values),
        train_dataset=random_dataset(16),
        processing_class=build_tokenizer(),
    )
