"""Names that columns of preference data bear: what each shape needs, what else is read, and a mapping onto them.

Imports no torch: recipes are checked against it. What the columns hold is the business of `infopo.data`.
"""

import re
from collections.abc import Mapping

from infopo.catalog import suggestion

_SIDES = ("chosen", "rejected")

PROMPTS = ("instruction", "question", "query", "user_prompt", "user_input", "input", "context")
"""Columns that hold the question of an `alpaca` row, the first of them that is there. (`input` beside another is its
second line.)"""

_ASKED = "|".join(PROMPTS)

NEEDED: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "standard_implicit": (_SIDES,),
    "standard": (("prompt", *_SIDES),),
    "conversational": (("prompt", *_SIDES),),
    "conversational_implicit": (_SIDES,),
    "hh": (_SIDES,),
    "sharegpt": (("conversations|messages", *_SIDES),),
    "alpaca": ((_ASKED, *_SIDES),),
    "lists": (("prompt", *_SIDES),),
    "openai": (("input", "preferred_output", "non_preferred_output"),),
    "swift": (("messages", "rejected_response|rejected_messages"),),
    "votes": (("instruction|question", "response1", "response2", "annotator1"),),
    "compared": (
        ("prompt", "response_0", "response_1", "better_response_id"),
        ("conversation_a", "conversation_b", "winner"),
        ("prompt", "response_a", "response_b", "winner|winner_model_a"),
        ("question", "answer_0", "answer_1", "score_0", "score_1"),
        ("info", "summaries", "choice"),
        ("prompt", "response_1", "response_2", "preference_strength"),
        ("context", "response1", "response2", "overall_preference"),
        ("history", "human_ref_A", "human_ref_B", "labels"),
    ),
    "rated": (("prompt|instruction|question", "completions|answers"),),
    "scored": (("prompt", "responses", "scores"),),
    "unpaired": (("prompt", "completion", "label"),),
    "unpaired_messages": (("messages|conversations", "label"),),
    "alpaca_unpaired": (("instruction|question", "output", "kto_tag|label"),),
}
"""Columns without which no row of the shape can be used: sets of them, of which one must be there; `|`: or."""

OPTIONAL = ("tools", "chat_template_kwargs", "system", "history", "input")
"""Columns that are read where a row has them, by the shapes that know what to do with them."""

CONVERSATION = (*PROMPTS, "prompt", "system", "system_prompt", "history")
"""Columns whose text is part of what was said: a row is refused whose prompt does not hold it."""

ALIASES: tuple[tuple[str, str], ...] = (
    ("response_j", "response_k"),
    ("chosen_messages", "rejected_messages"),
    ("response_chosen", "response_rejected"),
    ("chosen_response", "rejected_response"),
    ("response", "rejected_response"),
)
"""Pairs of columns that are read as chosen and rejected where these two names are not there."""

COLUMNS = frozenset(
    name for shape in NEEDED.values() for columns in shape for column in columns for name in column.split("|")
) | {*OPTIONAL, *CONVERSATION, "winner_model_b", "winner_tie", *(name for pair in ALIASES for name in pair)}
"""Columns that are read, beside those of annotators."""

IMAGE_COLUMNS = ("image", "images")

_SYNONYMS: Mapping[str, frozenset[str]] = {
    "chosen": frozenset({
        "chosen", "preferred", "good", "better", "best", "win", "winner", "winning", "accepted", "selected",
        "positive", "pos",
    }),
    "rejected": frozenset({
        "rejected", "dispreferred", "bad", "worse", "worst", "lose", "loser", "losing", "refused", "negative", "neg",
        "other",
    }),
    "prompt": frozenset({
        "prompt", "question", "query", "instruction", "input", "problem", "task", "post", "ask",
    }),
}  # fmt: skip


def check_columns(columns: Mapping[str, object]) -> list[str]:
    """Returns everything wrong with a mapping of the names that shapes know to those of a file.

    A name that is mapped to None is left out of the rows, whatever it is.

    >>> check_columns({"prompt": "question"})
    []
    >>> check_columns({"promt": "question"})[0][:52]
    "promt: no shape reads such a column (did you mean 'p"
    """
    problems = []
    for target, source in columns.items():
        if source is not None and target not in COLUMNS:
            close = suggestion(target, sorted(COLUMNS))
            problems.append(
                f"{target}: no shape reads such a column{close}; expected {{a shape's column: your column}}"
            )
        elif not isinstance(source, str | None):
            problems.append(f"{target}: expected the name of a column, or null, got {source!r:.60}")
    sources = [source for source in columns.values() if isinstance(source, str)]
    for source in sorted({source for source in sources if sources.count(source) > 1}):
        targets = ", ".join(target for target, given in columns.items() if given == source)
        problems.append(f"{targets}: {source!r} is given for each of them; a column can stand for one only")
    return problems


def guessed(found: list[str]) -> dict[str, str]:
    """Returns a mapping that the names of a file's columns suggest, for a message, if both sides are found.

    >>> guessed(["question", "good_answer", "bad_answer"])
    {'prompt': 'question', 'chosen': 'good_answer', 'rejected': 'bad_answer'}
    """
    guess: dict[str, str] = {}
    for target in ("rejected", "chosen", "prompt"):  # `non_preferred` is the rejected one's
        for column in found:
            if target not in guess and column not in guess.values() and _may_be(column, target):
                guess[target] = column
    if not {"chosen", "rejected"} <= guess.keys():
        return {}
    return {target: guess[target] for target in ("prompt", "chosen", "rejected") if target in guess}


def _may_be(column: str, target: str) -> bool:
    words = set(re.split(r"[\W_]+", column.lower()))
    if words & {"non", "not"}:
        return target == "rejected" and bool(words & _SYNONYMS["chosen"])
    return bool(words & _SYNONYMS[target])
