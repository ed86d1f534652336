"""Tiny random models of every architecture that transformers knows, made from configurations alone."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCABULARY = 262
"""Of the lab's tokenizer."""
LARGEST = 2_000_000
"""Parameters: what has more is not tiny, and takes too long for a sweep."""

SIZES: dict[str, int] = {
    name: size
    for size, names in {
        32: "hidden_size d_model n_embd emb_dim embedding_size embedding_dim word_embed_proj_dim lru_width "
        "input_embedding_size output_embedding_size hidden_size_global attention_hidden_size kda_hidden_size",
        2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
        "num_encoder_layers num_blocks num_key_value_heads num_kv_heads swa_num_key_value_heads "
        "num_experts_per_tok num_experts_per_token moe_topk moe_k linear_num_key_heads linear_num_heads o_groups",
        4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads num_decoder_attention_heads "
        "encoder_attention_heads num_encoder_attention_heads swa_num_attention_heads num_query_groups "
        "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num linear_num_value_heads "
        "mamba_n_heads mamba_num_heads n_mamba_heads qk_rope_head_dim rotary_dim laurel_rank adapter_rank "
        "time_step_rank mamba_dt_rank",
        8: "head_dim attention_head_dim attention_head_size swa_head_dim kv_channels d_head dim_head kv_lora_rank "
        "q_lora_rank o_lora_rank qk_nope_head_dim v_head_dim linear_head_dim index_head_dim index_topk "
        "linear_key_head_dim linear_value_head_dim mamba_d_state state_size ssm_state_size sliding_window "
        "attention_window_size window_size sliding_window_size attention_chunk_size hidden_size_per_layer_input",
        16: "index_n_heads chunk_size mamba_chunk_size mamba_d_head mamba_head_dim mamba_headdim",
        24: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
        "moe_shared_expert_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size",
        48: "intermediate_size ffn_dim ffn_hidden_size decoder_ffn_dim encoder_ffn_dim dff dim_ff n_inner d_inner "
        "dense_intermediate_size intermediate_size_mlp feed_forward_size",
        1: "n_group topk_group num_expert_group n_shared_experts num_shared_experts n_groups mamba_n_groups "
        "mamba_ngroups bos_token_id first_k_dense_replace num_dense_layers",
        64: "mamba_d_ssm",
        512: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions model_max_length "
        "context_length",
        VOCABULARY: "vocab_size vocab_size_per_layer_input",
        0: "pad_token_id num_nextn_predict_layers num_kv_shared_layers",
    }.items()
    for name in names.split()
}  # fmt: skip
SIZES["eos_token_id"] = 2


def tiny_config(kind: type[PreTrainedConfig], own: dict[str, Any]) -> PreTrainedConfig:
    """A configuration of this kind whose sizes are small.

    Args:
        kind: Class of the configuration.
        own: Settings that this architecture needs beside, or in place of, `SIZES`; for a configuration within, a dict.
    """
    return kind(**_settings(kind(), own))


def _settings(default: PreTrainedConfig, own: dict[str, Any]) -> dict[str, Any]:
    present = default.to_dict()
    settings: dict[str, Any] = {
        name: size
        for name, size in SIZES.items()
        if name in present
        and (
            present[name] is not None
            or name.endswith("token_id")
            or name in ("head_dim", "num_key_value_heads")
        )
    }
    if "kv_lora_rank" in present:  # no groups, and the width of heads follows from those of their parts
        settings |= {"num_key_value_heads": 4, "head_dim": 4}
    settings |= _layers(default, own)
    settings = {name: value for name, value in settings.items() if name in present}
    for name in getattr(default, "sub_configs", {}):
        if (inner := getattr(default, name, None)) is not None:
            settings[name] = _settings(inner, own.get(name, {}))
    return settings | {k: v for k, v in own.items() if k not in getattr(default, "sub_configs", {})}


def _layers(default: PreTrainedConfig, own: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind that the architecture has by default, in their order; two at least."""
    present = default.to_dict()
    kinds = {
        name: list(dict.fromkeys(own.get(name) or present.get(name) or ()))
        for name in ("layer_types", "layers_block_type", "mlp_layer_types")
    }
    number = max(2, *map(len, kinds.values()))
    lists = {name: (each + each[-1:] * number)[:number] for name, each in kinds.items() if each}
    names = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
    return lists | {name: number for name in names if name in present}


def tiny_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model whose every weight matters: none is 0 or 1, as norms, biases and sinks are at first."""
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    if size > LARGEST:
        raise ValueError(f"{size} parameters")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
