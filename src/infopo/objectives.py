"""Losses: pure functions of `ResponseLogps`. Every equation of the paper that trains a model is in this file.

Notation: π = policy, r = π/π_ref, w = chosen, l = rejected, |y| = number of tokens. Each function returns loss
terms; the trainer divides each by its count in the whole optimizer step (see `LossTerm`). The functions know no
model, device, rank or configuration. Names, parameters and needs stand in `catalog.py`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from infopo.catalog import complete_parameters
from infopo.records import LossTerm, ResponseLogps

LossTerms = list[LossTerm]
LossFunction = Callable[[ResponseLogps], LossTerms]


def infopo(
    logps: ResponseLogps, *, beta: float = 1.0, length_normalized: bool = False, cap: float = 5.0
) -> LossTerms:
    """InfoPO: the NWJ bound on mutual information with the critic β log r.

        L = E_w[-β log π(w)] + E_l[r(l)^β]

    With β = 1 this is the paper's loss, -log π(w|x) + π(l|x)/π_ref(l|x). The constant of the chosen term,
    β log π_ref(w), is dropped: it has no gradient, so the reference of chosen responses is not needed. With
    `length_normalized`, each log-prob is divided by |y| first. Chosen and rejected responses need not be paired.

    Beyond `cap` nats, exp() goes on linearly (`capped_exp`): the push down on a response stays finite.

    Raises nothing; a missing reference (NaN) makes the loss NaN.

    References:
        Xiao et al., 2025, arXiv 2505.08507. Bound: Nguyen, Wainwright, Jordan, 2010, arXiv 0809.0853.
    """
    length = logps.length.to(
        logps.policy.dtype
    )  # beta / integers would be float32, and round float64 log-probs
    scale = beta / length if length_normalized else torch.full_like(logps.policy, beta)
    chosen, rejected = logps.chosen, logps.rejected
    log_ratio = scale * (logps.policy - logps.reference)
    return [
        LossTerm(-(scale * logps.policy)[chosen], per="chosen", name="chosen"),
        LossTerm(capped_exp(log_ratio[rejected], cap), per="rejected", name="rejected"),
    ]


def dpo(
    logps: ResponseLogps, *, beta: float = 0.1, label_smoothing: float = 0.0, nll_weight: float = 0.0
) -> LossTerms:
    """DPO, with conservative label smoothing ε and an optional likelihood term.

        L = E_pairs[-(1-ε) log σ(β Δ) - ε log σ(-β Δ)] + a Σ_w -log π(w) / Σ_w |w|,   Δ = log r(w) - log r(l)

    References:
        Rafailov et al., 2023, arXiv 2305.18290, eq. 7. Label smoothing: Mitchell, 2023, "A note on DPO with noisy
        preferences", eq. 3. Likelihood term (as a token mean over the step): Pang et al., 2024, arXiv 2404.19733.
    """
    logits = beta * _margin(logps.policy - logps.reference, logps)
    values = -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)
    terms = [LossTerm(values, per="pair", name="preference")]
    if nll_weight:
        terms.append(LossTerm(-nll_weight * logps.policy[logps.chosen], per="token", name="nll"))
    return terms


def ipo(logps: ResponseLogps, *, beta: float = 0.1, length_normalized: bool = True) -> LossTerms:
    """IPO: squared distance of the log-ratio margin from 1/(2β).

        L = E_pairs[(h(w) - h(l) - 1/(2β))²],   h = log r / |y|   (log r without `length_normalized`)

    The paper writes sums; its authors ran means over tokens, which is what TRL and this default do.

    References:
        Azar et al., 2023, arXiv 2310.12036, eq. 17 (β is its τ).
    """
    log_ratio = logps.policy - logps.reference
    if length_normalized:
        log_ratio = log_ratio / logps.length
    return [LossTerm((_margin(log_ratio, logps) - 1 / (2 * beta)) ** 2, per="pair", name="preference")]


def hinge(logps: ResponseLogps, *, beta: float = 0.1) -> LossTerms:
    """Hinge loss on DPO's margin: zero once the margin reaches 1/β nats.

        L = E_pairs[max(0, 1 - β Δ)],   Δ = log r(w) - log r(l)

    References:
        Liu et al., 2023 (RSO), arXiv 2309.06657, with the reference as in TRL's `hinge`.
    """
    return [
        LossTerm(
            F.relu(1 - beta * _margin(logps.policy - logps.reference, logps)), per="pair", name="preference"
        )
    ]


def simpo(logps: ResponseLogps, *, beta: float = 2.0, gamma: float = 0.5) -> LossTerms:
    """SimPO: length-normalised log-probs as rewards, a target margin γ, no reference.

        L = E_pairs[-log σ(β log π(w)/|w| - β log π(l)/|l| - γ)]

    References:
        Meng et al., 2024, arXiv 2405.14734, eq. 6.
    """
    margin = beta * _margin(logps.policy / logps.length, logps)
    return [LossTerm(-F.logsigmoid(margin - gamma), per="pair", name="preference")]


def sft(logps: ResponseLogps, *, token_mean: bool = False) -> LossTerms:
    """Maximum likelihood of chosen responses: the baseline of every comparison.

    L = E_w[-log π(w)]          (`token_mean`: Σ_w -log π(w) / Σ_w |w|)
    """
    return [LossTerm(-logps.policy[logps.chosen], per="token" if token_mean else "chosen", name="chosen")]


def capped_exp(log_ratio: Float[Tensor, " items"], cap: float) -> Float[Tensor, " items"]:
    """exp(z) up to the cap c, e^c (1 + z - c) beyond it: finite, continuous with its derivative, still rising.

    Args:
        log_ratio: z, in nats.
        cap: c, in nats.
    """
    # One product, no `where`: e^c itself is never formed, so a cap too large to exponentiate ("no cap") is harmless.
    return torch.exp(log_ratio.clamp(max=cap)) * (1 + F.relu(log_ratio - cap))


def _margin(scores: Float[Tensor, " responses"], logps: ResponseLogps) -> Float[Tensor, " pairs"]:
    """score(w) - score(l) of every pair."""
    return scores[logps.pairs[:, 0]] - scores[logps.pairs[:, 1]]


FUNCTIONS: Mapping[str, Callable[..., LossTerms]] = {
    "infopo": infopo,
    "dpo": dpo,
    "ipo": ipo,
    "hinge": hinge,
    "simpo": simpo,
    "sft": sft,
}


def loss_function(name: str, parameters: Mapping[str, Any] | None = None) -> LossFunction:
    """The objective `name` with its parameters bound; what is not given takes the catalog's default.

    Raises:
        RecipeError: Unknown name, unknown parameter, or a value outside its domain.
    """
    bound = complete_parameters(name, parameters or {})  # also refuses an unknown name
    return partial(FUNCTIONS[name], **bound)
