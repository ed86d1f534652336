"""Laws that the design of the method and of its family rests on."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infopo import estimators
from infopo.losses import moving
from infopo.losses.catalog import OBJECTIVES
from infopo.losses.registry import loss_function, step_statistic
from loss_cases import (
    CHOSEN,
    F64,
    REJECTED,
    assert_close,
    batch,
    golden_batch,
    gradient,
    random_batch,
    softplus,
    step_loss,
)

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
