"""Step statistics: numbers of a whole optimizer step that couple its examples, as the mean in a logarithm or KTO's KL.

| class | what a step gives |
|---|---|
| `StepStatistic` | one number, log E[e^s] or max(0, E[s]) of scores s, of which the former may be averaged over steps |
| `SortedScores` | all scores of two sets in order |
| `StepMoments` | mean and standard deviation of scores, averaged over steps |

For a `StepStatistic`, some responses contribute a part, which is two numbers: (log Σ e^s, count) or (Σ s, count). Parts
of micro-batches, of ranks and of a whole step are combined in the same way. The other two collect all scores of the
step in order. Either way, the statistic does not depend on how a step is split. No statistic carries a gradient.
`catalog.py` says which objective uses which statistic, and the loss says from which scores.
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


def collected(
    scores: Sequence[Tensor], gather: Callable[[Tensor], Tensor]
) -> tuple[Float[Tensor, "ranks sets items"], int]:
    """Returns sets of scores of all ranks, filled up with infinity to the length of the longest, and that length."""
    longest = int(gather(torch.tensor([max(map(len, scores))], device=scores[0].device)).max())
    filled = torch.stack([torch.cat([s, s.new_full((longest - len(s),), math.inf)]) for s in scores])
    # A row per rank and set, because ranks are concatenated along the first dimension.
    return (gather(filled).reshape(-1, len(scores), longest) if longest else filled[None]), longest


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
        ranks, longest = collected(sets, gather)
        if not longest:
            return sets[0].new_empty(2, 0)
        rows = [ranks[:, i].flatten().sort().values for i in (0, 1)]
        return torch.stack(rows)

    def of(self, logps: ResponseLogps) -> Float[Tensor, "2 items"]:
        """Returns the sets that the trainer found in the step, or else those of the batch itself."""
        return self.over([logps]) if logps.statistic is None else logps.statistic.to(logps.policy.dtype)


@dataclass(frozen=True)
class StepMoments:
    """Mean and standard deviation of the scores of an optimizer step, as moving averages over steps.

    The statistic is a tensor: the mean and the deviation (nats), then what `further` makes of the step with them. The
    deviation is that of a sample (n - 1), and at least `LEAST_DEVIATION`: at the first step the policy is the
    reference, and rounding is no spread of margins.

    Attributes:
        scores: Returns the scores from the log-probs of a batch.
        rate: Weight of a new step in the averages, in [0, 1]. The first step has the weight 1. At 1 there is no average
            over steps. At 0 every score of the run so far has the same weight, as in TRL's running mean.
        further: Returns further numbers from the step's scores, in ascending order, their mean and their deviation.

    Example:
        >>> moments = StepMoments(lambda logps: logps.policy, rate=0.1)
        >>> moments.of(ResponseLogps.pair((-3.0, -5.0)))
        tensor([-4.0000,  1.4142], dtype=torch.float64)
    """

    scores: Callable[[ResponseLogps], Float[Tensor, " items"]]
    rate: float
    further: Callable[[Tensor, Tensor, Tensor], Float[Tensor, " numbers"]] | None = None

    @property
    def roles(self) -> frozenset[Role]:
        """Roles of the responses that it is computed from."""
        return frozenset({Role.CHOSEN, Role.REJECTED})

    def over(
        self, batches: Sequence[ResponseLogps], gather: Callable[[Tensor], Tensor] = lambda values: values
    ) -> Float[Tensor, " items"]:
        """Returns the scores of all these batches, of all ranks whose tensors `gather` concatenates, in order."""
        ranks, _ = collected([torch.cat([self.scores(b).detach() for b in batches])], gather)
        # In one order, the sums below are those of any other split of the step, to the last digit.
        found = ranks.flatten().sort().values
        return found[~found.isposinf()]

    def averaged(self, before: Float[Tensor, " 3"], scores: Float[Tensor, " items"]) -> Float[Tensor, " 3"]:
        """Returns mean, deviation (nats) and number of scores after a step with these scores.

        Args:
            before: The same of the steps before, or NaN at the first step.
            scores: Scores of the step.
        """
        size = len(scores)
        if not size:
            return before
        mean = scores.mean()
        deviation = ((scores - mean).square().sum() / max(1, size - 1)).sqrt()
        count = before[2].nan_to_num(0.0) + size
        share = torch.full_like(count, self.rate) if self.rate else size / count
        share = share.where(~before[2].isnan(), 1.0)
        now = torch.stack([mean, deviation]).to(before.dtype)
        return torch.cat([torch.lerp(before[:2].nan_to_num(0.0), now, share), count[None]])

    def value(self, averages: Float[Tensor, " 3"], scores: Float[Tensor, " items"]) -> Tensor:
        """Returns the statistic: mean, deviation, and the further numbers of a step with these scores."""
        mean, deviation = averages[0], averages[1].clamp(min=LEAST_DEVIATION)
        numbers = torch.stack([mean, deviation])
        return (
            numbers if self.further is None else torch.cat([numbers, self.further(scores, mean, deviation)])
        )

    def alone(self, scores: Float[Tensor, " items"]) -> Tensor:
        """Returns the statistic of a step before which there was none."""
        return self.value(self.averaged(scores.new_full((3,), math.nan), scores), scores)

    def of(self, logps: ResponseLogps) -> Tensor:
        """Returns the statistic that the trainer computed for the step, or else that of the batch itself."""
        return (
            self.alone(self.over([logps]))
            if logps.statistic is None
            else logps.statistic.to(logps.policy.dtype)
        )


LEAST_DEVIATION = 1e-3
"""Least standard deviation of a step's scores (nats). In float32 a response's log-ratio has as much rounding error."""


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


AnyStatistic = StepStatistic | SortedScores | StepMoments
Averages = float | list[float]
"""What an objective keeps from step to step: the logarithm of a moving average (nats), or the numbers of `StepMoments`.
NaN if it keeps nothing."""


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
        averages: Each objective's moving averages (see `Averages`) as a tensor, NaN before the first step.
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

    def reset(self, averages: Sequence[Averages] | None = None) -> None:
        """Starts a run, with these averages if they are those of a checkpoint."""
        self.values: list[Tensor | None] = [None] * len(self._statistics)
        before = [math.nan] * len(self._statistics) if averages is None else averages
        dtype = sum_dtype(self._device)
        self.averages = [
            torch.tensor(value, dtype=dtype, device=self._device).expand(
                3 if isinstance(statistic, StepMoments) else ()
            )
            for statistic, value in zip(self._statistics, before, strict=True)
        ]

    @property
    def kept(self) -> list[Averages]:
        """The moving averages as numbers, which a checkpoint keeps."""
        return [average.tolist() for average in self.averages]

    @property
    def keeps_averages(self) -> bool:
        """Whether a statistic depends on the steps before."""
        return any(statistic and statistic.rate < 1 for statistic in self._statistics)

    def advance(self, seen: Sequence[ResponseLogps]) -> dict[str, tuple[Tensor, float]]:
        """Sets the values to those of the next step, which contains these batches, and returns its metrics."""
        found, metrics = self._found(seen)
        self.values = list(found)
        for index, (statistic, now) in enumerate(zip(self._statistics, found, strict=True)):
            if now is None or isinstance(statistic, SortedScores):
                continue
            assert statistic is not None
            self.averages[index] = statistic.averaged(self.averages[index], now)
            self.values[index] = self.averages[index]
            if isinstance(statistic, StepMoments):
                self.values[index] = statistic.value(self.averages[index], now)
        return metrics

    def over(
        self, seen: Sequence[ResponseLogps]
    ) -> tuple[list[Tensor | None], dict[str, tuple[Tensor, float]]]:
        """Returns each objective's statistic over these batches of all ranks, and metrics as (sum, count) by name.

        There are no steps before: averages over steps are those of these batches alone.
        """
        found, metrics = self._found(seen)
        values = [
            statistic.alone(now) if isinstance(statistic, StepMoments) and now is not None else now
            for statistic, now in zip(self._statistics, found, strict=True)
        ]
        return values, metrics

    def _found(
        self, seen: Sequence[ResponseLogps]
    ) -> tuple[list[Tensor | None], dict[str, tuple[Tensor, float]]]:
        """Returns what each statistic takes from these batches of all ranks, before averages, and metrics."""
        needed = [each for each in self._statistics if isinstance(each, StepStatistic)]
        whole = [
            s.over(seen, self._gather) if isinstance(s, SortedScores | StepMoments) else None
            for s in self._statistics
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
            next(values) if isinstance(statistic, StepStatistic) else scores
            for statistic, scores in zip(self._statistics, whole, strict=True)
        ]
        return found, metrics
