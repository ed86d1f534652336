"""Compares InfoPO with sums over tokens and with means over tokens (see README.md beside this file).

    python studies/04_sum_or_mean/run.py --minutes 60    # computes what is missing, then rewrites the results
    python studies/04_sum_or_mean/run.py --minutes 0     # takes only what is there
    python studies/04_sum_or_mean/run.py --out elsewhere --work elsewhere/work --tiny

Finished runs are kept in `--work`, and a later call goes on with the others.
"""

import itertools
import math
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from drift import along_runs, at_drift, interval, is_clear, quarters, show
from lab_runs import TRACE, Run, finish, options_of
from lab_world import WORDY, pair_lengths, start
from readme import publish, table

from infopo.provenance import environment

Record = dict[str, Any]

MEAN = ("length_normalized", True)
LENGTH = {"short": 30, "long": 120, "tiny": 20}
"""Number of tokens of a response, rounded, by lab. A mean with β = LENGTH times that of a sum pulls like the sum."""
LABELS = ("verified", "graded")
RATES = (2e-5, 1.1e-4, 6.3e-4)
"""Learning rates over a decade and a half."""
CORE = frozenset(
    {
        "InfoPO sum, β 1",
        "InfoPO sum, β 0.1",
        "InfoPO mean, β 1",
        "InfoPO mean, β L",
        "DPO sum, β 0.1",
        "SFT on chosen",
    }
)
"""Methods that are computed first."""
SETTINGS = (
    ("short", "verified"),
    ("long", "verified"),
    ("short", "graded"),
    ("long", "graded"),
    ("short", WORDY),
)
"""Labs and labels, in the order in which they are computed. Of the last one `CORE` runs, at the middle rate."""


def methods(lab: str) -> dict[str, tuple[str, tuple[tuple[str, Any], ...]]]:
    """Returns objective and parameters of each method by name."""
    length = LENGTH[lab]
    sums = {f"InfoPO sum, β {beta:g}": ("infopo", (("beta", beta),)) for beta in (0.1, 0.5, 1.0)}
    means = {
        f"InfoPO mean, β {name}": ("infopo", (("beta", beta), MEAN))
        for name, beta in (("1", 1.0), ("0.1 L", 0.1 * length), ("0.5 L", 0.5 * length), ("L", 1.0 * length))
    }
    others = {
        "DPO sum, β 0.1": ("dpo", (("beta", 0.1),)),
        "DPO mean, β 0.1 L": ("dpo", (("beta", 0.1 * length), MEAN)),
        "SFT on chosen": ("sft", ()),
    }
    return {**sums, **means, **others}


SHAPE: dict[str, Any] = {
    "short": {"pairs": 512, "batch": 16, "steps": 32, "warmup": 6, "checkpoints": (12,)},
    "long": {"pairs": 192, "batch": 8, "steps": 24, "warmup": 5, "checkpoints": (9,)},
    "tiny": {"pairs": 8, "batch": 4, "steps": 4, "checkpoints": (2,)},
}
"""One pass over the pairs of each lab."""


DRIFTS = {"short": (0.1, 0.3), "long": (0.1, 0.3), "tiny": (0.01,)}
"""Forward KL (nats per response) at which methods are compared."""
MEASURES = ("sampled_accuracy", "accuracy")
COMPARED = (
    ("InfoPO mean, β 1", "InfoPO sum, β 1"),
    ("InfoPO mean, β L", "InfoPO sum, β 1"),
    ("InfoPO mean, β 0.5 L", "InfoPO sum, β 0.5"),
    ("InfoPO mean, β 0.1 L", "InfoPO sum, β 0.1"),
    ("InfoPO sum, β 0.1", "InfoPO sum, β 1"),
    ("InfoPO sum, β 1", "SFT on chosen"),
    ("InfoPO mean, β 1", "SFT on chosen"),
    ("InfoPO sum, β 1", "DPO sum, β 0.1"),
    ("DPO mean, β 0.1 L", "DPO sum, β 0.1"),
)
"""Differences that are reported: the first minus the second, seed by seed."""


def grid(settings: Sequence[tuple[str, str]], rates: Sequence[float], seeds: int) -> list[Run]:
    """Returns all runs, in an order in which a part is balanced: whole seeds, and what tells most first."""
    found = []
    for place, (lab, labels) in enumerate(settings):
        for seed, (method, (objective, parameters)), rate in itertools.product(
            range(1, seeds + 1), methods(lab).items(), rates
        ):
            if labels == WORDY and (method not in CORE or rate != RATES[1]):
                continue
            run = Run(lab, labels, seed, objective=objective, parameters=parameters, rate=rate, **SHAPE[lab])
            # The lowest rate, at which all methods are alike, comes last.
            last = len(rates) > 1 and rate == min(rates)
            found.append((last, place + (0 if method in CORE else 1.5), seed, run))
    return [run for *_, run in sorted(found, key=lambda each: each[:3])]


def compact(run: Record) -> Record:
    """Returns what the results keep of a run: its points, and its trace as means over quarters of the steps."""
    names = {_name(*each): name for name, each in methods(run["lab"]).items()}
    parameters = tuple((name, value) for name, value in run["parameters"])
    trace = dict(zip(TRACE, run["trace"], strict=True))
    return {
        "lab": run["lab"],
        "labels": run["labels"],
        "seed": run["seed"],
        "method": names[_name(run["objective"], parameters)],
        "rate": run["rate"],
        "points": run["points"],
        "sample_length": run["sample_length"],
        "rejected_share": quarters(trace["rejected share"]),
        "log_ratio_rejected": quarters(trace["log ratio of rejected"]),
        "capped": float(np.mean(trace["capped"])),
        "seconds": run["seconds"],
    }


def _name(objective: str, parameters: Sequence[tuple[str, Any]]) -> tuple[Any, ...]:
    return objective, *(tuple(each) for each in parameters)


def measure(
    work: Path,
    settings: Sequence[tuple[str, str]],
    rates: Sequence[float],
    seeds: int,
    minutes: float | None,
) -> Record:
    """Computes what is missing, as long as there is time, and returns the results of all that is finished."""
    planned = grid(settings, rates, seeds)
    runs = [compact(run) for run in finish(work, planned, minutes)]
    present = [s for s in settings if any((run["lab"], run["labels"]) == s for run in runs)]
    return {
        "environment": environment(
            seed=1,
            packages=("torch", "transformers", "numpy"),
            extra={
                "platform": platform.system(),
                "command_line": ["python", "studies/04_sum_or_mean/run.py"],
            },
        ),
        "planned": {
            "settings": list(settings),
            "every": [sum((run.lab, run.labels) == setting for run in planned) for setting in settings],
            "rates": list(rates),
            "seeds": seeds,
            "runs": len(planned),
        },
        "shape": {lab: SHAPE[lab] for lab in dict(settings)},
        "start": {lab: start(work, lab) for lab in dict(present)},
        "lengths": [
            {"lab": lab, "labels": labels, **pair_lengths(work, lab, labels, 1, SHAPE[lab]["pairs"])}
            for lab, labels in present
        ],
        "runs": runs,
    }


def of(runs: Sequence[Record], setting: Sequence[str], **fields: Any) -> list[Record]:
    """Returns the runs of a lab and labels whose fields have these values."""
    lab, labels = setting
    wanted = {"lab": lab, "labels": labels, **fields}
    return [run for run in runs if all(run[key] == value for key, value in wanted.items())]


def by_seed(
    results: Record, setting: Sequence[str], method: str, name: str, drift: float, how: Any
) -> list[float]:
    """Returns a measure at a drift for each seed, NaN where the runs that are finished do not reach it."""
    values = []
    for seed in range(1, results["planned"]["seeds"] + 1):
        runs = of(results["runs"], setting, seed=seed, method=method)
        values.append(how(runs, results["start"][setting[0]], name, drift) if runs else math.nan)
    return values


def finished(results: Record) -> list[list[str]]:
    """Returns the settings of which something is finished."""
    return [list(s) for s in results["planned"]["settings"] if of(results["runs"], s)]


def facts_table(results: Record) -> str:
    planned, rows = results["planned"], []
    for setting, every in zip(planned["settings"], planned["every"], strict=True):
        lab, labels = setting
        done = len(of(results["runs"], setting))
        length = next((f for f in results["lengths"] if (f["lab"], f["labels"]) == (lab, labels)), None)
        first = results["start"].get(lab)
        shape = results["shape"][lab]
        rows.append(
            [
                lab,
                labels,
                f"{shape['pairs']}, {shape['batch']} per step",
                f"{length['chosen_tokens']:.0f}, {length['rejected_tokens']:.0f}" if length else "–",
                f"{first['accuracy']:.3f}, {first['verified_accuracy']:.3f}" if first else "–",
                f"{first['sampled_accuracy']:.3f}" if first else "–",
                f"{done} of {every}",
            ]
        )
    header = [
        "lab",
        "labels",
        "pairs",
        "tokens of chosen, of rejected responses",
        "greedy accuracy at the start: whole solution, `verify`",
        "sampled",
        "runs finished",
    ]
    return table(header, rows)


def drift_table(results: Record) -> str:
    rows = []
    for setting in finished(results):
        lab, labels = setting
        for method in methods(lab):
            values = [
                interval(by_seed(results, setting, method, name, drift, at_drift))
                for drift in DRIFTS[lab]
                for name in ("sampled_accuracy", "accuracy")
            ]
            if any(values):
                seeds = max(int(value["n"]) for value in values if value)
                rows.append([lab, labels, method, *map(show, values), str(seeds)])
    drifts = DRIFTS[results["planned"]["settings"][0][0]]
    columns = [
        f"{kind} at KL {drift:g}" for drift in drifts for kind in ("sampled accuracy", "greedy accuracy")
    ]
    return table(["lab", "labels", "method", *columns, "seeds"], rows)


def differences_table(results: Record) -> str:
    rows = []
    for setting in finished(results):
        lab, labels = setting
        for pair in COMPARED:
            cells = []
            for drift, how in itertools.product(DRIFTS[lab], (at_drift, along_runs)):
                values = [by_seed(results, setting, m, "sampled_accuracy", drift, how) for m in pair]
                difference = interval(x - y for x, y in zip(*values, strict=True))
                cells += [show(difference, 3, True), is_clear(difference)]
            if set(cells) != {"–"}:
                rows.append([lab, labels, *pair, *cells])
    columns = []
    for drift in DRIFTS[results["planned"]["settings"][0][0]]:
        columns += [f"at KL {drift:g}", "clear", f"at KL {drift:g}, by checkpoints", "clear"]
    return table(["lab", "labels", "method", "minus", *columns], rows)


def ends_table(results: Record) -> str:
    """Returns what each method does at the two higher learning rates, at the end of its run."""
    rows = []
    for setting in finished(results):
        lab, labels = setting
        for method in methods(lab):
            # At the lowest rate all methods are alike, so that the README leaves it out.
            for rate in results["planned"]["rates"][-2:]:
                runs = of(results["runs"], setting, method=method, rate=rate)
                if not runs:
                    continue
                last = [run["points"][-1] for run in runs]
                share = np.mean([run["rejected_share"] for run in runs], axis=0)
                ratio = np.mean([run["log_ratio_rejected"][-1] for run in runs])
                rows.append(
                    [
                        lab,
                        labels,
                        method,
                        f"{rate:.1e}",
                        str(len(runs)),
                        show(interval(p["sampled_accuracy"] for p in last)),
                        show(interval(p["kl"] for p in last), 2),
                        f"{np.mean([p['chosen_change'] for p in last]):+.2f}",
                        f"{np.mean([p['rejected_change'] for p in last]):+.2f}",
                        f"{np.mean([run['sample_length'] for run in runs]):.1f}",
                        " ".join(f"{value:.2f}" for value in share),
                        f"{ratio:+.1f}",
                        f"{100 * np.mean([run['capped'] for run in runs]):.1f} %",
                    ]
                )
    header = [
        "lab",
        "labels",
        "method",
        "learning rate",
        "seeds",
        "sampled accuracy",
        "KL",
        "chosen",
        "rejected",
    ]
    header += ["sample length", "rejected share, by quarter", "log r(l), last quarter", "capped"]
    return table(header, rows)


def tables(results: Record) -> dict[str, str]:
    """Returns the README's tables, from the results alone."""
    return {
        "facts": facts_table(results),
        "differences": differences_table(results),
        "drift": drift_table(results),
        "ends": ends_table(results),
    }


def plot(results: Record, path: Path) -> None:
    """Draws sampled accuracy against drift, as means over seeds at each learning rate, by lab and labels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = finished(results) or [list(s) for s in results["planned"]["settings"][:1]]
    columns = min(len(settings), 3)
    rows = math.ceil(len(settings) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(6 * columns, 4.6 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(settings) :]:
        axis.set_axis_off()
    for axis, setting in zip(axes.flat, settings):
        lab, labels = setting
        for number, method in enumerate(methods(lab)):
            means = []
            for rate in results["planned"]["rates"]:
                last = [run["points"][-1] for run in of(results["runs"], setting, method=method, rate=rate)]
                if last:
                    means.append([np.mean([p[key] for p in last]) for key in ("kl", "sampled_accuracy")])
            style = ":" if "mean" in method else "-"
            if means:
                kl, accuracy = np.array(means).T
                axis.plot(kl, accuracy, color=f"C{number}", ls=style, marker="o", ms=4, label=method)
        if lab in results["start"]:
            axis.axhline(results["start"][lab]["sampled_accuracy"], color="0.6", lw=1, ls="--")
        axis.set_xscale("log")
        axis.set_title(f"{lab} responses, {labels} labels")
        axis.set_xlabel("forward KL from the start (nats per response)")
    axes[0, 0].set_ylabel("accuracy of samples")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    options = options_of(__doc__ or "", Path(__file__).parent, arguments)
    settings, rates, seeds = (
        ((("tiny", "graded"),), (1e-4,), 2) if options.tiny else (SETTINGS, RATES, options.seeds)
    )
    results = measure(options.work, settings, rates, seeds, options.minutes)
    publish(options.out, results, tables(results), plot)


if __name__ == "__main__":
    main()
