"""The load-balancing loss of mixture-of-experts models is TRL's, in value and in what it does to the weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MixtralConfig, PreTrainedTokenizerFast, Qwen3MoeConfig
from transformers.modeling_outputs import CausalLMOutput
from trl import DPOConfig, DPOTrainer

from infopo import InfoPOConfig, InfoPOTrainer
from infopo.data.packing import pack
from infopo.errors import RecipeError
from infopo.logps import router
from infopo.logps.forward import prepare, response_logps
from worlds import quick, random_examples, tiny_llama, tiny_of

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of libraries under comparison are not ours

SIZE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
MODELS = {
    "mixtral": MixtralConfig(**SIZE, num_local_experts=4, router_aux_loss_coef=0.5, router_jitter_noise=0.0),
    "qwen3": Qwen3MoeConfig(
        **SIZE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8, router_aux_loss_coef=0.5
    ),
}  # fmt: skip
WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", *["one", "two", "three", "four", "five", "six", "seven"]]
words = WORDS[4:]
ROWS = [
    {
        "prompt": " ".join(words[i % 3 : i % 3 + 3]),
        "chosen": " " + " ".join(words[1 : 2 + i % 4]),
        "rejected": " " + " ".join(words[2 : 4 + i % 3]),
    }
    for i in range(8)
]  # fmt: skip
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3, "logging_steps": 1,
    "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "bf16": False,
    "use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "save_strategy": "no",
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, so that no tokens merge across the boundary of prompt and response."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def trained(trainer: Any, config: Any, folder: Path, name: str, **settings: Any) -> Any:
    result = trainer(
        model=tiny_of(copy.deepcopy(MODELS[name])),
        ref_model=tiny_of(copy.deepcopy(MODELS[name])),
        args=config(output_dir=str(folder), **{**COMMON, **settings}),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer(),
    )
    result.train()
    return result


@pytest.mark.parametrize("coefficient", [None, 0.0, 2.0])
@pytest.mark.parametrize("name", quick(MODELS, "mixtral"))
def test_losses_and_weights_are_those_of_trl(tmp_path: Path, name: str, coefficient: float | None) -> None:
    settings = {"router_aux_loss_coef": coefficient, "gradient_checkpointing": coefficient is None}
    theirs = trained(DPOTrainer, DPOConfig, tmp_path, name, **settings)
    ours = trained(InfoPOTrainer, InfoPOConfig, tmp_path, name, loss_type=["sigmoid"], **settings)
    expected, records = (
        [record for record in t.state.log_history if "loss" in record] for t in (theirs, ours)
    )
    names = ["loss"] if coefficient == 0.0 else ["loss", "aux_loss"]
    for a, b in zip(expected, records, strict=True):
        assert [b[n] for n in names] == pytest.approx([a[n] for n in names], rel=1e-4)
        assert ("aux_loss" in b) is (coefficient != 0.0)
    for a, b in zip(theirs.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("name", MODELS)
def test_shared_prompts_give_the_loss_and_the_gradient_of_rows(name: str) -> None:
    batch = pack(random_examples(5, seed=3, chosen=(1, 2), rejected=(2, 1)))
    values, gradients = [], []
    for setting in ("auto", "naive"):
        model = tiny_of(copy.deepcopy(MODELS[name]))
        path, _ = prepare([model], setting)
        with router.aux_losses(True) as found:
            response_logps(model, batch)
        (aux,) = [router.mean(found)]
        aux.backward()
        values.append(float(aux.detach()))
        gradients.append([p.grad.clone() for n, p in model.named_parameters() if p.grad is not None])
        assert path == ("forest" if setting == "auto" else "naive")
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert any(bool(g.any()) for g in gradients[0])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-4 * max(1.0, float(b.abs().max())))


def test_evaluation_adds_it_as_training_does(tmp_path: Path) -> None:
    trainer = trained(InfoPOTrainer, InfoPOConfig, tmp_path, "mixtral", per_device_eval_batch_size=8)
    data = Dataset.from_list(ROWS)
    metrics = {}
    for coefficient in (0.0, 0.5):
        args = InfoPOConfig(output_dir=str(tmp_path), **COMMON, router_aux_loss_coef=coefficient)
        metrics[coefficient] = InfoPOTrainer(
            model=trainer.model,
            args=args,
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer(),
        ).evaluate()
    assert "eval_aux_loss" not in metrics[0.0]
    added = metrics[0.5]["eval_loss"] - metrics[0.0]["eval_loss"]
    assert added == pytest.approx(0.5 * metrics[0.5]["eval_aux_loss"], rel=1e-3)


def test_the_factor_is_the_configurations_unless_it_is_set_and_a_dense_model_has_none() -> None:
    model = tiny_of(copy.deepcopy(MODELS["mixtral"]))
    assert [router.coefficient(model, value) for value in (None, 0.0, 0.1)] == [0.5, 0.0, 0.1]
    assert router.coefficient(tiny_llama(), None) == router.coefficient(tiny_llama(), 0.0) == 0.0
    with pytest.raises(RecipeError, match="LlamaForCausalLM is no mixture of experts"):
        router.coefficient(tiny_llama(), 0.1)
    config = copy.deepcopy(MODELS["qwen3"])
    config.mlp_only_layers = [0, 1]  # a mixture of experts without any
    assert router.coefficient(tiny_of(config), None) == 0.0


@pytest.mark.parametrize("name", MODELS)
def test_router_logits_that_the_configuration_asks_for_disturb_nothing(name: str) -> None:
    model = tiny_of(copy.deepcopy(MODELS[name]))
    batch = pack(random_examples(3))
    with torch.no_grad():
        expected = response_logps(model, batch)
        model.config.output_router_logits = True
        for setting in ("auto", "naive"):
            prepare([model], setting)
            assert torch.allclose(response_logps(model, batch), expected, atol=1e-4)


def test_a_model_that_gives_no_auxiliary_loss_where_one_is_asked_for_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    router._warn_of_none.cache_clear()
    with router.aux_losses(wanted=True) as found:
        for _ in range(2):
            router.note(CausalLMOutput(), torch.ones(3))
    assert found == []
    assert [r.getMessage() for r in caplog.records] == [
        "the model gives no auxiliary loss of its routers (CausalLMOutput), so none is added"
    ]
