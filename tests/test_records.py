"""The nouns: who is a pair with whom, what a path is, and that nothing is changed after it was made."""

import dataclasses
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from infopo.errors import (
    CheckpointError,
    DataError,
    InfoPOError,
    RecipeError,
    TrainingError,
    UnsupportedArgumentError,
)
from infopo.records import (
    EMPTY_EXAMPLE,
    LossTerm,
    PackedBatch,
    PreferenceExample,
    PreferenceRow,
    ResponseLogps,
    Role,
    response_indices,
    sum_dtype,
)

CHOSEN, REJECTED, KL = Role.CHOSEN, Role.REJECTED, Role.KL


def packed_batch() -> PackedBatch:
    """Two prompts; the first one's responses share their first token, so its forest is three deep.

    Segments: 0 prompt [1 2], 1 shared [3], 2 chosen's rest [4 5], 3 rejected's rest [6]; 4 prompt [7],
    5 chosen [8].
    """
    return PackedBatch(
        input_ids=torch.tensor([1, 2, 3, 4, 5, 6, 7, 8]),
        position_ids=torch.tensor([0, 1, 2, 3, 4, 3, 0, 1]),
        segment_start=[0, 2, 3, 5, 6, 7, 8],
        segment_parent=[-1, 0, 1, 1, -1, 4],
        segment_scored=[False, True, True, True, False, True],
        leaf=[2, 3, 5],
        role=torch.tensor([CHOSEN, REJECTED, CHOSEN]),
        example=torch.tensor([0, 0, 1]),
        length=torch.tensor([3, 2, 1]),
        chosen=torch.tensor([0, 2]),
        rejected=torch.tensor([1]),
        pairs=torch.tensor([[0, 1]]),
        counts=torch.tensor([1, 2, 1, 4, 3]),
        reference=torch.tensor([-1.0, -2.0, float("nan")]),
        row_ids=("a.jsonl:1", "a.jsonl:2"),
        roles=[CHOSEN, REJECTED, CHOSEN],
        owners=[0, 0, 1],
    )


def logps() -> ResponseLogps:
    four = torch.zeros(4, dtype=torch.float64)
    role, example = torch.tensor([REJECTED, CHOSEN, KL, CHOSEN]), torch.tensor([0, 0, 0, 1])
    return ResponseLogps.of(four, four, torch.ones(4, dtype=torch.int64), role, example)


# --- response_indices ---------------------------------------------------------------------------------------


def as_lists(indices: tuple[Tensor, Tensor, Tensor]) -> tuple[list[int], list[int], list[list[int]]]:
    chosen, rejected, pairs = indices
    return chosen.tolist(), rejected.tolist(), pairs.tolist()


def test_a_pair_is_a_chosen_and_a_rejected_response_of_one_example() -> None:
    indices = response_indices([CHOSEN, REJECTED, REJECTED, CHOSEN], [0, 0, 1, 1])
    assert as_lists(indices) == ([0, 3], [1, 2], [[0, 1], [3, 2]])


def test_k_way_examples_give_all_their_pairs() -> None:
    indices = response_indices([CHOSEN, CHOSEN, REJECTED, REJECTED, REJECTED], [7] * 5)
    assert as_lists(indices)[2] == [[0, 2], [0, 3], [0, 4], [1, 2], [1, 3], [1, 4]]


def test_kl_responses_are_neither_chosen_nor_rejected_nor_paired() -> None:
    indices = response_indices([KL, CHOSEN, KL, REJECTED, KL], [0, 0, 0, 0, 1])
    assert as_lists(indices) == ([1], [3], [[1, 3]])


def test_unpaired_examples_give_no_pair() -> None:
    assert as_lists(response_indices([CHOSEN, REJECTED], [0, 1])) == ([0], [1], [])


@pytest.mark.parametrize("role", [[], [KL], [CHOSEN], [REJECTED]], ids=["none", "kl", "chosen", "rejected"])
def test_indices_keep_their_shape_and_type_when_empty(role: list[Role]) -> None:
    chosen, rejected, pairs = response_indices(role, [0] * len(role))
    assert pairs.shape == (0, 2)
    assert chosen.ndim == rejected.ndim == 1
    assert {t.dtype for t in (chosen, rejected, pairs)} == {torch.int64}


@given(st.lists(st.tuples(st.sampled_from(Role), st.integers(0, 4)), max_size=12))
def test_pairs_are_the_product_of_both_sides_of_every_example(who: list[tuple[Role, int]]) -> None:
    role, example = [r for r, _ in who], [e for _, e in who]
    chosen, rejected, pairs = as_lists(response_indices(role, example))
    assert chosen == [i for i, r in enumerate(role) if r is CHOSEN]
    assert rejected == [i for i, r in enumerate(role) if r is REJECTED]
    assert pairs == [[c, r] for c in chosen for r in rejected if example[c] == example[r]]


def test_response_logps_of_derives_its_indices_from_roles_and_examples() -> None:
    made = logps()
    assert as_lists((made.chosen, made.rejected, made.pairs)) == ([1, 3], [0], [[1, 0]])


# --- PackedBatch --------------------------------------------------------------------------------------------


def test_a_path_runs_from_the_root_to_the_leaf() -> None:
    batch = packed_batch()
    assert [batch.path(i) for i in range(batch.num_responses)] == [[0, 1, 2], [0, 1, 3], [4, 5]]


def test_positions_go_on_along_a_path_and_its_scored_tokens_are_the_length() -> None:
    """What `packed_batch` must satisfy by PackedBatch's own docstring."""
    batch = packed_batch()
    for response in range(batch.num_responses):
        spans = [range(*batch.segment_start[s : s + 2]) for s in batch.path(response)]
        positions = [int(batch.position_ids[t]) for span in spans for t in span]
        scored = [
            len(span) for s, span in zip(batch.path(response), spans, strict=True) if batch.segment_scored[s]
        ]
        assert positions == list(range(len(positions)))
        assert sum(scored) == batch.length[response]


def test_len_counts_examples_and_num_responses_responses() -> None:
    assert (len(packed_batch()), packed_batch().num_responses) == (2, 3)


def test_moving_a_batch_puts_the_reference_into_the_precision_of_sums_and_keeps_every_other_type() -> None:
    """float64 where the device has it (ARCHITECTURE §4 rule 6), so that log-ratios are not rounded."""
    batch, moved = packed_batch(), packed_batch().to("cpu")
    assert batch.reference.dtype is torch.float32
    assert moved.reference.dtype is sum_dtype("cpu") is torch.float64
    for name in ("input_ids", "position_ids", "role", "example", "length", "chosen", "rejected", "pairs"):
        assert getattr(moved, name).dtype is getattr(batch, name).dtype


def test_moving_a_batch_moves_every_tensor_and_leaves_the_layout_on_the_host() -> None:
    batch, moved = packed_batch(), packed_batch().to("meta")
    for name in (f.name for f in dataclasses.fields(PackedBatch)):
        before, after = getattr(batch, name), getattr(moved, name)
        if isinstance(before, Tensor):
            assert (after.device.type, after.shape) == ("meta", before.shape)
        else:
            assert after == before
    assert batch.input_ids.device.type == "cpu"


# --- all records --------------------------------------------------------------------------------------------

RECORDS: list[Any] = [
    PreferenceRow(prompt="p", chosen=["a"], rejected=["b"], row_id="f:1"),
    EMPTY_EXAMPLE,
    packed_batch(),
    logps(),
    LossTerm(torch.zeros(1), per="pair"),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_records_are_frozen(record: Any) -> None:
    for field in dataclasses.fields(record):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, field.name, None)
    with pytest.raises((AttributeError, TypeError)):
        record.surprise = 1


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_records_survive_a_process_boundary(record: Any) -> None:
    """Data loader workers pickle them."""
    copy = pickle.loads(pickle.dumps(record))
    for field in dataclasses.fields(record):
        before, after = getattr(record, field.name), getattr(copy, field.name)
        same = (
            torch.equal(before.nan_to_num(7), after.nan_to_num(7))
            if isinstance(before, Tensor)
            else before == after
        )
        assert same, field.name


def test_responses_of_an_example_are_chosen_first() -> None:
    example = PreferenceExample([1], chosen_ids=[[2], [3]], rejected_ids=[[4]], row_id="f:1")
    assert example.response_ids == [[2], [3], [4]]
    assert EMPTY_EXAMPLE.response_ids == []


def test_roles_are_distinct_integers_that_tensors_can_hold() -> None:
    assert torch.tensor([CHOSEN, REJECTED, KL]).tolist() == [0, 1, 2]


# --- errors -------------------------------------------------------------------------------------------------


def test_data_errors_name_the_row_and_survive_a_process_boundary() -> None:
    error = DataError("empty response; expected text", "pairs.jsonl:17", reason="empty chosen")
    copy = pickle.loads(pickle.dumps(error))
    assert str(error) == str(copy) == "pairs.jsonl:17: empty response; expected text"
    assert type(copy) is DataError
    assert (copy.problem, copy.row_id, copy.reason) == (error.problem, "pairs.jsonl:17", "empty chosen")


@pytest.mark.parametrize("problems", [["a: x"], ["a: x", "b: y"]], ids=len)
@pytest.mark.parametrize("source", [None, "run.yaml"])
@pytest.mark.parametrize("kind", [RecipeError, UnsupportedArgumentError])
def test_recipe_errors_list_every_problem_and_survive_a_process_boundary(
    kind: type[RecipeError], problems: list[str], source: str | None
) -> None:
    error = kind(problems, source)
    copy = pickle.loads(pickle.dumps(error))
    assert all(problem in str(error) for problem in problems)
    assert source is None or source in str(error)
    assert len(problems) == 1 or str(error).startswith("2 problems")
    assert (type(copy), str(copy), copy.problems, copy.source) == (kind, str(error), problems, source)


def test_one_problem_may_be_given_as_a_string() -> None:
    assert RecipeError("a: x").problems == ["a: x"]
    assert str(RecipeError("a: x")) == "a: x"


def test_errors_can_be_caught_by_what_they_are_and_by_the_builtin_they_resemble() -> None:
    assert all(issubclass(e, InfoPOError) for e in (RecipeError, DataError, TrainingError, CheckpointError))
    assert issubclass(RecipeError, ValueError)
    assert issubclass(DataError, ValueError)
    assert issubclass(UnsupportedArgumentError, RecipeError)
    assert issubclass(UnsupportedArgumentError, NotImplementedError)
    assert issubclass(CheckpointError, TrainingError)
    assert issubclass(TrainingError, RuntimeError)
