"""The forest: what is stored, where it stands, and that nothing is lost or doubled."""

from dataclasses import replace

import pytest
import torch

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
    assert batch.counts.tolist() == [1, 1, 2, 2]  # pairs, chosen, rejected, tokens of chosen
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


def test_splitting_keeps_order_and_every_example() -> None:
    examples = random_examples(20)
    runs = split_by_tokens(examples, 40)
    assert [e for run in runs for e in run] == examples
    assert len(runs) > 1
    sizes = [sum(len(e.prompt_ids) + len(r) for e in run for r in e.response_ids) for run in runs]
    assert all(size <= 40 or len(run) == 1 for size, run in zip(sizes, runs, strict=True))


def test_an_example_above_the_budget_stands_alone_and_nothing_gives_one_empty_piece() -> None:
    assert [len(run) for run in split_by_tokens([PAIR, PAIR], 1)] == [1, 1]
    assert [batch.num_responses for batch in PreferenceCollator()([EMPTY_EXAMPLE])] == [0]
