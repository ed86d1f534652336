"""Intervals of means and shares. Imports no torch."""

import math

Z_95 = 1.959963984540054
"""Half-width of a 95 % interval in standard errors, if the estimate is normal."""

Z_99 = 2.5758293035489004
"""Half-width of a 99 % interval in standard errors."""


def wilson(share: float, n: float, z: float = Z_95) -> tuple[float, float]:
    """Returns Wilson's interval of a share of `n`.

        (p + z²/2n ± z √(p (1 - p)/n + z²/4n²)) / (1 + z²/n)

    Args:
        share: p, in [0, 1].
        n: Number of observations, above 0.
        z: Half-width of the interval in standard errors.

    References:
        Wilson, 1927, Journal of the American Statistical Association 22.

    Example:
        >>> [round(end, 3) for end in wilson(0.9, 10)]
        [0.596, 0.982]
    """
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
