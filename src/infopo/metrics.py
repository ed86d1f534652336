"""Computes metrics as (sum, count), exact over micro-batches, steps and ranks, under the names that TRL users know.

Sums stay on the device. Nothing synchronises with the GPU until `MetricSums.reduce`, once per log record.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infopo.losses.catalog import row_of
from infopo.records import LossTerm, PackedBatch, ResponseLogps, Role, sum_dtype

Sums = dict[str, tuple[Tensor, float]]
"""Name -> (sum over items, number of items)."""


@dataclass(frozen=True)
class Metric:
    """One row of the table of metrics.

    Attributes:
        formula: Formula, with w for chosen and l for rejected responses.
        unit: Unit of the value.
        over: Items that the mean (or the maximum) is taken over.
        better: Whether a larger value is better (True), a smaller one (False), or neither (None).
    """

    formula: str
    unit: str
    over: str
    better: bool | None = None


METRICS: Mapping[str, Metric] = {
    "loss": Metric("the objective", "-", "the whole step or set", False),
    "logps/chosen": Metric("log π_θ(w)", "nats", "chosen responses", True),
    "logps/rejected": Metric("log π_θ(l)", "nats", "rejected responses"),
    "logps/margins": Metric("log π_θ(w) - log π_θ(l)", "nats", "pairs", True),
    "logps/accuracies": Metric("share with log π_θ(w) > log π_θ(l)", "share", "pairs", True),
    "logratios/chosen": Metric("log π_θ(w) - log π_ref(w)", "nats", "chosen responses", True),
    "logratios/rejected": Metric("log π_θ(l) - log π_ref(l)", "nats", "rejected responses"),
    "rewards/chosen": Metric("reward(w)", "nats x β", "chosen responses", True),
    "rewards/rejected": Metric("reward(l)", "nats x β", "rejected responses"),
    "rewards/margins": Metric("reward(w) - reward(l)", "nats x β", "pairs", True),
    "rewards/accuracies": Metric("share with reward(w) > reward(l)", "share", "pairs", True),
    "ratio/mean": Metric("r(l)^β, at most e^cap if the loss has a cap on it", "-", "rejected responses"),
    "ratio/max": Metric(
        "r(l)^β, at most e^cap if the loss has a cap on it", "-", "rejected responses (maximum)"
    ),
    "ratio/capped": Metric("share with β log r(l) > cap", "share", "rejected responses"),
    "kl": Metric("max(0, kl_unclamped)", "nats", "the whole step or set"),
    "kl_unclamped": Metric("log π_θ(y') - log π_ref(y')", "nats", "mismatched responses y'"),
    "aux_loss": Metric("the router's load-balancing loss", "-", "device batches", False),
}
"""Every metric of this package, in the order in which a record shows them. `docs/metrics.md` is compared with it."""


@dataclass(frozen=True)
class MetricRule:
    """Rule by which metrics compute an objective's rewards and ratios from log-probs.

    Attributes:
        beta: Scale of rewards.
        reward: `log_ratio` is β log r. For losses without a reference, `logp` is β log π_θ and `mean_logp` is
            β log π_θ / |y|.
        has_ratio: Whether the loss contains r(l)^β itself, so that its tail has to be watched.
        length_normalized: Whether the critic of that ratio is divided by the response's length, as in the loss.
        cap: β log r(l) beyond which the loss is extended linearly (nats), or None if the loss contains all of r(l)^β.
    """

    beta: float = 1.0
    reward: str = "log_ratio"
    has_ratio: bool = True
    length_normalized: bool = False
    cap: float | None = 5.0

    @classmethod
    def of(cls, mixture: Sequence[tuple[str, Mapping[str, Any], float]]) -> "MetricRule":
        """Returns the rule of a sum of objectives, each as (name, parameters, weight).

        It is that of the first objective that has a β.
        """
        name, parameters, _ = next((m for m in mixture if "beta" in m[1]), mixture[0])
        spec = row_of(name)
        return cls(
            beta=parameters.get("beta", 1.0),
            reward=spec.reward,
            has_ratio=spec.ratio,
            length_normalized=spec.ratio and bool(parameters.get("length_normalized")),
            # With a statistic of the step, the cap is on the distance of β log r(l) from it.
            cap=None if spec.statistic else parameters.get("cap"),
        )


def preference_metrics(
    logps: ResponseLogps, rule: MetricRule, reference_sides: frozenset[str]
) -> tuple[Sums, dict[str, Tensor]]:
    """Returns the metrics of a batch as sums and maxima.

    Args:
        logps: Log-probs of the batch.
        rule: Rule for rewards and ratios.
        reference_sides: Sides whose reference log-probs exist. A metric that needs another side is absent.

    Returns:
        Means as (sum, count) and maxima, by their names in `METRICS`. In accuracies a tie counts one half. Before the
        first update, when policy and reference are equal, every pair is a tie.

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0))
        >>> sums, _ = preference_metrics(pair, MetricRule(), reference_sides=frozenset())
        >>> {name: total.item() / count for name, (total, count) in sums.items() if name.startswith("logps/m")}
        {'logps/margins': 2.0}
    """
    policy, chosen, rejected = logps.policy.detach(), logps.chosen, logps.rejected
    log_ratio = policy - logps.reference
    scores = {"log_ratio": log_ratio, "logp": policy, "mean_logp": policy / logps.length}
    rewards = rule.beta * scores[rule.reward]
    has_reward = reference_sides if rule.reward == "log_ratio" else {"chosen", "rejected"}
    sums = _of_pairs("logps", policy, logps)
    maxima: dict[str, Tensor] = {}
    for side, responses in (("chosen", chosen), ("rejected", rejected)):
        sums[f"logps/{side}"] = (policy[responses].sum(), len(responses))
        if side in reference_sides:
            sums[f"logratios/{side}"] = (log_ratio[responses].sum(), len(responses))
        if side in has_reward:
            sums[f"rewards/{side}"] = (rewards[responses].sum(), len(responses))
    if has_reward >= {"chosen", "rejected"}:
        sums |= _of_pairs("rewards", rewards, logps)
    if rule.has_ratio and "rejected" in reference_sides:
        critic = (rewards / logps.length if rule.length_normalized else rewards)[rejected]
        ratio = (critic if rule.cap is None else critic.clamp(max=rule.cap)).exp()
        sums["ratio/mean"] = (ratio.sum(), len(rejected))
        if rule.cap is not None:
            sums["ratio/capped"] = ((critic > rule.cap).sum(), len(rejected))
        maxima["ratio/max"] = ratio.max() if len(rejected) else ratio.new_tensor(float("-inf"))
    return sums, maxima


def _of_pairs(family: str, scores: Tensor, logps: ResponseLogps) -> Sums:
    """Returns margins and accuracies of all chosen-rejected pairs, by these scores of the responses."""
    margins = logps.margins(scores)
    return {
        f"{family}/margins": (margins.sum(), len(margins)),
        f"{family}/accuracies": ((margins.sign() + 1).sum() / 2, len(margins)),
    }


def metric_names(
    rule: MetricRule, reference_sides: frozenset[str], *, chosen: bool, rejected: bool, pairs: bool
) -> list[str]:
    """Returns the names of the metrics that data with these kinds of responses will have, in the order of `METRICS`.

    The metrics of two artificial responses are computed, so that the names are those of what is computed in training.

    Example:
        >>> metric_names(MetricRule(), frozenset({"rejected"}), chosen=False, rejected=True, pairs=False)
        ['loss', 'logps/rejected', 'logratios/rejected', 'rewards/rejected', 'ratio/mean', 'ratio/max', 'ratio/capped']
    """
    roles = [role for role, exists in ((Role.CHOSEN, chosen), (Role.REJECTED, rejected)) if exists]
    example = torch.zeros(len(roles)) if pairs else torch.arange(len(roles))
    zeros = torch.zeros(len(roles), dtype=torch.float64)
    made_up = ResponseLogps.of(
        zeros, zeros, torch.ones(len(roles), dtype=torch.int64), torch.tensor(roles), example.long()
    )
    sums = MetricSums()
    sums.add(*preference_metrics(made_up, rule, reference_sides))
    kl = ["kl", "kl_unclamped"] if "kl" in reference_sides else []
    return in_order({"loss", *kl, *sums.reduce(lambda values: values)})


def absent_in_training(rule: MetricRule, sides: frozenset[str]) -> str:
    """Returns a line that names the metrics whose reference is not computed for training, or empty text.

    Example:
        >>> absent_in_training(MetricRule(), frozenset({"chosen", "rejected"}))
        ''
    """
    every = {"chosen": True, "rejected": True, "pairs": True}
    present = metric_names(rule, sides, **every)
    absent = [n for n in metric_names(rule, sides | {"chosen", "rejected"}, **every) if n not in present]
    if not absent or not sides:
        return ""
    return (
        f"metrics not computed in training: {', '.join(absent)}; reference_sides='both' (in a recipe, "
        "reference.sides: both) computes them"
    )


def in_order(names: Iterable[str]) -> list[str]:
    """Returns names in the order of `METRICS`, others last.

    Example:
        >>> in_order(["my_metric", "kl", "loss"])
        ['loss', 'kl', 'my_metric']
    """
    rank = {name: index for index, name in enumerate(METRICS)}
    return sorted(names, key=lambda name: (rank.get(name, len(rank)), name))


class MetricSums:
    """Adds up sums, counts and maxima over micro-batches, and then over ranks.

    Example:
        >>> sums = MetricSums()
        >>> sums.add({"loss": (torch.tensor(3.0), 2)})
        >>> sums.add({"loss": (torch.tensor(1.0), 2)})
        >>> sums.reduce(lambda values: values)  # on one rank
        {'loss': 1.0}
    """

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor | float]] = {}
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
        """Returns means and maxima over all ranks, and starts again from nothing. This synchronises with the GPU.

        A metric without items is left out.

        Args:
            gather: Function from (names,) of this rank to (ranks * names,) of all. Every rank must call it.
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
        if {"rewards/chosen", "rewards/rejected"} <= result.keys():
            # Without pairs, the margin is the difference of the two means, as KTO users know it.
            result.setdefault("rewards/margins", result["rewards/chosen"] - result["rewards/rejected"])
        return {name: result[name] for name in in_order(result)}


def reference_is_finite(logps: ResponseLogps, sides: frozenset[str]) -> bool:
    """Returns whether the reference's log-probs of these sides are finite. Synchronises with the GPU."""
    return all(bool(logps.reference[getattr(logps, side)].isfinite().all()) for side in sides)


def non_finite_rows(batch: PackedBatch, logps: ResponseLogps, terms: list[LossTerm]) -> list[str]:
    """Returns the names of rows whose log-probs or loss values are NaN or infinite. Synchronises with the GPU."""
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
