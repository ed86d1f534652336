"""Losses of single responses beside InfoPO's family: nothing is compared within a pair, so none is needed.

`losses/__init__.py` has the notation. The examples are of one chosen and one rejected response: log r(w) = 1 and
log r(l) = -1 nat, 2 and 4 tokens.
"""

import torch

from infopo.losses.coupling import StepStatistic
from infopo.losses.declaration import (
    STRENGTH,
    at_least_zero,
    flag,
    objective,
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
