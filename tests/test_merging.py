"""A merged model computes what base and adapter do, also if transformers alone loads it."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from infopo.adapters import load_adapter, load_for_use
from infopo.errors import ModelError
from infopo.merging import merge
from trainers import TOKENIZER
from worlds import VOCABULARY, quick, tiny_llama

FLOAT32 = 1e-4  # log-probs of a random model whose logits are in the tens


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | settings
    )


KINDS: dict[str, Any] = {
    "lora": lambda: lora(target_modules="all-linear"),
    "dora": lambda: lora(use_dora=True),
    "rslora": lambda: lora(use_rslora=True),
    "bias": lambda: lora(bias="lora_only"),
    "head saved": lambda: lora(modules_to_save=["lm_head"]),
    "embedding saved": lambda: lora(modules_to_save=["embed_tokens"]),
    "both saved": lambda: lora(modules_to_save=["embed_tokens", "lm_head"]),
    "norm saved": lambda: lora(modules_to_save=["norm"]),
    "trainable tokens": lambda: lora(trainable_token_indices=[5, 6]),
    "embedding": lambda: lora(target_modules=["q_proj", "embed_tokens"]),
    "head": lambda: lora(target_modules=["q_proj", "lm_head"]),
    "parameters": lambda: lora(target_modules=[], target_parameters=["mlp.gate_proj.weight"]),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "loha": lambda: peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
    "ia3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "layer norms": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
}
FAST = ("lora", "dora", "head saved", "embedding saved", "trainable tokens", "embedding", "head")


def saved(folder: Path, config: Any, **base: Any) -> Path:
    """An adapter, far from its base, beside it."""
    tiny_llama(**base).save_pretrained(folder / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto"), config)
    torch.manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.2 * torch.randn_like(weight)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def logps(model: Any) -> torch.Tensor:
    ids = torch.arange(3 * 16).reshape(3, 16) % VOCABULARY
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=ids).logits.float(), -1)


def again(model: Any, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder / "merged")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder / "merged", dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    return loaded


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", quick(KINDS, *FAST))
def test_transformers_alone_computes_what_base_and_adapter_do(tmp_path: Path, kind: str, tied: bool) -> None:
    adapter = saved(tmp_path, KINDS[kind](), tie_word_embeddings=tied)
    expected = logps(AutoPeftModelForCausalLM.from_pretrained(adapter).eval())
    base = logps(AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval())
    assert (expected - base).abs().max() > 0.5, "an adapter that does nothing shows nothing"
    merged = again(merge(load_adapter(str(adapter)).eval()), tmp_path)
    torch.testing.assert_close(logps(merged), expected, rtol=0, atol=FLOAT32)
    assert merged.config.tie_word_embeddings == (tied and kind not in UNTIES)
    torch.testing.assert_close(logps(load_for_use(str(adapter))), expected, rtol=0, atol=FLOAT32)


def test_embeddings_are_those_that_were_trained_however_many_tokens_the_tokenizer_has(tmp_path: Path) -> None:
    """A tokenizer may have tokens beyond the embeddings, and an adapter may have been saved with more of them."""
    adapter = saved(tmp_path, lora())
    TOKENIZER.save_pretrained(adapter)
    assert len(TOKENIZER) > VOCABULARY
    assert logps(load_for_use(str(adapter))).shape[-1] == VOCABULARY
    grown = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    grown.resize_token_embeddings(VOCABULARY + 3)
    model = get_peft_model(grown, lora(modules_to_save=["embed_tokens", "lm_head"])).eval()
    model.save_pretrained(tmp_path / "grown")
    torch.testing.assert_close(
        logps(load_for_use(str(tmp_path / "grown"))), logps(model), rtol=0, atol=FLOAT32
    )


UNTIES = ("head saved", "embedding saved", "both saved", "embedding", "head")


@pytest.mark.parametrize("kind", ["lora", "dora", "head saved"])
def test_half_precision_is_rounded_once_and_keeps_its_type(tmp_path: Path, kind: str) -> None:
    """A merge in bfloat16 would round the update, too: the weights would be further from those in float32."""
    adapter = saved(tmp_path, KINDS[kind](), dtype=torch.bfloat16)
    merged = again(merge(load_adapter(str(adapter))), tmp_path)
    assert {weight.dtype for weight in merged.parameters()} == {torch.bfloat16}
    exact = merge(load_adapter(str(adapter), "float32")).state_dict()
    for name, weight in merged.state_dict().items():
        assert torch.equal(weight, exact[name].to(torch.bfloat16)), name


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PROMPT_TUNING adds vectors"),
        (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PREFIX_TUNING adds vectors"),
        (lora(alora_invocation_tokens=[5, 6]), "acts from certain tokens on"),
    ],
    ids=["prompt", "prefix", "alora"],
)
def test_what_is_no_part_of_the_weights_is_refused_by_name_and_used_as_it_is(
    tmp_path: Path, config: Any, said: str
) -> None:
    adapter = saved(tmp_path, config)
    expected = logps(AutoPeftModelForCausalLM.from_pretrained(adapter).eval())
    with pytest.raises(ModelError, match=said):
        merge(load_adapter(str(adapter)))
    torch.testing.assert_close(logps(load_for_use(str(adapter))), expected)
