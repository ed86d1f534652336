"""Losses against numbers derived by hand, and against the laws that the method's design rests on.

One table of cases (objective, parameters, golden value) feeds the tests of values, gradients, limits and
invariances.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infopo import estimators
from infopo.errors import RecipeError
from infopo.losses import moving
from infopo.losses.catalog import OBJECTIVES, complete_parameters
from infopo.losses.common import capped_exp
from infopo.losses.registry import FUNCTIONS, LossFunction, loss_function, step_statistic
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


# --- golden values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", BY_HAND, ids=str)
def test_golden_values(case: Case) -> None:
    """Every objective on two pairs, by hand. b = log 2.

    | pair | log π(w) | log π_ref(w) | |w| | log π(l) | log π_ref(l) | |l| | log r(w) | log r(l) | Δ   |
    |------|----------|--------------|-----|----------|--------------|-----|----------|----------|-----|
    | 1    | -3b      | -b           | 3   | -2b      | -4b          | 2   | -2b      | 2b       | -4b |
    | 2    | -4b      | -6b          | 1   | -6b      | -5b          | 1   | 2b       | -b       | 3b  |

    InfoPO, E_w[-β log π(w)] + E_l[r(l)^β]:
        β=1: (3b + 4b)/2 + (2² + 2⁻¹)/2 = 3.5b + 2.25. β=1/2: 1.75b + (2 + 2^-½)/2 = 1.75b + 1 + √2/4.
        A token: (3b/3 + 4b/1)/2 + (2^(2/2) + 2^(-1/1))/2 = 2.5b + 1.25.
        A token with β=2: 5b + (2² + 2⁻²)/2 = 5b + 2.125.
        cap=b: pair 1 is beyond it, e^b (1 + 2b - b) = 2 + 2b: 3.5b + (2 + 2b + 1/2)/2 = 4.5b + 1.25.
        cap=0: pair 1 gives 1 (1 + 2b - 0): 3.5b + (1 + 2b + 1/2)/2 = 4.5b + 0.75.
        β=2, cap=2b: the cap is on β log r(l) = 4b, so e^2b (1 + 4b - 2b) = 4 + 8b; pair 2 gives 2⁻²:
        7b + (4 + 8b + 1/4)/2 = 11b + 2.125.
    DPO, -log σ(x) = log(1 + e^-x):
        β=1: pair 1 gives log(1 + 2⁴) = log 17, pair 2 log(1 + 2⁻³) = log 9 - 3b: (log 17 + log 9 - 3b)/2.
        β=0.1 (default): (log(1 + 2^0.4) + log(1 + 2^-0.3))/2.
        ε=1/4 adds ε Δ, as -log σ(-x) = x - log σ(x): (-4b + 3b)/4 = -b/4 over both pairs.
        nll_weight=2: 2 (3b + 4b)/(3 + 1 tokens) = 3.5b. (A mean over responses gives 7b, a mean of means 5b.)
        nll_weight=1/2: a quarter of that, so (log 17 + log 9 - 3b)/2 + 7b/8.
    IPO, target 1/(2β) = b:
        A token: pair 1 -2b/3 - 2b/2 = -5b/3, pair 2 2b/1 + b/1 = 3b: ((-8b/3)² + (2b)²)/2 = 50b²/9.
        Sums: ((-4b - b)² + (3b - b)²)/2 = 14.5b².
    Hinge:
        1/β = 4b: (max(0, 1 + 1) + max(0, 1 - 3/4))/2 = 9/8.
        1/β = 2b: (max(0, 1 + 2) + max(0, 1 - 3/2))/2 = 3/2.
    SimPO, γ=b: log-probs a token are -b, -b and -4b, -6b, so margins 0 and 2b.
        β=1: x = -b, b: (log 3 + log(3/2))/2 = log 3 - b/2.
        β=2: x = -b, 3b: (log 3 + log(9/8))/2 = 3 (log 3 - b)/2.
    SFT: (3b + 4b)/2 = 3.5b; over tokens (3b + 4b)/(3 + 1) = 1.75b.
    InfoNCE with one rejected response is DPO:
        β=1 as there; β=2: log(1 + 2⁸), log(1 + 2⁻⁶). A token: f = -2b/3, b and 2b, -b: log(1 + 2^(5/3)), log(9/8).
    Interpolated, M=1, α=1/2, so a₀ = (r(w)^β + 1)/2 and a = (r(l)^β + 1)/2:
        β=1: a₀ = 5/8, 5/2: (log 5/8 + 2b + log 5/2 - 2b)/2 = log 5/4; 4/(5/2) = 8/5, (1/2)/(3/4) = 2/3: 17/15.
        α=0: InfoPO with its constant: (2b - 2b)/2 + (4 + 1/2)/2. cap=b: (2 + 2b)/(5/2) in the place of 8/5.
        β=2: a₀ = 17/32, 17/2: log 17/8; 16/(17/2) = 32/17, (1/4)/(5/8) = 2/5: 97/85.
        A token: a₀ = (2^(-2/3) + 1)/2, 5/2 with f(w) = -2b/3, 2b; 2/(3/2) = 4/3, 2/3: mean 1.
    JS: log(1 + r(w)^-β) + log(1 + r(l)^β):
        β=1: (log 5 + log 5/4)/2 = log 5 - b; (log 5 + log 3/2)/2. β=2: log 17, log 17/16; log 17, log 5/4.
        A token: log(1 + 2^(2/3)), log 5/4; log 3, log 3/2: 5/4 · 3 · 3/2 = 5.625.
    χ²: -2(r(w)^β - 1) + r(l)^2β - 1:
        β=1: 3/2, -6; 15, -3/4. β=1/2: 1, -2; 3, -1/2. A token: 2 - 2^(1/3), -6; 3, -3/4.
        cap=b: 3/2, -2(2(1 + b) - 1) = -2 - 4b; 4(1 + 4b - 2b) - 1 = 3 + 8b, -3/4.
    Hellinger: r(w)^(-β/2) - 1 + r(l)^(β/2) - 1:
        β=1: 1, -1/2; 1, 2^-½ - 1. β=2: 3, -3/4; 3, -1/2. A token: 2^(1/3) - 1, -1/2; √2 - 1, 2^-½ - 1.
        cap=b, beyond b/2 in the exponent: √2 (1 + b/2) - 1, -1/2; √2 (1 + b/2) - 1, 2^-½ - 1.
    DV, E_w[-f] + log E_l[e^f], and MINE, whose m is the batch's mean where nobody has kept one:
        β=1: 0 + log((4 + 1/2)/2). β=2: log((16 + 1/4)/2). A token: -(-2b/3 + 2b)/2 + log((2 + 1/2)/2).
        SMILE, τ=b: 4 becomes 2. MINE, cap=0, log m = log 9/4: e^f/m = 16/9 becomes 1 + log 16/9, 2/9 stays:
        log 9/4 + (1 + log 16/9 + 2/9)/2 - 1 = log 3 - 7/18.
    f-DPO at β=1:
        JS: 2r/(1+r) = 2/5, 8/5 and 8/5, 2/3: margins -2b, log 12/5. Forward KL: 1 - 1/r = -3, 3/4 and 3/4, -1.
        cap=b: 1/r(w) = 4 becomes 2(1 + b). α=1/2: 2(1 - r^-½) = -2, 1 and 1, 2 - 2√2.
    CPO: δ = -b, 2b. β=1: log 3, log 5/4. ε=1/4 adds ε δ, b/8 in the mean. nll_weight=1: 7b/4.
    SLiC: β=1: 1 + b, max(0, 1 - 2b) = 0. 1/β = 4b: 5/4, 1/2.
    ORPO: p = 1/2, 1/2 and 1/16, 1/64: odds 1, 1 and 1/15, 1/63, ratios 1 and 21/5: log 2, log 26/21.
    R-DPO, |w| - |l| = 1, 0: α=b, β=1: -4b + b = -3b and 3b: log 9, log 9/8.
    DPOP: -log r(w) = 2b falls in pair 1 alone. β=1, λ=1/2: Δ - b = -5b: log 33. λ=50, β=0.3: 0.3 · 104b = 31.2b.
    NCA, f = -2b, 2b and 2b, -b: log 5 + ½ log 5/4 + ½ log 5, log 5/4 + ½ log 5 + ½ log 3/2.
    EXO, ε=1/4: q = 1/17, 8/9: (log 4/51 + 16 log 64/17)/17, (8 log 32/27 + log 4/9)/9.
    KTO, z=0 without mismatched responses: 4/5, 1/5 and 4/5, 1/3: (λ_w + λ_l 17/15)/4.
    APO-zero: (4/5 + 1/5)/2 + (4/5 + 1/3)/2 = 16/15. APO-down: 1/5 + 16/17, 4/5 + 1/9: 157/153.
    Cal-DPO, target b: 9b² + 9b², b² + 0, beside DPO's terms.
    Robust DPO, ε=1/4: (3/4 log 17 - 1/4 (log 17 - 4b))/(1/2) = log 17 + 2b, and log 9 - 4.5b.
    DPO a token, β=1: f = -2b/3 - b, 2b + b, as InfoNCE there. λ=1/2: -2b - b = -3b, 2b + b/2.
    AlphaPO, α=β=1, γ=b: ρ = 1 - 1/p = -1, -1 and -15, -63: x = -b, 48 - b.
    χPO: r + log r: 1/4 - 2b - 4 - 2b, 4 + 2b - 1/2 + b. SquaredPO: log r / r: -8b - b/2, b/2 + 2b.
    SimPER: p = 1/2, 1/2 and 1/16, 1/64: -(1/2 + 1/16)/2 + (1/2 + 1/64)/2.
    DDRO, cap=1: the edge is r = 1, where the value is b: b + 2b, and -log 3/4 = 2b - log 3, beside 3.5b.
        A token: r = 2: b + b, beside 2.5b.
    SPPO, target b: 9b² + 9b², b² + 0.
    BPO: R = 16, 1/8. KLIEP: 16 + 4b, 1/8 - 3b. λ=1, s=4: (R²/2 - 1/R + 1)/4: 128 - 1/16 + 1, 1/128 - 8 + 1.
        cap=b: R² = 256 becomes 2(1 + 8b - b), and 1/R = 8 becomes 2(1 + 3b - b).
    AOT: margins -b, 2b against the reference's 3b, -b in order, -b, 3b: 0, -b. Unpaired: -2b, 2b against -b, 2b: -b, 0.
        ε=1/4 adds ε Δ: -b/4 over both.
    BCO: δ = (-2b + 2b + 2b - b)/4 = b/4: -2.25b, 1.75b, -1.75b, 1.25b.
    WPO without a trainer: weights 1, DPO.
    α-DPO: δ = 0, 2b; δ - δ_ref = -2b/3 - b, 2b + b, mean 2b/3, deviation √2 7b/3: z = -1/√2, 1/√2.
    β-DPO: Δ = -4b, 3b are equally far from their mean, so p = 1 - ρ, β' = β: DPO.
    RePO: margins 0, 2b. DiscoPOP, τ=1/2: m = 1/257, 64/65. cap=b: 16 becomes 2(1 + 4b - b).
    """
    assert_close(step_loss(case.loss, golden_batch()).detach(), case.golden)


def test_every_parameter_has_a_golden_value() -> None:
    """Of the objectives in the table above. Another has the example in its docstring, which `test_docstrings` runs."""
    covered = {(case.name, key) for case in BY_HAND for key in case.parameters}
    names = {case.name for case in BY_HAND}
    assert covered == {(name, key) for name in names for key in OBJECTIVES[name].parameters}
    assert all(">>>" in (FUNCTIONS[name].__doc__ or "") for name in OBJECTIVES)


def test_wpo_weighs_a_pair_by_the_agreement_of_both_responses_and_without_a_gradient() -> None:
    """Agreements -b, 0 and -b, -2b: weights 1/2 and 1/8."""
    agreement = torch.tensor([-B, 0.0, -B, -2 * B], dtype=F64)
    logps = replace(golden_batch(), agreement=agreement)
    value = step_loss(loss_function("wpo", {"beta": 1.0}), logps)
    assert_close(value.detach(), (LOG17 / 2 + (LOG9 - 3 * B) / 8) / 2)
    plain = gradient(step_loss(loss_function("dpo", {"beta": 1.0}), logps), logps)
    assert_close(gradient(value, logps), plain * torch.tensor([0.5, 0.5, 0.125, 0.125], dtype=F64))


def test_beta_dpo_with_a_given_statistic_by_hand() -> None:
    """Δ = -4b, 3b; m = 3b, s² = 49b²/2b: e^(-(7b)²/2s²) = 1/2. c = 1: p = 1/2, 1. ρ = 1/4: p/(1-ρ) = 2/3, 4/3.

    The mean of Δ over kept pairs is 2b, β = 2, a = 1/2b: β' = 2 (1 - 1/2) = 1.
    """
    statistic = torch.tensor([3 * B, 7 * B / math.sqrt(2 * B), 1.0, 2 * B], dtype=F64)
    loss = loss_function("beta_dpo", {"beta": 2.0, "strength": 1 / (2 * B), "filtered": 0.25})
    value = step_loss(loss, replace(golden_batch(), statistic=statistic))
    assert_close(value.detach(), (2 / 3 * LOG17 + 4 / 3 * (LOG9 - 3 * B)) / 2)
    strong = loss_function("beta_dpo", {"beta": 2.0, "strength": 100.0, "filtered": 0.25})
    least = step_loss(strong, replace(golden_batch(), statistic=statistic))
    assert_close(least.detach(), (2 / 3 * softplus(4e-3 * B) + 4 / 3 * softplus(-3e-3 * B)) / 2)


@pytest.mark.parametrize(
    ("share", "factor", "kept"),
    [(2 / 3, 1.0, [1, 0.5, 0.5]), (5 / 6, 1.5, [1, 0.75, 0.75]), (1.0, 2.0, [1, 1, 1])],
)
def test_the_pairs_that_beta_dpo_keeps_are_a_share_of_the_step(
    share: float, factor: float, kept: list[float]
) -> None:
    """Weights 1/2, 1, 1/2 of margins -1, 0, 1 about 0: the probabilities min(1, c w) add up to the share of 3."""
    margins = torch.tensor([-1.0, 0.0, 1.0], dtype=F64)
    found, mean = moving._kept(
        share, margins, torch.zeros((), dtype=F64), torch.tensor(1 / math.sqrt(2 * B), dtype=F64)
    )
    assert_close(found, factor)
    assert_close(mean, 0.0)
    assert sum(kept) == pytest.approx(3 * share)


@given(
    margins=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12),
    filtered=st.sampled_from([0.0, 0.2, 0.5, 0.9]),
)
def test_the_probabilities_of_beta_dpo_add_up_whatever_the_margins_are(
    margins: list[float], filtered: float
) -> None:
    n = len(margins)
    logps = batch(
        *[(i, CHOSEN, x, 0.0, 1) for i, x in enumerate(margins)],
        *[(i, REJECTED, 0.0, 0.0, 1) for i in range(len(margins))],
    )
    mean, deviation, factor, kept_mean = moving.moving_margins(filtered=filtered, rate=0.1).of(logps)
    closeness = moving._closeness(moving.log_ratio_margins(logps).detach(), mean, deviation)
    probability = (factor * closeness).clamp(max=1)
    assert_close(probability.sum(), (1 - filtered) * n, relative=1e-6)
    assert min(margins) - 1e-6 <= kept_mean <= max(margins) + 1e-6


# --- gradients and limits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in DETACHED], ids=str)
@pytest.mark.parametrize(("chosen", "rejected"), [(1, 1), (2, 3)])
def test_gradient_is_the_derivative_of_the_value(case: Case, chosen: int, rejected: int) -> None:
    logps = of_the_step(case, random_batch(seed=0, chosen=chosen, rejected=rejected))
    assert torch.autograd.gradcheck(
        lambda policy: step_loss(case.loss, replace(logps, policy=policy)), logps.policy
    )


@every_case
@pytest.mark.parametrize("chosen_ratio", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize("rejected_ratio", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_extreme_log_ratios_give_finite_values_and_gradients(
    case: Case, chosen_ratio: float, rejected_ratio: float, dtype: torch.dtype
) -> None:
    logps = batch(
        (0, CHOSEN, chosen_ratio - 20, -20.0, 4), (0, REJECTED, rejected_ratio - 30, -30.0, 5), dtype=dtype
    )
    value = step_loss(case.loss, logps)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient(value, logps)).all()


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_values_keep_the_dtype_of_the_policy(case: Case, dtype: torch.dtype) -> None:
    logps = batch((0, CHOSEN, -1.0, -2.0, 3), (0, REJECTED, -2.0, -3.0, 7), dtype=dtype)
    assert {term.values.dtype for term in case.loss(logps)} == {dtype}


@pytest.mark.parametrize("beta", [0.01, 0.1, 3.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_dpo_at_zero_margin_is_log_2(beta: float, label_smoothing: float) -> None:
    """Δ = 0: -(1-ε) log σ(0) - ε log σ(0) = log 2, and the slope in log π(w) is -β (1 - 2ε)/2."""
    logps = batch((0, CHOSEN, -1.0, -3.0, 4), (0, REJECTED, -5.0, -7.0, 2))
    value = step_loss(loss_function("dpo", {"beta": beta, "label_smoothing": label_smoothing}), logps)
    slope = beta * (1 - 2 * label_smoothing) / 2
    assert_close(value.detach(), B)
    assert_close(gradient(value, logps), torch.tensor([-slope, slope], dtype=F64))


@pytest.mark.parametrize(("margin", "value", "slope"), [(1.9, 0.05, -0.5), (2.1, 0.0, 0.0), (1e6, 0.0, 0.0)])
def test_hinge_is_zero_once_the_margin_is_beyond_one_over_beta(
    margin: float, value: float, slope: float
) -> None:
    """β = 1/2: the kink is at 2 nats; before it the loss is 1 - margin/2 with slope -β, beyond it flat."""
    logps = batch((0, CHOSEN, margin - 4, -4.0, 4), (0, REJECTED, -5.0, -5.0, 2))
    actual = step_loss(loss_function("hinge", {"beta": 0.5}), logps)
    assert_close(actual.detach(), value)
    assert_close(gradient(actual, logps), torch.tensor([slope, -slope], dtype=F64))


def test_ipo_is_zero_exactly_at_its_target_margin() -> None:
    logps = batch((0, CHOSEN, -1.0, -3.0, 1), (0, REJECTED, -5.0, -2.0, 1))  # Δ = 2 + 3
    value = step_loss(loss_function("ipo", {"beta": 0.1}), logps)  # target 1/(2 · 0.1) = 5
    assert_close(value.detach(), 0.0)
    assert_close(gradient(value, logps), torch.zeros(2, dtype=F64))


# --- the capped exponential ---------------------------------------------------------------------------------


def value_and_slope(z: float, cap: float, dtype: torch.dtype = F64) -> tuple[float, float]:
    at = torch.tensor([z], dtype=dtype, requires_grad=True)
    value = capped_exp(at, cap)
    (slope,) = torch.autograd.grad(value.sum(), at)
    return value.item(), slope.item()


@given(z=st.floats(-50, 50), cap=st.floats(0, 20))
def test_capped_exp_is_exp_up_to_the_cap_and_its_tangent_beyond(z: float, cap: float) -> None:
    value, slope = value_and_slope(z, cap)
    expected = math.exp(z) if z <= cap else math.exp(cap) * (1 + z - cap)
    assert_close(value / expected, 1.0)
    assert_close(slope / math.exp(min(z, cap)), 1.0)


@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_capped_exp_meets_its_tangent_at_the_cap(cap: float) -> None:
    assert_close(torch.tensor(value_and_slope(cap, cap)), torch.tensor([math.exp(cap)] * 2))


@pytest.mark.parametrize(
    ("dtype", "cap"), [(torch.float32, 89.0), (torch.float32, 1e6), (F64, 710.0), (F64, 1e300)]
)
def test_a_cap_that_never_binds_is_plain_exp(dtype: torch.dtype, cap: float) -> None:
    """Also where e^cap itself is not representable: "no cap" must not turn gradients into NaN."""
    for z in (-3.0, 0.0, 2.0, 40.0):
        value, slope = value_and_slope(z, cap, dtype)
        assert_close(value / math.exp(z), 1.0, relative=1e-6)
        assert_close(slope / math.exp(z), 1.0, relative=1e-6)


def test_infopo_with_a_large_cap_is_the_plain_loss() -> None:
    logps = random_batch(seed=1)
    plain = (-logps.policy[logps.chosen]).mean() + (logps.policy - logps.reference)[
        logps.rejected
    ].exp().mean()
    capped = step_loss(loss_function("infopo", {"cap": 1e4}), logps)
    assert_close(capped.detach(), plain.detach())
    assert_close(gradient(capped, logps), gradient(plain, logps))


# --- laws of the method -------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("length_normalized", [False, True])
@pytest.mark.parametrize("cap", [0.1, 5.0])
def test_infopo_pushes_chosen_up_by_one_and_rejected_down_by_their_ratio(
    beta: float, length_normalized: bool, cap: float
) -> None:
    """With s = β (or β/|y|): ∂L/∂log π(w) = -s; ∂L/∂log π(l) = s r^s up to the cap, s e^c beyond it.

    For the paper's loss (s = 1) that is -1 and r_l. Per response, before the step's mean.
    """
    logps = random_batch(seed=2, examples=6, chosen=1, rejected=2)
    parameters = {"beta": beta, "length_normalized": length_normalized, "cap": cap}
    actual = gradient(torch.cat([t.values for t in loss_function("infopo", parameters)(logps)]).sum(), logps)
    scale = (
        beta / logps.length.double()
        if length_normalized
        else torch.tensor(beta, dtype=F64).expand(len(actual))
    )
    exponent = (scale * (logps.policy - logps.reference)).detach()
    assert cap > 1 or (exponent[logps.rejected] > cap).any(), "the small cap has to bind somewhere"
    expected = torch.where(logps.role == CHOSEN, -scale, scale * exponent.clamp(max=cap).exp())
    assert_close(actual, expected)


@given(chosen=st.floats(-200, 0), rejected=st.floats(-200, 0))
def test_infopo_at_the_reference_is_one_minus_log_pi(chosen: float, rejected: float) -> None:
    """π = π_ref: r(l) = 1, so L = -log π(w) + 1."""
    logps = batch((0, CHOSEN, chosen, chosen, 4), (0, REJECTED, rejected, rejected, 2))
    assert_close(step_loss(loss_function("infopo"), logps).detach(), 1 - chosen)


def test_infopo_push_on_a_rejected_response_fades_as_it_becomes_unlikely() -> None:
    slopes = [
        gradient(step_loss(loss_function("infopo"), logps), logps)[1].item()
        for ratio in (1.0, 0.0, -1.0, -10.0, -1000.0)
        for logps in [batch((0, CHOSEN, -1.0, -1.0, 1), (0, REJECTED, ratio - 2, -2.0, 1))]
    ]
    assert slopes == sorted(slopes, reverse=True)
    assert slopes[-1] == 0


@pytest.mark.parametrize("pair", [0, 1])
def test_dpo_gradient_weighs_a_pair_by_the_probability_of_its_wrong_order(pair: int) -> None:
    """∂L/∂log π(w) = -β σ(-β Δ), DPO's eq. 7: at β = 1 and Δ = -4b, 3b, σ(-Δ) = 16/17 and 1/9."""
    logps = golden_batch()
    values = loss_function("dpo", {"beta": 1.0})(logps)[0].values
    weight = (16 / 17, 1 / 9)[pair]
    expected = torch.zeros(4, dtype=F64)
    expected[2 * pair : 2 * pair + 2] = torch.tensor([-weight, weight], dtype=F64)
    assert_close(gradient(values[pair], logps), expected)


# --- laws of the family -------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**16), beta=st.floats(0.05, 3))
def test_infonce_with_one_rejected_is_dpo_at_the_same_beta(seed: int, beta: float) -> None:
    logps = random_batch(seed)
    ours = step_loss(loss_function("infonce", {"beta": beta}), logps)
    dpo = step_loss(loss_function("dpo", {"beta": beta}), logps)
    assert_close(ours.detach(), dpo.detach())
    assert_close(gradient(ours, logps), gradient(dpo, logps))


def test_infonce_compares_with_all_rejected_of_the_prompt_and_no_others() -> None:
    """r = 1 against 2 and 5: log(1 + 2 + 5); r = 3 against 1: log(4/3)."""
    logps = batch(
        (0, CHOSEN, 0.0, 0.0, 1),
        (0, REJECTED, math.log(2), 0.0, 1),
        (1, CHOSEN, math.log(3), 0.0, 1),
        (1, REJECTED, 0.0, 0.0, 1),
        (0, REJECTED, math.log(5), 0.0, 1),
    )
    (term,) = loss_function("infonce")(logps)
    assert term.per == "chosen"
    assert_close(term.values.detach(), torch.tensor([math.log(8), math.log(4 / 3)], dtype=F64))


@pytest.mark.parametrize("beta", [0.5, 1.0])
@pytest.mark.parametrize("length_normalized", [False, True])
@pytest.mark.parametrize("rejected", [1, 2, 4])
def test_members_of_the_family_are_minus_their_bounds(
    beta: float, length_normalized: bool, rejected: int
) -> None:
    """Against `estimators`, with one chosen and K rejected responses a prompt and no log-ratio beyond the cap."""
    logps = random_batch(seed=3, examples=5, rejected=rejected)
    f = beta * (logps.policy - logps.reference).detach()
    f = f / logps.length if length_normalized else f
    joint, marginal = f[logps.chosen], f[logps.rejected]
    table = marginal.reshape(5, rejected)
    parameters = {"beta": beta, "length_normalized": length_normalized}
    dropped = (logps.reference * beta / (logps.length if length_normalized else 1))[logps.chosen].mean()
    expected = {
        "infopo": 1 - dropped - estimators.nwj(joint, marginal),
        "infonce": math.log(1 + rejected) - estimators.infonce(joint, table),
        "interpolated": 1 - estimators.interpolated(joint, table, 0.5),
        "js": 2 * (math.log(2) - estimators.jensen_shannon(joint, marginal)),
        "chi2": -estimators.pearson_chi2(joint, marginal),
        "hellinger": -estimators.squared_hellinger(joint, marginal),
        "dv": -estimators.donsker_varadhan(joint, marginal),
        "smile": -estimators.smile(joint, marginal, tau=5.0),
        "mine": -estimators.mine(joint, marginal)[0],
    }
    assert set(expected) == {name for name, objective in OBJECTIVES.items() if objective.bound}
    for name, value in expected.items():
        assert_close(step_loss(loss_function(name, parameters), logps).detach(), value)


SLOPES: dict[str, Callable[[int], float]] = {
    "infonce": lambda k: k / (1 + k),
    "interpolated": lambda k: 1 - 0.5 / k,
    "js": lambda k: 0.5,
    "chi2": lambda k: 2.0,
    "hellinger": lambda k: 0.5,
    "dv": lambda k: 1.0,
    "smile": lambda k: 1.0,
    "mine": lambda k: 1.0,
    "ddro": lambda k: 1.0,
}
"""Gradient at π = π_ref relative to InfoPO's, with K rejected responses a prompt (docstrings of `losses/`)."""


@pytest.mark.parametrize("name", SLOPES)
@pytest.mark.parametrize("rejected", [1, 3])
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_at_the_reference_every_member_of_the_family_pulls_as_infopo_does(
    name: str, rejected: int, beta: float
) -> None:
    logps = random_batch(seed=4, examples=3, rejected=rejected)
    at_reference = replace(logps, policy=logps.reference.clone().requires_grad_())
    parameters = {"beta": beta}
    if name == "ddro":  # which has no β
        parameters, beta = {}, 1.0
    ours = gradient(step_loss(loss_function(name, parameters), at_reference), at_reference)
    infopos = gradient(step_loss(loss_function("infopo", {"beta": beta}), at_reference), at_reference)
    assert infopos.abs().min() > 0
    assert_close(ours, SLOPES[name](rejected) * infopos)


@pytest.mark.parametrize(
    ("name", "parameters", "other", "factor"),
    [
        ("beta_dpo", {"beta": 0.3}, ("dpo", {"beta": 0.3}), 1.0),
        ("alpha_dpo", {"beta": 3.0, "gamma": 0.7}, ("simpo", {"beta": 3.0, "gamma": 0.7}), 1.0),
        ("bco", {"beta": 0.3}, ("js", {"beta": 0.3}), 0.5),
        ("bco", {"beta": 0.3}, ("infopo", {"beta": 0.3}), 0.25),
    ],
)
def test_at_the_reference_a_loss_with_moving_statistics_pulls_as_the_one_it_extends(
    name: str, parameters: dict[str, float], other: tuple[str, dict[str, float]], factor: float
) -> None:
    """Rounding, of 1e-6 nat here, is no spread of margins."""
    logps = random_batch(seed=4, examples=5)
    rounding = 1e-6 * torch.randn(len(logps.reference), generator=torch.Generator().manual_seed(0), dtype=F64)
    at_reference = replace(logps, policy=(logps.reference + rounding).requires_grad_())
    ours = gradient(step_loss(loss_function(name, parameters), at_reference), at_reference)
    theirs = gradient(step_loss(loss_function(*other), at_reference), at_reference)
    assert_close(ours, factor * theirs, relative=1e-3)


def test_bco_does_not_see_a_shift_of_all_rewards_and_js_does() -> None:
    logps = random_batch(seed=6, examples=5)
    shifted = replace(logps, reference=logps.reference - 0.7)
    values = [
        step_loss(loss_function(name, {"beta": 1.0}), each).detach()
        for name in ("bco", "js")
        for each in (logps, shifted)
    ]
    assert_close(values[0], values[1])
    assert abs(values[2] - values[3]) > 1e-3


def test_beta_dpo_without_its_parts_is_dpo_and_alpha_dpo_is_simpo() -> None:
    logps = random_batch(seed=6, examples=5)
    for ours, theirs in (
        (("beta_dpo", {"filtered": 0.0, "strength": 0.0}), ("dpo", {})),
        (("alpha_dpo", {"alpha": 0.0}), ("simpo", {})),
    ):
        values = [step_loss(loss_function(*each), logps) for each in (ours, theirs)]
        assert_close(values[0].detach(), values[1].detach(), relative=1e-7)
        assert_close(gradient(values[0], logps), gradient(values[1], logps), relative=1e-7)


def test_alpha_dpos_margins_and_beta_dpos_strength_are_held_constant() -> None:
    """Pair by pair: -β σ(-logit)/|w| and -p/(1-ρ) β' σ(-β'Δ) in log π(w), with no gradient of z, p and β'."""
    logps = random_batch(seed=8, examples=4)
    winners = logps.pairs[:, 0]
    m, s = moving.moving_gains(rate=0.1).of(logps)
    z = (moving.mean_gains(logps).detach() - m) / s
    logit = 2 * (logps.margins(logps.policy / logps.length) - 0.3 * z).detach() - 0.5
    ours = gradient(step_loss(loss_function("alpha_dpo", {"alpha": 0.3}), logps), logps)
    assert_close(ours[winners], -2 * torch.sigmoid(-logit) / logps.length[winners] / 4)

    m, s, c, mean = moving.moving_margins(filtered=0.2, rate=0.1).of(logps)
    margins = moving.log_ratio_margins(logps).detach()
    p = (c * torch.exp(-0.5 * ((margins - m) / s) ** 2)).clamp(max=1)
    beta = 0.1 * (1 + 0.6 * (mean - m))
    ours = gradient(step_loss(loss_function("beta_dpo"), logps), logps)
    assert_close(ours[winners], -p / 0.8 * beta * torch.sigmoid(-beta * margins) / 4)


@pytest.mark.parametrize("power", [0.0, 0.5, 2.0])
def test_bpo_at_the_reference_pulls_as_dpo_does(power: float) -> None:
    logps = random_batch(seed=4)
    at_reference = replace(logps, policy=logps.reference.clone().requires_grad_())
    ours, dpos = (
        gradient(step_loss(loss_function(name, parameters), at_reference), at_reference)
        for name, parameters in (("bpo", {"beta": 0.3, "power": power}), ("dpo", {"beta": 0.3}))
    )
    assert_close(ours, dpos)


def test_bpos_kliep_is_the_bound_of_infopo_with_the_critic_of_the_pair() -> None:
    """NWJ: 1 + E[f] - E[e^f] under the order (w, l), and the same pair in the wrong order as the other law."""
    logps = random_batch(seed=3, examples=6)
    x = 0.3 * logps.margins(logps.policy - logps.reference)
    ours = step_loss(loss_function("bpo", {"beta": 0.3, "power": 0.0, "scale": 1.0}), logps)
    assert_close(ours.detach(), (1 - estimators.nwj(x, -x)).detach())
    near = step_loss(loss_function("bpo", {"beta": 0.3, "power": 1e-9, "scale": 1.0}), logps)
    assert_close(near.detach(), ours.detach(), relative=1e-6)


def test_ddro_stays_below_twice_the_reference_and_is_half_of_a_classifier() -> None:
    """-log(r/2) - log(1 - r/2) is the loss of a classifier with the probability r/2: p_w/(p_w + p_l) at its optimum."""
    logps = batch((0, CHOSEN, -1.0, -1.2, 2), (0, REJECTED, -3.0, -2.5, 2))
    share = (logps.policy - logps.reference).exp() / 2
    expected = -torch.log(share[0]) - torch.log(1 - share[1])
    value = step_loss(loss_function("ddro"), logps)
    assert_close(value.detach() + logps.reference[0] + math.log(2), expected.detach())
    pushes = []
    for log_ratio in (0.5, math.log(2), 1.0, 3.0):
        near = batch((0, CHOSEN, -1.0, -1.0, 1), (0, REJECTED, log_ratio - 5, -5.0, 1))
        pushes.append(gradient(step_loss(loss_function("ddro", {"cap": 20.0}), near), near)[1].item())
    assert pushes == sorted(pushes)
    assert pushes[1:] == pytest.approx([20.0] * 3)


def test_dpo_shift_at_1_and_alphapo_near_0_are_what_they_extend() -> None:
    logps = random_batch(seed=6)
    assert torch.equal(
        step_loss(loss_function("dpo", {"rejected_weight": 1.0}), logps),
        step_loss(loss_function("dpo"), logps),
    )
    near, simpo = (step_loss(loss_function("simpo", p), logps) for p in ({"alpha": 1e-8}, {}))
    assert_close(near.detach(), simpo.detach(), relative=1e-6)


def test_repo_is_simpo_whose_beta_is_large() -> None:
    logps = random_batch(seed=6, examples=5)
    simpo = step_loss(loss_function("simpo", {"beta": 1e6, "gamma": 0.5e6}), logps)
    assert_close(simpo.detach() / 1e6, step_loss(loss_function("repo", {"gamma": 0.5}), logps).detach(), 1e-5)


def test_discopop_is_logistic_for_wrong_orders_and_exponential_for_right_ones() -> None:
    for margin, curve in ((-3.0, softplus(3.0)), (3.0, math.exp(-3.0))):
        logps = batch((0, CHOSEN, margin - 4, -4.0, 4), (0, REJECTED, -5.0, -5.0, 2))
        assert_close(step_loss(loss_function("discopop", {"beta": 1.0}), logps).detach(), curve)


def test_sppo_is_zero_exactly_at_its_targets() -> None:
    logps = batch((0, CHOSEN, -1.0, -6.0, 1), (1, REJECTED, -8.0, -3.0, 1))
    value = step_loss(loss_function("sppo_hard", {"beta": 0.1}), logps)
    assert_close(value.detach(), 0.0)


def test_simper_at_equal_perplexities_is_zero_and_pulls_by_probability() -> None:
    """p = e^-1 on both sides: 0; the slope in log π is p/|y|."""
    logps = batch((0, CHOSEN, -2.0, math.nan, 2), (0, REJECTED, -4.0, math.nan, 4))
    value = step_loss(loss_function("simper"), logps)
    assert_close(value.detach(), 0.0)
    assert_close(gradient(value, logps), torch.tensor([-math.exp(-1) / 2, math.exp(-1) / 4], dtype=F64))


@pytest.mark.parametrize(("divergence", "slope"), [("chi2_kl", 2.0), ("squared", 1.0), ("js", 0.5)])
def test_f_dpo_at_the_reference_pulls_as_dpo_by_its_curvature(divergence: str, slope: float) -> None:
    """d φ'(e^z)/dz at z = 0: e^z + 1 = 2, (1 - z)/e^z = 1, 1/2."""
    logps = random_batch(seed=4)
    at_reference = replace(logps, policy=logps.reference.clone().requires_grad_())
    ours = gradient(step_loss(loss_function("fdpo", {"divergence": divergence}), at_reference), at_reference)
    dpos = gradient(step_loss(loss_function("dpo"), at_reference), at_reference)
    assert_close(ours, slope * dpos)


def test_interpolated_at_alpha_0_is_infopo() -> None:
    logps = random_batch(seed=5, examples=3, rejected=3)
    ours = step_loss(loss_function("interpolated", {"alpha": 0.0, "cap": 0.3}), logps)
    infopos = step_loss(loss_function("infopo", {"cap": 0.3}), logps)
    assert_close(ours.detach(), infopos.detach() + logps.reference[logps.chosen].mean())
    assert_close(gradient(ours, logps), gradient(infopos, logps))


def test_smile_whose_tau_no_score_reaches_is_donsker_varadhan() -> None:
    logps = random_batch(seed=5, examples=4, rejected=2)
    for tau, is_same in ((50.0, True), (0.3, False)):
        smile = step_loss(loss_function("smile", {"tau": tau}), logps)
        dv = step_loss(loss_function("dv"), logps)
        assert torch.equal(smile, dv) == is_same
        assert torch.equal(gradient(smile, logps), gradient(dv, logps)) == is_same


def test_mines_gradient_is_that_of_its_estimator() -> None:
    """m of the steps before, and this step's own mean at 1/4 of the weight."""
    logps = random_batch(seed=7, examples=4, rejected=2)
    before = torch.tensor(0.7, dtype=F64)
    statistic = step_statistic("mine", {"rate": 0.25})
    assert statistic is not None
    now = statistic.averaged(before, statistic.of(logps))
    f = logps.policy - logps.reference
    estimate, expected = estimators.mine(f[logps.chosen], f[logps.rejected], before, rate=0.25)
    assert_close(now, expected)
    loss = step_loss(loss_function("mine"), replace(logps, statistic=now))
    assert_close(gradient(loss, logps), -gradient(estimate, logps))
    # The value is a bound at any m, so it lies above minus DV's, which it touches at the step's own mean.
    assert float(loss.detach()) > float(-estimate.detach())


def test_donsker_varadhan_does_not_see_a_shift_of_the_critic_and_infopo_does() -> None:
    logps = random_batch(seed=8)
    shifted = replace(logps, policy=(logps.policy + 1.5).detach().requires_grad_())
    for name, sees in (("dv", False), ("infopo", True)):
        losses = [gradient(step_loss(loss_function(name), each), each) for each in (logps, shifted)]
        assert torch.allclose(*losses) != sees


@pytest.mark.parametrize("name", ["dv", "smile", "mine"])
def test_a_batch_whose_step_holds_no_rejected_response_only_pulls_chosen_up(name: str) -> None:
    logps = batch((0, CHOSEN, -1.0, -2.0, 3), (1, CHOSEN, -3.0, -2.0, 2))
    terms = loss_function(name)(logps)
    loss = torch.stack([term.values.sum() for term in terms]).sum() / 2
    assert_close(gradient(loss, logps), torch.tensor([-0.5, -0.5], dtype=F64))


def test_f_dpo_near_reverse_kl_is_dpo() -> None:
    """(1 - r^-α)/α → log r as α → 0; r^-α stays below e^20."""
    logps = random_batch(seed=6)
    f_dpo = step_loss(loss_function("fdpo", {"divergence": "alpha", "alpha": 1e-7}), logps)
    dpo = step_loss(loss_function("dpo"), logps)
    assert_close(f_dpo.detach(), dpo.detach(), relative=1e-7)


def test_apo_down_pushes_the_chosen_response_down_and_its_margin_up() -> None:
    """r(w) = 4, r(l) = 1: σ(log 4) + 1 - σ(log 4) = 1, and ∂/∂log π(l) = σ(log 4) σ(-log 4) = 4/25."""
    logps = batch((0, CHOSEN, math.log(4), 0.0, 1), (0, REJECTED, 0.0, 0.0, 1))
    value = step_loss(loss_function("apo_down", {"beta": 1.0}), logps)
    assert_close(value.detach(), 1.0)
    assert_close(gradient(value, logps), torch.tensor([0.0, 4 / 25], dtype=F64))


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.45])
def test_robust_dpo_is_dpo_on_clean_labels_in_expectation(probability: float) -> None:
    """(1-ε) L(w, l) + ε L(l, w) = DPO's loss."""
    loss = loss_function("robust_dpo", {"label_smoothing": probability})
    rows = [(0, CHOSEN, -1.0, -3.0, 4), (0, REJECTED, -5.0, -2.0, 2)]
    flipped = [(e, 1 - role, *rest) for e, role, *rest in rows]
    mean = (1 - probability) * step_loss(loss, batch(*rows)) + probability * step_loss(loss, batch(*flipped))
    assert_close(mean.detach(), step_loss(loss_function("dpo"), batch(*rows)).detach())


# --- what a loss needs, as the catalog says -----------------------------------------------------------------

layouts = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=3).filter(
    lambda examples: any(chosen and rejected for chosen, rejected in examples)
)
"""(chosen, rejected) responses of each example; at least one example has a pair."""


def drawn_batch(layout: list[tuple[int, int]], seed: int) -> ResponseLogps:
    """Random log-probs for a layout, its responses in random order, with a KL response among them."""
    draw = torch.Generator().manual_seed(seed)
    who = [(i, r) for i, (n, m) in enumerate(layout) for r in [CHOSEN] * n + [REJECTED] * m] + [(0, KL)]
    who = [who[i] for i in torch.randperm(len(who), generator=draw).tolist()]
    values = torch.randn(len(who), 2, generator=draw, dtype=F64).tolist()
    return batch(
        *((i, r, p - 9, q - 9, 1 + 3 * (i + r) % 4) for (i, r), (p, q) in zip(who, values, strict=True))
    )


def poisoned(values: Tensor, where: Tensor) -> Tensor:
    return values.detach().masked_fill(where, math.nan).requires_grad_()


@every_case
@pytest.mark.parametrize("side", SIDES)
@settings(max_examples=20, deadline=None)
@given(layout=layouts, seed=st.integers(0, 2**16))
def test_reference_sides_in_the_catalog_are_exactly_those_the_loss_depends_on(
    case: Case, side: str, layout: list[tuple[int, int]], seed: int
) -> None:
    """NaN for the reference of one side: the loss is NaN if and only if the catalog says that side is needed.

    Where it is not needed (for InfoPO: chosen), the NaN changes neither value nor gradient.
    """
    logps = drawn_batch(layout, seed)
    damaged = replace(logps, reference=poisoned(logps.reference, logps.role == SIDES[side]).detach())
    clean_value, value = step_loss(case.loss, logps), step_loss(case.loss, damaged)
    if side in OBJECTIVES[case.name].reference:
        assert torch.isnan(value)
    else:
        assert torch.equal(value, clean_value)
        assert torch.equal(gradient(value, damaged), gradient(clean_value, logps))


@every_case
@pytest.mark.parametrize("side", SIDES)
@settings(max_examples=20, deadline=None)
@given(layout=layouts, seed=st.integers(0, 2**16))
def test_policy_sides_in_the_catalog_are_exactly_those_the_loss_depends_on(
    case: Case, side: str, layout: list[tuple[int, int]], seed: int
) -> None:
    logps = drawn_batch(layout, seed)
    damaged = replace(logps, policy=poisoned(logps.policy, logps.role == SIDES[side]))
    value = step_loss(case.loss, damaged)
    if side in OBJECTIVES[case.name].sides:
        assert torch.isnan(value)
    else:
        assert torch.equal(value, step_loss(case.loss, logps))
        assert not gradient(value, damaged)[logps.role == SIDES[side]].any()


@every_case
def test_pairs_in_the_catalog_says_whether_a_lone_response_counts(case: Case) -> None:
    """A chosen and a rejected response of different prompts: two responses, no pair."""
    lone = batch((0, CHOSEN, -1.0, -2.0, 3), (1, REJECTED, -3.0, -2.0, 2))
    terms = {term.name: term for term in case.loss(lone)}
    objective = OBJECTIVES[case.name]
    if objective.pairs:
        assert not terms["preference"].values.any()
        assert len(terms["preference"].values) == (1 if case.name == "infonce" else 0)
        assert not gradient(terms["preference"].values.sum(), lone).any()
    elif case.name in ("kto", "bco"):
        assert [(len(term.values), term.per) for term in terms.values()] == [(2, "response")]
    else:
        assert set(terms) == set(objective.sides)
        assert all(len(term.values) == 1 and term.per in (name, "token") for name, term in terms.items())


@pytest.mark.parametrize("case", [case for case in CASES if case.name != "kto"], ids=str)
def test_kl_responses_are_in_no_loss_but_ktos(case: Case) -> None:
    logps = golden_batch()
    index = torch.tensor([0, 1, 2, 3, 0, 1])
    role = torch.tensor([CHOSEN, REJECTED, CHOSEN, REJECTED, KL, KL])
    more = replace(rebuilt(logps, index), policy=torch.full((6,), math.nan, dtype=F64), role=role)
    more = ResponseLogps.of(
        torch.cat([logps.policy, more.policy[4:]]), more.reference, more.length, more.role, more.example
    )
    assert torch.equal(step_loss(case.loss, more), step_loss(case.loss, logps))


def test_ktos_reference_point_is_the_mean_log_ratio_of_mismatched_responses_and_has_no_gradient() -> None:
    """log r(y') = 3, -1: z = 1; log r(w) = 2, log r(l) = 0: σ(-1) each. With 1, -3 the mean is below 0: z = 0."""
    for shift, expected in ((0.0, 1 / (1 + math.e)), (-2.0, (1 / (1 + math.e**2) + 0.5) / 2)):
        logps = batch(
            (0, CHOSEN, -1.0, -3.0, 2),
            (1, REJECTED, -4.0, -4.0, 3),
            (0, KL, -5.0 + shift, -8.0, 3),
            (1, KL, -7.0 + shift, -6.0, 2),
        )
        value = step_loss(loss_function("kto", {"beta": 1.0}), logps)
        assert_close(value.detach(), expected)
        assert not gradient(value, logps)[2:].any()


# --- invariances --------------------------------------------------------------------------------------------


@every_case
def test_order_of_responses_does_not_matter(case: Case) -> None:
    logps = random_batch(seed=4, examples=3, chosen=2, rejected=2)
    shuffle = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    value, shuffled = step_loss(case.loss, logps), step_loss(case.loss, rebuilt(logps, shuffle))
    assert_close(shuffled.detach(), value.detach())
    assert_close(gradient(shuffled, logps), gradient(value, logps))


@every_case
def test_examples_add_up(case: Case) -> None:
    """Σ values over a batch is the sum over its parts: an example's value knows no more of the others than the step's
    statistic."""
    logps = of_the_step(case, random_batch(seed=6, examples=4, chosen=2, rejected=3))
    whole = sums(case.loss, logps)
    examples = [rebuilt(logps, torch.nonzero(logps.example == i)[:, 0]) for i in range(4)]
    parts = [sums(case.loss, replace(example, statistic=logps.statistic)) for example in examples]
    for name, value in whole.items():
        assert_close(sum(part[name] for part in parts).detach(), value.detach())


@every_case
def test_an_empty_batch_gives_empty_terms(case: Case) -> None:
    nothing = rebuilt(random_batch(seed=7), torch.tensor([], dtype=torch.int64))
    assert [len(term.values) for term in case.loss(nothing)] == [0] * len(case.loss(nothing))


PAIR_BY_PAIR = [c for c in CASES if OBJECTIVES[c.name].pairs and c.name not in ("infonce", "interpolated")]
"""Those two compare a chosen response with all rejected ones of its prompt at once."""


@pytest.mark.parametrize("case", PAIR_BY_PAIR, ids=str)
def test_paired_objectives_take_every_chosen_rejected_pair_of_an_example(case: Case) -> None:
    """2 chosen and 3 rejected responses give the 6 values that 6 examples of one pair each give."""
    logps = random_batch(seed=8, examples=1, chosen=2, rejected=3)
    index = torch.tensor([(c, r) for c in (0, 1) for r in (2, 3, 4)]).flatten()
    single = rebuilt(replace(logps, example=torch.zeros(5, dtype=torch.int64)), index)
    single = replace(single, example=torch.arange(6).repeat_interleave(2))
    single = ResponseLogps.of(single.policy, single.reference, single.length, single.role, single.example)
    value, expected = case.loss(logps)[0].values, case.loss(single)[0].values
    assert value.shape == (6,)
    assert_close(value.detach().sort().values, expected.detach().sort().values)


def test_dpos_likelihood_term_counts_every_chosen_response_once() -> None:
    """However many pairs a chosen response is in: three, none at all."""
    logps = batch(
        *((0, REJECTED, -3.0, -2.0, 2) for _ in range(3)),
        (0, CHOSEN, -5.0, -1.0, 3),
        (1, CHOSEN, -7.0, -1.0, 2),
    )
    preference, likelihood = loss_function("dpo", {"nll_weight": 2.0})(logps)
    assert (preference.per, len(preference.values)) == ("pair", 3)
    assert (likelihood.per, likelihood.values.tolist()) == ("token", [10.0, 14.0])


@pytest.mark.parametrize("case", [c for c in CASES if not OBJECTIVES[c.name].pairs], ids=str)
def test_unpaired_objectives_do_not_see_who_belongs_to_whom(case: Case) -> None:
    logps = random_batch(seed=9, examples=4)
    alone = replace(logps, example=torch.arange(8))
    alone = ResponseLogps.of(alone.policy, alone.reference, alone.length, alone.role, alone.example)
    assert len(alone.pairs) == 0
    assert torch.equal(step_loss(case.loss, alone), step_loss(case.loss, logps))


@every_case
def test_a_loss_leaves_its_input_alone(case: Case) -> None:
    logps = golden_batch()
    before = [logps.policy.detach().clone(), logps.reference.clone(), logps.length.clone()]
    case.loss(logps)
    for old, new in zip(before, [logps.policy, logps.reference, logps.length], strict=True):
        assert torch.equal(old, new.detach())


# --- loss_function ------------------------------------------------------------------------------------------


@every_objective
def test_loss_function_binds_the_catalogs_defaults(name: str) -> None:
    explicit: Callable[..., list[LossTerm]] = FUNCTIONS[name]
    actual = loss_function(name)(golden_batch())
    expected = explicit(golden_batch(), **complete_parameters(name, {}))
    assert [(t.per, t.name) for t in actual] == [(t.per, t.name) for t in expected]
    assert all(torch.equal(a.values, e.values) for a, e in zip(actual, expected, strict=True))


def test_loss_function_refuses_what_the_catalog_does_not_know() -> None:
    with pytest.raises(RecipeError, match="did you mean 'infopo'"):
        loss_function("infpo")
    with pytest.raises(RecipeError, match=r"objective\.beta") as error:
        loss_function("infopo", {"beta": -1.0, "capp": 3.0})
    assert len(error.value.problems) == 2
