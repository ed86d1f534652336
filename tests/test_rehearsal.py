"""What a script asks for and cannot have is refused by the configuration or the constructor, before the reference."""

import copy
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM, TrainerCallback

from infopo import InfoPOConfig, InfoPOTrainer, rehearsal
from infopo.errors import (
    ConfigError,
    InfoPOError,
    LogpsError,
    ModelError,
    NonFiniteLossError,
    UnsupportedArgumentError,
)
from infopo.lab.tokenizer import build_tokenizer
from tried import architectures
from worlds import PLAIN_SGD, random_dataset, tiny_llama

TOKENIZER = build_tokenizer()


@pytest.fixture(autouse=True)
def _without_the_checker_of_annotations() -> Iterator[None]:
    """As for users: otherwise the tests' own checker would answer to a value of the wrong type."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def config(folder: Path, **settings: Any) -> InfoPOConfig:
    return InfoPOConfig(**{"output_dir": str(folder), **PLAIN_SGD, "reference_store": "off"} | settings)


def trainer(folder: Path, **given: Any) -> InfoPOTrainer:
    """A trainer, of whose arguments these are given; `settings` are those of its configuration."""
    defaults: dict[str, Any] = {"train_dataset": random_dataset(4), "processing_class": TOKENIZER}
    settings = {"max_steps": 1} | given.pop("settings", {})
    model = given.pop("model") if "model" in given else tiny_llama()
    return InfoPOTrainer(model, args=config(folder, **settings), **defaults | given)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": "2"}, "max_steps: expected an integer, got '2'"),
        ({"max_steps": 1e3}, "max_steps: expected an integer, got 1000.0"),
        ({"learning_rate": "1e-3"}, "learning_rate: expected a number, got '1e-3'"),
        ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps: expected a value >= 1, got -1"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size: expected a value >= 1, got 0"),
        ({"max_grad_norm": None}, "max_grad_norm: expected a number, got None"),
        ({"adam_beta2": 1.0}, "adam_beta2: expected a value in [0, 1), got 1.0"),
        ({"weight_decay": float("nan")}, "weight_decay: expected a value >= 0, got nan"),
        ({"bf16": "False"}, "bf16: expected True or False or None, got 'False'"),
        ({"load_best_model_at_end": "no"}, "load_best_model_at_end: expected True or False, got 'no'"),
        ({"seed": -1}, "seed: expected a value in [0, 2**32), got -1"),
        ({"log_level": "loud"}, "log_level: expected one of detail, debug"),
        ({"include_num_input_tokens_seen": "some"}, "include_num_input_tokens_seen: expected one of no, all"),
        ({"optim": "adamv"}, "optim: expected one of adamw_torch, "),
        (
            {"lr_scheduler_type": "greedy"},
            "transformers refuses these settings: lr_scheduler_type greedy requires",
        ),
        ({"accelerator_config": "nowhere.json"}, "transformers refuses these settings: .*nowhere.json"),
        ({"fsdp": True}, "fsdp: shards weights over processes, and there is one"),
        ({"debug": "underflow_overflow"}, "debug=.*its hooks read logits"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_values_that_transformers_takes_without_a_look_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, **settings)
    head, dots, tail = message.partition(".*")
    assert str(caught.value).startswith(head)
    assert not dots or tail in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": np.int64(3), "learning_rate": np.float32(1e-4)},
        {"bf16": 0, "disable_tqdm": 1},
        {"max_steps": -1, "num_train_epochs": 1},
        {"eval_steps": None, "logging_steps": 0.5},
        {"include_num_input_tokens_seen": True},
    ],
    ids=repr,
)
def test_numbers_of_numpy_and_switches_as_numbers_are_taken(tmp_path: Path, settings: dict[str, Any]) -> None:
    args = config(tmp_path, **settings)
    for name, value in settings.items():
        assert name == "include_num_input_tokens_seen" or name == "eval_steps" or getattr(args, name) == value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "schedule_free_adamw"}, "optim: schedule_free_adamw cannot be built: .*schedulefree"),
        (
            {"optim": "galore_adamw", "optim_target_modules": "all-linear"},
            "optim: galore_adamw cannot be built",
        ),
        (
            {"optim": "sgd", "optim_args": "momentun=0.9"},
            "optim_args: 'momentun=0.9' changes nothing with optim='sgd'",
        ),
        ({"optim": "adamw_torch", "optim_args": "x"}, "optim: adamw_torch cannot be built"),
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            "lr_scheduler_type: warmup_stable_decay cannot be built",
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "lr_scheduler_type: cosine_with_min_lr cannot be built",
        ),
        (
            {"lr_scheduler_kwargs": {"foo": 1}, "lr_scheduler_type": "cosine"},
            "lr_scheduler_type: cosine cannot be built",
        ),
        (
            {"lr_scheduler_kwargs": {"foo": 1}},
            "lr_scheduler_kwargs: {'foo': 1} changes nothing with lr_scheduler_type='constant'",
        ),
        ({"report_to": "nobody"}, "report_to: 'nobody' is unknown or not installed"),
        ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers: there are no workers"),
        (
            {"torch_compile": True, "torch_compile_backend": "nobody"},
            "torch_compile: torch refuses its backend",
        ),
        ({"output_dir": ""}, "output_dir: is empty"),
        ({"output_dir": "/proc/x"}, "output_dir: '/proc/x' cannot be made"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "eval_strategy='steps': there is no eval_dataset"),
        ({"eval_on_start": True}, "eval_on_start: there is no eval_dataset"),
        (
            {"push_to_hub": True, "hub_model_id": "nobody/nothing"},
            "push_to_hub: the repository cannot be made",
        ),
    ],
    ids=lambda value: next(reversed(value)) if isinstance(value, dict) else "",
)
def test_what_would_fail_when_training_begins_fails_in_the_constructor(
    tmp_path: Path, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        trainer(tmp_path, settings=settings)
    head, _, tail = message.partition(".*")
    assert str(caught.value).startswith(head)
    assert tail in str(caught.value)
    assert len(str(caught.value)) < 500


def test_arguments_of_an_optimizer_that_are_known_are_taken(tmp_path: Path) -> None:
    made = trainer(tmp_path, settings={"optim": "sgd", "optim_args": "momentum=0.5, nesterov=True"})
    made.create_optimizer()
    assert made.optimizer.defaults["momentum"] == 0.5


def test_an_argument_of_an_optimizer_that_has_its_usual_value_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package is not installed here. What is tried is transformers' reading of its arguments."""
    package = types.ModuleType("schedulefree")
    package.AdamWScheduleFree = lambda params, **settings: torch.optim.SGD(params)  # type: ignore[attr-defined]
    package.SGDScheduleFree = package.RAdamScheduleFree = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "schedulefree", package)
    monkeypatch.setattr("transformers.trainer_optimizer.is_schedulefree_available", lambda *args: True)
    usual, unknown = (
        rehearsal.optimizer_problems(config(tmp_path, optim="schedule_free_adamw", optim_args=argument))
        for argument in ("r=0.0", "q=0.0")
    )
    assert usual == []
    assert unknown == ["optim_args: 'q=0.0' changes nothing with optim='schedule_free_adamw'; leave it out"]


def test_a_trainer_that_makes_its_own_optimizer_is_not_asked_for_another(tmp_path: Path) -> None:
    class Own(InfoPOTrainer):
        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            return self.optimizer

    args = config(tmp_path, optim="schedule_free_adamw", max_steps=1)
    Own(tiny_llama(), args=args, train_dataset=random_dataset(4), processing_class=TOKENIZER).train()


FOREIGN = {
    "tokenizer": TOKENIZER,
    "model_init": tiny_llama,
    "compute_loss_func": max,
    "preprocess_logits_for_metrics": max,
    "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1}),
    "max_length": 512,
    "beta": 0.1,
    "train_datasets": None,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_arguments_of_other_trainers_are_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsupportedArgumentError, match=rf"^{name}: "):
        trainer(tmp_path, **{name: FOREIGN[name]})


def lbfgs() -> dict[str, Any]:
    model = tiny_llama()
    return {"model": model, "optimizers": (torch.optim.LBFGS(model.parameters()), None)}


def schedule_alone() -> dict[str, Any]:
    optimizer = torch.optim.SGD(tiny_llama().parameters(), lr=0.1)
    return {"optimizers": (None, torch.optim.lr_scheduler.ConstantLR(optimizer))}


def nan_model() -> LlamaForCausalLM:
    model = tiny_llama(seed=1)
    with torch.no_grad():
        model.lm_head.weight[5, 5] = float("nan")
    return model


def on_meta() -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**tiny_llama().config.to_diff_dict()))


class Wrapped(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_llama()


OBJECTS: dict[str, tuple[Any, str]] = {
    "an optimizer alone": (
        lambda: {"optimizers": torch.optim.SGD(tiny_llama().parameters(), lr=0.1)},
        "optimizers: expected (optimizer, schedule)",
    ),
    "an optimizer's class": (
        lambda: {"optimizers": (torch.optim.SGD, None)},
        "optimizers: expected an optimizer",
    ),
    "a schedule alone": (schedule_alone, "optimizers: the schedule is of an optimizer that is not there"),
    "an optimizer that needs a closure": (lbfgs, "optimizers: LBFGS evaluates the loss several times"),
    "a callback that is none": (lambda: {"callbacks": [3]}, "callbacks: expected a TrainerCallback, got 3"),
    "a tokenizer's name": (
        lambda: {"processing_class": "gpt2"},
        "processing_class: expected a tokenizer, got str",
    ),
    "no tokenizer": (
        lambda: {"processing_class": None},
        "processing_class: the model was not loaded by a name",
    ),
    "a module": (lambda: {"model": Wrapped()}, "model: expected a PreTrainedModel or PeftModel, got Wrapped"),
    "DataParallel": (
        lambda: {"model": torch.nn.DataParallel(tiny_llama())},
        "model: expected a PreTrainedModel or PeftModel, got DataParallel: pass the model inside (.module)",
    ),
    "a compiled model": (
        lambda: {"model": torch.compile(tiny_llama(), backend="eager")},
        "model: expected a PreTrainedModel or PeftModel, got OptimizedModule: pass the model inside (._orig_mod)",
    ),
    "a model without weights": (
        lambda: {"model": on_meta()},
        "the weight 'model.embed_tokens.weight' is not in",
    ),
    "a reference without weights": (
        lambda: {"ref_model": on_meta()},
        "the weight 'model.embed_tokens.weight' is not",
    ),
    "a reference with NaN": (
        lambda: {"ref_model": nan_model()},
        "rows.jsonl:",
    ),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_of_the_wrong_kind_are_refused_by_name(tmp_path: Path, name: str) -> None:
    make, message = OBJECTS[name]
    with pytest.raises(InfoPOError) as caught:
        trainer(tmp_path, **make())
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 500


def test_a_live_reference_that_gives_nan_is_named_as_the_cause(tmp_path: Path) -> None:
    made = trainer(tmp_path, ref_model=nan_model(), settings={"reference": "live"})
    with pytest.raises(NonFiniteLossError, match="The reference's log-probs are not finite"):
        made.train()


def test_a_model_that_keeps_states_of_its_last_pass_can_be_copied_for_a_live_reference(
    tmp_path: Path,
) -> None:
    model = tiny_llama()
    model.model.layers[0].register_forward_hook(lambda module, _, output: setattr(module, "state", output))
    made = trainer(tmp_path, model=model, settings={"reference": "live"})
    made.train()
    assert made.state.log_history[0]["ratio/max"] == pytest.approx(1)


def test_a_model_that_cannot_be_copied_is_refused_as_its_own_live_reference(tmp_path: Path) -> None:
    model = tiny_llama()
    with Path(__file__).open() as handle:
        model.handle = handle  # what cannot be copied
        with pytest.raises(ModelError, match=r"^reference='live': LlamaForCausalLM cannot be copied"):
            trainer(tmp_path, model=model, settings={"reference": "live"})


def test_a_callback_may_be_a_class(tmp_path: Path) -> None:
    class Quiet(TrainerCallback):
        pass

    assert any(isinstance(c, Quiet) for c in trainer(tmp_path, callbacks=[Quiet]).callback_handler.callbacks)


def test_a_model_without_a_generation_config_can_be_saved(tmp_path: Path) -> None:
    model = tiny_llama()
    model.generation_config = None
    made = trainer(tmp_path, model=model, settings={"save_strategy": "steps", "save_steps": 1})
    made.train()
    made.save_final_model()
    assert (tmp_path / "model.safetensors").is_file()
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()


def test_checkpointing_that_was_asked_for_with_arguments_is_not_left_out(tmp_path: Path) -> None:
    settings = {"activation_checkpointing": None, "activation_checkpointing_kwargs": {"foo": 1}}
    with pytest.raises(
        ConfigError, match=r"Unexpected keyword arguments: foo\. It trains without: set gradient_check"
    ):
        trainer(tmp_path, settings=settings)


@pytest.mark.parametrize("method", ["predict", "prediction_step", "hyperparameter_search"])
def test_methods_that_need_logits_or_other_models_are_refused(tmp_path: Path, method: str) -> None:
    with pytest.raises(UnsupportedArgumentError, match=rf"^{method}: "):
        getattr(trainer(tmp_path), method)()


def test_outputs_of_a_batch_that_are_asked_for_are_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, settings={"per_device_train_batch_size": 4})
    [batch] = next(iter(made.get_train_dataloader()))
    with pytest.raises(UnsupportedArgumentError, match=r"^compute_loss: no logits are kept"):
        made.compute_loss(made.model, batch, return_outputs=True)


def test_an_evaluation_of_nothing_and_of_an_unknown_set_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^evaluate: the trainer was given no eval_dataset"):
        trainer(tmp_path).evaluate()
    sets = {"a": random_dataset(2), "b": random_dataset(2, seed=1)}
    made = trainer(tmp_path, eval_dataset=copy.copy(sets))
    assert "eval_loss" in made.evaluate("a")
    with pytest.raises(ConfigError, match=r"^evaluate: there is no dataset 'c'; the trainer has 'a', 'b'"):
        made.evaluate("c")


def test_an_evaluation_before_training_does_not_trust_a_model_that_sees_later_tokens(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertLMHeadModel(BertConfig(vocab_size=61, initializer_range=0.3, **sizes)).eval()
    made = trainer(tmp_path, model=model, eval_dataset=random_dataset(2))
    with pytest.raises(LogpsError, match="with the tokens after it"):
        made.evaluate()


def test_a_checkpoint_is_resumed_whose_layers_only_the_class_of_the_model_knows(tmp_path: Path) -> None:
    """transformers reads its configuration as one of no class in particular, and refuses to."""

    def made() -> InfoPOTrainer:
        model = architectures.VARIANTS.get("deepseek_v4", architectures._with("deepseek_v4"))()
        settings = {
            "max_steps": 2,
            "save_strategy": "steps",
            "save_steps": 1,
            "per_device_train_batch_size": 2,
        }
        return trainer(tmp_path, model=model, settings=settings)

    whole = made()
    whole.train()
    resumed = made()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [r["loss"] for r in resumed.state.log_history if "loss" in r] == [
        r["loss"] for r in whole.state.log_history if "loss" in r
    ]
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, msg=name)


def test_a_model_error_says_what_the_model_is(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match="T5ForConditionalGeneration is a model of another class, an encoder"
    ):
        trainer(tmp_path, model=t5())


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=61, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    )
