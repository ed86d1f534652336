"""Numbers of training: formulas against other ways to compute them."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import genpareto

from infopo.diagnostics import (
    ProbeValues,
    balance,
    distinct_n,
    forward_kl,
    mean_and_half_width,
    pareto_k_hat,
    r_squared,
    ratio_tail,
)


def probe_of(now, start, reference=None, length=None, pairs=((0, 1), (2, 3))) -> ProbeValues:
    reference = start if reference is None else reference
    pairs = np.array(pairs)
    return ProbeValues(
        np.array(now, dtype=float), np.array(start, dtype=float), np.array(reference, dtype=float),
        np.array(length or [1] * len(now)), pairs[:, 0], pairs[:, 1], pairs,
    )  # fmt: skip


def test_likelihood_by_hand() -> None:
    found = probe_of([-3, -8, -6, -5], [-4, -6, -4, -5], length=[2, 4, 2, 5]).metrics()
    assert found["probe/logps/chosen"] == -4.5
    assert found["probe/logps/rejected_per_token"] == pytest.approx((-2 - 1) / 2)
    assert found["probe/change/chosen"] == pytest.approx((1 - 2) / 2)
    # Two values 1 and -2: standard deviation 3/√2, of which the mean's standard error is 3/2.
    assert found["probe/change/chosen_ci95"] == pytest.approx(1.959964 * 1.5)
    assert found["probe/change/rejected"] == -1
    assert found["probe/change/chosen_per_token"] == pytest.approx((0.5 - 1) / 2)
    assert found["probe/chosen_fell"] == 0.5
    assert found["probe/margin"] == pytest.approx((3 - 2) / 2)
    assert found["probe/accuracy"] == 0.5
    assert found["probe/ranking_accuracy"] == 0.5
    assert (found["drift/chosen"], found["drift/rejected"]) == (-0.5, -1)


def test_without_a_reference_of_the_chosen_side_there_is_no_margin() -> None:
    found = probe_of([-3, -8, -6, -5], [-4, -6, -4, -5], [math.nan, -6, math.nan, -5]).metrics()
    assert "drift/chosen" not in found
    assert "probe/margin" not in found
    assert "probe/accuracy" not in found
    assert found["drift/rejected"] == -1
    assert found["probe/change/chosen"] == -0.5


def test_one_side_alone_has_its_own_metrics() -> None:
    probe = ProbeValues(
        *(np.array([-3.0, -4.0]),) * 3, np.array([1, 1]), np.array([0, 1]), np.array([], dtype=int),
        np.empty((0, 2), dtype=int),
    )  # fmt: skip
    found = probe.metrics()
    assert found["probe/change/chosen"] == 0
    assert not any("rejected" in name or "margin" in name for name in found)


@pytest.mark.parametrize("seed", range(5))
def test_balance_is_that_of_the_gradients_themselves(seed: int) -> None:
    generator = np.random.default_rng(seed)
    gradients = generator.normal(size=(6, 9))
    slopes = generator.normal(size=6)
    is_chosen = generator.random(6) < 0.5
    found = balance(
        slopes.tolist(), is_chosen.tolist(), lambda c: float(np.sum((np.array(c) @ gradients) ** 2))
    )
    chosen, rejected = -slopes[is_chosen] @ gradients[is_chosen], slopes[~is_chosen] @ gradients[~is_chosen]
    assert found.chosen == pytest.approx(np.linalg.norm(chosen))
    assert found.rejected == pytest.approx(np.linalg.norm(rejected))
    assert found.inner == pytest.approx(chosen @ rejected)
    # The step of gradient descent goes along G_w - G_l.
    step = chosen - rejected
    assert found.chosen_falls == (chosen @ step < 0)
    assert found.rejected_rises == (rejected @ step > 0)


def test_the_band_says_what_the_signs_say() -> None:
    """ρR ≤ d_w/d_l ≤ R/ρ is the same as: chosen does not fall, and rejected does not rise."""
    generator, seen = np.random.default_rng(0), set()
    for _ in range(300):
        gradients = generator.normal(size=(2, 3)) * generator.uniform(0.2, 3, size=(2, 1))
        weights = generator.uniform(0.2, 3, size=2)
        found = balance(
            [-weights[0], weights[1]],
            [True, False],
            lambda c, g=gradients: float(np.sum((np.array(c) @ g) ** 2)),
        ).metrics()
        if found["gradients/cosine"] <= 0:
            assert "gradients/band_low" not in found
            continue
        norm_w, norm_l = np.linalg.norm(gradients, axis=1)
        rho, ratio = found["gradients/cosine"], norm_l / norm_w
        assert found["gradients/band_low"] == pytest.approx(rho * ratio)
        assert found["gradients/band_high"] == pytest.approx(ratio / rho)
        inside = rho * ratio <= weights[0] / weights[1] <= ratio / rho
        assert found["gradients/in_band"] == inside
        seen.add(inside)
    assert seen == {True, False}


def test_an_objective_without_a_rejected_term_has_no_cosine() -> None:
    found = balance([-1.0, 0.0], [True, False], lambda c: float(np.square(c).sum())).metrics()
    assert found["gradients/rejected"] == 0
    assert "gradients/cosine" not in found


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_k_hat_finds_the_shape_of_a_generalised_pareto_law(shape: float) -> None:
    found = [pareto_k_hat(np.log(genpareto.rvs(shape, size=4000, random_state=s))) for s in range(20)]
    # 189 weights in the tail: the standard error of one estimate is about (1 + k)/√189.
    assert np.mean(found) == pytest.approx(shape, abs=3 * (1 + shape) / math.sqrt(189 * 20) + 0.03)


def test_k_hat_does_not_depend_on_the_scale_and_is_absent_without_a_tail() -> None:
    weights = np.random.default_rng(0).normal(size=500) * 2
    assert pareto_k_hat(weights + 300) == pytest.approx(pareto_k_hat(weights), rel=1e-6)
    assert math.isnan(pareto_k_hat(np.zeros(100)))
    assert math.isnan(pareto_k_hat(weights[:10]))


def test_ratio_tail_by_hand() -> None:
    log_ratios = np.log([1.0, 1.0, 2.0, math.nan])
    found = ratio_tail(log_ratios, log_ratios, cap=0.5)
    assert found["ratio_tail/ess"] == pytest.approx(16 / (3 * 6))
    assert found["ratio_tail/capped"] == pytest.approx(1 / 3)
    assert found["ratio_tail/max"] == pytest.approx(math.log(2))
    assert set(ratio_tail(log_ratios, None, cap=0.5)) == {
        f"ratio_tail/{n}" for n in ("q50", "q90", "q99", "max")
    }
    assert ratio_tail(np.array([math.nan]), None, cap=1.0) == {}


def test_forward_kl_of_two_laws_is_their_kl() -> None:
    start, now = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    drawn = torch.multinomial(start, 20000, replacement=True, generator=torch.Generator().manual_seed(0))
    found = forward_kl(start.log()[drawn].double().numpy(), now.log()[drawn].double().numpy())
    exact = float((start * (start / now).log()).sum())
    assert found["kl/forward"] == pytest.approx(exact, abs=4 * found["kl/forward_se"])
    assert forward_kl(np.array([]), np.array([])) == {}


def test_small_things() -> None:
    assert distinct_n([[1, 1, 1, 1]]) == pytest.approx(1 / 3)
    assert math.isnan(distinct_n([[1]]))
    assert math.isnan(r_squared(np.zeros(5), np.arange(5.0)))
    assert math.isnan(mean_and_half_width(np.array([1.0]))[1])
