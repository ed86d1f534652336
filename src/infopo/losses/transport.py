"""AOT: distributions of scores are compared, not scores pair by pair. Scores of one rank in the whole step are matched.

`losses/__init__.py` has the notation. The examples are of one pair: log r(w) = 1 and log r(l) = -1 nat, 2 and 4 tokens.
"""

from infopo.losses.common import smoothed_nll
from infopo.losses.coupling import SortedScores, matched
from infopo.losses.declaration import LABEL_SMOOTHING, STRENGTH, objective
from infopo.records import LossTerm, LossTerms, ResponseLogps

SORTED_MARGINS = SortedScores(
    lambda logps: logps.margins(logps.policy), lambda logps: logps.margins(logps.reference)
)
"""Margins of the pairs under the policy, and under the reference."""

SORTED_LOG_RATIOS = SortedScores(
    lambda logps: (logps.policy - logps.reference)[logps.chosen],
    lambda logps: (logps.policy - logps.reference)[logps.rejected],
)
"""Log-ratios of chosen responses, and of rejected ones."""


@objective(
    title="AOT",
    formula="-(1-ε) log σ(β (δ - δ_ref)) - ε log σ(-β (δ - δ_ref)), δ_ref of δ's rank in the step",
    source="Melnyk et al. 2024, arXiv 2406.05882, by TRL's `aot`",
    when="margins should exceed the reference's as a distribution, not pair by pair",
    parameters={"beta": STRENGTH, "label_smoothing": LABEL_SMOOTHING},
    pairs=True,
    statistic="sorted_margins",
    trl_loss_type="aot",
)
def aot(logps: ResponseLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> LossTerms:
    """AOT on pairs: the policy's margins are to dominate the reference's, rank by rank.

        L = E_pairs[-(1-ε) log σ(β (δ - δ_ref)) - ε log σ(-β (δ - δ_ref))],   δ = log π(w) - log π(l)

    δ_ref is the reference's margin that has the rank of δ among the pairs of the whole optimizer step. TRL sorts within
    a device batch. With one pair it is DPO. Pairs of equal margins are matched with the same δ_ref.

    References:
        Melnyk et al., 2024, arXiv 2406.05882. The formula is that of TRL's `aot`.

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in aot(pair)]
        [0.5981]
    """
    margins = logps.margins(logps.policy)
    own, other = SORTED_MARGINS.of(logps)
    values = smoothed_nll(beta * (margins - matched(margins, own, other)), label_smoothing)
    return [LossTerm(values, per="pair", name="preference")]


@objective(
    title="AOT (unpaired)",
    formula="-(1-ε) log σ(β (log r(w) - log r(l))) - ε log σ(-β (...)), w and l of one rank in the step",
    source="Melnyk et al. 2024, arXiv 2406.05882, by TRL's `aot_unpaired`",
    when="as `aot`, for unpaired feedback",
    parameters={"beta": STRENGTH, "label_smoothing": LABEL_SMOOTHING},
    statistic="sorted_log_ratios",
    trl_loss_type="aot_unpaired",
)
def aot_unpaired(logps: ResponseLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> LossTerms:
    """AOT without pairs: log-ratios of chosen responses are to dominate those of rejected ones, rank by rank.

        L = E_ranks[-(1-ε) log σ(β Δ) - ε log σ(-β Δ)],   Δ = log r(w) - log r(l), w and l of one rank

    Ranks are those in the whole optimizer step, where TRL takes a device batch. With as many chosen as rejected
    responses the loss is TRL's `aot_unpaired`; otherwise ranks are relative. Each response has a term against the match
    of its rank, which has no gradient. Half of the step's loss is taken off each side, so that both together have its
    value.

    References:
        Melnyk et al., 2024, arXiv 2406.05882. The formula is that of TRL's `aot_unpaired`.

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in aot_unpaired(pair)]
        [0.2991, 0.2991]
    """
    log_ratio = logps.policy - logps.reference
    chosen, rejected = log_ratio[logps.chosen], log_ratio[logps.rejected]
    own, other = SORTED_LOG_RATIOS.of(logps)
    # Without indexing by a mask, which would synchronise with the GPU.
    is_known = ~own.isposinf()
    of_step = smoothed_nll(beta * (own - matched(own, own, other)), label_smoothing)
    half = of_step.where(is_known, 0.0).sum() / is_known.sum().clamp(min=1) / 2
    upper = smoothed_nll(beta * (chosen - matched(chosen, own, other)), label_smoothing)
    lower = smoothed_nll(beta * (matched(rejected, other, own) - rejected), label_smoothing)
    return [
        LossTerm(upper - half, per="chosen", name="chosen"),
        LossTerm(lower - half, per="rejected", name="rejected"),
    ]
