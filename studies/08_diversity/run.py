"""Asks whether preference training costs diversity, on problems with many right answers (README.md beside this file).

    python studies/08_diversity/run.py --minutes 60    # computes what is missing, then rewrites the results
    python studies/08_diversity/run.py --minutes 0     # takes only what is there
    python studies/08_diversity/run.py --out elsewhere --work elsewhere/work --tiny

Finished runs are kept in `--work`, and a later call goes on with the others.
"""

import itertools
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from drift import at_drift, first_at, interval, is_clear, show
from expression_runs import FULL, METHODS, TINY, Shape, finish, grid
from lab_runs import options_of
from readme import publish, table

from infopo.evaluation.comparison import p_text
from infopo.paired import compare_scores, holm
from infopo.provenance import environment

Record = dict[str, Any]

BASELINE = "SFT on chosen"
DRIFTS = (0.1, 0.25)
"""Reverse KL (nats per response) at which methods are compared."""
TINY_DRIFTS = (1e-4, 1e-3)
NAN = float("nan")
COMPARED = ("pass@1", "share", "differ")
"""Measures that have a value for each question."""


def measure(work: Path, shape: Shape, seeds: int, minutes: float | None) -> Record:
    """Computes what is missing, as long as there is time, and returns the results of all that is finished."""
    planned = grid(shape, seeds)
    runs = finish(work, shape, planned, minutes)
    drifts = DRIFTS if shape is FULL else TINY_DRIFTS
    return {
        "environment": environment(
            seed=1,
            packages=("torch", "transformers", "numpy", "sacrebleu"),
            extra={"platform": platform.system(), "command_line": ["python", "studies/08_diversity/run.py"]},
        ),
        "planned": {"seeds": seeds, "runs": len(planned)},
        "shape": asdict(shape),
        "drifts": list(drifts),
        "runs": [{key: value for key, value in run.items() if key != "questions"} for run in runs],
        "compared": compared(runs, shape, seeds, drifts),
    }


def of(runs: Sequence[Record], **fields: Any) -> list[Record]:
    """Returns the runs whose fields have these values. Figures that are no number come as text."""
    found = [run for run in runs if all(run[key] == value for key, value in fields.items())]
    return [
        {**run, "points": [{k: float(v) for k, v in point.items()} for point in run["points"]]}
        for run in found
    ]


def arms(
    runs: Sequence[Record], shape: Record, seeds: int, method: str
) -> Iterator[tuple[int, Record, list[Record]]]:
    """Yields seed, start and runs by ascending learning rate, of the seeds that are whole for a method."""
    for seed in range(1, seeds + 1):
        start, found = of(runs, seed=seed, method=None), of(runs, seed=seed, method=method)
        if start and len(found) == len(shape["rates"]):
            yield seed, start[0], sorted(found, key=lambda run: run["rate"])


def compared(runs: Sequence[Record], shape: Shape, seeds: int, drifts: Sequence[float]) -> list[Record]:
    """Compares each method with SFT at the same drift, question by question, as `infopo compare` does.

    A question is the unit. Its score is the mean over the seeds that both have, each on the line between the two
    learning rates around the drift.
    """
    rows = []
    for drift, name in itertools.product(drifts, COMPARED):
        scores = {method: by_question(runs, shape, seeds, method, name, drift) for method in METHODS}
        for method in METHODS:
            if method != BASELINE:
                a, b = shared(scores[method], scores[BASELINE])
                pair = asdict(compare_scores(a, b))
                rows.append({"drift": drift, "measure": name, "method": method, **pair})
    known = [row for row in rows if row["n"]]
    for row, p in zip(known, holm([row["p"] for row in known]), strict=True):
        row["p_holm"] = p
    return known


def by_question(
    runs: Sequence[Record], shape: Shape, seeds: int, method: str, name: str, drift: float
) -> dict[tuple[int, int], float]:
    """Returns the score of each (seed, question) at a drift, where it is known."""
    scores = {}
    for seed, start, found in arms(runs, asdict(shape), seeds, method):
        for question in range(shape.puzzles):
            points = [(0.0, start), *((run["points"][0]["kl"], run) for run in found)]
            line = [
                {"kl": kl, "score": NAN if (score := run["questions"][name][question]) is None else score}
                for kl, run in points
            ]
            value = first_at(line, "score", drift)
            if value == value:
                scores[seed, question] = value
    return scores


def shared(
    a: dict[tuple[int, int], float], b: dict[tuple[int, int], float]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Returns the scores of each question over the seeds that both have."""
    found: tuple[dict[str, list[float]], dict[str, list[float]]] = ({}, {})
    for seed, question in a:
        if (seed, question) in b:
            for scores, side in zip((a, b), found, strict=True):
                side.setdefault(str(question), []).append(scores[seed, question])
    return found


def at_the_drift(results: Record, method: str, name: str, drift: float) -> dict[int, float]:
    """Returns a measure of a method at a drift by seed, NaN if a seed does not reach it."""
    whole = arms(results["runs"], results["shape"], results["planned"]["seeds"], method)
    return {seed: at_drift(runs, start["points"][0], name, drift) for seed, start, runs in whole}


def names_of(results: Record) -> dict[str, str]:
    """Returns the measures, and how tables call them."""
    k = results["shape"]["samples"]
    return {
        "pass@1": "pass@1",
        f"pass@{k // 4}": f"pass@{k // 4}",
        f"pass@{k}": f"pass@{k}",
        "found": "different right answers",
        "share": "share of all right answers",
        "differ": "two right ones differ",
        "entropy": "entropy",
        "self_bleu": "self-BLEU",
    }


def places(name: str) -> int:
    """Returns the number of decimals of a measure."""
    return {"found": 2, "entropy": 2, "self_bleu": 1}.get(name, 3)


def facts_table(results: Record) -> str:
    rows = []
    for method in (None, *METHODS):
        done = of(results["runs"], method=method)
        rates = results["shape"]["rates"] if method else []
        every = results["planned"]["seeds"] * (len(rates) or 1)
        rows.append(
            [method or "start", ", ".join(f"{rate:.0e}" for rate in rates) or "–", f"{len(done)} of {every}"]
        )
    return table(["method", "learning rates", "runs finished"], rows)


def drift_table(results: Record) -> str:
    names, starts = names_of(results), [run["points"][0] for run in of(results["runs"], method=None)]
    cells = [show(interval(point[name] for point in starts), places(name)) for name in names]
    rows = [["0", "start", *cells, str(len(starts))]]
    for drift, method in itertools.product(results["drifts"], METHODS):
        found = {name: at_the_drift(results, method, name, drift) for name in names}
        reached = sum(value == value for value in found["pass@1"].values())
        cells = [show(interval(found[name].values()), places(name)) for name in names]
        rows.append([f"{drift:g}", method, *cells, str(reached)])
    return table(["KL", "method", *names.values(), "seeds"], rows)


def change_table(results: Record) -> str:
    """Returns the changes since the start, seed by seed."""
    rows = []
    names = names_of(results)
    starts = {run["seed"]: run["points"][0] for run in of(results["runs"], method=None)}
    for drift, method in itertools.product(results["drifts"], METHODS):
        cells = []
        for name in names:
            found = at_the_drift(results, method, name, drift)
            cells.append(marked(interval(value - starts[seed][name] for seed, value in found.items()), name))
        rows.append([f"{drift:g}", method, *cells])
    return table(["KL", "method minus start", *names.values()], rows)


def difference_table(results: Record) -> str:
    """Returns the differences from SFT at the same drift, seed by seed."""
    rows = []
    names = names_of(results)
    for drift, method in itertools.product(results["drifts"], METHODS):
        if method == BASELINE:
            continue
        cells = []
        for name in names:
            mine, base = (at_the_drift(results, each, name, drift) for each in (method, BASELINE))
            cells.append(marked(interval(mine[seed] - base[seed] for seed in mine if seed in base), name))
        rows.append([f"{drift:g}", method, *cells])
    return table(["KL", "method minus SFT", *names.values()], rows)


def marked(value: Record | None, name: str) -> str:
    """Returns a difference as text, with a star if its interval leaves out 0."""
    return show(value, places(name), True) + (" *" if is_clear(value) == "yes" else "")


def compare_table(results: Record) -> str:
    names = names_of(results)
    rows = [
        [
            f"{row['drift']:g}",
            names[row["measure"]],
            row["method"],
            f"{row['difference']:+.3f} [{row['ci95'][0]:+.3f}, {row['ci95'][1]:+.3f}]",
            p_text(row["p_holm"]),
            f"{row['wins']} / {row['losses']}",
            "–" if row["smallest"] is None else f"{row['smallest']:.3f}",
            str(row["n"]),
        ]
        for row in results["compared"]
    ]
    header = [
        "KL",
        "measure",
        "method",
        "minus SFT [95 %]",
        "p",
        "questions won / lost",
        "smallest difference shown",
    ]
    return table([*header, "questions"], rows)


def ends_table(results: Record) -> str:
    rows = []
    names = {"kl": "KL", **names_of(results)}
    for method, rate in itertools.product(METHODS, results["shape"]["rates"]):
        ends = [run["points"][0] for run in of(results["runs"], method=method, rate=rate)]
        cells = [show(interval(point[name] for point in ends), places(name)) for name in names]
        rows.append([method, f"{rate:.0e}", *cells, str(len(ends))])
    return table(["method", "learning rate", *names.values(), "seeds"], rows)


def tables(results: Record) -> dict[str, str]:
    """Returns the README's tables, from the results alone."""
    return {
        "facts": facts_table(results),
        "drift": drift_table(results),
        "changes": change_table(results),
        "differences": difference_table(results),
        "compare": compare_table(results),
        "ends": ends_table(results),
    }


def plot(results: Record, path: Path) -> None:
    """Draws what has a value for each question against KL, as means over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = names_of(results)
    figure, axes = plt.subplots(1, len(COMPARED), figsize=(13, 4.2), layout="constrained")
    starts = [run["points"][0] for run in of(results["runs"], method=None)]
    for axis, name in zip(axes, COMPARED, strict=True):
        begin = np.mean([point[name] for point in starts])
        axis.axhline(begin, color="0.7", lw=1)
        for number, method in enumerate(METHODS):
            x, y = [0.0], [begin]
            for rate in results["shape"]["rates"]:
                ends = [run["points"][0] for run in of(results["runs"], method=method, rate=rate)]
                if ends:
                    x.append(np.mean([point["kl"] for point in ends]))
                    y.append(np.mean([point[name] for point in ends]))
            axis.plot(x, y, color=f"C{number}", marker="o", ms=4, label=method)
        axis.set_xscale("symlog", linthresh=0.05)
        axis.set_xlabel("reverse KL, nats per response")
        axis.set_title(names[name], fontsize=10)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    options = options_of(__doc__ or "", Path(__file__).parent, arguments)
    shape, seeds = (TINY, 2) if options.tiny else (FULL, options.seeds)
    results = measure(options.work, shape, seeds, options.minutes)
    publish(options.out, results, tables(results), plot)


if __name__ == "__main__":
    main()
