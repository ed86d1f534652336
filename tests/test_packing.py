"""The forest: what is stored, where it stands, and that nothing is lost or doubled."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infopo.data.packing import PreferenceCollator, pack, select, split_by_tokens
from infopo.logps.forward import response_lengths
from infopo.records import EMPTY_EXAMPLE, PackedBatch, PreferenceExample
from worlds import random_examples

PAIR = PreferenceExample([5, 6, 7], [[8, 9]], [[10, 11, 12]], "a.jsonl:1")
ONE_REJECTED = PreferenceExample([13], [], [[14]], "a.jsonl:2", reference=[-1.5])


def path_tokens(batch: PackedBatch, response: int) -> list[int]:
    start = batch.segment_start
    return [t for s in batch.path(response) for t in batch.input_ids[start[s] : start[s + 1]].tolist()]


def test_a_prompt_is_stored_once_and_responses_begin_at_its_end() -> None:
    batch = pack([PAIR, ONE_REJECTED])
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1]
    assert batch.segment_start == [0, 3, 5, 8, 9, 10]
    assert batch.segment_parent == [-1, 0, 0, -1, 3]
    assert batch.segment_scored == [False, True, True, False, True]
    assert batch.leaf == [1, 2, 4]


def test_roles_pairs_and_counts_of_a_mixed_batch() -> None:
    batch = pack([PAIR, ONE_REJECTED])
    assert batch.role.tolist() == [0, 1, 1]
    assert batch.example.tolist() == [0, 0, 1]
    assert batch.length.tolist() == [2, 3, 1] == response_lengths(batch)
    assert (batch.chosen.tolist(), batch.rejected.tolist(), batch.pairs.tolist()) == ([0], [1, 2], [[0, 1]])
    assert batch.counts.tolist() == [1, 1, 2, 2, 3]  # pairs, chosen, rejected, tokens of chosen, both
    assert batch.row_ids == ("a.jsonl:1", "a.jsonl:2")
    assert batch.reference.isnan().tolist() == [True, True, False]
    assert batch.reference[2] == -1.5


def test_many_responses_give_every_pair_of_their_own_example() -> None:
    batch = pack(random_examples(2, chosen=(2,), rejected=(3,)))
    examples = batch.example[batch.pairs]
    assert len(batch.pairs) == 2 * 2 * 3
    assert (examples[:, 0] == examples[:, 1]).all()


def test_each_response_reads_prompt_then_its_own_tokens() -> None:
    examples = random_examples(7, chosen=(1, 0, 2), rejected=(2, 1))
    batch = pack(examples)
    expected = [[*e.prompt_ids, *r] for e in examples for r in e.response_ids]
    assert [path_tokens(batch, r) for r in range(batch.num_responses)] == expected


def test_what_responses_begin_with_is_stored_once() -> None:
    """Responses [7 8 9 4], [7 8 9 5 6], [3] and [7 8 3]."""
    example = PreferenceExample([5, 6], [[7, 8, 9, 4], [7, 8, 9, 5, 6]], [[3], [7, 8, 3]], "r")
    batch = pack([PAIR, example])
    assert batch.input_ids.tolist()[8:] == [5, 6, 7, 8, 9, 4, 5, 6, 3, 3]
    assert batch.position_ids.tolist()[8:] == [0, 1, 2, 3, 4, 5, 5, 6, 4, 2]
    assert batch.segment_parent[3:] == [-1, 3, 4, 5, 5, 4, 3]
    assert batch.leaf[2:] == [6, 7, 9, 8]
    assert batch.length.tolist()[2:] == [4, 5, 1, 3]
    assert batch.counts.tolist() == [1 + 4, 1 + 2, 1 + 2, 2 + 4 + 5, 2 + 4]


@pytest.mark.parametrize("responses", [[[7, 8], [7, 8]], [[7], [7, 8]], [[7, 8, 9], [7, 8]], [[7], [7], [7]]])
def test_responses_that_repeat_or_go_on_with_one_another_end_in_leaves_of_their_own(
    responses: list[list[int]],
) -> None:
    batch = pack([PreferenceExample([5], responses, [], "r")])
    assert [path_tokens(batch, r)[1:] for r in range(batch.num_responses)] == responses
    assert not set(batch.leaf) & set(batch.segment_parent)


few_tokens = st.lists(st.integers(3, 5), min_size=1, max_size=6)


@given(st.lists(st.tuples(few_tokens, st.lists(few_tokens, min_size=1, max_size=6)), min_size=1, max_size=3))
def test_the_tree_holds_each_response_once_and_nothing_twice(
    data: list[tuple[list[int], list[list[int]]]],
) -> None:
    batch = pack([PreferenceExample(prompt, responses, [], "r") for prompt, responses in data])
    paths = [batch.path(r) for r in range(batch.num_responses)]
    expected = [prompt + ids for prompt, responses in data for ids in responses]
    assert [path_tokens(batch, r) for r in range(batch.num_responses)] == expected
    start = batch.segment_start
    for path in paths:
        positions = [p for s in path for p in batch.position_ids[start[s] : start[s + 1]].tolist()]
        assert positions == list(range(len(positions)))
    assert all(end > begin for begin, end in pairwise(start))
    assert len(set(batch.leaf)) == batch.num_responses
    assert not set(batch.leaf) & set(batch.segment_parent)
    # As small as a tree can be in which each response keeps its last token: one token for each different beginning.
    for index, (prompt, responses) in enumerate(data):
        beginnings = {tuple(ids[:n]) for ids in responses for n in range(1, len(ids))}
        own = {s for r, path in enumerate(paths) if batch.example[r] == index for s in path}
        stored = sum(start[s + 1] - start[s] for s in own)
        assert stored == len(prompt) + len(beginnings) + len(responses)


def test_an_empty_example_leaves_no_trace() -> None:
    assert pack([EMPTY_EXAMPLE, PAIR]).row_ids == ("a.jsonl:1",)
    empty = pack([EMPTY_EXAMPLE])
    assert (empty.num_responses, len(empty), empty.pairs.shape) == (0, 0, (0, 2))


@pytest.mark.parametrize("broken", [replace(PAIR, prompt_ids=[]), replace(PAIR, rejected_ids=[[]])])
def test_a_first_token_without_a_predecessor_is_refused(broken: PreferenceExample) -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl:1: .*at least one token"):
        pack([broken])


def test_selecting_responses_drops_only_segments_that_no_path_holds() -> None:
    batch = pack([PAIR, ONE_REJECTED])
    part = select(batch, [1])
    assert path_tokens(part, 0) == [5, 6, 7, 10, 11, 12]
    assert part.input_ids.numel() == 6
    assert (part.role.tolist(), part.example.tolist(), part.row_ids) == ([1], [0], batch.row_ids)
    everything = select(batch, [0, 1, 2])
    for name in ("input_ids", "position_ids", "role", "example", "length", "pairs"):
        assert torch.equal(getattr(everything, name), getattr(batch, name))


@pytest.mark.parametrize("shared", [False, True])
def test_splitting_keeps_order_and_every_example(shared: bool) -> None:
    examples = random_examples(20, rejected=(2,))
    runs = split_by_tokens(examples, 40, shared)
    assert [e for run in runs for e in run] == examples
    assert len(runs) > 1
    if shared:
        sizes = [pack(run).segment_start[-1] for run in runs]
    else:
        sizes = [sum(len(e.prompt_ids) + len(r) for e in run for r in e.response_ids) for run in runs]
    assert all(size <= 40 or len(run) == 1 for size, run in zip(sizes, runs, strict=True))
    assert max(sizes) > 30  # and the limit is made use of


def test_an_example_above_the_budget_stands_alone_and_nothing_gives_one_empty_piece() -> None:
    assert [len(run) for run in split_by_tokens([PAIR, PAIR], 1)] == [1, 1]
    assert [batch.num_responses for batch in PreferenceCollator()([EMPTY_EXAMPLE])] == [0]


def test_context_within_a_response_stands_in_segments_of_its_own() -> None:
    example = PreferenceExample([5], [[6, 7, 8]], [[6, 9, 8]], "a", context=[[(1, 2)], []])
    batch = pack([example])
    assert [path_tokens(batch, r) for r in (0, 1)] == [[5, 6, 7, 8], [5, 6, 9, 8]]
    assert batch.segment_scored == [False, True, False, True, True]
    assert batch.length.tolist() == [2, 3] == response_lengths(batch)
    assert batch.counts.tolist()[3] == 2  # tokens of chosen responses


def test_responses_of_the_same_tokens_part_where_one_is_scored_and_the_other_is_not() -> None:
    example = PreferenceExample([5], [[6, 7, 8]], [[6, 7, 8]], "a", context=[[(1, 2)], []])
    batch = pack([example])
    assert [path_tokens(batch, r) for r in (0, 1)] == [[5, 6, 7, 8]] * 2
    assert batch.length.tolist() == [2, 3]
    assert [select(batch, [r]).length.tolist() for r in (0, 1)] == [[2], [3]]
