"""Diversity of several responses to a prompt: limits, and values worked by hand."""

import math
import sys

import pytest

from infopo.evaluation.diversity import distinct_words, diversity, self_bleu
from infopo.evaluation.items import Mark
from infopo.evaluation.results import Response


def responses(groups, answers=None):
    return [
        Response("t", f"t/{i}", k, "?", text, 4, True, {"r": Mark(True, answers[i][k] if answers else text)})
        for i, group in enumerate(groups)
        for k, text in enumerate(group)
    ]


SAME = [["one two three four five"] * 3, ["six seven eight nine ten"] * 3]
OTHER = [["a b c d e", "f g h i j", "k l m n o"], ["p q r s t", "u v w x y", "z 1 2 3 4"]]


def test_alike_and_all_different():
    alike, other = diversity(responses(SAME), "r"), diversity(responses(OTHER), "r")
    assert alike["self_bleu"] == {"value": 100.0, "texts": 6}
    assert other["self_bleu"]["value"] < 10
    assert alike["distinct_2"]["value"] == pytest.approx(1 / 3)
    assert other["distinct_2"]["value"] == 1.0
    assert (alike["unique_responses"]["value"], other["unique_responses"]["value"]) == (1.0, 3.0)
    assert alike["samples"] == 3


def test_a_prompt_is_compared_with_itself_only():
    """That two prompts get the same answers is no lack of diversity."""
    assert diversity(responses([OTHER[0], OTHER[0]]), "r")["distinct_1"]["value"] == 1.0


def test_prompts_that_are_alike_leave_doubt():
    found = diversity(responses(OTHER), "r")
    for name, top in (("distinct_2", 1), ("unique_responses", 3), ("unique_answers", 3)):
        low, high = found[name]["ci95"]
        assert low < found[name]["value"] <= high == top


def test_golden_values():
    """Words a b c / a b d: of 4 bigrams (a b) stands twice, so 3/4. Answers 7, 7, none: one; 8, 9, none: two."""
    assert distinct_words([["a", "b", "c"], ["a", "b", "d"]], 2) == 0.75
    found = diversity(responses(SAME, [["7", "7", None], ["8", "9", None]]), "r")
    assert found["unique_answers"]["value"] == 1.5
    assert found["unique_answers"]["ci95"] == (1.0, 2.0)


def test_entropy_is_per_token_and_leaves_out_what_is_not_known():
    given = responses([["a", "b"]])
    assert diversity(given, "r", logps=[-2.0, -6.0])["entropy"] == {"value": 1.0, "n": 2}
    assert diversity(given, "r", logps=[-2.0, None])["entropy"] == {"value": 0.5, "n": 1}
    assert "entropy" not in diversity(given, "r", logps=[None, None])
    assert "entropy" not in diversity(given, "r")


def test_self_bleu_takes_few_texts_and_draws_them_with_a_seed():
    groups = [[f"{i} {k} words that many texts have in common" for k in range(8)] for i in range(60)]
    assert self_bleu(groups)["texts"] == 200
    assert self_bleu(groups, most=16, seed=1) == self_bleu(groups, most=16, seed=1)
    assert self_bleu([[f"text {k} of one prompt" for k in range(500)]], most=20)["texts"] == 20
    assert self_bleu([["alone"], []]) is None


def test_one_sample_an_item_has_no_diversity():
    assert diversity(responses([["a"], ["b"]]), "r") == {}
    assert diversity([], "r") == {}


def test_empty_responses():
    found = diversity(responses([["", ""], ["", ""]]), "r")
    assert found["distinct_1"] is None
    assert found["unique_responses"]["value"] == 1.0
    assert not math.isnan(found["self_bleu"]["value"])


def test_without_sacrebleu_the_rest_is_there(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    found = diversity(responses(SAME), "r")
    assert "self_bleu" not in found
    assert found["unique_answers"]["value"] == 1.0
    assert "pip install 'infopo[eval]'" in caplog.text
