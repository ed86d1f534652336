"""What measuring costs, as a share of training's time: one measurement of each kind against optimizer steps.

    python benchmarks/diagnostics.py --out benchmarks/results/diagnostics.json

Each round takes `--steps` optimizer steps and then one measurement of likelihood and one of gradients, on the lab's
model and pairs. A measurement that happens every k steps costs its time divided by k steps' time.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from infopo.arguments import InfoPOConfig
from infopo.build import build_examples
from infopo.lab import policy_path
from infopo.models import LAB_POLICY, load_tokenizer
from infopo.provenance import environment
from infopo.settings import DataSettings
from infopo.trainer import InfoPOTrainer


class Clock(TrainerCallback):
    """Measures the policy after every few steps, and notes what that and the steps took (seconds)."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.seconds: dict[str, list[float]] = {"step": [], "likelihood": [], "gradients": []}
        self.trainer: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds["step"].append(time.perf_counter() - self.begin)
        if state.global_step % self.every:
            return
        observer = self.trainer._observer
        for kind in ("likelihood", "gradients"):
            begin = time.perf_counter()
            observer._measure(
                state.global_step, likelihood=kind == "likelihood", gradients=kind == "gradients"
            )
            self.seconds[kind].append(time.perf_counter() - begin)
        self.intervals = observer.probe_steps, observer.gradient_steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps in each round")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(LAB_POLICY)
    data, _ = build_examples(DataSettings(path="lab:verified", cache="off"), tokenizer)
    clock = Clock(options.steps)
    with tempfile.TemporaryDirectory() as folder:
        args = InfoPOConfig(
            folder, use_cpu=True, reference_store="off", max_steps=options.rounds * options.steps,
            per_device_train_batch_size=options.batch, report_to="none", save_strategy="no", disable_tqdm=True,
            activation_checkpointing=False,
        )  # fmt: skip
        trainer = InfoPOTrainer(
            str(policy_path()), args=args, train_dataset=data, processing_class=tokenizer, callbacks=[clock]
        )
        clock.trainer = trainer
        trainer.train()
    step = statistics.median(clock.seconds["step"])
    probe_steps, gradient_steps = clock.intervals
    cost = {kind: [s / step for s in clock.seconds[kind]] for kind in ("likelihood", "gradients")}
    every = {"likelihood": probe_steps, "gradients": gradient_steps}
    result = {
        "batch": options.batch,
        "intervals": every,
        "steps_per_measurement": {k: _spread(v) for k, v in cost.items()},
        "share_of_time": {k: _spread([value / every[k] for value in v]) for k, v in cost.items()},
        "n": {k: len(v) for k, v in clock.seconds.items()},
        "environment": environment(seed=args.seed),
    }
    print(json.dumps(result["share_of_time"], indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "largest": max(values)}


if __name__ == "__main__":
    main()
