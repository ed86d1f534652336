"""FLOPs of an optimizer step by its matrix products, 2 a multiply-add. The formula is in README.md.

Elementwise work, the optimizer and the loss are left out: they are under 1 % of these on any model of interest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from infopo.data.packing import pack, split_by_tokens
from infopo.logps.lm_head import KEPT_LOGITS
from infopo.records import PreferenceExample
from infopo.startup import CPU_TOKENS_PER_FORWARD

COMPACT = {"trl_best", "trl_accumulated"}
"""Variants of TRL whose head scores responses only."""

FORWARD_AND_BACKWARD = 3.0
ATTENTION_FORWARD_AND_BACKWARD = 3.5  # scores are computed once more in the backward pass
HEAD_MATMULS = 4.0
"""Of a head that keeps no logits and computes them again in the backward pass; 3 where it keeps them."""


@dataclass(frozen=True)
class Flops:
    """Of a step, forward and backward pass, by kind."""

    linear: float = 0.0
    attention: float = 0.0
    head: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.head


@dataclass(frozen=True)
class Work:
    """What a step sends through the model.

    Attributes:
        tokens: Positions that pass the layers.
        attended: (query, key) pairs of one head.
        scored: Positions that pass the head.
    """

    tokens: int
    attended: int
    scored: int


def layer_weights(config: Any) -> int:
    """Weights of a Llama's matrices, all layers, without embedding and head."""
    width = config.head_dim
    queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
    attention = 2 * config.hidden_size * (queries + keys)
    return config.num_hidden_layers * (attention + 3 * config.hidden_size * config.intermediate_size)


def step_flops(
    config: Any, work: Work, head_matmuls: float, with_reference: bool = False, checkpointing: bool = False
) -> Flops:
    """FLOPs of forward and backward pass, with the forward pass of a reference where it runs in the step."""
    linear = 2.0 * layer_weights(config) * work.tokens
    attention = 4.0 * work.attended * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    head = 2.0 * config.hidden_size * config.vocab_size * work.scored
    extra = with_reference + checkpointing
    return Flops(
        linear=(FORWARD_AND_BACKWARD + extra) * linear,
        attention=(ATTENTION_FORWARD_AND_BACKWARD + extra) * attention,
        head=(head_matmuls + with_reference) * head,
    )


def packed_work(examples: Sequence[PreferenceExample]) -> Work:
    """Of our layout: each stored token once, and exactly the keys on its path."""
    batch = pack(examples)
    attended = scored = 0
    for segment in range(len(batch.segment_parent)):
        size = batch.segment_start[segment + 1] - batch.segment_start[segment]
        before, above = 0, batch.segment_parent[segment]
        while above >= 0:
            before += batch.segment_start[above + 1] - batch.segment_start[above]
            above = batch.segment_parent[above]
        attended += size * before + size * (size + 1) // 2
        scored += size if batch.segment_scored[segment] else 0
    return Work(tokens=batch.segment_start[-1], attended=attended, scored=scored)


def padded_work(pairs: Sequence[PreferenceExample], responses_only: bool, unpadded: bool = False) -> Work:
    """Of TRL's layout: a row a response, padded to the longest; attention with a mask computes the full square.

    Args:
        pairs: Examples of one chosen and one rejected response.
        responses_only: Whether the head scores responses only, or every position.
        unpadded: Whether attention skips padding and the future, as flash attention does.
    """
    rows = [(len(e.prompt_ids), len(ids)) for e in pairs for ids in e.response_ids]
    longest = max(prompt + response for prompt, response in rows)
    return Work(
        tokens=len(rows) * longest,
        attended=sum((p + r) * (p + r + 1) // 2 for p, r in rows) if unpadded else len(rows) * longest**2,
        scored=sum(r for _, r in rows) if responses_only else len(rows) * (longest - 1),
    )


def our_head_matmuls(config: Any, work: Work) -> float:
    """Our head keeps the logits that fit a fixed budget."""
    return HEAD_MATMULS - min(1.0, KEPT_LOGITS / (work.scored * config.vocab_size))


def variant_flops(
    variant: str, config: Any, steps: Sequence[Sequence[PreferenceExample]], cuda: bool = False
) -> tuple[Flops, int]:
    """FLOPs of these steps as the variant runs them, and the positions that pass its layers."""
    total, tokens = Flops(), 0
    for step in steps:
        if variant.startswith("infopo"):
            whole = cuda or variant == "infopo_whole"
            pieces = split_by_tokens(step, None if whole else CPU_TOKENS_PER_FORWARD, shared=True)
            works = [packed_work(piece) for piece in pieces]
        else:
            batches = [[pair] for pair in step] if variant == "trl_accumulated" else [step]
            compact = cuda or variant in COMPACT
            works = [padded_work(batch, responses_only=compact, unpadded=cuda) for batch in batches]
        for work in works:
            head = our_head_matmuls(config, work) if variant.startswith("infopo") else HEAD_MATMULS
            total += step_flops(config, work, head, with_reference=variant == "trl", checkpointing=cuda)
            tokens += work.tokens
    return total, tokens
