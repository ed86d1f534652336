"""What losses need, as the catalog says, and what they do not depend on."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infopo.errors import RecipeError
from infopo.losses.catalog import OBJECTIVES, complete_parameters
from infopo.losses.registry import FUNCTIONS, loss_function
from infopo.records import LossTerm, ResponseLogps
from loss_cases import (
    CASES,
    CHOSEN,
    F64,
    KL,
    REJECTED,
    SIDES,
    Case,
    assert_close,
    batch,
    every_case,
    every_objective,
    golden_batch,
    gradient,
    of_the_step,
    random_batch,
    rebuilt,
    step_loss,
    sums,
)

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
