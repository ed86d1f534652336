"""pass@k: the chance that at least one of k samples is right. Imports no torch."""

import math


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Returns the unbiased estimate of pass@k of one item from n >= k samples.

        pass@k = 1 - C(n - c, k) / C(n, k)

    Args:
        n: Number of samples that were drawn.
        correct: Number c of them that are right.
        k: Number of tries.

    Raises:
        ValueError: Not 0 <= c <= n, or not 1 <= k <= n.

    References:
        Chen et al., 2021, arXiv 2107.03374.

    Example:
        >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 2, 3)
        (0.25, 0.5, 1.0)
    """
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(f"expected 0 <= correct <= n and 1 <= k <= n, got {correct}, {n} and {k}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)
