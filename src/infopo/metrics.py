"""Metrics as (sum, count): exact over micro-batches, steps and ranks, under the names that TRL users know.

Sums stay on the device; nothing waits for it until `MetricSums.reduce`, once a log step.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from infopo.records import LossTerm, PackedBatch, ResponseLogps, sum_dtype

Sums = dict[str, tuple[Tensor, int]]
"""Name -> (sum over items, number of items)."""


def preference_metrics(
    logps: ResponseLogps,
    *,
    beta: float,
    reference_sides: frozenset[str],
    length_normalized: bool = False,
    cap: float = 5.0,
) -> tuple[Sums, dict[str, Tensor]]:
    """Sums and maxima of a batch.

    Args:
        logps: Log-probs of the batch.
        beta: Scale of rewards, β log r.
        reference_sides: Sides whose reference log-probs exist; a metric that needs another side is absent.
        length_normalized: Whether the critic of the ratio is divided by the response's length, as in the loss.
        cap: β log r(l) beyond which the loss is extended linearly (nats).

    Returns:
        Means as (sum, count): `logps/chosen`, `logps/rejected` (nats a response); `rewards/chosen`,
        `rewards/rejected`, `rewards/margins`, `rewards/accuracies` (β log r; a pair counts as accurate when the
        chosen reward is larger); `ratio/mean` (r(l)^β, log-ratios beyond the cap counted as the cap),
        `ratio/capped` (share of rejected responses beyond the cap). Maxima: `ratio/max`, likewise.
    """
    policy = logps.policy.detach()
    rewards = beta * (policy - logps.reference)
    chosen, rejected = logps.chosen, logps.rejected
    sums: Sums = {
        "logps/chosen": (policy[chosen].sum(), len(chosen)),
        "logps/rejected": (policy[rejected].sum(), len(rejected)),
    }
    maxima: dict[str, Tensor] = {}
    if "chosen" in reference_sides:
        sums["rewards/chosen"] = (rewards[chosen].sum(), len(chosen))
    if "rejected" in reference_sides:
        critic = (rewards / logps.length if length_normalized else rewards)[rejected]
        ratio = critic.clamp(max=cap).exp()
        sums["rewards/rejected"] = (rewards[rejected].sum(), len(rejected))
        sums["ratio/mean"] = (ratio.sum(), len(rejected))
        sums["ratio/capped"] = ((critic > cap).sum(), len(rejected))
        maxima["ratio/max"] = ratio.max() if len(rejected) else ratio.new_tensor(float("-inf"))
    if reference_sides >= {"chosen", "rejected"}:
        margins = rewards[logps.pairs[:, 0]] - rewards[logps.pairs[:, 1]]
        sums["rewards/margins"] = (margins.sum(), len(margins))
        sums["rewards/accuracies"] = ((margins > 0).sum(), len(margins))
    return sums, maxima


class MetricSums:
    """Adds up sums, counts and maxima over micro-batches, then over ranks."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor | int]] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, sums: Sums, maxima: dict[str, Tensor] | None = None) -> None:
        """Adds a micro-batch."""
        for name, (total, count) in sums.items():
            entry = self._sums.setdefault(name, [torch.zeros_like(total), 0])
            entry[0] = entry[0] + total
            entry[1] = entry[1] + count
        for name, value in (maxima or {}).items():
            self._maxima[name] = torch.maximum(self._maxima[name], value) if name in self._maxima else value

    def reduce(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means and maxima over all ranks; a metric nothing was added to is left out. Starts afresh.

        Args:
            gather: Takes (names,) of this rank and gives (ranks * names,); every rank must call it alike.
        """
        names, maxima = sorted(self._sums), sorted(self._maxima)
        result: dict[str, float] = {}
        if names:
            dtype = sum_dtype(torch.as_tensor(self._sums[names[0]][0]).device)
            totals = [torch.as_tensor(self._sums[name][0]).to(dtype) for name in names]
            counts = [totals[0].new_tensor(self._sums[name][1]) for name in names]
            table = gather(torch.stack(totals + counts)).reshape(-1, 2, len(names)).sum(dim=0).tolist()
            result |= {n: total / count for n, total, count in zip(names, *table, strict=True) if count}
        if maxima:
            all_maxima = gather(torch.stack([self._maxima[name] for name in maxima]))
            highest = all_maxima.reshape(-1, len(maxima)).amax(dim=0).tolist()
            result |= {n: value for n, value in zip(maxima, highest, strict=True) if value != float("-inf")}
        self._sums.clear()
        self._maxima.clear()
        return result


def non_finite_rows(batch: PackedBatch, logps: ResponseLogps, terms: list[LossTerm]) -> list[str]:
    """Names of the rows whose log-probs or loss values are NaN or infinite. Waits for the device."""
    owners = {
        "chosen": logps.chosen,
        "token": logps.chosen,
        "rejected": logps.rejected,
        "pair": logps.pairs[:, 0],
        "response": torch.cat([logps.chosen, logps.rejected]),
    }
    bad = {int(e) for e in logps.example[~logps.policy.isfinite()].tolist()}
    for term in terms:
        bad |= set(logps.example[owners[term.per][~term.values.isfinite()]].tolist())
    return [batch.row_ids[example] for example in sorted(bad)]
