"""Samples preference data from a policy on lab problems, with verified or with graded labels.

Chosen responses are drawn from the law p_w, rejected ones from p_l. The two kinds of labels differ in the supports of
these laws, and objectives differ in what they make of that:

- **verified**: the chosen response is a right sample, the rejected one a wrong sample of the same problem. The supports
  are disjoint, so the population minimiser of InfoPO is that of SFT on the chosen responses.
- **graded**: two samples of the policy are ranked by a noisy judge of their quality. Any response may be on either
  side, so the supports overlap, and p_w + p_l = 2 π_ref up to the pairs of equal samples, which are left out because
  they carry no preference.
"""

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from infopo.errors import ConfigError, DataError
from infopo.generate import Sample, sample
from infopo.lab.evaluation import as_prompt, longest_response
from infopo.lab.problems import OPERATIONS, Problem, make_problems, share_of_right_steps, verify

LABELS = ("verified", "graded")

PROBLEMS_PER_ROUND = 256
"""Problems sampled at a time. It is a constant, so that a smaller number of pairs is a prefix of a larger one."""

# A policy that is always right, or never, yields no verified pair however long it is sampled.
_MAX_BARREN_ROUNDS = 8

_Texts = tuple[str, str]
"""A chosen and a rejected text."""


@dataclass(frozen=True)
class PreferencePairs:
    """Preference rows, and an account of the sampling: `problems == len(rows) + sum(skipped.values())`."""

    rows: list[dict[str, Any]]
    """Conversational preference rows: `prompt`, `chosen` and `rejected`, each a list of messages."""
    problems: int
    """Number of problems that were sampled until the last pair was complete."""
    samples: int
    """Number of responses sampled to these problems."""
    right: int
    """Number of these responses that are right."""
    skipped: dict[str, int]
    """Number of problems that gave no pair, by reason."""

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items())) or "none"
        return (
            f"{len(self.rows)} pairs from {self.problems} problems with {self.samples} samples, "
            f"{self.right} of them right; problems skipped: {reasons}"
        )


def make_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    labels: str,
    n: int,
    seed: int,
    sampling_temperature: float = 1.0,
    label_temperature: float = 0.5,
    samples_per_problem: int = 4,
    operations: tuple[int, int] = OPERATIONS,
) -> PreferencePairs:
    """Makes `n` preference pairs on problems of the `preference` split, one pair per problem.

    The same model and arguments give the same pairs, and a smaller `n` gives a prefix of a larger one. Responses that
    were cut off at the token limit are in no pair.

    Args:
        model: The policy to sample from, which is the reference of the training that follows.
        tokenizer: Its tokenizer.
        labels: `verified` takes a problem's first right sample against its first wrong one. `graded` takes its two
            samples, ranked at random with `preference_probability`.
        n: Number of pairs.
        seed: Seed of the problems, the samples and the labels.
        sampling_temperature: Temperature of the samples. 1 samples the policy's own law.
        label_temperature: Noise of graded labels, in units of `quality`.
        samples_per_problem: Number of samples that are drawn to find a verified pair, at least 2. A graded pair always
            takes 2.
        operations: Smallest and largest number of operations of the problems (see `make_problems`). More make responses
            longer.

    Raises:
        ConfigError: an argument is outside its domain.
        DataError: 2,048 problems in a row gave no pair.
    """
    _check_arguments(labels, n, sampling_temperature, label_temperature, samples_per_problem)
    draws = samples_per_problem if labels == "verified" else 2
    stream = _sampled_problems(model, tokenizer, seed, sampling_temperature, draws, operations)
    label_rng = random.Random(f"labels:{seed}")
    rows: list[dict[str, Any]] = []
    skipped: Counter[str] = Counter()
    problems = right = problems_at_last_pair = 0
    while len(rows) < n:
        problem, responses = next(stream)
        problems += 1
        right += sum(_is_right(problem, response) for response in responses)
        if labels == "verified":
            picked = _pick_verified(problem, responses)
        else:
            picked = _pick_graded(problem, responses, label_temperature, label_rng)
        if isinstance(picked, str):
            skipped[picked] += 1
            _refuse_barren(problems - problems_at_last_pair, skipped)
        else:
            rows.append(_as_row(problem, picked))
            problems_at_last_pair = problems
    return PreferencePairs(rows, problems, problems * draws, right, dict(skipped))


def quality(problem: Problem, text: str) -> float:
    """Returns the quality of a response, in [0, 1].

    Half of it is the share of right steps, and the other half is given for a well-formed solution with the right
    answer.

    Example:
        >>> from infopo.lab.problems import solve
        >>> problem = solve("1+2-3=?")
        >>> quality(problem, problem.solution), quality(problem, "1+2=3")
        (1.0, 0.25)
    """
    return (share_of_right_steps(problem, text) + verify(problem, text)) / 2


def preference_probability(quality_a: float, quality_b: float, label_temperature: float) -> float:
    """Returns the Bradley-Terry probability that the judge prefers a to b, σ((q_a - q_b) / label_temperature).

    Example:
        >>> preference_probability(0.5, 0.5, label_temperature=0.5)
        0.5
    """
    # The logistic function is written with tanh, because exp overflows if the temperature is small.
    return (1 + math.tanh((quality_a - quality_b) / (2 * label_temperature))) / 2


def _sampled_problems(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    temperature: float,
    draws: int,
    operations: tuple[int, int],
) -> Iterator[tuple[Problem, list[Sample]]]:
    """Yields problems without end, each with `draws` responses, which are sampled round by round."""
    seeds = random.Random(f"samples:{seed}")
    for start in itertools.count(0, PROBLEMS_PER_ROUND):
        problems = make_problems(start + PROBLEMS_PER_ROUND, seed, "preference", operations)[start:]
        responses = sample(
            model,
            tokenizer,
            [as_prompt(problem) for problem in problems],
            max_new_tokens=longest_response(operations[1]),
            temperature=temperature,
            num_return_sequences=draws,
            batch_size=PROBLEMS_PER_ROUND * draws,
            seed=seeds.getrandbits(32),
        )
        yield from zip(problems, responses, strict=True)


def _pick_verified(problem: Problem, responses: Sequence[Sample]) -> _Texts | str:
    """Returns the first right and the first wrong response, or the reason why there is no pair."""
    finished = [response for response in responses if response.finished]
    right = [response.text for response in finished if _is_right(problem, response)]
    wrong = [response.text for response in finished if not _is_right(problem, response)]
    if right and wrong:
        return right[0], wrong[0]
    return "no wrong sample" if right else "no right sample"


def _pick_graded(
    problem: Problem, responses: Sequence[Sample], label_temperature: float, rng: random.Random
) -> _Texts | str:
    """Returns two responses in the order of the noisy judge, or the reason why there is no pair."""
    a, b = responses
    if not (a.finished and b.finished):
        return "cut sample"
    if a.text == b.text:
        return "equal samples"
    probability = preference_probability(
        quality(problem, a.text), quality(problem, b.text), label_temperature
    )
    return (a.text, b.text) if rng.random() < probability else (b.text, a.text)


def _is_right(problem: Problem, response: Sample) -> bool:
    return response.finished and verify(problem, response.text)


def _as_row(problem: Problem, texts: _Texts) -> dict[str, Any]:
    chosen, rejected = texts
    return {
        "prompt": as_prompt(problem),
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def _refuse_barren(problems_without_pair: int, skipped: Counter[str]) -> None:
    if problems_without_pair >= _MAX_BARREN_ROUNDS * PROBLEMS_PER_ROUND:
        counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise DataError(
            f"{problems_without_pair} problems in a row gave no pair ({counts}); "
            "sample a policy that is sometimes right and sometimes wrong, or raise sampling_temperature",
            row_id="lab preference pairs",
            reason="no pairs",
        )


def _check_arguments(
    labels: str, n: int, sampling_temperature: float, label_temperature: float, samples_per_problem: int
) -> None:
    problems = []
    if labels not in LABELS:
        problems.append(f"labels: expected one of {', '.join(LABELS)}, got {labels!r}")
    if n < 0:
        problems.append(f"n: expected at least 0, got {n}")
    # Greedy samples of one problem are all the same.
    if not sampling_temperature > 0:
        problems.append(f"sampling_temperature: expected a number above 0, got {sampling_temperature}")
    if not label_temperature > 0:
        problems.append(f"label_temperature: expected a number above 0, got {label_temperature}")
    if samples_per_problem < 2:
        problems.append(f"samples_per_problem: expected at least 2, got {samples_per_problem}")
    if problems:
        raise ConfigError(problems)
