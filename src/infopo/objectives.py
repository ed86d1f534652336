"""Losses: pure functions of `ResponseLogps`. Every equation of the paper that trains a model is in this file.

InfoPO and its family (one bound each, f = β log r for the critic, see `estimators.py`), then what the paper compares
with. Further losses to compare with are in `baselines.py`; `FUNCTIONS` names all. Of the losses that couple the
examples of a step, `step_statistic` says by what.

Notation: π = policy, r = π/π_ref, w = chosen, l = rejected, |y| = number of tokens. Each function returns loss
terms; the trainer divides each by its count in the whole optimizer step (see `LossTerm`). The functions know no
model, device, rank or configuration. Names, parameters and needs stand in `catalog.py`.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from infopo import baselines
from infopo.catalog import OBJECTIVES, complete_parameters
from infopo.coupling import StepStatistic
from infopo.estimators import DIVERGENCES, log_mixture
from infopo.records import LossTerm, ResponseLogps, Role
from infopo.records import LossTerms as LossTerms  # part of this module's interface

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


def infonce(logps: ResponseLogps, *, beta: float = 1.0, length_normalized: bool = False) -> LossTerms:
    """InfoNCE: a chosen response against all K rejected ones of its prompt; DPO where K = 1.

        L = E_w[-log(e^f(w) / (e^f(w) + Σ_l e^f(l)))],   f = β log r

    log(1 + K) - L ≤ KL(p_w‖p_l), and at most log(1 + K). At π = π_ref the gradient is K/(1 + K) of InfoPO's.
    A chosen response whose prompt has no rejected one gives 0.

    References:
        van den Oord, Li, Vinyals, 2018, arXiv 1807.03748, eq. 4.
    """
    critic = _critic(logps, beta, length_normalized)
    chosen, rejected = logps.chosen, logps.rejected
    stranger = logps.example[chosen][:, None] != logps.example[rejected]
    negatives = critic[rejected].expand(len(chosen), -1).masked_fill(stranger, -math.inf)
    candidates = torch.cat([critic[chosen][:, None], negatives], dim=1)
    return [LossTerm(candidates.logsumexp(dim=1) - critic[chosen], per="chosen", name="preference")]


def interpolated(
    logps: ResponseLogps,
    *,
    beta: float = 1.0,
    alpha: float = 0.5,
    length_normalized: bool = False,
    cap: float = 5.0,
) -> LossTerms:
    """I_α, between InfoPO (α = 0) and InfoNCE (α → 1): the interpolated bound over the M rejected of a prompt.

        L = E_pairs[log a₀ - f(w)] + E_l[e^f(l) / a],   f = β log r,
        a₀ = α (e^f(w) + Σ_{l' ≠ l} e^f(l'))/M + 1 - α,   a = α Σ_l' e^f(l')/M + 1 - α

    1 - L ≤ KL(p_w‖p_l), and at most 1 + log(M/α). With M = 1, the critic has no other response to be compared with:
    what is left is InfoPO with a critic held below log(1/α). At π = π_ref the gradient is 1 - α/M of InfoPO's.
    Beyond `cap` nats the exponential in a numerator goes on linearly.

    References:
        Poole et al., 2019, arXiv 1905.06922, section 2.4 (nonlinearly interpolated lower bounds, q = 1).
    """
    critic = _critic(logps, beta, length_normalized)
    rejected = logps.rejected
    scores, owner = critic[rejected], logps.example[rejected]
    first, second = logps.pairs.unbind(1)
    left_out = (logps.example[first][:, None] != owner) | (second[:, None] == rejected)
    others = scores.expand(len(first), -1).masked_fill(left_out, -math.inf)
    same = owner[:, None] == owner
    size = same.sum(dim=1).to(critic.dtype)  # M, of each rejected response
    size_of_pair = (logps.example[first][:, None] == owner).sum(dim=1).to(critic.dtype)
    log_mean_0 = torch.cat([critic[first][:, None], others], dim=1).logsumexp(dim=1) - size_of_pair.log()
    log_mean = scores.expand(len(rejected), -1).masked_fill(~same, -math.inf).logsumexp(dim=1) - size.log()
    return [
        LossTerm(log_mixture(log_mean_0, alpha) - critic[first], per="pair", name="preference"),
        LossTerm(
            capped_exp(scores, cap) * torch.exp(-log_mixture(log_mean, alpha)),
            per="rejected",
            name="rejected",
        ),
    ]


def js(logps: ResponseLogps, *, beta: float = 1.0, length_normalized: bool = False) -> LossTerms:
    """Jensen-Shannon: each response classified by itself, chosen against rejected. The objective of MIO.

        L = E_w[-log σ(f)] + E_l[-log σ(-f)],   f = β log r

    log 2 - L/2 ≤ JS(p_w, p_l) ≤ log 2, the mutual information with a balanced label. Both pushes are at most β, so
    nothing needs a cap. At π = π_ref the gradient is 1/2 of InfoPO's. TRL's `bco_pair`.

    References:
        Lv et al., 2025 (MIO), arXiv 2506.22578. Bound: Nowozin et al., 2016, arXiv 1606.00709.
    """
    critic = _critic(logps, beta, length_normalized)
    return [
        LossTerm(-F.logsigmoid(critic[logps.chosen]), per="chosen", name="chosen"),
        LossTerm(-F.logsigmoid(-critic[logps.rejected]), per="rejected", name="rejected"),
    ]


def chi2(
    logps: ResponseLogps, *, beta: float = 1.0, length_normalized: bool = False, cap: float = 5.0
) -> LossTerms:
    """Pearson's χ²: the push on a chosen response grows with its ratio, too.

        L = E_w[-2 (r^β - 1)] + E_l[r^2β - 1]

    -L ≤ χ²(p_w‖p_l). At π = π_ref the gradient is 2 times InfoPO's. Beyond `cap` nats of β log r, both exponentials
    go on linearly.

    References:
        Nowozin et al., 2016, arXiv 1606.00709, tables 1 and 2.
    """
    return _f_divergence("chi2", logps, _critic(logps, beta, length_normalized), cap)


def hellinger(
    logps: ResponseLogps, *, beta: float = 1.0, length_normalized: bool = False, cap: float = 5.0
) -> LossTerms:
    """Squared Hellinger: the push on a chosen response fades as its ratio grows.

        L = E_w[r^(-β/2) - 1] + E_l[r^(β/2) - 1]

    -L ≤ H²(p_w, p_l) ≤ 2. At π = π_ref the gradient is 1/2 of InfoPO's. Beyond `cap` nats of |β log r|, both
    exponentials go on linearly.

    References:
        Nowozin et al., 2016, arXiv 1606.00709, tables 1 and 2.
    """
    return _f_divergence("hellinger", logps, _critic(logps, beta, length_normalized), cap)


def dv(logps: ResponseLogps, *, beta: float = 1.0, length_normalized: bool = False) -> LossTerms:
    """Donsker-Varadhan: InfoPO whose rejected term does not see a constant shift of the critic.

        L = E_w[-f] + log E_l[e^f],   f = β log r

    -L ≤ KL(p_w‖p_l) where E_l is exact; here it is the mean over the rejected responses of the whole optimizer step,
    and -L is biased upwards. At π = π_ref the gradient is InfoPO's. Chosen and rejected responses need not be paired.

    With M = E_l[e^f] a constant, each rejected response has the value log M + e^f/M - 1: over the step these have the
    mean log M, and the gradient of log E_l[e^f]. e^f/M is at most the number of rejected responses: no cap is needed.

    References:
        Donsker, Varadhan, 1983. Belghazi et al., 2018, arXiv 1801.04062, theorem 1.
    """
    statistic = _log_mean(beta, length_normalized)
    return _tangent_terms(logps, statistic, _critic(logps, beta, length_normalized), math.inf)


def smile(
    logps: ResponseLogps, *, beta: float = 1.0, tau: float = 5.0, length_normalized: bool = False
) -> LossTerms:
    """SMILE: Donsker-Varadhan with the critic of rejected responses clipped to ±τ nats inside the logarithm.

        L = E_w[-f] + log E_l[clip(e^f, e^-τ, e^τ)],   f = β log r

    -L may lie on either side of KL(p_w‖p_l). A rejected response beyond ±τ is not pushed on, but counts in the mean,
    over the whole optimizer step, that the others are divided by. As τ → ∞ it is `dv`, whose remarks hold.

    References:
        Song, Ermon, 2020, arXiv 1910.06222, section 4.2.
    """
    statistic = _log_mean(beta, length_normalized, tau=tau)
    return _tangent_terms(logps, statistic, _critic(logps, beta, length_normalized), math.inf)


def mine(
    logps: ResponseLogps,
    *,
    beta: float = 1.0,
    rate: float = 0.01,
    length_normalized: bool = False,
    cap: float = 5.0,
) -> LossTerms:
    """MINE: Donsker-Varadhan whose gradient divides by a moving average of E_l[e^f], not by this step's mean.

        L = E_w[-f] + log m + E_l[e^f/m] - 1,   m ← (1 - rate) m + rate E_l[e^f],   f = β log r

    m holds this step's mean too, and starts with the first step's; `rate` is used by whoever keeps m (the trainer). -L
    is a lower bound on KL(p_w‖p_l), unbiased for an m that is given. It is DV's value at rate = 1, or where
    m is the step's mean (a batch without a trainer, and evaluation). Beyond `cap` nats of f - log m, exp() goes on
    linearly.

    References:
        Belghazi et al., 2018, arXiv 1801.04062, section 3.2. The value, of which this is the gradient: Poole et al.,
        2019, arXiv 1905.06922, section 2.2 (unnormalized lower bounds, with m as the baseline).
    """
    statistic = _log_mean(beta, length_normalized, rate=rate)
    return _tangent_terms(logps, statistic, _critic(logps, beta, length_normalized), cap)


def dpo(
    logps: ResponseLogps, *, beta: float = 0.1, label_smoothing: float = 0.0, nll_weight: float = 0.0
) -> LossTerms:
    """DPO, with conservative label smoothing ε and an optional likelihood term.

        L = E_pairs[-(1-ε) log σ(β Δ) - ε log σ(-β Δ)] + a Σ_w -log π(w) / Σ_w |w|,   Δ = log r(w) - log r(l)

    References:
        Rafailov et al., 2023, arXiv 2305.18290, eq. 7. Label smoothing: Mitchell, 2023, "A note on DPO with noisy
        preferences", eq. 3. Likelihood term (as a token mean over the step): Pang et al., 2024, arXiv 2404.19733.
    """
    logits = beta * logps.margins(logps.policy - logps.reference)
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
    return [LossTerm((logps.margins(log_ratio) - 1 / (2 * beta)) ** 2, per="pair", name="preference")]


def hinge(logps: ResponseLogps, *, beta: float = 0.1) -> LossTerms:
    """Hinge loss on DPO's margin: zero once the margin reaches 1/β nats.

        L = E_pairs[max(0, 1 - β Δ)],   Δ = log r(w) - log r(l)

    References:
        Liu et al., 2023 (RSO), arXiv 2309.06657, with the reference as in TRL's `hinge`.
    """
    return [
        LossTerm(
            F.relu(1 - beta * logps.margins(logps.policy - logps.reference)), per="pair", name="preference"
        )
    ]


def simpo(logps: ResponseLogps, *, beta: float = 2.0, gamma: float = 0.5) -> LossTerms:
    """SimPO: length-normalised log-probs as rewards, a target margin γ, no reference.

        L = E_pairs[-log σ(β log π(w)/|w| - β log π(l)/|l| - γ)]

    References:
        Meng et al., 2024, arXiv 2405.14734, eq. 6.
    """
    margin = beta * logps.margins(logps.policy / logps.length)
    return [LossTerm(-F.logsigmoid(margin - gamma), per="pair", name="preference")]


def fdpo(
    logps: ResponseLogps,
    *,
    beta: float = 0.1,
    divergence: str = "js",
    alpha: float = 0.5,
    cap: float = 20.0,
) -> LossTerms:
    """f-DPO: DPO with another divergence from the reference than reverse KL (with which it is DPO).

        L = E_pairs[-log σ(β (φ'(r(w)) - φ'(r(l))))],
        φ'(r) = 1 - 1/r (forward KL);   log(2r/(1 + r)) (JS);   (1 - r^-α)/α (α-divergence; forward KL at α = 1)

    Beyond `cap` nats of -log r (or -α log r), 1/r goes on linearly (`capped_exp`). TRL's α is 1 - α here.

    References:
        Wang et al., 2023, arXiv 2309.16240, table 1.
    """
    log_ratio = logps.policy - logps.reference
    if divergence == "js":
        score = math.log(2) + F.logsigmoid(log_ratio)
    else:
        power = 1.0 if divergence == "forward_kl" else alpha
        score = (1 - capped_exp(-power * log_ratio, cap)) / power
    return [LossTerm(-F.logsigmoid(beta * logps.margins(score)), per="pair", name="preference")]


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


def _f_divergence(
    name: str, logps: ResponseLogps, critic: Float[Tensor, " responses"], cap: float
) -> LossTerms:
    """-E_w[φ'(e^f)] + E_l[φ*(φ'(e^f))]: minus the bound of a row of `estimators.DIVERGENCES`."""

    def power(scores: Tensor, exponent: float) -> Tensor:
        return capped_exp(exponent * scores, abs(exponent) * cap)

    row = DIVERGENCES[name]
    return [
        LossTerm(-row.activation(critic[logps.chosen], power), per="chosen", name="chosen"),
        LossTerm(row.conjugate(critic[logps.rejected], power), per="rejected", name="rejected"),
    ]


def _critic(logps: ResponseLogps, beta: float, length_normalized: bool) -> Float[Tensor, " responses"]:
    """f = β log r, or β log r / |y|."""
    critic = beta * (logps.policy - logps.reference)
    return critic / logps.length if length_normalized else critic


def _log_mean(
    beta: float, length_normalized: bool, *, tau: float = math.inf, rate: float = 1.0
) -> StepStatistic:
    """log E_l[e^f] over the rejected responses, f clipped to ±τ."""

    def scores(logps: ResponseLogps) -> Tensor:
        return _critic(logps, beta, length_normalized)[logps.rejected].clamp(-tau, tau)

    return StepStatistic(Role.REJECTED, scores, "log_mean", rate)


def _tangent_terms(
    logps: ResponseLogps, statistic: StepStatistic, critic: Float[Tensor, " responses"], cap: float
) -> LossTerms:
    """E_w[-f] + E_l[log m + e^s/m - 1]: the tangent of log E_l[e^s] at m, which it touches where m = E_l[e^s]."""
    log_mean = statistic.of(logps)
    values = log_mean + capped_exp(statistic.scores(logps) - log_mean, cap) - 1
    return [
        LossTerm(-critic[logps.chosen], per="chosen", name="chosen"),
        LossTerm(values, per="rejected", name="rejected"),
    ]


FUNCTIONS: Mapping[str, Callable[..., LossTerms]] = {
    "infopo": infopo,
    "infonce": infonce,
    "interpolated": interpolated,
    "js": js,
    "chi2": chi2,
    "hellinger": hellinger,
    "dv": dv,
    "smile": smile,
    "mine": mine,
    "dpo": dpo,
    "ipo": ipo,
    "hinge": hinge,
    "simpo": simpo,
    "fdpo": fdpo,
    "sft": sft,
    "cpo": baselines.cpo,
    "slic": baselines.slic,
    "orpo": baselines.orpo,
    "rdpo": baselines.rdpo,
    "dpop": baselines.dpop,
    "nca": baselines.nca,
    "exo": baselines.exo,
    "kto": baselines.kto,
    "apo_zero": baselines.apo_zero,
    "apo_down": baselines.apo_down,
    "cal_dpo": baselines.cal_dpo,
    "robust_dpo": baselines.robust_dpo,
}


def loss_function(name: str, parameters: Mapping[str, Any] | None = None) -> LossFunction:
    """The objective `name` with its parameters bound; what is not given takes the catalog's default.

    Raises:
        RecipeError: Unknown name, unknown parameter, or a value outside its domain.
    """
    bound = complete_parameters(name, parameters or {})  # also refuses an unknown name
    return partial(FUNCTIONS[name], **bound)


def step_statistic(name: str, parameters: Mapping[str, Any] | None = None) -> StepStatistic | None:
    """The number of the whole optimizer step that couples the examples of objective `name`; None where none does.

    Raises:
        RecipeError: As `loss_function`.
    """
    bound = complete_parameters(name, parameters or {})
    if not OBJECTIVES[name].statistic:
        return None
    if OBJECTIVES[name].statistic == "kl":
        return baselines.MISMATCH_KL
    return _log_mean(
        bound["beta"],
        bound["length_normalized"],
        tau=bound.get("tau", math.inf),
        rate=bound.get("rate", 1.0),
    )
