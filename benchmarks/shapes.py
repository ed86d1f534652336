"""Makes models with random weights, and a tokenizer whose words are numbers."""

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import is_flash_attn_2_available

_ROPE = {"rope_theta": 5e5, "rope_type": "default"}
_LLAMA_3 = {"vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_parameters": _ROPE}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "a4k": {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    "1b": {**_LLAMA_3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
    "8b": {**_LLAMA_3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
}  # fmt: skip
"""Shapes of Llamas by name.

`tiny` is for tests. `a4k` is for a CPU, and its head has the same share of the work as in a real model. `1b` and `8b`
are Llama 3.2 and 3.1.
"""

SPECIAL = ("<pad>", "<bos>", "<eos>")


def model_config(name: str, vocabulary: int | None = None) -> LlamaConfig:
    shape = SHAPES[name] | ({"vocab_size": vocabulary} if vocabulary else {})
    return LlamaConfig(
        **shape, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False
    )


def build_model(job: dict[str, Any], seed: int) -> LlamaForCausalLM:
    """Returns the job's model, with weights drawn from `seed` in the precision and on the device of its training."""
    cuda = job["device"] == "cuda"
    config = model_config(job["model"], job["vocabulary"])
    torch.manual_seed(seed)
    with torch.device(job["device"]):
        model = LlamaForCausalLM._from_config(
            config,
            dtype=torch.bfloat16 if cuda and not job.get("autocast") else torch.float32,
            attn_implementation="flash_attention_2"
            if cuda and is_flash_attn_2_available() and not job["variant"].startswith("infopo")
            else "sdpa",
        )
    return model


def build_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one word per token, in which `7` is token 7."""
    words = {word: i for i, word in enumerate([*SPECIAL, *map(str, range(len(SPECIAL), vocabulary))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
