"""Facts about preference data: against slow definitions, and on rows small enough to count by hand."""

import random

import numpy as np
import pytest

from infopo.data.examples import ExampleDataset
from infopo.data.facts import MAX_COMPARED, NEAR, Facts, cohens_d, facts_of, is_near_duplicate
from infopo.records import PreferenceExample


def facts(*examples: PreferenceExample) -> Facts:
    return facts_of(ExampleDataset.from_examples(examples))


def edit_distance(a: list[int], b: list[int]) -> int:
    """The textbook's table of distances of all prefixes."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def edited(ids: list[int], edits: int, rng: random.Random) -> list[int]:
    ids = list(ids)
    for _ in range(edits):
        at, kind = rng.randrange(len(ids)), rng.randrange(3)
        if kind == 0:
            ids[at] = rng.randrange(4)
        elif kind == 1:
            del ids[at]
        else:
            ids.insert(at, rng.randrange(4))
    return ids


def test_near_duplicates_are_those_of_the_edit_distance():
    rng = random.Random(0)
    seen = set()
    for _ in range(1500):
        a = [rng.randrange(4) for _ in range(rng.randrange(1, 90))]
        b = edited(a, rng.randrange(min(8, len(a))), rng) or [0]
        expected = edit_distance(a, b) <= int(NEAR * max(len(a), len(b)))
        assert is_near_duplicate(np.array(a, dtype=np.int32), np.array(b, dtype=np.int32)) == expected, (a, b)
        seen.add(expected)
    assert seen == {True, False}


def test_rows_with_near_duplicate_sides_are_counted_and_named():
    long = list(range(100, 140))
    changed = [*long[:20], 7, *long[21:]]
    found = facts(
        PreferenceExample([1], [long], [changed], "a:1"),
        PreferenceExample([2], [long], [list(range(40))], "a:2"),
        PreferenceExample([3], [[5, 2]], [[6, 2]], "a:3"),  # yes against no
        PreferenceExample([4], [long], [], "a:4"),
    )["near_duplicates"]
    assert found == {"count": 1, "n": 3, "share": pytest.approx(1 / 3), "rows": ["a:1"]}


def test_of_many_rows_an_even_sample_is_compared():
    rows = [PreferenceExample([1], [[i % 7, 2]], [[9, 2]], f"a:{i}") for i in range(MAX_COMPARED + 5)]
    assert facts(*rows)["near_duplicates"]["n"] == MAX_COMPARED


def test_rows_that_reverse_each_other_conflict():
    found = facts(
        PreferenceExample([1], [[5]], [[6]], "a:1"),
        PreferenceExample([2], [[6]], [[5]], "a:2"),  # another prompt
        PreferenceExample([1], [[6]], [[5]], "a:3"),
        PreferenceExample([1], [[5]], [[6]], "a:4"),  # says the same as the first
    )["conflicts"]
    assert (found["count"], found["rows"]) == (3, ["a:1", "a:3", "a:4"])


def test_a_ranking_written_as_pairs_has_no_conflict():
    best, middle, worst = [5], [6], [7]
    found = facts(
        PreferenceExample([1], [best], [middle], "a:1"),
        PreferenceExample([1], [middle], [worst], "a:2"),
        PreferenceExample([1], [best], [worst], "a:3"),
    )
    assert found["conflicts"]["count"] == 0


def test_rows_with_one_side_conflict_if_they_judge_one_response_in_two_ways():
    found = facts(
        PreferenceExample([1], [[5]], [], "a:1"),
        PreferenceExample([1], [], [[5]], "a:2"),
        PreferenceExample([1], [[6]], [], "a:3"),
        PreferenceExample([2], [], [[6]], "a:4"),
    )
    assert found["conflicts"]["rows"] == ["a:1", "a:2"]
    assert found["pairs"] == 0
    assert found["near_duplicates"]["n"] == 0


def test_cohens_d_is_the_difference_in_units_of_the_deviation_and_its_interval_covers_it():
    rng = np.random.default_rng(0)
    estimates = [cohens_d(rng.normal(10, 2, 80), rng.normal(9, 2, 60)) for _ in range(400)]
    covered = [abs(value - 0.5) < half for value, half in filter(None, estimates)]
    assert 0.92 < np.mean(covered) < 0.98
    assert cohens_d([3, 3], [3]) is None


def test_lengths_are_those_of_responses_and_not_of_prompts():
    found = facts(
        PreferenceExample([1] * 50, [[5, 5, 5, 5]], [[6]], "a:1"),
        PreferenceExample([1], [[5, 5]], [[6]], "a:2"),
    )["length"]
    assert (found["chosen_mean"], found["rejected_mean"]) == (3, 1)
    assert found["cohens_d"] == pytest.approx(2.0)  # deviations sqrt(2) and 0, pooled 1


def test_the_references_preference_is_counted_over_pairs_with_both_values():
    pair = [PreferenceExample([1], [[5]], [[6, 6]], f"a:{i}") for i in range(3)]
    dataset = ExampleDataset.from_examples(pair)
    assert facts_of(dataset)["reference_prefers_rejected"] is None
    known = dataset.with_reference(np.array([-3.0, -2.0, -1.0, -4.0, -5.0, np.nan]))
    # Per token, the first pair has -3 against -1 and the second -1 against -2.
    assert facts_of(known)["reference_prefers_rejected"] == {"share": 0.5, "share_per_token": 0.5, "n": 2}
