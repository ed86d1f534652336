"""Pairs from the marked samples of a prompt: which response is chosen, which is rejected, and by which rule.

A pair is two responses of which one has the higher score. Right is above wrong. Imports no torch.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from infopo.catalog import PAIRING_RULES
from infopo.data.responses import ScoreRule, common_prefix
from infopo.errors import ConfigError

Pair = tuple["Candidate", "Candidate"]
"""Chosen and rejected response."""

DUPLICATE = "duplicate"
EMPTY = "empty"
UNFINISHED = "unfinished"
NO_SCORE = "without a score"


@dataclass(frozen=True)
class Candidate:
    """A sample of a prompt with its mark.

    Attributes:
        sample: Its number.
        text: The response.
        score: Whether it is right, or a number, the higher the better. None if the verifier gave none.
        finished: Whether the model ended it itself.
    """

    sample: int
    text: str
    score: bool | float | None
    finished: bool = True


@dataclass(frozen=True)
class PairingSettings:
    """How samples become pairs.

    Attributes:
        rule: `random` draws pairs; `best-worst` takes the largest differences of scores; `longest-prefix` those which
            begin alike for longest; `length-matched` those whose lengths differ least; `lists` takes all good responses
            against all others in one row.
        pairs_per_prompt: Largest number of pairs of a prompt. A response is in one of them at most.
        threshold: Score from which a response is right, for verifiers that give scores. It is needed for pass rates.
        min_pass_rate: Least share of right samples of a prompt, or None.
        max_pass_rate: Largest, or None.
        reject_unfinished: Whether responses that were cut off may be rejected. They are never chosen.
        seed: Seed of the rule `random`.

    Raises:
        ConfigError: A setting is wrong.
    """

    rule: str = "random"
    pairs_per_prompt: int = 1
    threshold: float | None = None
    min_pass_rate: float | None = None
    max_pass_rate: float | None = None
    reject_unfinished: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.rule not in RULES:
            problems.append(f"--rule: expected one of {', '.join(RULES)}, got {self.rule!r}")
        if self.pairs_per_prompt < 1:
            problems.append(f"--pairs-per-prompt: expected at least 1, got {self.pairs_per_prompt}")
        low, high = self.min_pass_rate, self.max_pass_rate
        for name, rate in (("--min-pass-rate", low), ("--max-pass-rate", high)):
            if rate is not None and not 0 <= rate <= 1:
                problems.append(f"{name}: expected a share in [0, 1], got {rate}")
        if self.rule == "lists" and self.pairs_per_prompt != 1:
            problems.append(
                "--pairs-per-prompt: does not apply to the rule lists, which takes all in one row"
            )
        if low is not None and high is not None and low > high:
            problems.append(f"--min-pass-rate: {low} is above --max-pass-rate {high}")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True)
class Paired:
    """What became of the samples of a prompt.

    Attributes:
        chosen: Chosen response of each pair, or all good ones with the rule `lists`.
        rejected: Rejected response of each pair, or all others.
        pass_rate: Share of all samples that are right, cut off ones included. None if scores have no threshold.
        why_not: Why the prompt gives no pair, or None if it does.
        left_out: Number of samples that were left out, by reason. Each is counted once, by the first that holds.
    """

    chosen: Sequence[Candidate]
    rejected: Sequence[Candidate]
    pass_rate: float | None
    why_not: str | None
    left_out: Mapping[str, int]


def pair_up(candidates: Sequence[Candidate], settings: PairingSettings, prompt: str) -> Paired:
    """Makes pairs of the samples of one prompt.

    Args:
        candidates: All samples.
        settings: The rule and its limits.
        prompt: Id of the prompt, from which (and from the seed) the random numbers follow.

    Raises:
        ConfigError: Prompts are to be left out by their pass rate, and nothing says what is right.

    Example:
        >>> samples = [Candidate(0, "2", True), Candidate(1, "3", False), Candidate(2, "2", True)]
        >>> paired = pair_up(samples, PairingSettings(), "lab/0")
        >>> [each.text for each in (*paired.chosen, *paired.rejected)], dict(paired.left_out)
        (['2', '3'], {'duplicate': 1})
    """
    is_verified = all(isinstance(each.score, bool) for each in candidates if each.score is not None)
    pass_rate = _pass_rate(candidates, settings.threshold, is_verified)
    if candidates and pass_rate is None and (settings.min_pass_rate, settings.max_pass_rate) != (None, None):
        raise ConfigError(
            "--min-pass-rate, --max-pass-rate: the verifier gives scores; set --threshold, from which one is right"
        )
    good, poor, left_out = _usable(candidates, settings.reject_unfinished)

    def none(why: str) -> Paired:
        return Paired([], [], pass_rate, why, left_out)

    if pass_rate is not None and pass_rate < (settings.min_pass_rate or 0):
        return none("pass rate too low")
    if pass_rate is not None and settings.max_pass_rate is not None and pass_rate > settings.max_pass_rate:
        return none("pass rate too high")
    if settings.rule == "lists":
        chosen, rejected = _lists(good, poor, settings.threshold, is_verified)
        return (
            Paired(chosen, rejected, pass_rate, None, left_out)
            if chosen and rejected
            else none(_kind(good, poor))
        )
    better = [(a, b) for a in good for b in (*good, *poor) if _score(a) > _score(b)]
    if settings.threshold is not None:
        better = [(a, b) for a, b in better if _score(a) >= settings.threshold > _score(b)]
    pairs = _disjoint(
        RULES[settings.rule](better, random.Random(f"{settings.seed}:{prompt}")), settings.pairs_per_prompt
    )
    if not pairs:
        return none(_kind(good, poor))
    return Paired([a for a, _ in pairs], [b for _, b in pairs], pass_rate, None, left_out)


def _score(candidate: Candidate) -> float:
    assert candidate.score is not None
    return candidate.score


def _pass_rate(candidates: Sequence[Candidate], threshold: float | None, is_verified: bool) -> float | None:
    if not candidates or (threshold is None and not is_verified):
        return None
    least = 1.0 if threshold is None else threshold
    return sum(each.score is not None and each.score >= least for each in candidates) / len(candidates)


def _usable(
    candidates: Sequence[Candidate], reject_unfinished: bool
) -> tuple[list[Candidate], list[Candidate], Counter[str]]:
    """Returns those that may be chosen, those that may only be rejected, and how many were left out and why.

    Each sample is in one of the three.
    """
    good: list[Candidate] = []
    poor: list[Candidate] = []
    left_out: Counter[str] = Counter()
    seen: set[str] = set()
    for each in candidates:
        # A model that says the same twice gives one response. Spaces around it are no difference.
        text = each.text.strip()
        reasons = {
            EMPTY: not text,
            NO_SCORE: each.score is None,
            DUPLICATE: text in seen,
            UNFINISHED: not (each.finished or reject_unfinished),
        }
        why = next((name for name, holds in reasons.items() if holds), None)
        if why is not None:
            left_out[why] += 1
            continue
        seen.add(text)
        (good if each.finished else poor).append(each)
    return good, poor, left_out


def _lists(
    good: Sequence[Candidate], poor: Sequence[Candidate], threshold: float | None, is_verified: bool
) -> tuple[list[Candidate], list[Candidate]]:
    usable = [*good, *poor]
    if not usable:
        return [], []
    if threshold is None and is_verified:
        threshold = 1.0
    rule = ScoreRule("best-rest") if threshold is None else ScoreRule("threshold", threshold)
    chosen, rejected = rule.split([_score(each) for each in usable])
    # What was cut off is never chosen, however good it is.
    return [usable[i] for i in chosen if i < len(good)], [usable[i] for i in rejected]


def _kind(good: Sequence[Candidate], poor: Sequence[Candidate]) -> str:
    """Returns why responses give no pair."""
    usable = [*good, *poor]
    if not usable:
        return "no usable response"
    scores = {_score(each) for each in usable}
    if scores == {1.0}:
        return "all right"
    if scores == {0.0}:
        return "all wrong"
    return "all scores equal" if len(scores) == 1 else "no pair by the rule"


def _disjoint(pairs: Sequence[Pair], limit: int) -> list[Pair]:
    """Returns the first pairs of which no response is in two."""
    taken: list[Pair] = []
    used: set[int] = set()
    for a, b in pairs:
        if len(taken) < limit and not {a.sample, b.sample} & used:
            taken.append((a, b))
            used |= {a.sample, b.sample}
    return taken


def _random(pairs: list[Pair], draw: random.Random) -> list[Pair]:
    return draw.sample(pairs, len(pairs))


def _by_score(pairs: list[Pair], draw: random.Random) -> list[Pair]:
    return sorted(pairs, key=lambda pair: _score(pair[1]) - _score(pair[0]))


def _by_prefix(pairs: list[Pair], draw: random.Random) -> list[Pair]:
    return sorted(pairs, key=lambda pair: -common_prefix(pair[0].text, pair[1].text))


def _by_length(pairs: list[Pair], draw: random.Random) -> list[Pair]:
    return sorted(pairs, key=lambda pair: abs(len(pair[0].text) - len(pair[1].text)))


def _unordered(pairs: list[Pair], draw: random.Random) -> list[Pair]:
    return pairs


RULES: Mapping[str, Callable[[list[Pair], random.Random], list[Pair]]] = dict(
    zip(PAIRING_RULES, (_random, _by_score, _by_prefix, _by_length, _unordered), strict=True)
)
"""Rules by name: each orders the possible pairs, of which the first are taken. The first is the default."""
