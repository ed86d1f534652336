"""InfoPO and its family: the same critic f = β log r under other bounds, one loss each (see `estimators.py`).

A loss is minus the bound, up to constants without a gradient. `losses/__init__.py` has the notation. The examples are
of one pair: log r(w) = 1 and log r(l) = -1 nat, 2 and 4 tokens.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from infopo.estimators import DIVERGENCES, log_mixture
from infopo.losses.common import capped_exp, critic_scores
from infopo.losses.coupling import StepStatistic
from infopo.losses.declaration import (
    CAP,
    CRITIC,
    LENGTH_NORMALIZED,
    at_least_zero,
    objective,
    positive,
    within,
)
from infopo.records import LossTerm, LossTerms, ResponseLogps, Role


@objective(
    title="InfoPO",
    formula="-β log π_θ(w) + r(l)^β",
    source="Xiao et al. 2025, arXiv 2505.08507",
    when="the default: chosen likelihood must not fall, or feedback is unpaired",
    bound="KL(p_w‖p_l), no maximum",
    parameters={
        "beta": positive("Scale of the log-ratio critic; 1 is the paper's loss."),
        "length_normalized": LENGTH_NORMALIZED,
        "cap": CAP,
    },
    reference=("rejected",),
    ratio=True,
)
def infopo(
    logps: ResponseLogps, *, beta: float = 1.0, length_normalized: bool = False, cap: float = 5.0
) -> LossTerms:
    """InfoPO: the NWJ bound on mutual information with the critic β log r.

        L = E_w[-β log π(w)] + E_l[r(l)^β]

    With β = 1 this is the paper's loss, -log π(w|x) + π(l|x)/π_ref(l|x). The constant of the chosen term,
    β log π_ref(w), is dropped: it has no gradient, so the reference of chosen responses is not needed. With
    `length_normalized`, each log-prob is divided by |y| first. Chosen and rejected responses need not be paired.

    Beyond `cap` nats, exp() is extended linearly (`capped_exp`), so the push down on a response stays finite. A missing
    reference of a rejected response (NaN) makes the loss NaN.

    References:
        Xiao et al., 2025, arXiv 2505.08507, which prints sums over tokens. The public code of its first author
        (DIL, arXiv 2503.05079, loss UKL) takes means over tokens: `length_normalized`. Bound: Nguyen, Wainwright,
        Jordan, 2010, arXiv 0809.0853.

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in infopo(pair)]
        [3.0, 0.3679]
    """
    # A float divided by an integer tensor is float32, which would round float64 log-probs.
    length = logps.length.to(logps.policy.dtype)
    scale = beta / length if length_normalized else torch.full_like(logps.policy, beta)
    chosen, rejected = logps.chosen, logps.rejected
    log_ratio = scale * (logps.policy - logps.reference)
    return [
        LossTerm(-(scale * logps.policy)[chosen], per="chosen", name="chosen"),
        LossTerm(capped_exp(log_ratio[rejected], cap), per="rejected", name="rejected"),
    ]


@objective(
    title="InfoNCE",
    formula="-log(r(w)^β / (r(w)^β + Σ_l r(l)^β)), all rejected responses of the prompt",
    source="van den Oord et al. 2018, arXiv 1807.03748, eq. 4",
    when="several rejected responses a prompt; with one it is DPO at the same β",
    bound="KL(p_w‖p_l), at most log(1 + K) with K rejected responses",
    parameters={"beta": CRITIC, "length_normalized": LENGTH_NORMALIZED},
    pairs=True,
    ratio=True,
)
def infonce(logps: ResponseLogps, *, beta: float = 1.0, length_normalized: bool = False) -> LossTerms:
    """InfoNCE: a chosen response against all K rejected ones of its prompt. With K = 1 it is DPO.

        L = E_w[-log(e^f(w) / (e^f(w) + Σ_l e^f(l)))],   f = β log r

    log(1 + K) - L ≤ KL(p_w‖p_l), and at most log(1 + K). At π = π_ref the gradient is K/(1 + K) of InfoPO's.
    A chosen response whose prompt has no rejected one gives 0.

    References:
        van den Oord, Li, Vinyals, 2018, arXiv 1807.03748, eq. 4.

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in infonce(pair)]
        [0.1269]
    """
    critic = critic_scores(logps, beta, length_normalized)
    chosen, rejected = logps.chosen, logps.rejected
    stranger = logps.example[chosen][:, None] != logps.example[rejected]
    negatives = critic[rejected].expand(len(chosen), -1).masked_fill(stranger, -math.inf)
    candidates = torch.cat([critic[chosen][:, None], negatives], dim=1)
    return [LossTerm(candidates.logsumexp(dim=1) - critic[chosen], per="chosen", name="preference")]


@objective(
    title="Interpolated",
    formula="log(α m₀ + 1-α) - β log r(w) + r(l)^β/(α m + 1-α), m₀, m: means of r^β over the prompt",
    source="Poole et al. 2019, arXiv 1905.06922, section 2.4",
    when="several rejected responses a prompt, and InfoPO's ratio has a heavy tail",
    bound="KL(p_w‖p_l), at most 1 + log(M/α) with M rejected responses",
    parameters={
        "beta": CRITIC,
        "alpha": within("[0, 1)", "0 is InfoPO; towards 1, InfoNCE over the prompt."),
        "length_normalized": LENGTH_NORMALIZED,
        "cap": CAP,
    },
    pairs=True,
    ratio=True,
)
def interpolated(
    logps: ResponseLogps,
    *,
    beta: float = 1.0,
    alpha: float = 0.5,
    length_normalized: bool = False,
    cap: float = 5.0,
) -> LossTerms:
    """I_α, between InfoPO (α = 0) and InfoNCE (α → 1): the interpolated bound over a prompt's M rejected responses.

        L = E_pairs[log a₀ - f(w)] + E_l[e^f(l) / a],   f = β log r,
        a₀ = α (e^f(w) + Σ_{l' ≠ l} e^f(l'))/M + 1 - α,   a = α Σ_l' e^f(l')/M + 1 - α

    1 - L ≤ KL(p_w‖p_l), and at most 1 + log(M/α). With M = 1, the critic cannot be compared with
    that of another response, and the loss is InfoPO's with a critic held below log(1/α). At π = π_ref the gradient is
    1 - α/M of InfoPO's. Beyond `cap` nats the exponential in a numerator is extended linearly.

    References:
        Poole et al., 2019, arXiv 1905.06922, section 2.4 (nonlinearly interpolated lower bounds, q = 1).

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in interpolated(pair)]
        [-0.3799, 0.5379]
    """
    critic = critic_scores(logps, beta, length_normalized)
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


@objective(
    title="JS",
    formula="-log σ(β log r(w)) - log σ(-β log r(l))",
    source="Xiao et al. 2025 (DIL), arXiv 2503.05079, its BCE; bound: Nowozin et al. 2016, arXiv 1606.00709",
    when="noisy or unpaired labels: no single response pulls harder than β",
    bound="2 JS(p_w, p_l), at most 2 log 2",
    parameters={"beta": CRITIC, "length_normalized": LENGTH_NORMALIZED},
    trl_loss_type="bco_pair",
)
def js(logps: ResponseLogps, *, beta: float = 1.0, length_normalized: bool = False) -> LossTerms:
    """Jensen-Shannon: each response classified by itself, chosen against rejected. The BCE loss of DIL at β = 1.

        L = E_w[-log σ(f)] + E_l[-log σ(-f)],   f = β log r

    log 2 - L/2 ≤ JS(p_w, p_l) ≤ log 2, the mutual information with a balanced label. Both pushes are at most β, so
    no cap is needed. At π = π_ref the gradient is 1/2 of InfoPO's. TRL's `bco_pair`.

    References:
        Xiao et al., 2025 (DIL), arXiv 2503.05079. Bound: Nowozin et al., 2016, arXiv 1606.00709.

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in js(pair)]
        [0.3133, 0.3133]
    """
    critic = critic_scores(logps, beta, length_normalized)
    return [
        LossTerm(-F.logsigmoid(critic[logps.chosen]), per="chosen", name="chosen"),
        LossTerm(-F.logsigmoid(-critic[logps.rejected]), per="rejected", name="rejected"),
    ]


@objective(
    title="χ²",
    formula="-2 (r(w)^β - 1) + r(l)^2β - 1",
    source="Nowozin et al. 2016, arXiv 1606.00709, tables 1 and 2",
    when="to see what a steeper bound does; pulls on likely chosen responses grow without limit up to the cap",
    bound="χ²(p_w‖p_l), no maximum",
    parameters={"beta": CRITIC, "length_normalized": LENGTH_NORMALIZED, "cap": CAP},
    ratio=True,
)
def chi2(
    logps: ResponseLogps, *, beta: float = 1.0, length_normalized: bool = False, cap: float = 5.0
) -> LossTerms:
    """Pearson's χ²: the push on a chosen response grows with its ratio, too.

        L = E_w[-2 (r^β - 1)] + E_l[r^2β - 1]

    -L ≤ χ²(p_w‖p_l). At β = 1 it is 2 LSIF + 1, with LSIF of DIL (arXiv 2503.05079). At π = π_ref the
    gradient is 2 times InfoPO's. Beyond `cap` nats of β log r, both
    exponentials are extended linearly.

    References:
        Nowozin et al., 2016, arXiv 1606.00709, tables 1 and 2.

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in chi2(pair)]
        [-3.4366, -0.8647]
    """
    return _f_divergence("chi2", logps, critic_scores(logps, beta, length_normalized), cap)


@objective(
    title="Hellinger",
    formula="r(w)^(-β/2) - 1 + r(l)^(β/2) - 1",
    source="Nowozin et al. 2016, arXiv 1606.00709, tables 1 and 2",
    when="to see what a flatter bound does; between JS and InfoPO in its tail",
    bound="H²(p_w, p_l), at most 2",
    parameters={"beta": CRITIC, "length_normalized": LENGTH_NORMALIZED, "cap": CAP},
    ratio=True,
)
def hellinger(
    logps: ResponseLogps, *, beta: float = 1.0, length_normalized: bool = False, cap: float = 5.0
) -> LossTerms:
    """Squared Hellinger: the push on a chosen response fades as its ratio grows.

        L = E_w[r^(-β/2) - 1] + E_l[r^(β/2) - 1]

    -L ≤ H²(p_w, p_l) ≤ 2. At π = π_ref the gradient is 1/2 of InfoPO's. Beyond `cap` nats of |β log r|, both
    exponentials are extended linearly.

    References:
        Nowozin et al., 2016, arXiv 1606.00709, tables 1 and 2.

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in hellinger(pair)]
        [-0.3935, -0.3935]
    """
    return _f_divergence("hellinger", logps, critic_scores(logps, beta, length_normalized), cap)


@objective(
    title="Donsker-Varadhan",
    formula="-β log r(w) + log E_l[r(l)^β], E_l over the whole step",
    source="Belghazi et al. 2018, arXiv 1801.04062, theorem 1",
    when="InfoPO whose rejected ratios drift as a whole: a constant shift of the critic has no weight",
    bound="KL(p_w‖p_l), no maximum; biased upwards in a finite step",
    parameters={"beta": CRITIC, "length_normalized": LENGTH_NORMALIZED},
    statistic="log_mean",
    ratio=True,
)
def dv(logps: ResponseLogps, *, beta: float = 1.0, length_normalized: bool = False) -> LossTerms:
    """Donsker-Varadhan: InfoPO whose rejected term does not see a constant shift of the critic.

        L = E_w[-f] + log E_l[e^f],   f = β log r

    -L ≤ KL(p_w‖p_l) if E_l is exact. Here E_l is the mean over the rejected responses of the whole optimizer step, and
    -L is biased upwards. At π = π_ref the gradient is InfoPO's. Chosen and rejected responses need not be paired.

    With M = E_l[e^f] held constant, each rejected response gets the value log M + e^f/M - 1. Over the step these values
    have the mean log M, and their mean has the gradient of log E_l[e^f]. No cap is needed, because e^f/M is at most the
    number of rejected responses.

    References:
        Donsker, Varadhan, 1983. Belghazi et al., 2018, arXiv 1801.04062, theorem 1.

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in dv(pair)]
        [-1.0, -1.0]
    """
    statistic = log_mean_statistic(beta, length_normalized)
    return _tangent_terms(logps, statistic, critic_scores(logps, beta, length_normalized), math.inf)


@objective(
    title="SMILE",
    formula="-β log r(w) + log E_l[clip(r(l)^β, e^-τ, e^τ)], E_l over the whole step",
    source="Song, Ermon 2020, arXiv 1910.06222, section 4.2",
    when="as `dv`, with a few rejected responses so likely that they outweigh all others",
    bound="KL(p_w‖p_l) from either side, at most E_w[f] + τ",
    parameters={
        "beta": CRITIC,
        "tau": positive("Rejected responses whose critic is beyond ±τ are not pushed on (nats).", "nats"),
        "length_normalized": LENGTH_NORMALIZED,
    },
    statistic="log_mean",
    ratio=True,
)
def smile(
    logps: ResponseLogps, *, beta: float = 1.0, tau: float = 5.0, length_normalized: bool = False
) -> LossTerms:
    """SMILE: Donsker-Varadhan with the critic of rejected responses clipped to ±τ nats inside the logarithm.

        L = E_w[-f] + log E_l[clip(e^f, e^-τ, e^τ)],   f = β log r

    -L may lie on either side of KL(p_w‖p_l). A rejected response beyond ±τ gets no gradient, but it counts in the mean
    over the optimizer step that the others are divided by. As τ → ∞, SMILE becomes `dv`, whose remarks hold here too.

    References:
        Song, Ermon, 2020, arXiv 1910.06222, section 4.2.

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in smile(pair)]
        [-1.0, -1.0]
    """
    statistic = log_mean_statistic(beta, length_normalized, tau=tau)
    return _tangent_terms(logps, statistic, critic_scores(logps, beta, length_normalized), math.inf)


@objective(
    title="MINE",
    formula="-β log r(w) + log m + r(l)^β/m - 1, m a moving average of E_l[r(l)^β]",
    source="Belghazi et al. 2018, arXiv 1801.04062, section 3.2; value: Poole et al. 2019, arXiv 1905.06922",
    when="as `dv`, where a step holds few rejected responses",
    bound="KL(p_w‖p_l), no maximum",
    parameters={
        "beta": CRITIC,
        "rate": within("(0, 1]", "Weight of a new step in m; 1 is DV."),
        "length_normalized": LENGTH_NORMALIZED,
        "cap": at_least_zero("β log r(l) - log m beyond which exp() is extended linearly (nats).", "nats"),
    },
    statistic="moving_log_mean",
    ratio=True,
)
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

    The trainer keeps m and uses `rate`. m includes this step's mean and starts as the first step's. For a given m, -L
    is an unbiased lower bound on KL(p_w‖p_l). Its value is DV's if rate = 1, and wherever m is the step's own mean: in
    evaluation, and for a batch without a trainer. Beyond `cap` nats of f - log m, exp() is extended linearly.

    References:
        Belghazi et al., 2018, arXiv 1801.04062, section 3.2. The value, of which this is the gradient: Poole et al.,
        2019, arXiv 1905.06922, section 2.2 (unnormalized lower bounds, with m as the baseline).

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in mine(pair)]
        [-1.0, -1.0]
    """
    statistic = log_mean_statistic(beta, length_normalized, rate=rate)
    return _tangent_terms(logps, statistic, critic_scores(logps, beta, length_normalized), cap)


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


def log_mean_statistic(
    beta: float, length_normalized: bool, *, tau: float = math.inf, rate: float = 1.0
) -> StepStatistic:
    """The statistic log E_l[e^f] over the step's rejected responses, with f clipped to ±τ (nats)."""

    def scores(logps: ResponseLogps) -> Tensor:
        return critic_scores(logps, beta, length_normalized)[logps.rejected].clamp(-tau, tau)

    return StepStatistic(Role.REJECTED, scores, "log_mean", rate)


def _tangent_terms(
    logps: ResponseLogps, statistic: StepStatistic, critic: Float[Tensor, " responses"], cap: float
) -> LossTerms:
    """E_w[-f] + E_l[log m + e^s/m - 1], the tangent of log E_l[e^s] at m. It touches the curve at m = E_l[e^s]."""
    log_mean = statistic.of(logps)
    values = log_mean + capped_exp(statistic.scores(logps) - log_mean, cap) - 1
    return [
        LossTerm(-critic[logps.chosen], per="chosen", name="chosen"),
        LossTerm(values, per="rejected", name="rejected"),
    ]
