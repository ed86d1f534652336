"""Data sets whose rows compare responses in ways of their own, as they were published.

`compared`: two responses, and a column that says which is better. `rated`: objects of a response and its rating.
`openai`: OpenAI's format of preferences. `swift`: a conversation, and another answer to it. `docs/data.md` names the
data sets; to read another of a kind, `VERDICTS` gets a line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from infopo.data.columns import has_value, list_of, number_of, shown, text_of, value_of
from infopo.data.counts import TIE
from infopo.data.messages import answer_of, asked, messages_of, said, sharegpt_of
from infopo.data.responses import ScoreRule, common_prefix, refuse_no_common_prompt
from infopo.errors import DataError

if TYPE_CHECKING:
    from infopo.records import Message, Text

Parts = tuple["Text", list["Text"], list["Text"]]

_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


class Verdict(NamedTuple):
    """How one of the `compared` sets is read.

    Attributes:
        column: Column that tells this set from others.
        prompt: Gives the prompt; None: the turns that both conversations begin with.
        first: Column of a response.
        second: Column of the other.
        winner: 0 where the first is better, 1 where the second is; raises `DataError` with reason `tie` at neither.
        data_set: A set that has these columns.
    """

    column: str
    prompt: Callable[[Mapping[str, Any], str], Text] | None
    first: str
    second: str
    winner: Callable[[Mapping[str, Any], str], int]
    data_set: str


def compared(row: Mapping[str, Any], row_id: str) -> Parts:
    """The response that the row's verdict prefers, against the other."""
    verdict = next((v for v in VERDICTS if has_value(row, v.column)), VERDICTS[0])
    value_of(row, verdict.column, row_id)
    if verdict.column == "choice":
        return _summaries(row, row_id)
    winner = verdict.winner(row, row_id)
    columns = (verdict.first, verdict.second) if winner == 0 else (verdict.second, verdict.first)
    if verdict.prompt is None:
        return _parted(sharegpt_of(row, columns[0], row_id), sharegpt_of(row, columns[1], row_id), row_id)
    if verdict.column == "response_a":
        prompt, *both = _rounds(row, row_id)
        return prompt, [both[winner]], [both[1 - winner]]
    chosen, rejected = (answer_of(row, column, row_id) for column in columns)
    return verdict.prompt(row, row_id), [chosen], [rejected]


def rated(row: Mapping[str, Any], row_id: str, rule: ScoreRule) -> Parts:
    """Responses that are split by their ratings, as those of `scored` rows are."""
    column = "completions" if has_value(row, "completions") else "answers"
    items = list_of(row, column, row_id, "responses with ratings")
    responses = []
    for i, item in enumerate(items, 1):
        where = f"column {column!r}, response {i}"
        if not isinstance(item, Mapping):
            raise DataError(
                f"{where}: expected an object with a rating, got {shown(item)}", row_id, "wrong type"
            )
        key = next(
            (key for key in ("response", "answer", "text", "completion", "output", "content") if key in item),
            "response",
        )
        responses.append(
            said(text_of({f"{column}, response {i}": item.get(key)}, f"{column}, response {i}", row_id))
        )
    return _question(row, row_id), *split(responses, _ratings(items, column, row_id), rule, row_id)


def split(
    responses: list[Any], scores: list[float], rule: ScoreRule, row_id: str
) -> tuple[list[Any], list[Any]]:
    """Chosen and rejected responses.

    Raises:
        DataError: `scores do not match`, or `tie`: the scores prefer nothing.
    """
    if len(scores) != len(responses) or not responses:
        problem = (
            f"expected a score for each response, got {len(responses)} responses and {len(scores)} scores"
        )
        raise DataError(problem, row_id, "scores do not match")
    chosen, rejected = rule.split(scores)
    if not chosen and not rejected:
        raise DataError(f"all {len(scores)} scores are {scores[0]:g}: none is preferred", row_id, TIE)
    return [responses[i] for i in chosen], [responses[i] for i in rejected]


def openai(row: Mapping[str, Any], row_id: str) -> Parts:
    """OpenAI's preferences; tools that stand in `input` are found by `openai_tools`."""
    given = value_of(row, "input", row_id)
    if not isinstance(given, Mapping):
        problem = f"column 'input': expected an object with messages, got {shown(given)}"
        raise DataError(problem, row_id, "wrong type")
    prompt = messages_of({"input.messages": given.get("messages")}, "input.messages", row_id)
    if not prompt:
        raise DataError("column 'input': expected messages, there are none", row_id, "empty prompt")
    chosen, rejected = (
        answer_of(row, column, row_id) for column in ("preferred_output", "non_preferred_output")
    )
    return prompt, [chosen], [rejected]


def openai_tools(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row, with the tools of its `input` as a column of their own."""
    given = row.get("input")
    tools = given.get("tools") if isinstance(given, Mapping) else None
    return row if tools is None or has_value(row, "tools") else {**row, "tools": tools}


def swift(row: Mapping[str, Any], row_id: str) -> Parts:
    """A conversation that ends with the chosen response, and the rejected one: text, a turn, or a conversation."""
    turns = sharegpt_of(row, "messages", row_id)
    if has_value(row, "rejected_messages"):
        return _parted(turns, sharegpt_of(row, "rejected_messages", row_id), row_id)
    rejected = answer_of(row, "rejected_response", row_id)
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        problem = "column 'messages': expected a prompt and the chosen response, the assistant's, at its end"
        raise DataError(problem, row_id, "wrong role")
    return turns[:-1], [turns[-1:]], [rejected]


def _parted(chosen: list[Message], rejected: list[Message], row_id: str) -> Parts:
    end = common_prefix(chosen, rejected)
    if not end:
        refuse_no_common_prompt("the conversations differ in their first message", row_id)
    return chosen[:end], [chosen[end:]], [rejected[end:]]


def transcript_of(text: str) -> list[Message]:
    r"""Turns of a transcript `\n\nHuman: ...\n\nAssistant: ...`."""
    _, *pieces = _TURN.split(text)
    return [
        {"role": _HH_ROLES[who], "content": what.strip()}
        for who, what in zip(pieces[0::2], pieces[1::2], strict=True)
    ]


def is_transcript(text: str) -> bool:
    return text.startswith("\n\nHuman:")


def _question(row: Mapping[str, Any], row_id: str) -> Text:
    """Whatever asks, as a conversation: text, a transcript that waits for an answer, messages, an object with text."""
    column = next(
        (c for c in ("prompt", "instruction", "question", "context", "history") if has_value(row, c)),
        "prompt",
    )
    value = value_of(row, column, row_id)
    if isinstance(value, Mapping) and "full_text" in value:  # WebGPT
        return asked(_not_blank(text_of(value, "full_text", row_id), column, row_id))
    if isinstance(value, list):
        turns = messages_of(row, column, row_id)
        if not turns:
            raise DataError(
                f"column {column!r}: expected messages, got an empty list", row_id, "empty prompt"
            )
        return turns
    text = _not_blank(text_of(row, column, row_id), column, row_id)
    if not is_transcript(text):
        return asked(text)
    turns = transcript_of(text)
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def _not_blank(text: str, column: str, row_id: str) -> str:
    if not text.strip():
        raise DataError(f"column {column!r}: expected text, it is empty", row_id, "empty prompt")
    return text


def _rounds(row: Mapping[str, Any], row_id: str) -> tuple[Text, list[Message], list[Message]]:
    """Prompt and both answers of LMSYS's and WSDM's Kaggle files: texts, or lists (of JSON) with a text per round.

    Both models got the same questions. Of several rounds, what follows the first question is the response.
    """
    columns = ("prompt", "response_a", "response_b")
    texts = [_texts_of(row, column, row_id) for column in columns]
    if any(each is None for each in texts):
        first, second = (answer_of(row, column, row_id) for column in columns[1:])
        return _question(row, row_id), first, second
    questions, *answers = [each for each in texts if each is not None]
    if not questions or any(len(each) != len(questions) for each in answers):
        numbers = zip((questions, *answers), columns, strict=True)
        counts = ", ".join(f"{len(each)} in {column}" for each, column in numbers)
        raise DataError(
            f"expected as many rounds in each column, got {counts}", row_id, "rounds do not match"
        )
    _not_blank(questions[0], "prompt", row_id)
    first, second = (
        [
            turn
            for round_ in zip(questions, each, strict=True)
            for turn in (*asked(round_[0]), *said(round_[1]))
        ]
        for each in answers
    )
    return first[:1], first[1:], second[1:]


def _texts_of(row: Mapping[str, Any], column: str, row_id: str) -> list[str] | None:
    """The texts of a column that holds a list of them, or JSON text of one; None: it holds something else."""
    rounds = row.get(column)
    if isinstance(rounds, str) and rounds.lstrip().startswith("["):
        try:
            rounds = json.loads(rounds)
        except (ValueError, RecursionError):  # text that begins so
            return None
    if not isinstance(rounds, list) or any(isinstance(each, Mapping) for each in rounds):
        return None
    names = [f"{column}, round {i}" for i in range(1, len(rounds) + 1)]
    return [text_of({name: each}, name, row_id) for name, each in zip(names, rounds, strict=True)]


def _summaries(row: Mapping[str, Any], row_id: str) -> Parts:
    """summarize-from-feedback: as text, in the words that OpenAI's models were asked with (and TRL's script writes)."""
    info = value_of(row, "info", row_id)
    if not isinstance(info, Mapping):
        raise DataError(f"column 'info': expected an object, got {shown(info)}", row_id, "wrong type")
    if has_value(info, "post"):
        parts = {key: text_of(info, key, row_id) for key in ("subreddit", "title", "post")}
        prompt = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:".format(**parts)
    else:
        prompt = f"{text_of(info, 'article', row_id)}\n\nTL;DR:"
    summaries = list_of(row, "summaries", row_id, "two summaries")
    if len(summaries) != 2 or not all(isinstance(each, Mapping) for each in summaries):
        raise DataError(
            f"column 'summaries': expected two objects, got {shown(summaries)}", row_id, "wrong type"
        )
    better = _place(row, "choice", row_id)
    chosen, rejected = (text_of(summaries[i], "text", row_id) for i in (better, 1 - better))
    return prompt, [chosen], [rejected]


def _place(row: Mapping[str, Any], column: str, row_id: str) -> int:
    number = number_of(value_of(row, column, row_id), f"column {column!r}", row_id)
    if number not in (0, 1):
        raise DataError(f"column {column!r}: expected 0 or 1, got {shown(row[column])}", row_id, "wrong type")
    return int(number)


def _by_id(row: Mapping[str, Any], row_id: str) -> int:
    return _place(row, "better_response_id", row_id)


def _by_label(row: Mapping[str, Any], row_id: str) -> int:
    return 1 - _place(row, "labels", row_id)  # 1: the first, A, has more upvotes


def _by_winner(row: Mapping[str, Any], row_id: str) -> int:
    """Arenas: `model_a`, `model_b`, or a tie; or a column for each of these, one of which is 1."""
    if has_value(row, "winner"):
        winner = text_of(row, "winner", row_id).strip().lower()
    else:
        flags = {name: row.get(f"winner_{name}") for name in ("model_a", "model_b", "tie")}
        marked = [name for name, flag in flags.items() if str(flag).strip().lower() in ("1", "1.0", "true")]
        winner = marked[0] if len(marked) == 1 else ""
    if winner.startswith(("tie", "both")):
        raise DataError(f"the verdict is {winner}: none is preferred", row_id, TIE)
    places = {"model_a": 0, "a": 0, "response_a": 0, "model_b": 1, "b": 1, "response_b": 1}
    if winner not in places:
        problem = f"column 'winner': expected model_a, model_b or tie, got {shown(row.get('winner'))}"
        raise DataError(problem, row_id, "wrong type")
    return places[winner]


def _by_scores(row: Mapping[str, Any], row_id: str) -> int:
    first, second = (
        number_of(value_of(row, column, row_id), f"column {column!r}", row_id)
        for column in ("score_0", "score_1")
    )
    if first == second:
        raise DataError(f"both scores are {first:g}: none is preferred", row_id, TIE)
    return int(second > first)


def _by_strength(column: str) -> Callable[[Mapping[str, Any], str], int]:
    """HelpSteer: below 0 the first is better, above 0 the second."""

    def winner(row: Mapping[str, Any], row_id: str) -> int:
        strength = number_of(value_of(row, column, row_id), f"column {column!r}", row_id)
        if strength == 0:
            raise DataError(f"column {column!r} is 0: none is preferred", row_id, TIE)
        return int(strength > 0)

    return winner


VERDICTS = (
    Verdict("better_response_id", _question, "response_0", "response_1", _by_id, "PKU-SafeRLHF"),
    Verdict("conversation_a", None, "conversation_a", "conversation_b", _by_winner, "Chatbot Arena"),
    Verdict("response_a", _question, "response_a", "response_b", _by_winner, "LMSYS and WSDM (Kaggle)"),
    Verdict("score_0", _question, "answer_0", "answer_1", _by_scores, "WebGPT comparisons"),
    Verdict("choice", _question, "summaries", "summaries", _by_id, "summarize-from-feedback"),
    Verdict(
        "preference_strength", _question, "response_1", "response_2", _by_strength("preference_strength"),
        "HelpSteer2 (preference)",
    ),
    Verdict(
        "overall_preference", _question, "response1", "response2", _by_strength("overall_preference"), "HelpSteer3"
    ),
    Verdict("human_ref_A", _question, "human_ref_A", "human_ref_B", _by_label, "SHP"),
)  # fmt: skip
"""The `compared` sets, each told by its first column."""


_SCORES = ("overall_score", "fine-grained_score", "score", "rating", "reward", "pm_score")
"""Names of a response's score in `rated` sets, the first of which that all responses of a row have is taken."""


def _ratings(items: Sequence[Mapping[str, Any]], column: str, row_id: str) -> list[float]:
    """A score of each response: a total, a rank (1 is best), or the mean rating of UltraFeedback's aspects."""
    places = [f"column {column!r}, response {i}" for i in range(1, len(items) + 1)]
    for key in (*_SCORES, "rank"):
        if items and all(item.get(key) is not None for item in items):
            sign = -1 if key == "rank" else 1
            pairs = zip(items, places, strict=True)
            return [sign * number_of(item[key], f"{where}: {key!r}", row_id) for item, where in pairs]
    means = [_mean_rating(item.get("annotations")) for item in items]
    for where, item, mean in zip(places, items, means, strict=True):
        if mean is None:
            problem = (
                f"{where}: expected overall_score, score, rating, reward or rank, the same in all responses, or "
                f"annotations with ratings, got {', '.join(map(str, item))}"
            )
            raise DataError(problem, row_id, "scores do not match")
    return [mean for mean in means if mean is not None]


def _mean_rating(annotations: object) -> float | None:
    """The mean of an UltraFeedback response's ratings, as its authors' `fine-grained_score`; None: there is none.

    Each aspect (helpfulness, honesty, ...) has an object with a `Rating`, or a list of them. "N/A" is left out.

    >>> _mean_rating({"helpfulness": {"Rating": "4"}, "honesty": {"Rating": "N/A"}, "truthfulness": {"Rating": "5"}})
    4.5
    """
    aspects = annotations.values() if isinstance(annotations, Mapping) else ()
    given = [each for aspect in aspects for each in (aspect if isinstance(aspect, list) else [aspect])]
    ratings = [each.get("Rating") for each in given if isinstance(each, Mapping)]
    numbers = [float(str(each)) for each in ratings if _RATING.fullmatch(str(each))]
    return sum(numbers) / len(numbers) if numbers else None


_RATING = re.compile(r"\d{1,3}(\.\d{1,6})?")
