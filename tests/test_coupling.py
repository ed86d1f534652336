"""Statistics of a step do not depend on how the step was cut, and an average over steps is what its formula says."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infopo.losses.catalog import OBJECTIVES, STEP_STATISTICS
from infopo.losses.coupling import (
    LEAST_DEVIATION,
    SortedScores,
    StepCoupling,
    StepMoments,
    StepStatistic,
    matched,
    step_parts,
)
from infopo.losses.registry import step_statistic
from infopo.records import ResponseLogps, Role

F64 = torch.float64


def batch(scores: list[float]) -> ResponseLogps:
    """Rejected responses with these log-ratios."""
    number = len(scores)
    return ResponseLogps.of(
        policy=torch.tensor(scores, dtype=F64, requires_grad=True),
        reference=torch.zeros(number, dtype=F64),
        length=torch.ones(number, dtype=torch.int64),
        role=torch.full((number,), int(Role.REJECTED)),
        example=torch.arange(number),
    )


def log_mean(rate: float = 1.0) -> StepStatistic:
    return StepStatistic(Role.REJECTED, lambda logps: logps.policy, "log_mean", rate)


def positive_mean() -> StepStatistic:
    return StepStatistic(Role.REJECTED, lambda logps: logps.policy, "positive_mean")


@given(
    pieces=st.lists(st.lists(st.floats(-700, 700), max_size=4), min_size=1, max_size=4).filter(
        lambda pieces: any(pieces)
    )
)
def test_how_a_step_is_cut_into_pieces_and_ranks_does_not_matter(pieces: list[list[float]]) -> None:
    """Empty pieces included; scores whose e^s is beyond any float included."""
    scores = [score for piece in pieces for score in piece]
    for statistic in (log_mean(), positive_mean()):
        whole = statistic.of(batch(scores))
        ranks = [step_parts([statistic], [batch(piece), batch([])])[0] for piece in pieces]
        cut = statistic.combined(torch.stack(ranks))
        one_rank = statistic.combined(step_parts([statistic], [batch(piece) for piece in pieces]))
        for value in (cut, one_rank):
            torch.testing.assert_close(value, whole, rtol=1e-12, atol=1e-12)
        assert not whole.requires_grad


def test_statistics_by_hand() -> None:
    """log((1 + 3)/2); the mean of -1 and 4, and of -4 and 1, which is held at 0."""
    assert log_mean().of(batch([0.0, math.log(3)])).item() == pytest.approx(math.log(2))
    assert positive_mean().of(batch([-1.0, 4.0])).item() == 1.5
    assert positive_mean().of(batch([-4.0, 1.0])).item() == 0.0


def test_what_the_trainer_found_for_the_step_goes_before_the_batch_itself() -> None:
    logps = replace(batch([1.0, 2.0]), statistic=torch.tensor(0.25))
    assert log_mean().of(logps).item() == 0.25
    assert log_mean().of(logps).dtype == F64


def test_an_average_over_steps() -> None:
    """Means 1, 4, 2 at rate 1/2: 1, 2.5, 2.25. A step without a rejected response changes nothing."""
    statistic, average = log_mean(rate=0.5), torch.tensor(math.nan, dtype=F64)
    seen = []
    for now in (math.nan, 0.0, math.log(4), math.nan, math.log(2)):
        average = statistic.averaged(average, torch.tensor(now, dtype=F64))
        seen.append(average.exp().item())
    assert math.isnan(seen[0])
    assert seen[1:] == pytest.approx([1.0, 2.5, 2.5, 2.25])


def test_at_rate_1_each_step_stands_alone() -> None:
    now = torch.tensor(0.3, dtype=F64)
    assert torch.equal(log_mean(rate=1.0).averaged(torch.tensor(9.0, dtype=F64), now), now)


def test_sorted_scores_do_not_depend_on_how_a_step_is_cut_into_pieces_and_ranks() -> None:
    """Ranks with unlike numbers of scores exchange rows of one length, filled up with infinity."""
    scores = SortedScores(lambda logps: logps.policy, lambda logps: -logps.policy[:1])
    mine, theirs = [batch([3.0, -1.0]), batch([]), batch([2.0])], [batch([0.5])]
    whole = scores.over([batch([3.0, -1.0]), batch([2.0]), batch([0.5])])

    def gather(values: torch.Tensor) -> torch.Tensor:
        if values.ndim == 1:  # lengths
            return torch.cat([values, torch.tensor([1])])
        other = scores.over(theirs)
        filler = other.new_full((2, values.shape[1] - 1), math.inf)
        return torch.cat([values, torch.cat([other[:, :1], filler], dim=1)])

    cut = scores.over(mine, gather)
    for row, expected in zip(cut, whole, strict=True):
        assert row[row < math.inf].tolist() == expected[expected < math.inf].tolist()
        assert row.tolist() == sorted(row.tolist())
    assert whole[0].tolist() == [-1.0, 0.5, 2.0, 3.0]
    assert scores.over([batch([])]).shape == (2, 0)


@given(
    pieces=st.lists(st.lists(st.floats(-1e3, 1e3), max_size=4), min_size=1, max_size=4).filter(any),
    rate=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_moments_do_not_depend_on_how_a_step_is_cut_to_the_last_digit(
    pieces: list[list[float]], rate: float
) -> None:
    moments = StepMoments(lambda logps: logps.policy, rate)
    whole = moments.of(batch([score for piece in pieces for score in piece]))
    cut = moments.alone(moments.over([batch(piece) for piece in reversed(pieces)]))
    assert torch.equal(cut, whole)
    assert not whole.requires_grad

    def gather(values: torch.Tensor) -> torch.Tensor:
        """Two ranks, the second of which has the same scores."""
        return torch.cat([values, values])

    twice = moments.over([batch(piece) for piece in pieces], gather)
    assert twice.tolist() == sorted(2 * [score for piece in pieces for score in piece])


def test_moments_over_steps_by_hand() -> None:
    """Steps (0, 2), (4), (1, 1, 7): means 1, 4, 3, deviations √2, 0, √12. At rate 1/2: 1, 2.5, 2.75.

    At rate 0 each score counts once: 1, 2, 15/6.
    """
    steps = [[], [0.0, 2.0], [], [4.0], [1.0, 1.0, 7.0]]
    for rate, means in ((0.5, [1, 1, 2.5, 2.75]), (0.0, [1, 1, 2, 2.5]), (1.0, [1, 1, 4, 3])):
        coupling = StepCoupling([StepMoments(lambda logps: logps.policy, rate), log_mean()])
        found = []
        for scores in steps:
            coupling.advance([batch(scores)])
            value = coupling.values[0]
            assert value is not None
            found.append(value[0].item())
        assert math.isnan(found[0])
        assert found[1:] == pytest.approx(means)
    assert value[1].item() == pytest.approx(math.sqrt(12))
    assert coupling.over([batch([4.0])])[0][0][:2].tolist() == [4.0, LEAST_DEVIATION]  # type: ignore[index]


def test_moments_go_on_from_what_was_kept() -> None:
    one = StepCoupling([StepMoments(lambda logps: logps.policy, 0.3), None, log_mean(0.5)])
    one.advance([batch([0.1, 0.7])])
    other = StepCoupling([StepMoments(lambda logps: logps.policy, 0.3), None, log_mean(0.5)])
    other.reset(one.kept)
    assert one.keeps_averages
    for coupling in (one, other):
        coupling.advance([batch([2.0, -1.0, 0.3])])
    assert one.kept[0] == other.kept[0]
    assert one.kept[2] == other.kept[2]
    assert torch.equal(one.values[0], other.values[0])  # type: ignore[arg-type]


def test_scores_of_one_rank_are_matched_and_rounding_changes_no_rank() -> None:
    own, other = torch.tensor([1.0, 2.0, 4.0, math.inf]), torch.tensor([-5.0, 0.0, 7.0, math.inf])
    for noise in (0.0, 0.3, -0.3):
        found = matched(torch.tensor([4.0, 1.0, 2.0]) + noise, own, other)
        assert found.tolist() == [7.0, -5.0, 0.0]
    short = torch.tensor([-5.0, 7.0, math.inf, math.inf])
    assert matched(own[:3], own, short).tolist() == [-5.0, -5.0, 7.0]  # the middle is as near to both
    nothing = torch.full((4,), math.inf)
    assert matched(own[:3], own, nothing).tolist() == own[:3].tolist()


def test_of_no_response_there_is_no_mean() -> None:
    assert log_mean().of(batch([])).isnan()
    assert positive_mean().of(batch([])).item() == 0.0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_has_a_statistic_if_its_catalog_row_names_one(name: str) -> None:
    statistic, named = step_statistic(name), OBJECTIVES[name].statistic
    assert (statistic is None) == (named == "")
    if statistic:
        assert named in STEP_STATISTICS
        assert statistic.roles
        assert (statistic.rate < 1) == named.startswith("moving_")
