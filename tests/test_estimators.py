"""Bounds against the divergences that they bound, on finite spaces where every expectation is an exact sum.

The laws P and Q have rational probabilities, counts/N: a sample that holds each outcome as often as its count has
the law's expectations as its means. So what is said of expectations is tested without sampling.
"""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from infopo.errors import RecipeError
from infopo.estimators import (
    DIVERGENCES,
    Divergence,
    donsker_varadhan,
    infonce,
    interpolated,
    jensen_shannon,
    mine,
    nwj,
    nwj_at_js_critic,
    pearson_chi2,
    power,
    smile,
    squared_hellinger,
    variational_bound,
)

F64 = torch.float64
P_COUNTS, Q_COUNTS = [5, 2, 1], [2, 2, 4]
P = torch.tensor(P_COUNTS, dtype=F64) / 8
Q = torch.tensor(Q_COUNTS, dtype=F64) / 8
OPTIMAL = torch.log(P / Q)

TWO_SAMPLES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nwj": nwj,
    "donsker_varadhan": donsker_varadhan,
    "mine": lambda joint, marginal: mine(joint, marginal)[0],
    "jensen_shannon": jensen_shannon,
    "nwj_at_js_critic": nwj_at_js_critic,
    "pearson_chi2": pearson_chi2,
    "squared_hellinger": squared_hellinger,
    "smile": lambda joint, marginal: smile(joint, marginal, 0.7),
}
EXAMPLES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "infonce": infonce,
    "interpolated-0": lambda joint, marginal: interpolated(joint, marginal, 0.0),
    "interpolated-0.3": lambda joint, marginal: interpolated(joint, marginal, 0.3),
    "interpolated-1": lambda joint, marginal: interpolated(joint, marginal, 1.0),
}


def kl(p: Tensor, q: Tensor) -> float:
    return float((p * torch.log(p / q)).sum())


def closed_form(name: str) -> float:
    """The divergence that an estimator bounds, from its definition."""
    middle = (P + Q) / 2
    return {
        "nwj": kl(P, Q),
        "donsker_varadhan": kl(P, Q),
        "mine": kl(P, Q),
        "nwj_at_js_critic": kl(P, Q),
        "jensen_shannon": (kl(P, middle) + kl(Q, middle)) / 2,
        "pearson_chi2": float(((P - Q) ** 2 / Q).sum()),
        "squared_hellinger": float(((P.sqrt() - Q.sqrt()) ** 2).sum()),
    }[name]


BOUNDS = [name for name in TWO_SAMPLES if name != "smile"]


def population(critic: Tensor) -> tuple[Tensor, Tensor]:
    """Scores whose means are E_P and E_Q."""
    return critic.repeat_interleave(torch.tensor(P_COUNTS)), critic.repeat_interleave(torch.tensor(Q_COUNTS))


def all_draws(critic: Tensor, negatives: int) -> tuple[Tensor, Tensor]:
    """Scores of one joint and K marginal samples, every combination as often as its probability asks for."""
    joint, marginal = population(critic)
    rows = list(itertools.product(range(len(joint)), *[range(len(marginal))] * negatives))
    index = torch.tensor(rows)
    return joint[index[:, 0]], marginal[index[:, 1:]]


def assert_close(actual: Tensor | float, expected: Tensor | float, absolute: float = 1e-12) -> None:
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=F64), torch.as_tensor(expected, dtype=F64), rtol=0, atol=absolute
    )


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


critics = st.lists(st.floats(-4, 4), min_size=3, max_size=3).map(lambda c: torch.tensor(c, dtype=F64))


# --- bounds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOUNDS)
def test_value_at_the_optimal_critic_is_the_divergence(name: str) -> None:
    """One critic, e^f = dP/dQ, is the optimum of all of them."""
    assert closed_form(name) > 0.05
    assert_close(TWO_SAMPLES[name](*population(OPTIMAL)), closed_form(name))


@pytest.mark.parametrize("name", BOUNDS)
@given(critic=critics)
def test_no_critic_gives_more_than_the_divergence(name: str, critic: Tensor) -> None:
    assert TWO_SAMPLES[name](*population(critic)) <= closed_form(name) + 1e-12


@pytest.mark.parametrize("name", BOUNDS)
def test_gradient_vanishes_at_the_optimal_critic(name: str) -> None:
    critic = OPTIMAL.clone().requires_grad_()
    (slope,) = torch.autograd.grad(TWO_SAMPLES[name](*population(critic)), critic)
    assert_close(slope, torch.zeros(3, dtype=F64))


@pytest.mark.parametrize("name", ["donsker_varadhan", "mine"])
def test_donsker_varadhan_does_not_see_a_shift_and_nwj_does(name: str) -> None:
    critic = OPTIMAL + 1.7
    assert_close(TWO_SAMPLES[name](*population(critic)), kl(P, Q))
    assert_close(nwj(*population(critic)), kl(P, Q) + 1 + 1.7 - math.exp(1.7))


def test_nwj_by_hand() -> None:
    """1 + (0 + log 2)/2 - (1/2 + 4)/2 = log 2/2 - 5/4."""
    joint, marginal = (
        torch.tensor([0.0, math.log(2)], dtype=F64),
        torch.log(torch.tensor([0.5, 4.0], dtype=F64)),
    )
    assert_close(nwj(joint, marginal), math.log(2) / 2 - 1.25)


@given(seed=st.integers(0, 2**16), negatives=st.integers(1, 8), scale=st.floats(0, 1e3))
def test_infonce_never_exceeds_log_of_one_more_than_its_negatives(
    seed: int, negatives: int, scale: float
) -> None:
    """Whatever the scores are, sample by sample; reached when the joint sample stands out."""
    joint, marginal = scale * draws(seed, 4), scale * draws(seed + 1, 4, negatives)
    assert infonce(joint, marginal) <= math.log(1 + negatives) + 1e-12
    assert_close(infonce(joint * 0 + 1e4, marginal * 0), math.log(1 + negatives))


@pytest.mark.parametrize("negatives", [1, 2, 3])
def test_infonce_at_the_optimal_critic_falls_short_by_the_entropy_of_the_mean_ratio(negatives: int) -> None:
    """KL(P‖Q) - E[m log m], m the mean of dP/dQ over 1 + K samples of Q (Jensen: E[m log m] ≥ 0 as E[m] = 1)."""
    missing = 0.0
    for draw in itertools.product(range(3), repeat=1 + negatives):
        mean = float((P / Q)[list(draw)].mean())
        missing += math.prod(float(Q[i]) for i in draw) * mean * math.log(mean)
    assert_close(infonce(*all_draws(OPTIMAL, negatives)), kl(P, Q) - missing)


@given(critic=critics)
def test_infonce_gives_no_more_than_the_divergence(critic: Tensor) -> None:
    assert infonce(*all_draws(critic, 2)) <= kl(P, Q) + 1e-12


@given(critic=critics, alpha=st.floats(0, 1), candidates=st.integers(1, 3))
def test_interpolated_gives_no_more_than_the_divergence(
    critic: Tensor, alpha: float, candidates: int
) -> None:
    assert interpolated(*all_draws(critic, candidates), alpha) <= kl(P, Q) + 1e-12


@given(seed=st.integers(0, 2**16), candidates=st.integers(2, 5))
def test_interpolated_is_nwj_at_0_and_infonce_at_1(seed: int, candidates: int) -> None:
    """At 1 the mean of InfoNCE over which of the marginal samples is left out."""
    joint, marginal = 2 * draws(seed, 3), 2 * draws(seed + 1, 3, candidates)
    assert_close(interpolated(joint, marginal, 0.0), nwj(joint, marginal.flatten()))
    kept = [[j for j in range(candidates) if j != left] for left in range(candidates)]
    expected = torch.stack([infonce(joint, marginal[:, k]) for k in kept]).mean()
    assert_close(interpolated(joint, marginal, 1.0), expected)


def test_interpolated_by_hand() -> None:
    """e^f₀ = 2, e^f = 1, 4 (K = 1), α = 1/2.

    a₀ = 1/2 (2 + 1)/2 + 1/2 = 5/4 or 1/2 (2 + 4)/2 + 1/2 = 2; a = 1/2 (1 + 4)/2 + 1/2 = 7/4, and the two numerators
    give (1 + 4)/2 / (7/4) = 10/7: 1 + (log(8/5) + log 1)/2 - 10/7.
    """
    joint, marginal = torch.tensor([2.0], dtype=F64).log(), torch.tensor([[1.0, 4.0]], dtype=F64).log()
    assert_close(interpolated(joint, marginal, 0.5), 1 + math.log(1.6) / 2 - 10 / 7)


@given(seed=st.integers(0, 2**16), alpha=st.floats(0.01, 1), candidates=st.integers(1, 4))
def test_interpolated_never_exceeds_its_maximum(seed: int, alpha: float, candidates: int) -> None:
    joint, marginal = 50 * draws(seed, 2), 50 * draws(seed + 1, 2, candidates)
    assert interpolated(joint, marginal, alpha) <= 1 + math.log(candidates / alpha) + 1e-12


@pytest.mark.parametrize(("name", "maximum"), [("jensen_shannon", math.log(2)), ("squared_hellinger", 2.0)])
def test_bounded_divergences_reach_their_maximum_on_disjoint_supports(name: str, maximum: float) -> None:
    far = torch.tensor([60.0], dtype=F64)
    assert_close(TWO_SAMPLES[name](far, -far), maximum, 1e-10)


# --- SMILE and MINE -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1e3, math.inf])
def test_smile_with_a_large_tau_is_donsker_varadhan(tau: float) -> None:
    joint, marginal = 3 * draws(0, 5), 3 * draws(1, 7)
    assert_close(smile(joint, marginal, tau), donsker_varadhan(joint, marginal))


def test_smile_clips_marginal_scores_only() -> None:
    """τ = 1: E_P keeps its 3; log((e + 1/e)/2) = log cosh 1."""
    joint, marginal = torch.tensor([3.0], dtype=F64), torch.tensor([5.0, -9.0], dtype=F64)
    assert_close(smile(joint, marginal, 1.0), 3 - math.log(math.cosh(1.0)))


def test_smile_lies_on_either_side_of_the_divergence() -> None:
    """At the optimal critic above it, by -log((e^τ + 1 + 2e^-τ)/4) = 0.02 at τ = 0.1; at f = 0 below it."""
    excess = -math.log((math.exp(0.1) + 1 + 2 * math.exp(-0.1)) / 4)
    assert excess > 0.02
    assert_close(smile(*population(OPTIMAL), 0.1), kl(P, Q) + excess)
    assert smile(*population(OPTIMAL * 0), 0.1) < kl(P, Q)


def gradients(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, inputs)


def test_mines_first_gradient_is_donsker_varadhans() -> None:
    joint, marginal = draws(0, 4).requires_grad_(), draws(1, 6).requires_grad_()
    value, log_mean = mine(joint, marginal)
    theirs = donsker_varadhan(joint, marginal)
    assert_close(value.detach(), theirs.detach())
    assert_close(log_mean, marginal.detach().exp().mean().log())
    for ours, expected in zip(
        gradients(value, joint, marginal), gradients(theirs, joint, marginal), strict=True
    ):
        assert_close(ours, expected)


def test_mines_later_gradients_divide_by_the_moving_average() -> None:
    """m = 0.9 · 5 + 0.1 · 2 = 4.7; ∂/∂f(l) = -e^f/(n m); the value stays Donsker-Varadhan's."""
    joint = draws(0, 4).requires_grad_()
    marginal = torch.tensor([1.0, 3.0], dtype=F64).log().requires_grad_()
    value, log_mean = mine(joint, marginal, torch.tensor(math.log(5.0), dtype=F64), rate=0.1)
    assert_close(log_mean, math.log(4.7))
    assert not log_mean.requires_grad
    on_joint, on_marginal = gradients(value, joint, marginal)
    assert_close(on_joint, torch.full((4,), 0.25, dtype=F64))
    assert_close(on_marginal, -torch.tensor([1.0, 3.0], dtype=F64) / 2 / 4.7)
    assert_close(value.detach(), donsker_varadhan(joint, marginal).detach())


def test_mines_gradient_over_batches_is_less_biased_than_donsker_varadhans() -> None:
    """Over all batches of two marginal samples of Q, with m = E_Q[e^f]: the mean is the population's gradient."""
    critic = 1.5 * OPTIMAL
    _, marginal = population(critic)
    exact_log_mean = marginal.exp().mean().log()
    leaf = critic.clone().requires_grad_()
    (population_slope,) = torch.autograd.grad(donsker_varadhan(*population(leaf)), leaf)

    def mean_slope(bound: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        total = torch.zeros(3, dtype=F64)
        for first, second in itertools.product(range(3), repeat=2):
            leaf = critic.clone().requires_grad_()
            value = bound(population(leaf)[0], leaf[torch.tensor([first, second])])
            total += Q[first] * Q[second] * torch.autograd.grad(value, leaf)[0]
        return total

    with_average = mean_slope(lambda j, m: mine(j, m, exact_log_mean, rate=1e-12)[0])
    assert_close(with_average, population_slope, 1e-10)
    assert (mean_slope(donsker_varadhan) - population_slope).abs().max() > 0.01


def test_nwj_at_js_critic_has_the_value_of_one_and_the_gradient_of_the_other() -> None:
    joint, marginal = draws(0, 4).requires_grad_(), draws(1, 6).requires_grad_()
    value = nwj_at_js_critic(joint, marginal)
    assert_close(value.detach(), nwj(joint, marginal).detach())
    expected = gradients(jensen_shannon(joint, marginal), joint, marginal)
    for ours, theirs in zip(gradients(value, joint, marginal), expected, strict=True):
        assert_close(ours, theirs)


# --- the table of conjugates --------------------------------------------------------------------------------

every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=list(DIVERGENCES))


@every_divergence
def test_activation_is_the_generators_derivative_and_conjugate_its_legendre_transform(
    divergence: Divergence,
) -> None:
    """T = φ'(u), φ*(T) = u φ'(u) - φ(u), at u = e^f; and φ*(T) is the maximum of u T - φ(u) over a grid of u."""
    f = torch.linspace(-3, 3, 13, dtype=F64)
    u = f.exp().requires_grad_()
    (slope,) = torch.autograd.grad(divergence.generator(u).sum(), u)
    u = u.detach()
    assert_close(divergence.activation(f, power), slope)
    assert_close(divergence.conjugate(f, power), u * slope - divergence.generator(u))
    grid = torch.linspace(-6, 6, 2001, dtype=F64).exp()
    transform = (grid * slope[:, None] - divergence.generator(grid)).max(dim=1).values
    assert (divergence.conjugate(f, power) >= transform - 1e-12).all()
    assert_close(divergence.conjugate(f, power), transform, 1e-3)


@every_divergence
def test_curvature_is_the_pull_on_either_sample_where_the_critic_knows_nothing(
    divergence: Divergence,
) -> None:
    """At f = 0: +φ''(1) on a joint score, -φ''(1) on a marginal one."""
    joint, marginal = torch.zeros(1, dtype=F64).requires_grad_(), torch.zeros(1, dtype=F64).requires_grad_()
    value = variational_bound(divergence, joint, marginal)
    assert_close(value.detach(), 0.0)
    on_joint, on_marginal = gradients(value, joint, marginal)
    assert_close(on_joint, torch.tensor([divergence.curvature], dtype=F64))
    assert_close(on_marginal, torch.tensor([-divergence.curvature], dtype=F64))


@every_divergence
def test_maximum_is_the_divergence_of_laws_with_disjoint_supports(divergence: Divergence) -> None:
    """E_Q[φ(P/Q)] → φ(0) Q(no P) + lim φ(u)/u P(no Q)."""
    at_zero = float(divergence.generator(torch.tensor(1e-300, dtype=F64)))
    slope = float(divergence.generator(torch.tensor(1e12, dtype=F64)) / 1e12)
    if divergence.maximum == math.inf:
        assert at_zero + slope > 20
    else:
        assert_close(at_zero + slope, divergence.maximum, 1e-5)


# --- all of them --------------------------------------------------------------------------------------------

every_estimator = pytest.mark.parametrize("name", [*TWO_SAMPLES, *EXAMPLES])


def inputs(name: str, scale: float = 1.0, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    marginal = draws(3, 5) if name in TWO_SAMPLES else draws(3, 4, 3)
    return (scale * draws(2, 4)).to(dtype).requires_grad_(), (scale * marginal).to(dtype).requires_grad_()


@pytest.mark.parametrize("name", [n for n in [*TWO_SAMPLES, *EXAMPLES] if n not in ("nwj_at_js_critic",)])
def test_gradient_is_the_derivative_of_the_value(name: str) -> None:
    """By finite differences (MINE at its first batch; NWJ at JS's critic differs on purpose)."""
    if name == "mine":
        joint, marginal = inputs(name)
        slopes = gradients(mine(joint, marginal)[0], joint, marginal)
        step = 1e-6
        for k in range(5):
            bump = torch.zeros(5, dtype=F64)
            bump[k] = step
            rise = mine(joint, marginal + bump)[0] - mine(joint, marginal - bump)[0]
            assert_close(slopes[1][k], rise.detach() / (2 * step), 1e-8)
    else:
        assert torch.autograd.gradcheck({**TWO_SAMPLES, **EXAMPLES}[name], inputs(name))


@every_estimator
def test_estimates_are_scalars_of_the_scores_type(name: str) -> None:
    for dtype in (torch.float32, F64):
        value = {**TWO_SAMPLES, **EXAMPLES}[name](*inputs(name, dtype=dtype))
        assert (value.shape, value.dtype) == ((), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(
    "name",
    ["donsker_varadhan", "mine", "jensen_shannon", "smile", "infonce", "interpolated-0.3", "interpolated-1"],
)
def test_large_scores_give_finite_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    """Wherever the bound is finite at scores of ±1e4; NWJ, χ² and H² themselves are beyond any float there."""
    joint, marginal = inputs(name, scale=1e4, dtype=dtype)
    value = {**TWO_SAMPLES, **EXAMPLES}[name](joint, marginal)
    assert torch.isfinite(value)
    for slope in gradients(value, joint, marginal):
        assert torch.isfinite(slope).all()


def test_nwj_beyond_any_float_is_minus_infinity_and_not_nan() -> None:
    assert nwj(torch.tensor([1e4]), torch.tensor([1e4])) == -math.inf


@every_estimator
def test_no_samples_are_refused_by_name(name: str) -> None:
    joint, marginal = inputs(name)
    with pytest.raises(RecipeError, match=r"joint: expected at least one score, got none"):
        {**TWO_SAMPLES, **EXAMPLES}[name](joint[:0], marginal if name in TWO_SAMPLES else torch.ones(0, 3))
    with pytest.raises(RecipeError, match=r"marginal: expected at least one score, got none"):
        {**TWO_SAMPLES, **EXAMPLES}[name](joint, marginal[:0] if name in TWO_SAMPLES else torch.ones(4, 0))


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_parameters_outside_their_domain_are_refused_by_name(value: float) -> None:
    joint, marginal = inputs("nwj")
    with pytest.raises(RecipeError, match=r"^alpha: expected a value in"):
        interpolated(joint, marginal[:4, None], value)
    with pytest.raises(RecipeError, match=r"^rate: expected a value in \(0, 1]"):
        mine(joint, marginal, rate=value)
    with pytest.raises(RecipeError, match=r"^tau: expected a value > 0"):
        smile(joint, marginal, min(value, 0.0))


@pytest.mark.parametrize("name", EXAMPLES)
def test_scores_of_other_shapes_are_refused(name: str) -> None:
    """By the annotations here, by torch's own message where shapes are not checked."""
    with pytest.raises(Exception, match=r"joint|marginal|size"):
        EXAMPLES[name](draws(0, 4), draws(1, 5, 3))
