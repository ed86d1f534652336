"""Batch + model -> log-probs of responses: the one switch between paths, and the start-up self-test.

A path is a function `(model, batch) -> log-prob of every token of every response, response after response`. All paths
give the same numbers, which `naive` defines.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor, nn

from infopo.errors import LogpsError
from infopo.logps import agreement, attention, forest, lm_head, naive, padded, rope
from infopo.logps.eligibility import obstacle
from infopo.logps.registration import OWN_MASK
from infopo.logps.rounding import moved_by_rounding
from infopo.logps.wrappers import base_of, has_virtual_tokens
from infopo.records import PackedBatch, Plan, sum_dtype, to_device

TokenLogps = Callable[[nn.Module, PackedBatch], Float[Tensor, "response_tokens *agreement"]]

PATHS: Mapping[str, TokenLogps] = {
    "naive": naive.token_logps,
    "padded": padded.token_logps,
    "forest": forest.token_logps,
}

PLANS: Mapping[str, Callable[[PackedBatch], Plan]] = {"padded": padded.Plan.of, "forest": forest.Plan.of}
"""What makes the `plan` of a batch for a path, on the host and ahead of the step. `naive` has none, to stay short."""


_PREPARED = "_infopo_prepared"
"""Attribute of a model that `prepare` sets: whether it is to stay on the naive path, and must not have its rows padded.

A copy of the model has it too, because the copy that is a live reference must run as the policy does. It is a plain
dict, so that a pickled model can be read without this package.
"""


def _is_marked(model: nn.Module, mark: str) -> bool:
    return bool(getattr(base_of(model), _PREPARED, {}).get(mark))


def path_of(model: nn.Module) -> str:
    """The path that the model is prepared for (see `prepare`): without preparation, the fastest that needs none."""
    if attention.is_enabled(model):
        return "forest"
    is_plain = lm_head.plain_head(model) is not None and not has_virtual_tokens(model)
    return "padded" if is_plain and not _is_marked(model, "naive") else "naive"


def prepare(
    models: Sequence[nn.Module],
    setting: str,
    *,
    is_compiled: bool = False,
    measure: lm_head.Measure = lambda measurement: measurement(),
) -> tuple[str, str | None]:
    """Makes models ready for one path, the fastest that all of them can take.

    Args:
        models: Policy, and reference if it is another model.
        setting: `auto`, or `naive`, for which nothing is done to a model or its head.
        is_compiled: Whether the policy will be compiled (`torch.compile`): with shared prefixes in parts
            (`compile_layers`), else as a whole, with its head outside of the compiled graphs.
        measure: Calls a measurement on the weights, as in `lm_head.learn_map`.

    Returns:
        The path, and why it is not `forest` (None if it is).
    """
    reason = "logps_path is 'naive'" if setting == "naive" else None
    for model in models:
        marks = {"naive": setting == "naive", "unpadded": OWN_MASK in (obstacle(model) or "")}
        setattr(base_of(model), _PREPARED, marks)
        if setting != "naive":
            lm_head.learn_map(model, measure)
        reason = reason or attention.enable(model)
    if reason is not None:
        for model in models:
            attention.disable(model)
            if is_compiled:
                lm_head.keep_out_of_graphs(model)
    return min((path_of(model) for model in models), key=list(PATHS).index), reason


def response_logps(
    model: nn.Module, batch: PackedBatch, path: str | None = None
) -> Float[Tensor, " responses"]:
    """log π(y|x) = Σ_t log π(y_t | x, y_<t) of every response (nats), by the path named, else by `path_of(model)`.

    The sum runs in float64 where the device has it: float32 sums are off by up to 1e-3 nat on long responses, and
    InfoPO exponentiates differences of such sums. Within `agreement.measured(True)`, it leaves the agreement of each
    response there.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from infopo.data.packing import pack
        >>> from infopo.records import PreferenceExample
        >>> tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **tiny))
        >>> batch = pack([PreferenceExample([5, 6], [[7, 2]], [[3]], "pairs.jsonl:1")])
        >>> bool((response_logps(model, batch) < 0).all())
        True
    """
    tokens = token_logps(model, batch, path)
    tokens = tokens.to(sum_dtype(tokens.device))
    # Split and sum, not index_add: the latter adds in no fixed order on a GPU. Without responses there is no element,
    # but a gradient path to every parameter.
    parts = tokens.split(response_lengths(batch)) if batch.num_responses else ()
    sums = torch.stack([part.sum(dim=0) for part in parts]) if parts else tokens
    return agreement.note(sums) if agreement.is_wanted() else sums


def token_logps(
    model: nn.Module, batch: PackedBatch, path: str | None = None
) -> Float[Tensor, "response_tokens *agreement"]:
    """log π(y_t | x, y_<t) of every token of every response (nats), response after response.

    Rows that must not share a forward pass take several: see `rows_apart`.
    """
    run = PATHS[path or path_of(model)]
    apart = rows_apart(model)
    if apart is None:
        return run(model, batch)
    start = batch.segment_start
    groups: dict[int, list[int]] = {}
    for response in range(batch.num_responses):
        size = sum(start[s + 1] - start[s] for s in batch.path(response))
        groups.setdefault(apart(size), []).append(response)
    if len(groups) < 2:
        return run(model, batch)
    parts: dict[int, Tensor] = {}
    for group in groups.values():
        part = _tokens_of(batch, group)
        parts |= zip(group, run(model, part).split(response_lengths(part)), strict=True)
    return torch.cat([parts[response] for response in range(batch.num_responses)])


def rows_apart(model: nn.Module) -> Callable[[int], int] | None:
    """Which rows may share a forward pass: those for whose lengths (tokens) it gives the same number. None: all.

    Apart are rows on either side of a boundary of the model's rotary frequencies, and rows of unequal length where the
    model makes a mask of its own, in which padding may count.
    """
    if _is_marked(model, "unpadded"):
        return lambda size: size
    limit = rope.boundary(model)
    return None if limit is None else lambda size: int(size > limit)


def _tokens_of(batch: PackedBatch, responses: Sequence[int]) -> PackedBatch:
    """The batch with the tokens of these responses only, as paths need it: what else it says is left as it was."""
    kept = sorted({segment for response in responses for segment in batch.path(response)})
    number = {segment: new for new, segment in enumerate(kept)}
    start = batch.segment_start
    places = [place for s in kept for place in range(start[s], start[s + 1])]
    [index] = to_device([torch.tensor(places)], batch.input_ids.device)
    return replace(
        batch,
        input_ids=batch.input_ids[index],
        position_ids=batch.position_ids[index],
        segment_start=[0, *accumulate(start[s + 1] - start[s] for s in kept)],
        segment_parent=[number.get(batch.segment_parent[s], -1) for s in kept],
        segment_scored=[batch.segment_scored[s] for s in kept],
        leaf=[number[batch.leaf[response]] for response in responses],
        plan=None,
    )


def response_lengths(batch: PackedBatch) -> list[int]:
    """Number of scored tokens of each response, from the layout on the host."""
    start, scored = batch.segment_start, batch.segment_scored
    return [
        sum(start[s + 1] - start[s] for s in batch.path(r) if scored[s]) for r in range(batch.num_responses)
    ]


DISAGREEMENT = {
    "naive": "This architecture cannot be trained with batched rows.",
    "padded": "This architecture cannot be trained with batched rows, or its head is not what it seems: "
    "set logps_path to 'naive' to know.",
    "forest": "Its responses cannot share their prompt: set logps_path to 'naive'.",
}


def padding_noise(
    model: nn.Module, together: PackedBatch, alone: Sequence[PackedBatch], path: str | None = None
) -> float:
    """Returns the largest change of a response's log-prob (nats) between a batch and the response on its own.

    In exact arithmetic it is zero. In half precision it is the noise that InfoPO's exp() multiplies.

    Args:
        model: The policy.
        together: Several responses.
        alone: The same responses in the same order, one per batch, which run on the naive path without padding.
        path: The path on which `together` runs.
    """
    with torch.no_grad():
        tested = response_logps(model, together, path)
        expected = torch.cat([response_logps(model, batch, "naive") for batch in alone])
    return float((tested - expected).abs().max())


def change_by_later_tokens(model: nn.Module, batch: PackedBatch, path: str | None = None) -> float:
    """Largest change of a token's log-prob (nats) when the last token of its response is another: 0 if causal."""
    last = [batch.segment_start[leaf + 1] - 1 for leaf in batch.leaf]
    tokens = batch.input_ids.clone()
    tokens[last] = (tokens[last] + 1) % (int(tokens.max()) + 1)
    with torch.no_grad():
        changed = token_logps(model, replace(batch, input_ids=tokens), path) - token_logps(model, batch, path)
    parts = changed.split(response_lengths(batch))
    return max(float(part[:-1].abs().max()) if len(part) > 1 else 0.0 for part in parts)


def self_test(
    model: nn.Module,
    together: PackedBatch,
    alone: Sequence[PackedBatch],
    *,
    exact: bool,
    path: str | None = None,
) -> float:
    """Checks on a small batch that a log-prob depends on its own prompt and earlier tokens only.

    Args:
        model: The policy.
        together: Several responses.
        alone: The same responses, one per batch.
        exact: Whether the model computes in float32 or better. Otherwise rounding alone can move log-probs, and only
            a model that sees ahead by far more than that is found out.
        path: The path that is tested, or None for the one that the model is prepared for.

    Returns:
        Rounding noise, which is the largest change of a log-prob by padding (nats).

    Raises:
        LogpsError: A log-prob moves with later tokens, or with the other rows of its batch by more than 1e-3 nat (if
            exact; else, on a path other than `naive`, by far more than rounding): the model would be trained on wrong
            numbers.
    """
    name = type(getattr(model, "module", model)).__name__
    path = path or path_of(model)
    with torch.no_grad():
        if not response_logps(model, together, path).isfinite().all():
            raise LogpsError(
                f"{name}: log-probs are not finite before the first update: its weights hold NaN or inf"
            )
    ahead = change_by_later_tokens(model, together, path)
    if not ahead < (1e-3 if exact else 1.0):
        raise LogpsError(
            f"{name}: the log-prob of a token changes by {ahead:.3g} nats with the tokens after it (path {path!r}). "
            "Expected a causal language model."
        )
    noise = padding_noise(model, together, alone, path)
    allowed = 1e-3
    if not exact:
        # Padding may change nothing on the naive path, so that its own noise is no measure of rounding. The bound is
        # that of `reference.tolerance`: one unit in the last place of a bfloat16 logit for each token, rounded on its
        # own, or what rounding does to these very responses. A path that is wrong is off by nats for each token.
        rounding = 0.1 * (1 + math.sqrt(max(response_lengths(together))))
        allowed = (
            math.inf if path == "naive" else 4 * padding_noise(model, together, alone, "naive") + rounding
        )
    if not exact and not noise < allowed:
        moved = torch.cat(
            [moved_by_rounding(model, partial(response_logps, model, one, "naive")) for one in alone]
        )
        allowed = max(allowed, float(moved.max()))
    if not noise < allowed:
        raise LogpsError(
            f"{name}: the log-prob of a response changes by {noise:.3g} nats with the other responses of its batch "
            f"(path {path!r}); expected less than {allowed:.3g}. " + DISAGREEMENT[path]
        )
    return noise
