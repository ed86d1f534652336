"""How much several responses to one prompt differ from each other. Imports no torch until it is used.

All figures are of the samples of a prompt among themselves, as a mean over prompts: responses to other prompts differ
anyway. They depend on the number of samples, so that only evaluations with the same number can be compared.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from infopo.evaluation.results import Response
from infopo.output import get_logger
from infopo.paired import mean_interval

log = get_logger(__name__)

SELF_BLEU_TEXTS = 200
"""Largest number of responses that self-BLEU is computed of, because it compares each with all others."""

_WORD = re.compile(r"\w+|[^\w\s]")


def diversity(
    responses: Sequence[Response],
    rule: str,
    *,
    logps: Sequence[float | None] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns figures of diversity of one task, or nothing if no item has two samples.

    Args:
        responses: Responses to the task.
        rule: Rule whose answers are counted.
        logps: Σ log π(token) of each response (nats), as drawn at temperature 1, for the entropy.
        seed: Seed of the choice of prompts for self-BLEU, and of the bootstrap.

    Returns:
        `samples` (the least number of an item), `distinct_1` to `distinct_3`, `unique_responses` and `unique_answers`,
        each `{"value", "ci95"}`, `self_bleu` with `texts`, unless sacrebleu is missing, and `entropy` if there are
        log-probs.
    """
    by_item: dict[str, list[Response]] = {}
    for each in responses:
        by_item.setdefault(each.item, []).append(each)
    groups = [group for group in by_item.values() if len(group) > 1]
    if not groups:
        return {}
    texts = [[each.response for each in group] for group in groups]
    found: dict[str, Any] = {"samples": min(map(len, groups))}
    words = [[_WORD.findall(text) for text in each] for each in texts]
    for n in (1, 2, 3):
        found[f"distinct_{n}"] = _mean([distinct_words(each, n) for each in words], seed)
    most = max(map(len, groups))
    found["unique_responses"] = _mean([len(set(each)) for each in texts], seed, (1, most))
    answers = [{each.marks[rule].answer for each in group} - {None} for group in groups]
    found["unique_answers"] = _mean([len(each) for each in answers], seed, (0, most))
    if (bleu := self_bleu(texts, seed=seed)) is not None:
        found["self_bleu"] = bleu
    if logps is not None and (entropy := _entropy(responses, logps)) is not None:
        found["entropy"] = entropy
    return found


def distinct_words(texts: Sequence[Sequence[str]], n: int) -> float:
    """Returns the share of distinct n-grams among all n-grams of the texts (`diagnostics.distinct_n`), or NaN.

    References:
        Li et al., 2016, arXiv 1510.03055.

    Example:
        >>> distinct_words([["a", "b", "c"], ["a", "b", "d"]], 2)
        0.75
    """
    from infopo.diagnostics import distinct_n

    numbers: dict[str, int] = {}
    return distinct_n([[numbers.setdefault(word, len(numbers)) for word in text] for text in texts], n)


def self_bleu(
    groups: Sequence[Sequence[str]], *, most: int = SELF_BLEU_TEXTS, seed: int = 0
) -> dict[str, Any] | None:
    """Returns the mean BLEU of a response against the other responses to its prompt, from 0 to 100 (all alike).

    Args:
        groups: Responses by prompt.
        most: Largest number of responses. Of more, prompts are drawn, and of a prompt that has more, responses.
        seed: Seed of that draw.

    Returns:
        `{"value": ..., "texts": number of responses}`, or None without two responses to a prompt or without sacrebleu.

    References:
        Zhu et al., 2018, Texygen, arXiv 1802.01886.

    Example:
        >>> self_bleu([["the same four words", "the same four words"]])
        {'value': 100.0, 'texts': 2}
    """
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        log.warning("self-BLEU is left out, because sacrebleu is not installed: pip install 'infopo[eval]'")
        return None
    rng = np.random.default_rng(seed)
    bleu = BLEU(effective_order=True)
    scores: list[float] = []
    for place in rng.permutation(len(groups)):
        group = list(groups[place])
        room = most - len(scores)
        if len(group) > room:
            if scores:
                continue
            group = [group[k] for k in sorted(rng.choice(len(group), size=room, replace=False))]
        if len(group) > 1:
            others = [[*group[:k], *group[k + 1 :]] for k in range(len(group))]
            scores += [float(bleu.sentence_score(*pair).score) for pair in zip(group, others)]
    return {"value": round(math.fsum(scores) / len(scores), 9), "texts": len(scores)} if scores else None


def _entropy(responses: Sequence[Response], logps: Sequence[float | None]) -> dict[str, Any] | None:
    """Returns -Σ log π / Σ tokens (nats per token), which estimates the entropy of the next token, or None."""
    known = [
        (logp, each.tokens)
        for each, logp in zip(responses, logps, strict=True)
        if logp is not None and each.tokens
    ]
    if not known:
        return None
    return {
        "value": -math.fsum(logp for logp, _ in known) / sum(tokens for _, tokens in known),
        "n": len(known),
    }


def _mean(
    values: Sequence[float], seed: int, bounds: tuple[float, float] = (0, 1)
) -> Mapping[str, Any] | None:
    numbers = [value for value in values if not math.isnan(value)]
    if not numbers:
        return None
    return {
        "value": math.fsum(numbers) / len(numbers),
        "ci95": mean_interval(numbers, bounds=bounds, seed=seed),
    }
