"""Cases of losses (objective, parameters, golden value), and batches to try them on."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from infopo.losses.catalog import OBJECTIVES
from infopo.losses.registry import LossFunction, loss_function, step_statistic
from infopo.records import LossTerm, ResponseLogps, Role

CHOSEN, REJECTED, KL = int(Role.CHOSEN), int(Role.REJECTED), int(Role.KL)
SIDES = {"chosen": CHOSEN, "rejected": REJECTED}
F64 = torch.float64
B = math.log(2)
LOG5, LOG9, LOG17 = math.log(5), math.log(9), math.log(17)


def softplus(x: float) -> float:
    """-log σ(-x)."""
    return math.log1p(math.exp(x))


@dataclass(frozen=True)
class Case:
    """An objective with parameters, and its loss on `golden_batch`."""

    name: str
    parameters: Mapping[str, Any]
    golden: float

    @property
    def loss(self) -> LossFunction:
        return loss_function(self.name, self.parameters)

    def __str__(self) -> str:
        return "-".join(
            [
                self.name,
                *(
                    f"{key}={value if isinstance(value, str) else f'{value:.3g}'}"
                    for key, value in self.parameters.items()
                ),
            ]
        )


# Derivations: `test_golden_values`.
CASES = [
    Case("infopo", {}, 3.5 * B + 2.25),
    Case("infopo", {"beta": 0.5}, 1.75 * B + 1 + math.sqrt(2) / 4),
    Case("infopo", {"length_normalized": True}, 2.5 * B + 1.25),
    Case("infopo", {"beta": 2.0, "length_normalized": True}, 5 * B + 2.125),
    Case("infopo", {"cap": B}, 4.5 * B + 1.25),
    Case("infopo", {"cap": 0.0}, 4.5 * B + 0.75),
    Case("infopo", {"beta": 2.0, "cap": 2 * B}, 11 * B + 2.125),
    Case("infonce", {"beta": 1.0}, (LOG17 + LOG9 - 3 * B) / 2),
    Case("infonce", {"beta": 2.0}, (math.log(257) + math.log(65 / 64)) / 2),
    Case("infonce", {"length_normalized": True}, (math.log1p(2 ** (5 / 3)) + LOG9 - 3 * B) / 2),
    Case("interpolated", {}, math.log(5 / 4) + 17 / 15),
    Case("interpolated", {"alpha": 0.0}, 2.25),
    Case("interpolated", {"cap": B}, math.log(5 / 4) + 11 / 15 + 0.4 * B),
    Case("interpolated", {"beta": 2.0}, math.log(17 / 8) + 97 / 85),
    Case(
        "interpolated",
        {"length_normalized": True},
        (math.log((1 + 2 ** (-2 / 3)) / 2) + math.log(5 / 2) - 4 / 3 * B) / 2 + 1,
    ),
    Case("js", {}, LOG5 - B + math.log(7.5) / 2),
    Case("js", {"beta": 2.0}, LOG17 - 2 * B + math.log(85 / 4) / 2),
    Case("js", {"length_normalized": True}, (math.log1p(2 ** (2 / 3)) + math.log(5.625)) / 2),
    Case("chi2", {}, 4.875),
    Case("chi2", {"beta": 0.5}, 0.75),
    Case("chi2", {"length_normalized": True}, -(1.75 + 2 ** (1 / 3)) / 2),
    Case("chi2", {"cap": B}, 0.875 + 2 * B),
    Case("hellinger", {}, 0.25 + math.sqrt(2) / 4),
    Case("hellinger", {"beta": 2.0}, 2.375),
    Case("hellinger", {"length_normalized": True}, (2 ** (1 / 3) + 1.5 * math.sqrt(2) - 3.5) / 2),
    Case("hellinger", {"cap": B}, (math.sqrt(2) * (2.5 + B) - 3.5) / 2),
    Case("dv", {}, LOG9 - 2 * B),
    Case("dv", {"beta": 2.0}, math.log(65 / 8)),
    Case("dv", {"length_normalized": True}, math.log(5 / 4) - 2 / 3 * B),
    Case("smile", {}, LOG9 - 2 * B),
    Case("smile", {"tau": B}, math.log(5 / 4)),
    Case("smile", {"beta": 2.0}, math.log(65 / 8)),
    Case("smile", {"length_normalized": True}, math.log(5 / 4) - 2 / 3 * B),
    Case("mine", {}, LOG9 - 2 * B),
    Case("mine", {"beta": 2.0, "rate": 0.5}, math.log(65 / 8)),
    Case("mine", {"length_normalized": True}, math.log(5 / 4) - 2 / 3 * B),
    Case("mine", {"cap": 0.0}, math.log(3) - 7 / 18),
    Case("dpo", {}, (math.log1p(2**0.4) + math.log1p(2**-0.3)) / 2),
    Case("dpo", {"beta": 1.0}, (math.log(17) + math.log(9) - 3 * B) / 2),
    Case("dpo", {"beta": 1.0, "label_smoothing": 0.25}, (math.log(17) + math.log(9) - 3.25 * B) / 2),
    Case("dpo", {"beta": 1.0, "nll_weight": 2.0}, (math.log(17) + math.log(9) - 3 * B) / 2 + 3.5 * B),
    Case("dpo", {"beta": 1.0, "nll_weight": 0.5}, (math.log(17) + math.log(9) - 3 * B) / 2 + 0.875 * B),
    Case("dpo", {"beta": 1.0, "length_normalized": True}, (math.log1p(2 ** (5 / 3)) + LOG9 - 3 * B) / 2),
    Case("dpo", {"beta": 1.0, "rejected_weight": 0.5}, (LOG9 + math.log1p(2**-2.5)) / 2),
    Case("ipo", {"beta": 1 / (2 * B)}, 50 / 9 * B**2),
    Case("ipo", {"beta": 1 / (2 * B), "length_normalized": False}, 14.5 * B**2),
    Case("hinge", {"beta": 1 / (4 * B)}, 1.125),
    Case("hinge", {"beta": 1 / (2 * B)}, 1.5),
    Case("simpo", {"beta": 1.0, "gamma": B}, math.log(3) - B / 2),
    Case("simpo", {"beta": 2.0, "gamma": B}, 1.5 * (math.log(3) - B)),
    Case("simpo", {"beta": 1.0, "gamma": B, "alpha": 1.0}, (math.log(3) + softplus(B - 48)) / 2),
    Case(
        "fdpo", {"beta": 1.0, "divergence": "chi2_kl"}, (softplus(3.75 + 4 * B) + softplus(-3.5 - 3 * B)) / 2
    ),
    Case("fdpo", {"beta": 1.0, "divergence": "chi2_kl", "clip": 1.0}, (softplus(1) + softplus(-1)) / 2),
    Case("fdpo", {"beta": 1.0, "divergence": "squared"}, (softplus(8.5 * B) + softplus(-2.5 * B)) / 2),
    Case("fdpo", {"beta": 1.0}, (LOG5 + math.log(17 / 12)) / 2),
    Case("fdpo", {"beta": 1.0, "divergence": "forward_kl"}, (softplus(3.75) + softplus(-1.75)) / 2),
    Case(
        "fdpo",
        {"beta": 1.0, "divergence": "forward_kl", "cap": B},
        (softplus(1.75 + 2 * B) + softplus(-1.75)) / 2,
    ),
    Case(
        "fdpo",
        {"beta": 1.0, "divergence": "alpha", "alpha": 0.5},
        (softplus(3) + softplus(1 - 2 * math.sqrt(2))) / 2,
    ),
    Case("sft", {}, 3.5 * B),
    Case("sft", {"token_mean": True}, 1.75 * B),
    Case("cpo", {}, (math.log1p(2**0.1) + math.log1p(2**-0.2)) / 2 + 1.75 * B),
    Case("cpo", {"beta": 1.0, "nll_weight": 0.0}, math.log(3.75) / 2),
    Case("cpo", {"beta": 1.0, "nll_weight": 0.0, "label_smoothing": 0.25}, math.log(3.75) / 2 + 0.125 * B),
    Case("slic", {}, (1 + B) / 2),
    Case("slic", {"beta": 1 / (4 * B), "nll_weight": 2.0}, 0.875 + 3.5 * B),
    Case("orpo", {}, 1.75 * B + 0.05 * (B + math.log(26 / 21))),
    Case("orpo", {"beta": 1.0}, 1.75 * B + (B + math.log(26 / 21)) / 2),
    Case("rdpo", {}, (softplus(0.4 * B - 0.01) + math.log1p(2**-0.3)) / 2),
    Case("rdpo", {"beta": 1.0, "alpha": B}, LOG9 - 1.5 * B),
    Case("dpop", {}, (math.log1p(2**31.2) + math.log1p(2**-0.9)) / 2),
    Case("dpop", {"beta": 1.0, "penalty": 0.5}, (math.log(33) + LOG9 - 3 * B) / 2),
    Case("nca", {"beta": 1.0}, LOG5 + 0.75 * math.log(1.25) + 0.25 * math.log(1.5)),
    Case(
        "exo",
        {"beta": 1.0, "label_smoothing": 0.25},
        (math.log(4 / 51) + 16 * math.log(64 / 17)) / 34 + (8 * math.log(32 / 27) + math.log(4 / 9)) / 18,
    ),
    Case("kto", {"beta": 1.0}, 8 / 15),
    Case("kto", {"beta": 1.0, "desirable_weight": 2.0}, 47 / 60),
    Case("kto", {"beta": 1.0, "undesirable_weight": 0.5}, 47 / 120),
    Case("apo_zero", {"beta": 1.0}, 16 / 15),
    Case("apo_down", {"beta": 1.0}, 157 / 153),
    Case("cal_dpo", {"beta": 1 / (2 * B)}, (LOG17 + LOG9 - 3 * B + 19 * B**2) / 2),
    Case("simper", {}, -3 / 128),
    Case("ddro", {"cap": 1.0}, 6 * B - math.log(3) / 2),
    Case("ddro", {"cap": 1.0, "length_normalized": True}, 4.5 * B - math.log(3) / 2),
    Case("sppo_hard", {"beta": 1 / (2 * B)}, 9.5 * B**2),
    Case("bpo", {"beta": 1.0, "power": 0.0, "scale": 1.0}, (16 + 1 / 8 + B) / 2),
    Case("bpo", {"beta": 1.0, "power": 1.0, "cap": 6.0}, (128 + 15 / 16 + 1 / 128 - 7) / 8),
    Case("bpo", {"beta": 1.0, "power": 1.0, "cap": B}, (15 / 16 + 1 / 128 + 3 * B) / 8),
    Case("repo", {"gamma": 4 * B}, 3 * B),
    Case("discopop", {"beta": 1.0, "tau": 0.5}, (256 * LOG17 + 16) / 514 + (LOG9 - 3 * B + 8) / 130),
    Case(
        "discopop",
        {"beta": 1.0, "tau": 0.5, "cap": B},
        (256 * LOG17 + 2 + 6 * B) / 514 + (LOG9 - 3 * B + 8) / 130,
    ),
    Case("aot", {"beta": 1.0}, (B + math.log(3)) / 2),
    Case("aot", {"beta": 1.0, "label_smoothing": 0.25}, (B + math.log(3)) / 2 - B / 8),
    Case("aot_unpaired", {"beta": 1.0}, (B + math.log(3)) / 2),
    Case("aot_unpaired", {"beta": 1.0, "label_smoothing": 0.25}, (B + math.log(3)) / 2 - B / 8),
    Case("wpo", {"beta": 1.0}, (LOG17 + LOG9 - 3 * B) / 2),
    Case("bco", {"beta": 1.0}, sum(map(softplus, (2.25 * B, -1.75 * B, 1.75 * B, -1.25 * B))) / 4),
    Case(
        "bco", {"beta": 1.0, "rate": 0.5}, sum(map(softplus, (2.25 * B, -1.75 * B, 1.75 * B, -1.25 * B))) / 4
    ),
    Case(
        "alpha_dpo",
        {"beta": 1.0, "gamma": B, "alpha": math.sqrt(2), "rate": 0.5},
        (softplus(B - 1) + softplus(1 - B)) / 2,
    ),
    Case(
        "beta_dpo",
        {"beta": 1.0, "strength": 2.0, "filtered": 0.5, "rate": 0.5},
        (LOG17 + LOG9 - 3 * B) / 2,
    ),
    Case("robust_dpo", {"beta": 1.0}, (LOG17 + LOG9 - 3 * B) / 2),
    Case("robust_dpo", {"beta": 1.0, "label_smoothing": 0.25}, (LOG17 + LOG9 - 2.5 * B) / 2),
]
BY_HAND = tuple(CASES)
CASES += [Case(name, {}, math.nan) for name in OBJECTIVES if name not in {case.name for case in CASES}]
DETACHED = ("beta_dpo", "alpha_dpo")
"""Losses that hold a part of each pair's value constant, so that their gradient is not the derivative of the value."""
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def batch(*rows: tuple[int, int, float, float, int], dtype: torch.dtype = F64) -> ResponseLogps:
    """Log-probs from rows of (example, role, log π, log π_ref, number of tokens)."""
    example, role, policy, reference, length = zip(*rows, strict=True)
    return ResponseLogps.of(
        policy=torch.tensor(policy, dtype=dtype, requires_grad=True),
        reference=torch.tensor(reference, dtype=dtype),
        length=torch.tensor(length),
        role=torch.tensor(role),
        example=torch.tensor(example),
    )


def golden_batch() -> ResponseLogps:
    """Two pairs whose probabilities are powers of two; see `test_golden_values`."""
    return batch(
        (0, CHOSEN, -3 * B, -1 * B, 3),
        (0, REJECTED, -2 * B, -4 * B, 2),
        (1, CHOSEN, -4 * B, -6 * B, 1),
        (1, REJECTED, -6 * B, -5 * B, 1),
    )


def random_batch(seed: int, examples: int = 3, chosen: int = 1, rejected: int = 1) -> ResponseLogps:
    """Examples with `chosen` and `rejected` responses each, log-ratios of about one nat, 1 to 6 tokens."""
    draw = torch.Generator().manual_seed(seed)
    role = ([CHOSEN] * chosen + [REJECTED] * rejected) * examples
    example = [i for i in range(examples) for _ in range(chosen + rejected)]
    length = torch.randint(1, 7, (len(role),), generator=draw)
    reference = -length * (0.5 + torch.rand(len(role), generator=draw, dtype=F64))
    policy = reference + torch.randn(len(role), generator=draw, dtype=F64)
    return ResponseLogps.of(
        policy.requires_grad_(), reference, length, torch.tensor(role), torch.tensor(example)
    )


def rebuilt(logps: ResponseLogps, index: Tensor) -> ResponseLogps:
    """The responses at `index`, in that order."""
    parts = (logps.policy, logps.reference, logps.length, logps.role, logps.example)
    return ResponseLogps.of(*(part[index] for part in parts))


def count(term: LossTerm, logps: ResponseLogps) -> int:
    """What a step that consists of `logps` alone divides the term by."""
    return {
        "pair": len(logps.pairs),
        "chosen": len(logps.chosen),
        "rejected": len(logps.rejected),
        "response": len(logps.chosen) + len(logps.rejected),
        "token": int(logps.length[logps.chosen].sum()),
    }[term.per]


def step_loss(loss: LossFunction, logps: ResponseLogps) -> Tensor:
    """Loss of an optimizer step that consists of `logps` alone: Σ_terms Σ values / count."""
    return torch.stack([term.values.sum() / count(term, logps) for term in loss(logps)]).sum()


def sums(loss: LossFunction, logps: ResponseLogps) -> dict[str, Tensor]:
    """Σ values of each term by its name."""
    return {term.name: term.values.sum() for term in loss(logps)}


def of_the_step(case: Case, logps: ResponseLogps) -> ResponseLogps:
    """The batch as a trainer would hand it over: with the statistic of the whole step, where there is one."""
    statistic = step_statistic(case.name, case.parameters)
    return replace(logps, statistic=statistic.of(logps)) if statistic else logps


def gradient(value: Tensor, logps: ResponseLogps) -> Tensor:
    (grad,) = torch.autograd.grad(value, logps.policy)
    return grad


def assert_close(actual: Tensor | float, expected: Tensor | float, relative: float = 1e-12) -> None:
    actual, expected = torch.as_tensor(actual, dtype=F64), torch.as_tensor(expected, dtype=F64)
    torch.testing.assert_close(actual, expected, rtol=relative, atol=relative)
