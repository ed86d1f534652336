"""Trains in rounds on the policy's own newest samples, and on samples of the start (see README.md beside this file).

    python studies/09_rounds/run.py --minutes 30    # computes what is missing, then rewrites the results
    python studies/09_rounds/run.py --minutes 0     # takes only what is there
    python studies/09_rounds/run.py --out elsewhere --work elsewhere/work --tiny

What is finished is kept in `--work`, one file per seed and method, and a later call goes on with the others.
"""

import hashlib
import itertools
import json
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from drift import first_at, interval, is_clear, show
from lab_runs import Run, options_of, train_and_measure
from lab_world import World, encoded, start, start_policy, with_reference, world
from readme import publish, table

from infopo.evaluation.pairing import PairingSettings
from infopo.evaluation.settings import EvaluationSettings
from infopo.provenance import environment
from infopo.runs import write_text_atomic
from infopo.workflows.pairs import pairs

Record = dict[str, Any]

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "InfoPO, β 1": ("infopo", {"beta": 1.0}),
    "DPO, β 0.1": ("dpo", {"beta": 0.1}),
    "SFT on chosen": ("sft", {}),
}
BASELINE = "SFT on chosen"

FRESH, FIRST, STALE = (
    "own samples, reference previous",
    "own samples, reference first",
    "samples of the start",
)
ARMS: dict[str, tuple[str, ...]] = dict.fromkeys(METHODS, (FRESH, FIRST, STALE)) | {BASELINE: (FRESH, STALE)}
"""What later rounds train on, and which policy is their reference. SFT has none. STALE has the first as reference."""

DRIFTS = (0.05, 0.1, 0.2)
"""Forward KL from the start (nats per response) at which arms are compared."""

VERSION = 1
"""Part of the name of every kept result. It is raised when a change of this file changes results."""


@dataclass(frozen=True)
class Design:
    """Sizes, which were fixed before any result.

    Attributes:
        lab: Name in `lab_world.LABS`.
        rounds: Number of rounds.
        prompts: New prompts per round.
        samples: Samples per prompt.
        steps: Optimizer steps per round.
        batch: Pairs per step.
        rates: Highest learning rates of a round, each of which makes a series of its own. They rise and decay linearly
            in each round.
    """

    lab: str = "short"
    rounds: int = 3
    prompts: int = 384
    samples: int = 4
    steps: int = 32
    batch: int = 16
    rates: tuple[float, ...] = (1.1e-4, 4e-5)

    def skip(self, seed: int, number: int) -> int:
        """Returns how many prompts come before those of a round. Held-out pairs are of the first thousand."""
        return 1000 + ((seed - 1) * self.rounds + number - 1) * self.prompts


TINY = Design("tiny", rounds=2, prompts=12, samples=4, steps=2, batch=2, rates=(1e-3,))


@dataclass(frozen=True)
class RoundPairs:
    """The pairs of a round.

    Attributes:
        rows: The pairs as `infopo pairs` writes them.
        pass_rate: Share of right samples.
        samples: Number of samples that were drawn.
    """

    rows: list[Record]
    pass_rate: float
    samples: int


def sampled_pairs(model: str, design: Design, seed: int, number: int, folder: Path) -> RoundPairs:
    """Draws samples of a model, marks and pairs them, by the workflow behind `infopo pairs`.

    Args:
        model: Folder of the policy, or `lab:policy`.
        design: Sizes.
        seed: Seed of the repetition, by which it has prompts of its own.
        number: Number of the round.
        folder: Where files are written.
    """
    settings = EvaluationSettings(
        tasks=["lab"], limit=design.prompts, num_samples=design.samples, temperature=1.0, batch_size=256,
        seed=100 * seed + number,
    )  # fmt: skip
    pairing = PairingSettings(seed=seed)
    skip = design.skip(seed, number)
    file = pairs(model, "lab", settings, pairing, prompts="lab", skip=skip, output=folder / "pairs.jsonl")
    counts = json.loads(file.with_suffix(".provenance.json").read_text(encoding="utf-8"))["counts"]
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return RoundPairs(rows, counts["pass_rate"], counts["samples"])


@lru_cache(maxsize=8)
def pairs_of_start(work: Path, design: Design, seed: int, number: int) -> RoundPairs:
    """Returns pairs of the start policy's samples, which all methods share."""
    name = f"start-{key_of(design, 0.0, seed, '')}-{number}"
    return sampled_pairs("lab:policy", design, seed, number, work / "rounds" / name)


def key_of(design: Design, rate: float, seed: int, method: str) -> str:
    """Returns the name under which a result is kept."""
    content = {
        "version": VERSION, "design": asdict(replace(design, rates=(rate,))), "seed": seed, "method": method,
        "arms": ARMS.get(method),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


def trained(
    shared: World, reference: PreTrainedModel, found: RoundPairs, run: Run
) -> tuple[PreTrainedModel, Record]:
    """Trains one round, from `shared.policy`. Returns the policy and what was measured."""
    examples = with_reference(encoded(found.rows, shared.tokenizer), reference)
    last: list[PreTrainedModel] = []

    def watch(step: int, policy: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
        last[:] = [policy]

    record = train_and_measure(run, replace(shared, pairs=examples), watch)
    about = {"pass_rate": found.pass_rate, "samples": found.samples, "pairs": len(examples)}
    return last[0].eval(), {**about, "points": record["points"], "sample_length": record["sample_length"]}


def all_arms(work: Path, design: Design, rate: float, seed: int, method: str) -> Record:
    """Trains every arm of a method. They share the first round."""
    shared = world(work, design.lab, "verified", 0, 1)
    first, objective, parameters = shared.policy, *METHODS[method]

    def run(number: int) -> Run:
        return Run(
            design.lab, "verified", 10 * seed + number, 10**6, objective, tuple(parameters.items()), rate,
            design.batch, design.steps, warmup=2, checkpoints=(design.steps // 2,),
        )  # fmt: skip

    after_first, one = trained(shared, first, pairs_of_start(work, design, seed, 1), run(1))
    found: Record = {}
    for arm in ARMS[method]:
        policy, records = after_first, [one]
        for number in range(2, design.rounds + 1):
            if arm == STALE:
                data = pairs_of_start(work, design, seed, number)
            else:
                data = own_pairs(policy, shared, design, seed, number, work)
            reference = policy if arm == FRESH else first
            policy, record = trained(replace(shared, policy=policy), reference, data, run(number))
            records.append(record)
        found[arm] = records
    return found


def own_pairs(
    policy: PreTrainedModel, shared: World, design: Design, seed: int, number: int, work: Path
) -> RoundPairs:
    """Returns pairs of a policy's own samples."""
    folder = work / "rounds" / "newest"
    shutil.rmtree(folder, ignore_errors=True)
    policy.save_pretrained(folder / "policy")
    shared.tokenizer.save_pretrained(folder / "policy")
    return sampled_pairs(str(folder / "policy"), design, seed, number, folder)


def finish(work: Path, design: Design, seeds: Sequence[int], minutes: float | None) -> list[Record]:
    """Computes what is missing, seed by seed, as long as there is time, and returns what is finished."""
    torch.set_num_threads(1)
    (work / "rounds").mkdir(parents=True, exist_ok=True)
    begin, done = time.monotonic(), []
    for rate, seed, method in itertools.product(design.rates, seeds, METHODS):
        file = work / "rounds" / f"{key_of(design, rate, seed, method)}.json"
        if not file.is_file() and (minutes is None or time.monotonic() - begin < 60 * minutes):
            at_start = time.process_time()
            arms = all_arms(work, design, rate, seed, method)
            seconds = time.process_time() - at_start
            record = {"rate": rate, "seed": seed, "method": method, "arms": arms, "seconds": seconds}
            write_text_atomic(file, json.dumps(record))
        if file.is_file():
            done.append(json.loads(file.read_text(encoding="utf-8")))
    return done


def measure(work: Path, design: Design, seeds: int, minutes: float | None) -> Record:
    """Computes what is missing, as long as there is time, and returns the results of all that is finished."""
    start_policy(work, design.lab)
    return {
        "environment": environment(
            seed=1,
            packages=("torch", "transformers", "numpy"),
            extra={"platform": platform.system(), "command_line": ["python", "studies/09_rounds/run.py"]},
        ),
        "design": asdict(design),
        "drifts": DRIFTS if design.lab != "tiny" else (0.0005, 0.001),
        "planned": {"seeds": seeds, "runs": seeds * len(design.rates) * len(METHODS)},
        "start": start(work, design.lab),
        "runs": finish(work, design, range(1, seeds + 1), minutes),
    }


Arm = tuple[float, str, str]
"""Learning rate, method, and what later rounds train on."""


def arms_of(results: Record) -> dict[Arm, dict[int, list[Record]]]:
    """Returns the rounds of each finished seed, by arm."""
    arms: dict[Arm, dict[int, list[Record]]] = {}
    for rate, (method, names) in itertools.product(results["design"]["rates"], ARMS.items()):
        for name in names:
            runs = [run for run in results["runs"] if (run["rate"], run["method"]) == (rate, method)]
            if len(runs) >= 2:
                arms[rate, method, name] = {run["seed"]: run["arms"][name] for run in runs}
    return arms


def after(rounds: Sequence[Record], number: int, name: str, start: Record) -> float:
    """Returns a value after a round. Round 0 is the start."""
    if number == 0:
        return float(start.get(name, 0.0))
    return float(rounds[number - 1]["points"][-1][name])


def path_of(rounds: Sequence[Record], start: Record) -> list[Record]:
    """Returns all points of an arm, from the start through the ends of its rounds."""
    return [{**start, "kl": 0.0}, *(point for each in rounds for point in each["points"])]


def difference(a: dict[int, float], b: dict[int, float]) -> dict[str, float] | None:
    """Returns the interval of a − b over the seeds that both have."""
    return interval(a[seed] - b[seed] for seed in sorted(a.keys() & b.keys()))


def tables(results: Record) -> dict[str, str]:
    """Returns the tables of the README by name."""
    return {
        "facts": facts_table(results),
        "rounds": rounds_table(results),
        "effects": effects_table(results),
        "drift": drift_table(results),
        "samples": samples_table(results),
    }


def facts_table(results: Record) -> str:
    design, begin = results["design"], results["start"]
    seeds = {
        (rate, method): sum((run["rate"], run["method"]) == (rate, method) for run in results["runs"])
        for rate, method in itertools.product(design["rates"], METHODS)
    }
    pairs_of_first = {run["seed"]: run["arms"][FRESH][0]["pairs"] for run in results["runs"]}
    rows = [
        ["start: sampled, greedy accuracy", f"{begin['sampled_accuracy']:.3f}, {begin['accuracy']:.3f}"],
        ["rounds, prompts per round, samples per prompt",
         f"{design['rounds']}, {design['prompts']}, {design['samples']}"],
        ["pairs of round 1", show(interval(pairs_of_first.values()), 0)],
        ["steps per round, pairs per step", f"{design['steps']}, {design['batch']}"],
        *(
            [f"runs of {method} at {rate:.1e}", f"{count} of {results['planned']['seeds']}"]
            for (rate, method), count in seeds.items()
        ),
        ["core-minutes", f"{sum(run['seconds'] for run in results['runs']) / 60:.0f}"],
    ]  # fmt: skip
    return table(["what", "value"], rows)


def rounds_table(results: Record) -> str:
    rows, begin = [], results["start"]
    for (rate, method, arm), found in arms_of(results).items():
        for number in range(1, results["design"]["rounds"] + 1):
            if number == 1 and arm != FRESH:
                continue  # arms share their first round

            def over(name: str, number: int = number, found: dict[int, list[Record]] = found) -> Any:
                return interval(after(rounds, number, name, begin) for rounds in found.values())

            this = [rounds[number - 1] for rounds in found.values()]
            rows.append(
                [
                    f"{rate:.1e}", method, arm if number > 1 else "samples of the start", str(number),
                    show(over("sampled_accuracy")), show(over("accuracy")), show(over("kl")),
                    show(over("chosen_change"), 2, signed=True), show(interval(r["pass_rate"] for r in this)),
                    show(interval(r["pairs"] for r in this), 0), str(len(found)),
                ]
            )  # fmt: skip
    header = ["learning rate", "method", "trained on", "round", "sampled accuracy", "greedy accuracy",
              "KL from the start", "chosen", "right samples", "pairs", "seeds"]  # fmt: skip
    return table(header, rows)


def effects_table(results: Record) -> str:
    """Effects on sampled accuracy, as means of differences within seeds."""
    begin, last = results["start"], results["design"]["rounds"]
    rows, arms = [], arms_of(results)

    def values(arm: Arm, number: int) -> dict[int, float]:
        return {s: after(rounds, number, "sampled_accuracy", begin) for s, rounds in arms[arm].items()}

    def add(rate: float, method: str, what: str, effect: dict[str, float] | None) -> None:
        number = str(effect["n"]) if effect else "0"
        rows.append([f"{rate:.1e}", method, what, show(effect, signed=True), is_clear(effect), number])

    for rate, method, arm in arms:
        for number in range(1, last + 1):
            if number > 1 or arm == FRESH:
                what = f"round {number}" + (f", {arm}" if number > 1 else "")
                here = rate, method, arm
                add(rate, method, what, difference(values(here, number), values(here, number - 1)))
    for (a, b), (rate, method) in itertools.product(
        ((FIRST, STALE), (FRESH, STALE), (FIRST, FRESH)),
        itertools.product(results["design"]["rates"], METHODS),
    ):
        if (rate, method, a) in arms and (rate, method, b) in arms:
            ends = values((rate, method, a), last), values((rate, method, b), last)
            add(rate, method, f"{a} minus {b}, at the end", difference(*ends))
    return table(["learning rate", "method", "effect of", "on sampled accuracy", "clear", "seeds"], rows)


def at_drift(results: Record, found: dict[int, list[Record]], drift: float) -> dict[int, float]:
    """Returns sampled accuracy at a drift by seed, of those that get there."""
    begin = results["start"]
    values = {s: first_at(path_of(rounds, begin), "sampled_accuracy", drift) for s, rounds in found.items()}
    return {seed: value for seed, value in values.items() if value == value}


def drift_table(results: Record) -> str:
    rows, arms = [], arms_of(results)
    for drift, ((rate, method, arm), found) in itertools.product(results["drifts"], arms.items()):
        base = rate, BASELINE, FRESH
        values = at_drift(results, found, drift)
        minus = None
        if base in arms and (rate, method, arm) != base:
            minus = difference(values, at_drift(results, arms[base], drift))
        rows.append(
            [f"{drift:g}", f"{rate:.1e}", method, arm, show(interval(values.values())), show(minus, signed=True),
             is_clear(minus), str(len(values))]
        )  # fmt: skip
    header = ["KL", "learning rate", "method", "later rounds train on", "sampled accuracy", "minus SFT on own samples",
              "clear", "seeds that get there"]  # fmt: skip
    return table(header, rows)


def samples_table(results: Record) -> str:
    """Gain in sampled accuracy per thousand samples, by round."""
    rows, begin = [], results["start"]
    numbers = range(1, results["design"]["rounds"] + 1)

    def gain(rounds: list[Record], number: int) -> float:
        ends = [after(rounds, n, "sampled_accuracy", begin) for n in (number, number - 1)]
        return 1000 * (ends[0] - ends[1]) / float(rounds[number - 1]["samples"])

    for (rate, method, arm), found in arms_of(results).items():
        gains = [show(interval(gain(r, n) for r in found.values()), 4, signed=True) for n in numbers]
        rows.append([f"{rate:.1e}", method, arm, *gains])
    return table(["learning rate", "method", "later rounds train on", *(f"round {n}" for n in numbers)], rows)


def plot(results: Record, path: Path) -> None:
    """Draws sampled accuracy by samples drawn, and by drift."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    rates = sorted({rate for rate, _, _ in arms_of(results)}, reverse=True)
    figure, axes = plt.subplots(
        len(rates), 2, figsize=(11, 4.2 * len(rates)), sharey=True, squeeze=False, layout="constrained"
    )
    styles = {FRESH: "-", FIRST: "--", STALE: ":"}
    start = results["start"]
    for (rate, method, arm), found in arms_of(results).items():
        left, right = axes[rates.index(rate)]
        left.set_title(f"learning rate {rate:.1e}", fontsize=10)
        color = f"C{list(METHODS).index(method)}"
        rounds = range(results["design"]["rounds"] + 1)
        means = [np.mean([after(r, n, "sampled_accuracy", start) for r in found.values()]) for n in rounds]
        drawn = np.mean([np.cumsum([0, *(each["samples"] for each in r)]) for r in found.values()], axis=0)
        left.plot(drawn, means, styles[arm], color=color, marker="o", ms=3, label=f"{method}: {arm}")
        paths = [path_of(r, start) for r in found.values()]
        right.plot(
            np.mean([[point["kl"] for point in each] for each in paths], axis=0),
            np.mean([[point["sampled_accuracy"] for point in each] for each in paths], axis=0),
            styles[arm], color=color, marker="o", ms=3,
        )  # fmt: skip
    for left, right in axes:
        left.set_xlabel("samples drawn (of the start for the dotted lines)")
        left.set_ylabel("sampled accuracy, mean of seeds")
        right.set_xlabel("forward KL from the start (nats per response)")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    options = options_of(__doc__ or "", Path(__file__).parent, arguments)
    design, seeds = (TINY, 2) if options.tiny else (Design(), options.seeds)
    results = measure(options.work, design, seeds, options.minutes)
    publish(options.out, results, tables(results), plot)


if __name__ == "__main__":
    main()
