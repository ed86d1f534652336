"""Chat templates: every one that TRL ships, as the table of the parity test has it, which compares each with TRL."""

from parity.test_trl_templates import CONVERSATIONS, EXPECTED, SAME, TEMPLATES
from tried.trial import Row

INTRODUCTION = """The chat templates that TRL ships, on conversations of seven kinds, each held against the tokens of
TRL's `DPOTrainer` by `tests/parity/test_trl_templates.py`. *TRL's tokens* means the same prompt and responses, token
for token. *Template drops content* means that such rows are refused, since what the data say would not be trained on.
"""

KINDS = {
    "plain": "one turn", "system": "a system turn", "turns": "several turns", "inline": "reasoning in the content",
    "reasoning": "reasoning in a field", "call": "a tool call", "tools": "a tool's answer",
}  # fmt: skip


def names() -> list[str]:
    return list(TEMPLATES)


def row(name: str) -> Row:
    kinds: dict[str, list[str]] = {}
    for conversation in CONVERSATIONS:
        outcome = EXPECTED.get(name, {}).get(conversation, SAME)
        kinds.setdefault(outcome, []).append(KINDS[conversation])
    return Row(name, "read", ". ".join(f"{', '.join(each)}: {outcome}" for outcome, each in kinds.items()))
