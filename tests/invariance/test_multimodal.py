"""Texts share their prompts in models that have towers for images, which texts do not run through."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)

from families import SMALL, assert_agree
from infopo.data.packing import pack
from infopo.logps import attention
from infopo.logps.eligibility import obstacle
from infopo.logps.forward import path_of
from infopo.models import disable_dropout
from worlds import random_examples

EXAMPLES = random_examples(4, rejected=(1, 2))
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def llava() -> PreTrainedModel:
    vision = CLIPVisionConfig(num_hidden_layers=1, attention_dropout=0.0, **TOWER)
    return LlavaForConditionalGeneration(LlavaConfig(text_config=LlamaConfig(**SMALL), vision_config=vision))


def gemma3() -> PreTrainedModel:
    text = Gemma3TextConfig(**SMALL | {"head_dim": 8, "sliding_window": 4})
    vision = SiglipVisionConfig(num_hidden_layers=1, **TOWER)
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    )


each_model = pytest.mark.parametrize("make", [llava, gemma3])


def made(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    model = make()
    disable_dropout(model)
    return model


@each_model
def test_log_probs_and_gradients_are_those_of_padded_rows(make: Callable[[], PreTrainedModel]) -> None:
    model = made(make)
    assert attention.enable(model) is None
    assert path_of(model) == "forest"
    assert_agree(model, pack(EXAMPLES))


def implementations(config: PreTrainedConfig) -> dict[str, Any]:
    return {key: implementations(getattr(config, key)) for key in config.sub_configs} | {
        "": config._attn_implementation
    }


@each_model
def test_towers_keep_their_attention_and_text_gets_its_own_back(make: Callable[[], PreTrainedModel]) -> None:
    model = made(make)
    model.set_attn_implementation({"": "sdpa", "text_config": "eager", "vision_config": "sdpa"})
    before = implementations(model.config)
    assert before["text_config"] != before["vision_config"]
    assert attention.enable(model) is None
    assert attention.implementation_of(model) == "eager"
    during = implementations(model.config)
    assert during.pop("text_config") != before["text_config"]
    assert during == {key: value for key, value in before.items() if key != "text_config"}
    attention.disable(model)
    assert implementations(model.config) == before
    with attention.lent([model]):
        assert attention.is_enabled(model)
    assert implementations(model.config) == before


@each_model
def test_dropout_of_a_tower_is_no_obstacle_and_that_of_the_text_is(
    make: Callable[[], PreTrainedModel],
) -> None:
    model = made(make)
    model.get_submodule("model.vision_tower").add_module("added", torch.nn.Dropout(0.5))
    assert obstacle(model) is None
    model.get_decoder().add_module("added", torch.nn.Dropout(0.5))
    assert "dropout" in (obstacle(model) or "")


def test_text_that_is_not_causal_is_an_obstacle() -> None:
    model = made(llava)
    model.get_decoder().layers[0].self_attn.is_causal = False
    assert obstacle(model) == "its attention is not causal"
