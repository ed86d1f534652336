"""What training does to a policy, in numbers: likelihood, drift, gradient balance, tails of ratios, length, diversity.

Every function takes values that were measured elsewhere, or closures that measure them, and knows no model. Log-probs
are in nats. `docs/diagnostics.md` says how to read the numbers.

References:
    Displacement and CHES: Razin et al., arXiv 2410.08847. Entanglement: Yuan et al., arXiv 2410.13828.
    Band: Chen et al., arXiv 2604.18239. Pareto k̂: Vehtari et al., JMLR 2024, arXiv 1507.02646, with the estimator of
    Zhang and Stephens, Technometrics 2009. Squeezing: Ren and Sutherland, arXiv 2407.10490.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from infopo.intervals import Z_95

Values = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

LEAST_TAIL = 20
"""Least number of ratios for which the shape of their tail is estimated."""


def mean_and_half_width(values: Values) -> tuple[float, float]:
    """Returns the mean and the half-width of its 95 % interval, which is NaN for fewer than two values.

    Example:
        >>> mean, half_width = mean_and_half_width(np.array([1.0, 3.0]))
        >>> mean, round(half_width, 2)
        (2.0, 1.96)
    """
    if len(values) < 2:
        return (float(values.mean()) if len(values) else math.nan), math.nan
    return float(values.mean()), Z_95 * float(values.std(ddof=1)) / math.sqrt(len(values))


@dataclass(frozen=True)
class ProbeValues:
    """Log-probs of the probe set's responses at one moment, and what does not change about them.

    Attributes:
        now: log π_θ of each response (nats).
        start: The same before the first update.
        reference: log π_ref of each response (nats), NaN where it is not known.
        length: Scored tokens of each response.
        chosen: Indices of the chosen responses.
        rejected: Indices of the rejected responses.
        pairs: Indices (chosen, rejected) of all pairs, (pairs, 2).
    """

    now: Values
    start: Values
    reference: Values
    length: Indices
    chosen: Indices
    rejected: Indices
    pairs: Indices

    def metrics(self) -> dict[str, float]:
        """Returns likelihood, change, margin, accuracies, drift and R² of length, by their names in `metrics.jsonl`.

        A metric that needs a side or a reference that there is none of is left out.

        Example:
            >>> one, pair = np.array([4, 4]), np.array([[0, 1]])
            >>> values = ProbeValues(np.array([-3., -6.]), np.array([-4., -5.]), np.array([-4., -5.]), one,
            ...                      pair[:, 0], pair[:, 1], pair)
            >>> found = values.metrics()
            >>> found["probe/change/chosen"], found["probe/margin"], found["probe/chosen_fell"]
            (1.0, 2.0, 0.0)
        """
        found: dict[str, float] = {}
        change, per_token = self.now - self.start, self.now / self.length
        for side, which in (("chosen", self.chosen), ("rejected", self.rejected)):
            if not len(which):
                continue
            found[f"probe/logps/{side}"] = float(self.now[which].mean())
            found[f"probe/logps/{side}_per_token"] = float(per_token[which].mean())
            for suffix, values in (("", change), ("_per_token", change / self.length)):
                _put(found, f"probe/change/{side}{suffix}", values[which])
        if len(self.chosen):
            # A change below the rounding of a sum of float32 log-probs is none.
            found["probe/chosen_fell"] = float((change[self.chosen] < -1e-4).mean())
            found["probe/n_chosen"] = float(len(self.chosen))
        if len(self.pairs):
            chosen, rejected = self.pairs.T
            found["probe/n_pairs"] = float(len(self.pairs))
            found["probe/ranking_accuracy"] = _share_above(self.now[chosen] - self.now[rejected])
        return found | self._against_the_reference()

    def _against_the_reference(self) -> dict[str, float]:
        found: dict[str, float] = {}
        log_ratio = self.now - self.reference
        for side, which in (("chosen", self.chosen), ("rejected", self.rejected)):
            if len(which) and np.isfinite(log_ratio[which]).all():
                found[f"drift/{side}"] = float(log_ratio[which].mean())
        if len(self.pairs) and np.isfinite(log_ratio[self.pairs]).all():
            chosen, rejected = self.pairs.T
            margins = log_ratio[chosen] - log_ratio[rejected]
            _put(found, "probe/margin", margins)
            found["probe/accuracy"] = _share_above(margins)
            scored = np.unique(self.pairs)
            found["length/r2"] = r_squared(log_ratio[scored], self.length[scored].astype(np.float64))
        return {name: value for name, value in found.items() if not math.isnan(value)}


def _put(found: dict[str, float], name: str, values: Values) -> None:
    mean, half_width = mean_and_half_width(values)
    found[name] = mean
    if not math.isnan(half_width):
        found[f"{name}_ci95"] = half_width


def _share_above(differences: Values) -> float:
    """Returns the share above 0, in which a tie counts one half."""
    return float(((differences > 0) + 0.5 * (differences == 0)).mean())


def r_squared(rewards: Values, length: Values) -> float:
    """Returns the share of the rewards' variance that a line in length explains, NaN if either is constant.

    Example:
        >>> round(r_squared(np.array([1.0, 2.0, 3.0]), np.array([10.0, 20.0, 30.0])), 6)
        1.0
    """
    if len(rewards) < 3 or np.ptp(rewards) < 1e-9 or np.ptp(length) == 0:
        return math.nan
    return float(np.corrcoef(rewards, length)[0, 1] ** 2)


# ---- gradients ---------------------------------------------------------------------------------------------------

SquaredNorm = Callable[[Sequence[float]], float]
"""Coefficients c of the responses -> ‖Σ c_i ∇ log π(y_i)‖², by one backward pass whose norm alone is kept."""


@dataclass(frozen=True)
class Balance:
    """Norms of the two terms of a loss's gradient, and what follows from them.

    With the weights d_w = -∂L/∂log π(y_w) and d_l = ∂L/∂log π(y_l) of an objective L, a step goes along G_w - G_l,
    where G_w = Σ d_w ∇log π(y_w) and G_l = Σ d_l ∇log π(y_l).

    Attributes:
        chosen: ‖G_w‖.
        rejected: ‖G_l‖.
        inner: ⟨G_w, G_l⟩.
        weight_chosen: Σ d_w.
        weight_rejected: Σ d_l.
    """

    chosen: float
    rejected: float
    inner: float
    weight_chosen: float
    weight_rejected: float

    @property
    def cosine(self) -> float:
        """ρ, the cosine of G_w and G_l, or NaN if one of them is 0."""
        product = self.chosen * self.rejected
        return self.inner / product if product > 0 else math.nan

    @property
    def chosen_falls(self) -> bool:
        """Whether a small step of gradient descent lowers Σ d_w log π(y_w): ⟨G_w, G_w - G_l⟩ < 0."""
        return self.chosen**2 < self.inner

    @property
    def rejected_rises(self) -> bool:
        """Whether such a step raises Σ d_l log π(y_l): ⟨G_l, G_w - G_l⟩ > 0."""
        return self.rejected**2 < self.inner

    def metrics(self) -> dict[str, float]:
        """Returns norms, cosine, weights and the band [ρR, R/ρ] of d_w/d_l, R = (‖G_l‖/d_l) / (‖G_w‖/d_w).

        If d_w/d_l lies in the band, chosen responses do not fall and rejected ones do not rise. There is no band if
        ρ ≤ 0, where both hold whatever the weights.

        Example:
            >>> found = Balance(chosen=2.0, rejected=1.0, inner=1.0, weight_chosen=1.0, weight_rejected=1.0).metrics()
            >>> found["gradients/band_low"], found["gradients/band_high"], found["gradients/in_band"]
            (0.25, 1.0, 1.0)
        """
        found = {
            "gradients/chosen": self.chosen,
            "gradients/rejected": self.rejected,
            "gradients/cosine": self.cosine,
            "gradients/weight_chosen": self.weight_chosen,
            "gradients/weight_rejected": self.weight_rejected,
        }
        if self.weight_rejected > 0 and self.weight_chosen > 0 and self.cosine > 0:
            ratio = self.weight_chosen / self.weight_rejected
            norms = self.rejected / self.chosen * ratio
            found |= {
                "gradients/weight_ratio": ratio,
                "gradients/band_low": self.cosine * norms,
                "gradients/band_high": norms / self.cosine,
                "gradients/in_band": float(not (self.chosen_falls or self.rejected_rises)),
            }
        return {name: value for name, value in found.items() if not math.isnan(value)}


def balance(slopes: Sequence[float], is_chosen: Sequence[bool], squared_norm: SquaredNorm) -> Balance:
    """Measures the gradients of the two sides by three backward passes: chosen, rejected, and both.

    ⟨G_w, G_l⟩ = (‖G_w + G_l‖² - ‖G_w‖² - ‖G_l‖²) / 2, so that no second copy of the gradient is kept.

    Args:
        slopes: ∂L/∂log π(y_i) of each response.
        is_chosen: Whether each response is a chosen one.
        squared_norm: Measures ‖Σ c_i ∇log π(y_i)‖².

    Example:
        >>> gradients = np.array([[2.0, 0.0], [0.5, 1.0]])  # of one chosen and one rejected response
        >>> norm = lambda c: float(np.sum((np.array(c) @ gradients) ** 2))
        >>> found = balance([-1.0, 1.0], [True, False], norm)
        >>> found.chosen, found.inner
        (2.0, 1.0)
    """
    chosen = [-slope if own else 0.0 for slope, own in zip(slopes, is_chosen, strict=True)]
    rejected = [0.0 if own else slope for slope, own in zip(slopes, is_chosen, strict=True)]
    first = squared_norm(chosen) if any(chosen) else 0.0
    second = squared_norm(rejected) if any(rejected) else 0.0
    inner = 0.0
    if first and second:
        inner = (squared_norm([a + b for a, b in zip(chosen, rejected, strict=True)]) - first - second) / 2
    return Balance(math.sqrt(first), math.sqrt(second), inner, sum(chosen), sum(rejected))


def ches(chosen: Values, rejected: Values, tokens_chosen: int, tokens_rejected: int) -> tuple[float, float]:
    """Returns how much a pair's sides share their hidden states (CHES): ⟨Σh_w, Σh_l⟩ - ‖Σh_w‖², and the same of means.

    A pair with a higher value than others is more likely to lower its chosen response. The value itself has no scale.

    Args:
        chosen: Sum of the last hidden states before each token of the chosen response, (width,).
        rejected: The same of the rejected response.
        tokens_chosen: Tokens of the chosen response.
        tokens_rejected: Tokens of the rejected response.

    Example:
        >>> ches(np.array([1.0, 0.0]), np.array([3.0, 4.0]), 1, 2)
        (2.0, 0.5)
    """
    means = chosen / tokens_chosen, rejected / tokens_rejected
    return (
        float(chosen @ rejected - chosen @ chosen),
        float(means[0] @ means[1] - means[0] @ means[0]),
    )


# ---- tails of ratios ---------------------------------------------------------------------------------------------


def ratio_tail(log_ratios: Values, critics: Values | None, cap: float | None) -> dict[str, float]:
    """Returns quantiles of log r_l, and what the tail of the weights e^f of rejected responses is like.

    Args:
        log_ratios: log r_l of each rejected response since the last record (nats).
        critics: f, the exponent of its weight in the loss: β log r_l, or its mean per token. None if the loss contains
            no such weight, of which there are quantiles only.
        cap: f above which the loss continues linearly, or None if it does so nowhere.

    Returns:
        `ratio_tail/q50`, `q90`, `q99` and `max` (nats), `ess`, which is (Σw)² / (n Σw²), `capped` (share) if there is a
        cap, and `k_hat` where there are enough responses to estimate it.

    Example:
        >>> ratio_tail(np.zeros(4), np.zeros(4), cap=5.0)["ratio_tail/ess"]
        1.0
    """
    is_known = np.isfinite(log_ratios)
    log_ratios = log_ratios[is_known]
    if not len(log_ratios):
        return {}
    quantiles = np.quantile(log_ratios, (0.5, 0.9, 0.99))
    found = {f"ratio_tail/q{q}": float(v) for q, v in zip((50, 90, 99), quantiles, strict=True)}
    found["ratio_tail/max"] = float(log_ratios.max())
    if critics is None:
        return found
    critics = critics[is_known]
    weights = np.exp(critics - critics.max())
    found["ratio_tail/ess"] = float(weights.sum() ** 2 / (len(weights) * (weights**2).sum()))
    if cap is not None:
        found["ratio_tail/capped"] = float((critics > cap).mean())
    return without_nan({**found, "ratio_tail/k_hat": pareto_k_hat(critics)})


def pareto_k_hat(log_weights: Values) -> float:
    """Returns k̂, the shape of a generalised Pareto law fitted to the largest weights. The mean is finite if k̂ < 1.

    The tail has min(n/5, 3√n) weights. Below 0.7, and 1 - 1/log10 n, averages of the weights can be relied on.

    Args:
        log_weights: Logarithms of the weights (nats).

    Returns:
        k̂, or NaN for fewer than `LEAST_TAIL` weights or a tail without variation.

    Example:
        >>> u = (np.arange(4000) + 0.5) / 4000  # quantiles of a Pareto law of shape 1/2
        >>> round(pareto_k_hat(-0.5 * np.log(1 - u)), 1)
        0.5
    """
    n = len(log_weights)
    tail = int(min(n / 5, 3 * math.sqrt(n)))
    if n < LEAST_TAIL or tail < 4:
        return math.nan
    ordered = np.sort(log_weights - log_weights.max())
    weights = np.exp(ordered)
    excess = weights[-tail:] - weights[-tail - 1]
    if excess[-1] - excess[0] < 1e-9 or excess[0] < 0:
        return math.nan
    return _generalised_pareto_shape(np.maximum(excess, 1e-300))


def _generalised_pareto_shape(x: Values) -> float:
    """Returns the shape by the estimator of Zhang and Stephens, of ascending positive values.

    With few values it is drawn towards 1/2, as Vehtari et al. do (their appendix C).
    """
    n = len(x)
    points = 30 + int(math.sqrt(n))
    j = np.arange(1, points + 1)
    theta = 1 / x[-1] + (1 - np.sqrt(points / (j - 0.5))) / (3 * x[int(n / 4 + 0.5) - 1])
    k = np.log1p(-theta[:, None] * x).mean(axis=1)
    profile = n * (np.log(-theta / k) - k - 1)
    weights = 1 / np.exp(profile - profile[:, None]).sum(axis=1)
    best = float((theta * weights).sum() / weights.sum())
    shape = float(np.log1p(-best * x).mean())
    return (n * shape + 10 * 0.5) / (n + 10)


# ---- samples -----------------------------------------------------------------------------------------------------


def forward_kl(start: Values, now: Values) -> dict[str, float]:
    """Returns KL(π_start ‖ π_θ) on responses sampled from π_start, with its standard error (nats per response).

    It is the mean of log π_start(y) - log π_θ(y). Of responses that were cut off it is the KL of their beginnings.

    Example:
        >>> forward_kl(np.array([-3.0, -4.0]), np.array([-3.5, -4.5]))
        {'kl/forward': 0.5, 'kl/forward_se': 0.0}
    """
    mean, half_width = mean_and_half_width(start - now)
    found = {"kl/forward": mean, "kl/forward_se": half_width / Z_95}
    return {name: value for name, value in found.items() if not math.isnan(value)}


def distinct_n(responses: Sequence[Sequence[int]], n: int = 2) -> float:
    """Returns the share of distinct n-grams among all n-grams of the responses, or NaN if there is none.

    Example:
        >>> distinct_n([[1, 2, 3], [1, 2, 4]])
        0.75
    """
    grams = [tuple(ids[i : i + n]) for ids in responses for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def without_nan(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns the metrics that are numbers."""
    return {name: value for name, value in metrics.items() if not math.isnan(value)}
