"""The demo's pairs: verified ones by the workflow behind `infopo pairs`, graded ones by the lab's noisy judge."""

import json
from pathlib import Path
from typing import Any

from infopo.errors import DataError
from infopo.evaluation.pairing import PairingSettings
from infopo.evaluation.settings import EvaluationSettings
from infopo.lab.preferences import make_pairs
from infopo.models import LAB_POLICY, load_policy, load_tokenizer
from infopo.workflows.pairs import pairs

SAMPLES = 4
"""Samples per problem, of which a right and a wrong one make a verified pair."""


def lab_pairs(labels: str, n: int, seed: int, folder: Path) -> tuple[list[dict[str, Any]], str]:
    """Returns pairs of the lab's policy, and a sentence about them.

    Args:
        labels: `verified` or `graded`.
        n: Number of pairs.
        seed: Seed of problems, samples and labels.
        folder: Where samples of verified pairs are kept, so that the demo does not draw them again.

    Raises:
        DataError: Problems give too few pairs.
    """
    if labels == "verified":
        return _verified(n, seed, folder)
    made = make_pairs(load_policy(LAB_POLICY), load_tokenizer(LAB_POLICY), labels=labels, n=n, seed=seed)
    without = ", ".join(f"{count} {reason}" for reason, count in made.skipped.items()) or "none"
    return made.rows, (
        f"{n} {labels} pairs from {made.samples} samples of the SFT policy ({made.right / made.samples:.0%} "
        f"right) on {made.problems} problems; problems without a pair: {without}"
    )


def _verified(n: int, seed: int, folder: Path) -> tuple[list[dict[str, Any]], str]:
    # A problem gives a pair with a probability of somewhat more than 1/2, where the policy is right in 6 of 10 samples.
    problems = 2 * n + 200
    settings = EvaluationSettings(
        tasks=["lab"], limit=problems, num_samples=SAMPLES, temperature=1.0, batch_size=256, seed=seed
    )
    path = pairs(
        LAB_POLICY,
        "lab",
        settings,
        PairingSettings(seed=seed),
        prompts=f"lab:{seed}",
        output=folder / f"sampled_seed{seed}.jsonl",
    )
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if len(rows) < n:
        raise DataError(
            f"{problems} problems give {len(rows)} pairs; expected {n}", str(path), "too few pairs"
        )
    return rows[:n], f"{n} verified pairs: the first of {path}"
