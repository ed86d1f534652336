"""What verdicts are reached from: series of metrics, facts about the data, and intervals. Imports no torch."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]
Facts = Mapping[str, Any]

KL_BUDGET = 20.0
"""Default of the `kl_budget` of a run (nats per response)."""


class History:
    """Series of metrics by name, to which records are added as they come.

    Attributes:
        series: Values of each metric.
        steps: Their steps.
        step: The last step.
        spikes: Step and value of each loss that is a spike (see `is_spike`).

    A record of the same step as one before it adds the names that it has, such as those of an evaluation.

    Example:
        >>> history = History([{"step": 0, "probe/margin": 0.0}, {"step": 10, "loss": 0.7, "probe/margin": 0.2}])
        >>> history.first("probe/margin"), history.last("probe/margin"), history.last("kl/forward")
        (0.0, 0.2, None)
    """

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.series: dict[str, list[float]] = {}
        self.steps: dict[str, list[int]] = {}
        self.step = 0
        self.spikes: list[tuple[int, float]] = []
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """Adds the numbers of one record of metrics."""
        self.step = max(self.step, int(record.get("step", self.step)))
        for name, value in record.items():
            if name not in ("step", "time") and isinstance(value, int | float):
                # It is judged as it comes, because a long run would otherwise be judged anew at each record.
                if name == "loss" and is_spike(value, self.series.get(name, [])[-20:]):
                    self.spikes.append((self.step, value))
                self.series.setdefault(name, []).append(float(value))
                self.steps.setdefault(name, []).append(self.step)

    def first(self, name: str) -> float | None:
        return self.series[name][0] if name in self.series else None

    def last(self, name: str) -> float | None:
        return self.series[name][-1] if name in self.series else None

    def since_start(self, name: str) -> float | None:
        """Returns the last value minus that of step 0, or None if either is missing."""
        if name not in self.series or self.steps[name][0] != 0 or self.steps[name][-1] == 0:
            return None
        return self.series[name][-1] - self.series[name][0]

    def with_interval(self, name: str) -> tuple[float, float] | None:
        """Returns the last mean with half the width of its 95 % interval, or None if either is missing."""
        value, half = self.last(name), self.last(f"{name}_ci95")
        return None if value is None or half is None else (value, half)


@dataclass(frozen=True)
class Evidence:
    """All that a check may look at.

    Attributes:
        history: Metrics so far.
        facts: Contents of `data.json`, or None if there are none.
        finished: Whether training has ended as planned.
        kl_budget: Largest `kl/forward` (nats per response) that is no drift beyond the budget.
    """

    history: History
    facts: Facts | None = None
    finished: bool = False
    kl_budget: float = KL_BUDGET


def is_spike(loss: float, before: Sequence[float]) -> bool:
    """Returns whether a loss is far above those before it, or not finite.

    It is far above if it exceeds their median by more than 8 robust standard deviations (1.4826 times the median
    absolute deviation), which are taken as at least 5 % of the median and 0.05. Of fewer than 5 losses nothing is said.

    Example:
        >>> before = [1.0, 0.9, 1.1, 1.0, 0.9]
        >>> is_spike(1.3, before), is_spike(30.0, before), is_spike(math.nan, [])
        (False, True, True)
    """
    if not math.isfinite(loss):
        return True
    window = [value for value in before if math.isfinite(value)]
    if len(window) < 5:
        return False
    median = statistics.median(window)
    spread = 1.4826 * statistics.median(abs(value - median) for value in window)
    return loss - median > 8 * max(spread, 0.05 * max(1.0, abs(median)))
