"""What would fail at the first save or evaluation is refused, or repaired, when the trainer is built."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import EarlyStoppingCallback, GenerationConfig, TrainerCallback

from infopo.arguments import InfoPOConfig
from infopo.data.examples import ExampleDataset
from infopo.errors import ModelError, RecipeError
from infopo.lab.tokenizer import build_tokenizer
from infopo.trainer import InfoPOTrainer
from worlds import PLAIN_SGD, random_dataset, tiny_llama

TOKENIZER = build_tokenizer()
DATA = random_dataset(8)
EVALUATES = {"eval_strategy": "steps", "eval_steps": 1}


def trainer_of(folder: Path, eval_dataset: Any = DATA, **settings: Any) -> InfoPOTrainer:
    names = ("model", "callbacks", "processing_class", "peft_config", "optimizers", "cls")
    given = {name: settings.pop(name) for name in names if name in settings}
    return given.pop("cls", InfoPOTrainer)(
        args=InfoPOConfig(
            output_dir=str(folder),
            **PLAIN_SGD | {"reference_sides": "auto", "max_steps": 2, "report_to": "none"} | settings,
        ),
        train_dataset=DATA,
        eval_dataset=eval_dataset,
        **{"model": tiny_llama(), "processing_class": TOKENIZER} | given,
    )


# ---- the metric that chooses the best model ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"reference_sides": "needed", "metric_for_best_model": "eval_rewards/accuracies"},
            "reference_sides='both'",
        ),
        ({"metric_for_best_model": "rewards/accuracy"}, "did you mean 'rewards/accuracies'?"),
        ({"metric_for_best_model": "eval_accuracy"}, "It gives: loss, logps/chosen"),
        ({"metric_for_best_model": "ratio/mean", "objective": "dpo"}, "no 'ratio/mean'"),
        ({"metric_for_best_model": "ratio/mean"}, "greater_is_better: is not set"),
        (
            {"metric_for_best_model": "loss", "eval_dataset": {"near": DATA, "far": DATA}},
            "write e.g. near_loss",
        ),
        ({"metric_for_best_model": "rewards/accuracies", "eval_dataset": random_dataset(4, chosen=(0,))}, "It gives:"),
        ({"callbacks": [EarlyStoppingCallback()]}, "needs metric_for_best_model"),
        (
            {"callbacks": [EarlyStoppingCallback()], "metric_for_best_model": "loss", "eval_strategy": "no"},
            "needs evaluation",
        ),
        ({"save_strategy": "best", "save_steps": 1}, "save_strategy='best'"),
    ],
)  # fmt: skip
def test_a_metric_that_no_evaluation_gives_is_refused_before_the_reference_is_computed(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        trainer_of(tmp_path, **{**EVALUATES, **settings})
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "settings",
    [
        {"metric_for_best_model": "eval_rewards/accuracies"},
        {"metric_for_best_model": "rewards/margins"},
        {"metric_for_best_model": "logps/accuracies", "reference_sides": "needed"},
        {"metric_for_best_model": "ratio/mean", "greater_is_better": False},
        {"metric_for_best_model": "far_loss", "eval_dataset": {"near": DATA, "far": DATA}},
        {"metric_for_best_model": "eval_samples_per_second"},
    ],
)
def test_a_metric_that_evaluation_gives_chooses_the_best_model(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    saves = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(
        tmp_path,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
        **EVALUATES,
        **saves,
        **settings,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint


class Adds(TrainerCallback):
    """As the documentation advises who wants a metric of their own."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        metrics["eval_solved"] = 0.5


def test_a_metric_that_a_callback_adds_is_taken(tmp_path: Path) -> None:
    settings = {**EVALUATES, "metric_for_best_model": "solved", "greater_is_better": True}
    trainer = trainer_of(tmp_path, callbacks=[Adds()], **settings)
    trainer.train()
    assert trainer.state.best_metric == 0.5
    with pytest.raises(RecipeError, match="no 'solved'"):
        trainer_of(tmp_path, **settings)


def test_callbacks_that_come_later_are_judged_when_training_starts(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, **EVALUATES)
    trainer.add_callback(EarlyStoppingCallback())
    with pytest.raises(RecipeError, match="needs metric_for_best_model"):
        trainer.train()


# ---- saving --------------------------------------------------------------------------------------------------------


def test_a_sampling_configuration_that_transformers_would_not_save_is_repaired_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    model.generation_config.temperature = 0.6
    model.generation_config.top_p = 0.9
    trainer = trainer_of(tmp_path, model=model, save_strategy="steps", save_steps=2)
    assert "do_sample is now True" in caplog.text
    trainer.train()
    saved = GenerationConfig.from_pretrained(tmp_path / "checkpoint-2")
    assert (saved.do_sample, saved.temperature, saved.top_p) == (True, 0.6, 0.9)


def test_a_sound_configuration_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    trainer_of(tmp_path, model=model)
    assert model.generation_config.do_sample in (None, False)
    assert "do_sample" not in caplog.text


class Broken:
    """A value that JSON has no form for."""


@pytest.mark.parametrize("part", ["generation_config", "config", "tokenizer"])
def test_what_cannot_be_saved_is_refused_by_name(tmp_path: Path, part: str) -> None:
    model, tokenizer = tiny_llama(), copy.deepcopy(TOKENIZER)
    if part == "generation_config":
        model.generation_config.early_stopping = "perhaps"
    elif part == "config":
        model.config.note = Broken()
    else:
        tokenizer.init_kwargs["note"] = Broken()
    with pytest.raises(
        ModelError, match=f"^{part.replace('tokenizer', 'processing_class')}: .* cannot be saved"
    ) as caught:
        trainer_of(tmp_path, model=model, processing_class=tokenizer)
    assert len(str(caught.value)) < 500


def test_an_adapter_does_not_need_its_bases_configuration(tmp_path: Path) -> None:
    model = tiny_llama()
    model.generation_config.early_stopping = "perhaps"
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = trainer_of(tmp_path, model=model, peft_config=lora)
    trainer.train()
    trainer.save_final_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(RecipeError, match=r"output_dir: .* is a file"):
        trainer_of(tmp_path / "out")


# ---- schedule-free optimizers --------------------------------------------------------------------------------------


class TwoWeights(torch.optim.SGD):
    """As schedule-free optimizers do, holds other weights for training than for evaluation, from the first step on."""

    training = False
    apart = 0.0

    def _move(self, training: bool) -> None:
        if training != self.training:
            self.training = training
            self._add(self.apart if training else -self.apart)

    def _add(self, value: float) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(value)

    def train(self) -> None:
        self._move(True)

    def eval(self) -> None:
        self._move(False)

    def step(self, closure: Any = None) -> None:
        assert self.training
        super().step(closure)
        if not self.apart:
            self.apart = 1.0
            self._add(self.apart)


@pytest.mark.parametrize("objective", ["infopo", "kto"])
def test_an_optimizer_with_two_kinds_of_weights_evaluates_and_saves_those_of_evaluation(
    tmp_path: Path, objective: str
) -> None:
    """With a tiny rate the weights of evaluation are those of the start; KTO looks ahead before each step."""
    model = tiny_llama()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    modes: list[bool] = []
    optimizer = TwoWeights(model.parameters(), lr=1e-12)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    class Watch(TrainerCallback):
        def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
            modes.append(optimizer.training)

    trainer = trainer_of(
        tmp_path, model=model, optimizers=(optimizer, constant), callbacks=[Watch()], objective=objective,
        reference_store="off", **EVALUATES,
    )  # fmt: skip
    trainer.train()
    assert modes
    assert not any(modes)
    optimizer.train()
    trainer.save_final_model()
    saved = type(model).from_pretrained(tmp_path)
    for name, parameter in saved.named_parameters():
        torch.testing.assert_close(parameter, start[name], rtol=0, atol=1e-5)


def test_a_dataset_says_which_examples_have_a_role() -> None:
    from infopo.late_failures import kinds

    assert kinds(random_dataset(4, chosen=(1, 0), rejected=(0, 1))) == {
        "chosen": True,
        "rejected": True,
        "pairs": False,
    }
    assert kinds(random_dataset(4)) == {"chosen": True, "rejected": True, "pairs": True}
    assert kinds(ExampleDataset.from_examples([])) == {"chosen": False, "rejected": False, "pairs": False}


# ---- dropout of adapters -------------------------------------------------------------------------------------------


def trained_adapter(folder: Path, **settings: Any) -> torch.Tensor:
    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings.pop("adapter")
    )
    trainer = trainer_of(folder, peft_config=config, learning_rate=0.1, reference_store="off", **settings)
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


def test_dropout_that_is_asked_for_acts_and_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With it the first step still begins where the reference is: the check of step 0 runs."""
    caplog.set_level("INFO", "infopo")
    without = trained_adapter(tmp_path, adapter={"lora_dropout": 0.0})
    assert "dropout:" not in caplog.text
    dropped = trained_adapter(tmp_path, adapter={"lora_dropout": 0.5})
    assert "dropout: lora_dropout=0.5 in the adapter while it is trained" in caplog.text
    assert not torch.equal(without, dropped)
    torch.testing.assert_close(trained_adapter(tmp_path, adapter={"lora_dropout": 0.5}), dropped)


def test_dropout_of_an_adapter_that_came_with_the_model_is_disabled_like_the_models_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It would make the policy differ from its reference before the first update."""

    def run(dropout: float) -> torch.Tensor:
        lora = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=dropout, init_lora_weights=False)
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), lora)
        trainer = trainer_of(tmp_path, model=model, learning_rate=0.1, reference_store="off")
        trainer.train()
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    assert torch.equal(run(0.5), run(0.0))
    assert "lora_dropout=0.5 of the adapter is set to 0" in caplog.text
