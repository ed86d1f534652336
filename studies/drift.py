"""What studies of lab runs compute from results: means with intervals over seeds, and values at equal drift."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Record = Mapping[str, Any]

T_QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""97.5 % quantiles of Student's law, by number of seeds."""


def interval(values: Iterable[float]) -> dict[str, float] | None:
    """Returns mean, half-width of the 95 % interval (Student) and n of values by seed, or None for fewer than two."""
    found = np.array([value for value in values if value == value], dtype=np.float64)
    if len(found) < 2:
        return None
    half = T_QUANTILE[len(found)] * found.std(ddof=1) / len(found) ** 0.5
    return {"mean": float(found.mean()), "half": float(half), "n": len(found)}


def show(value: Mapping[str, float] | None, places: int = 3, signed: bool = False, missing: str = "–") -> str:
    """Returns mean ± half-width as text."""
    if value is None:
        return missing
    sign = "+" if signed else ""
    return f"{round(value['mean'], places) + 0.0:{sign}.{places}f} ± {value['half']:.{places}f}"


def is_clear(value: Mapping[str, float] | None) -> str:
    """Returns whether the interval leaves out 0."""
    if value is None:
        return "–"
    return "yes" if abs(value["mean"]) > value["half"] else "no"


def first_at(points: Sequence[Record], name: str, drift: float) -> float:
    """Returns `name` where KL first reaches `drift` on the line through the points, or NaN if it does not.

    Example:
        >>> first_at([{"kl": 0.0, "accuracy": 0.5}, {"kl": 0.2, "accuracy": 0.7}], "accuracy", 0.05)
        0.55
    """
    for a, b in itertools.pairwise(points):
        if a["kl"] <= drift <= b["kl"]:
            share = (drift - a["kl"]) / (b["kl"] - a["kl"]) if b["kl"] > a["kl"] else 0.0
            return float(a[name] + share * (b[name] - a[name]))
    return float("nan")


def at_drift(runs: Sequence[Record], start: Record, name: str, drift: float) -> float:
    """Returns `name` at a drift, on the line from the start through the ends of runs by ascending learning rate."""
    ends = [run["points"][-1] for run in sorted(runs, key=lambda run: run["rate"])]
    return first_at([{**start, "kl": 0.0}, *ends], name, drift)


def along_runs(runs: Sequence[Record], start: Record, name: str, drift: float) -> float:
    """Returns `name` at a drift within the run of the lowest learning rate that reaches it, by its checkpoints."""
    for run in sorted(runs, key=lambda run: run["rate"]):
        value = first_at([{**start, "kl": 0.0}, *run["points"]], name, drift)
        if value == value:
            return value
    return float("nan")


def quarters(values: Sequence[float]) -> list[float]:
    """Returns the means of a series over its quarters."""
    return [float(part.mean()) if len(part) else float("nan") for part in np.array_split(np.array(values), 4)]
