"""Numbers that belong to a whole optimizer step and couple its examples: the mean in a logarithm, KTO's KL.

A part is two numbers of some responses, (log Σ e^s, count) or (Σ s, count) of scores s. Parts of micro-batches, of
ranks and of a whole step are combined in the same way, so the statistic does not depend on how a step is cut. No
statistic carries a gradient. `catalog.py` says which objective uses which statistic, and the loss says from which
scores.
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
    """One number of an optimizer step, from the scores of its responses of one role.

    Attributes:
        role: The responses that it is taken over.
        scores: Their scores, from the log-probs of a batch (nats).
        kind: `log_mean` is log E[e^s]; `positive_mean` is max(0, E[s]). Both in nats.
        rate: Weight of a step in a moving average over steps, in (0, 1]; at 1, each step stands alone.
    """

    role: Role
    scores: Callable[[ResponseLogps], Float[Tensor, " items"]]
    kind: Literal["log_mean", "positive_mean"]
    rate: float = 1.0

    def part(self, logps: ResponseLogps) -> Part:
        """What the responses of a batch contribute."""
        scores = self.scores(logps).detach()
        total = scores.logsumexp(dim=0) if self.kind == "log_mean" else scores.sum()
        return torch.stack([total, total.new_tensor(len(scores))])

    def combined(self, parts: Float[Tensor, "parts 2"]) -> Float[Tensor, ""]:
        """The statistic of all responses whose parts these are; of none, NaN for `log_mean` and 0 for the other."""
        value = self.unclamped(parts)
        return value.clamp(min=0) if self.kind == "positive_mean" else value

    def unclamped(self, parts: Float[Tensor, "parts 2"]) -> Float[Tensor, ""]:
        """As `combined`, but a mean below 0 is kept: it shows how far KTO's estimate is from its bound."""
        totals, counts = parts.unbind(1)
        if self.kind == "log_mean":
            return totals.logsumexp(dim=0) - counts.sum().log()
        return totals.sum() / counts.sum().clamp(min=1)

    def averaged(self, before: Float[Tensor, ""], now: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """log m after a step: m ← (1 - rate) m + rate e^now. NaN stands for nothing: no step yet, or no response.

        Args:
            before: log m of the steps before (nats).
            now: The step's own log mean (nats).
        """
        if self.rate == 1:
            return now
        updated = torch.logaddexp(before + math.log1p(-self.rate), now + math.log(self.rate))
        return torch.where(before.isnan(), now, torch.where(now.isnan(), before, updated))

    def of(self, logps: ResponseLogps) -> Float[Tensor, ""]:
        """What the trainer found for the step; without a trainer, the batch is the whole step."""
        if logps.statistic is None:
            return self.combined(self.part(logps)[None])
        return logps.statistic.to(logps.policy.dtype)


def step_parts(
    statistics: Sequence[StepStatistic], batches: Sequence[ResponseLogps]
) -> Float[Tensor, "statistics 2"]:
    """The part of each statistic that these batches contribute: what is left to combine over ranks."""
    rows = []
    for statistic in statistics:
        totals, counts = torch.stack([statistic.part(logps) for logps in batches]).unbind(1)
        total = totals.logsumexp(dim=0) if statistic.kind == "log_mean" else totals.sum()
        rows.append(torch.stack([total, counts.sum()]))
    return torch.stack(rows)
