"""Laws of the lab's preference data."""

import math
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from infopo.errors import DataError, RecipeError
from infopo.lab import policy_path, preferences, solve, verify
from infopo.lab.preferences import PreferencePairs, make_pairs, preference_probability, quality
from infopo.lab.problems import split_of


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return AutoTokenizer.from_pretrained(policy_path())


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(policy_path())


@pytest.fixture(scope="module")
def verified(model: PreTrainedModel, tokenizer: Tokenizer) -> PreferencePairs:
    return make_pairs(model, tokenizer, labels="verified", n=100, seed=0)


@pytest.fixture(scope="module")
def graded(model: PreTrainedModel, tokenizer: Tokenizer) -> PreferencePairs:
    return make_pairs(model, tokenizer, labels="graded", n=200, seed=0)


def contents(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["prompt"][0]["content"], row["chosen"][0]["content"], row["rejected"][0]["content"]


def test_rows_are_conversational_and_from_the_preference_split(
    verified: PreferencePairs, graded: PreferencePairs
) -> None:
    for row in verified.rows + graded.rows:
        assert set(row) == {"prompt", "chosen", "rejected"}
        roles = {side: [message["role"] for message in row[side]] for side in row}
        assert roles == {"prompt": ["user"], "chosen": ["assistant"], "rejected": ["assistant"]}
        assert split_of(contents(row)[0]) == "preference"
    for pairs in (verified, graded):
        assert len({contents(row)[0] for row in pairs.rows}) == len(pairs.rows)


def test_verified_pairs_set_a_right_response_against_a_wrong_one(verified: PreferencePairs) -> None:
    assert len(verified.rows) == 100
    for question, chosen, rejected in map(contents, verified.rows):
        assert verify(solve(question), chosen)
        assert not verify(solve(question), rejected)


def test_every_problem_gives_a_pair_or_is_counted_as_skipped(
    verified: PreferencePairs, graded: PreferencePairs
) -> None:
    assert verified.samples == 4 * verified.problems
    assert graded.samples == 2 * graded.problems
    assert set(verified.skipped) == {"no right sample", "no wrong sample"}
    assert "equal samples" in graded.skipped
    for pairs in (verified, graded):
        assert pairs.problems == len(pairs.rows) + sum(pairs.skipped.values())
        assert 0.3 < pairs.right / pairs.samples < 0.9


def test_the_same_seed_gives_the_same_pairs_and_fewer_are_a_prefix(
    model: PreTrainedModel, tokenizer: Tokenizer, graded: PreferencePairs
) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    again = make_pairs(model, tokenizer, labels="graded", n=60, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.rows == graded.rows[:60]
    other = make_pairs(model, tokenizer, labels="graded", n=60, seed=1)
    assert not {contents(row)[0] for row in other.rows} <= {contents(row)[0] for row in graded.rows}


def test_graded_labels_follow_bradley_terry(graded: PreferencePairs) -> None:
    """The count of pairs whose better response was chosen lies within 4 standard deviations of its expectation."""
    expected = variance = 0.0
    better_chosen = 0
    for question, chosen, rejected in map(contents, graded.rows):
        assert chosen != rejected
        problem = solve(question)
        gap = quality(problem, chosen) - quality(problem, rejected)
        if gap:
            share = 1 / (1 + math.exp(-abs(gap) / 0.5))
            expected += share
            variance += share * (1 - share)
            better_chosen += gap > 0
    assert variance > 10
    assert abs(better_chosen - expected) < 4 * math.sqrt(variance)
    assert better_chosen < len(graded.rows)


def test_graded_labels_without_noise_choose_the_better_response(
    model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    pairs = make_pairs(model, tokenizer, labels="graded", n=60, seed=0, label_temperature=1e-6)
    for question, chosen, rejected in map(contents, pairs.rows):
        assert quality(solve(question), chosen) >= quality(solve(question), rejected)


def test_quality_by_hand() -> None:
    """Half for the share of right steps, half for the answer: (3/3 + 1)/2, (2/3 + 0)/2, (2/3 + 1)/2, 0."""
    problem = solve("12+5-3*2=?")
    assert quality(problem, problem.solution) == 1
    assert quality(problem, "12+5=18\n18-3=15\n15*2=30\nAnswer: 30") == pytest.approx(1 / 3)
    assert quality(problem, "12+5=17\n17-3=14\n14*2=29\nAnswer: 28") == pytest.approx(5 / 6)
    assert quality(problem, "28") == 0


def test_preference_probability_by_hand() -> None:
    """σ(0) = 1/2, σ(ln 3) = 3/4, and no overflow far out."""
    assert preference_probability(0.4, 0.4, 0.5) == 0.5
    assert preference_probability(0.5 * math.log(3), 0.0, 0.5) == pytest.approx(0.75, abs=1e-15)
    assert preference_probability(0.0, 0.5 * math.log(3), 0.5) == pytest.approx(0.25, abs=1e-15)
    assert preference_probability(1.0, 0.0, 1e-9) == 1
    assert preference_probability(0.0, 1.0, 1e-9) == 0


def test_a_policy_that_is_never_right_is_refused(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preferences, "_MAX_BARREN_ROUNDS", 1)
    monkeypatch.setattr(preferences, "PROBLEMS_PER_ROUND", 16)
    untrained = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(policy_path()))
    with pytest.raises(DataError, match=r"16 problems in a row gave no pair \(16 no right sample\)"):
        make_pairs(untrained, tokenizer, labels="verified", n=1, seed=0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"labels": "ranked"}, "labels: expected one of verified, graded, got 'ranked'"),
        ({"n": -1}, "n: expected at least 0"),
        ({"sampling_temperature": 0.0}, "sampling_temperature: expected a number above 0"),
        ({"label_temperature": 0.0}, "label_temperature: expected a number above 0"),
        ({"samples_per_problem": 1}, "samples_per_problem: expected at least 2"),
        ({"n": -1, "label_temperature": -1.0}, "2 problems"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    model: PreTrainedModel, tokenizer: Tokenizer, bad: dict[str, Any], message: str
) -> None:
    arguments = {"labels": "verified", "n": 1, "seed": 0, **bad}
    with pytest.raises(RecipeError, match=message):
        make_pairs(model, tokenizer, **arguments)


def test_no_pairs_need_no_sampling(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    assert make_pairs(model, tokenizer, labels="graded", n=0, seed=0) == PreferencePairs([], 0, 0, 0, {})
