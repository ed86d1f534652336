"""Architectures: every causal language model that transformers knows, as a tiny random one."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from infopo.errors import ModelError
from infopo.models import load_policy
from tried import trial
from tried.tiny import tiny_config, tiny_model
from tried.trial import Row

INTRODUCTION = """All causal language models of transformers, by the name in their configurations, as random models with
a layer of each kind; and settings that change the computation. Each is trained for two steps with the trainer's default
settings on rows of unequal lengths, one of which has several responses. *Trained* means that

- log-probs of a batch agree with forward passes of the model alone, one row at a time, within 1e-3 nat in float32,
- the ratio of policy and reference at step 0 is 1 within 1e-3,
- weights change,
- and the saved model, read again, has the log-probs of the trained one.
"""

KINDS: dict[str, type[PreTrainedConfig]] = {kind.model_type: kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING}

OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "hidden_size": 32, "moe_top_k": 2},
    },
    "deepseek_v2": {"topk_group": 1, "n_group": 1, "num_experts_per_tok": 2},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "falcon_h1": {"lm_head_multiplier": 0.5},
    "got_ocr2": {"vision_config": {"output_channels": 8, "image_size": 64, "mlp_dim": 32}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16, "num_heads": 4},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_shape": [16, 32],
        "axial_pos_embds_dim": [8, 24],
    },
    "roc_bert": {
        "shape_vocab_size": 40, "pronunciation_vocab_size": 40, "shape_embed_dim": 8, "pronunciation_embed_dim": 8,
    },
    "xlstm": {"num_heads": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"mamba_headdim": 16, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""Settings without which a tiny model of the type cannot be made, or would lack what makes the type."""

NOT_TRIED = {
    "blt": "its hash embeddings have 96 million parameters at the least",
    "dots3_note": "its configuration has no tiny form",
    "dots3_note_text": "its configuration has no tiny form",
    "gemma3n": "its vision tower needs timm; `gemma3n_text` is tried",
    "gemma4_assistant": "it drafts for another model, and reads that one's hidden states",
    "gemma4_unified_assistant": "it drafts for another model, and reads that one's hidden states",
    "musicgen": "it writes audio",
    "musicgen_melody": "it writes audio",
    "phi4_multimodal": "its audio tower has no tiny form",
    "qwen4_exp": "its indexer has no default sizes; `qwen4_exp_text` is tried",
    "zamba": "transformers 5.23 cannot make it with few layers",
}
"""Type -> why no tiny model of it can be made or trained on text."""

NOT_OURS = {
    "youtu": "transformers zeroes the padding token's embedding when it reads a saved model, and it is the head's too",
}
"""Type -> why a fault on the page is not this library's."""


def _with(kind: str, **settings: Any) -> Callable[[], PreTrainedModel]:
    return lambda: tiny_model(tiny_config(KINDS[kind], OWN.get(kind, {}) | settings))


def _eager(kind: str) -> PreTrainedModel:
    model = _with(kind)()
    model.set_attn_implementation("eager")
    return model


class OwnLlama(LlamaForCausalLM):
    """As remote code is: a class that transformers does not know, with a forward pass of its own."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def _own_class() -> PreTrainedModel:
    torch.manual_seed(0)
    return OwnLlama(tiny_config(KINDS["llama"], {"initializer_range": 0.3})).eval()


def _long_rope(original: int) -> dict[str, Any]:
    factors = {
        "short_factor": [1.0] * 4,
        "long_factor": [8.0] * 4,
        "original_max_position_embeddings": original,
    }
    return {
        "original_max_position_embeddings": original,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 512 / original, **factors},
    }


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, **settings}}


VARIANTS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama, attention `eager`": partial(_eager, "llama"),
    "llama, tied embeddings and biases": _with(
        "llama", tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama, linear RoPE": _with("llama", **_rope("linear")),
    "llama, dynamic RoPE": _with("llama", **_rope("dynamic")),
    "llama, YaRN": _with("llama", **_rope("yarn", original_max_position_embeddings=128)),
    "llama, Llama 3's RoPE": _with(
        "llama",
        **_rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128),
    ),
    "llama, a class of the user's own": _own_class,
    "phi3, LongRoPE, all rows short": _with("phi3", **_long_rope(128)),
    "phi3, LongRoPE, rows on both sides of its switch": _with("phi3", **_long_rope(24)),
    "qwen2, sliding window": _with("qwen2", use_sliding_window=True, max_window_layers=1, layer_types=None),
    "falcon, ALiBi": _with("falcon", alibi=True),
    "falcon, new decoder": _with("falcon", new_decoder_architecture=True),
    "gpt_neox, sequential residual": _with("gpt_neox", use_parallel_residual=False),
    "mixtral, router noise": _with("mixtral", router_jitter_noise=0.1),
    "mixtral, router logits": _with("mixtral", output_router_logits=True),
    "doge, sparse beyond a window": _with("doge", keep_window_size=8),
    "bert, as a decoder": _with("bert", is_decoder=True),
}


def names() -> list[str]:
    return sorted([*KINDS, *VARIANTS])


def row(name: str) -> Row:
    if name in NOT_TRIED:
        return Row(name, "not tried", NOT_TRIED[name])
    try:
        with trial.quiet():
            model = VARIANTS.get(name, _with(name))()
    except Exception as error:
        return Row(name, "not tried", f"no tiny model of it can be made: {trial.first_sentence(error)}")

    def load(folder: str) -> torch.nn.Module:
        try:
            return load_policy(folder)
        except ModelError:  # a text model that is known only as a part of another: its own class reads it
            return type(model).from_pretrained(folder)

    result = trial.train(name, model, load)
    if result.result == "fault" and name in NOT_OURS:
        return Row(name, "trained", f"but {NOT_OURS[name]}")
    return result
