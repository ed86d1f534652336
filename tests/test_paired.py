"""Paired comparisons: golden values worked by hand or by scipy, and laws that hold of all counts."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, permutation_test

from infopo import paired
from infopo.intervals import wilson
from infopo.paired import (
    bootstrap_interval,
    compare_scores,
    difference_interval,
    holm,
    mcnemar,
    mcnemar_power,
    mean_interval,
    sign_flips,
    smallest_difference,
    smallest_mean,
    tango,
)

counts = st.integers(0, 300)


@given(counts, counts)
def test_mcnemar_is_the_binomial_test_of_the_discordant_items(wins, losses):
    expected = binomtest(wins, wins + losses, 0.5).pvalue if wins + losses else 1.0
    assert mcnemar(wins, losses) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_golden_values():
    """Of 6 discordant items all won: 2 (1/2)^6. Of 10, 9 won: 2 (1 + 10) / 2^10."""
    assert mcnemar(6, 0) == 2 * 0.5**6
    assert mcnemar(9, 1) == pytest.approx(22 / 1024, rel=1e-12)
    assert mcnemar(5, 5) == mcnemar(0, 0) == mcnemar(1, 0) == 1.0
    with pytest.raises(ValueError, match="at least 0"):
        mcnemar(-1, 3)


def test_tango_golden_values():
    """The example of Fagerland, Lydersen and Laake (2014), whose interval is -0.517 to -0.026, and closed forms."""
    assert tango(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)
    z = paired.Z_95
    for n in (1, 10, 1000):
        half = z * z / (n + z * z)
        assert tango(0, 0, n) == pytest.approx((-half, half), abs=1e-9)
    assert tango(0, 0, 0) == (-1.0, 1.0)


@given(counts, counts, counts)
def test_tango_is_antisymmetric_and_contains_the_difference(wins, losses, ties):
    n = wins + losses + ties
    low, high = tango(wins, losses, n)
    assert (-high, -low) == pytest.approx(tango(losses, wins, n), abs=1e-7)
    if n:
        assert low - 1e-9 <= (wins - losses) / n <= high + 1e-9


def test_tango_is_wilson_if_every_item_is_discordant():
    low, high = tango(60, 40, 100)
    assert ((low + 1) / 2, (high + 1) / 2) == pytest.approx(wilson(0.6, 100), abs=1e-9)


def test_tango_and_the_bootstrap_agree_of_many_items():
    differences = np.repeat([1.0, -1.0, 0.0], [300, 240, 1460])
    assert bootstrap_interval(differences) == pytest.approx(tango(300, 240, 2000), abs=2e-3)


def test_the_bootstrap_draws_items_with_replacement():
    """Its standard error is that of the mean, of few distinct values and of many."""
    rng = np.random.default_rng(0)
    for values in (rng.integers(0, 3, 400) / 4, rng.normal(size=400)):
        means = paired.bootstrap_means(values, resamples=20_000)
        assert len(means) == 20_000
        assert means.mean() == pytest.approx(values.mean(), abs=5e-3)
        assert means.std() == pytest.approx(values.std() / 20, rel=0.03)


def test_the_bootstrap_is_seeded_and_knows_no_order(monkeypatch):
    values = np.random.default_rng(1).normal(size=50)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values[::-1], seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    assert all(math.isnan(end) for end in bootstrap_interval([]))
    assert bootstrap_interval([0.25] * 7) == (0.25, 0.25)
    # However many draws fit into memory at once, there are as many as asked for.
    monkeypatch.setattr(paired, "_DRAWS_AT_ONCE", 1000)
    assert len(paired.bootstrap_means(values, resamples=333)) == 333


@pytest.mark.parametrize("value", [0.0, 0.25, 0.5, 1.0])
def test_equal_values_leave_doubt_that_shrinks_with_their_number(value):
    """A bootstrap of equal values has no width. Wilson's interval and Tango's are the limits at 0 and 1."""
    sizes = (1, 2, 5, 20, 100, 10_000)
    means = [mean_interval([value] * n) for n in sizes]
    counts = [mean_interval([1 + 7 * value] * n, bounds=(1, 8)) for n in sizes]
    differences = [difference_interval([value] * n) for n in sizes]
    for found, low, high, at in (
        (means, 0, 1, value),
        (counts, 1, 8, 1 + 7 * value),
        (differences, -1, 1, value),
    ):
        widths = [end - begin for begin, end in found]
        assert all(low <= begin <= at + 1e-9 and at - 1e-9 <= end <= high for begin, end in found)
        assert min(widths) > 0
        assert widths == sorted(widths, reverse=True)
        assert widths[-1] < 0.05 * (high - low)
    assert means == [wilson(value, n) for n in sizes]
    assert counts == [pytest.approx((1 + 7 * low, 1 + 7 * high)) for low, high in means]


@pytest.mark.parametrize("n", [1, 4, 30, 1000])
def test_equal_differences_of_shares_have_tangos_interval(n):
    for wins, losses, value in ((0, 0, 0.0), (n, 0, 1.0), (0, n, -1.0)):
        assert difference_interval([value] * n) == pytest.approx(tango(wins, losses, n), abs=1e-9)


@pytest.mark.parametrize(
    ("a", "b"), [([1, 1], [1, 1]), ([0.5], [0.5]), ([1, 0], [0, 0]), ([7.0], [5.0]), ([3], [3])]
)
def test_no_comparison_is_certain(a, b):
    found = compare_scores({f"{i}": a for i in range(20)}, {f"{i}": b for i in range(20)})
    low, high = found.ci95
    assert low < found.difference <= high
    assert high - low > 0.1


def test_values_that_vary_have_the_interval_of_the_bootstrap():
    values = np.random.default_rng(5).random(30)
    assert mean_interval(values, seed=2) == bootstrap_interval(values, seed=2)
    assert difference_interval(values, seed=2) == bootstrap_interval(values, seed=2)
    assert mean_interval([0.1 + 0.2, 0.3, 0.3]) == pytest.approx(wilson(0.3, 3)), (
        "no more than the last digit"
    )


@pytest.mark.parametrize(("wins", "losses"), [(3, 9), (0, 5), (8, 7), (100, 130)])
def test_sign_flips_of_discordant_items_are_mcnemar(wins, losses):
    p = sign_flips([1.0] * wins + [-1.0] * losses + [0.0] * 20)
    assert p == pytest.approx(mcnemar(wins, losses), abs=0.015)


def test_sign_flips_are_those_of_scipy():
    values = np.random.default_rng(2).normal(0.3, 1, size=12)
    exact = permutation_test((values,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    assert sign_flips(values) == pytest.approx(exact, abs=0.015)
    assert sign_flips([]) == sign_flips([0.0, 0.0]) == 1.0


def test_samples_of_an_item_are_one_observation():
    """Eight times the same sample of each item says no more than one."""
    rng = np.random.default_rng(3)
    a, b = rng.random(40) < 0.7, rng.random(40) < 0.5
    one = compare_scores(
        {f"{i}": [float(x)] for i, x in enumerate(a)}, {f"{i}": [float(x)] for i, x in enumerate(b)}
    )
    many = compare_scores(
        {f"{i}": [float(x)] * 8 for i, x in enumerate(a)}, {f"{i}": [float(x)] * 8 for i, x in enumerate(b)}
    )
    assert (one.test, many.test) == ("mcnemar", "sign flips")
    assert (one.wins, one.losses, one.difference) == (many.wins, many.losses, many.difference)
    assert many.p == pytest.approx(one.p, abs=0.015)
    assert many.ci95 == pytest.approx(one.ci95, abs=0.03)


def test_a_comparison_of_samples_worked_by_hand():
    """Items: 1/2 against 0/1, 2/2 against 1/1, 0/2 against 1/1; the fourth is only in b."""
    found = compare_scores({"x": [1, 0], "y": [1, 1], "z": [0, 0]}, {"x": [0], "y": [1], "z": [1], "w": [1]})
    assert (found.n, found.samples, found.wins, found.losses, found.ties) == (3, 2, 1, 1, 1)
    assert (found.mean_a, found.mean_b) == (0.5, pytest.approx(2 / 3))
    assert found.difference == pytest.approx(-1 / 6)


def test_ratings_that_differ_by_one_are_no_shares():
    """McNemar's test is for scores of 0 and 1. Ratings of 3 and 4 are compared by flips of signs."""
    assert compare_scores({"x": [4], "y": [3]}, {"x": [3], "y": [3]}).test == "sign flips"


def test_degenerate_comparisons():
    nothing = compare_scores({}, {"x": [1.0]})
    assert (nothing.n, nothing.p, nothing.smallest, nothing.ci95) == (0, 1.0, None, (-1.0, 1.0))
    assert math.isnan(nothing.difference)
    one = compare_scores({"x": [1.0]}, {"x": [0.0]})
    assert (one.n, one.wins, one.p, one.smallest) == (1, 1, 1.0, None)
    same = compare_scores({f"{i}": [1.0] for i in range(50)}, {f"{i}": [1.0] for i in range(50)})
    assert (same.difference, same.p, same.ties) == (0.0, 1.0, 50)
    assert same.ci95[1] > 0.05, "fifty equal answers leave room for a difference"
    assert same.smallest == pytest.approx(0.17, abs=0.02)
    empty_samples = compare_scores({"x": [], "y": [1.0]}, {"x": [1.0], "y": [1.0]})
    assert empty_samples.n == 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_the_largest_of_bonferronis_steps(p_values):
    """It is at least the p-value and at most Bonferroni's, keeps their order, and the least is Bonferroni's."""
    adjusted = holm(p_values)
    m = len(p_values)
    assert all(p <= q <= min(1.0, m * p) + 1e-12 for p, q in zip(p_values, adjusted, strict=True))
    assert min(adjusted) == min(1.0, m * min(p_values))
    order = np.argsort(p_values)
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()


def test_holm_golden_values():
    """0.01 x 4, 0.02 x 3 = 0.06, 0.03 x 2 = 0.06, 0.04 x 1 raised to 0.06."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([]) == []
    assert holm([0.7, 0.9]) == [1.0, 1.0]


@pytest.mark.parametrize(("n", "difference", "discordant"), [(30, 0.2, 0.4), (200, 0.1, 0.2), (50, 0.3, 0.3)])
def test_power_is_the_share_of_simulated_comparisons_that_are_significant(n, difference, discordant):
    rng = np.random.default_rng(4)
    wins, losses, _ = rng.multinomial(
        n, [(discordant + difference) / 2, (discordant - difference) / 2, 1 - discordant], size=4000
    ).T
    p_values = np.minimum(1, 2 * binom.cdf(np.minimum(wins, losses), wins + losses, 0.5))
    found = ((p_values <= 0.05) & (wins > losses)).mean()
    assert mcnemar_power(n, difference, discordant) == pytest.approx(found, abs=0.025)


def test_power_of_equal_models_is_at_most_half_the_level():
    """Half of the false alarms would name the first model."""
    assert 0 < mcnemar_power(500, 0.0, 0.3) <= 0.025
    assert mcnemar_power(500, 0.0, 0.0) == mcnemar_power(0, 0.5, 0.5) == 0.0


def test_the_smallest_difference_has_the_power_that_it_is_defined_by():
    for n, discordant in ((50, 0.3), (1319, 0.2), (164, 0.0)):
        found = smallest_difference(n, discordant)
        assert found is not None
        assert mcnemar_power(n, found, max(discordant, found)) >= 0.8
        assert mcnemar_power(n, 0.97 * found, max(discordant, 0.97 * found)) < 0.8
    # p <= 0.05 needs six discordant items, all of them won.
    assert smallest_difference(5, 1.0) is None
    assert smallest_difference(6, 0.0) == pytest.approx(0.8 ** (1 / 6), abs=1e-6)


def test_the_smallest_difference_is_the_normal_one_of_many_items():
    exact, normal = smallest_difference(20_000, 0.2), smallest_mean([1.0] * 10 + [-1.0] * 10 + [0.0] * 80)
    assert exact is not None
    assert normal is not None
    assert exact == pytest.approx(normal * math.sqrt(100 / 20_000), rel=0.03)
    assert smallest_mean([0.5]) is None
    assert smallest_mean([0.5, 0.5]) is None
