"""Chat templates: every one that TRL ships, on conversations of several kinds, beside TRL's own tokens."""

import re
from datetime import date
from pathlib import Path
from typing import Any

import trl

from infopo.data.encode import Encoder
from infopo.errors import InfoPOError
from infopo.lab.tokenizer import build_tokenizer
from infopo.records import PreferenceRow
from tried.trial import Row, first_sentence

INTRODUCTION = """The chat templates that TRL ships, on conversations of five kinds, with a tokenizer of bytes to which
the tags of the template were added. *As TRL* are the kinds whose prompt and response together have the tokens of TRL's
`DPOTrainer`, *but for the end* those to which one token is added or spared there: a template without an end of turn
gets EOS here. *Behind the generation prompt* are those whose response follows what `generate` will see, where TRL
leaves the end of the generation prompt out. Templates that read contents in parts only write none of them under TRL.
What is *refused by the template* is refused by TRL, too.
"""

TEMPLATES = Path(trl.__file__).parent / "chat_templates"

_USER = {"role": "user", "content": "What is one and one?"}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add", "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer", "description": "One."}}},
    },
}  # fmt: skip
_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}

KINDS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], list[Any] | None]] = {
    "one turn": ([_USER], {"content": "It is two."}, None),
    "several turns": (
        [_USER, {"role": "assistant", "content": "It is three."}, {"role": "user", "content": "No."}],
        {"content": "It is two."}, None,
    ),
    "system": ([{"role": "system", "content": "Be brief."}, _USER], {"content": "It is two."}, None),
    "reasoning": ([_USER], {"content": "It is two.", "reasoning_content": "One more than one."}, None),
    "a tool call": ([_USER], {"content": "", "tool_calls": [_CALL]}, [_TOOL]),
}  # fmt: skip
"""Kind -> prompt, the assistant's turn, tools."""


def names() -> list[str]:
    return sorted(path.stem for path in TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training"))


def tokenizer_for(template: str) -> Any:
    """A tokenizer of bytes to which the tags of the template are tokens of their own."""
    tokenizer = build_tokenizer()
    tags = re.findall(r"<[|｜/]?[\w▁|｜]+[|｜]?>|\[/?[A-Z_]{3,}\]", template)
    tokenizer.add_tokens(sorted({tag for tag in tags if not tag.startswith("<|end|>")}), special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def row(name: str) -> Row:
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = tokenizer_for(template)
    outcomes: dict[str, list[str]] = {}
    for kind in KINDS:
        outcomes.setdefault(_outcome(tokenizer, kind), []).append(kind)
    note = "; ".join(f"{outcome}: {', '.join(kinds)}" for outcome, kinds in sorted(outcomes.items()))
    results = {
        "fault": "fault" in note,
        "refused": all(outcome.startswith("refused") for outcome in outcomes),
    }
    return Row(name, next((result for result, holds in results.items() if holds), "read"), note)


def _outcome(tokenizer: Any, kind: str) -> str:
    prompt, turn, tools = KINDS[kind]
    response = [{"role": "assistant", **turn}]
    given = {"tools": tools, "tokenize": True, "return_dict": True}
    try:
        head = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **given)["input_ids"]
        whole = tokenizer.apply_chat_template(prompt + response, **given)["input_ids"]
    except Exception:
        return "refused by the template"
    try:
        # TRL writes today's date, for which the encoder has a fixed one unless it is told another.
        today = (
            {"strftime_now": date.today().isoformat()} if "strftime_now" in tokenizer.chat_template else {}
        )
        encoder = Encoder(tokenizer, max_length=None, chat_template_kwargs=today)
        encoded = encoder.encode(PreferenceRow(prompt, [response], [], "a row", {}, tools)).example
    except InfoPOError as error:
        return f"refused ({first_sentence(error).removeprefix('a row: ').split(':')[0].split(';')[0]})"
    except Exception as error:
        return f"fault ({type(error).__name__}: {first_sentence(error)})"
    begin, end = list(encoded.prompt_ids), list(encoded.chosen_ids[0])
    shown = tokenizer.decode(end)
    if any(text not in shown for text in (turn["content"], turn.get("reasoning_content", ""))):
        return "fault (content is missing)"
    ours = begin + end
    if ours == whole:
        return "as TRL"
    if turn["content"] not in tokenizer.decode(whole):
        return "whole, where TRL's tokens lack the content"
    shorter, longer = sorted((ours, whole), key=len)
    if longer[: len(shorter)] == shorter and len(longer) == len(shorter) + 1:
        return "as TRL, but for the end"
    return "behind the generation prompt" if begin == head else "fault (other tokens than TRL's)"
