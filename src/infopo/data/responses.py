"""Decides which responses are chosen and which rejected, by scores and votes, and checks responses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infopo.catalog import SCORE_RULES
from infopo.data.columns import shown, value_of
from infopo.data.counts import TIE
from infopo.data.messages import OTHERS_ROLES
from infopo.errors import DataError
from infopo.settings import RowSettings

if TYPE_CHECKING:
    from infopo.records import Text


@dataclass(frozen=True)
class ScoreRule:
    """Rule by which the responses of a `scored` row are split into chosen and rejected ones.

    Attributes:
        name: `best-worst` takes the response with the highest score against the one with the lowest, and the first of
            equals. `best-rest` takes all with the highest score against all others. `threshold` takes all that score at
            least `threshold` against all others, so that a row may have one side only.
        threshold: Least score of a chosen response, for the rule of that name.

    Raises:
        ConfigError: There is no such rule, or a threshold without its rule, or the rule without a threshold.

    Example:
        >>> ScoreRule("best-rest").split([3.0, 5.0, 1.0])
        ([1], [0, 2])
    """

    name: str = SCORE_RULES[0]
    threshold: float | None = None

    def __post_init__(self) -> None:
        RowSettings(score_rule=self.name, score_threshold=self.threshold)

    def split(self, scores: Sequence[float]) -> tuple[list[int], list[int]]:
        """Returns the indices of the chosen and of the rejected responses, both empty if the scores prefer nothing."""
        indices = range(len(scores))
        if self.threshold is not None:
            good = [i for i in indices if scores[i] >= self.threshold]
            return good, [i for i in indices if i not in good]
        best, worst = max(scores), min(scores)
        if best == worst:
            return [], []
        if self.name == "best-worst":
            return [scores.index(best)], [scores.index(worst)]
        return [i for i in indices if scores[i] == best], [i for i in indices if scores[i] < best]


def majority(row: Mapping[str, Any], columns: Sequence[str], row_id: str) -> int:
    """Returns 1 or 2, the response that more than half of the annotators prefer. 0 is a vote for neither.

    Raises:
        DataError: A vote is none of 0, 1 and 2 (`wrong type`), or no response has more than half of the votes (`tie`).

    Example:
        >>> votes = {"annotator1": 2, "annotator2": 2, "annotator3": 1}
        >>> majority(votes, list(votes), "votes.jsonl:1")
        2
    """
    votes = [_vote(row, column, row_id) for column in columns]
    winner, count = Counter(votes).most_common(1)[0]
    if winner == 0 or 2 * count <= len(votes):
        raise DataError(f"votes {', '.join(map(str, votes))}: no response has more than half", row_id, TIE)
    return winner


def _vote(row: Mapping[str, Any], column: str, row_id: str) -> int:
    vote = value_of(row, column, row_id)
    if isinstance(vote, bool) or str(vote) not in ("0", "1", "2"):
        problem = f"column {column!r}: expected 0 (tie), 1 or 2, got {shown(vote)}"
        raise DataError(problem, row_id, "wrong type")
    return int(vote)


def check_responses(prompt: Text, chosen: list[Text], rejected: list[Text], row_id: str) -> None:
    """Checks that there is a response, that none is blank, and that turns of the policy follow those of others.

    Raises:
        DataError: It is not so.
    """
    if not chosen and not rejected:
        raise DataError("expected a chosen or a rejected response, there is none", row_id, "no responses")
    check_not_blank(chosen, rejected, row_id)
    if isinstance(prompt, list):
        if prompt[-1]["role"] == "assistant":
            problem = "the prompt's last turn: expected user or tool, got 'assistant'"
            raise DataError(problem, row_id, "wrong role")
        for name, _, response in _with_sides(chosen, rejected):
            _refuse_repeated_prompt(prompt, response, name, row_id)
            _check_response_roles(response, name, row_id)
    if both := [response for response in chosen if response in rejected]:
        raise DataError(
            f"expected two different responses, both are {shown(both[0])}", row_id, "chosen = rejected"
        )


def _with_sides(chosen: Sequence[Text], rejected: Sequence[Text]) -> Iterable[tuple[str, str, Text]]:
    """Yields all responses, each with its name in errors (with its number if there are several) and its side."""
    for side, responses in (("chosen", chosen), ("rejected", rejected)):
        for i, response in enumerate(responses, 1):
            yield (
                side + " response" + (f" {i} of {len(responses)}" if len(responses) > 1 else ""),
                side,
                response,
            )


def check_not_blank(chosen: Sequence[Text], rejected: Sequence[Text], row_id: str) -> None:
    """Checks that each response contains more than white space.

    Raises:
        DataError: One does not.
    """
    for name, side, response in _with_sides(chosen, rejected):
        if _is_blank(response):
            problem = f"expected a {name}, it is empty ({shown(response)})"
            raise DataError(problem, row_id, f"empty {side}")


def _is_blank(response: Text) -> bool:
    """Returns whether the turn that ends the response has neither content nor a tool call."""
    if isinstance(response, str):
        return not response.strip()
    if not response:
        return True
    last = response[-1]
    return last["role"] == "assistant" and not last.get("content", "").strip() and not last.get("tool_calls")


def _refuse_repeated_prompt(prompt: Text, response: Text, name: str, row_id: str) -> None:
    if len(response) > len(prompt) and response[: len(prompt)] == prompt:
        problem = (
            f"{name}: expected the answer to the prompt, it begins with the prompt's turns; leave these out of one of "
            "the columns (data.columns: {prompt: null} takes the prompt from chosen and rejected)"
        )
        raise DataError(problem, row_id, "wrong role")


def _check_response_roles(response: Text, name: str, row_id: str) -> None:
    """Refuses a response that is not the assistant's. What tools and users answer may be between its turns."""
    roles = [message["role"] for message in response if isinstance(message, dict)]
    if (
        roles[0] != "assistant"
        or roles[-1] != "assistant"
        or not {"assistant", *OTHERS_ROLES}.issuperset(roles)
    ):
        expected = "expected assistant turns (with turns of tools or users between them)"
        problem = f"{name}: {expected}, got {', '.join(roles)}"
        raise DataError(problem, row_id, "wrong role")


def refuse_no_common_prompt(detail: str, row_id: str) -> None:
    """Refuses a row whose sides have no prompt in common.

    Args:
        detail: What they have in place of one.
        row_id: Name of the row.

    Raises:
        DataError: Always.
    """
    problem = f"expected chosen and rejected to begin with the same prompt: {detail}"
    raise DataError(problem, row_id, "no common prompt")


def common_prefix(a: Text, b: Text) -> int:
    """Returns the number of leading characters or messages that two responses share.

    If one side is the beginning of the other, it is all prompt, and its response is empty. (TRL's extract_prompt gives
    the last shared character or message back to both responses.)

    Example:
        >>> common_prefix("Answer: yes", "Answer: no")
        8
    """
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))
