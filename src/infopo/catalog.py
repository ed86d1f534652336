"""Shapes of rows and values of settings, as data. Imports no torch.

Recipes, command line, documentation and trainer check names and values against these tables. Objectives have a table
of their own, `losses/catalog.py`.
"""

import difflib
from collections.abc import Mapping
from typing import Any

DATA_SHAPES: Mapping[str, str] = {
    "standard": "prompt, chosen, rejected: text",
    "standard_implicit": "chosen, rejected: text; the prompt is the beginning they share",
    "conversational": "prompt, chosen, rejected: lists of messages {role, content}",
    "conversational_implicit": "chosen, rejected: whole conversations; the prompt is the leading turns they share",
    "hh": "chosen, rejected: transcripts of Anthropic's hh-rlhf, '\\n\\nHuman: ...\\n\\nAssistant: ...'",
    "sharegpt": "conversations: turns {from, value}; chosen, rejected: a turn each",
    "alpaca": "instruction (or question, query, input), chosen, rejected: text; input, system, history",
    "alpaca_unpaired": "instruction (or question), output: text; kto_tag (or label): true or false",
    "unpaired": "prompt, completion: text or messages; label: true or false",
    "unpaired_messages": "messages (or conversations): turns, the last of which is the response; label: true or false",
    "lists": "prompt: text or messages; chosen, rejected: lists of such responses, one of which may be empty",
    "scored": "prompt: text or messages; responses: list of such; scores: a number each",
    "votes": "instruction, response1, response2: text; annotator1, annotator2, ...: 0 (tie), 1 or 2",
    "compared": "prompt, two responses, and a column that says which is better, as data sets were published",
    "rated": "prompt (or instruction, question): text; completions (or answers): objects of a response and its rating",
    "openai": "input: {messages, tools}; preferred_output, non_preferred_output: lists of messages",
    "swift": "messages: turns, the last of which is chosen; rejected_response: text (or rejected_messages: turns)",
}
"""All shapes by the name that recipes use; a shape is detected where none is named."""

SCORE_RULES = ("best-worst", "best-rest", "threshold")
"""How the responses of a scored row are split into chosen and rejected ones; the first is the default."""

PAIRING_RULES = ("random", "best-worst", "longest-prefix", "length-matched", "lists")
"""How the marked samples of a prompt become pairs (`infopo pairs --rule`); the first is the default."""

ON_TOO_LONG = ("cut", "drop")
"""What to do with a row that has more tokens than it may: cut it by the one rule, or leave it out and count it."""

ON_BAD_ROW = ("raise", "skip")
"""What to do with a row that cannot be used: stop, or count it and go on."""

ON_VERDICT = ("warn", "stop")
"""What to do when a verdict is reached: say so, or also save a checkpoint and end training."""

REFERENCE_MODES = ("auto", "live", "precompute", "adapter-off")
"""Where reference log-probs come from (besides a model's path)."""

REFERENCE_SIDES = ("auto", "needed", "both")
"""Whose reference log-probs are computed: those the loss needs, all (for metrics), or all in evaluation only."""


LOGPS_PATHS = ("auto", "naive")
"""How log-probs are computed: the fastest way that the model allows, or one padded row per response."""


def suggestion(word: str, known: Mapping[str, Any] | tuple[str, ...] | list[str]) -> str:
    """` (did you mean 'beta'?)` for a near miss, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
