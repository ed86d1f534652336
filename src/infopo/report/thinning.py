"""Keeps few of many points of a curve, with every spike among them."""

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def thinned(values: Sequence[float] | npt.NDArray[np.float64], limit: int) -> list[int]:
    """Returns the indices of at most `limit` points: the least and the greatest value of each bucket.

    Means over buckets would hide the spike that a reader is looking for. The first and the last point are kept.

    Args:
        values: Finite values in the order of their steps, (points,).
        limit: Most points that are kept, at least 4.

    Example:
        >>> thinned([0.0] * 500 + [9.0] + [0.0] * 499, 6)
        [0, 500, 501, 999]
    """
    count = len(values)
    if count <= limit:
        return list(range(count))
    y = np.asarray(values, dtype=np.float64)
    edges = np.linspace(0, count, (limit - 2) // 2 + 1).astype(int)
    keep = {0, count - 1}
    for begin, end in itertools.pairwise(edges):
        keep |= {int(begin + y[begin:end].argmin()), int(begin + y[begin:end].argmax())}
    return sorted(keep)
