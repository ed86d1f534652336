"""Runs of the lab that are kept on disk one by one, so that a study can be stopped and continued at any time.

A run is described by `Run`, and its result is a file whose name is the hash of that description. Training is the plain
loop behind `InfoPOTrainer` (AdamW, linear decay, clipping at 1), with the package's losses, step statistics and
log-probs, and without what a trainer does for files, several processes and large models. A test checks that both end at
the same weights.
"""

import argparse
import copy
import hashlib
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lab_world import LABS, Array, Record, World, packed, sampled, solved, world
from torch import Tensor
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from infopo.logps.forward import prepare, response_logps
from infopo.losses.catalog import OBJECTIVES
from infopo.losses.coupling import StepCoupling
from infopo.losses.registry import loss_function, step_statistic
from infopo.records import PER, PackedBatch, ResponseLogps, Role
from infopo.runs import write_text_atomic

VERSION = 1
"""Part of the name of every kept result. It is raised when a change of this file changes results."""

DEFAULT_WORK = Path("~/.cache/infopo/studies").expanduser()


def options_of(description: str, folder: Path, arguments: list[str] | None) -> argparse.Namespace:
    """Returns the options of a study's command line: `out`, `work`, `minutes`, `seeds` and `tiny`.

    Args:
        description: Docstring of the study's script, of which the first line is its help.
        folder: Folder of the study.
        arguments: Arguments of the command line, or None for those of this process.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, default=folder, help="folder of the results")
    parser.add_argument("--work", type=Path, help="folder in which finished runs are kept")
    parser.add_argument("--minutes", type=float, help="time after which no further run is begun")
    parser.add_argument("--seeds", type=int, default=5, help="repetitions, 2 to 10")
    parser.add_argument("--tiny", action="store_true", help="small settings, for tests")
    options = parser.parse_args(arguments)
    options.work = options.work or (options.out / "work" if options.tiny else DEFAULT_WORK)
    return options


@dataclass(frozen=True)
class Run:
    """The description of a run, on which its result depends, and nothing else.

    Attributes:
        lab: Name in `LABS`.
        labels: `verified` or `graded`.
        seed: Seed of problems, samples, labels and order.
        pairs: Number of pairs.
        objective: Name of the loss.
        parameters: Its parameters, as (name, value).
        rate: Highest learning rate. It rises linearly over `warmup` steps and then decays linearly to 0.
        batch: Number of pairs per step.
        steps: Number of steps. The pairs are repeated, each time in a new order, until there are enough.
        warmup: Number of steps over which the learning rate rises.
        checkpoints: Steps after which the policy is measured, besides the last.
    """

    lab: str
    labels: str
    seed: int
    pairs: int
    objective: str
    parameters: tuple[tuple[str, Any], ...]
    rate: float
    batch: int
    steps: int
    warmup: int = 0
    checkpoints: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """The name under which the result is kept."""
        content = {"version": VERSION, "lab": asdict(LABS[self.lab]), "run": asdict(self)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


Watch = Callable[[int, PreTrainedModel, torch.optim.Optimizer], None]
Train = Callable[[Run, World], Record]


def kept(work: Path, run: Run) -> Record | None:
    """Returns the result of a run that has been finished, or None."""
    file = work / "runs" / f"{run.key}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def finish(
    work: Path, runs: Sequence[Run], minutes: float | None = None, train: Train | None = None
) -> list[Record]:
    """Computes what is missing, in the order given, and returns the results of the runs that are finished.

    Args:
        work: Folder in which policies, pairs and results are kept.
        runs: The runs of a study. Those which share data should follow one another.
        minutes: Time after which no further run is begun, or None.
        train: Computes the result of a run, by default `train_and_measure`. Runs whose results have other fields
            have another type, too, so that their names differ.
    """
    torch.set_num_threads(1)
    train = train or train_and_measure
    (work / "runs").mkdir(parents=True, exist_ok=True)
    begin, missing = time.monotonic(), [run for run in runs if kept(work, run) is None]
    for number, run in enumerate(missing):
        if minutes is not None and time.monotonic() - begin > 60 * minutes:
            break
        start = time.process_time()
        result: Record = {
            **asdict(run),
            **train(run, world(work, run.lab, run.labels, run.seed, run.pairs)),
        }
        result["seconds"] = time.process_time() - start
        write_text_atomic(work / "runs" / f"{run.key}.json", json.dumps(result))
        if number % 20 == 0:
            print(f"{number} of {len(missing)} runs, {time.monotonic() - begin:.0f} s", flush=True)
    return [record for run in runs if (record := kept(work, run)) is not None]


def train_and_measure(run: Run, shared: World, watch: Watch | None = None) -> Record:
    """Trains a copy of the start policy. Returns what was measured at each step and at each checkpoint.

    Args:
        run: What to train.
        shared: The data and the start policy.
        watch: Is called before the first step and after each, with the number of steps made. It may not change the
            policy.
    """
    policy = copy.deepcopy(shared.policy)
    prepare([policy], "auto")
    parameters = dict(run.parameters)
    loss = loss_function(run.objective, parameters)
    coupling = StepCoupling([step_statistic(run.objective, parameters)])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=run.rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, run.warmup, run.steps)
    points, trace = [], []
    if watch:
        watch(0, policy, optimizer)
    for step, batch in enumerate(batches(run, shared)):
        logps = response_logps(policy.train(), batch)
        # The loss is differentiated by the log-probs first, which shows how hard it pulls on each response.
        seen = batch.with_logps(logps.detach().requires_grad_())
        coupling.advance([seen])
        value, pull = value_and_pull(loss, replace(seen, statistic=coupling.values[0]), batch)
        optimizer.zero_grad()
        logps.backward(pull)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        trace.append([value, *_share_and_cap(seen, pull, parameters), float(norm)])
        if watch:
            watch(step + 1, policy, optimizer)
        if step + 1 == run.steps or step + 1 in run.checkpoints:
            points.append({"step": step + 1, **measure(policy.eval(), shared)})
    lengths = [
        len(ids)
        for ids in sampled(policy, shared.tokenizer, shared.lab, shared.problems[: shared.lab.lengths])
    ]
    return {
        "points": points,
        "trace": np.round(trace, 5).T.tolist(),
        "sample_length": float(np.mean(lengths)),
    }


TRACE = ("loss", "rejected share", "capped", "log ratio of rejected", "gradient norm")
"""Rows of a result's `trace`, with one value per step."""


def value_and_pull(loss: Any, logps: ResponseLogps, batch: PackedBatch) -> tuple[float, Tensor]:
    """Returns the loss of a step and its derivative by each response's log-prob."""
    counts = batch.counts.double().clamp(min=1)
    value = sum(term.values.sum() / counts[PER.index(term.per)] for term in loss(logps))
    (pull,) = torch.autograd.grad(value, logps.policy)
    return float(value.detach()), pull


def _share_and_cap(logps: ResponseLogps, pull: Tensor, parameters: Record) -> tuple[float, float, float]:
    """Returns the rejected responses' share of Σ|∂L/∂log π|, the share of them beyond the cap, and mean log r(l)."""
    rejected, weight = logps.rejected, pull.abs()
    if not len(rejected):
        return 0.0, 0.0, 0.0
    log_ratio = (logps.policy.detach() - logps.reference)[rejected]
    critic = parameters.get("beta", 1.0) * log_ratio
    if parameters.get("length_normalized"):
        critic = critic / logps.length[rejected]
    capped = (critic > 5.0).double().mean()
    return float(weight[rejected].sum() / weight.sum()), float(capped), float(log_ratio.mean())


def batches(run: Run, shared: World) -> Iterator[PackedBatch]:
    """Yields the batch of each step. SFT sees the chosen responses alone."""
    examples = shared.pairs[: run.pairs]
    if OBJECTIVES[run.objective].sides == {"chosen"}:
        examples = [replace(e, rejected_ids=[], reference=(e.reference or ())[:1]) for e in examples]
    rng = random.Random(f"order:{run.seed}")
    order = itertools.chain.from_iterable(
        rng.sample(range(len(examples)), len(examples)) for _ in itertools.count()
    )
    for _ in range(run.steps):
        yield packed([examples[i] for i in itertools.islice(order, run.batch)])


@torch.no_grad()
def measure(policy: PreTrainedModel, shared: World) -> Record:
    """Measures accuracy, forward KL from the start policy, and changes of held-out log-probs (nats per response)."""
    greedy, probability = solved(policy, shared.solutions, int(shared.tokenizer.pad_token_id))
    log_ratio = np.concatenate([log_ratios(policy, batch) for batch in shared.anchors])
    # E[π_θ/π_start] = 1 over samples of the start policy, so that this has the mean of -log r, and far less variance
    # at small drift. It is never negative.
    kl = np.expm1(log_ratio) - log_ratio
    change = np.concatenate([log_ratios(policy, batch) for batch in shared.held_out])
    chosen = np.array([role == Role.CHOSEN for batch in shared.held_out for role in batch.roles])
    return {
        "accuracy": float(greedy.mean()),
        "sampled_accuracy": float(probability.mean()),
        "kl": float(kl.mean()),
        "kl_se": float(kl.std(ddof=1) / len(kl) ** 0.5),
        "kl_plain": float(-log_ratio.mean()),
        "chosen_change": float(change[chosen].mean()),
        "rejected_change": float(change[~chosen].mean()),
    }


def log_ratios(policy: PreTrainedModel, batch: PackedBatch) -> Array:
    """Returns log π_θ - log π_ref of each response of a batch (nats)."""
    ratios: Array = (response_logps(policy, batch) - batch.reference).double().numpy()
    return ratios
