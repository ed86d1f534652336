"""What the runs answer to the same prompts, side by side, with the words that differ from the first answer."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from infopo.report.reading import ReportRun
from infopo.runs import Record

PROMPTS = 60
"""Most prompts of a report."""

CHARACTERS = 3_000
"""Most characters of a prompt or response that are shown."""

WORDS = 1_200
"""Most words of a response that are compared; comparing takes time with their square."""


@dataclass(frozen=True)
class Answer:
    """A response in the table.

    Attributes:
        run: Index of the run.
        step: Step at which it was sampled.
        pieces: Texts in order, each with whether it differs from the first answer.
        tokens: Its length, or None.
        finished: Whether it ended by itself, or None.
        mark: Whether a verifier calls it right, or None.
    """

    run: int
    step: int
    pieces: list[tuple[str, bool]]
    tokens: int | None
    finished: bool | None
    mark: bool | None


@dataclass(frozen=True)
class Prompt:
    """A prompt with the answers to it. The first one is what the others are compared with."""

    row_id: str
    text: str
    answers: list[Answer]

    @property
    def differs(self) -> bool:
        """Whether an answer is not the first one."""
        return any(differs for answer in self.answers for _, differs in answer.pieces)

    @property
    def has_wrong(self) -> bool:
        """Whether a verifier calls an answer wrong."""
        return any(answer.mark is False for answer in self.answers)


@dataclass(frozen=True)
class Completions:
    """All prompts that are shown, and the number of those that are not."""

    prompts: list[Prompt]
    left_out: int


def completions(runs: Sequence[ReportRun]) -> Completions:
    """Returns the first answer that was sampled to each prompt, and the last one of every run."""
    found: dict[str, dict[int, list[Record]]] = {}
    for index, run in enumerate(runs):
        for record in run.generations:
            if isinstance(record.get("prompt"), str) and isinstance(record.get("response"), str):
                found.setdefault(record["prompt"], {}).setdefault(index, []).append(record)
    # Prompts that most runs answer are those that can be compared.
    order = sorted(found, key=lambda text: -len(found[text]))
    return Completions([_prompt(text, found[text]) for text in order[:PROMPTS]], max(0, len(order) - PROMPTS))


def _prompt(text: str, by_run: dict[int, list[Record]]) -> Prompt:
    ordered = [(run, sorted(records, key=lambda r: r["step"])) for run, records in sorted(by_run.items())]
    first_run, first_records = min(ordered, key=lambda pair: (pair[1][0]["step"], pair[0]))
    first = first_records[0]
    shown = [(run, records[-1]) for run, records in ordered if records[-1] is not first]
    answers = [_answer(run, record, first["response"]) for run, record in [(first_run, first), *shown]]
    return Prompt(str(first.get("row_id", "")), cut(text), answers)


def _answer(run: int, record: Record, first: str) -> Answer:
    tokens, finished, mark = record.get("tokens"), record.get("finished"), record.get("mark")
    return Answer(
        run=run,
        step=record["step"],
        pieces=differences(cut(first), cut(record["response"])),
        tokens=tokens if isinstance(tokens, int) else None,
        finished=finished if isinstance(finished, bool) else None,
        mark=mark if isinstance(mark, bool) else None,
    )


def cut(text: str) -> str:
    """Returns a text that is at most `CHARACTERS` long, and says how much is missing."""
    if len(text) <= CHARACTERS:
        return text
    return f"{text[:CHARACTERS]} … ({len(text) - CHARACTERS} more characters)"


def differences(first: str, second: str) -> list[tuple[str, bool]]:
    """Returns the second text in pieces, each with whether it is not in the first at that place.

    Example:
        >>> differences("12 + 30 = 42", "12 + 30 = 41.")
        [('12 + 30 = ', False), ('41.', True)]
    """
    if first == second or not second:
        return [(second, False)]
    a, b = _words(first), _words(second)
    if max(len(a), len(b)) > WORDS:
        same = len(_common_prefix(a, b))
        return [piece for piece in (("".join(b[:same]), False), ("".join(b[same:]), True)) if piece[0]]
    pieces: list[tuple[str, bool]] = []
    for operation, _, _, begin, end in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if begin < end:
            pieces.append(("".join(b[begin:end]), operation != "equal"))
    return pieces


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|\s+|[^\w\s]", text)


def _common_prefix(a: list[str], b: list[str]) -> list[str]:
    count = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:count]
