"""Losses of a pair that need no reference: SimPO, CPO, SLiC-HF, ORPO.

`losses/__init__.py` has the notation. The examples are of one pair, with 2 and 4 tokens.
"""

import torch
import torch.nn.functional as F

from infopo.losses.common import capped_exp, likelihood, smoothed_nll
from infopo.losses.declaration import LABEL_SMOOTHING, NLL_WEIGHT, at_least_zero, number, objective, positive
from infopo.records import LossTerm, LossTerms, ResponseLogps


@objective(
    title="SimPO",
    formula="-log σ(β ρ(w) - β ρ(l) - γ), ρ = log π_θ(y)/|y|, or (1 - e^(-α log π_θ(y)/|y|))/α",
    source="Meng et al. 2024, arXiv 2405.14734, eq. 6; α: Gupta et al. 2025 (AlphaPO), arXiv 2501.03884",
    when="no reference model, responses of unequal length",
    parameters={
        "beta": positive("Scale of the length-normalised reward."),
        "gamma": at_least_zero("Target reward margin."),
        "alpha": number("Shape of AlphaPO's reward; 0 is SimPO."),
    },
    reference=(),
    pairs=True,
    reward="mean_logp",
)
def simpo(logps: ResponseLogps, *, beta: float = 2.0, gamma: float = 0.5, alpha: float = 0.0) -> LossTerms:
    """SimPO: length-normalised log-probs as rewards, a target margin γ, no reference.

        L = E_pairs[-log σ(β log π(w)/|w| - β log π(l)/|l| - γ)]

    An `alpha` other than 0 is AlphaPO, whose rewards are (1 - p^-α)/α with p = π(y)^(1/|y|) in the place of log p,
    which is the limit α → 0. Beyond 20 nats of -α log p, the exponential is extended linearly.

    References:
        Meng et al., 2024, arXiv 2405.14734, eq. 6. AlphaPO: Gupta et al., 2025, arXiv 2501.03884, as TRL's
        `CPOTrainer` has it.

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in simpo(pair)]
        [1.3133]
    """
    rewards = logps.policy / logps.length
    if alpha:
        rewards = (1 - capped_exp(-alpha * rewards, 20.0)) / alpha
    return [LossTerm(-F.logsigmoid(beta * logps.margins(rewards) - gamma), per="pair", name="preference")]


@objective(
    title="CPO",
    formula="-(1-ε) log σ(β (log π_θ(w) - log π_θ(l))) - ε log σ(β (log π_θ(l) - log π_θ(w))) + a NLL(w)",
    source="Xu et al. 2024, arXiv 2401.08417",
    when="no reference model, chosen responses good enough to imitate",
    parameters={
        "beta": positive("Scale of the log-prob margin."),
        "label_smoothing": LABEL_SMOOTHING,
        "nll_weight": NLL_WEIGHT,
    },
    reference=(),
    pairs=True,
    reward="logp",
)
def cpo(
    logps: ResponseLogps, *, beta: float = 0.1, label_smoothing: float = 0.0, nll_weight: float = 1.0
) -> LossTerms:
    """CPO: DPO with a uniform reference, and the likelihood of the chosen response.

        L = E_pairs[-(1-ε) log σ(β δ) - ε log σ(-β δ)] + a Σ_w -log π(w) / Σ_w |w|,   δ = log π(w) - log π(l)

    The likelihood is a mean over tokens, as in TRL (its `cpo_alpha` is `nll_weight`). The paper writes a sum.

    References:
        Xu et al., 2024, arXiv 2401.08417.

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in cpo(pair)]
        [0.5981, 3.0]
    """
    values = smoothed_nll(beta * logps.margins(logps.policy), label_smoothing)
    return [LossTerm(values, per="pair", name="preference"), *likelihood(logps, nll_weight)]


@objective(
    title="SLiC-HF",
    formula="max(0, 1 - β (log π_θ(w) - log π_θ(l))) + a NLL(w)",
    source="Zhao et al. 2023, arXiv 2305.10425",
    when="no reference model, a fixed margin",
    parameters={"beta": positive("Inverse of the margin in nats."), "nll_weight": NLL_WEIGHT},
    reference=(),
    pairs=True,
    reward="logp",
)
def slic(logps: ResponseLogps, *, beta: float = 1.0, nll_weight: float = 0.0) -> LossTerms:
    """SLiC-HF: hinge on the log-prob margin, zero once it reaches 1/β nats (β times the paper's loss, whose δ is 1/β).

        L = E_pairs[max(0, 1 - β (log π(w) - log π(l)))] + a Σ_w -log π(w) / Σ_w |w|

    The paper regularises by the likelihood of an SFT target. Here the target is the chosen response.

    References:
        Zhao et al., 2023, arXiv 2305.10425.

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in slic(pair)]
        [0.0]
    """
    values = F.relu(1 - beta * logps.margins(logps.policy))
    return [LossTerm(values, per="pair", name="preference"), *likelihood(logps, nll_weight)]


@objective(
    title="ORPO",
    formula="NLL(w) - β log σ(log odds(w) - log odds(l)), odds = p/(1-p), p = π_θ(y)^(1/|y|)",
    source="Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7",
    when="no reference model, training from a base model in one stage",
    parameters={"beta": positive("The paper's λ: weight of the odds ratio.")},
    reference=(),
    pairs=True,
    reward="mean_logp",
)
def orpo(logps: ResponseLogps, *, beta: float = 0.1) -> LossTerms:
    """ORPO: likelihood of the chosen response, and the odds of the chosen over the rejected one. No reference.

        L = Σ_w -log π(w) / Σ_w |w| - β E_pairs[log σ(log odds(w) - log odds(l))],
        odds = p/(1 - p),   p = π(y)^(1/|y|)

    The likelihood is that of the response. TRL's trainer adds the prompt's tokens to it, so its loss differs. p is held
    below 1 by the rounding error of the type, because the odds of 1 are infinite.

    References:
        Hong et al., 2024, arXiv 2403.07691, eq. 6 and 7 (β is its λ).

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in orpo(pair)]
        [0.0875, 3.0]
    """
    mean = (logps.policy / logps.length).clamp(max=-torch.finfo(logps.policy.dtype).eps)
    log_odds = mean - torch.log(-torch.expm1(mean))
    values = -beta * F.logsigmoid(logps.margins(log_odds))
    return [LossTerm(values, per="pair", name="preference"), *likelihood(logps, 1.0)]
