"""InfoPO's exact minimiser on a finite space of responses: an oracle that needs no model and no sampling.

The policy is a softmax over n responses, so the expectations under p_w (law of chosen) and p_l (law of
rejected responses) are finite sums, and the population loss is

    L(π) = Σ_y p_w(y) (-log π(y)) + Σ_y p_l(y) π(y)/π_ref(y).

It is convex in π. On the simplex the KKT conditions with multiplier λ of Σπ = 1 and μ(y) ≥ 0 of π(y) ≥ 0 are

    -p_w(y)/π(y) + p_l(y)/π_ref(y) + λ = μ(y),   μ(y) π(y) = 0.

Where p_w(y) > 0: π(y) > 0, so μ = 0 and π(y) = p_w(y) / (p_l(y)/π_ref(y) + λ). Where p_w(y) = 0: μ ≥ 0 asks
for λ ≥ -p_l(y)/π_ref(y), and π(y) > 0 only where that is an equality. Hence λ ≥ -min_y p_l/π_ref =: λ_0. Let
S(λ) = Σ_{p_w > 0} p_w / (p_l/π_ref + λ), which falls from S(λ_0) to 0.

- S(λ_0) ≥ 1 (infinite where a response with p_w > 0 attains the minimum): λ > λ_0 solves S(λ) = 1, and all of
  π is given by the formula.
- S(λ_0) < 1: λ = λ_0, and the left-over mass 1 - S(λ_0) sits where p_w = 0 and p_l/π_ref is least.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from torch import Tensor

from infopo.losses.family import infopo, js
from infopo.losses.margins import bpo
from infopo.losses.moving import beta_dpo
from infopo.losses.pairwise import dpo, fdpo
from infopo.losses.unpaired import ddro, sft, simper, sppo_hard
from infopo.records import LossTerms, ResponseLogps, Role

Law = NDArray[np.float64]
NO_CAP = 50.0
"""Nats; no log-ratio of these tests comes near it at the minimum."""


def one_response_per_outcome(log_policy: Tensor, reference: Law) -> ResponseLogps:
    """Every outcome twice, once as a chosen and once as a rejected response, each one token long."""
    n = len(reference)
    return ResponseLogps.of(
        policy=log_policy.repeat(2),
        reference=torch.from_numpy(np.log(reference)).repeat(2),
        length=torch.ones(2 * n, dtype=torch.int64),
        role=torch.tensor([Role.CHOSEN] * n + [Role.REJECTED] * n),
        example=torch.arange(2 * n),
    )


def population_loss(terms: LossTerms, chosen: Law, rejected: Law) -> Tensor:
    """Loss terms are linear in their values, so E = Σ_y p(y) value(y)."""
    laws = {"chosen": torch.from_numpy(chosen), "rejected": torch.from_numpy(rejected)}
    return torch.stack([laws[term.per] @ term.values for term in terms]).sum()


def minimised(loss: Callable[[Tensor], Tensor], n: int) -> Law:
    """The policy softmax(θ) at which L-BFGS stops, from the uniform policy."""
    theta = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=2000, tolerance_grad=1e-12, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(theta.log_softmax(0))
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    policy: Law = theta.detach().softmax(0).numpy()
    return policy


def free_minimiser(
    loss: Callable[[ResponseLogps], LossTerms], chosen: Law, rejected: Law, reference: Law
) -> Law:
    """log r at which the loss is least if π need not add up to 1."""
    theta = torch.zeros(len(reference), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=2000, tolerance_grad=1e-12, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logps = one_response_per_outcome(theta + torch.from_numpy(np.log(reference)), reference)
        value = population_loss(loss(logps), chosen, rejected)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    log_ratio: Law = theta.detach().numpy()
    return log_ratio


def infopo_minimiser(chosen: Law, rejected: Law, reference: Law, beta: float = 1.0) -> Law:
    def loss(log_policy: Tensor) -> Tensor:
        terms = infopo(one_response_per_outcome(log_policy, reference), beta=beta, cap=NO_CAP)
        return population_loss(terms, chosen, rejected)

    return minimised(loss, len(reference))


def closed_form(chosen: Law, rejected: Law, reference: Law) -> tuple[Law, float, float]:
    """π without left-over mass, λ, and the left-over mass: the module docstring's formula.

    The formula alone: it shares no code with `infopo`.
    """
    cost = rejected / reference
    on = chosen > 0
    least = -float(cost.min())

    def surplus(lam: float) -> float:
        return float((chosen[on] / (cost[on] + lam)).sum()) - 1

    def policy(lam: float) -> Law:
        return np.where(on, chosen / np.where(on, cost + lam, 1.0), 0.0)

    if cost[on].min() > cost.min() and surplus(least) < 0:
        return policy(least), least, -surplus(least)
    # S is at least 1 at `least`, or infinite there; S(1) = Σ p_w/(cost + 1) is at most 1.
    low = least if cost[on].min() > cost.min() else least + 1e-13
    lam = float(brentq(surplus, low, 1.0, xtol=1e-15, rtol=1e-14))
    return policy(lam), lam, 0.0


def random_laws(seed: int, n: int) -> tuple[Law, Law, Law]:
    draw = np.random.default_rng(seed)
    chosen, rejected = draw.dirichlet(np.ones(n), size=2)
    return chosen, rejected, draw.dirichlet(np.full(n, 5.0))


def kl(p: Law, q: Law) -> float:
    return float((p * np.log(p / q)).sum())


def assert_same(actual: Law, expected: Law, absolute: float = 1e-7) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=absolute)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("n", [5, 8])
def test_minimiser_is_the_closed_form(seed: int, n: int) -> None:
    """All responses labelled: λ solves S(λ) = 1, no mass is left over."""
    chosen, rejected, reference = random_laws(seed, n)
    expected, lam, left_over = closed_form(chosen, rejected, reference)
    assert left_over == 0
    assert lam > -(rejected / reference).min()
    assert_same(infopo_minimiser(chosen, rejected, reference), expected)


def test_two_responses_by_hand() -> None:
    """p_w = (1/2, 1/2), p_l/π_ref = (1/2, 3/2), π_ref uniform.

    S(λ) = 1/2 (1/(1/2 + λ) + 1/(3/2 + λ)) = 1  <=>  1 + λ = (1/2 + λ)(3/2 + λ)  <=>  λ² + λ - 1/4 = 0, so
    λ = (√2 - 1)/2, the root above -1/2.
    Then π(1) = 1/2 / (√2/2) = 1/√2, and π(2) = 1 - 1/√2.
    """
    chosen, rejected, reference = np.array([0.5, 0.5]), np.array([0.25, 0.75]), np.array([0.5, 0.5])
    expected = np.array([1 / math.sqrt(2), 1 - 1 / math.sqrt(2)])
    policy, lam, _ = closed_form(chosen, rejected, reference)
    assert_same(policy, expected, 1e-12)
    assert lam == pytest.approx((math.sqrt(2) - 1) / 2, abs=1e-12)
    assert_same(infopo_minimiser(chosen, rejected, reference), expected)


# Three labelled responses, two that nobody labelled.
REFERENCE = np.array([0.1, 0.2, 0.3, 0.15, 0.25])


def test_unlabelled_responses_get_nothing_when_labelled_ones_are_cheap() -> None:
    """p_l/π_ref is least (0) on the unlabelled responses, so λ_0 = 0; S(0) = Σ p_w π_ref/p_l.

    Here S(0) = 0.5·0.1/0.1 + 0.3·0.2/0.1 + 0.2·0.3/0.8 = 0.5 + 0.6 + 0.075 = 1.175 > 1: λ > 0, and the
    unlabelled responses (μ = λ > 0) end at zero.
    """
    chosen, rejected = np.array([0.5, 0.3, 0.2, 0, 0]), np.array([0.1, 0.1, 0.8, 0, 0])
    expected, lam, left_over = closed_form(chosen, rejected, REFERENCE)
    assert lam > 0.1
    assert left_over == 0
    assert not expected[3:].any()
    assert_same(infopo_minimiser(chosen, rejected, REFERENCE), expected)


def test_left_over_mass_sits_on_unlabelled_responses() -> None:
    """S(0) = 0.5·0.1/0.4 + 0.3·0.2/0.3 + 0.2·0.3/0.3 = 0.125 + 0.2 + 0.2 = 0.525 < 1.

    So λ = 0 and π = p_w π_ref/p_l on the labelled responses. The other 0.475 goes to the two unlabelled ones;
    how they share it does not change the loss.
    """
    chosen, rejected = np.array([0.5, 0.3, 0.2, 0, 0]), np.array([0.4, 0.3, 0.3, 0, 0])
    expected, lam, left_over = closed_form(chosen, rejected, REFERENCE)
    assert lam == 0
    assert left_over == pytest.approx(0.475)
    policy = infopo_minimiser(chosen, rejected, REFERENCE)
    assert_same(policy[:3], np.array([0.125, 0.2, 0.2]))
    assert_same(policy[:3], expected[:3])
    assert policy[3:].sum() == pytest.approx(0.475, abs=1e-7)


def test_left_over_mass_sits_where_p_l_over_the_reference_is_least() -> None:
    """No response is free of rejections: p_l/π_ref = (4, 5/4, 1/3, 2/15, 0.92), least (2/15) where p_w = 0.

    λ_0 = -2/15 and S(λ_0) = 0.6/(58/15) + 0.4/(67/60) = 9/58 + 24/67 = 0.513 < 1, so response 4 alone takes
    what is left over; responses 3 and 5, never chosen but dearer, end at zero.
    """
    chosen, rejected = np.array([0.6, 0.4, 0, 0, 0]), np.array([0.4, 0.25, 0.1, 0.02, 0.23])
    expected, lam, left_over = closed_form(chosen, rejected, REFERENCE)
    assert lam == pytest.approx(-2 / 15)
    assert left_over == pytest.approx(1 - 9 / 58 - 24 / 67)
    expected[3] = left_over
    assert_same(infopo_minimiser(chosen, rejected, REFERENCE), expected)


@pytest.mark.parametrize("seed", range(3))
def test_rejected_drawn_from_the_reference_give_the_minimiser_of_sft(seed: int) -> None:
    """p_l = π_ref: p_l/π_ref = 1, so π = p_w/(1 + λ), and Σπ = 1 gives λ = 0, π = p_w."""
    chosen, _, reference = random_laws(seed, 6)
    assert closed_form(chosen, reference, reference)[1] == pytest.approx(0, abs=1e-12)
    assert_same(infopo_minimiser(chosen, reference, reference), chosen)


def test_rejected_drawn_from_the_reference_have_no_expected_gradient() -> None:
    """p_l = π_ref: E_l[r] = Σ_y π(y) = 1 whatever the policy is."""
    _, _, reference = random_laws(0, 6)
    theta = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rejected_term = infopo(one_response_per_outcome(theta.log_softmax(0), reference), cap=NO_CAP)[1]
    value = torch.from_numpy(reference) @ rejected_term.values
    (gradient,) = torch.autograd.grad(value, theta)
    assert value.item() == pytest.approx(1, abs=1e-12)
    assert gradient.abs().max() < 1e-12


def test_disjoint_supports_give_the_minimiser_of_sft() -> None:
    """Right against wrong, verified: p_l = 0 where p_w > 0, so π = p_w/λ there; Σπ = 1 gives λ = 1.

    Then π = p_w. On wrong responses p_l/π_ref + λ > 0, so μ > 0 and they end at zero.
    """
    chosen, rejected = np.array([0.5, 0.3, 0.2, 0, 0]), np.array([0, 0, 0, 0.7, 0.3])
    expected, lam, _ = closed_form(chosen, rejected, REFERENCE)
    assert lam == pytest.approx(1, abs=1e-12)
    assert_same(expected, chosen, 1e-12)
    assert_same(infopo_minimiser(chosen, rejected, REFERENCE), chosen)


@pytest.mark.parametrize("noise", [0.0, 0.2, 0.5])
def test_pairs_of_the_reference_ranked_with_noise_give_the_graded_law(noise: float) -> None:
    """Two draws from π_ref; the one with the higher score is chosen, with probability 1 - noise.

    Of two draws one is chosen and one rejected, so p_w + p_l = 2 π_ref. With u = p_w/π_ref (0 <= u <= 2),
    p_l/π_ref = 2 - u, and the closed form divided by π_ref is

        π/π_ref = u/(2 - u + λ).

    Except for pure noise (u = 1: π = π_ref = p_w), this is not SFT's minimiser, π/π_ref = u.
    """
    reference = np.array([0.3, 0.25, 0.2, 0.15, 0.07, 0.03])  # in order of rising score
    below = np.concatenate([[0], reference.cumsum()[:-1]])
    won = reference**2 / 2 + reference * below  # a given draw is y and wins; ties by a coin
    chosen = 2 * ((1 - noise) * won + noise * (reference - won))
    rejected = 2 * reference - chosen
    assert chosen.sum() == pytest.approx(1)
    assert rejected.min() >= 0

    policy = infopo_minimiser(chosen, rejected, reference)
    expected, lam, _ = closed_form(chosen, rejected, reference)
    u = chosen / reference
    assert_same(policy / reference, u / (2 - u + lam), 1e-6)
    assert_same(policy, expected)
    is_sft = np.abs(policy - chosen).max() < 1e-7
    assert is_sft == (noise == 0.5)


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 2.0])
def test_equal_laws_leave_the_policy_at_the_reference(beta: float) -> None:
    """p_w = p_l = p: each response's p (-β log r + r^β) is least at r = 1, and π = π_ref is normalised.

    So labels without information ask for no change, at any β; SFT's minimiser would be p.
    """
    law, _, reference = random_laws(3, 6)
    assert_same(infopo_minimiser(law, law, reference, beta), reference, 1e-6)


@pytest.mark.parametrize("beta", [0.25, 1.0, 2.0])
def test_minimiser_at_any_beta_satisfies_its_stationarity_condition(beta: float) -> None:
    """∂L/∂π + λ = 0 is -β p_w/π + β p_l π^(β-1)/π_ref^β + λ = 0; times π: β (p_w - p_l r^β) = λ π.

    Summed over y, λ = β (1 - Σ p_l r^β).
    """
    chosen, rejected, reference = random_laws(4, 6)
    policy = infopo_minimiser(chosen, rejected, reference, beta)
    tilted = rejected * (policy / reference) ** beta
    assert_same(chosen - tilted, (1 - tilted.sum()) * policy, 1e-6)


@pytest.mark.parametrize("token_mean", [False, True])
def test_sft_minimiser_is_the_law_of_chosen_responses(token_mean: bool) -> None:
    """-E_w log π = KL(p_w‖π) + H(p_w). All responses are one token long: both denominators agree."""
    chosen, _, reference = random_laws(5, 7)

    def loss(log_policy: Tensor) -> Tensor:
        (term,) = sft(one_response_per_outcome(log_policy, reference), token_mean=token_mean)
        return torch.from_numpy(chosen) @ term.values

    assert_same(minimised(loss, 7), chosen)


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_infopo_is_a_lower_bound_on_the_divergence_of_chosen_from_rejected(beta: float) -> None:
    """NWJ with critic f = β log r: 1 + E_w[f] - E_l[e^f] <= KL(p_w‖p_l), with equality at f = log(p_w/p_l).

    L lacks the constants: 1 + E_w[f] - E_l[e^f] = 1 - β E_w[log π_ref] - L. The policy need not be
    normalised.
    """
    chosen, rejected, reference = random_laws(6, 6)
    log_reference = np.log(reference)

    def bound(log_ratio: Law) -> float:
        logps = one_response_per_outcome(torch.from_numpy(log_reference + log_ratio), reference)
        loss = population_loss(infopo(logps, beta=beta, cap=NO_CAP), chosen, rejected)
        return 1 - beta * float(chosen @ log_reference) - loss.item()

    best = np.log(chosen / rejected) / beta
    assert bound(best) == pytest.approx(kl(chosen, rejected), abs=1e-10)
    draw = np.random.default_rng(0)
    for size in (1e-2, 1.0, 1.0, 1.0):
        assert bound(best + size / beta * draw.standard_normal(6)) < kl(chosen, rejected)
        assert bound(size / beta * draw.standard_normal(6)) < kl(chosen, rejected)


@pytest.mark.parametrize("seed", range(3))
def test_infopo_is_a_forward_kl_and_a_linear_cost(seed: int) -> None:
    """E_l[π/π_ref] = E_π[p_l/π_ref], so L = H(p_w) + KL(p_w‖π) + E_π[p_l/π_ref], whatever the policy is.

    With a cost between 0 and c = max p_l/π_ref, the minimiser is within c nats of the best in forward KL.
    """
    chosen, rejected, reference = random_laws(seed, 7)
    policy = np.random.default_rng(seed).dirichlet(np.ones(7))
    logps = one_response_per_outcome(torch.from_numpy(np.log(policy)), reference)
    loss = population_loss(infopo(logps, cap=NO_CAP), chosen, rejected).item()
    entropy = -float(chosen @ np.log(chosen))
    assert loss == pytest.approx(
        entropy + kl(chosen, policy) + float(policy @ (rejected / reference)), abs=1e-12
    )
    assert kl(chosen, closed_form(chosen, rejected, reference)[0]) <= float((rejected / reference).max())


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_a_free_critic_under_js_reaches_the_log_ratio(beta: float) -> None:
    """Without Σπ = 1 each response's loss -p_w log σ(f) - p_l log σ(-f) is least at f = log p_w/p_l."""
    chosen, rejected, reference = random_laws(7, 6)
    found = free_minimiser(partial(js, beta=beta), chosen, rejected, reference)
    assert_same(beta * found, np.log(chosen / rejected), 1e-6)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_a_normalised_policy_under_js_reaches_its_own_lagrange_solution(beta: float) -> None:
    """∂L/∂log π + λ π = 0 is β (p_w σ(-f) - p_l σ(f)) = λ π, f = β log r; summed over y it gives λ.

    That is another policy than InfoPO's, where β (p_w - p_l e^f) = λ π.
    """
    chosen, rejected, reference = random_laws(8, 6)

    def loss(log_policy: Tensor) -> Tensor:
        return population_loss(
            js(one_response_per_outcome(log_policy, reference), beta=beta), chosen, rejected
        )

    policy = minimised(loss, 6)
    ratio = (policy / reference) ** beta
    pull = (chosen - rejected * ratio) / (1 + ratio)
    assert_same(pull, pull.sum() * policy, 1e-6)
    assert np.abs(policy - infopo_minimiser(chosen, rejected, reference, beta)).max() > 1e-2


# --- losses beside InfoPO's family ----------------------------------------------------------------------------


def test_a_free_ratio_under_ddro_is_twice_the_probability_of_chosen() -> None:
    """-p_w log r - p_l log(1 - r/2) is least at r/2 = p_w/(p_w + p_l)."""
    chosen, rejected, reference = random_laws(3, 6)
    found = free_minimiser(partial(ddro, cap=1e6), chosen, rejected, reference)
    assert_same(np.exp(found), 2 * chosen / (chosen + rejected), 1e-6)


def test_ddro_reaches_the_law_of_chosen_responses_if_pairs_are_drawn_from_the_reference() -> None:
    """π_ref = (p_w + p_l)/2: -p_w/π + p_l/(2π_ref - π) is 0 at π = p_w. InfoPO and DDRO differ there."""
    chosen, rejected, _ = random_laws(4, 6)
    reference = (chosen + rejected) / 2

    def loss(log_policy: Tensor) -> Tensor:
        return population_loss(
            ddro(one_response_per_outcome(log_policy, reference), cap=1e6), chosen, rejected
        )

    assert_same(minimised(loss, 6), chosen, 1e-6)
    assert np.abs(infopo_minimiser(chosen, rejected, reference) - chosen).max() > 1e-2


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_a_free_ratio_under_sppo_is_the_expected_target(beta: float) -> None:
    """p_w (log r - t)² + p_l (log r + t)² is least at t (p_w - p_l)/(p_w + p_l), t = 1/(2β)."""
    chosen, rejected, reference = random_laws(5, 6)
    found = free_minimiser(partial(sppo_hard, beta=beta), chosen, rejected, reference)
    assert_same(found, (chosen - rejected) / (chosen + rejected) / (2 * beta), 1e-6)


def test_simper_puts_all_mass_where_chosen_responses_exceed_rejected_ones_most() -> None:
    """With responses of one token it is Σ_y (p_l - p_w) π, which is linear: its minimiser is a corner."""
    chosen, rejected, reference = random_laws(6, 5)

    def loss(log_policy: Tensor) -> Tensor:
        return population_loss(simper(one_response_per_outcome(log_policy, reference)), chosen, rejected)

    uniform = torch.full((5,), -math.log(5), dtype=torch.float64)
    assert loss(uniform).item() == pytest.approx(float((rejected - chosen).sum() / 5))
    policy = minimised(loss, 5)
    best = int((chosen - rejected).argmax())
    assert policy.argmax() == best
    assert policy[best] > 0.999
    assert loss(torch.from_numpy(np.log(policy))).item() >= float((rejected - chosen).min()) - 1e-12


def every_order(log_policy: Tensor, reference: Law) -> ResponseLogps:
    """Every ordered couple of two different outcomes as a pair of one prompt, each one token long."""
    n = len(reference)
    couples = torch.tensor([(a, b) for a in range(n) for b in range(n) if a != b])
    outcome = couples.flatten()
    return ResponseLogps.of(
        policy=log_policy[outcome],
        reference=torch.from_numpy(np.log(reference))[outcome],
        length=torch.ones(len(outcome), dtype=torch.int64),
        role=torch.tensor([Role.CHOSEN, Role.REJECTED]).repeat(len(couples)),
        example=torch.arange(len(couples)).repeat_interleave(2),
    )


@pytest.mark.parametrize(
    ("loss", "score"),
    [
        (partial(dpo, beta=0.5), np.log),
        (partial(beta_dpo, beta=0.5, filtered=0.0, strength=0.0), np.log),
        (partial(bpo, beta=0.5, power=0.0, cap=NO_CAP), np.log),
        (partial(bpo, beta=0.5, power=0.5, cap=NO_CAP), np.log),
        (partial(bpo, beta=0.5, power=2.0, scale=1.0, cap=NO_CAP), np.log),
        (partial(fdpo, beta=0.5, divergence="chi2_kl", cap=NO_CAP), lambda r: r + np.log(r)),
        (partial(fdpo, beta=0.5, divergence="squared", cap=NO_CAP), lambda r: np.log(r) / r),
        (partial(fdpo, beta=0.5, divergence="forward_kl", cap=NO_CAP), lambda r: 1 - 1 / r),
    ],
)
def test_pairs_in_the_order_of_bradley_terry_make_the_scores_those_of_the_pairs(
    loss: Callable[[ResponseLogps], LossTerms], score: Callable[[Law], Law]
) -> None:
    """P(a over b) = σ(s_a - s_b): P h'(x) = (1 - P) h'(-x) at x = s_a - s_b, so that β φ'(r) = s + const.

    φ' is log r for DPO and BPO, of any power: π = π_ref e^(s/β)/Z. Small scores, because log r / r falls beyond r = e.
    """
    draw = np.random.default_rng(1)
    rewards, reference = draw.uniform(-0.15, 0.15, 5), draw.dirichlet(np.full(5, 5.0))
    gap = (rewards[:, None] - rewards)[~np.eye(5, dtype=bool)]
    weights = torch.from_numpy(1 / (1 + np.exp(-gap)))

    def population(log_policy: Tensor) -> Tensor:
        (term,) = loss(every_order(log_policy, reference))
        return weights @ term.values

    scores = 0.5 * score(minimised(population, 5) / reference)
    assert_same(scores - scores.mean(), rewards - rewards.mean(), 1e-6)
