"""Which responses may stand against each other: scores and votes that part them, and what a response must hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infopo.catalog import SCORE_RULES, suggestion
from infopo.data.columns import shown, value_of
from infopo.data.counts import TIE
from infopo.data.messages import TOOL_ROLES
from infopo.errors import DataError, RecipeError

if TYPE_CHECKING:
    from infopo.records import Text


@dataclass(frozen=True)
class ScoreRule:
    """How the responses of a `scored` row are split into chosen and rejected ones.

    Attributes:
        name: `best-worst`: the response with the highest score against the one with the lowest, the first of equals.
            `best-rest`: all that have the highest score against all others. `threshold`: all that score at least
            `threshold` against all others; a row may then have one side only.
        threshold: For the rule of that name.

    Raises:
        RecipeError: There is no such rule, or a threshold without its rule, or the rule without one.
    """

    name: str = SCORE_RULES[0]
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.name not in SCORE_RULES:
            known = f"{suggestion(self.name, SCORE_RULES)}; there are {', '.join(SCORE_RULES)}"
            raise RecipeError(f"data.score_rule: no rule {self.name!r}{known}")
        if (self.name == "threshold") != (self.threshold is not None):
            raise RecipeError(
                "data.score_threshold: goes with data.score_rule: threshold, and the rule needs it"
            )

    def split(self, scores: Sequence[float]) -> tuple[list[int], list[int]]:
        """Places of the chosen and of the rejected responses; both empty where the scores prefer nothing."""
        places = range(len(scores))
        if self.threshold is not None:
            good = [i for i in places if scores[i] >= self.threshold]
            return good, [i for i in places if i not in good]
        best, worst = max(scores), min(scores)
        if best == worst:
            return [], []
        if self.name == "best-worst":
            return [scores.index(best)], [scores.index(worst)]
        return [i for i in places if scores[i] == best], [i for i in places if scores[i] < best]


def majority(row: Mapping[str, Any], columns: Sequence[str], row_id: str) -> int:
    """1 or 2, the response that more than half of the annotators prefer; 0 is a vote for neither.

    Raises:
        DataError: A vote is none of 0, 1 and 2 (`wrong type`), or no response has most of the votes (`tie`).
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
    if not chosen and not rejected:
        raise DataError("expected a chosen or a rejected response, there is none", row_id, "no responses")
    check_not_blank(chosen, rejected, row_id)
    if isinstance(prompt, list):
        if prompt[-1]["role"] == "assistant":
            problem = "the prompt's last turn: expected user or tool, got 'assistant'"
            raise DataError(problem, row_id, "wrong role")
        for name, _, response in _named(chosen, rejected):
            _check_response_roles(response, name, row_id)
    if both := [response for response in chosen if response in rejected]:
        raise DataError(
            f"expected two different responses, both are {shown(both[0])}", row_id, "chosen = rejected"
        )


def _named(chosen: Sequence[Text], rejected: Sequence[Text]) -> Iterable[tuple[str, str, Text]]:
    """All responses, each with what errors call it (its number, where there are several) and its side."""
    for side, responses in (("chosen", chosen), ("rejected", rejected)):
        for i, response in enumerate(responses, 1):
            yield (
                side + " response" + (f" {i} of {len(responses)}" if len(responses) > 1 else ""),
                side,
                response,
            )


def check_not_blank(chosen: Sequence[Text], rejected: Sequence[Text], row_id: str) -> None:
    for name, side, response in _named(chosen, rejected):
        if _is_blank(response):
            problem = f"expected a {name}, it is empty ({shown(response)})"
            raise DataError(problem, row_id, f"empty {side}")


def _is_blank(response: Text) -> bool:
    """Nothing was said, and no tool was called, in the turn that ends the response."""
    if isinstance(response, str):
        return not response.strip()
    if not response:
        return True
    last = response[-1]
    return last["role"] == "assistant" and not last.get("content", "").strip() and not last.get("tool_calls")


def _check_response_roles(response: Text, name: str, row_id: str) -> None:
    """A response is spoken by the assistant; what tools answer may come between its turns."""
    roles = [message["role"] for message in response if isinstance(message, dict)]
    if (
        roles[0] != "assistant"
        or roles[-1] != "assistant"
        or not {"assistant", *TOOL_ROLES}.issuperset(roles)
    ):
        problem = f"{name}: expected assistant turns (with tool turns between them), got {', '.join(roles)}"
        raise DataError(problem, row_id, "wrong role")


def refuse_no_common_prompt(detail: str, row_id: str) -> None:
    problem = f"expected chosen and rejected to begin with the same prompt: {detail}"
    raise DataError(problem, row_id, "no common prompt")


def common_prefix(a: Text, b: Text) -> int:
    """Number of leading characters or messages that two responses share.

    Where one side is the beginning of the other, it is all prompt, and its response is empty. (TRL's extract_prompt
    hands the last shared character or message back to both responses there.)
    """
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))
