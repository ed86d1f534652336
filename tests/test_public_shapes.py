"""Rows of public data sets, as these are published: each is read, value by value, or refused with the remedy."""

import json
from pathlib import Path
from typing import Any

import pytest

from infopo.errors import DataError
from test_sources import assistant, read, user, write_csv, write_lines, write_parquet

ASKED = user("What colour is the sky?")
SYSTEM = {"role": "system", "content": "Be brief."}
BLUE, GREEN = assistant("Blue."), assistant("Green.")
PAIR = ([ASKED], [[BLUE]], [[GREEN]])
PAIR_WITH_SYSTEM = ([SYSTEM, ASKED], [[BLUE]], [[GREEN]])
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALLS = [{"name": "look", "arguments": {"at": place}} for place in ("sky", "sea")]
SHAREGPT_PROMPT = [{"from": "human", "value": ASKED["content"]}]


def parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


PUBLIC: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "OpenAI preferences": (
        {"input": {"messages": [ASKED], "tools": [LOOK], "parallel_tool_calls": True},
         "preferred_output": [BLUE], "non_preferred_output": [GREEN]},
        PAIR,
    ),
    "UltraFeedback": (
        {"source": "flan", "instruction": ASKED["content"], "models": ["a", "b", "c"], "correct_answers": ["None"],
         "completions": [
             {"model": "a", "response": "Green.", "overall_score": 2.0, "custom_system_prompt": "Be helpful."},
             {"model": "b", "response": "Blue.", "overall_score": 8.5, "custom_system_prompt": "Be helpful."},
             {"model": "c", "response": "Grey.", "overall_score": 5.0, "custom_system_prompt": "Be helpful."}]},
        PAIR,
    ),
    "UltraFeedback, without a total": (
        {"instruction": ASKED["content"], "completions": [
            {"response": "Green.", "annotations": {"helpfulness": {"Rating": "5"}, "honesty": {"Rating": "2"}}},
            {"response": "Blue.", "annotations": {"helpfulness": {"Rating": "4"}, "honesty": {"Rating": "N/A"}}}]},
        PAIR,
    ),
    "UltraFeedback, a total for some": (
        {"instruction": ASKED["content"], "completions": [
            {"response": "Green.", "overall_score": 6.0, "fine-grained_score": 2.5},
            {"response": "Blue.", "overall_score": None, "fine-grained_score": 4.5}]},
        PAIR,
    ),
    "Nectar": (
        {"prompt": "\n\nHuman: What colour is the sky?\n\nAssistant: ", "num_responses": 3, "turns": 1,
         "answers": [{"answer": "Grey.", "model": "a", "rank": 2.0}, {"answer": "Green.", "model": "b", "rank": 7.0},
                     {"answer": "Blue.", "model": "c", "rank": 1.0}]},
        PAIR,
    ),
    "PKU-SafeRLHF": (
        {"prompt": ASKED["content"], "response_0": "Green.", "response_1": "Blue.", "is_response_0_safe": True,
         "is_response_1_safe": True, "better_response_id": 1, "safer_response_id": 0},
        PAIR,
    ),
    "Chatbot Arena": (
        {"question_id": "1", "model_a": "x", "model_b": "y", "winner": "model_b", "judge": "j", "turn": 1,
         "conversation_a": [ASKED, GREEN], "conversation_b": [ASKED, BLUE], "language": "English"},
        PAIR,
    ),
    "Chatbot Arena, content in parts": (
        {"model_a": "x", "model_b": "y", "winner": "model_a",
         "conversation_a": [{"role": "user", "content": parts(ASKED["content"])},
                            {"role": "assistant", "content": parts("Blue.")}],
         "conversation_b": [{"role": "user", "content": parts(ASKED["content"])},
                            {"role": "assistant", "content": parts("Green.")}]},
        PAIR,
    ),
    "LMSYS on Kaggle": (
        {"id": 1, "model_a": "x", "model_b": "y", "prompt": json.dumps([ASKED["content"]]),
         "response_a": json.dumps(["Green."]), "response_b": json.dumps(["Blue."]),
         "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
        PAIR,
    ),
    "Chatbot Arena, several rounds": (
        {"model_a": "x", "model_b": "y", "winner": "model_b", "turn": 2,
         "conversation_a": [ASKED, GREEN, user("Sure?"), GREEN], "conversation_b": [ASKED, BLUE, user("Sure?"), BLUE]},
        ([ASKED], [[BLUE, user("Sure?"), BLUE]], [[GREEN, user("Sure?"), GREEN]]),
    ),
    "LMSYS on Kaggle, several rounds": (
        {"id": 1, "model_a": "x", "model_b": "y", "prompt": json.dumps([ASKED["content"], "Sure?"]),
         "response_a": json.dumps(["Green.", "Green."]), "response_b": json.dumps(["Blue.", "Blue."]),
         "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
        ([ASKED], [[BLUE, user("Sure?"), BLUE]], [[GREEN, user("Sure?"), GREEN]]),
    ),
    "WSDM on Kaggle, a text that looks like a list": (
        {"id": "1", "prompt": '["a", "b"]', "response_a": "Blue.", "response_b": "Green.", "winner": "model_a"},
        ([user('["a", "b"]')], [[BLUE]], [[GREEN]]),
    ),
    "WSDM on Kaggle": (
        {"id": "1", "prompt": ASKED["content"], "response_a": "Blue.", "response_b": "Green.", "winner": "model_a",
         "model_a": "x", "model_b": "y", "language": "English"},
        PAIR,
    ),
    "WebGPT comparisons": (
        {"question": {"dataset": "eli5", "id": "1", "full_text": ASKED["content"]},
         "quotes_0": {"title": [], "extract": []}, "answer_0": "Green.", "score_0": -0.5, "answer_1": "Blue.",
         "score_1": 0.5},
        PAIR,
    ),
    "summarize-from-feedback": (
        {"info": {"id": "1", "post": "The sky.", "title": "Sky", "subreddit": "pics", "article": None},
         "summaries": [{"text": " Green.", "policy": "a"}, {"text": " Blue.", "policy": "b"}], "choice": 1,
         "worker": "w"},
        ("SUBREDDIT: r/pics\n\nTITLE: Sky\n\nPOST: The sky.\n\nTL;DR:", [" Blue."], [" Green."]),
    ),
    "HelpSteer2, preferences": (
        {"prompt": ASKED["content"], "response_1": "Blue.", "response_2": "Green.", "preference_strength": -2},
        PAIR,
    ),
    "HelpSteer3": (
        {"domain": "general", "language": "english", "context": [ASKED], "response1": "Green.", "response2": "Blue.",
         "overall_preference": 3},
        PAIR,
    ),
    "SHP": (
        {"post_id": "1", "history": ASKED["content"], "human_ref_A": "Blue.", "human_ref_B": "Green.", "labels": 1},
        PAIR,
    ),
    "stack-exchange-paired": (
        {"qid": 1, "question": ASKED["content"], "date": "2010", "metadata": ["x"], "response_j": "Blue.",
         "response_k": "Green."},
        PAIR,
    ),
    "ms-swift": (
        {"messages": [SYSTEM, ASKED, BLUE], "rejected_response": "Green."},
        PAIR_WITH_SYSTEM,
    ),
    "ms-swift, whole conversations": (
        {"messages": [ASKED, BLUE], "rejected_messages": [ASKED, GREEN]},
        PAIR,
    ),
    "ms-swift, tool calls": (
        {"messages": [ASKED, assistant("I look."), {"role": "tool_call", "content": json.dumps(CALLS[0])},
                      {"role": "tool_call", "content": json.dumps(CALLS[1])},
                      {"role": "tool_response", "content": "[]"}, {"role": "tool", "content": "{}"}, BLUE],
         "rejected_response": "Green."},
        ([ASKED, {**assistant("I look."), "tool_calls": [{"type": "function", "function": call} for call in CALLS]},
          {"role": "tool", "content": "[]"}, {"role": "tool", "content": "{}"}], [[BLUE]], [[GREEN]]),
    ),
    "ms-swift 2": (
        {"system": "Be brief.", "query": ASKED["content"], "response": "Blue.", "rejected_response": "Green.",
         "history": []},
        PAIR_WITH_SYSTEM,
    ),
    "LLaMA-Factory v1": (
        {"chosen_messages": [
            {"role": "user", "content": [{"type": "text", "value": ASKED["content"]}], "loss_weight": 0.0},
            {"role": "assistant", "content": [{"type": "text", "value": "Blue."}], "loss_weight": 1.0}],
         "rejected_messages": [
            {"role": "user", "content": [{"type": "text", "value": ASKED["content"]}], "loss_weight": 0.0},
            {"role": "assistant", "content": [{"type": "text", "value": "Green."}], "loss_weight": 1.0}]},
        ([ASKED | {"loss_weight": 0.0}], [[BLUE | {"loss_weight": 1.0}]], [[GREEN | {"loss_weight": 1.0}]]),
    ),
    "MedicalGPT": (
        {"conversations": SHAREGPT_PROMPT, "chosen": "Blue.", "rejected": "Green."},
        PAIR,
    ),
    "MedicalGPT, older": (
        {"system": "Be brief.", "history": [["Ready?", "Yes."]], "question": ASKED["content"],
         "response_chosen": "Blue.", "response_rejected": "Green."},
        ([SYSTEM, user("Ready?"), assistant("Yes."), ASKED], [[BLUE]], [[GREEN]]),
    ),
    "Intel/orca_dpo_pairs": (
        {"system": "Be brief.", "question": ASKED["content"], "chosen": "Blue.", "rejected": "Green."},
        PAIR_WITH_SYSTEM,
    ),
    "distilabel-intel-orca-dpo-pairs": (
        {"system": "Be brief.", "input": ASKED["content"], "chosen": "Blue.", "rejected": "Green.",
         "generations": ["a", "b"], "status": "unchanged", "rating": [9.0, 7.0]},
        PAIR_WITH_SYSTEM,
    ),
    "UltraFeedback Binarized": (
        {"prompt": ASKED["content"], "prompt_id": "1", "chosen": [ASKED, BLUE], "rejected": [ASKED, GREEN],
         "messages": [ASKED, BLUE], "score_chosen": 8.5, "score_rejected": 2.0},
        PAIR,
    ),
    "StackExchange preferences": (
        {"qid": 1, "question": ASKED["content"], "answers": [
            {"answer_id": 1, "author": "x", "pm_score": 1, "selected": False, "text": "Green."},
            {"answer_id": 2, "author": "y", "pm_score": 5, "selected": True, "text": "Blue."}]},
        PAIR,
    ),
    "turns of ShareGPT, whole conversations": (
        {side: [{"from": "human", "value": ASKED["content"]}, {"from": "gpt", "value": text}]
         for side, text in (("chosen", "Blue."), ("rejected", "Green."))},
        PAIR,
    ),
    "turns of ShareGPT, prompt and answers": (
        {"prompt": [{"from": "human", "value": ASKED["content"]}],
         "chosen": [{"from": "gpt", "value": "Blue."}], "rejected": [{"from": "gpt", "value": "Green."}]},
        PAIR,
    ),
    "Axolotl's chat_template.default": (
        {"messages": [SYSTEM, ASKED], "chosen": BLUE, "rejected": GREEN},
        PAIR_WITH_SYSTEM,
    ),
    "conversation, a turn and text": ({"prompt": [ASKED], "chosen": [BLUE], "rejected": "Green."}, PAIR),
    "conversation and text answers": ({"prompt": [ASKED], "chosen": "Blue.", "rejected": "Green."}, PAIR),
}  # fmt: skip


@pytest.mark.parametrize(
    ("suffix", "write"), [("jsonl", write_lines), ("parquet", write_parquet), ("csv", write_csv)]
)
@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_row_becomes_what_it_says(tmp_path: Path, name: str, suffix: str, write: Any):
    row, expected = PUBLIC[name]
    (got,), _ = read(write(tmp_path / f"rows.{suffix}", [row]))
    assert (got.prompt, got.chosen, got.rejected) == expected
    assert got.tools == ([LOOK] if name == "OpenAI preferences" else None)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("Chatbot Arena", {"winner": "tie (bothbad)"}),
        ("LMSYS on Kaggle", {"winner_model_b": 0, "winner_tie": 1}),
        ("WebGPT comparisons", {"score_0": 0.5}),
        ("HelpSteer2, preferences", {"preference_strength": 0}),
        ("HelpSteer3", {"overall_preference": 0}),
    ],
)
def test_a_tie_is_left_out_and_counted(tmp_path: Path, name: str, change: dict[str, Any]):
    row, expected = PUBLIC[name]
    rows, counts = read(write_lines(tmp_path / "rows.jsonl", [row | change, row]))
    assert [(got.prompt, got.chosen, got.rejected) for got in rows] == [expected]
    assert counts.skipped == {"tie": 1}


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("PKU-SafeRLHF", {"better_response_id": 2}, "expected 0 or 1, got int 2"),
        ("Chatbot Arena", {"winner": "gpt-4"}, "expected model_a, model_b or tie, got text 'gpt-4'"),
        ("LMSYS on Kaggle", {"winner_model_a": 1}, "expected model_a, model_b or tie"),
        ("LMSYS on Kaggle", {"prompt": '["a", "b"]'}, "as many rounds in each column, got 2 in prompt, 1 in"),
        ("LMSYS on Kaggle", {"response_a": "[null]"}, "response_a, round 1.*null"),
        (
            "UltraFeedback, without a total",
            {"completions": [{"response": "a", "annotations": {"honesty": {"Rating": "N/A"}}}]},
            "or annotations with ratings",
        ),
        (
            "ms-swift, tool calls",
            {"messages": [ASKED, {"role": "tool_call", "content": "look()"}, BLUE]},
            "turn 2: expected a function call as JSON, got text 'look",
        ),
        ("WebGPT comparisons", {"score_1": "high"}, "'score_1': expected a finite number"),
        ("UltraFeedback", {"completions": [{"response": "a"}]}, "expected overall_score, score, rating"),
        ("summarize-from-feedback", {"summaries": [{"text": "a"}]}, "expected two objects"),
        ("ms-swift", {"messages": [ASKED]}, "the chosen response, the assistant's, at its end"),
        ("OpenAI preferences", {"input": {"prompt": "a"}}, "input.messages"),
    ],
)
def test_a_row_without_a_sound_verdict_is_refused_by_name(
    tmp_path: Path, name: str, change: dict[str, Any], match: str
):
    with pytest.raises(DataError, match=match) as caught:
        read(write_lines(tmp_path / "rows.jsonl", [PUBLIC[name][0] | change]))
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        (["prompt", "response", "helpfulness", "correctness"], r"One response a row: .*df\.groupby\(\"prompt\"\)"),
        (["question", "preferred", "other"], r"\{prompt: question, chosen: preferred, rejected: other\}"),
        (["prompt", "good_answer", "bad_answer"], r"\{prompt: prompt, chosen: good_answer, rejected: bad_answer\}"),
        (["text"], r"data\.columns: \{chosen: YOURS"),
    ],
)  # fmt: skip
def test_other_columns_are_told_how_they_can_be_read(tmp_path: Path, columns: list[str], match: str):
    with pytest.raises(DataError, match=match) as caught:
        read(write_lines(tmp_path / "rows.jsonl", [dict.fromkeys(columns, "a")]))
    assert all(column in str(caught.value) for column in columns)
