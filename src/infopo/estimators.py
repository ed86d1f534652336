"""Mutual-information bounds on their own: critic scores of joint and of marginal samples -> an estimate in nats.

Notation: P is the law of joint samples, Q that of marginal samples. In preference data P is p_w, the law of chosen
responses, and Q is p_l, that of rejected ones. f is the critic's score of a sample. With the pairs of (X, Y) as P
and independent couples as Q, KL(P‖Q) is the mutual information I(X; Y).

Every function is written so that the optimal critic is the same, e^f = dP/dQ. If a bound fixes f only up to a
constant, this critic is among the optima. `losses/family.py` puts f = β log r in their place.

| function | bounds, from below | its maximum | shift of f |
|---|---|---|---|
| `nwj` | KL(P‖Q) | none | matters |
| `donsker_varadhan` | KL(P‖Q) if E_Q is exact (biased upwards from n samples) | none | free |
| `mine` | as `donsker_varadhan`, with another gradient | none | free |
| `infonce` | KL(P‖Q) | log(1 + K), K negatives | free |
| `interpolated` | KL(P‖Q) | 1 + log((1 + K)/α) | free at α = 1 |
| `jensen_shannon` | JS(P, Q) | log 2 | matters |
| `nwj_at_js_critic` | as `nwj`, with the gradient of `jensen_shannon` | none | matters |
| `pearson_chi2` | χ²(P‖Q) | none | matters |
| `squared_hellinger` | H²(P, Q) | 2 | matters |
| `smile` | nothing: may lie on either side of KL(P‖Q) | E_P[f] + τ | free if no score is clipped |

All functions take scores of any floating type and return a scalar of that type, with a gradient. They do not look for
NaN or infinite scores, which propagate as they do in the formula. Training needs `DIVERGENCES` and `log_mixture` only.
The other functions serve study 01, and the tests that hold each loss to its bound.

References:
    Nguyen, Wainwright, Jordan, 2010, arXiv 0809.0853. Nowozin, Cseke, Tomioka, 2016, arXiv 1606.00709.
    Belghazi et al., 2018, arXiv 1801.04062. van den Oord, Li, Vinyals, 2018, arXiv 1807.03748.
    Poole et al., 2019, arXiv 1905.06922. Song, Ermon, 2020, arXiv 1910.06222.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from infopo.errors import ConfigError

Joint = Float[Tensor, " joint"]
Marginal = Float[Tensor, " marginal"]
Estimate = Float[Tensor, ""]
Power = Callable[[Tensor, float], Tensor]
"""(f, k) -> e^(k f). Losses pass a capped one."""


def power(scores: Tensor, exponent: float) -> Tensor:
    """e^(k f), elementwise.

    Example:
        >>> power(torch.tensor(0.0), 2.0)
        tensor(1.)
    """
    return torch.exp(exponent * scores)


@dataclass(frozen=True)
class Divergence:
    """One f-divergence D(P‖Q) = E_Q[φ(dP/dQ)] with φ convex, φ(1) = 0, and its variational bound.

        D(P‖Q) ≥ E_P[T] - E_Q[φ*(T)],   T = φ'(e^f)     [Nowozin et al. eq. 4]

    The activation φ'(e^f) maps any real score into the domain of the conjugate φ*, and makes e^f = dP/dQ the optimum
    of every row. φ*(φ'(u)) = u φ'(u) - φ(u).

    Attributes:
        generator: φ(u), u > 0.
        activation: φ'(e^f), from the score f and a way to form e^(k f).
        conjugate: φ*(φ'(e^f)), likewise.
        curvature: φ''(1): the slope at f = 0 of E_P[T] in a joint score, and of -E_Q[φ*(T)] in a marginal one (with
            the sign reversed). Relative to NWJ, whose φ''(1) is 1.
        maximum: The divergence of laws with disjoint supports.
    """

    generator: Callable[[Tensor], Tensor]
    activation: Callable[[Tensor, Power], Tensor]
    conjugate: Callable[[Tensor, Power], Tensor]
    curvature: float
    maximum: float


DIVERGENCES: Mapping[str, Divergence] = {
    "kl": Divergence(
        generator=lambda u: torch.xlogy(u, u),
        activation=lambda f, e: 1 + f,
        conjugate=lambda f, e: e(f, 1.0),
        curvature=1.0,
        maximum=math.inf,
    ),
    "js": Divergence(
        generator=lambda u: 0.5 * (torch.xlogy(u, u) - (1 + u) * torch.log((1 + u) / 2)),
        activation=lambda f, e: 0.5 * (math.log(2) + F.logsigmoid(f)),
        conjugate=lambda f, e: -0.5 * (math.log(2) + F.logsigmoid(-f)),
        curvature=0.25,
        maximum=math.log(2),
    ),
    "chi2": Divergence(
        generator=lambda u: (u - 1) ** 2,
        activation=lambda f, e: 2 * (e(f, 1.0) - 1),
        conjugate=lambda f, e: e(f, 2.0) - 1,
        curvature=2.0,
        maximum=math.inf,
    ),
    "hellinger": Divergence(
        generator=lambda u: (u.sqrt() - 1) ** 2,
        activation=lambda f, e: 1 - e(f, -0.5),
        conjugate=lambda f, e: e(f, 0.5) - 1,
        curvature=0.5,
        maximum=2.0,
    ),
}
"""The f-divergences whose bounds are used here. χ² and H² have no unit, KL and JS are in nats."""


def variational_bound(divergence: Divergence, joint: Joint, marginal: Marginal) -> Estimate:
    """E_P[T] - E_Q[φ*(T)], T = φ'(e^f): the lower bound of a row of `DIVERGENCES`, unbiased at any sample size.

    Args:
        divergence: A row of the table.
        joint: Scores f of samples of P.
        marginal: Scores f of samples of Q.

    Raises:
        ConfigError: `joint` or `marginal` is empty.

    Example:
        >>> variational_bound(DIVERGENCES["kl"], torch.tensor([1.0]), torch.tensor([0.0]))
        tensor(1.)
    """
    _check_not_empty(joint=joint, marginal=marginal)
    return divergence.activation(joint, power).mean() - divergence.conjugate(marginal, power).mean()


def nwj(joint: Joint, marginal: Marginal) -> Estimate:
    """NWJ, with its constant: 1 + E_P[f] - E_Q[e^f] ≤ KL(P‖Q). It is unbiased and has no maximum.

    Equality at f = log dP/dQ and nowhere else. (Poole et al. write the critic as 1 + f.) At the optimum, n times
    the variance from n samples of each is Var_P[f] + E_P[dP/dQ] - 1, which grows as e^KL at least.

    Raises:
        ConfigError: No joint or no marginal sample.

    References:
        Nguyen, Wainwright, Jordan, 2010, arXiv 0809.0853. Poole et al., 2019, arXiv 1905.06922, section 2.2
        (unnormalized lower bounds).

    Example:
        >>> nwj(torch.tensor([1.0]), torch.tensor([0.0]))
        tensor(1.)
    """
    return variational_bound(DIVERGENCES["kl"], joint, marginal)


def donsker_varadhan(joint: Joint, marginal: Marginal) -> Estimate:
    """Donsker-Varadhan: E_P[f] - log E_Q[e^f] ≤ KL(P‖Q), for any critic, when E_Q is exact. No maximum.

    Equality at f = log dP/dQ + const. From samples, log of a mean underestimates (Jensen), so that the *estimate* is
    biased upwards by about Var_Q[e^f]/(2n E_Q[e^f]²) and is no bound.

    Raises:
        ConfigError: No joint or no marginal sample.

    References:
        Donsker, Varadhan, 1983. Belghazi et al., 2018, arXiv 1801.04062, theorem 1.

    Example:
        >>> donsker_varadhan(torch.tensor([3.0]), torch.tensor([2.0]))  # a shift of f changes nothing
        tensor(1.)
    """
    _check_not_empty(joint=joint, marginal=marginal)
    return joint.mean() - _log_mean_exp(marginal)


def mine(
    joint: Joint, marginal: Marginal, log_mean: Estimate | None = None, *, rate: float = 0.01
) -> tuple[Estimate, Estimate]:
    """MINE: the value of Donsker-Varadhan, with a moving average over batches for E_Q[e^f] in its gradient.

        ∇ = E_P[∇f] - E_Q[e^f ∇f] / m,   m ← (1 - rate) m + rate E_Q[e^f]

    DV's own gradient divides by this batch's mean, which makes it biased. With m over many batches that bias fades.
    Without `log_mean` (the first batch), m is the batch's mean and the gradient is DV's.

    Args:
        joint: Scores f of samples of P.
        marginal: Scores f of samples of Q.
        log_mean: log m after the last batch, or None at the first.
        rate: Weight of the new batch in m, in (0, 1].

    Returns:
        The estimate, and log m without gradient, which the call for the next batch takes.

    Raises:
        ConfigError: No joint or no marginal sample, or a rate outside (0, 1].

    References:
        Belghazi et al., 2018, arXiv 1801.04062, section 3.2 (correcting the bias of stochastic gradients).

    Example:
        >>> mine(torch.tensor([3.0]), torch.tensor([2.0]))
        (tensor(1.), tensor(2.))
    """
    if not 0 < rate <= 1:
        raise ConfigError(f"rate: expected a value in (0, 1], got {rate!r}")
    value = donsker_varadhan(joint, marginal).detach()
    batch = _log_mean_exp(marginal.detach())
    if log_mean is None or rate == 1:
        updated = batch
    else:
        updated = torch.logaddexp(log_mean.detach() + math.log1p(-rate), batch + math.log(rate))
    surrogate = joint.mean() - torch.exp(marginal - updated).mean()
    return value + (surrogate - surrogate.detach()), updated


def infonce(joint: Float[Tensor, " examples"], marginal: Float[Tensor, "examples negatives"]) -> Estimate:
    """InfoNCE with K negatives an example: E[log(e^f₀ / mean(e^f₀, ..., e^f_K))] ≤ min(KL(P‖Q), log(1 + K)).

    f₀ is the score of a joint sample, f₁ to f_K those of marginal samples of the same example. Unbiased for the bound.
    Adding a number to all scores of an example changes nothing. With K = 1 it is log 2 minus the loss of a
    Bradley-Terry model. (Papers count the joint sample too: their K is 1 + K here.)

    Args:
        joint: f₀ of each example.
        marginal: f₁ to f_K of each example.

    Raises:
        ConfigError: No example, or no negative.

    References:
        van den Oord, Li, Vinyals, 2018, arXiv 1807.03748, eq. 4. Poole et al., 2019, arXiv 1905.06922, section 2.3
        (multi-sample unnormalized lower bounds).

    Example:
        >>> infonce(torch.tensor([0.0]), torch.tensor([[0.0, 0.0]]))
        tensor(0.)
    """
    _check_not_empty(joint=joint, marginal=marginal)
    candidates = torch.cat([joint[:, None], marginal], dim=1)
    return (joint - candidates.logsumexp(dim=1)).mean() + math.log(candidates.shape[1])


def interpolated(
    joint: Float[Tensor, " examples"], marginal: Float[Tensor, "examples negatives"], alpha: float
) -> Estimate:
    """I_α: from NWJ (α = 0: low bias, high variance) to InfoNCE (α = 1: the reverse). ≤ KL(P‖Q) for every α.

        I_α = 1 + E[log(e^f₀ / a₀)] - E[e^f / a],   a = α m + (1 - α)

    In a₀, m is the mean of e^f over a joint sample and K negatives. In a, m is the mean over 1 + K marginal samples,
    one of which is in the numerator, so 1 + K marginal samples are needed. Any of them can be the one left out of a₀.
    The function takes the mean over all choices, so their order does not matter. α = 0 is `nwj`, and α = 1 is the mean
    of `infonce` over the choices of K negatives out of 1 + K. For α > 0, I_α is at most 1 + log((1 + K)/α), because
    a₀ ≥ α e^f₀/(1 + K).

    Args:
        joint: f₀ of each example.
        marginal: Scores of 1 + K marginal samples of each example.
        alpha: α, in [0, 1].

    Raises:
        ConfigError: No example, no marginal sample, or α outside [0, 1].

    References:
        Poole et al., 2019, arXiv 1905.06922, section 2.4 (nonlinearly interpolated lower bounds, q = 1).

    Example:
        >>> interpolated(torch.tensor([1.0]), torch.tensor([[0.0, 0.0]]), alpha=0.0)  # = nwj
        tensor(1.)
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha: expected a value in [0, 1], got {alpha!r}")
    _check_not_empty(joint=joint, marginal=marginal)
    return (1 + interpolated_joint(joint, marginal, alpha) - interpolated_marginal(marginal, alpha)).mean()


def interpolated_joint(
    joint: Float[Tensor, " examples"], marginal: Float[Tensor, "examples negatives"], alpha: float
) -> Float[Tensor, " examples"]:
    """log(e^f₀ / a₀) of each example, averaged over which marginal sample is left out of a₀.

    Example:
        >>> interpolated_joint(torch.tensor([1.0]), torch.tensor([[0.0, 0.0]]), alpha=0.0)
        tensor([1.])
    """
    candidates = marginal.shape[1]
    nothing = torch.full_like(marginal[:, :1], -math.inf)
    before = torch.cat([nothing, marginal.logcumsumexp(dim=1)[:, :-1]], dim=1)
    after = torch.cat([marginal.flip(1).logcumsumexp(dim=1).flip(1)[:, 1:], nothing], dim=1)
    # log Σ e^f of the joint sample and of all marginal samples but one.
    others = torch.logaddexp(torch.logaddexp(joint[:, None], before), after)
    return joint - log_mixture(others - math.log(candidates), alpha).mean(dim=1)


def interpolated_marginal(
    marginal: Float[Tensor, "examples negatives"], alpha: float
) -> Float[Tensor, " examples"]:
    """m/(α m + 1 - α) of each example: E[e^f / a] over the choice of the marginal sample in the numerator.

    Example:
        >>> interpolated_marginal(torch.tensor([[0.0, 0.0]]), alpha=0.5)
        tensor([1.])
    """
    log_mean = marginal.logsumexp(dim=1) - math.log(marginal.shape[1])
    return torch.exp(log_mean - log_mixture(log_mean, alpha))


def log_mixture(log_mean: Float[Tensor, " *items"], alpha: float) -> Float[Tensor, " *items"]:
    """log(α m + 1 - α) from log m, without forming m.

    Example:
        >>> log_mixture(torch.tensor(0.0), alpha=0.5)
        tensor(0.)
    """
    if alpha == 1:
        return log_mean
    if alpha == 0:
        return torch.zeros_like(log_mean)
    return torch.logaddexp(log_mean + math.log(alpha), log_mean.new_tensor(math.log1p(-alpha)))


def jensen_shannon(joint: Joint, marginal: Marginal) -> Estimate:
    """Jensen-Shannon: log 2 + (E_P[log σ(f)] + E_Q[log σ(-f)])/2 ≤ JS(P, Q) ≤ log 2. Unbiased.

    JS(P, Q) = KL(P‖M)/2 + KL(Q‖M)/2 with M = (P + Q)/2. It is the mutual information of a sample with its label when
    both labels are equally frequent: a binary label carries log 2 at most. The f-GAN form: half of a GAN's objective,
    plus log 2.

    Raises:
        ConfigError: No joint or no marginal sample.

    References:
        Nowozin, Cseke, Tomioka, 2016, arXiv 1606.00709, tables 1 and 2 (whose divergence is twice this one).

    Example:
        >>> jensen_shannon(torch.tensor([0.0]), torch.tensor([0.0]))
        tensor(0.)
    """
    return variational_bound(DIVERGENCES["js"], joint, marginal)


def nwj_at_js_critic(joint: Joint, marginal: Marginal) -> Estimate:
    """The value of NWJ with the gradient of Jensen-Shannon: a critic trained stably, read off as a KL.

    Both have the optimum f = log dP/dQ. ≤ KL(P‖Q) in expectation, whatever the critic. There is no maximum.

    Raises:
        ConfigError: No joint or no marginal sample.

    References:
        Poole et al., 2019, arXiv 1905.06922, "From density ratio estimators to bounds".

    Example:
        >>> nwj_at_js_critic(torch.tensor([1.0]), torch.tensor([0.0]))
        tensor(1.)
    """
    trained = jensen_shannon(joint, marginal)
    return nwj(joint, marginal).detach() + (trained - trained.detach())


def pearson_chi2(joint: Joint, marginal: Marginal) -> Estimate:
    """Pearson's χ²: E_P[2(e^f - 1)] - E_Q[e^2f - 1] ≤ χ²(P‖Q) = E_Q[(dP/dQ - 1)²]. Unbiased, without maximum.

    Raises:
        ConfigError: No joint or no marginal sample.

    References:
        Nowozin, Cseke, Tomioka, 2016, arXiv 1606.00709, tables 1 and 2.

    Example:
        >>> pearson_chi2(torch.tensor([0.0]), torch.tensor([0.0]))
        tensor(0.)
    """
    return variational_bound(DIVERGENCES["chi2"], joint, marginal)


def squared_hellinger(joint: Joint, marginal: Marginal) -> Estimate:
    """Squared Hellinger: E_P[1 - e^(-f/2)] - E_Q[e^(f/2) - 1] ≤ H²(P, Q) = E_Q[(√(dP/dQ) - 1)²] ≤ 2. Unbiased.

    Raises:
        ConfigError: No joint or no marginal sample.

    References:
        Nowozin, Cseke, Tomioka, 2016, arXiv 1606.00709, tables 1 and 2.

    Example:
        >>> squared_hellinger(torch.tensor([0.0]), torch.tensor([0.0]))
        tensor(0.)
    """
    return variational_bound(DIVERGENCES["hellinger"], joint, marginal)


def smile(joint: Joint, marginal: Marginal, tau: float) -> Estimate:
    """SMILE: E_P[f] - log E_Q[clip(e^f, e^-τ, e^τ)]. Less variance than DV, and no bound: on either side of KL(P‖Q).

    The variance of the second term is at most about (e^τ - e^-τ)²/(4n), whatever the divergence is. With τ → ∞ it is
    `donsker_varadhan`. A clipped score has no gradient.

    Args:
        joint: Scores f of samples of P. They are not clipped.
        marginal: Scores f of samples of Q.
        tau: τ > 0, in nats. Infinity clips nothing.

    Raises:
        ConfigError: No joint or no marginal sample, or τ not above 0.

    References:
        Song, Ermon, 2020, arXiv 1910.06222, section 4.2 (the smoothed partition function and the theorem after it).

    Example:
        >>> smile(torch.tensor([1.0]), torch.tensor([9.0]), tau=0.5)
        tensor(0.5000)
    """
    if not tau > 0:
        raise ConfigError(f"tau: expected a value > 0, got {tau!r}")
    return donsker_varadhan(joint, marginal.clamp(-tau, tau))


def _check_not_empty(**scores: Tensor) -> None:
    problems = [
        f"{name}: expected at least one score, got none" for name, s in scores.items() if not s.numel()
    ]
    if problems:
        raise ConfigError(problems)


def _log_mean_exp(scores: Float[Tensor, " samples"]) -> Estimate:
    """log mean e^f, without forming e^f."""
    return scores.logsumexp(dim=0) - math.log(len(scores))
