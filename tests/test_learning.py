"""A run that cannot learn does not start: whatever the reason, it is refused before the reference is computed."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import CTRLConfig, OpenAIGPTConfig

from infopo import InfoPOConfig, InfoPOTrainer, learning, models, reference_setup
from infopo.data.examples import ExampleDataset
from infopo.data.packing import pack
from infopo.errors import ModelError, RecipeError
from infopo.lab.tokenizer import build_tokenizer
from infopo.logps.forward import PATHS, path_of
from worlds import PLAIN_SGD, VOCABULARY, random_dataset, random_examples, tiny_llama, tiny_of

TOKENIZER = build_tokenizer()


def trainer_of(folder: Path, model: Any, optimizers: Any = (None, None), **settings: Any) -> InfoPOTrainer:
    adapter = settings.pop("peft_config", None)
    return InfoPOTrainer(
        model=model,
        args=InfoPOConfig(
            output_dir=str(folder), **{**PLAIN_SGD, "max_steps": 2, "bf16": False, "report_to": "none", **settings}
        ),
        train_dataset=random_dataset(6),
        processing_class=TOKENIZER,
        optimizers=optimizers,
        peft_config=adapter,
    )  # fmt: skip


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=2, **{"target_modules": ["q_proj"], **settings})


# ---- nothing to train ----------------------------------------------------------------------------------------------


def frozen_model() -> torch.nn.Module:
    return tiny_llama().requires_grad_(False)


def loaded_adapter(folder: Path) -> torch.nn.Module:
    get_peft_model(tiny_llama(), lora()).save_pretrained(folder)
    return PeftModel.from_pretrained(tiny_llama(), folder)


class PassesNothingOn(torch.nn.Module):
    """A layer whose output is cut off from its input: everything before it is trainable in name only."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs).detach()


def adapter_that_is_cut_off() -> torch.nn.Module:
    model = tiny_llama()
    model.model.norm = PassesNothingOn(model.model.norm)
    return get_peft_model(model, lora())


def adapter_on_a_layer_that_is_not_used() -> torch.nn.Module:
    model = tiny_llama()
    model.model.tower = torch.nn.Linear(4, 4)  # the tower of another modality, say
    return get_peft_model(model, lora(target_modules=["tower"]))


def float16_adapter() -> torch.nn.Module:
    return get_peft_model(tiny_llama(dtype=torch.float16), lora(), autocast_adapter_dtype=False)


def half_of_it_is_float16() -> torch.nn.Module:
    model = tiny_llama()
    model.model.norm.to(torch.float16)
    return model


@pytest.mark.parametrize(("make", "message"), [
    (frozen_model, "nothing to train. Call model.requires_grad_"),
    (loaded_adapter, "nothing to train.*is_trainable=True"),
    (adapter_that_is_cut_off, "no gradient reaches"),
    (adapter_on_a_layer_that_is_not_used, "no gradient reaches"),
    (lambda: tiny_llama(dtype=torch.float16), "float16.*float32"),
    (float16_adapter, "float16.*float32"),
    (half_of_it_is_float16, "1 parameters to train are float16"),
])  # fmt: skip
@pytest.mark.parametrize("checkpointing", [None, False])
def test_a_policy_that_no_step_could_change_is_refused_before_the_reference_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, message: str, checkpointing: bool | None
) -> None:
    computed = []
    monkeypatch.setattr(reference_setup.ReferenceBuilder, "build", lambda *args: computed.append(args))
    model = make(tmp_path / "adapter") if make is loaded_adapter else make()
    with pytest.raises(ModelError, match=message) as error:
        trainer_of(tmp_path, model, activation_checkpointing=checkpointing)
    assert not computed
    assert len(str(error.value)) < 500


def test_float16_weights_beneath_a_float32_adapter_are_trained_on(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, tiny_llama(dtype=torch.float16), peft_config=lora())
    trainer.train()
    assert any(bool(p.any()) for n, p in trainer.model.named_parameters() if "lora_B" in n)


def test_an_adapter_that_gives_nan_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[0] = 0.0
    with pytest.raises(ModelError, match="not finite before the first update"):
        trainer_of(tmp_path, model, peft_config=lora(use_dora=True, target_modules=["lm_head"]))


def test_trainable_parameters_that_nothing_reaches_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    model.model.tower = torch.nn.Linear(4, 4)
    with caplog.at_level(logging.WARNING, "infopo.learning"):
        trainer_of(tmp_path, get_peft_model(model, lora(target_modules=["q_proj", "tower"])))
    assert "2 of 6 trainable parameters get no gradient" in caplog.text
    assert "tower" in caplog.text


def test_the_check_leaves_weights_modes_gradients_and_random_numbers_alone(tmp_path: Path) -> None:
    model = tiny_llama(attention_dropout=0.5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    args = InfoPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    learning.check_gradients(model, random_examples(1)[0], args, torch.enable_grad)
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training
    assert not model.is_activation_checkpointing
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())


# ---- optimizer, rate, steps ----------------------------------------------------------------------------------------


def test_an_optimizer_without_the_trainable_parameters_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    made_too_early = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with pytest.raises(RecipeError, match="holds none of the 4 trainable parameters"):
        trainer_of(tmp_path, model, (made_too_early, None), peft_config=lora())


def test_an_optimizer_with_some_of_them_is_used_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    some = torch.optim.SGD(model.lm_head.parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING, "infopo.learning"):
        trainer_of(tmp_path, model, (some, None)).train()
    assert "holds 1 of" in caplog.text


@pytest.mark.parametrize(("settings", "message"), [
    ({"learning_rate": 0.0}, "learning_rate: expected a positive number, got 0"),
    ({"learning_rate": -1e-5}, "learning_rate: expected a value >= 0, got -1e-05"),
    ({"learning_rate": float("nan")}, "learning_rate: expected a value >= 0, got nan"),
    ({"learning_rate": 0.0, "lr_scheduler_type": "cosine", "warmup_steps": 1}, "learning_rate"),
    ({"max_steps": 0}, "max_steps: expected a value > 0, or -1 to train for num_train_epochs, got 0"),
    ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs: expected a value > 0, got 0"),
])  # fmt: skip
def test_a_run_without_steps_or_without_a_rate_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        trainer_of(tmp_path, tiny_llama(), **settings)


def test_an_optimizer_whose_rate_is_0_is_refused_unless_a_schedule_may_raise_it(tmp_path: Path) -> None:
    model = tiny_llama()

    def still() -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.0)

    with pytest.raises(RecipeError, match="optimizer's learning rate is 0"):
        trainer_of(tmp_path, model, (still(), None))
    optimizer = still()
    scaled = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step)
    with pytest.raises(RecipeError, match="optimizer's learning rate is 0"):
        trainer_of(tmp_path, model, (optimizer, scaled))
    optimizer = still()
    rises = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=4)
    trainer_of(tmp_path, model, (optimizer, rises))


def test_a_schedule_that_is_0_at_the_only_step_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "infopo.learning"):
        trainer_of(tmp_path, tiny_llama(), max_steps=1, warmup_steps=1, lr_scheduler_type="linear")
    assert "no weight changes" in caplog.text


# ---- activation checkpointing --------------------------------------------------------------------------------------

WITHOUT_CHECKPOINTING = {
    "gpt": OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4),
    "ctrl": CTRLConfig(vocab_size=VOCABULARY, n_embd=32, dff=48, n_layer=1, n_head=4, n_positions=64),
}


@pytest.mark.parametrize("name", WITHOUT_CHECKPOINTING)
def test_a_model_without_checkpointing_trains_without_unless_it_was_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    model = tiny_of(WITHOUT_CHECKPOINTING[name])
    with pytest.raises(RecipeError, match="set gradient_checkpointing=False"):
        trainer_of(tmp_path, model, activation_checkpointing=True)
    with caplog.at_level(logging.WARNING, "infopo.learning"):
        trainer_of(tmp_path, model, activation_checkpointing=None).train()
    assert "gradient_checkpointing is switched off" in caplog.text


def test_prefix_tuning_cannot_be_recomputed_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(RecipeError, match="set gradient_checkpointing=False"):
        trainer_of(tmp_path, tiny_llama(), peft_config=adapter, activation_checkpointing=True)
    with caplog.at_level(logging.WARNING, "infopo.learning"):
        trainer_of(tmp_path, tiny_llama(), peft_config=adapter, activation_checkpointing=None).train()
    assert "gradient_checkpointing is switched off" in caplog.text


# ---- adapters: each trains, with the log-probs of the model that carries it ----------------------------------------

ADAPTERS = {
    "embeddings": lora(target_modules=["q_proj", "embed_tokens"]),
    "head": lora(target_modules=["q_proj", "lm_head"]),
    "token indices": lora(trainable_token_indices=[5, 6]),
    "saved head": lora(modules_to_save=["lm_head"]),
    "saved embeddings": lora(modules_to_save=["embed_tokens"]),
    "dora": lora(use_dora=True),
    "dora on head": lora(use_dora=True, target_modules=["lm_head", "q_proj"]),
    "rslora with bias": lora(use_rslora=True, bias="all"),
    "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "layer norms": LNTuningConfig(task_type="CAUSAL_LM", target_modules=["norm", "input_layernorm"]),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*", "ignore:.*tied.*")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_trains_with_the_log_probs_of_the_adapted_model(
    tmp_path: Path, name: str, tied: bool
) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 0.3  # padding is a row of zeros, on which DoRA gives NaN
    trainer = trainer_of(
        tmp_path, model, peft_config=ADAPTERS[name], activation_checkpointing=None, learning_rate=0.05
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all(dict(trainer.model.named_parameters())[n].requires_grad for n in moved)
    batch = pack(random_examples(4, seed=3))
    policy = trainer.model.eval()
    with torch.no_grad():
        fast, slow = (PATHS[path](policy, batch) for path in (path_of(policy), "naive"))
        off = fast if name in ("prompt", "p-tuning", "prefix") else None
        if off is None:
            with policy.disable_adapter():
                off = PATHS["naive"](policy, batch)
    assert torch.allclose(fast, slow, atol=1e-4)
    assert name in ("prompt", "p-tuning", "prefix") or not torch.allclose(slow, off, atol=1e-3)


# ---- what the model cannot read ------------------------------------------------------------------------------------


def test_the_vocabulary_is_that_of_the_embedding_beneath_an_adapter(tmp_path: Path) -> None:
    data = ExampleDataset.from_examples(random_examples(2))
    for name in ("embeddings", "token indices", "saved embeddings"):
        model = get_peft_model(tiny_llama(), ADAPTERS[name])
        models.check_fit(model, 10, data.largest_token_id)
        with pytest.raises(ModelError, match=f"has {VOCABULARY} token embeddings"):
            models.check_fit(model, 10, VOCABULARY)
