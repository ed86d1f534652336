"""Losses that users compare InfoPO with, beyond DPO and its nearest kin in `objectives.py`: pure functions likewise.

Notation as in `objectives.py`: π = policy, r = π/π_ref, w = chosen, l = rejected, |y| = number of tokens,
Δ = log r(w) - log r(l), σ the logistic function. Each function returns loss terms; the trainer divides each by its
count in the whole optimizer step.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from infopo.coupling import StepStatistic
from infopo.records import LossTerm, LossTerms, ResponseLogps, Role


def cpo(
    logps: ResponseLogps, *, beta: float = 0.1, label_smoothing: float = 0.0, nll_weight: float = 1.0
) -> LossTerms:
    """CPO: DPO with a uniform reference, and the likelihood of the chosen response.

        L = E_pairs[-(1-ε) log σ(β δ) - ε log σ(-β δ)] + a Σ_w -log π(w) / Σ_w |w|,   δ = log π(w) - log π(l)

    The likelihood is a mean over tokens, as in TRL (its `cpo_alpha` is `nll_weight`); the paper writes a sum.

    References:
        Xu et al., 2024, arXiv 2401.08417.
    """
    values = _smoothed(beta * logps.margins(logps.policy), label_smoothing)
    return [LossTerm(values, per="pair", name="preference"), *_likelihood(logps, nll_weight)]


def slic(logps: ResponseLogps, *, beta: float = 1.0, nll_weight: float = 0.0) -> LossTerms:
    """SLiC-HF: hinge on the log-prob margin, zero once it reaches 1/β nats (β times the paper's loss; δ is 1/β).

        L = E_pairs[max(0, 1 - β (log π(w) - log π(l)))] + a Σ_w -log π(w) / Σ_w |w|

    The paper regularises by the likelihood of an SFT target; here that is the chosen response.

    References:
        Zhao et al., 2023, arXiv 2305.10425.
    """
    values = F.relu(1 - beta * logps.margins(logps.policy))
    return [LossTerm(values, per="pair", name="preference"), *_likelihood(logps, nll_weight)]


def orpo(logps: ResponseLogps, *, beta: float = 0.1) -> LossTerms:
    """ORPO: likelihood of the chosen response, and the odds of the chosen over the rejected one. No reference.

        L = Σ_w -log π(w) / Σ_w |w| - β E_pairs[log σ(log odds(w) - log odds(l))],
        odds = p/(1 - p),   p = π(y)^(1/|y|)

    The likelihood is that of the response. TRL's trainer adds the prompt's tokens to it, so its loss is another one.
    p is held below 1 by the rounding error of the type.

    References:
        Hong et al., 2024, arXiv 2403.07691, eq. 6 and 7 (β is its λ).
    """
    mean = (logps.policy / logps.length).clamp(max=-torch.finfo(logps.policy.dtype).eps)
    log_odds = mean - torch.log(-torch.expm1(mean))
    values = -beta * F.logsigmoid(logps.margins(log_odds))
    return [LossTerm(values, per="pair", name="preference"), *_likelihood(logps, 1.0)]


def rdpo(logps: ResponseLogps, *, beta: float = 0.1, alpha: float = 0.01) -> LossTerms:
    """R-DPO: DPO against length: a pair whose chosen response is the longer one teaches less.

        L = E_pairs[-log σ(β Δ + α (|w| - |l|))]

    References:
        Park et al., 2024, arXiv 2403.19159.
    """
    logits = beta * logps.margins(logps.policy - logps.reference)
    longer = logps.margins(logps.length.to(logits.dtype))
    return [LossTerm(-F.logsigmoid(logits + alpha * longer), per="pair", name="preference")]


def dpop(logps: ResponseLogps, *, beta: float = 0.3, penalty: float = 50.0) -> LossTerms:
    """DPO-Positive: DPO, with a penalty where the chosen response is less likely than under the reference.

        L = E_pairs[-log σ(β (Δ - λ max(0, -log r(w))))]

    References:
        Pal et al., 2024 (Smaug), arXiv 2402.13228, eq. 3.
    """
    log_ratio = logps.policy - logps.reference
    fallen = F.relu(-log_ratio)[logps.pairs[:, 0]]
    logits = beta * (logps.margins(log_ratio) - penalty * fallen)
    return [LossTerm(-F.logsigmoid(logits), per="pair", name="preference")]


def nca(logps: ResponseLogps, *, beta: float = 0.1) -> LossTerms:
    """NCA on pairs: noise contrast of each response with the reference; the reward of a chosen one is absolute.

        L = E_pairs[-log σ(f(w)) - ½ log σ(-f(w)) - ½ log σ(-f(l))],   f = β log r

    References:
        Chen et al., 2024, arXiv 2402.05369, its pairwise preference form (TRL's `nca_pair`).
    """
    chosen, rejected = (beta * (logps.policy - logps.reference)[logps.pairs]).unbind(1)
    values = -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)
    return [LossTerm(values, per="pair", name="preference")]


def exo(logps: ResponseLogps, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> LossTerms:
    """EXO on pairs: reverse KL, over the two responses, of the policy's preference from the label's.

        L = E_pairs[q log(q/(1-ε)) + (1-q) log((1-q)/ε)],   q = σ(β Δ)

    ε > 0: at 0 the divergence is infinite.

    References:
        Ji et al., 2024, arXiv 2402.00856, eq. 16 (TRL's `exo_pair`).
    """
    logits = beta * logps.margins(logps.policy - logps.reference)
    right = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-label_smoothing))
    wrong = torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(label_smoothing))
    return [LossTerm(right + wrong, per="pair", name="preference")]


def apo_zero(logps: ResponseLogps, *, beta: float = 0.1) -> LossTerms:
    """APO-zero: chosen up, rejected down, each by itself; for chosen responses better than the model's own.

        L = E_w[1 - σ(β log r(w))] + E_l[σ(β log r(l))]

    The two expectations are separate: no pairs are needed.

    References:
        D'Oosterlinck et al., 2024, arXiv 2408.06266, eq. 7.
    """
    score = beta * (logps.policy - logps.reference)
    return [
        LossTerm(torch.sigmoid(-score[logps.chosen]), per="chosen", name="chosen"),
        LossTerm(torch.sigmoid(score[logps.rejected]), per="rejected", name="rejected"),
    ]


def kto(
    logps: ResponseLogps,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossTerms:
    """KTO: each response by itself, against a reference point z, which is the policy's KL from the reference.

        L = E_{w, l}[λ_w σ(β (z - log r(w))), λ_l σ(β (log r(l) - z))],   z = max(0, E_kl[log r(y')])

    One mean over chosen and rejected responses. y' are responses to other prompts; z, over the whole optimizer step,
    has no gradient. The two sides need not be paired.

    References:
        Ethayarajh et al., 2024, arXiv 2402.01306, eq. 7, as TRL's `KTOTrainer` has it.
    """
    margin = beta * (logps.policy - logps.reference - MISMATCH_KL.of(logps))
    values = [
        desirable_weight * torch.sigmoid(-margin[logps.chosen]),
        undesirable_weight * torch.sigmoid(margin[logps.rejected]),
    ]
    return [LossTerm(torch.cat(values), per="response", name="preference")]


MISMATCH_KL = StepStatistic(
    Role.KL, lambda logps: (logps.policy - logps.reference)[logps.role == Role.KL], "positive_mean"
)
"""max(0, E[log r(y')]) over responses y' to other prompts: KTO's estimate of KL(π‖π_ref), in nats."""


def apo_down(logps: ResponseLogps, *, beta: float = 0.1) -> LossTerms:
    """APO-down: both down, the rejected one further; for chosen responses worse than the model's own.

        L = E_pairs[σ(β log r(w)) + 1 - σ(β Δ)]

    References:
        D'Oosterlinck et al., 2024, arXiv 2408.06266, eq. 8.
    """
    log_ratio = beta * (logps.policy - logps.reference)
    values = torch.sigmoid(log_ratio[logps.pairs[:, 0]]) + torch.sigmoid(-logps.margins(log_ratio))
    return [LossTerm(values, per="pair", name="preference")]


def cal_dpo(logps: ResponseLogps, *, beta: float = 0.1) -> LossTerms:
    """Cal-DPO: DPO's contrast, with log-ratios calibrated to ±1/(2β) (nats).

        L = E_pairs[-log σ(Δ) + (log r(w) - 1/(2β))² + (log r(l) + 1/(2β))²]

    The authors' published trainer halves the two squares, and takes their means over the pairs first.

    References:
        Xiao et al., 2024, arXiv 2412.14516.
    """
    chosen, rejected = (logps.policy - logps.reference)[logps.pairs].unbind(1)
    target = 1 / (2 * beta)
    values = -F.logsigmoid(chosen - rejected) + (chosen - target) ** 2 + (rejected + target) ** 2
    return [LossTerm(values, per="pair", name="preference")]


def robust_dpo(logps: ResponseLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> LossTerms:
    """Robust DPO: from labels flipped with probability ε, an unbiased estimate of DPO's loss on clean ones.

        L = E_pairs[-(1-ε) log σ(β Δ) + ε log σ(-β Δ)] / (1 - 2ε)

    References:
        Chowdhury, Kini, Natarajan, 2024, arXiv 2403.00409 (TRL's `robust`).
    """
    logits = beta * logps.margins(logps.policy - logps.reference)
    flipped = label_smoothing * F.logsigmoid(-logits)
    values = (-(1 - label_smoothing) * F.logsigmoid(logits) + flipped) / (1 - 2 * label_smoothing)
    return [LossTerm(values, per="pair", name="preference")]


def _smoothed(logits: Float[Tensor, " pairs"], label_smoothing: float) -> Float[Tensor, " pairs"]:
    """-(1-ε) log σ(x) - ε log σ(-x)."""
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def _likelihood(logps: ResponseLogps, weight: float) -> LossTerms:
    """a Σ_w -log π(w) / Σ_w |w|, where a > 0."""
    return [LossTerm(-weight * logps.policy[logps.chosen], per="token", name="nll")] if weight else []
