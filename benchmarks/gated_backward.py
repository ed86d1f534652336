"""Asks whether InfoPO can skip the backward pass of rejected responses that hardly push: importance-gated backward.

    python benchmarks/gated_backward.py --json benchmarks/results/gated-backward.json

The push on a rejected response has weight r = π(l)/π_ref(l). A response with r < τ is kept with probability r/τ and
weighted by τ/r, which leaves the expected gradient as it is, and the backward pass of one that is dropped is left out.

- `accuracy`: the lab's verified pairs, the same steps with and without gating, over seeds. The loss alone is changed,
  which gives the gradients that skipping would give.
- `seconds`: a step of a regime as it is, against a forward pass of everything followed by a step of what is kept.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import regimes
from infopo import InfoPOConfig, InfoPOTrainer
from infopo.data.packing import pack, select
from infopo.lab import make_problems, policy_path
from infopo.lab.evaluation import accuracy
from infopo.lab.preferences import make_pairs
from infopo.logps import attention
from infopo.logps.forward import response_logps
from infopo.losses.declaration import objective, positive
from infopo.models import load_policy, load_tokenizer
from infopo.records import LossTerm, LossTerms, PackedBatch, ResponseLogps, Role
from shapes import build_model
from speed import hardware, spread, versions

PAIRS, EPOCHS, BATCH_SIZE, PROBLEMS = 1200, 2, 32, 1000
dropped: list[tuple[int, int]] = []
"""Tokens of dropped rejected responses, and of all rejected responses, per micro-batch."""


@objective(
    title="InfoPO, gated",
    formula="-log π_θ(w) + r(l) [u < r/τ] / min(1, r/τ)",
    source="an experiment of this project",
    when="to measure what gating does to training",
    bound="that of InfoPO, in expectation",
    parameters={"tau": positive("Weight below which a response may be dropped.")},
    reference=("rejected",),
    ratio=True,
)
def gated(logps: ResponseLogps, *, tau: float = 0.1) -> LossTerms:
    """InfoPO whose rejected terms are dropped at random, without a change of the expected gradient."""
    rejected = logps.role == Role.REJECTED
    ratio = (logps.policy - logps.reference)[rejected].clamp(max=5.0).exp()
    kept_with = (ratio.detach() / tau).clamp(max=1.0)
    kept = torch.rand_like(kept_with) < kept_with
    length = logps.length[rejected]
    dropped.append((int(length[~kept].sum()), int(length.sum())))
    chosen = logps.role == Role.CHOSEN
    return [
        LossTerm(values=-logps.policy[chosen], per="chosen"),
        LossTerm(values=torch.where(kept, ratio / kept_with, 0.0), per="rejected"),
    ]


def train(seed: int, rate: float, tau: float | None) -> dict[str, Any]:
    """Trains on the lab's pairs, and returns accuracy and what was dropped in the last quarter of the steps."""
    reference, tokenizer = load_policy(str(policy_path())), load_tokenizer(str(policy_path()))
    rows = make_pairs(reference, tokenizer, labels="verified", n=PAIRS, seed=seed).rows
    from datasets import Dataset

    dropped.clear()
    loss = {"objective": gated, "objective_parameters": {"tau": tau}} if tau is not None else {}
    with tempfile.TemporaryDirectory() as folder:
        args = InfoPOConfig(
            output_dir=folder, learning_rate=rate, num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH_SIZE,
            activation_checkpointing=False, save_strategy="no", report_to="none", disable_tqdm=True, seed=seed,
            use_cpu=True, reference_store="off", dataset_cache="off", **loss,
        )  # fmt: skip
        trainer = InfoPOTrainer(
            model=load_policy(str(policy_path())),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        dropped.clear()
        trainer.train()
    late = dropped[-len(dropped) // 4 :]
    score = accuracy(trainer.model, tokenizer, make_problems(PROBLEMS, seed, "evaluation"))
    return {
        "seed": seed,
        "learning_rate": rate,
        "tau": tau,
        "accuracy": score.accuracy,
        "dropped_late": sum(d for d, _ in late) / sum(n for _, n in late) if late else 0.0,
        "dropped": sum(d for d, _ in dropped) / sum(n for _, n in dropped) if dropped else 0.0,
    }


def seconds(regime: str, share: float, checkpointing: bool, rounds: int) -> dict[str, Any]:
    """Measures a step of a regime as it is, and gated, with this share of the rejected responses dropped."""
    job = {"model": "a4k", "vocabulary": 4096, "device": "cpu", "variant": "infopo"}
    model = build_model(job, seed=0)
    assert attention.enable(model) is None
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    batch = pack(regimes.draw(regime, regimes.REGIMES[regime].batch, 4096))
    rejected = [r for r in range(batch.num_responses) if batch.role[r] == Role.REJECTED]
    lost = set(rejected[: round(share * len(rejected))])
    kept = select(batch, [r for r in range(batch.num_responses) if r not in lost])

    def step(batch: PackedBatch) -> None:
        model.zero_grad(set_to_none=False)
        logps: Tensor = response_logps(model, batch)
        logps.mean().backward()

    def gated_step() -> None:
        with torch.no_grad():
            response_logps(model, batch)
        step(kept)

    times: dict[str, list[float]] = {"as it is": [], "gated": []}
    for number in range(rounds + 1):
        for name, run in (("as it is", lambda: step(batch)), ("gated", gated_step)):
            begin = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - begin)
    ratios = [g / a for g, a in zip(times["gated"], times["as it is"], strict=True)]
    return {
        "regime": regime,
        "dropped": share,
        "checkpointing": checkpointing,
        "gated_by_as_it_is": spread(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument(
        "--seeds", type=int, default=5, help="0: times steps alone, beside runs that the file has"
    )
    parser.add_argument("--rates", default="1e-4,3.2e-4")
    parser.add_argument("--taus", default="0.1,0.5")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = json.loads(args.json.read_text(encoding="utf-8"))["runs"] if args.seeds == 0 else []
    result: dict[str, Any] = {"hardware": hardware("cpu"), "versions": versions(), "runs": runs, "steps": []}

    def write() -> None:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    for rate in map(float, args.rates.split(",")):
        for seed in range(args.seeds):
            for tau in (None, *map(float, args.taus.split(","))):
                result["runs"].append(train(seed, rate, tau))
                print(json.dumps(result["runs"][-1]), flush=True)
                write()
    late = [run["dropped_late"] for run in result["runs"] if run["tau"] is not None]
    # What was dropped at most, what all seeds and settings dropped in the median, and everything, as the limit.
    shares = sorted({round(statistics.median(late), 2), round(max(late), 2), 1.0}) if late else [1.0]
    for regime in ("i", "ii", "k"):
        for share in shares:
            for checkpointing in (False, True):
                result["steps"].append(seconds(regime, share, checkpointing, args.rounds))
                print(json.dumps(result["steps"][-1]), flush=True)
                write()


if __name__ == "__main__":
    main()
