"""Compares estimators of the family on 50 to 5,000 pairs (see README.md beside this file).

    python studies/05_small_data/run.py --minutes 60    # computes what is missing, then rewrites the results
    python studies/05_small_data/run.py --minutes 0     # takes only what is there
    python studies/05_small_data/run.py --out elsewhere --work elsewhere/work --tiny

Finished runs are kept in `--work`, and a later call goes on with the others. Study 04 shares them.
"""

import itertools
import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from drift import along_runs, interval, is_clear, show
from lab_runs import TRACE, Run, finish, options_of
from lab_world import start
from readme import publish, table

from infopo.provenance import environment

Record = dict[str, Any]

METHODS: dict[str, tuple[str, tuple[tuple[str, Any], ...]]] = {
    "InfoPO sum": ("infopo", (("beta", 1.0),)),
    "InfoPO mean": ("infopo", (("beta", 1.0), ("length_normalized", True))),
    "InfoNCE = DPO": ("dpo", (("beta", 1.0),)),
    "JS": ("js", (("beta", 1.0),)),
    "DV": ("dv", (("beta", 1.0),)),
    "MINE": ("mine", (("beta", 1.0),)),
    "SimPER": ("simper", ()),
    "DDRO": ("ddro", ()),
    "SFT on chosen": ("sft", ()),
}
"""Objective and parameters by name. With one rejected response InfoNCE is DPO."""
BASELINE = "SFT on chosen"
LABELS = ("verified", "graded")
RATE = 1.1e-4
DRIFT = 0.1
"""Forward KL (nats per response) at which methods are compared."""
SHAPE: dict[str, dict[int, dict[str, Any]]] = {
    "short": {
        50: {"batch": 16, "steps": 32, "warmup": 6, "checkpoints": (12,)},
        512: {"batch": 16, "steps": 32, "warmup": 6, "checkpoints": (12,)},
        5000: {"batch": 16, "steps": 312, "warmup": 31, "checkpoints": (40, 120)},
    },
    "tiny": {8: {"batch": 4, "steps": 2, "checkpoints": (1,)}},
}
"""Training by number of pairs: ten passes over 50 pairs, and one pass over the larger sets."""


def grid(lab: str, labels: Sequence[str], seeds: int) -> list[Run]:
    """Returns all runs: one seed of all methods after the other, and those on 5,000 pairs, which take longest, last."""
    cells = [
        (pairs > 1000, labels.index(kind), seed, pairs, kind)
        for pairs, kind, seed in itertools.product(SHAPE[lab], labels, range(1, seeds + 1))
    ]
    return [
        Run(lab, kind, seed, pairs, objective, parameters, RATE, **SHAPE[lab][pairs])
        for *_, seed, pairs, kind in sorted(cells)
        for objective, parameters in METHODS.values()
    ]


def compact(run: Record) -> Record:
    """Returns what the results keep of a run: its points, and how restless its loss and its gradient are."""
    given = (run["objective"], tuple((name, value) for name, value in run["parameters"]))
    trace = {name: np.array(values) for name, values in zip(TRACE, run["trace"], strict=True)}
    half = len(trace["loss"]) // 2
    norm, loss = trace["gradient norm"][half:], trace["loss"]
    return {
        "labels": run["labels"],
        "seed": run["seed"],
        "pairs": run["pairs"],
        "method": next(name for name, each in METHODS.items() if each == given),
        "points": run["points"],
        # The difference of neighbouring steps has no trend, and √2 times the noise of one.
        "loss_noise": float(np.diff(loss[half:]).std() / 2**0.5) if len(norm) > 1 else 0.0,
        "gradient_variation": float(norm.std() / norm.mean()),
        "rejected_share": float(trace["rejected share"][half:].mean()),
        "capped": float(trace["capped"].mean()),
        "seconds": run["seconds"],
    }


def measure(work: Path, lab: str, labels: Sequence[str], seeds: int, minutes: float | None) -> Record:
    """Computes what is missing, as long as there is time, and returns the results of all that is finished."""
    planned = grid(lab, labels, seeds)
    runs = [compact(run) for run in finish(work, planned, minutes)]
    return {
        "environment": environment(
            seed=1,
            packages=("torch", "transformers", "numpy"),
            extra={"platform": platform.system(), "command_line": ["python", "studies/05_small_data/run.py"]},
        ),
        "planned": {"labels": list(labels), "sizes": list(SHAPE[lab]), "seeds": seeds, "runs": len(planned)},
        "shape": {str(pairs): shape for pairs, shape in SHAPE[lab].items()},
        "rate": RATE,
        "drift": DRIFT,
        "start": start(work, lab),
        "runs": runs,
    }


def of(results: Record, **fields: Any) -> list[Record]:
    """Returns the runs whose fields have these values."""
    return [run for run in results["runs"] if all(run[key] == value for key, value in fields.items())]


def cells(results: Record) -> Iterable[tuple[str, int, str, list[Record]]]:
    """Yields labels, number of pairs, method and its runs, for all of which at least two seeds are finished."""
    planned = results["planned"]
    for labels, pairs, method in itertools.product(planned["labels"], planned["sizes"], METHODS):
        runs = of(results, labels=labels, pairs=pairs, method=method)
        if len(runs) >= 2:
            yield labels, pairs, method, runs


def minus_baseline(results: Record, runs: Sequence[Record], at: float | None) -> dict[str, float] | None:
    """Returns sampled accuracy minus that of SFT on the same pairs, at the end or at a drift, over seeds."""
    values = []
    for run in runs:
        same = {key: run[key] for key in ("labels", "pairs", "seed")}
        for base in of(results, **same, method=BASELINE):
            values.append(accuracy_of(results, run, at) - accuracy_of(results, base, at))
    return interval(values)


def accuracy_of(results: Record, run: Record, at: float | None) -> float:
    """Returns sampled accuracy at the end of a run, or where its KL first reaches `at` (NaN if it does not)."""
    if at is None:
        return float(run["points"][-1]["sampled_accuracy"])
    return along_runs([{**run, "rate": RATE}], results["start"], "sampled_accuracy", at)


def facts_table(results: Record) -> str:
    planned, first = results["planned"], results["start"]
    rows = []
    for labels, pairs in itertools.product(planned["labels"], planned["sizes"]):
        done = len(of(results, labels=labels, pairs=pairs))
        shape = results["shape"][str(pairs)]
        passes = shape["steps"] * shape["batch"] / pairs
        every = planned["seeds"] * len(METHODS)
        rate, begin = f"{results['rate']:.1e}", f"{first['sampled_accuracy']:.3f}"
        rows.append(
            [labels, str(pairs), str(shape["steps"]), f"{passes:.1f}", rate, begin, f"{done} of {every}"]
        )
    header = [
        "labels",
        "pairs",
        "steps",
        "passes",
        "learning rate",
        "sampled accuracy at the start",
        "runs finished",
    ]
    return table(header, rows)


def accuracy_table(results: Record) -> str:
    rows = []
    for labels, pairs, method, runs in cells(results):
        ends = [run["points"][-1] for run in runs]
        difference = minus_baseline(results, runs, None)
        rows.append(
            [
                labels,
                str(pairs),
                method,
                show(interval(p["sampled_accuracy"] for p in ends)),
                show(interval(p["accuracy"] for p in ends)),
                show(interval(p["kl"] for p in ends), 2),
                show(difference, 3, True) if method != BASELINE else "",
                is_clear(difference) if method != BASELINE else "",
                show(minus_baseline(results, runs, DRIFT), 3, True) if method != BASELINE else "",
                str(len(runs)),
            ]
        )
    header = ["labels", "pairs", "method", "sampled accuracy", "greedy accuracy", "KL", "minus SFT", "clear"]
    return table([*header, f"minus SFT at KL {results['drift']:g}", "seeds"], rows)


def spread_table(results: Record) -> str:
    rows = []
    for labels, pairs, method, runs in cells(results):
        ends = [run["points"][-1] for run in runs]
        rows.append(
            [
                labels,
                str(pairs),
                method,
                f"{np.std([p['sampled_accuracy'] for p in ends], ddof=1):.4f}",
                f"{np.std([p['kl'] for p in ends], ddof=1):.3f}",
                f"{np.mean([run['loss_noise'] for run in runs]):.3f}",
                f"{np.mean([run['gradient_variation'] for run in runs]):.2f}",
                f"{np.mean([run['rejected_share'] for run in runs]):.2f}",
                f"{np.mean([p['chosen_change'] for p in ends]):+.2f}",
                f"{np.mean([p['rejected_change'] for p in ends]):+.2f}",
            ]
        )
    header = ["labels", "pairs", "method", "SD of sampled accuracy over seeds", "SD of KL over seeds"]
    header += ["noise of the loss", "variation of the gradient norm", "rejected share", "chosen", "rejected"]
    return table(header, rows)


def tables(results: Record) -> dict[str, str]:
    """Returns the README's tables, from the results alone."""
    return {
        "facts": facts_table(results),
        "accuracy": accuracy_table(results),
        "spread": spread_table(results),
    }


def plot(results: Record, path: Path) -> None:
    """Draws sampled accuracy at the end of runs against the number of pairs, as means over seeds, by labels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = results["planned"]["labels"]
    figure, axes = plt.subplots(
        1, len(labels), figsize=(6 * len(labels), 4.4), squeeze=False, layout="constrained"
    )
    for axis, kind in zip(axes[0], labels, strict=True):
        for number, method in enumerate(METHODS):
            found = [
                (pairs, runs) for each, pairs, name, runs in cells(results) if (each, name) == (kind, method)
            ]
            if found:
                ends = [[run["points"][-1]["sampled_accuracy"] for run in runs] for _, runs in found]
                axis.errorbar(
                    [pairs for pairs, _ in found],
                    [np.mean(values) for values in ends],
                    yerr=[np.std(values, ddof=1) for values in ends],
                    color=f"C{number}",
                    marker="o",
                    ms=4,
                    capsize=2,
                    label=method,
                )
        axis.axhline(results["start"]["sampled_accuracy"], color="0.6", lw=1, ls="--")
        axis.set_xscale("log")
        axis.set_title(f"{kind} labels")
        axis.set_xlabel("pairs")
    axes[0, 0].set_ylabel("accuracy of samples, mean and SD over seeds")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    options = options_of(__doc__ or "", Path(__file__).parent, arguments)
    lab, labels, seeds = ("tiny", LABELS[1:], 2) if options.tiny else ("short", LABELS, options.seeds)
    results = measure(options.work, lab, labels, seeds, options.minutes)
    publish(options.out, results, tables(results), plot)


if __name__ == "__main__":
    main()
