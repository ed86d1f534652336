"""Losses of single responses beside InfoPO's family: nothing is compared within a pair, so none is needed.

`losses/__init__.py` has the notation. The examples are of one chosen and one rejected response: log r(w) = 1 and
log r(l) = -1 nat, 2 and 4 tokens.
"""

import math

import torch
import torch.nn.functional as F

from infopo.losses.common import capped_exp
from infopo.losses.coupling import StepStatistic
from infopo.losses.declaration import (
    LENGTH_NORMALIZED,
    STRENGTH,
    at_least_zero,
    flag,
    objective,
    positive,
)
from infopo.records import LossTerm, LossTerms, ResponseLogps, Role


@objective(
    title="SFT on chosen",
    formula="-log π_θ(w)",
    source="maximum likelihood of the chosen responses",
    when="the baseline of every comparison; as good as InfoPO where rejected responses tell nothing new",
    parameters={
        "token_mean": flag("Average over tokens of chosen responses (TRL's `sft`), not over responses.")
    },
    reference=(),
    sides=("chosen",),
    trl_loss_type="sft",
    reward="logp",
)
def sft(logps: ResponseLogps, *, token_mean: bool = False) -> LossTerms:
    """Maximum likelihood of chosen responses: the baseline of every comparison.

    L = E_w[-log π(w)]          (`token_mean`: Σ_w -log π(w) / Σ_w |w|)

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in sft(pair)]
        [3.0]
    """
    return [LossTerm(-logps.policy[logps.chosen], per="token" if token_mean else "chosen", name="chosen")]


@objective(
    title="KTO",
    formula="λ_w σ(β (z - log r(w))), λ_l σ(β (log r(l) - z)), z the KL of policy from reference, at least 0",
    source="Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7",
    when="thumbs up and down; weigh the sides where one is rare",
    parameters={
        "beta": STRENGTH,
        "desirable_weight": at_least_zero("λ_w, weight of chosen responses."),
        "undesirable_weight": at_least_zero("λ_l, weight of rejected responses."),
    },
    statistic="kl",
)
def kto(
    logps: ResponseLogps,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossTerms:
    """KTO: each response by itself, against a reference point z, which is the policy's KL from the reference.

        L = E_{w, l}[λ_w σ(β (z - log r(w))), λ_l σ(β (log r(l) - z))],   z = max(0, E_kl[log r(y')])

    The mean is over chosen and rejected responses together. y' are responses to other prompts. z is a mean over the
    whole optimizer step and has no gradient. The two sides need not be paired.

    References:
        Ethayarajh et al., 2024, arXiv 2402.01306, eq. 7, as TRL's `KTOTrainer` has it.

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> kto(pair)[0].values
        tensor([0.4750, 0.4750], dtype=torch.float64)
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


@objective(
    title="APO-zero",
    formula="1 - σ(β log r(w)) + σ(β log r(l))",
    source="D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7",
    when="chosen responses better than the model's own; unpaired feedback",
    parameters={"beta": STRENGTH},
    trl_loss_type="apo_zero",
)
def apo_zero(logps: ResponseLogps, *, beta: float = 0.1) -> LossTerms:
    """APO-zero: pushes chosen up and rejected down, each by itself. For chosen responses better than the model's own.

        L = E_w[1 - σ(β log r(w))] + E_l[σ(β log r(l))]

    The two expectations are separate, so no pairs are needed.

    References:
        D'Oosterlinck et al., 2024, arXiv 2408.06266, eq. 7.

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in apo_zero(pair)]
        [0.475, 0.475]
    """
    score = beta * (logps.policy - logps.reference)
    return [
        LossTerm(torch.sigmoid(-score[logps.chosen]), per="chosen", name="chosen"),
        LossTerm(torch.sigmoid(score[logps.rejected]), per="rejected", name="rejected"),
    ]


@objective(
    title="SimPER",
    formula="-e^(log π_θ(w)/|w|) + e^(log π_θ(l)/|l|)",
    source="Xiao et al. 2025, arXiv 2502.00883",
    when="no reference model, nothing to tune, unpaired data",
    reference=(),
    reward="mean_logp",
)
def simper(logps: ResponseLogps) -> LossTerms:
    """SimPER: inverse perplexities, up for chosen and down for rejected responses. No parameter, no reference.

        L = E_w[-e^(log π(w)/|w|)] + E_l[e^(log π(l)/|l|)]

    -L is at most 1, and the pull of a response fades with its perplexity. Chosen and rejected need not be paired.

    References:
        Xiao et al., 2025, arXiv 2502.00883, as its authors' code has it (tengxiao1/SimPER).

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in simper(pair)]
        [-0.2231, 0.2865]
    """
    # Log-probs are at most 0, where the cap changes nothing.
    inverse_perplexity = capped_exp(logps.policy / logps.length, 0.0)
    return [
        LossTerm(-inverse_perplexity[logps.chosen], per="chosen", name="chosen"),
        LossTerm(inverse_perplexity[logps.rejected], per="rejected", name="rejected"),
    ]


@objective(
    title="DDRO",
    formula="-log π_θ(w) - log(1 - r(l)/2)",
    source="arXiv 2505.07558 (DDRO)",
    when="InfoPO's closest rival: also a density ratio, without Bradley-Terry; a rejected response may not double",
    parameters={
        "length_normalized": LENGTH_NORMALIZED,
        "cap": positive("Largest push on a rejected response, beyond which the loss is linear in log r(l)."),
    },
    reference=("rejected",),
)
def ddro(logps: ResponseLogps, *, length_normalized: bool = False, cap: float = 100.0) -> LossTerms:
    """DDRO: the ratio p_w/(p_w + p_l) is estimated directly, with r/2 in its place.

        L = E_w[-log π(w)] + E_l[-log(1 - r(l)/2)]

    The paper's -log(r(w)/2) is -log π(w) up to a constant, so the reference of chosen responses is not needed. The
    rejected term is infinite at r(l) = 2. From where its derivative by log r(l), (r/2)/(1 - r/2), is `cap`, it is
    extended linearly in log r(l). A third-party code extends it linearly in r, from r = 2 - 1e-6. At π = π_ref the
    gradient is InfoPO's.

    References:
        arXiv 2505.07558 (DDRO). The third-party code is IceyWuu/DisentangledPreferenceOptimization.

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in ddro(pair)]
        [3.0, 0.2033]
    """
    length = logps.length.to(logps.policy.dtype) if length_normalized else 1.0
    log_ratio = ((logps.policy - logps.reference) / length)[logps.rejected]
    edge = math.log(2 * cap / (1 + cap))
    values = -torch.log1p(-torch.exp(log_ratio.clamp(max=edge)) / 2) + cap * F.relu(log_ratio - edge)
    return [
        LossTerm(-(logps.policy / length)[logps.chosen], per="chosen", name="chosen"),
        LossTerm(values, per="rejected", name="rejected"),
    ]


@objective(
    title="SPPO (hard)",
    formula="(log r(w) - 1/(2β))² + (log r(l) + 1/(2β))²",
    source="Wu et al. 2024, arXiv 2405.00675, eq. 4.7",
    when="log-ratios that are pulled to fixed targets; unpaired feedback",
    parameters={"beta": positive("Inverse of twice the targets' distance from 0 (1/nats).")},
    trl_loss_type="sppo_hard",
)
def sppo_hard(logps: ResponseLogps, *, beta: float = 0.1) -> LossTerms:
    """SPPO with hard labels: log-ratios of chosen responses are pulled to 1/(2β) nats, of rejected ones to -1/(2β).

        L = E_w[(log r(w) - 1/(2β))²] + E_l[(log r(l) + 1/(2β))²]

    The win probabilities of the paper's eq. 4.7 are 1 and 0. The two expectations are separate, so no pairs are
    needed. At π = π_ref the gradient is 1/β times InfoPO's.

    References:
        Wu et al., 2024, arXiv 2405.00675, as TRL's `sppo_hard`.

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in sppo_hard(pair)]
        [16.0, 16.0]
    """
    log_ratio, target = logps.policy - logps.reference, 1 / (2 * beta)
    return [
        LossTerm((log_ratio[logps.chosen] - target) ** 2, per="chosen", name="chosen"),
        LossTerm((log_ratio[logps.rejected] + target) ** 2, per="rejected", name="rejected"),
    ]
