"""Compares InfoPO's minimiser with those of forward and reverse KL (see README.md beside this file).

    python studies/02_mode_seeking/run.py                # writes results.json, plot.png and the README's tables
    python studies/02_mode_seeking/run.py --out elsewhere --tiny

Nothing is sampled, because expectations are sums over a grid of responses.
"""

import argparse
import itertools
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from readme import publish, table

from infopo.losses.registry import loss_function
from infopo.provenance import environment
from infopo.records import ResponseLogps, Role

Law = NDArray[np.float64]
Loss = Callable[[Law], float]
"""Returns the loss of log π on the grid (log-probs of cells)."""

EDGE = 8.0
NO_CAP = 600.0
"""Cap in nats, which no log-ratio that an optimum depends on comes near."""
LABELS = ("reference", "complement", "graded")
REFERENCES = ("normal", "two modes")


@dataclass(frozen=True)
class World:
    """Laws on a grid of responses y.

    Attributes:
        y: Cells of the grid.
        reference: π_ref.
        chosen: p_w, with a mode near -a and a larger one near +a.
        rejected: p_l.
    """

    y: Law
    reference: Law
    chosen: Law
    rejected: Law


def world(reference_law: str, labels: str, mode: float, cells: int, error: float = 0.01) -> World:
    """Makes a world whose chosen responses lie near ±mode. π_ref is N(0, 1), or has narrow modes at ±mode itself.

    Args:
        reference_law: `normal` or `two modes`.
        labels: `graded`: of two draws from π_ref the one nearer to a mode is chosen, so that p_l = 2 π_ref - p_w.
            Distances to the mode at +mode count 0.1 less, so that the modes differ. `reference`: p_w is the same, and
            p_l = π_ref. `complement`: responses within 0.5 of a mode are right and the others wrong, p_w is π_ref given
            right, and p_l is π_ref given wrong.
        mode: Position a of the modes ±a.
        cells: Number of cells of the grid.
        error: Share of the other law's mass in each law of `complement`. Without it the supports would be disjoint, and
            reverse KL infinite.
    """
    y = np.linspace(-EDGE, EDGE, cells)
    if reference_law == "normal":
        reference = np.exp(-(y**2) / 2)
    else:
        wide = np.exp(-(y**2) / 2 / (mode + 1) ** 2) / (mode + 1)
        narrow = [np.exp(-((y - m) ** 2) / 2 / 0.3**2) / 0.3 for m in (-mode, mode)]
        reference = 0.1 * wide + 0.45 * narrow[0] + 0.45 * narrow[1]
    reference /= reference.sum()
    distance = np.abs(np.abs(y) - mode) - 0.1 * (y > 0)
    if labels == "complement":
        right = distance < 0.5
        part = [reference * right / reference[right].sum(), reference * ~right / reference[~right].sum()]
        chosen, rejected = (1 - error) * part[0] + error * part[1], error * part[0] + (1 - error) * part[1]
        return World(y, reference, chosen, rejected)
    order = np.argsort(-distance, kind="stable")
    below = np.empty(cells)
    # Two equal draws are ranked by a coin, so that half of the cell's own mass lies below it.
    below[order] = np.cumsum(reference[order]) - reference[order] / 2
    chosen = 2 * reference * below
    return World(y, reference, chosen, reference if labels == "reference" else 2 * reference - chosen)


def infopo_loss(w: World) -> Loss:
    """Returns the package's own loss at β = 1, with every cell once as a chosen and once as a rejected response."""
    cells = len(w.y)
    logps = ResponseLogps.of(
        policy=torch.zeros(2 * cells, dtype=torch.float64),
        reference=torch.from_numpy(np.log(w.reference)).repeat(2),
        length=torch.ones(2 * cells, dtype=torch.int64),
        role=torch.tensor([int(Role.CHOSEN)] * cells + [int(Role.REJECTED)] * cells),
        example=torch.arange(2 * cells),
    )
    loss = loss_function("infopo", {"cap": NO_CAP})
    laws = {"chosen": torch.from_numpy(w.chosen), "rejected": torch.from_numpy(w.rejected)}

    def value(log_policy: Law) -> float:
        terms = loss(replace(logps, policy=torch.from_numpy(log_policy).repeat(2)))
        return sum(float(laws[term.per] @ term.values) for term in terms)

    return value


def kl(p: Law, log_p: Law, log_q: Law) -> float:
    on = p > 0
    return float((p[on] * (log_p[on] - log_q[on])).sum())


def losses(w: World) -> dict[str, Loss]:
    log_chosen = np.log(w.chosen)
    return {
        "forward KL": lambda log_policy: kl(w.chosen, log_chosen, log_policy),
        "InfoPO": infopo_loss(w),
        "reverse KL": lambda log_policy: kl(np.exp(log_policy), log_policy, log_chosen),
    }


def described(log_policy: Law, w: World) -> dict[str, float]:
    """Returns moments, entropy (of cells, nats), both divergences from p_w, and the mass on the smaller mode's side."""
    policy = np.exp(log_policy)
    return {
        "mean": float(policy @ w.y),
        "standard_deviation": float(np.sqrt(policy @ w.y**2 - (policy @ w.y) ** 2)),
        "entropy": -float((policy * np.where(policy > 0, log_policy, 0.0)).sum()),
        "kl_chosen_policy": kl(w.chosen, np.log(w.chosen), log_policy),
        "kl_policy_chosen": kl(policy, log_policy, np.log(w.chosen)),
        "left_mass": float(policy[w.y < 0].sum()),
    }


# --- a Gaussian policy --------------------------------------------------------------------------------------


def gaussian(parameters: Law, y: Law) -> Law:
    """Returns log π of the cells for N(m, s²) with parameters (m, log s)."""
    logits = -((y - parameters[0]) ** 2) / 2 * np.exp(-2 * parameters[1])
    return np.asarray(logits - np.logaddexp.reduce(logits))


def gaussian_minima(loss: Loss, w: World, mode: float) -> list[dict[str, float]]:
    """Returns the distinct local minima over N(m, s²), the lowest first, from starts at the modes and between them."""
    minima: list[dict[str, float]] = []
    for mean in (-mode, 0.0, mode):
        for log_scale in (np.log(0.2), 0.0):
            result = minimize(
                lambda p: loss(gaussian(p, w.y)),
                np.array([mean, log_scale]),
                method="Nelder-Mead",
                options={"xatol": 1e-7, "fatol": 1e-11, "maxiter": 2000},
            )
            if result.success and all(abs(result.x[0] - m["m"]) > 1e-3 for m in minima):
                minima.append(
                    {"m": float(result.x[0]), "log_s": float(result.x[1]), "loss": float(result.fun)}
                )
    return sorted(minima, key=lambda m: m["loss"])


def gaussian_case(reference_law: str, labels: str, mode: float, cells: int) -> dict[str, Any]:
    w = world(reference_law, labels, mode, cells)
    fits = {}
    for name, loss in losses(w).items():
        minima = gaussian_minima(loss, w, mode)
        best = gaussian(np.array([minima[0]["m"], minima[0]["log_s"]]), w.y)
        fits[name] = {
            "m": minima[0]["m"],
            "log_s": minima[0]["log_s"],
            "local_minima": len(minima),
            **described(best, w),
        }
    least = fits["forward KL"]["kl_chosen_policy"]
    return {
        "reference": reference_law,
        "labels": labels,
        "mode": mode,
        "fits": fits,
        "chosen_entropy": entropy(w.chosen),
        "chosen_valley": float(w.chosen[np.argmin(np.abs(w.y))] / w.chosen.max()),
        "largest_cost": float((w.rejected / w.reference).max()),
        "excess_forward_kl": {name: fit["kl_chosen_policy"] - least for name, fit in fits.items()},
    }


# --- any policy ---------------------------------------------------------------------------------------------


def infopo_minimiser(w: World) -> tuple[Law, float, float]:
    """Returns InfoPO's minimiser over all policies, its multiplier and the mass that is left over.

    π = p_w/(p_l/π_ref + λ), where λ makes the sum 1. If no λ does, the mass left over goes where p_l/π_ref is least.
    """
    cost = w.rejected / w.reference
    on = w.chosen > 0
    least = -float(cost.min())

    def surplus(lam: float) -> float:
        return float((w.chosen[on] / (cost[on] + lam)).sum()) - 1

    lam = least if cost[on].min() > cost.min() else least + 1e-13
    left_over = -surplus(lam)
    if left_over < 0:
        lam, left_over = float(brentq(surplus, lam, 1.0, xtol=1e-15, rtol=1e-14)), 0.0
    policy = np.where(on, w.chosen / np.where(on, cost + lam, 1.0), 0.0)
    policy[np.argmin(cost)] += left_over
    return policy, lam, left_over


def finite_case(reference_law: str, labels: str, mode: float, cells: int) -> dict[str, Any]:
    """Measures InfoPO's minimiser over all policies. Both KLs are least at p_w itself."""
    w = world(reference_law, labels, mode, cells)
    policy, lam, left_over = infopo_minimiser(w)
    return {
        "reference": reference_law,
        "labels": labels,
        "mode": mode,
        "lambda": lam,
        "left_over": left_over,
        "chosen_entropy": entropy(w.chosen),
        "total_variation_from_chosen": float(np.abs(policy - w.chosen).sum() / 2),
        **described(np.log(policy), w),
    }


def random_cases(draws: int, responses: int, seed: int) -> dict[str, Any]:
    """Measures random finite spaces with graded labels (random scores, label noise 0 to 0.4) and with random laws."""
    draw = np.random.default_rng(seed)
    graded, free = [], []
    for _ in range(draws):
        reference = draw.dirichlet(np.ones(responses))
        below = np.cumsum(reference) - reference / 2
        noise = draw.uniform(0, 0.4)
        chosen = 2 * reference * ((1 - noise) * below + noise * (1 - below))
        for into, w in (
            (graded, World(np.arange(responses) * 1.0, reference, chosen, 2 * reference - chosen)),
            (free, World(np.arange(responses) * 1.0, reference, *draw.dirichlet(np.ones(responses), size=2))),
        ):
            policy, _, _ = infopo_minimiser(w)
            into.append(entropy(policy) - entropy(w.chosen))
    return {
        name: {
            "spaces": draws,
            "mean_entropy_change": float(np.mean(change)),
            "standard_error": float(np.std(change, ddof=1) / np.sqrt(draws)),
            "share_with_less_entropy": float(np.mean(np.array(change) < 0)),
        }
        for name, change in (("graded", graded), ("free", free))
    }


def entropy(p: Law) -> float:
    return -float((p[p > 0] * np.log(p[p > 0])).sum())


def forgotten_mode(mode: float, cells: int) -> list[dict[str, float]]:
    """Returns the losses of p_w with the mass of its left half multiplied by δ: the cost of forgetting a mode."""
    w = world("normal", "graded", mode, cells)
    rows = []
    for delta in (1.0, 1e-1, 1e-2, 1e-4, 1e-8, 1e-16, 1e-32):
        policy = w.chosen * np.where(w.y < 0, delta, 1.0)
        log_policy = np.log(w.chosen) + np.where(w.y < 0, np.log(delta), 0.0) - np.log(policy.sum())
        rows.append({"delta": delta, **{name: loss(log_policy) for name, loss in losses(w).items()}})
    return rows


def measure(modes: tuple[float, ...], cells: int, draws: int) -> dict[str, Any]:
    worlds = list(itertools.product(REFERENCES, LABELS, modes))

    def each_said(kind: str) -> Iterator[tuple[str, str, float]]:
        for number, (reference, labels, mode) in enumerate(worlds, start=1):
            print(
                f"{kind} {number} of {len(worlds)}: {reference} reference, {labels} labels, mode {mode:g}",
                flush=True,
            )
            yield reference, labels, mode

    return {
        "environment": environment(
            seed=0, packages=("torch", "numpy", "scipy"), extra={"platform": platform.system()}
        ),
        "cells": cells,
        "gaussian": [gaussian_case(*names, cells) for names in each_said("Gaussian policy")],
        "finite": [finite_case(*names, cells) for names in each_said("all policies")],
        "random": random_cases(draws, responses=20, seed=0),
        "forgotten_mode": forgotten_mode(modes[len(modes) // 2], cells),
    }


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Returns the README's tables, from the results alone."""
    names = ("forward KL", "InfoPO", "reverse KL")

    def number(value: float, signed: bool = True, places: int = 2) -> str:
        # Adding 0.0 turns -0.0 into 0.0.
        return f"{round(value, places) + 0.0:{'+' if signed else ''}.{places}f}"

    gaussians = [
        [
            c["reference"],
            c["labels"],
            f"{c['mode']:g}",
            *(
                f"{number(c['fits'][n]['mean'])} ± {number(c['fits'][n]['standard_deviation'], False)}, "
                f"{number(c['fits'][n]['entropy'] - c['chosen_entropy'])}"
                for n in names
            ),
            number(c["excess_forward_kl"]["InfoPO"], False),
            number(c["excess_forward_kl"]["reverse KL"], False),
            number(c["largest_cost"], False),
        ]
        for c in results["gaussian"]
    ]
    finite = [
        [
            c["reference"],
            c["labels"],
            f"{c['mode']:g}",
            number(c["lambda"], places=3),
            number(c["total_variation_from_chosen"], False, 3),
            number(c["entropy"] - c["chosen_entropy"], places=3),
            number(c["kl_chosen_policy"], False, 3),
            number(c["kl_policy_chosen"], False, 3),
        ]
        for c in results["finite"]
    ]
    forgotten = [
        [f"{row['delta']:.0e}", *(number(row[n], False) for n in names)] for row in results["forgotten_mode"]
    ]
    random = [
        [
            name,
            str(r["spaces"]),
            f"{r['mean_entropy_change']:+.3f} ± {r['standard_error']:.3f}",
            f"{r['share_with_less_entropy']:.2f}",
        ]
        for name, r in results["random"].items()
    ]
    return {
        "gaussian": table(
            ["π_ref", "p_l", "a", *names, "excess, InfoPO", "excess, reverse KL", "c"], gaussians
        ),
        "finite": table(
            ["π_ref", "p_l", "a", "λ", "TV(π, p_w)", "H(π) - H(p_w)", "KL(p_w‖π)", "KL(π‖p_w)"], finite
        ),
        "forgotten mode": table(["δ", *names], forgotten),
        "random": table(["labels", "spaces", "H(π) - H(p_w)", "share below 0"], random),
    }


def plot(results: dict[str, Any], path: Path) -> None:
    """Draws chosen law, Gaussian fits and the unrestricted minimiser, one panel per way of labelling, widest modes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    mode = max(c["mode"] for c in results["gaussian"])
    figure, grid = plt.subplots(len(REFERENCES), len(LABELS), figsize=(13, 8))
    for (reference_law, labels), axis in zip(itertools.product(REFERENCES, LABELS), grid.flat, strict=True):
        w = world(reference_law, labels, mode, results["cells"])
        width = w.y[1] - w.y[0]
        axis.fill_between(w.y, w.chosen / width, color="0.85", label="p_w")
        axis.plot(w.y, w.rejected / width, "k:", label="p_l")
        axis.plot(w.y, infopo_minimiser(w)[0] / width, color="tab:green", label="InfoPO, any policy")
        (case,) = [
            c
            for c in results["gaussian"]
            if (c["reference"], c["labels"], c["mode"]) == (reference_law, labels, mode)
        ]
        for name, colour in (("forward KL", "tab:blue"), ("InfoPO", "tab:orange"), ("reverse KL", "tab:red")):
            fit = case["fits"][name]
            density = np.exp(gaussian(np.array([fit["m"], fit["log_s"]]), w.y)) / width
            style = "--" if name == "InfoPO" else "-"
            axis.plot(w.y, density, style, color=colour, label=f"{name}, Gaussian policy")
        axis.set_title(f"π_ref: {reference_law}; p_l: {labels}")
        axis.set_xlim(-6, 6)
    for axis in grid[-1]:
        axis.set_xlabel("response y")
    grid[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="a small grid, for tests")
    options = parser.parse_args(arguments)
    results = measure((1.5,), 201, 20) if options.tiny else measure((1.0, 2.0, 3.0), 1601, 1000)
    publish(options.out, results, tables(results), plot)


if __name__ == "__main__":
    main()
