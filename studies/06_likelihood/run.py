"""Follows the likelihood of chosen and rejected responses through training (see README.md beside this file).

    python studies/06_likelihood/run.py --minutes 60    # computes what is missing, then rewrites the results
    python studies/06_likelihood/run.py --minutes 0     # takes only what is there
    python studies/06_likelihood/run.py --out elsewhere --work elsewhere/work --tiny

Finished runs are kept in `--work`, and a later call goes on with the others. Study 07 shares them.
"""

import itertools
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from drift import along_runs, interval, is_clear, show
from lab_runs import finish, options_of
from lab_world import start
from readme import publish, table
from watched_runs import LEAST_SEEDS, METHODS, cells_of, grid, method_of, train_and_watch

from infopo.provenance import environment

Record = dict[str, Any]

FELL = 1e-4
"""Change of a log-prob (nats) below which a response counts as fallen: less than that is rounding."""
DRIFT = 0.1
"""Forward KL (nats per response) at which methods are compared."""
BASELINE = "SFT on chosen"


def measure(work: Path, lab: str, seeds: int, minutes: float | None) -> Record:
    """Computes what is missing, as long as there is time, and returns the results of all that is finished."""
    planned = grid(lab, seeds, tiny=lab == "tiny")
    runs = [compact(run) for run in finish(work, planned, minutes, train_and_watch)]
    return {
        "environment": environment(
            seed=1,
            packages=("torch", "transformers", "numpy"),
            extra={"platform": platform.system(), "command_line": ["python", "studies/06_likelihood/run.py"]},
        ),
        "planned": {"cells": cells_of(planned), "seeds": seeds, "runs": len(planned)},
        "steps": planned[0].steps,
        "drift": DRIFT if lab != "tiny" else 0.001,
        "start": start(work, lab),
        "runs": runs,
    }


def compact(run: Record) -> Record:
    """Returns what the results keep of a run: its points, and per look the changes of both sides and who fell."""
    looks = run["looks"]
    first = {part: pairs(looks[0][part]) for part in ("held", "trained")}
    curve = []
    for look in looks:
        change = {part: pairs(look[part]) - first[part] for part in first}
        curve.append(
            {
                "step": look["step"],
                "chosen": round(float(change["held"][:, 0].mean()), 4),
                "rejected": round(float(change["held"][:, 1].mean()), 4),
                "fell": float((change["held"][:, 0] < -FELL).mean()),
                "fell_trained": float((change["trained"][:, 0] < -FELL).mean()),
            }
        )
    return {
        "labels": run["labels"],
        "rate": run["rate"],
        "method": method_of(run),
        "seed": run["seed"],
        "points": run["points"],
        "curve": curve,
    }


def pairs(values: Sequence[float]) -> Any:
    """Returns log-probs as one row per pair: chosen, rejected."""
    return np.array(values).reshape(-1, 2)


def cells(results: Record) -> Iterator[tuple[str, float, str, list[Record]]]:
    """Yields labels, learning rate, method and its runs, of which enough seeds are finished."""
    for labels, rate, method in results["planned"]["cells"]:
        runs = of(results, labels=labels, rate=rate, method=method)
        if len(runs) >= min(LEAST_SEEDS, results["planned"]["seeds"]):
            yield labels, rate, method, runs


def of(results: Record, **fields: Any) -> list[Record]:
    """Returns the runs whose fields have these values."""
    return [run for run in results["runs"] if all(run[key] == value for key, value in fields.items())]


def at(run: Record, step: int, name: str) -> float:
    """Returns a value of the curve at a step."""
    return float(next(look[name] for look in run["curve"] if look["step"] == step))


def lowest(run: Record) -> Record:
    """Returns the look at which the chosen responses are least likely."""
    found: Record = min(run["curve"], key=lambda look: look["chosen"])
    return found


def facts_table(results: Record) -> str:
    rows = []
    for labels, group in itertools.groupby(results["planned"]["cells"], key=lambda cell: cell[0]):
        found = list(group)
        rates = sorted({rate for _, rate, _ in found})
        done = [len(of(results, labels=labels, rate=rate, method=method)) for _, rate, method in found]
        rows.append(
            [
                labels,
                ", ".join(f"{rate:.1e}" for rate in rates),
                str(len({method for *_, method in found})),
                f"{min(done)} to {max(done)}",
                f"{sum(done)} of {len(found) * results['planned']['seeds']}",
            ]
        )
    return table(["labels", "learning rates", "methods", "seeds", "runs finished"], rows)


def likelihood_table(results: Record) -> str:
    rows, last = [], results["steps"]
    for labels, rate, method, runs in cells(results):
        steps = [last // 8, last // 2, last]
        chosen = [interval(at(run, step, "chosen") for run in runs) for step in steps]
        rows.append(
            [
                labels,
                f"{rate:.1e}",
                method,
                *(show(value, 2, True) for value in chosen),
                is_clear(chosen[-1]),
                show(interval(at(run, last, "rejected") for run in runs), 2, True),
                show(interval(100 * at(run, last, "fell") for run in runs), 0) + " %",
                show(interval(100 * at(run, last, "fell_trained") for run in runs), 0) + " %",
                f"{np.median([lowest(run)['step'] for run in runs]):.0f}",
                str(len(runs)),
            ]
        )
    header = ["labels", "learning rate", "method"]
    header += [f"chosen at step {step}" for step in (last // 8, last // 2, last)]
    header += ["clear", f"rejected at step {last}", "chosen that fell", "of trained pairs"]
    return table([*header, "step of the lowest chosen", "seeds"], rows)


def drift_table(results: Record) -> str:
    """Returns changes and accuracy at equal drift, within the run of the lowest rate that gets there."""
    rows, begin, drift = (
        [],
        {**results["start"], "chosen_change": 0.0, "rejected_change": 0.0},
        results["drift"],
    )
    found: dict[tuple[str, str], list[list[float]]] = {}
    for labels, method in dict.fromkeys(
        (labels, method) for labels, _, method in results["planned"]["cells"]
    ):
        seeds = [
            of(results, labels=labels, method=method, seed=s + 1) for s in range(results["planned"]["seeds"])
        ]
        names = ("chosen_change", "rejected_change", "sampled_accuracy")
        found[labels, method] = [
            [along_runs(runs, begin, name, drift) if runs else float("nan") for runs in seeds]
            for name in names
        ]
    for (labels, method), values in found.items():
        means = [interval(value) for value in values]
        if means[0] is None:
            continue
        base = found.get((labels, BASELINE), values)[2]
        minus = interval(x - y for x, y in zip(values[2], base, strict=True))
        rows.append(
            [
                labels,
                method,
                show(means[0], 2, True),
                is_clear(means[0]),
                show(means[1], 2, True),
                show(means[2]),
                show(minus, 3, True) if method != BASELINE else "",
                is_clear(minus) if method != BASELINE else "",
                str(means[0]["n"]),
            ]
        )
    header = ["labels", "method", f"chosen at KL {drift:g}", "clear", f"rejected at KL {drift:g}"]
    return table([*header, "sampled accuracy", "minus SFT", "clear", "seeds"], rows)


def ends_table(results: Record) -> str:
    rows = []
    for labels, rate, method, runs in cells(results):
        ends = [run["points"][-1] for run in runs]
        rows.append(
            [
                labels,
                f"{rate:.1e}",
                method,
                show(interval(p["sampled_accuracy"] for p in ends)),
                show(interval(p["accuracy"] for p in ends)),
                show(interval(p["kl"] for p in ends), 2),
            ]
        )
    return table(["labels", "learning rate", "method", "sampled accuracy", "greedy accuracy", "KL"], rows)


def tables(results: Record) -> dict[str, str]:
    """Returns the README's tables, from the results alone."""
    return {
        "facts": facts_table(results),
        "likelihood": likelihood_table(results),
        "drift": drift_table(results),
        "ends": ends_table(results),
    }


def plot(results: Record, path: Path) -> None:
    """Draws the change of chosen (solid) and rejected (dashed) log-probs by step, one picture per labels and rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pictures = list(dict.fromkeys((labels, rate) for labels, rate, *_ in cells(results)))
    figure, axes = plt.subplots(
        1,
        max(1, len(pictures)),
        figsize=(4.6 * max(1, len(pictures)), 4.4),
        squeeze=False,
        layout="constrained",
    )
    for axis, picture in zip(axes[0], pictures, strict=False):
        for labels, rate, method, runs in cells(results):
            if (labels, rate) != picture:
                continue
            color = f"C{list(METHODS).index(method)}"
            steps = [look["step"] for look in runs[0]["curve"]]
            for side, style in (("chosen", "-"), ("rejected", "--")):
                mean = np.mean([[look[side] for look in run["curve"]] for run in runs], axis=0)
                axis.plot(steps, mean, style, color=color, label=method if side == "chosen" else None)
        axis.axhline(0, color="0.6", lw=1)
        low, high = axis.get_ylim()
        if high - low > 20:
            axis.set_yscale("symlog", linthresh=1.0)
        axis.set_title(f"{picture[0]} labels, learning rate {picture[1]:.1e}", fontsize=10)
        axis.set_xlabel("step")
    axes[0, 0].set_ylabel("change of log-prob (nats per response)\nchosen solid, rejected dashed")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    options = options_of(__doc__ or "", Path(__file__).parent, arguments)
    lab, seeds = ("tiny", 2) if options.tiny else ("short", options.seeds)
    results = measure(options.work, lab, seeds, options.minutes)
    publish(options.out, results, tables(results), plot)


if __name__ == "__main__":
    main()
