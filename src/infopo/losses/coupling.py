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

from infopo.records import ResponseLogps, Role

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
