"""Comparisons of two models on the same items: tests, intervals, and what n items could have shown. Imports no torch.

Two models that answer the same questions are right or wrong together on most of them. What tells them apart is the
items on which they differ, so that a paired comparison needs far fewer items than two separate intervals suggest.
An item is a cluster: several samples of an item are averaged first, because they are no independent observations.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

from infopo.intervals import Z_95, wilson

ALPHA = 0.05
"""Share of comparisons of equal models that may be called different."""

POWER = 0.8
"""Share of comparisons in which a difference of the smallest size is to be found."""

RESAMPLES = 10_000
"""Number of draws of a bootstrap and of a randomisation test."""

_DRAWS_AT_ONCE = 2**22


@dataclass(frozen=True)
class Paired:
    """What a comparison of two models on the same items found. Differences are those of the first minus the second.

    Attributes:
        n: Number of items that both have.
        samples: Largest number of samples per item of either.
        mean_a: Mean over items of the first one's mean score.
        mean_b: The same of the second.
        difference: `mean_a - mean_b`, or NaN without items.
        ci95: Its 95 % interval: Tango's for scores of 0 and 1 of one sample, else `difference_interval`.
        p: Two-sided p-value: McNemar's exact one for scores of 0 and 1 of one sample, else by flips of signs.
        wins: Number of items on which the first has the higher score.
        losses: Number of items on which the second has it.
        smallest: Smallest difference that a test of so many items finds with a power of 80 % at a level of 5 %, or None
            if there is none.
        test: "mcnemar" or "sign flips".
    """

    n: int
    samples: int
    mean_a: float
    mean_b: float
    difference: float
    ci95: tuple[float, float]
    p: float
    wins: int
    losses: int
    smallest: float | None
    test: str

    @property
    def ties(self) -> int:
        """Number of items on which both have the same score."""
        return self.n - self.wins - self.losses


def compare_scores(
    a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]], seed: int = 0
) -> Paired:
    """Compares two models by the items that both have.

    Args:
        a: Scores of each sample of each item, by item.
        b: The same of the other model. The numbers of samples may differ.
        seed: Seed of bootstrap and sign flips. Scores of 0 and 1 of one sample need neither.

    Example:
        >>> found = compare_scores({"1": [1], "2": [1], "3": [0]}, {"1": [1], "2": [0], "3": [0], "4": [1]})
        >>> found.n, found.wins, found.losses, round(found.difference, 3), found.p
        (3, 1, 0, 0.333, 1.0)
    """
    shared = [item for item in a if item in b and a[item] and b[item]]
    mean_a = np.array([mean_score(a[item]) for item in shared])
    mean_b = np.array([mean_score(b[item]) for item in shared])
    differences = mean_a - mean_b
    n = len(shared)
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    samples = max((len(scores[item]) for item in shared for scores in (a, b)), default=0)
    ends = (float(mean_a.mean()), float(mean_b.mean())) if n else (math.nan, math.nan)
    if samples <= 1 and set(np.unique([mean_a, mean_b])) <= {0.0, 1.0}:
        interval, p = tango(wins, losses, n), mcnemar(wins, losses)
        smallest, test = smallest_difference(n, (wins + losses) / n if n else 0.0), "mcnemar"
    else:
        both = np.concatenate([mean_a, mean_b])
        if n and (both.min() < 0 or both.max() > 1):
            # Nobody says how far ratings reach, so that those that were seen have to stand for it.
            scale, largest = float(np.ptp(both)) or 1.0, math.inf
        else:
            scale, largest = 1.0, 1.0
        interval = difference_interval(differences, scale=scale, largest=largest, seed=seed)
        p = sign_flips(differences, seed=seed)
        smallest, test = smallest_mean(differences), "sign flips"
    return Paired(n, samples, *ends, ends[0] - ends[1], interval, p, wins, losses, smallest, test)


def mean_score(scores: Sequence[float]) -> float:
    """Returns the mean of one or more scores, as the samples of an item have them, whatever their order.

    Example:
        >>> mean_score([0.1] * 10)
        0.1
    """
    return math.fsum(scores) / len(scores)


def mcnemar(wins: int, losses: int) -> float:
    """Returns McNemar's exact two-sided p-value.

    Under the null hypothesis a discordant item is a win with probability 1/2, so that with m = wins + losses

        p = min(1, 2 P(X <= min(wins, losses))),  X ~ Binomial(m, 1/2)

    and p = 1 if no item is discordant.

    Args:
        wins: Number of items on which only the first model is right.
        losses: Number of items on which only the second is.

    References:
        McNemar, 1947, Psychometrika 12.

    Example:
        >>> mcnemar(6, 0), mcnemar(5, 5), mcnemar(0, 0)
        (0.03125, 1.0, 1.0)
    """
    if min(wins, losses) < 0:
        raise ValueError(f"expected counts of at least 0, got {wins} and {losses}")
    return min(1.0, 2 * float(special.bdtr(float(min(wins, losses)), wins + losses, 0.5)))


def tango(wins: int, losses: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Returns Tango's score interval of a difference of two shares on the same items.

    It is the set of δ with |T(δ)| <= z, where

        T(δ) = (wins - losses - n δ) / √(n (2 q + δ (1 - δ)))

    and q is the likeliest share of losses if the difference is δ. Like Wilson's interval it stays honest if there are
    few items or no discordant ones: without those it is ± z²/(n + z²), while a bootstrap would say that nothing is
    uncertain.

    Args:
        wins: Number of items on which only the first model is right.
        losses: Number of items on which only the second is.
        n: Number of all items. With none, the interval is (-1, 1).
        z: Half-width of the interval in standard errors.

    References:
        Tango, 1998, Statistics in Medicine 17.

    Example:
        >>> [round(end, 3) for end in tango(1, 7, 21)]
        [-0.517, -0.026]
    """
    if n == 0:
        return -1.0, 1.0

    def score(delta: float) -> float:
        b = (2 * n - wins + losses) * delta - wins - losses
        q = (math.sqrt(max(0.0, b * b + 8 * n * losses * delta * (1 - delta))) - b) / (4 * n)
        variance = n * (2 * q + delta * (1 - delta))
        above = wins - losses - n * delta
        if variance > 0:
            return above / math.sqrt(variance)
        return math.copysign(math.inf, above) if above else 0.0

    return _last(lambda delta: score(delta) > z), _last(lambda delta: score(delta) > -z)


def _last(is_below: Callable[[float], bool]) -> float:
    """Returns the last value in [-1, 1] for which a test holds, which it does up to some value and not beyond."""
    low, high = -1.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return (low + high) / 2


def mean_interval(
    values: npt.ArrayLike, *, bounds: tuple[float, float] = (0.0, 1.0), seed: int = 0
) -> tuple[float, float]:
    """Returns the 95 % interval of a mean over items: the bootstrap's, or Wilson's if the values do not vary.

    A bootstrap of equal values draws nothing but these, and would say that twelve ties leave no doubt. Wilson's
    interval of n items is then used, for values that are scaled to [0, 1].

    Args:
        values: One number per item (a cluster), (n,). With none, the interval is NaN.
        bounds: Least and largest value that an item can have.
        seed: Seed of the bootstrap.

    Example:
        >>> [round(end, 3) for end in mean_interval([1.0] * 20)], [round(end, 3) for end in mean_interval([0.5] * 12)]
        ([0.839, 1.0], [0.254, 0.746])
    """
    numbers = np.asarray(values, dtype=np.float64)
    if not numbers.size or varies(numbers):
        return bootstrap_interval(numbers, seed=seed)
    low, high = bounds
    share = min(1.0, max(0.0, (float(numbers[0]) - low) / (high - low)))
    ends = wilson(share, len(numbers))
    return low + (high - low) * ends[0], low + (high - low) * ends[1]


def difference_interval(
    differences: npt.ArrayLike, *, scale: float = 1.0, largest: float = 1.0, seed: int = 0
) -> tuple[float, float]:
    """Returns the 95 % interval of a mean difference: the bootstrap's, or one like Tango's if all are equal.

    If all n differences are d, the interval is

        d ± (scale + |d|) z² / (n + z²)

    within ± largest. For shares, this is Tango's interval if both models are right on the same items (d = 0), and if
    one is right and the other wrong on all of them (|d| = 1).

    Args:
        differences: One number per item (a cluster), (n,). With none, the interval is NaN.
        scale: Difference between the best and the worst score.
        largest: Largest difference that there can be.
        seed: Seed of the bootstrap.

    Example:
        >>> [round(end, 3) for end in difference_interval([0.0] * 20)]
        [-0.161, 0.161]
    """
    numbers = np.asarray(differences, dtype=np.float64)
    if not numbers.size or varies(numbers):
        return bootstrap_interval(numbers, seed=seed)
    found, n = float(numbers[0]), len(numbers)
    half = (scale + abs(found)) * Z_95**2 / (n + Z_95**2)
    return max(-largest, found - half), min(largest, found + half)


def varies(values: npt.NDArray[np.float64]) -> bool:
    """Whether numbers differ by more than the error of their last digits."""
    return bool(np.ptp(values) > 1e-12 * max(1.0, float(np.abs(values).max())))


def bootstrap_interval(
    differences: npt.ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Returns the percentile interval of a mean over items, by drawing items with replacement.

    Equal differences are drawn together: how often each value appears among n items follows a multinomial law, which is
    that of drawing items one by one, and is much faster where scores have few values. The order of items has no effect.
    Equal values give an interval without width: `mean_interval` and `difference_interval` do not.

    Args:
        differences: One number per item (a cluster), (n,). With none, the interval is NaN.
        resamples: Number of draws.
        seed: Their seed.
        level: Share of draws within the interval.

    References:
        Efron, 1979, Annals of Statistics 7.

    Example:
        >>> bootstrap_interval([0.5, 0.5, 0.5])
        (0.5, 0.5)
    """
    means = bootstrap_means(differences, resamples=resamples, seed=seed)
    if not means.size:
        return math.nan, math.nan
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def bootstrap_means(
    values: npt.ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0
) -> npt.NDArray[np.float64]:
    """Returns the means of bootstrap draws of items, (resamples,), or nothing of no items."""
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    n = int(counts.sum())
    if n == 0:
        return np.empty(0)
    rng = np.random.default_rng(seed)
    rows = max(1, _DRAWS_AT_ONCE // len(distinct))
    parts = [
        rng.multinomial(n, counts / n, size=min(rows, resamples - start)) @ distinct / n
        for start in range(0, resamples, rows)
    ]
    return np.concatenate(parts)


def sign_flips(differences: npt.ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Returns the two-sided p-value of the randomisation test that the differences are symmetric about 0.

    If the models are alike, each difference could as well have had the other sign. p is the share of random signs s for
    which |Σ s_i d_i| is at least |Σ d_i|, the observed signs included. Of differences of -1, 0 and 1 this is McNemar's
    test, up to the number of draws.

    Args:
        differences: One number per item (a cluster), (n,).
        resamples: Number of draws. The least p-value is 1 / (resamples + 1).
        seed: Their seed.

    References:
        Fisher, 1935, The Design of Experiments; Pitman, 1937.

    Example:
        >>> sign_flips([0.0, 0.0]), sign_flips([0.5, 0.25, -0.5]) > 0.5
        (1.0, True)
    """
    values = np.asarray(differences, dtype=np.float64)
    sizes, counts = np.unique(np.abs(values[values != 0]), return_counts=True)
    if not sizes.size:
        return 1.0
    rng = np.random.default_rng(seed)
    observed, rows = abs(values.sum()), max(1, _DRAWS_AT_ONCE // len(sizes))
    # Sums of the same differences in another order may differ in the last digit.
    least = observed - 1e-9 * float(np.abs(values).sum())
    extreme = 0
    for start in range(0, resamples, rows):
        plus = rng.binomial(counts, 0.5, size=(min(rows, resamples - start), len(sizes)))
        extreme += int((np.abs((2 * plus - counts) @ sizes) >= least).sum())
    return (extreme + 1) / (resamples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values adjusted for their number by Holm's method, in their order.

    The i-th smallest of m is multiplied by m - i + 1, and is at least the one before it. Calling those below 0.05
    different is wrong of any of them in at most 5 % of tables, whatever the p-values have to do with each other.

    References:
        Holm, 1979, Scandinavian Journal of Statistics 6.

    Example:
        >>> [round(p, 2) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def mcnemar_power(n: int, difference: float, discordant: float, alpha: float = ALPHA) -> float:
    """Returns the probability that McNemar's exact test finds a difference.

    It sums over the number m of discordant items, Binomial(n, ψ), the probability that of those the first model wins so
    many, Binomial(m, (ψ + δ)/2ψ), that the p-value is at most α.

    Args:
        n: Number of items.
        difference: δ, the true difference of accuracies, in [0, 1].
        discordant: ψ, the true share of items on which one model is right and the other wrong, at least δ.
        alpha: The level α.

    Example:
        >>> round(mcnemar_power(100, 0.1, 0.2), 3), mcnemar_power(5, 1.0, 1.0)
        (0.544, 0.0)
    """
    if discordant <= 0 or n < 1:
        return 0.0
    half = 9 * math.sqrt(n * discordant * (1 - discordant)) + 1
    counts = np.arange(max(0, int(n * discordant - half)), min(n, int(n * discordant + half)) + 1)
    # The largest number of losses of m at which p <= α, or -1, by bisection.
    low, high = np.full(len(counts), -1), counts // 2
    while (low < high).any():
        middle = (low + high + 1) // 2
        fits = 2 * special.bdtr(middle.astype(float), counts, 0.5) <= alpha
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    share = (discordant - difference) / (2 * discordant)
    # bdtr(k, m, p) of k < 0 is no number. The test also finds a difference with the wrong sign, which is no success.
    found = np.where(low >= 0, special.bdtr(np.maximum(low, 0).astype(float), counts, share), 0.0)
    weights = np.exp(
        special.gammaln(n + 1) - special.gammaln(counts + 1) - special.gammaln(n - counts + 1)
        + special.xlogy(counts, discordant) + special.xlog1py(n - counts, -discordant)
    )  # fmt: skip
    return float(weights @ found)


def smallest_difference(
    n: int, discordant: float, *, power: float = POWER, alpha: float = ALPHA
) -> float | None:
    """Returns the smallest difference of accuracies that McNemar's exact test of n items finds with the given power.

    The share of discordant items is taken as observed, or as the difference itself if that is larger, which is the case
    in which a difference is easiest to find.

    Args:
        n: Number of items.
        discordant: Observed share of discordant items.
        power: Probability with which the difference is found.
        alpha: Level of the test.

    Returns:
        The difference, or None if not even a difference of 1 is found: of fewer than 6 items none is.

    References:
        Miller, 2024, Adding Error Bars to Evals, arXiv 2411.00640, section 5, by normal approximation.

    Example:
        >>> round(smallest_difference(1000, 0.2), 3), smallest_difference(5, 0.2)
        (0.04, None)
    """
    if mcnemar_power(n, 1.0, 1.0, alpha) < power:
        return None
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        found = mcnemar_power(n, middle, min(1.0, max(discordant, middle)), alpha) >= power
        low, high = (low, middle) if found else (middle, high)
    return high


def smallest_mean(differences: npt.ArrayLike, *, power: float = POWER, alpha: float = ALPHA) -> float | None:
    """Returns the smallest mean difference that so many items find with the given power, by normal approximation.

        (z_{1 - α/2} + z_power) sd / √n

    Args:
        differences: One number per item, (n,), whose standard deviation is used.
        power: Probability with which the difference is found.
        alpha: Level of the test.

    Returns:
        The difference, or None of fewer than 2 items, or of items that do not differ from each other.

    Example:
        >>> round(smallest_mean([0.5, -0.5] * 50), 3)
        0.141
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2 or (spread := float(values.std(ddof=1))) == 0:
        return None
    factor = float(special.ndtri(1 - alpha / 2) + special.ndtri(power))
    return factor * spread / math.sqrt(len(values))
