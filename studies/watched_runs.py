"""Runs of the lab that are watched from inside, which studies 06 and 07 share.

Besides what `lab_runs` measures, such a run has log-probs of fixed pairs along its way, and at a few steps the gradient
of each response of fixed rows. From those follow norms, angles and the band of `infopo.diagnostics`, and several
forecasts of what the next steps do to a chosen response.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from lab_runs import Record, Run, train_and_measure, value_and_pull
from lab_world import FOREIGN, Array, World, packed
from torch import Tensor
from transformers import PreTrainedModel

from infopo.diagnostics import Balance, ches
from infopo.logps.forward import response_logps
from infopo.losses.catalog import OBJECTIVES
from infopo.losses.registry import loss_function
from infopo.records import PreferenceExample


@dataclass(frozen=True)
class WatchedRun(Run):
    """A run whose pairs and gradients are watched.

    Attributes:
        looks: Steps after which log-probs of fixed pairs are measured.
        gradients: Steps after which gradients are measured. Log-probs are measured `AHEAD` steps later, too.
        judged: Number of training pairs and of held-out pairs whose gradients are measured.
        direction: Number of training pairs whose loss gives the direction of a step.
        watched: Version of what this file computes.
    """

    looks: tuple[int, ...] = (0,)
    gradients: tuple[int, ...] = (0,)
    judged: int = 16
    direction: int = 64
    watched: int = 1


METHODS: dict[str, tuple[str, tuple[tuple[str, Any], ...]]] = {
    "InfoPO, β 1": ("infopo", (("beta", 1.0),)),
    "DPO, β 0.1": ("dpo", (("beta", 0.1),)),
    "SFT on chosen": ("sft", ()),
    "InfoPO, β 0.1": ("infopo", (("beta", 0.1),)),
    "DPO, β 1": ("dpo", (("beta", 1.0),)),
    "SimPO": ("simpo", ()),
}
"""Objective and parameters by name. SimPO has β = 2 and γ = 0.5 on means over tokens."""
RATES = (1.1e-4, 3e-4)
SHAPE: dict[str, dict[str, Any]] = {
    "short": {
        "pairs": 512,
        "batch": 16,
        "steps": 64,
        "warmup": 6,
        "checkpoints": (8, 16, 32),
        "looks": (0, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64),
        "gradients": (0, 8, 16, 32, 48),
    },
    "tiny": {
        "pairs": 6,
        "batch": 3,
        "steps": 4,
        "checkpoints": (2,),
        "looks": (0, 4),
        "gradients": (0, 2),
        "judged": 2,
        "direction": 3,
    },
}
"""Two passes over the pairs."""
CORE = tuple(METHODS)[:4]
CELLS = (
    (("verified", RATES, CORE), (FOREIGN, RATES[:1], (*CORE, "DPO, β 1"))),
    (("graded", RATES, CORE[:3]), ("verified", RATES, tuple(METHODS)[4:])),
)
"""Labels, learning rates and methods of the runs. All seeds of the first part come before those of the second."""

Cell = tuple[str, Sequence[float], Sequence[str]]


TINY: tuple[tuple[Cell, ...], ...] = ((("graded", RATES[:1], CORE[:3]),),)


def grid(lab: str, seeds: int, *, tiny: bool = False) -> list[WatchedRun]:
    """Returns all runs, within a part one seed after the other, so that what is finished is balanced."""
    return [
        WatchedRun(lab, labels, seed, objective=objective, parameters=parameters, rate=rate, **SHAPE[lab])
        for part in (TINY if tiny else CELLS)
        for seed in range(1, seeds + 1)
        for labels, rates, names in part
        for rate in rates
        for objective, parameters in (METHODS[name] for name in names)
    ]


def method_of(run: Mapping[str, Any]) -> str:
    """Returns the name of a run's method."""
    given = (run["objective"], tuple((name, value) for name, value in run["parameters"]))
    return next(name for name, each in METHODS.items() if each == given)


def cells_of(runs: Sequence[WatchedRun]) -> list[tuple[str, float, str]]:
    """Returns labels, learning rate and method of each cell of a grid, in the order of the README's tables."""
    found = dict.fromkeys((run.labels, run.rate, method_of(asdict(run))) for run in runs)
    order, methods = ("verified", "graded", FOREIGN), list(METHODS)
    return sorted(found, key=lambda cell: (order.index(cell[0]), cell[1], methods.index(cell[2])))


LEAST_SEEDS = 3
"""Number of seeds below which a cell of the grid is left out of tables."""

AHEAD = 2
"""Steps over which a forecast of the next steps is compared. The first one has a learning rate of 0."""


def train_and_watch(run: Run, shared: World) -> Record:
    """Trains as `train_and_measure` does, and adds `looks`, `gradients` and `ches` to its result."""
    assert isinstance(run, WatchedRun)
    watcher = Watcher(run, shared)
    result = train_and_measure(run, shared, watcher)
    return {**result, "looks": watcher.looks, "gradients": watcher.gradients, "ches": watcher.ches}


class Watcher:
    """Measures a policy while it is trained, and leaves it as it is.

    Attributes:
        looks: Log-probs of held-out and of judged training pairs (nats), by step.
        gradients: What gradients say at each step at which they were measured.
        ches: CHES and its length-normalised form of each judged row before training.
    """

    def __init__(self, run: WatchedRun, shared: World) -> None:
        self.run, self.looks, self.gradients = run, [], []
        self.held_out = shared.held_out_pairs
        self.trained = shared.pairs[: run.pairs]
        self.rows = [*self.trained[: run.judged], *self.held_out[: run.judged]]
        self.loss = loss_function(run.objective, dict(run.parameters))
        self.is_one_sided = OBJECTIVES[run.objective].sides == {"chosen"}
        self.ches: list[tuple[float, float]] = []
        self.steps = {*run.looks, *run.gradients, *(step + AHEAD for step in run.gradients)}

    def __call__(self, step: int, policy: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
        policy.eval()
        if step in self.steps:
            values = [log_probs(policy, part) for part in (self.held_out, self.trained[: self.run.judged])]
            held, trained = (np.round(each, 5).tolist() for each in values)
            self.looks.append({"step": step, "held": held, "trained": trained})
        if step == 0:
            self.ches = [ches_of(policy, row) for row in self.rows]
        if step in self.run.gradients:
            self.gradients.append({"step": step, **self.measured(policy, optimizer)})

    def measured(self, policy: PreTrainedModel, optimizer: torch.optim.Optimizer) -> Record:
        """Returns the two sides' balance on held-out and on training rows, and forecasts for each row."""
        parameters = list(policy.parameters())
        direction = -self.of_loss(policy, parameters, self.trained[: self.run.direction])
        adam = direction / (second_moment(optimizer, parameters, direction).sqrt() + 1e-8)
        sides = [gradients(policy, parameters, row) for row in self.rows]
        chosen, rejected = (torch.stack(each) for each in zip(*sides, strict=True))
        # As if each row were alone: a term's mean has their number in its denominator.
        weights = len(self.rows) * torch.tensor(self.pulls(policy, self.rows)).float().abs().view(-1, 2)
        half = self.run.judged
        parts = {"trained": slice(0, half), "held": slice(half, 2 * half)}
        return {
            **{
                name: side_balance(chosen[part], rejected[part], weights[part])
                for name, part in parts.items()
            },
            "rows": {
                "chosen_norm": numbers(chosen.norm(dim=1)),
                "rejected_norm": numbers(rejected.norm(dim=1)),
                "inner": numbers((chosen * rejected).sum(1)),
                "weight_chosen": numbers(weights[:, 0]),
                "weight_rejected": numbers(weights[:, 1]),
                "along_gradient": numbers(chosen @ direction),
                "along_adam": numbers(chosen @ adam),
                "rejected_along_adam": numbers(rejected @ adam),
            },
        }

    def pulls(self, policy: PreTrainedModel, rows: Sequence[PreferenceExample]) -> list[float]:
        """Returns ∂L/∂log π of each response of rows, in their order, 0 for a side that the loss does not see."""
        with torch.no_grad():
            batch = packed(self.seen(rows))
            values = batch.with_logps(response_logps(policy, batch).requires_grad_())
        with torch.enable_grad():
            _, pull = value_and_pull(self.loss, values, batch)
        found = pull.tolist()
        return found if not self.is_one_sided else [x for each in found for x in (each, 0.0)]

    def seen(self, rows: Sequence[PreferenceExample]) -> list[PreferenceExample]:
        if not self.is_one_sided:
            return list(rows)
        return [replace(row, rejected_ids=[], reference=(row.reference or ())[:1]) for row in rows]

    def of_loss(
        self, policy: PreTrainedModel, parameters: Sequence[Tensor], rows: Sequence[PreferenceExample]
    ) -> Tensor:
        """Returns the gradient of the loss on rows, as one vector."""
        batch = packed(self.seen(rows))
        logps = response_logps(policy, batch)
        seen = batch.with_logps(logps.detach().requires_grad_())
        _, pull = value_and_pull(self.loss, seen, batch)
        return flat(torch.autograd.grad((logps * pull).sum(), parameters))


def gradients(
    policy: PreTrainedModel, parameters: Sequence[Tensor], row: PreferenceExample
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of log π of a pair's chosen and of its rejected response, as vectors."""
    chosen, rejected = response_logps(policy, packed([row]))
    first = flat(torch.autograd.grad(chosen, parameters, retain_graph=True))
    return first, flat(torch.autograd.grad(rejected, parameters))


def flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([each.detach().flatten() for each in gradients])


def second_moment(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], direction: Tensor
) -> Tensor:
    """Returns Adam's estimate of the squared gradient, which is that of `direction` before the first step."""
    states = [optimizer.state.get(parameter, {}) for parameter in parameters]
    if not all("exp_avg_sq" in state for state in states):
        return direction.square()
    decay = optimizer.param_groups[0]["betas"][1]
    return torch.cat([(s["exp_avg_sq"] / (1 - decay ** float(s["step"]))).flatten() for s in states])


def side_balance(chosen: Tensor, rejected: Tensor, weights: Tensor) -> Record:
    """Returns norms of both sides of the loss's gradient, their inner product, and the sums of weights."""
    first, second = weights[:, 0] @ chosen, weights[:, 1] @ rejected
    balance = Balance(
        float(first.norm()), float(second.norm()), float(first @ second), *weights.sum(0).tolist()
    )
    return asdict(balance)


def ches_of(policy: PreTrainedModel, row: PreferenceExample) -> tuple[float, float]:
    """Returns CHES of a pair, and its length-normalised form."""
    sums = []
    with torch.no_grad():
        for ids in (row.chosen_ids[0], row.rejected_ids[0]):
            tokens = torch.tensor([[*row.prompt_ids, *ids]])
            states = policy(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states[-1]
            sums.append((states[0, len(row.prompt_ids) - 1 : -1].double().sum(0).numpy(), len(ids)))
    return ches(sums[0][0], sums[1][0], sums[0][1], sums[1][1])


def log_probs(policy: PreTrainedModel, rows: Sequence[PreferenceExample]) -> Array:
    """Returns log π of chosen and rejected response of each pair (nats), in turn."""
    with torch.no_grad():
        values: Array = response_logps(policy, packed(rows)).double().numpy()
    return values


def numbers(values: Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]
