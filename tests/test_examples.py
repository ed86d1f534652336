"""The columnar store gives back what was put in, names its content, and hands out empty rows past its end."""

import hashlib
import pickle
import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infopo.data.examples import ExampleDataset
from infopo.errors import DataError
from infopo.records import EMPTY_EXAMPLE, PreferenceExample, Role, cut_response
from infopo.reference_store import response_key
from worlds import with_context

token_lists = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5)
examples = st.builds(
    PreferenceExample,
    prompt_ids=token_lists,
    chosen_ids=st.lists(token_lists, min_size=1, max_size=3),
    rejected_ids=st.lists(token_lists, max_size=3),
    row_id=st.text(max_size=5),
)

PAIR = PreferenceExample([1, 2], [[3, 4]], [[5]], "f:1")
UNPAIRED = PreferenceExample([6], [], [[7, 8, 9], [10]], "f:2")


@given(st.lists(st.one_of(examples, examples.map(with_context)), max_size=5))
def test_examples_come_back_as_they_went_in(expected: list[PreferenceExample]):
    dataset = ExampleDataset.from_examples(iter(expected))
    expected = [e if any(e.context) else replace(e, context=()) for e in expected]
    assert list(dataset) == expected
    assert [dataset[np.int64(i)] for i in range(len(dataset))] == expected
    assert list(pickle.loads(pickle.dumps(dataset))) == expected


def test_past_the_end_rows_are_empty_and_before_the_start_there_are_none():
    dataset = ExampleDataset.from_examples([PAIR])
    assert dataset[1] is EMPTY_EXAMPLE
    assert dataset[1000] is EMPTY_EXAMPLE
    assert ExampleDataset.from_examples([])[0] is EMPTY_EXAMPLE
    with pytest.raises(IndexError, match="got -1"):
        dataset[-1]


def test_offsets_roles_and_lengths():
    dataset = ExampleDataset.from_examples([PAIR, UNPAIRED])
    assert dataset.response_offsets.tolist() == [0, 2, 4]
    assert dataset.roles.tolist() == [Role.CHOSEN, Role.REJECTED, Role.REJECTED, Role.REJECTED]
    assert dataset.lengths.tolist() == [2 + 2 + 1, 1 + 3 + 1]
    assert dataset.num_responses == 4


def test_reference_values_go_with_their_responses():
    dataset = ExampleDataset.from_examples([PAIR, UNPAIRED])
    assert dataset.reference is None
    values = np.array([np.nan, -1.5, -2.0, -1 / 3])
    scored = dataset.with_reference(values)
    assert dataset[0].reference is None
    np.testing.assert_array_equal(scored[0].reference, [np.nan, -1.5])
    assert scored[1].reference == [-2.0, -1 / 3]
    kept = ExampleDataset.from_examples([UNPAIRED, *scored]).reference
    np.testing.assert_array_equal(kept, [np.nan, np.nan, *values])
    with pytest.raises(ValueError, match="expected 4 reference log-probs"):
        dataset.with_reference(np.zeros(3))


def test_changing_the_given_reference_array_changes_nothing():
    values = np.zeros(2)
    scored = ExampleDataset.from_examples([PAIR]).with_reference(values)
    values[:] = 1
    assert scored[0].reference == [0, 0]


DIFFERENT: list[list[PreferenceExample]] = [
    [],
    [PAIR],
    [PAIR, PAIR],
    [PAIR, UNPAIRED],
    [UNPAIRED, PAIR],
    [PreferenceExample([1], [[2, 3, 4]], [[5]], "")],
    [PreferenceExample([1, 2], [[3]], [[4, 5]], "")],
    [PreferenceExample([1, 2], [[3, 4], [5]], [], "")],
    [PreferenceExample([1, 2], [], [[3, 4], [5]], "")],
    [PreferenceExample([1, 2], [[3, 4]], [], ""), PreferenceExample([], [], [[5]], "")],
]


def test_content_hash_tells_tokens_and_roles_apart_and_nothing_else():
    hashes = [ExampleDataset.from_examples(content).content_hash() for content in DIFFERENT]
    assert len(set(hashes)) == len(DIFFERENT)
    renamed = ExampleDataset.from_examples([PreferenceExample([1, 2], [[3, 4]], [[5]], "other")])
    assert renamed.with_reference(np.ones(2)).content_hash() == hashes[1]


def test_content_hash_is_the_same_everywhere():
    """Spelled out byte by byte: a run resumes on another machine only if this definition never changes."""
    content = hashlib.sha256()
    for kind, values in [
        ("q", [0, 2, 3]),  # where prompts begin
        ("i", [1, 2, 6]),  # their tokens
        ("q", [0, 2, 4]),  # first response of each example
        ("b", [0, 1, 1, 1]),  # roles
        ("q", [0, 2, 3, 6, 7]),  # where responses begin
        ("i", [3, 4, 5, 7, 8, 9, 10]),  # their tokens
    ]:
        content.update(struct.pack(f"<q{len(values)}{kind}", len(values), *values))
    assert ExampleDataset.from_examples([PAIR, UNPAIRED]).content_hash() == content.hexdigest()


def test_only_integers_index_it():
    dataset: Any = ExampleDataset.from_examples([PAIR])
    with pytest.raises(TypeError):
        dataset["0"]
    with pytest.raises(TypeError):
        dataset[0.0]


def example(prompt: int, responses: list[list[int]], row: int) -> PreferenceExample:
    return PreferenceExample([prompt], responses[:1], responses[1:], f"a:{row}")


def test_mismatched_responses_are_those_of_the_example_before_with_another_prompt() -> None:
    """Prompts 5 6 6 7: the first takes from the last, and the second 6 does not take from the first."""
    rows = [(5, [[11]]), (6, [[21, 22, 23], [24]]), (6, [[31]]), (7, [[41]])]
    data = ExampleDataset.from_examples(example(p, r, i) for i, (p, r) in enumerate(rows))
    mismatched = data.mismatched(max_length=None)
    assert [list(e.kl_ids) for e in mismatched] == [[[41]], [[11]], [[11]], [[31]]]
    assert [replace(e, kl_ids=()) for e in mismatched] == list(data)
    assert [e.roles for e in mismatched][1] == [Role.CHOSEN, Role.REJECTED, Role.KL]
    assert mismatched.mismatched(None) is mismatched
    assert mismatched.content_hash() != data.content_hash()


def test_mismatched_responses_are_cut_to_the_room_their_new_prompt_leaves() -> None:
    rows = [example(5, [[21, 22, 23], [24]], 0), PreferenceExample([6, 6], [[31]], [], "a:1")]
    mismatched = ExampleDataset.from_examples(rows).mismatched(max_length=4)
    assert [list(e.kl_ids) for e in mismatched] == [[[31]], [[21, 22], [24]]]


@pytest.mark.parametrize("number", [1, 3])
def test_rows_of_one_prompt_have_no_mismatched_responses(number: int) -> None:
    data = ExampleDataset.from_examples(example(5, [[i]], i) for i in range(number))
    with pytest.raises(DataError, match=r"a:0: all rows have the prompt of this one"):
        data.mismatched(None)


def test_what_is_scored_is_part_of_the_content() -> None:
    plain = PreferenceExample([1], [[2, 3, 4, 5]], [[6]], "f:1")
    hashes = {ExampleDataset.from_examples([each]).content_hash() for each in (plain, with_context(plain))}
    assert len(hashes) == 2
    keys = {response_key([1], [2, 3, 4, 5], spans) for spans in ((), [(1, 2)], [(1, 3)])}
    assert len(keys) == 3


def test_mismatched_responses_keep_their_context_cut_to_their_room() -> None:
    rows = [with_context(example(prompt, [[7, 8, 9, 10], [5]], prompt)) for prompt in (1, 2)]
    first = ExampleDataset.from_examples(rows).mismatched(4)[0]
    assert first.kl_ids == ([7], [5])  # context at the end predicts nothing
    assert ExampleDataset.from_examples(rows).mismatched(None)[0].spans[2:] == [((1, 3),), ()]


@pytest.mark.parametrize(("room", "left"), [(5, 5), (4, 3), (3, 3), (2, 1), (1, 1)])
def test_a_cut_leaves_no_context_at_the_end(room: int, left: int) -> None:
    ids, context = cut_response([5, 6, 7, 8, 9], [(1, 2), (3, 4)], room)
    assert len(ids) == left
    assert all(end < left for _, end in context)
