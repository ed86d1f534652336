"""Counts the FLOPs of an optimizer step's matrix products, 2 per multiply-add. The formula is in README.md.

Elementwise work, the optimizer and the loss are left out, because they are under 1 % of the products on any model of
interest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from infopo.data.packing import pack, split_by_tokens
from infopo.logps.lm_head import KEPT_LOGITS
from infopo.records import PreferenceExample
from infopo.startup import CPU_TOKENS_PER_FORWARD

COMPACT = {"trl_best", "trl_accumulated"}
"""Variants of TRL whose head scores response tokens only."""

FORWARD_AND_BACKWARD = 3.0
# The backward pass of attention computes the scores once more.
ATTENTION_FORWARD_AND_BACKWARD = 3.5
HEAD_MATMULS = 4.0
"""Products of a head that keeps no logits, and computes them again in the backward pass. One that keeps them has 3."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of the forward and backward pass of a step, by kind of product."""

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
    """Amounts that a step sends through the model.

    Attributes:
        tokens: Number of positions that pass the layers.
        attended: Number of (query, key) pairs of one attention head.
        scored: Number of positions that pass the LM head.
    """

    tokens: int
    attended: int
    scored: int


def layer_weights(config: Any) -> int:
    """Returns the number of weights in the matrices of all layers of a Llama, without embedding and head."""
    width = config.head_dim
    queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
    attention = 2 * config.hidden_size * (queries + keys)
    return config.num_hidden_layers * (attention + 3 * config.hidden_size * config.intermediate_size)


def step_flops(
    config: Any, work: Work, head_matmuls: float, with_reference: bool = False, checkpointing: bool = False
) -> Flops:
    """Returns the FLOPs of forward and backward pass, and of a reference's forward pass if it runs in the step."""
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
    """Returns the work of our layout, in which each stored token is computed once and sees the keys on its path."""
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
    """Returns the work of TRL's layout, which has one row per response, padded to the longest.

    Attention with a mask computes the full square of a row.

    Args:
        pairs: Examples of one chosen and one rejected response.
        responses_only: Whether the head scores response tokens only, or every position.
        unpadded: Whether attention skips padding and the future, as flash attention does.
    """
    rows = [(len(e.prompt_ids), len(ids)) for e in pairs for ids in e.response_ids]
    longest = max(prompt + response for prompt, response in rows)
    return Work(
        tokens=len(rows) * longest,
        attended=sum((p + r) * (p + r + 1) // 2 for p, r in rows) if unpadded else len(rows) * longest**2,
        scored=sum(r for _, r in rows) if responses_only else len(rows) * (longest - 1),
    )


def our_head_matmuls(config: Any, work: Work, cuda: bool = False) -> float:
    """Returns the number of products of our head, which keeps the logits that fit a fixed budget."""
    kept = KEPT_LOGITS.get("cuda" if cuda else "cpu", 0)
    return HEAD_MATMULS - min(1.0, kept / (work.scored * config.vocab_size))


def variant_flops(
    variant: str, config: Any, steps: Sequence[Sequence[PreferenceExample]], cuda: bool = False
) -> tuple[Flops, int]:
    """Returns the FLOPs of these steps as the variant runs them, and the number of positions that pass its layers."""
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
            head = our_head_matmuls(config, work, cuda) if variant.startswith("infopo") else HEAD_MATMULS
            total += step_flops(config, work, head, with_reference=variant == "trl", checkpointing=cuda)
            tokens += work.tokens
    return total, tokens
