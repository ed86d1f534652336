"""Shapes beyond pairs: what each bad row is refused for, and how scores, votes and labels part responses."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infopo.catalog import DATA_SHAPES, SCORE_RULES
from infopo.data.counts import DataCounts
from infopo.data.messages import ROLES
from infopo.data.responses import ScoreRule
from infopo.data.shapes import detect_shape, parse_row
from infopo.data.sources import read_rows
from infopo.errors import DataError, RecipeError
from test_sources import (
    ALPACA,
    ALPACA_UNPAIRED,
    CHAT_PAIR,
    CONVERSATIONAL,
    LISTS,
    SAMPLES,
    SCORED,
    SHAREGPT,
    STANDARD,
    UNPAIRED,
    UNPAIRED_MESSAGES,
    VOTES,
    assistant,
    error_of,
    user,
    write_lines,
)

BAD_ROWS: list[tuple[str, Any, str]] = [
    ("wrong role", SHAREGPT | {"conversations": [{"from": "narrator", "value": "a"}]}, "sharegpt"),
    ("wrong role", SHAREGPT | {"chosen": {"from": "human", "value": "a"}}, "sharegpt"),
    ("wrong role", SHAREGPT | {"conversations": [{"from": "gpt", "value": "a"}]}, "sharegpt"),
    ("wrong type", SHAREGPT | {"chosen": 3}, "sharegpt"),
    ("wrong type", SHAREGPT | {"conversations": "a"}, "sharegpt"),
    ("wrong type", SHAREGPT | {"chosen": {"from": "gpt", "value": 3}}, "sharegpt"),
    ("message without content", SHAREGPT | {"rejected": {"from": "gpt"}}, "sharegpt"),
    ("invalid JSON", SHAREGPT | {"chosen": {"from": "function_call", "value": "{"}}, "sharegpt"),
    ("empty prompt", SHAREGPT | {"conversations": []}, "sharegpt"),
    ("empty chosen", SHAREGPT | {"chosen": {"from": "gpt", "value": " "}}, "sharegpt"),
    ("chosen = rejected", SHAREGPT | {"chosen": SHAREGPT["rejected"]}, "sharegpt"),
    ("missing column", {"conversations": SHAREGPT["conversations"], "chosen": SHAREGPT["chosen"]}, "sharegpt"),
    ("empty prompt", ALPACA | {"instruction": " "}, "alpaca"),
    ("wrong type", ALPACA | {"instruction": 3}, "alpaca"),
    ("wrong type", ALPACA | {"input": 3}, "alpaca"),
    ("wrong type", ALPACA | {"history": ["a"]}, "alpaca"),
    ("missing column", {"chosen": "a", "rejected": "b"}, "alpaca"),
    ("chosen = rejected", ALPACA | {"chosen": "Green."}, "alpaca"),
    ("wrong type", ALPACA_UNPAIRED | {"kto_tag": "maybe"}, "alpaca_unpaired"),
    ("empty rejected", ALPACA_UNPAIRED | {"output": ""}, "alpaca_unpaired"),
    ("wrong type", UNPAIRED | {"label": 2}, "unpaired"),
    ("null value", UNPAIRED | {"label": None}, "unpaired"),
    ("missing column", {"prompt": "a", "completion": "b"}, "unpaired"),
    ("empty chosen", UNPAIRED | {"completion": ""}, "unpaired"),
    ("empty rejected", UNPAIRED | {"completion": "", "label": False}, "unpaired"),
    ("wrong type", UNPAIRED | {"prompt": [user("a")]}, "unpaired"),
    ("wrong role", UNPAIRED | {"prompt": [user("a")], "completion": [user("b")]}, "unpaired"),
    ("empty prompt", UNPAIRED_MESSAGES | {"messages": [assistant("a")]}, "unpaired_messages"),
    ("wrong role", UNPAIRED_MESSAGES | {"messages": [user("a"), user("b")]}, "unpaired_messages"),
    ("wrong type", UNPAIRED_MESSAGES | {"label": [True]}, "unpaired_messages"),
    ("no responses", LISTS | {"chosen": [], "rejected": []}, "lists"),
    ("empty chosen", LISTS | {"chosen": [" blue.", " "]}, "lists"),
    ("chosen = rejected", LISTS | {"rejected": [" green.", " grey."]}, "lists"),
    ("wrong type", LISTS | {"chosen": [" blue.", 3]}, "lists"),
    ("wrong type", LISTS | {"chosen": " blue."}, "lists"),
    ("null value", LISTS | {"chosen": [" blue.", None]}, "lists"),
    ("invalid UTF-8", LISTS | {"chosen": ["\ud83d"]}, "lists"),
    ("scores do not match", SCORED | {"scores": [1, 2]}, "scored"),
    ("scores do not match", SCORED | {"responses": [], "scores": []}, "scored"),
    ("wrong type", SCORED | {"scores": [1, "nine", 7]}, "scored"),
    ("wrong type", SCORED | {"scores": [1, float("nan"), 7]}, "scored"),
    ("wrong type", SCORED | {"scores": [1, None, 7]}, "scored"),
    ("wrong type", SCORED | {"scores": [1, True, 7]}, "scored"),
    ("tie", SCORED | {"scores": [7, 7, 7]}, "scored"),
    ("chosen = rejected", SCORED | {"responses": [" a", " a", " b"]}, "scored"),
    ("wrong type", VOTES | {"annotator2": 3}, "votes"),
    ("wrong type", VOTES | {"annotator2": True}, "votes"),
    ("null value", VOTES | {"annotator2": None}, "votes"),
    ("wrong type", VOTES | {"response1": False}, "votes"),
    ("missing column", {k: v for k, v in VOTES.items() if k != "annotator1"}, "votes"),
    ("tie", VOTES | {"annotator3": 0, "annotator1": 0}, "votes"),
    ("images", CONVERSATIONAL | {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "conversational"),
] + [("images", row | {"images": ["sky.png"]}, shape) for shape, row in SAMPLES.items()]  # fmt: skip


@pytest.mark.parametrize(("reason", "row", "shape"), BAD_ROWS)
def test_a_bad_row_is_refused_by_name(reason: str, row: Any, shape: str):
    assert error_of(row, shape).reason == reason


def test_errors_name_the_response_among_several():
    assert "expected a chosen response 2 of 2, it is empty" in str(
        error_of(LISTS | {"chosen": ["a", ""]}, "lists")
    )
    assert "'chosen, response 2': expected text, got int 3" in str(
        error_of(LISTS | {"chosen": ["a", 3]}, "lists")
    )


def test_sharegpt_speaks_of_tools_as_messages_do():
    look = {"type": "function", "function": {"name": "look", "arguments": {}}}
    row = SHAREGPT | {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "What colour?"},
            {"from": "function_call", "value": '{"name": "look", "arguments": {}}'},
            {"from": "observation", "value": "blue"},
        ],
        "tools": "",
    }
    parts = parse_row(row, "sharegpt", "f:1")
    assert parts.prompt == [
        {"role": "system", "content": "Be brief."}, user("What colour?"),
        {"role": "assistant", "tool_calls": [look]}, {"role": "tool", "content": "blue"},
    ]  # fmt: skip
    assert parts.tools is None


def test_a_system_column_comes_first_unless_the_turns_begin_with_one():
    be_brief, be_kind = {"role": "system", "content": "Be brief."}, {"from": "system", "value": "Be kind."}
    assert parse_row(SHAREGPT | {"system": "Be brief."}, "sharegpt", "f:1").prompt == [
        be_brief,
        *CHAT_PAIR[0],
    ]
    both = SHAREGPT | {"system": "Be brief.", "conversations": [be_kind, *SHAREGPT["conversations"]]}
    assert parse_row(both, "sharegpt", "f:1").prompt[0]["content"] == "Be kind."
    assert parse_row(ALPACA | {"system": "Be brief."}, "alpaca", "f:1").prompt == [be_brief, *CHAT_PAIR[0]]


def test_alpaca_joins_history_instruction_and_input():
    row = ALPACA | {"history": [["Hello?", "Yes."]], "input": "By day."}
    parts = parse_row(row, "alpaca", "f:1")
    assert parts.prompt == [user("Hello?"), assistant("Yes."), user("What colour is the sky?\nBy day.")]
    question = {"question": "What colour is the sky?", "chosen": "Blue.", "rejected": "Green."}
    assert detect_shape(question) == "alpaca"
    assert parse_row(question, "alpaca", "f:1")[:3] == CHAT_PAIR


@pytest.mark.parametrize(
    ("label", "good"),
    [(True, True), (False, False), (1, True), (0, False), ("true", True), ("False", False), ("1", True)],
)
def test_a_label_says_on_which_side_the_response_is(label: Any, good: bool):
    parts = parse_row(UNPAIRED | {"label": label}, "unpaired", "f:1")
    assert (parts.chosen, parts.rejected) == (([" blue."], []) if good else ([], [" blue."]))


def test_conversations_serve_for_lists_scores_and_unpaired_rows_alike():
    prompt, (chosen,), (rejected,) = CHAT_PAIR
    lists = {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}
    scored = {"prompt": prompt, "responses": [chosen, rejected], "scores": [2, 1]}
    for row in (lists, scored):
        assert parse_row(row, detect_shape(row), "f:1")[:3] == CHAT_PAIR
    unpaired = {"prompt": prompt, "completion": chosen, "label": True}
    assert parse_row(unpaired, detect_shape(unpaired), "f:1")[:3] == (prompt, [chosen], [])


def test_one_side_of_a_list_may_be_empty():
    row = LISTS | {"rejected": []}
    assert detect_shape(row) == "lists"
    assert parse_row(row, "lists", "f:1")[:3] == ("The sky is", [" blue.", " grey."], [])


def test_rows_with_both_sides_are_pairs_whatever_else_they_hold():
    row = STANDARD | {"label": True, "completion": "c", "responses": ["a"], "scores": [1], "messages": []}
    assert detect_shape(row) == "standard"
    nulls = UNPAIRED | {"chosen": None, "rejected": None}
    assert detect_shape(nulls) == "unpaired"


# --- rules that part responses ---


@pytest.mark.parametrize(
    ("rule", "chosen", "rejected"),
    [
        (ScoreRule(), [1], [0]),
        (ScoreRule("best-worst"), [1], [0]),
        (ScoreRule("best-rest"), [1, 3], [0, 2]),
        (ScoreRule("threshold", 7), [1, 2, 3], [0]),
        (ScoreRule("threshold", 0), [0, 1, 2, 3], []),
        (ScoreRule("threshold", 10), [], [0, 1, 2, 3]),
    ],
)
def test_rules_on_an_example(rule: ScoreRule, chosen: list[int], rejected: list[int]):
    assert rule.split([1, 9.5, 7, 9.5]) == (chosen, rejected)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.sampled_from(SCORE_RULES))
def test_every_chosen_response_scores_above_every_rejected_one(scores: list[int], name: str):
    rule = ScoreRule(name, 2 if name == "threshold" else None)
    chosen, rejected = rule.split(scores)
    assert not set(chosen) & set(rejected)
    assert all(scores[c] > scores[r] for c in chosen for r in rejected)
    if name != "threshold":
        assert bool(chosen) == bool(rejected) == (len(set(scores)) > 1)
    if name != "best-worst" and chosen:
        assert sorted(chosen + rejected) == list(range(len(scores)))


def test_a_rule_that_cannot_be_is_refused():
    with pytest.raises(RecipeError, match="did you mean 'best-rest'"):
        ScoreRule("best-res")
    for wrong in (("threshold", None), ("best-rest", 1.0)):
        with pytest.raises(RecipeError, match=r"^score_threshold: goes with"):
            ScoreRule(*wrong)


@pytest.mark.parametrize(
    ("votes", "winner"),
    [((1, 1, 1), 1), ((2, 2, 2), 2), ((1, 2, 2), 2), ((0, 1, 1), 1), ((0, 0, 2), 0), ((0, 1, 2), 0), ((0, 0, 0), 0),
     ((1,), 1), ((1, 2), 0), ((1, 1, 2, 2), 0), ((1, 0), 0)],
)  # fmt: skip
def test_votes_need_more_than_half(votes: tuple[int, ...], winner: int):
    row = {k: v for k, v in VOTES.items() if not k.startswith("annotator")}
    row |= {f"annotator{i}": vote for i, vote in enumerate(votes, 1)}
    if winner == 0:
        assert error_of(row, "votes").reason == "tie"
    else:
        prompt, first, second = CHAT_PAIR
        expected = (prompt, first, second) if winner == 1 else (prompt, second, first)
        assert parse_row(row, "votes", "f:1")[:3] == expected


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_ties_are_counted_under_both_policies_and_stop_nothing(tmp_path: Any, policy: str):
    tie = VOTES | {"annotator1": 0, "annotator2": 0}
    path = write_lines(tmp_path / "votes.jsonl", [tie, VOTES, tie])
    counts = DataCounts(on_bad_row=policy)
    assert len(list(read_rows(path, counts))) == 1
    assert counts.skipped == {"tie": 2}
    assert counts.first_skipped["tie"] == f"{path}:1: votes 0, 0, 2: no response has more than half"


def test_a_file_of_ties_alone_is_refused(tmp_path: Any):
    path = write_lines(tmp_path / "scored.jsonl", [SCORED | {"scores": [1, 1, 1]}] * 2)
    with pytest.raises(DataError, match=r"none of its 2 rows can be used; the first: .*all 3 scores are 1"):
        list(read_rows(path, DataCounts()))


@pytest.mark.parametrize("first", DATA_SHAPES)
@pytest.mark.parametrize("other", ["standard", "unpaired", "votes"])
def test_the_first_row_of_another_shape_is_named(tmp_path: Any, first: str, other: str):
    if first == other:
        return
    path = write_lines(tmp_path / "mixed.jsonl", [SAMPLES[first], SAMPLES[first], SAMPLES[other]])
    with pytest.raises(DataError) as caught:
        list(read_rows(path, DataCounts()))
    assert caught.value.row_id == f"{path}:3"
    assert "rows before" in caught.value.problem
    assert other in caught.value.problem


def test_shapes_and_roles_are_the_ones_the_page_speaks_of():
    assert set(SAMPLES) == set(DATA_SHAPES)
    assert ROLES == ("system", "developer", "user", "assistant", "tool", "ipython")


CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}


@pytest.mark.parametrize("calls", [[CALL], json.dumps([CALL]), [], "", "  ", None])
def test_tool_calls_are_a_list_or_its_text_or_left_out(calls: Any):
    message = {"role": "assistant", "content": "Yes", "tool_calls": calls}
    row = {"prompt": [user("a")], "chosen": [message], "rejected": [assistant("No")]}
    (chosen,) = parse_row(row, "conversational", "f:1").chosen
    kept = {"tool_calls": [CALL]} if "look" in str(calls) else {}
    assert chosen == [{"role": "assistant", "content": "Yes"} | kept]


@pytest.mark.parametrize("calls", ["look", "{", {"name": "look"}, ["look"], json.dumps(CALL), [None], 3])
def test_tool_calls_of_another_kind_are_refused(calls: Any):
    message = {"role": "assistant", "content": "Yes", "tool_calls": calls}
    row = {"prompt": [user("a")], "chosen": [message], "rejected": [assistant("No")]}
    with pytest.raises(DataError, match="'tool_calls': expected a list of calls"):
        parse_row(row, "conversational", "f:1")
