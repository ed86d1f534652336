"""Losses against numbers derived by hand: values, gradients and limits of every objective."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infopo.losses import moving
from infopo.losses.catalog import OBJECTIVES
from infopo.losses.common import capped_exp
from infopo.losses.registry import FUNCTIONS, loss_function
from loss_cases import (
    BY_HAND,
    CASES,
    CHOSEN,
    DETACHED,
    F64,
    LOG9,
    LOG17,
    REJECTED,
    B,
    Case,
    assert_close,
    batch,
    every_case,
    golden_batch,
    gradient,
    of_the_step,
    random_batch,
    softplus,
    step_loss,
)

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
