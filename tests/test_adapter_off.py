"""The policy without its adapter as the reference: only if it is the policy at first, and stays as it is."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import MixtralConfig, Qwen2Config

from infopo import InfoPOTrainer
from infopo.errors import ConfigError
from test_startup import SIZE, trainer_of
from worlds import random_dataset, tiny_of

QWEN = Qwen2Config(**SIZE)  # its projections have biases
ON = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}


def adapted(config: Any, adapter: peft.PeftConfig, folder: Path, **settings: Any) -> InfoPOTrainer:
    model = tiny_of(copy.deepcopy(config))
    return trainer_of(
        folder, model, random_dataset(8), peft_config=adapter, reference="adapter-off", **settings
    )


@pytest.mark.parametrize(
    ("adapter", "problem"),
    [
        (
            peft.VBLoRAConfig(**ON, r=2, vector_length=8, num_vectors=4, topk=2),
            "changes the policy at once, by ",
        ),
        (peft.LoraConfig(**ON, init_lora_weights="pissa"), "changes the policy at once, by "),
        (peft.LoraConfig(**ON, bias="all"), "the reference would change during training"),
        (peft.LoraConfig(**ON, bias="lora_only"), "the reference would change during training"),
    ],
    ids=["starts at random", "rewrites the base", "all biases", "biases of adapted layers"],
)
def test_a_model_that_is_no_reference_without_its_adapter_is_refused_by_the_constructor(
    tmp_path: Path, adapter: peft.PeftConfig, problem: str
):
    with pytest.raises(ConfigError, match=rf"^reference='adapter-off': .*{problem}.*'precompute'"):
        adapted(QWEN, adapter, tmp_path)


def test_biases_that_an_adapter_trains_are_found_in_one_that_was_loaded_too(tmp_path: Path):
    loaded = peft.get_peft_model(tiny_of(copy.deepcopy(QWEN)), peft.LoraConfig(**ON, bias="all"))
    with pytest.raises(ConfigError, match="the reference would change during training"):
        trainer_of(tmp_path, loaded, reference="adapter-off")


@pytest.mark.parametrize("adapter", [peft.OFTConfig(**ON, oft_block_size=4, r=0), peft.HRAConfig(**ON, r=4)])
def test_an_adapter_that_starts_as_a_rotation_by_nothing_is_taken(tmp_path: Path, adapter: peft.PeftConfig):
    assert adapted(QWEN, adapter, tmp_path).reference_in_words == "the policy without its adapter"


NOISY = {
    "router": (
        MixtralConfig(**SIZE, num_local_experts=4, router_jitter_noise=0.3),
        lambda: peft.LoraConfig(**ON, r=4, lora_dropout=0.0),
    ),
    "adapter": (
        QWEN,
        lambda: peft.PveraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"], r=4),
    ),
}


@pytest.mark.parametrize("name", NOISY)
def test_what_is_computed_again_for_the_backward_pass_is_what_was_computed(tmp_path: Path, name: str):
    """The reference runs in between. It must leave noise off where it found it off."""
    config, adapter = NOISY[name]
    weights = []
    for checkpointing in (False, True):
        trainer = adapted(
            config, adapter(), tmp_path, activation_checkpointing=checkpointing, learning_rate=0.1
        )
        trainer.train()
        assert trainer.state.log_history[0]["ratio/max"] == pytest.approx(1, abs=1e-3)
        weights.append([p.detach().clone() for p in trainer.model.parameters() if p.requires_grad])
    for plain, again in zip(*weights, strict=True):
        torch.testing.assert_close(again, plain)
