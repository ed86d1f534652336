"""Run directories with every file that a report reads, made without training."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from infopo.runs import to_json

PROMPTS = ("17 + 26 =", "Say hello to <b>Ada</b> & co.", "Name three primes.", "Why is the sky blue?")

RECIPE = """\
model:
  name_or_path: lab:policy
data:
  path: pairs.jsonl
objective:
  name: {objective}
  beta: {beta}
train:
  learning_rate: {rate}
  max_steps: {steps}
output_dir: {directory}
"""


def write_run(
    directory: Path,
    *,
    objective: str = "infopo",
    beta: float = 1.0,
    fall: float = 0.0,
    steps: int = 60,
    seed: int = 0,
    finished: bool = True,
    verdicts: tuple[Mapping[str, Any], ...] = (),
) -> Path:
    """Writes a run whose chosen responses fall by `fall` nats, with values of a plausible size."""
    directory.mkdir(parents=True, exist_ok=True)
    rate = 1e-5
    (directory / "recipe.yaml").write_text(
        RECIPE.format(
            objective=objective, beta=beta, rate=rate, steps=steps, directory=json.dumps(directory.name)
        ),
        encoding="utf-8",
    )
    records = metrics(steps, fall, seed)
    if finished:
        records.append({"step": steps, "time": 1e9 + steps, "train_runtime": steps * 1.0, "train_loss": 0.5})
    lines = "".join(f"{to_json(record)}\n" for record in records)
    (directory / "metrics.jsonl").write_text(lines, encoding="utf-8")
    _write(directory / "environment.json", environment(directory.name))
    if finished:
        _write(directory / "eval.json", evaluation(fall))
    _write(directory / "data.json", DATA)
    found = list(verdicts)
    checks = [{"name": "length bias", "fired": False, "not_checked": "there are no sampled responses"}]
    _write(
        directory / "verdicts.json",
        {
            "schema_version": 1,
            "step": steps,
            "finished": finished,
            "verdicts": found,
            "checked": [*found, *checks],
        },
    )
    with (directory / "generations.jsonl").open("w", encoding="utf-8") as file:
        for record in generations(steps, seed):
            file.write(f"{json.dumps(record)}\n")
    return directory


def metrics(steps: int, fall: float, seed: int) -> list[dict[str, Any]]:
    """Returns a record per step with every name that a panel reads."""
    noise = np.random.default_rng(seed).normal(size=(steps + 1, 8))
    records = []
    for step in range(steps + 1):
        done = step / max(steps, 1)
        a, b, c, d, e, f, g, h = noise[step].tolist()
        chosen, rejected = (0.2 - fall) * done + 0.02 * a * done, -(1 + fall) * done + 0.05 * b * done
        records.append(
            {
                "step": step,
                "time": 1e9 + step,
                "loss": 1 - 0.4 * done + 0.05 * c,
                "grad_norm": math.exp(1 + 0.3 * d),
                "learning_rate": 1e-5 * (1 - done),
                "rewards/margins": chosen - rejected,
                "probe/n": 64,
                "probe/n_pairs": 64,
                "probe/n_chosen": 64,
                "probe/logps/chosen": chosen - 9,
                "probe/logps/rejected": rejected - 11,
                "probe/change/chosen": chosen,
                "probe/change/chosen_ci95": 0.05 + 0.1 * done,
                "probe/change/rejected": rejected,
                "probe/change/rejected_ci95": 0.05 + 0.2 * done,
                "probe/change/chosen_per_token": chosen / 12,
                "probe/change/chosen_per_token_ci95": 0.01,
                "probe/change/rejected_per_token": rejected / 12,
                "probe/change/rejected_per_token_ci95": 0.02,
                "probe/chosen_fell": min(1, max(0, 0.3 + 0.4 * fall * done)),
                "forecast/chosen_falls": 0.41,
                "probe/margin": chosen - rejected,
                "probe/margin_ci95": 0.1,
                "probe/accuracy": 0.5 + 0.3 * done,
                "probe/ranking_accuracy": 0.6 + 0.1 * done,
                "probe/p_max": -0.2 + 0.1 * done,
                "probe/entropy": 0.6 - 0.2 * done,
                "drift/chosen": chosen,
                "drift/rejected": rejected,
                "kl/forward": 0.5 * done * done,
                "kl/forward_se": 0.02,
                "anchor/entropy": 0.7 - 0.3 * done,
                "gradients/chosen": math.exp(0.2 * e),
                "gradients/rejected": math.exp(0.2 * f),
                "gradients/cosine": 0.8 + 0.05 * g,
                "gradients/weight_ratio": 1 + done,
                "gradients/band_low": 0.7,
                "gradients/band_high": 1.4,
                "gradients/log_inverse_policy": 11 - rejected,
                "gradients/log_inverse_reference": 11.0,
                "ratio_tail/q50": -done,
                "ratio_tail/q90": 0.1,
                "ratio_tail/q99": 0.4,
                "ratio_tail/max": 0.8 + 0.1 * h,
                "ratio_tail/ess": 0.9 - 0.3 * done,
                "ratio_tail/k_hat": 0.3,
                "ratio_tail/capped": 0.0,
                "ratio/mean": math.exp(-done),
                "ratio/max": 2.0,
                "length/r2": 0.05,
                "length/sampled": 20 + 3 * done,
                "length/anchor": 20.0,
                "generations/distinct_2": 0.8,
                "generations/finished": 0.97,
                "memory/peak_gib": 3.2,
            }
        )
    return records


def evaluation(fall: float) -> dict[str, Any]:
    return {
        "eval_loss": 0.6,
        "eval_rewards/accuracies": 0.72,
        "eval_runtime": 0.5,
        "eval_samples_per_second": 400.0,
        "accuracy": 0.75 - 0.1 * fall,
        "accuracy_ci95": [0.72 - 0.1 * fall, 0.78 - 0.1 * fall],
    }


def generations(steps: int, seed: int) -> list[dict[str, Any]]:
    """Returns responses to every prompt at three steps, some marked right."""
    return [
        {
            "step": step,
            "index": index,
            "row_id": f"pairs.jsonl:{index + 1}",
            "prompt": prompt,
            "response": f"Answer {index}, which is {'nearly ' * (step > 0)}certain: {42 + seed * (step > 0)}.",
            "tokens": 12,
            "finished": index != 3,
            "mark": (None, True, False)[(index + seed) % 3] if index else step == 0,
        }
        for step in (0, steps // 2, steps)
        for index, prompt in enumerate(PROMPTS)
    ]


def environment(name: str) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "created": "2026-11-27T11:00:00+00:00",
        "infopo": "0.1.0",
        "python": "3.11.7",
        "packages": {"torch": "2.13.0+cpu", "peft": None},
        "infopo_git": {"commit": "ab" * 20, "dirty": False},
        "hardware": {"cpu": "a processor", "cores": 2},
        "command_line": ["infopo", "train", f"{name} recipe.yaml"],
        "seed": 0,
        "rows": [
            {
                "source": "pairs.jsonl",
                "rows": 610,
                "used": 600,
                "skipped": {"empty chosen": 10},
                "notes": {"ties": 3},
            }
        ],
    }


DATA = {
    "schema_version": 1,
    "pairs": 600,
    "length": {"chosen_mean": 21.5, "rejected_mean": 19.25, "cohens_d": 0.31, "cohens_d_ci95": [0.2, 0.42]},
    "near_duplicates": {"count": 12, "share": 0.02, "rows": ["pairs.jsonl:7"]},
    "conflicts": {"count": 0, "share": 0.0, "rows": []},
    "reference_prefers_rejected": {"share": 0.123, "n": 600},
}

FALLING = {
    "name": "chosen falling",
    "fired": True,
    "step": 24,
    "effect": -0.81,
    "interval": [-0.96, -0.66],
    "unit": "nats per response",
    "threshold": "below −0.02 nats per token, with the interval below 0",
    "not_checked": None,
    "text": "Chosen responses are less likely than at the start.",
    "advice": "Lower the learning rate, or raise β.",
}


def _write(path: Path, value: Any) -> None:
    path.write_text(f"{to_json(value, indent=2)}\n", encoding="utf-8")
