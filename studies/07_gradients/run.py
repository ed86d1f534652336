"""Measures both sides of the gradient, and what forecasts from them are worth (see README.md beside this file).

    python studies/07_gradients/run.py --minutes 60    # computes what is missing, then rewrites the results
    python studies/07_gradients/run.py --minutes 0     # takes only what is there
    python studies/07_gradients/run.py --out elsewhere --work elsewhere/work --tiny

Finished runs are kept in `--work`, and a later call goes on with the others. Study 06 shares them.
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
from watched_runs import AHEAD, LEAST_SEEDS, METHODS, cells_of, grid, method_of, train_and_watch

from infopo.diagnostics import Balance
from infopo.provenance import environment

Record = dict[str, Any]

FELL = 1e-4
"""Change of a log-prob (nats) below which a response counts as fallen: less than that is rounding."""
DRIFT = 0.1
"""Forward KL (nats per response) at which accuracies are compared."""
ONE_SIDED = "SFT on chosen"
RULES = {
    "pair alone (band)": "a step of gradient descent on the pair alone",
    "all rows together": "a step of gradient descent on 64 training pairs",
    "all rows, Adam": "the same step, scaled as Adam scales it",
    "CHES": "order by CHES",
    "CHES, normalised": "order by length-normalised CHES",
}
"""Forecasts for a row, before training, of whether its chosen response has fallen in the end."""


def measure(work: Path, lab: str, seeds: int, minutes: float | None) -> Record:
    """Computes what is missing, as long as there is time, and returns the results of all that is finished."""
    planned = grid(lab, seeds, tiny=lab == "tiny")
    runs = [compact(run) for run in finish(work, planned, minutes, train_and_watch)]
    return {
        "environment": environment(
            seed=1,
            packages=("torch", "transformers", "numpy"),
            extra={"platform": platform.system(), "command_line": ["python", "studies/07_gradients/run.py"]},
        ),
        "planned": {"cells": cells_of(planned), "seeds": seeds, "runs": len(planned)},
        "drift": DRIFT if lab != "tiny" else 0.001,
        "start": start(work, lab),
        "runs": runs,
    }


def compact(run: Record) -> Record:
    """Returns what the results keep of a run: its points, both sides at each measurement, and how forecasts did."""
    looks = {look["step"]: look for look in run["looks"]}
    return {
        "labels": run["labels"],
        "rate": run["rate"],
        "method": method_of(run),
        "seed": run["seed"],
        "points": run["points"],
        "sides": [side(run, looks, each) for each in run["gradients"]],
        **row_forecasts(run, looks),
    }


def side(run: Record, looks: dict[int, Record], measured: Record) -> Record:
    """Returns the balance on held-out pairs at a step, its forecast, and what the next steps did to them."""
    step, balance = measured["step"], Balance(**measured["held"])
    last = max(looks)
    until = next((g["step"] for g in run["gradients"] if g["step"] > step), last)
    n = run["judged"]
    first, soon, late = (pairs(looks[s]["held"])[:n] for s in (step, min(step + AHEAD, last), until))
    found = {
        "step": step,
        "chosen": balance.chosen / n,
        "rejected": balance.rejected / n,
        "cosine": None,
        "weights": balance.weight_rejected / balance.weight_chosen,
        "edge": None,
        "chosen_falls": balance.chosen_falls,
        "rejected_rises": bool(balance.rejected) and balance.rejected_rises,
        "chosen_soon": float((soon - first)[:, 0].mean()),
        "rejected_soon": float((soon - first)[:, 1].mean()),
        "chosen_late": float((late - first)[:, 0].mean()),
    }
    if balance.rejected:
        norms = balance.rejected / balance.chosen / found["weights"]
        found["cosine"] = balance.cosine
        found["edge"] = balance.cosine / norms
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in found.items()}


def row_forecasts(run: Record, looks: dict[int, Record]) -> Record:
    """Returns the share of rows that fell by the end, and what each rule said, how often rightly, and its AUC."""
    rows = {key: np.array(values) for key, values in run["gradients"][0]["rows"].items()}
    n = run["judged"]
    ends = [
        np.concatenate([pairs(looks[s]["trained"])[:n], pairs(looks[s]["held"])[:n]]) for s in (0, max(looks))
    ]
    fell = (ends[1] - ends[0])[:, 0] < -FELL
    ches = np.array(run["ches"])
    scores = {
        "pair alone (band)": rows["weight_rejected"] * rows["inner"]
        - rows["weight_chosen"] * rows["chosen_norm"] ** 2,
        "all rows together": -rows["along_gradient"],
        "all rows, Adam": -rows["along_adam"],
        "CHES": ches[:, 0],
        "CHES, normalised": ches[:, 1],
    }
    rules = {}
    for name, score in scores.items():
        rules[name] = {"auc": auc(score, fell)}
        if not name.startswith("CHES"):  # which has no scale
            rules[name] |= {"said": float((score > 0).mean()), "right": float(((score > 0) == fell).mean())}
    return {"fell": float(fell.mean()), "rules": rules}


def auc(scores: Any, truth: Any) -> float | None:
    """Returns the probability that a row that fell has a higher score than one that did not, or None without both.

    Example:
        >>> auc(np.array([3.0, 1.0, 2.0]), np.array([True, False, False]))
        1.0
    """
    if truth.all() or not truth.any():
        return None
    difference = scores[truth][:, None] - scores[~truth][None]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def pairs(values: Sequence[float]) -> Any:
    """Returns log-probs as one row per pair: chosen, rejected."""
    return np.array(values).reshape(-1, 2)


def of(results: Record, **fields: Any) -> list[Record]:
    """Returns the runs whose fields have these values."""
    return [run for run in results["runs"] if all(run[key] == value for key, value in fields.items())]


def cells(results: Record) -> Iterator[tuple[str, float, str, list[Record]]]:
    """Yields labels, learning rate, method and its runs, of which enough seeds are finished."""
    for labels, rate, method in results["planned"]["cells"]:
        runs = of(results, labels=labels, rate=rate, method=method)
        if len(runs) >= min(LEAST_SEEDS, results["planned"]["seeds"]):
            yield labels, rate, method, runs


def kinds(results: Record) -> list[str]:
    """Returns the labels of which enough seeds are finished."""
    return list(dict.fromkeys(labels for labels, *_ in cells(results)))


def by_seed(results: Record, labels: str, value: Any) -> dict[str, float] | None:
    """Returns mean and interval over seeds of a value's mean over the runs of a seed, without those of SFT.

    Methods with fewer seeds than others are left out, so that all seeds have the same runs.
    """
    complete = [(rate, method, runs) for kind, rate, method, runs in cells(results) if kind == labels]
    most = max((len(runs) for *_, runs in complete), default=0)
    kept = [run for _, method, runs in complete if len(runs) == most and method != ONE_SIDED for run in runs]
    seeds = sorted({run["seed"] for run in kept})
    means = []
    for seed in seeds:
        values = [v for run in kept if run["seed"] == seed and (v := value(run)) is not None]
        means.append(float(np.mean(values)) if values else float("nan"))
    return interval(means)


def facts_table(results: Record) -> str:
    rows = []
    for labels, group in itertools.groupby(results["planned"]["cells"], key=lambda cell: cell[0]):
        found = list(group)
        done = [len(of(results, labels=labels, rate=rate, method=method)) for _, rate, method in found]
        rows.append(
            [
                labels,
                f"{min(done)} to {max(done)}",
                f"{sum(done)} of {len(found) * results['planned']['seeds']}",
            ]
        )
    return table(["labels", "seeds", "runs finished"], rows)


def norms_table(results: Record) -> str:
    rows = []
    for labels, rate, method, runs in cells(results):
        cells_of_row = [labels, f"{rate:.1e}", method]
        for name, places in (("chosen", 1), ("rejected", 1), ("cosine", 2), ("weights", 2)):
            sides = [[each[name] for each in run["sides"]] for run in runs]
            if method == ONE_SIDED and name != "chosen":
                cells_of_row.append("–")
                continue
            means = np.mean(np.array(sides, dtype=float), axis=0)
            cells_of_row.append(" ".join(f"{value:.{places}f}" for value in means))
        every = [each for run in runs for each in run["sides"]]
        banded = [each for each in every if each["cosine"] is not None and each["cosine"] > 0]
        inside = [each for each in banded if not (each["chosen_falls"] or each["rejected_rises"])]
        cells_of_row += [
            f"{len(banded)} of {len(every)}",
            f"{len(inside)} of {len(banded)}" if banded else "–",
        ]
        rows.append(cells_of_row)
    steps = ", ".join(str(each["step"]) for each in results["runs"][0]["sides"]) if results["runs"] else ""
    header = [
        "labels",
        "learning rate",
        "method",
        f"norm of chosen at steps {steps}",
        "of rejected",
        "cosine",
    ]
    return table([*header, "d(l)/d(w)", "has a band", "inside"], rows)


def stationary_table(results: Record) -> str:
    """Returns where InfoPO's weights are against r^β = ρ‖g(w)‖/‖g(l)‖, and whether rejected responses then rise."""
    rows = []
    for labels, rate, method, runs in cells(results):
        if not method.startswith("InfoPO"):
            continue
        every = [each for run in runs for each in run["sides"]]
        beyond = [each for each in every if each["rejected_rises"]]
        others = [each for each in every if not each["rejected_rises"]]
        cells_of_row = [labels, f"{rate:.1e}", method]
        for name in ("weights", "edge"):
            means = np.mean([[each[name] for each in run["sides"]] for run in runs], axis=0)
            cells_of_row.append(" ".join(f"{value:.2f}" for value in means))
        rows.append([*cells_of_row, f"{len(beyond)} of {len(every)}", rose(beyond), rose(others)])
    header = ["labels", "learning rate", "method", "d(l)/d(w) = mean r^β", "stationary at", "below it"]
    return table([*header, "rejected then rose", "rejected rose otherwise"], rows)


def rose(sides: Sequence[Record]) -> str:
    return f"{sum(each['rejected_soon'] > FELL for each in sides)} of {len(sides)}" if sides else "–"


def steps_table(results: Record) -> str:
    """Returns the share of measurements after which the mean of chosen responses did what the band says."""
    rows = []
    for labels in kinds(results):
        for name, words in (
            ("chosen_soon", f"next {AHEAD} steps"),
            ("chosen_late", "until the next measurement"),
        ):
            fell = by_seed(results, labels, lambda run, n=name: np.mean([s[n] < -FELL for s in run["sides"]]))
            said = by_seed(results, labels, lambda run: np.mean([s["chosen_falls"] for s in run["sides"]]))
            right = by_seed(
                results,
                labels,
                lambda run, n=name: np.mean([s["chosen_falls"] == (s[n] < -FELL) for s in run["sides"]]),
            )
            never = by_seed(
                results, labels, lambda run, n=name: np.mean([s[n] >= -FELL for s in run["sides"]])
            )
            better = by_seed(
                results,
                labels,
                lambda run, n=name: (
                    np.mean([s["chosen_falls"] == (s[n] < -FELL) for s in run["sides"]])
                    - np.mean([s[n] >= -FELL for s in run["sides"]])
                ),
            )
            rows.append(
                [
                    labels,
                    words,
                    percent(fell),
                    percent(said),
                    percent(right),
                    percent(never),
                    is_clear(better),
                ]
            )
    header = ["labels", "over", "fell", "band says falls", "band is right", "right if it never falls"]
    return table([*header, "difference clear"], rows)


def percent(value: Any) -> str:
    if value is None:
        return "–"
    return show({**value, "mean": 100 * value["mean"], "half": 100 * value["half"]}, 0) + " %"


def rows_table(results: Record) -> str:
    rows = []
    for labels in kinds(results):
        fell = by_seed(results, labels, lambda run: run["fell"])
        never = by_seed(results, labels, lambda run: 1 - run["fell"])
        hindsight = by_seed(results, labels, lambda run: max(run["fell"], 1 - run["fell"]))
        for rule in RULES:
            curve = by_seed(results, labels, lambda run, r=rule: run["rules"][r]["auc"])
            over = None if curve is None else {**curve, "mean": curve["mean"] - 0.5}
            has_scale = not rule.startswith("CHES")
            said, right = (
                by_seed(results, labels, lambda run, r=rule, n=name: run["rules"][r][n])
                if has_scale
                else None
                for name in ("said", "right")
            )
            rows.append(
                [labels, rule, show(curve, 2), is_clear(over), percent(said), percent(fell), percent(right)]
            )
        rows.append([labels, "none falls", "0.50", "", "0 %", percent(fell), percent(never)])
        rows.append([labels, "all or none, in hindsight", "0.50", "", "", percent(fell), percent(hindsight)])
    return table(["labels", "forecast", "AUC", "AUC not 0.5", "says", "fell", "right"], rows)


def balance_table(results: Record) -> str:
    """Returns measures of balance beside accuracy at equal drift, by method."""
    rows, drift = [], results["drift"]
    for labels in kinds(results):
        methods = list(
            dict.fromkeys(m for kind, _, m, _ in cells(results) if kind == labels and m != ONE_SIDED)
        )
        table_of: dict[str, list[list[float]]] = {}
        for method in methods:
            seeds = [
                of(results, labels=labels, method=method, seed=s + 1)
                for s in range(results["planned"]["seeds"])
            ]
            values = [balances(runs, results["start"], drift) for runs in seeds if runs]
            table_of[method] = values
            means = [interval(column) for column in zip(*values, strict=True)]
            if means[2] is not None:
                shown = [show(means[0], 2), show(means[1], 2), show(means[2])]
                rows.append([labels, method, *shown, str(means[2]["n"])])
    header = [
        "labels",
        "method",
        "ln(norm of chosen / of rejected)",
        "cosine",
        f"sampled accuracy at KL {drift:g}",
    ]
    return table([*header, "seeds"], rows)


def balances(runs: Sequence[Record], begin: Record, drift: float) -> tuple[float, float, float]:
    """Returns log of the norms' ratio and cosine, as means after the start, and accuracy at a drift."""
    run = min(runs, key=lambda each: each["rate"])
    sides = run["sides"][1:]
    ratio = float(np.mean([np.log(each["chosen"] / each["rejected"]) for each in sides]))
    return (
        ratio,
        float(np.mean([each["cosine"] for each in sides])),
        along_runs(runs, begin, "sampled_accuracy", drift),
    )


def tables(results: Record) -> dict[str, str]:
    """Returns the README's tables, from the results alone."""
    return {
        "facts": facts_table(results),
        "norms": norms_table(results),
        "stationary": stationary_table(results),
        "steps": steps_table(results),
        "rows": rows_table(results),
        "balance": balance_table(results),
    }


def plot(results: Record, path: Path) -> None:
    """Draws the norms of both sides (as multiples of the start's) and their cosine by step, per labels and rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pictures = list(dict.fromkeys((labels, rate) for labels, rate, *_ in cells(results)))
    size = max(1, len(pictures))
    figure, axes = plt.subplots(
        2, size, figsize=(4.6 * size, 7), squeeze=False, layout="constrained", sharex=True
    )
    for column, picture in enumerate(pictures):
        for labels, rate, method, runs in cells(results):
            if (labels, rate) != picture:
                continue
            color = f"C{list(METHODS).index(method)}"
            steps = [each["step"] for each in runs[0]["sides"]]
            for name, style in (("chosen", "-"), ("rejected", "--")):
                values = np.mean([[each[name] for each in run["sides"]] for run in runs], axis=0)
                if values[0] > 0:
                    label = method if name == "chosen" else None
                    axes[0, column].plot(
                        steps, values / values[0], style, color=color, marker="o", ms=3, label=label
                    )
            if method != ONE_SIDED:
                values = np.mean([[each["cosine"] for each in run["sides"]] for run in runs], axis=0)
                axes[1, column].plot(steps, values, color=color, marker="o", ms=3)
        axes[0, column].set_yscale("log")
        axes[0, column].set_title(f"{picture[0]} labels, learning rate {picture[1]:.1e}", fontsize=10)
        axes[1, column].axhline(0, color="0.6", lw=1)
        axes[1, column].set_xlabel("step")
    axes[0, 0].set_ylabel("norm, as a multiple of the start's\nchosen solid, rejected dashed")
    axes[1, 0].set_ylabel("cosine of the two sides")
    if pictures:
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
