"""Small models of families of attention, and whether a path gives the naive path's numbers."""

from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from infopo.logps import attention
from infopo.logps.forward import response_logps
from infopo.models import disable_dropout
from infopo.records import PackedBatch, PreferenceExample
from worlds import random_examples, tiny_of

SMALL: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOW = {"sliding_window": 4}
NO_GROUPS = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "mistral, sliding window": MistralConfig(**SMALL, **WINDOW),
    "qwen2, sliding window": Qwen2Config(**SMALL, **WINDOW, use_sliding_window=True, max_window_layers=1),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "gemma2, soft cap": Gemma2Config(**SMALL, **WINDOW, head_dim=8, attn_logit_softcapping=2.0,
                                     final_logit_softcapping=5.0),
    "gemma3": Gemma3TextConfig(**SMALL, **WINDOW, head_dim=8),
    "gpt-neox": GPTNeoXConfig(**NO_GROUPS),
    "gpt-oss, sinks": GptOssConfig(**SMALL, **WINDOW, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
    "gpt2": GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2),
    "phi3": Phi3Config(**SMALL, **WINDOW),
    "olmo2": Olmo2Config(**SMALL),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
}  # fmt: skip

BEGINNING = [7, 9, 11, 8, 12]
EXAMPLES = [
    *random_examples(5, chosen=(1, 0, 2), rejected=(1, 2)),
    PreferenceExample(
        [5, 6], [[*BEGINNING, 4, 3], [*BEGINNING, 4, 5, 6]], [[9, 9], [*BEGINNING[:3], 3], [*BEGINNING]], "r"
    ),
]
# Relative to the largest value; float32 sums in another order. The design's bound.
TOLERANCE = 1e-4


def results(model: torch.nn.Module, batch: PackedBatch, path: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probs, and gradients of a sum of them with unequal weights."""
    model.zero_grad()
    values = response_logps(model, batch, path)
    (values * torch.linspace(-1, 2, batch.num_responses, dtype=values.dtype)).sum().backward()
    return values.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same_gradients(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE * largest)


def assert_agree(model: torch.nn.Module, batch: PackedBatch) -> None:
    values, gradients = results(model, batch, "forest")
    expected, expected_gradients = results(model, batch, "naive")
    torch.testing.assert_close(values, expected, rtol=0, atol=TOLERANCE)
    assert_same_gradients(gradients, expected_gradients)


def prepared(family: str) -> torch.nn.Module:
    model = tiny_of(FAMILIES[family])
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(parameter)  # at zero a sink that is left out could pass
    disable_dropout(model)
    assert attention.enable(model) is None
    return model
