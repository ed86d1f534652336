"""Pairs from marked samples: laws that every rule keeps, and what sets the rules apart."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infopo.data.responses import common_prefix
from infopo.errors import ConfigError
from infopo.evaluation.pairing import RULES, Candidate, PairingSettings, pair_up

MARKS = st.sampled_from([True, False, None])
SCORES = st.sampled_from([0.0, 0.5, 1.0, -3.0, None])


def candidates(marks: st.SearchStrategy[bool | float | None]) -> st.SearchStrategy[list[Candidate]]:
    texts = st.sampled_from(["a", " a", "ab", "abc", "b", "", "  ", "abcd", "x" * 9])
    rows = st.lists(st.tuples(texts, marks, st.booleans()), max_size=8)
    return rows.map(lambda drawn: [Candidate(number, *each) for number, each in enumerate(drawn)])


@given(
    candidates(MARKS) | candidates(SCORES), st.sampled_from(sorted(RULES)), st.integers(1, 4), st.booleans(),
    st.sampled_from([None, 0.5]),
)  # fmt: skip
def test_every_rule_keeps_these_laws(
    samples: list[Candidate], rule: str, n: int, reject_unfinished: bool, threshold: float | None
) -> None:
    n = 1 if rule == "lists" else n
    settings = PairingSettings(rule, n, threshold, reject_unfinished=reject_unfinished)
    paired = pair_up(samples, settings, "p")
    sides = [*paired.chosen, *paired.rejected]
    assert bool(paired.chosen) == bool(paired.rejected) == (paired.why_not is None)
    assert all(each.finished for each in paired.chosen)
    assert reject_unfinished or all(each.finished for each in paired.rejected)
    assert all(each.text.strip() and each.score is not None for each in sides)
    # No response stands in two pairs, and no text on two sides.
    assert len({each.text.strip() for each in sides}) == len(sides)
    pairs = itertools.product if rule == "lists" else lambda a, b: zip(a, b, strict=True)
    for good, bad in pairs(paired.chosen, paired.rejected):
        assert good.score > bad.score
        assert threshold is None or good.score >= threshold > bad.score
    assert rule == "lists" or len(paired.chosen) <= n
    # Each sample may be used or is left out for one reason.
    may_be_used = {
        each.text.strip()
        for each in samples
        if each.score is not None and (each.finished or reject_unfinished)
    }
    assert sum(paired.left_out.values()) == len(samples) - len(may_be_used - {""})
    assert not reject_unfinished or "unfinished" not in paired.left_out


@given(candidates(MARKS), st.sampled_from(sorted(set(RULES) - {"lists"})))
def test_a_pair_is_found_if_there_is_one(samples: list[Candidate], rule: str) -> None:
    firsts = {
        each.text.strip(): each
        for each in reversed([s for s in samples if s.finished and s.score is not None])
    }
    usable = {each.score for text, each in firsts.items() if text}
    assert bool(pair_up(samples, PairingSettings(rule), "p").chosen) == (usable == {True, False})


def test_what_sets_the_rules_apart() -> None:
    samples = [
        Candidate(0, "12345", 0.9),
        Candidate(1, "12399", 0.2),
        Candidate(2, "1", 0.0),
        Candidate(3, "7777777", 0.5),
        Candidate(4, "6666666", 0.4),
    ]

    def first(rule: str) -> tuple[int, int]:
        paired = pair_up(samples, PairingSettings(rule), "p")
        return paired.chosen[0].sample, paired.rejected[0].sample

    assert first("best-worst") == (0, 2)
    assert first("longest-prefix") == (0, 1)
    assert first("length-matched") in {(0, 1), (3, 4)}
    assert common_prefix(samples[0].text, samples[1].text) == 3
    lists = pair_up(samples, PairingSettings("lists", threshold=0.4), "p")
    assert ([s.sample for s in lists.chosen], [s.sample for s in lists.rejected]) == ([0, 3, 4], [1, 2])
    # Random numbers follow from seed and prompt alone.
    drawn = {pair_up(samples, PairingSettings(seed=seed), "p").chosen[0].sample for seed in range(20)}
    assert len(drawn) > 1
    assert first("random") == first("random")


def test_a_sample_that_is_used_is_not_left_out() -> None:
    cut, empty = Candidate(1, "cut", False, finished=False), Candidate(2, "", False, finished=False)
    samples = [Candidate(0, "whole", True), cut, empty]
    paired = pair_up(samples, PairingSettings(reject_unfinished=True), "p")
    assert (paired.rejected, paired.left_out) == ([cut], {"empty": 1})
    assert pair_up(samples, PairingSettings(), "p").left_out == {"unfinished": 1, "empty": 1}


def test_prompts_are_left_out_by_their_pass_rate_and_say_why() -> None:
    samples = [
        Candidate(0, "a", True),
        Candidate(1, "b", False),
        Candidate(2, "a", True),
        Candidate(3, "c", True),
    ]
    assert pair_up(samples, PairingSettings(), "p").pass_rate == 0.75
    assert pair_up(samples, PairingSettings(min_pass_rate=0.8), "p").why_not == "pass rate too low"
    assert pair_up(samples, PairingSettings(max_pass_rate=0.7), "p").why_not == "pass rate too high"
    assert pair_up(samples[:1], PairingSettings(), "p").why_not == "all right"
    assert pair_up(samples[1:2], PairingSettings(), "p").why_not == "all wrong"
    assert pair_up([], PairingSettings(), "p").why_not == "no usable response"
    scored = [Candidate(0, "a", 2.0), Candidate(1, "b", 2.0)]
    assert pair_up(scored, PairingSettings(), "p").why_not == "all scores equal"
    assert pair_up(scored, PairingSettings(), "p").pass_rate is None


def test_settings_that_cannot_be_are_refused_together() -> None:
    with pytest.raises(ConfigError) as caught:
        PairingSettings("best", 0, min_pass_rate=0.9, max_pass_rate=0.1)
    assert len(caught.value.problems) == 3
