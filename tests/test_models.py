"""Models that are no causal language models, or none at all, end in one line that says so."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    T5Config,
    ViTConfig,
)

from infopo import InfoPOConfig, InfoPOTrainer
from infopo.errors import InfoPOError, ModelError
from infopo.lab.tokenizer import build_tokenizer
from infopo.models import add_adapter, cannot_load, load_policy, resolve_name
from worlds import PLAIN_SGD, random_dataset, tiny_llama

LLAMA = LlamaConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
BERT = BertConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
)
OTHERS: dict[str, Any] = {
    "encoder-decoder": lambda: AutoModelForSeq2SeqLM.from_config(
        T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    ),
    "classifier with tied embeddings": lambda: AutoModelForSequenceClassification.from_config(LLAMA),
    "body without a head": lambda: AutoModel.from_config(BERT),
    "masked": lambda: AutoModelForMaskedLM.from_config(BERT),
    "vision": lambda: AutoModelForImageClassification.from_config(
        ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=32)
    ),
}  # fmt: skip


def train(folder: Path, model: Any) -> None:
    InfoPOTrainer(
        model=model,
        args=InfoPOConfig(output_dir=str(folder), **PLAIN_SGD, max_steps=1, bf16=False, report_to="none"),
        train_dataset=random_dataset(4),
        processing_class=build_tokenizer(),
    ).train()


@pytest.mark.parametrize("given", ["folder", "object"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_model_of_another_class_is_refused_in_one_line(tmp_path: Path, name: str, given: str) -> None:
    model = OTHERS[name]()
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(InfoPOError) as error:
        train(tmp_path, str(tmp_path / "model") if given == "folder" else model)
    assert isinstance(error.value, ModelError)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("change", [
    {"num_hidden_layers": 0}, {"num_hidden_layers": -1},
    {"num_attention_heads": 0}, {"hidden_size": -32}, {"hidden_size": 0},
    {"vocab_size": -5}, {"num_key_value_heads": 0}, {"num_key_value_heads": 3}, {"intermediate_size": -1},
    {"hidden_act": "none such"}, {"rope_parameters": {"rope_type": "none such", "rope_theta": 1e4}},
    {"head_dim": -8}, {"num_attention_heads": "four"}, {"rms_norm_eps": None}, {"model_type": "none such"},
], ids=str)  # fmt: skip
def test_an_impossible_configuration_ends_in_a_named_error(tmp_path: Path, change: dict[str, Any]) -> None:
    tiny_llama().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError) as error:
        train(tmp_path / "run", str(tmp_path))
    assert len(str(error.value)) < 500


def test_what_the_hub_answers_is_cut_between_words() -> None:
    answer = "We could not connect: see https://host/" + "a" * 30 + " and https://host/" + "b" * 200
    told = str(cannot_load("model", "my-org/nothing", OSError(answer)))
    assert told.endswith(f"the hub has no answer (We could not connect: see https://host/{'a' * 30} and ...)")


@pytest.mark.parametrize(("beside", "told"), [("runs/lab", True), ("elsewhere/lab", False)])
def test_a_name_that_stands_beside_runs_is_said_to_be_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, beside: str, told: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / beside).mkdir(parents=True)
    (tmp_path / beside / "recipe.yaml").write_text("", encoding="utf-8")
    name = f"runs/not-{beside.split('/')[0]}"
    for _ in range(2):
        assert resolve_name(name) == name
    warned = f"there is no folder {name} here, only runs/lab; the hub is asked for the model"
    assert caplog.messages == [warned] * told


def test_a_sound_folder_still_loads(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    assert load_policy(str(tmp_path)).num_parameters() == tiny_llama().num_parameters()


def test_what_peft_raises_at_an_adapters_settings_is_told_as_the_adapters() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights="loftq", loftq_config={"bits": 4})
    with pytest.raises(ModelError, match="peft_config does not fit LlamaForCausalLM"):
        add_adapter(tiny_llama(), config)


def test_the_folder_of_an_adapter_is_no_policy_and_is_told_what_to_do(tmp_path: Path):
    """transformers loads it with its base, frozen, and a second adapter would nest on it."""
    peft = pytest.importorskip("peft")
    tiny_llama().save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(
        load_policy(str(tmp_path / "base")), peft.LoraConfig(target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match="is an adapter, not a complete model"):
        load_policy(str(tmp_path / "adapter"))


def test_an_adapter_is_added_and_loaded_without_a_warning_that_users_cannot_heed(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_adapter(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
