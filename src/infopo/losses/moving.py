"""Losses that set their strength or threshold by moving statistics of the optimizer steps so far.

`losses/__init__.py` has the notation. The examples are of one pair: log r(w) = 1 and log r(l) = -1 nat, 2 and 4 tokens.
Without a trainer, a batch is the first step.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from infopo.losses.coupling import StepMoments
from infopo.losses.declaration import STRENGTH, at_least_zero, objective, positive, within
from infopo.records import LossTerm, LossTerms, ResponseLogps

LEAST_BETA = 1e-3
"""Least β of a step of β-DPO, as in its authors' code."""


@objective(
    title="β-DPO",
    formula="-p/(1-ρ) log σ(β' Δ), β' = β (1 + a (mean of Δ - m)), p = min(1, c e^(-(Δ-m)²/2s²)), m, s: moving mean "
    "and deviation of Δ = log r(w) - log r(l)",
    source="Wu et al. 2024, arXiv 2407.08639, by its authors' code (junkangwu/beta-DPO)",
    when="pairs of unlike quality: β follows the step's margins, and outliers count less",
    parameters={
        "beta": STRENGTH,
        "strength": at_least_zero("The paper's α: change of β per nat by which the step's margins exceed m."),
        "filtered": within("[0, 1)", "The paper's ρ: share of the step's pairs that is filtered out."),
        "rate": within("(0, 1]", "Weight of a new step in m and s."),
    },
    pairs=True,
    statistic="moving_margins",
)
def beta_dpo(
    logps: ResponseLogps,
    *,
    beta: float = 0.1,
    strength: float = 0.6,
    filtered: float = 0.2,
    rate: float = 0.1,
) -> LossTerms:
    """β-DPO: DPO whose β follows the margins of the step, and whose outliers are filtered out.

        L = E_pairs[-p/(1-ρ) log σ(β' Δ)],   β' = β (1 + a (Σ p Δ / Σ p - m)),   p = min(1, c e^(-(Δ - m)²/(2 s²)))

    m and s are moving averages of the mean and the standard deviation of Δ = log r(w) - log r(l) in an optimizer step,
    this one included. c is such that Σ p is 1 - ρ of the step's pairs. The paper draws these pairs at random, with
    weights e^(...), and p is the probability to be among them (in Poisson sampling), so that the loss is the mean over
    such draws and does not depend on how a step is split. β' is at least 1e-3. p and β' have no gradient. At ρ = 0 and
    a = 0, and at π = π_ref, it is DPO. The averages start as the first step's. The authors' start at 0.

    References:
        Wu et al., 2024, arXiv 2407.08639, as its authors' code has it (junkangwu/beta-DPO), whose rate is 0.1.

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in beta_dpo(pair, filtered=0.0)]
        [0.5981]
    """
    statistic = moving_margins(filtered=filtered, rate=rate)
    margins = log_ratio_margins(logps)
    mean, deviation, factor, kept_mean = statistic.of(logps)
    of_step = (beta * (1 + strength * (kept_mean - mean))).clamp(min=LEAST_BETA)
    kept = (factor * _closeness(margins.detach(), mean, deviation)).clamp(max=1.0)
    return [LossTerm(-kept / (1 - filtered) * F.logsigmoid(of_step * margins), per="pair", name="preference")]


def log_ratio_margins(logps: ResponseLogps) -> Tensor:
    """Δ = log r(w) - log r(l) of each pair (nats)."""
    return logps.margins(logps.policy - logps.reference)


def moving_margins(*, filtered: float, rate: float, **others: float) -> StepMoments:
    """β-DPO's statistic: moving mean and deviation of Δ, c, and the mean of Δ over the pairs that are kept (nats)."""
    return StepMoments(log_ratio_margins, rate, partial(_kept, 1 - filtered))


def _closeness(margins: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """e^(-z²/2). Beyond 12.6 deviations all are alike, so that float32 can divide by it."""
    return torch.exp((-0.5 * ((margins - mean) / deviation) ** 2).clamp(min=-80.0))


def _kept(share: float, margins: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Returns c, for which the probabilities min(1, c w) add up to a share of the pairs, and the mean of Δ by them."""
    if not len(margins):
        return margins.new_ones(2)
    weights = _closeness(margins, mean, deviation)
    ranked = weights.sort(descending=True).values
    # If the k closest pairs are certain, the others share the rest: c = (share n - k) / (sum of their weights).
    tail = ranked.flip(0).cumsum(0).flip(0)
    rest = share * len(ranked) - torch.arange(len(ranked), device=ranked.device, dtype=ranked.dtype)
    factors = rest / tail
    # c is that of the least k at which it makes none of the others more than certain. It is the largest such c.
    fits = factors * ranked <= 1 + 1e-9
    factor = factors[fits.to(torch.int8).argmax()]
    probability = (factor * weights).clamp(max=1.0)
    return torch.stack([factor, (probability * margins).sum() / probability.sum()])


@objective(
    title="α-DPO",
    formula="-log σ(β (δ - γ/β - α (δ - δ_ref - m)/s)), δ = log π_θ(w)/|w| - log π_θ(l)/|l|, m, s: moving mean and "
    "deviation of δ - δ_ref",
    source="Wu et al. 2024, arXiv 2410.10148, by its authors' code (junkangwu/alpha-DPO)",
    when="SimPO with a target margin for each pair, which is higher where the policy has gained on its reference",
    parameters={
        "beta": positive("Scale of the length-normalised reward."),
        "gamma": at_least_zero("Target reward margin."),
        "alpha": at_least_zero("Weight of a pair's standardised gain in its target margin; 0 is SimPO."),
        "rate": within("(0, 1]", "Weight of a new step in m and s."),
    },
    pairs=True,
    statistic="moving_gains",
    reward="mean_logp",
)
def alpha_dpo(
    logps: ResponseLogps, *, beta: float = 2.0, gamma: float = 0.5, alpha: float = 0.2, rate: float = 0.1
) -> LossTerms:
    """α-DPO: SimPO whose target margin is higher for pairs on which the policy has gained more than usual.

        L = E_pairs[-log σ(β δ - γ - β α z)],   z = (δ - δ_ref - m)/s,   δ = log π(w)/|w| - log π(l)/|l|

    δ_ref is δ of the reference. m and s are moving averages of the mean and the standard deviation of δ - δ_ref in an
    optimizer step, this one included. z has no gradient. At π = π_ref it is SimPO. β multiplies α, as in the authors'
    code. The averages start as the first step's. The authors' start at 0.

    References:
        Wu et al., 2024, arXiv 2410.10148, as its authors' code has it (junkangwu/alpha-DPO), whose rate is 0.1, and
        which ran Llama-3-8B-Instruct with β = 10, γ = 4 and α = 0.2.

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in alpha_dpo(pair)]
        [1.3133]
    """
    mean, deviation = moving_gains(rate=rate).of(logps)
    gain = (mean_gains(logps).detach() - mean) / deviation
    logits = beta * (logps.margins(logps.policy / logps.length) - alpha * gain) - gamma
    return [LossTerm(-F.logsigmoid(logits), per="pair", name="preference")]


def mean_gains(logps: ResponseLogps) -> Tensor:
    """δ - δ_ref of each pair: the margin of its length-normalised log-ratios (nats per token)."""
    return logps.margins((logps.policy - logps.reference) / logps.length)


def moving_gains(*, rate: float, **others: float) -> StepMoments:
    """α-DPO's statistic: moving mean and deviation of δ - δ_ref."""
    return StepMoments(mean_gains, rate)


@objective(
    title="BCO",
    formula="-log σ(β log r(w) - δ), -log σ(δ - β log r(l)), δ a moving mean of β log r over both sides",
    source="Jung et al. 2024, arXiv 2404.04656, by TRL's `BCOTrainer` (which TRL 1.16 no longer has)",
    when="as `js`, for unpaired feedback whose rewards drift as a whole",
    parameters={
        "beta": STRENGTH,
        "rate": within(
            "[0, 1]", "Weight of a new step in δ; 0 weighs all responses so far alike, as TRL's trainer did."
        ),
    },
    statistic="moving_rewards",
)
def bco(logps: ResponseLogps, *, beta: float = 0.1, rate: float = 0.0) -> LossTerms:
    """BCO: a classifier of single responses whose threshold δ is the mean reward so far.

        L = E_{w, l}[-log σ(f(w) - δ), -log σ(δ - f(l))],   f = β log r,   δ = moving mean of f over both sides

    The expectation is over chosen and rejected responses together, which need not be paired. δ includes this optimizer
    step and has no gradient. With δ = 0 it is half of `js` (TRL's `bco_pair`) if there are as many chosen as rejected
    responses, and so it is at π = π_ref. TRL's trainer can also weigh rejected responses by a classifier of prompts
    (UDM), which is not here.

    References:
        Jung et al., 2024, arXiv 2404.04656, as TRL's `BCOTrainer` had it.

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> bco(pair, beta=1.0)[0].values
        tensor([0.3133, 0.3133], dtype=torch.float64)
    """
    rewards = beta * (logps.policy - logps.reference)
    shift = moving_rewards(beta=beta, rate=rate).of(logps)[0]
    values = [-F.logsigmoid(rewards[logps.chosen] - shift), -F.logsigmoid(shift - rewards[logps.rejected])]
    return [LossTerm(torch.cat(values), per="response", name="preference")]


def moving_rewards(*, beta: float, rate: float) -> StepMoments:
    """BCO's statistic, of which it takes the mean: moving mean and deviation of β log r over both sides (nats)."""

    def rewards(logps: ResponseLogps) -> Tensor:
        return beta * (logps.policy - logps.reference)[torch.cat([logps.chosen, logps.rejected])]

    return StepMoments(rewards, rate)
