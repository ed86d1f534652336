"""Step statistics: numbers of a whole optimizer step that couple its examples, as the mean in a logarithm or KTO's KL.

Some responses contribute a part, which is two numbers: (log Σ e^s, count) or (Σ s, count) of their scores s. Parts of
micro-batches, of ranks and of a whole step are combined in the same way, so the statistic does not depend on how a step
is split. No statistic carries a gradient. `catalog.py` says which objective uses which statistic, and the loss says
from which scores.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from infopo.records import ResponseLogps, Role, sum_dtype

Part = Float[Tensor, "2"]


@dataclass(frozen=True)
class StepStatistic:
    """One number of an optimizer step, computed from the scores of its responses of one role.

    Attributes:
        role: Role of the responses.
        scores: Returns their scores (nats) from the log-probs of a batch.
        kind: `log_mean` is log E[e^s], and `positive_mean` is max(0, E[s]). Both are in nats.
        rate: Weight of a step in a moving average over steps, in (0, 1]. At 1 there is no average over steps.

    Example:
        >>> from infopo.losses.registry import step_statistic
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0))
        >>> step_statistic("dv").of(pair)  # log E_l[r(l)], of one rejected response
        tensor(-1., dtype=torch.float64)
    """

    role: Role
    scores: Callable[[ResponseLogps], Float[Tensor, " items"]]
    kind: Literal["log_mean", "positive_mean"]
    rate: float = 1.0

    def part(self, logps: ResponseLogps) -> Part:
        """Returns what the responses of a batch contribute, without gradient."""
        scores = self.scores(logps).detach()
        total = scores.logsumexp(dim=0) if self.kind == "log_mean" else scores.sum()
        return torch.stack([total, total.new_tensor(len(scores))])

    def combined(self, parts: Float[Tensor, "parts 2"]) -> Float[Tensor, ""]:
        """Returns the statistic of all responses behind these parts. Without any it is NaN (`log_mean`) or 0."""
        value = self.unclamped(parts)
        return value.clamp(min=0) if self.kind == "positive_mean" else value

    def unclamped(self, parts: Float[Tensor, "parts 2"]) -> Float[Tensor, ""]:
        """Returns the same as `combined`, but keeps a mean below 0, which shows how far KTO's estimate is from 0."""
        totals, counts = parts.unbind(1)
        if self.kind == "log_mean":
            return totals.logsumexp(dim=0) - counts.sum().log()
        return totals.sum() / counts.sum().clamp(min=1)

    def averaged(self, before: Float[Tensor, ""], now: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Returns log m after a step, where m ← (1 - rate) m + rate e^now.

        Args:
            before: log m of the steps before (nats), or NaN at the first step.
            now: The step's own log mean (nats), or NaN if it has no such response.
        """
        if self.rate == 1:
            return now
        updated = torch.logaddexp(before + math.log1p(-self.rate), now + math.log(self.rate))
        return torch.where(before.isnan(), now, torch.where(now.isnan(), before, updated))

    def of(self, logps: ResponseLogps) -> Float[Tensor, ""]:
        """Returns the statistic that the trainer computed for the step, or else that of the batch itself.

        Without a trainer, as in a notebook, the batch is the whole step.
        """
        if logps.statistic is None:
            return self.combined(self.part(logps)[None])
        return logps.statistic.to(logps.policy.dtype)

    @property
    def roles(self) -> frozenset[Role]:
        """Roles of the responses that it is computed from."""
        return frozenset({self.role})


@dataclass(frozen=True)
class SortedScores:
    """Two sets of scores of an optimizer step in ascending order, by which scores of one rank are matched.

    The statistic is a tensor of two rows (nats). The shorter set is filled up with infinity.

    Attributes:
        first: Returns the scores of the first set from the log-probs of a batch.
        second: Returns those of the second set.

    Example:
        >>> scores = SortedScores(lambda logps: logps.policy, lambda logps: logps.reference)
        >>> scores.of(ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.5)))
        tensor([[-5.0000, -3.0000],
                [-4.5000, -4.0000]], dtype=torch.float64)
    """

    first: Callable[[ResponseLogps], Float[Tensor, " items"]]
    second: Callable[[ResponseLogps], Float[Tensor, " items"]]
    rate = 1.0

    @property
    def roles(self) -> frozenset[Role]:
        """Roles of the responses that it is computed from."""
        return frozenset({Role.CHOSEN, Role.REJECTED})

    def over(
        self, batches: Sequence[ResponseLogps], gather: Callable[[Tensor], Tensor] = lambda values: values
    ) -> Float[Tensor, "2 items"]:
        """Returns the two sets of all these batches, of all ranks whose tensors `gather` concatenates."""
        sets = [torch.cat([scores(b).detach() for b in batches]) for scores in (self.first, self.second)]
        longest = int(gather(torch.tensor([max(map(len, sets))], device=sets[0].device)).max())
        if not longest:
            return sets[0].new_empty(2, 0)
        filled = [torch.cat([s, s.new_full((longest - len(s),), math.inf)]) for s in sets]
        # A row per rank and set, because ranks are concatenated along the first dimension.
        ranks = gather(torch.stack(filled)).reshape(-1, 2, longest)
        rows = [ranks[:, i].flatten().sort().values for i in (0, 1)]
        return torch.stack(rows)

    def of(self, logps: ResponseLogps) -> Float[Tensor, "2 items"]:
        """Returns the sets that the trainer found in the step, or else those of the batch itself."""
        return self.over([logps]) if logps.statistic is None else logps.statistic.to(logps.policy.dtype)


def matched(
    scores: Float[Tensor, " items"], own: Float[Tensor, " step"], other: Float[Tensor, " step"]
) -> Float[Tensor, " items"]:
    """Returns the score of the other set that has the rank of each of these scores in its own. It has no gradient.

    A score is taken to be the nearest of its own set, so that rounding changes no rank. In sets of unlike sizes, ranks
    are relative. If the other set is empty, each score is matched with itself.

    Args:
        scores: Scores of a batch.
        own: Those of the whole step, in ascending order, filled up with infinity.
        other: The other set, likewise.

    Example:
        >>> matched(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 9.0]))
        tensor([9., 4.])
    """
    at = scores.detach()
    if not len(at):
        return at
    between = (own[1:] + own[:-1]) / 2
    sizes = [(~torch.isposinf(row)).sum() for row in (own, other)]
    rank = torch.searchsorted(between.contiguous(), at.contiguous()).clamp(max=sizes[0] - 1)
    place = rank * (sizes[1] - 1).clamp(min=0) / (sizes[0] - 1).clamp(min=1)
    return torch.where(sizes[1] > 0, other[place.round().long()], at)


AnyStatistic = StepStatistic | SortedScores


def step_parts(
    statistics: Sequence[StepStatistic], batches: Sequence[ResponseLogps]
) -> Float[Tensor, "statistics 2"]:
    """Returns the part that these batches contribute to each statistic, before the ranks' parts are combined."""
    rows = []
    for statistic in statistics:
        totals, counts = torch.stack([statistic.part(logps) for logps in batches]).unbind(1)
        total = totals.logsumexp(dim=0) if statistic.kind == "log_mean" else totals.sum()
        rows.append(torch.stack([total, counts.sum()]))
    return torch.stack(rows)


class StepCoupling:
    """The step statistics of several objectives over the steps of a run, with their moving averages.

    Args:
        statistics: The statistic of each objective, or None if it has none.
        device: Device of the values.
        gather: Concatenates a tensor over ranks.

    Attributes:
        values: What each objective's loss takes at the current step, or None.
        averages: Logarithm of each objective's moving average (nats), NaN before the first step.
        roles: Roles of the responses that enter a statistic.

    Example:
        >>> from infopo.losses.registry import step_statistic
        >>> coupling = StepCoupling([step_statistic("dv"), step_statistic("dpo")])
        >>> coupling.advance([ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0))])
        {}
        >>> coupling.values
        [tensor(-1., dtype=torch.float64), None]
    """

    def __init__(
        self,
        statistics: Sequence[AnyStatistic | None],
        device: torch.device | str = "cpu",
        gather: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        self._statistics = statistics
        self._device = torch.device(device)
        self._gather = gather
        self.roles = frozenset[Role]().union(*(statistic.roles for statistic in statistics if statistic))
        self.reset()

    def reset(self, averages: Sequence[float] | None = None) -> None:
        """Starts a run, with these averages if they are those of a checkpoint."""
        self.values: list[Tensor | None] = [None] * len(self._statistics)
        before = [math.nan] * len(self._statistics) if averages is None else averages
        dtype = sum_dtype(self._device)
        self.averages = [torch.tensor(value, dtype=dtype, device=self._device) for value in before]

    @property
    def keeps_averages(self) -> bool:
        """Whether a statistic depends on the steps before."""
        return any(statistic and statistic.rate < 1 for statistic in self._statistics)

    def advance(self, seen: Sequence[ResponseLogps]) -> dict[str, tuple[Tensor, float]]:
        """Sets the values to those of the next step, which contains these batches, and returns its metrics."""
        self.values, metrics = self.over(seen)
        for index, (statistic, now) in enumerate(zip(self._statistics, self.values, strict=True)):
            if isinstance(statistic, StepStatistic) and now is not None:
                self.averages[index] = statistic.averaged(self.averages[index], now)
                self.values[index] = self.averages[index]
        return metrics

    def over(
        self, seen: Sequence[ResponseLogps]
    ) -> tuple[list[Tensor | None], dict[str, tuple[Tensor, float]]]:
        """Returns each objective's statistic over these batches of all ranks, and metrics as (sum, count) by name."""
        needed = [each for each in self._statistics if isinstance(each, StepStatistic)]
        whole = [
            s.over(seen, self._gather) if isinstance(s, SortedScores) else None for s in self._statistics
        ]
        if not needed:
            return whole, {}
        parts = self._gather(step_parts(needed, seen)).reshape(-1, len(needed), 2).unbind(1)
        values = iter([statistic.combined(part) for statistic, part in zip(needed, parts, strict=True)])
        metrics: dict[str, tuple[Tensor, float]] = {}
        for statistic, part in zip(needed, parts, strict=True):
            # KTO's reference point, below 0 of which the loss takes 0.
            if statistic.role == Role.KL:
                raw = statistic.unclamped(part)
                metrics = {"kl": (raw.clamp(min=0), 1), "kl_unclamped": (raw, 1)}
        found = [
            next(values) if isinstance(statistic, StepStatistic) else sets
            for statistic, sets in zip(self._statistics, whole, strict=True)
        ]
        return found, metrics
