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

from infopo.catalog import OBJECTIVES, complete_parameters
from infopo.errors import RecipeError
from infopo.objectives import FUNCTIONS, LossFunction, capped_exp, loss_function
from infopo.records import LossTerm, ResponseLogps, Role

CHOSEN, REJECTED, KL = int(Role.CHOSEN), int(Role.REJECTED), int(Role.KL)
SIDES = {"chosen": CHOSEN, "rejected": REJECTED}
F64 = torch.float64
B = math.log(2)


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
        return "-".join([self.name, *(f"{key}={value:.3g}" for key, value in self.parameters.items())])


# Derivations: `test_golden_values`.
CASES = [
    Case("infopo", {}, 3.5 * B + 2.25),
    Case("infopo", {"beta": 0.5}, 1.75 * B + 1 + math.sqrt(2) / 4),
    Case("infopo", {"length_normalized": True}, 2.5 * B + 1.25),
    Case("infopo", {"beta": 2.0, "length_normalized": True}, 5 * B + 2.125),
    Case("infopo", {"cap": B}, 4.5 * B + 1.25),
    Case("infopo", {"cap": 0.0}, 4.5 * B + 0.75),
    Case("infopo", {"beta": 2.0, "cap": 2 * B}, 11 * B + 2.125),
    Case("dpo", {}, (math.log1p(2**0.4) + math.log1p(2**-0.3)) / 2),
    Case("dpo", {"beta": 1.0}, (math.log(17) + math.log(9) - 3 * B) / 2),
    Case("dpo", {"beta": 1.0, "label_smoothing": 0.25}, (math.log(17) + math.log(9) - 3.25 * B) / 2),
    Case("dpo", {"beta": 1.0, "nll_weight": 2.0}, (math.log(17) + math.log(9) - 3 * B) / 2 + 3.5 * B),
    Case("dpo", {"beta": 1.0, "nll_weight": 0.5}, (math.log(17) + math.log(9) - 3 * B) / 2 + 0.875 * B),
    Case("ipo", {"beta": 1 / (2 * B)}, 50 / 9 * B**2),
    Case("ipo", {"beta": 1 / (2 * B), "length_normalized": False}, 14.5 * B**2),
    Case("hinge", {"beta": 1 / (4 * B)}, 1.125),
    Case("hinge", {"beta": 1 / (2 * B)}, 1.5),
    Case("simpo", {"beta": 1.0, "gamma": B}, math.log(3) - B / 2),
    Case("simpo", {"beta": 2.0, "gamma": B}, 1.5 * (math.log(3) - B)),
    Case("sft", {}, 3.5 * B),
    Case("sft", {"token_mean": True}, 1.75 * B),
]
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
        "token": int(logps.length[logps.chosen].sum()),
    }[term.per]


def step_loss(loss: LossFunction, logps: ResponseLogps) -> Tensor:
    """Loss of an optimizer step that consists of `logps` alone: Σ_terms Σ values / count."""
    return torch.stack([term.values.sum() / count(term, logps) for term in loss(logps)]).sum()


def sums(loss: LossFunction, logps: ResponseLogps) -> dict[str, Tensor]:
    """Σ values of each term by its name."""
    return {term.name: term.values.sum() for term in loss(logps)}


def gradient(value: Tensor, logps: ResponseLogps) -> Tensor:
    (grad,) = torch.autograd.grad(value, logps.policy)
    return grad


def assert_close(actual: Tensor | float, expected: Tensor | float, relative: float = 1e-12) -> None:
    actual, expected = torch.as_tensor(actual, dtype=F64), torch.as_tensor(expected, dtype=F64)
    torch.testing.assert_close(actual, expected, rtol=relative, atol=relative)


# --- golden values ------------------------------------------------------------------------------------------


@every_case
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
    """
    assert_close(step_loss(case.loss, golden_batch()).detach(), case.golden)


def test_every_objective_and_every_parameter_has_a_golden_value() -> None:
    covered = {(case.name, key) for case in CASES for key in case.parameters}
    assert {case.name for case in CASES} == set(OBJECTIVES)
    assert covered == {(name, key) for name, objective in OBJECTIVES.items() for key in objective.parameters}


# --- gradients and limits -----------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize(("chosen", "rejected"), [(1, 1), (2, 3)])
def test_gradient_is_the_derivative_of_the_value(case: Case, chosen: int, rejected: int) -> None:
    logps = random_batch(seed=0, chosen=chosen, rejected=rejected)
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
        assert len(terms["preference"].values) == 0
        assert not gradient(terms["preference"].values.sum(), lone).any()
    else:
        assert set(terms) == set(objective.sides)
        assert all(len(term.values) == 1 and term.per in (name, "token") for name, term in terms.items())


@every_case
def test_kl_responses_are_in_no_loss(case: Case) -> None:
    logps = golden_batch()
    index = torch.tensor([0, 1, 2, 3, 0, 1])
    role = torch.tensor([CHOSEN, REJECTED, CHOSEN, REJECTED, KL, KL])
    more = replace(rebuilt(logps, index), policy=torch.full((6,), math.nan, dtype=F64), role=role)
    more = ResponseLogps.of(
        torch.cat([logps.policy, more.policy[4:]]), more.reference, more.length, more.role, more.example
    )
    assert torch.equal(step_loss(case.loss, more), step_loss(case.loss, logps))


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
    """Σ values over a batch is the sum over its parts: an example's value knows nothing of the others."""
    logps = random_batch(seed=6, examples=4, chosen=2, rejected=3)
    whole = sums(case.loss, logps)
    parts = [sums(case.loss, rebuilt(logps, torch.nonzero(logps.example == i)[:, 0])) for i in range(4)]
    for name, value in whole.items():
        assert_close(sum(part[name] for part in parts).detach(), value.detach())


@every_case
def test_an_empty_batch_gives_empty_terms(case: Case) -> None:
    nothing = rebuilt(random_batch(seed=7), torch.tensor([], dtype=torch.int64))
    assert [len(term.values) for term in case.loss(nothing)] == [0] * len(case.loss(nothing))


@pytest.mark.parametrize("case", [c for c in CASES if OBJECTIVES[c.name].pairs], ids=str)
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
