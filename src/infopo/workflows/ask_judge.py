"""Asks a judge about pairs of responses: who it is, what it will take, and what was answered already."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from infopo.errors import ConfigError, InfoPOError
from infopo.evaluation.judge import (
    ANSWER_TOKENS,
    TEMPLATES,
    FunctionJudge,
    Judge,
    Judgements,
    Question,
    ServedJudge,
    verdict,
)
from infopo.evaluation.server import KEY_VARIABLE, ServedModel, ServerSettings
from infopo.evaluation.settings import unread
from infopo.evaluation.winrate import Duel, Outcome, is_identical, judged
from infopo.output import counted, get_logger, say

log = get_logger(__name__)

CHARACTERS_A_TOKEN = 4
"""For the estimate of tokens before anything is asked."""


_OF_SERVER = (
    "model", "key_variable", "concurrency", "per_minute", "timeout", "retries", "answer_tokens", "prices",
)  # fmt: skip
"""Settings of a judge behind a server. `yes` is not among them: it allows what need not come to be asked."""


@dataclass(frozen=True)
class JudgeSettings:
    """Who judges, and how.

    Attributes:
        judge: URL of an OpenAI-compatible server, or `my_module:my_judge`.
        model: Name of the judge's model, or None for the only one that is served.
        template: One of `TEMPLATES`.
        key_variable: Environment variable of the server's key.
        concurrency: Largest number of requests at a time.
        per_minute: Largest number of requests per minute, or None.
        timeout: Seconds after which a request is given up, and sent again.
        retries: Number of times that a request is sent again.
        answer_tokens: Largest number of tokens of an answer.
        prices: Price of a million tokens of prompts and of answers, for the estimate, or None.
        yes: Whether to ask the server without asking the user first.
    """

    judge: str
    model: str | None = None
    template: str = "chat"
    key_variable: str = KEY_VARIABLE
    concurrency: int = 8
    per_minute: float | None = None
    timeout: float = 300.0
    retries: int = 6
    answer_tokens: int = ANSWER_TOKENS
    prices: tuple[float, float] | None = None
    yes: bool = False

    def __post_init__(self) -> None:
        if self.template not in TEMPLATES:
            raise ConfigError(f"--template: expected one of {', '.join(TEMPLATES)}, got {self.template!r}")
        if self.answer_tokens < 1:
            raise ConfigError(f"--answer-tokens: expected at least 1, got {self.answer_tokens}")
        if self.is_server:
            return
        if ":" not in self.judge:
            raise ConfigError(f"--judge: expected a URL or MODULE:FUNCTION, got {self.judge!r}")
        where = f"{self.judge}, a function"
        if problems := [each.replace("--model", "--judge-model") for each in unread(self, _OF_SERVER, where)]:
            raise ConfigError(problems)

    @property
    def is_server(self) -> bool:
        """Whether the judge is behind a server."""
        return self.judge.startswith(("http://", "https://"))

    def make(self) -> Judge:
        """Returns the judge."""
        if not self.is_server:
            return FunctionJudge(self.judge)
        server = ServerSettings(
            self.judge,
            self.model,
            key_variable=self.key_variable,
            concurrency=self.concurrency,
            per_minute=self.per_minute,
            timeout=self.timeout,
            retries=self.retries,
        )
        return ServedJudge(ServedModel(server), self.answer_tokens)


def refuse_arguments(format: str, formats: Sequence[str], limit: int | None) -> None:
    """Refuses a format that is none of these, and a limit that leaves nothing, before anything is asked.

    Raises:
        ConfigError: One of them is wrong.
    """
    if format not in formats:
        raise ConfigError(f"--format: expected one of {', '.join(formats)}, got {format!r}")
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit: expected at least 1, got {limit}")


def run_judge(
    duels: Sequence[Duel], store: Judgements, judge: Judge, settings: JudgeSettings
) -> list[Outcome]:
    """Asks a judge what the store lacks, after saying what it takes, and returns the outcome of each duel.

    Raises:
        ConfigError: Nobody has agreed to the cost, or the judge refuses every question.
        ServerError: The judge does not answer. What it has answered is kept.
    """
    questions = [q for duel in duels if not is_identical(duel) for q in duel.questions(settings.template)]
    missing = store.missing(questions, judge)
    repeated = len(questions) - len({question.key(judge) for question in questions})
    kept = len(questions) - repeated - len(missing)
    say(estimate(missing, judge, settings.prices, repeated=repeated, kept=kept), file=sys.stderr)
    if missing and settings.is_server and not settings.yes:
        _confirm()
    try:
        with tqdm(total=len(missing), desc="answers", disable=None) as bar:
            store.ask(missing, judge, bar.update)
    except (InfoPOError, KeyboardInterrupt):
        left = len(store.missing(missing, judge))
        say(
            f"{len(missing) - left} of {len(missing)} answers are kept in {store.path}; the same command goes on there",
            file=sys.stderr,
        )
        raise
    refused = [said for q in missing if (said := store.answer(q, judge).get("refusal"))]
    if refused and len(refused) == len(missing) == len(questions):
        raise ConfigError(f"--judge: {judge.name} refuses every question: {refused[0]}")
    outcomes = judged(duels, store, judge, settings.template)
    if invalid := sum(each.kind == "invalid" and not each.is_cut_off for each in outcomes):
        log.warning(
            "left out: %s whose answer names no winner; the same command asks for these again",
            counted(invalid, "pair"),
        )
    if cut := sum(each.is_cut_off for each in outcomes):
        log.warning(
            "left out: %s whose answer was cut off at %s tokens before it named a winner; --answer-tokens N gives "
            "more, and asks for these alone again",
            counted(cut, "pair"),
            judge.limit,
        )
    return outcomes


def refuse_without_verdicts(
    duels: Sequence[Duel],
    outcomes: Sequence[Outcome],
    store: Judgements,
    judge: Judge,
    settings: JudgeSettings,
) -> None:
    """Refuses to make anything of answers of which none decides a pair.

    Raises:
        ConfigError: There were questions, and no pair has an answer with a winner in both orders. Shows an answer.
    """
    asked = [duel for duel in duels if not is_identical(duel)]
    kinds = {each.kind for duel, each in zip(duels, outcomes, strict=True) if not is_identical(duel)}
    if kinds != {"invalid"}:
        return
    answers = [
        store.answer(question, judge) for duel in asked for question in duel.questions(settings.template)
    ]
    without = [answer for answer in answers if verdict(str(answer["answer"])) is None]
    # An answer says more than the server's reason for having none.
    example = next((answer for answer in without if not answer.get("refusal")), without[0])
    if example.get("refusal"):
        said = f"the server refuses: {example['refusal']!r:.120}"
    else:
        text = str(example["answer"]).strip()
        said = (
            f"{text[-120:]!r}" if len(text) <= 120 else f"... {text[-120:]!r}"
        )  # a verdict stands at the end
    if not example.get("finished", True) and not example.get("refusal"):
        remedy = f"it was cut off at {judge.limit} tokens; --answer-tokens N gives more"
    else:
        remedy = "the same command asks again"
    raise ConfigError(
        f"--judge: {judge.name} decides none of {counted(len(asked), 'pair')}; expected "
        '{"comparison": "...", "winner": "1"} with "1", "2" or "tie", got '
        f"{said}; {remedy} (answers: {store.path})"
    )


def estimate(
    missing: Sequence[Question],
    judge: Judge,
    prices: tuple[float, float] | None = None,
    *,
    repeated: int = 0,
    kept: int = 0,
) -> str:
    """Returns what is about to be asked, in words: number, tokens, and cost if prices are known.

    Args:
        missing: What is to be asked.
        judge: The judge.
        prices: Price of a million tokens of prompts and of answers.
        repeated: Number of further questions that are the same as one of them.
        kept: Number of further questions that are answered already.
    """
    letters = sum(len(message["content"]) for question in missing for message in question.conversation)
    prompt_tokens, answer_tokens = letters // CHARACTERS_A_TOKEN, len(missing) * judge.limit
    others = f", {repeated} more repeat one of them" if repeated else ""
    others += f", {kept} more are answered already" if kept else ""
    answers = f" and at most {answer_tokens:,} of answers" if judge.limit else ""
    tokens = f"about {prompt_tokens:,} tokens of prompts{answers}"
    text = f"{counted(len(missing), 'question')} to {judge.name} (both orders{others}): {tokens}"
    if prices is None:
        return text
    cost = (prompt_tokens * prices[0] + answer_tokens * prices[1]) / 1e6
    return f"{text}, at most about {cost:,.2f} at the given prices"


def _confirm() -> None:
    if not sys.stdin.isatty():
        raise ConfigError("--yes: add it to ask the judge without a question on the terminal")
    say("go on? [y/N]", file=sys.stderr)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ConfigError("nothing was asked")
