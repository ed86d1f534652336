"""Measures bias and variance of mutual-information estimators with the optimal critic (see README.md beside this file).

python studies/01_estimators/run.py                  # writes results.json, plot.png and the README's tables
python studies/01_estimators/run.py --out elsewhere --tiny
"""

import argparse
import math
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from readme import publish, table

from infopo import estimators
from infopo.provenance import environment

DIMENSIONS = 20
INFORMATION = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0)
BATCHES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
ELEMENTS = 2**20
"""Number of scores that exist at once."""

LARGEST_INTERPOLATED = 128
"""Largest batch of I_0.5, which takes the most time of all estimators."""

Scores = Callable[[Tensor, Tensor], Tensor]
TWO_SAMPLES: dict[str, Scores] = {
    "NWJ": estimators.nwj,
    "DV": estimators.donsker_varadhan,
    "SMILE τ=1": lambda joint, marginal: estimators.smile(joint, marginal, 1.0),
    "SMILE τ=5": lambda joint, marginal: estimators.smile(joint, marginal, 5.0),
}
EXAMPLES: dict[str, Scores] = {
    "InfoNCE": estimators.infonce,
    "I_0.5": lambda joint, marginal: estimators.interpolated(joint, marginal, 0.5),
    "InfoNCE, 1 negative": lambda joint, marginal: estimators.infonce(joint, marginal[:, :1]),
}


@dataclass(frozen=True)
class Setting:
    """Settings of the measurement.

    Attributes:
        information: Values of the true mutual information I (nats).
        batches: Numbers n of joint samples, and of marginal samples or candidates for each.
        repetitions: Number of estimates at batches above 128. Smaller batches have ten times as many.
        seed: Seed of all draws.
    """

    information: tuple[float, ...] = INFORMATION
    batches: tuple[int, ...] = BATCHES
    repetitions: int = 1000
    seed: int = 0

    def repetitions_of(self, batch: int) -> int:
        return self.repetitions * (10 if batch <= 128 else 1)


def critic(x: Tensor, y: Tensor, squared_correlation: float) -> Tensor:
    """Returns f(x, y) = log p(x, y)/(p(x) p(y)) of every x with every y: (..., x, d), (..., y, d) -> (..., x, y)."""
    s = squared_correlation
    cross = math.sqrt(s) * x @ y.transpose(-1, -2)
    squares = s / 2 * ((x**2).sum(-1)[..., :, None] + (y**2).sum(-1)[..., None, :])
    return -x.shape[-1] / 2 * math.log1p(-s) + (cross - squares) / (1 - s)


def estimates(information: float, batch: int, repetitions: int, draw: torch.Generator) -> dict[str, Tensor]:
    """Returns each estimator's values, (repetitions,), on the same samples.

    Two-sample estimators take n joint samples and n independent marginal ones. The others take n joint samples, each
    with the y of the n - 1 others as its negatives.
    """
    # ρ² from I = -d/2 log(1 - ρ²).
    s = -math.expm1(-2 * information / DIMENSIONS)
    chunk = max(1, min(repetitions, ELEMENTS // batch**2))
    values: dict[str, list[Tensor]] = {}
    others = ~torch.eye(batch, dtype=torch.bool)
    for start in range(0, repetitions, chunk):
        size = (min(chunk, repetitions - start), batch, DIMENSIONS)
        x, noise, x_alone, y_alone = (
            torch.randn(size, generator=draw, dtype=torch.float64) for _ in range(4)
        )
        y = math.sqrt(s) * x + math.sqrt(1 - s) * noise
        joint = critic(x[:, :, None], y[:, :, None], s)[..., 0, 0]
        # These are n² scores, so they are computed in single precision.
        scores = critic(x.float(), y.float(), s)
        marginal = critic(x_alone[:, :, None], y_alone[:, :, None], s)[..., 0, 0]
        negatives = scores[:, others].reshape(len(x), batch, batch - 1)
        for name, estimator in TWO_SAMPLES.items():
            values.setdefault(name, []).append(torch.vmap(estimator)(joint, marginal))
        for name, estimator in EXAMPLES.items():
            if name != "I_0.5" or batch <= LARGEST_INTERPOLATED:
                values.setdefault(name, []).append(torch.vmap(estimator)(joint.float(), negatives).double())
        values.setdefault("weight", []).append(torch.sigmoid(negatives[..., 0] - joint).mean(dim=1))
    return {name: torch.cat(parts) for name, parts in values.items()}


def nwj_variance(information: float, batch: int) -> float:
    """Returns (e^(2I) - 1 + Var f)/n. For Gaussians, E_Q[(dP/dQ)²] = e^(2I) and Var_P[f] = d ρ²."""
    variance = -DIMENSIONS * math.expm1(-2 * information / DIMENSIONS)
    return (math.expm1(2 * information) + variance) / batch


def summary(values: Tensor, information: float) -> dict[str, float]:
    """Returns bias, variance and quantiles. The variance's standard error is from the sample's fourth moment."""
    n = len(values)
    mean, variance = values.mean(), values.var()
    fourth = ((values - mean) ** 4).mean()
    low, median, high = values.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
    return {
        "repetitions": n,
        "bias": (mean - information).item(),
        "bias_standard_error": (variance / n).sqrt().item(),
        "variance": variance.item(),
        "variance_standard_error": ((fourth - variance**2).clamp(min=0) / n).sqrt().item(),
        "median": median,
        "quantile_05": low,
        "quantile_95": high,
        "rmse": ((values - information) ** 2).mean().sqrt().item(),
    }


def measure(setting: Setting) -> dict[str, Any]:
    """Measures all rows, and puts the closed forms beside them."""
    draw = torch.Generator().manual_seed(setting.seed)
    rows = []
    for information in setting.information:
        for batch in setting.batches:
            repetitions = setting.repetitions_of(batch)
            values = estimates(information, batch, repetitions, draw)
            weight = values.pop("weight")
            row: dict[str, Any] = {
                "information": information,
                "batch": batch,
                "nwj_variance": nwj_variance(information, batch),
                "infonce_maximum": math.log(batch),
                # The variance comes from E_Q[(dP/dQ)²] = e^(2I). Fewer draws than that are too few to show it.
                "coverage": batch * repetitions / math.exp(2 * information),
                "dpo_weight": weight.mean().item(),
                "estimators": {name: summary(v, information) for name, v in values.items()},
            }
            rows.append(row)
        print(f"I = {information}: done", flush=True)
    return {
        "environment": environment(
            seed=setting.seed, packages=("torch", "numpy"), extra={"platform": platform.system()}
        ),
        "dimensions": DIMENSIONS,
        "rows": rows,
    }


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Returns the README's tables, from the results alone."""
    rows = {(row["information"], row["batch"]): row for row in results["rows"]}
    information = sorted({i for i, _ in rows})
    batches = sorted({n for _, n in rows})
    shown = [n for n in (2, 16, 128, 1024) if n in batches] or batches

    def cell(name: str, i: float, n: int) -> str:
        e = rows[i, n]["estimators"][name]
        return f"{e['bias']:+.2f} ± {e['bias_standard_error']:.2f}"

    def bias(name: str) -> str:
        return table(
            ["I", *(f"n = {n}" for n in shown)],
            [[f"{i:g}", *(cell(name, i, n) for n in shown)] for i in information],
        )

    def spread(name: str) -> str:
        def one(i: float, n: int) -> str:
            e = rows[i, n]["estimators"][name]
            return f"{e['median'] - i:+.2f} [{e['quantile_05'] - i:+.2f}, {e['quantile_95'] - i:+.2f}]"

        return table(
            ["I", *(f"n = {n}" for n in shown)],
            [[f"{i:g}", *(one(i, n) for n in shown)] for i in information],
        )

    law = []
    for i in information:
        for n in shown:
            row = rows[i, n]
            e = row["estimators"]["NWJ"]
            law.append(
                [
                    f"{i:g}",
                    str(n),
                    str(e["repetitions"]),
                    f"{row['coverage']:.2g}",
                    f"{row['nwj_variance']:.3g}",
                    f"{e['variance']:.3g}",
                    f"{e['variance'] / row['nwj_variance']:.2g}",
                ]
            )
    largest = max(batches)
    compared = max(n for n in batches if n <= LARGEST_INTERPOLATED)
    errors = []
    for i in information:
        e = rows[i, compared]["estimators"]
        nwj_exact = math.sqrt(rows[i, compared]["nwj_variance"])
        others = [f"{e[name]['rmse']:.2f}" for name in ("InfoNCE", "I_0.5", "DV", "SMILE τ=1", "SMILE τ=5")]
        errors.append([f"{i:g}", f"{nwj_exact:.3g}", f"{e['NWJ']['rmse']:.2f}", *others])
    one = []
    for i in information:
        row = rows[i, largest]
        e = row["estimators"]["InfoNCE, 1 negative"]
        estimate = i + e["bias"]
        one.append(
            [
                f"{i:g}",
                f"{estimate:.3f} ± {e['bias_standard_error']:.3f}",
                f"{math.log(2) - estimate:.3f}",
                f"{row['dpo_weight']:.3f}",
            ]
        )
    return {
        "nwj bias": bias("NWJ"),
        "nwj median": spread("NWJ"),
        "infonce bias": bias("InfoNCE"),
        "nwj variance": table(
            ["I", "n", "repetitions", "n × repetitions / e^2I", "Var, closed form", "Var, measured", "ratio"],
            law,
        ),
        "errors": table(
            ["I", "NWJ, closed form", "NWJ", "InfoNCE", "I_0.5", "DV", "SMILE τ=1", "SMILE τ=5"], errors
        ),
        "one negative": table(["I", "InfoNCE, K = 1", "its loss", "mean weight of a pair"], one),
    }


def plot(results: dict[str, Any], path: Path) -> None:
    """Draws bias of the mean and of the median, and standard deviation, against I, at two batch sizes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = results["rows"]
    batches = sorted({row["batch"] for row in rows})
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), sharex=True)
    for line, n in zip(axes, (batches[len(batches) // 2], batches[-1]), strict=True):
        at = [row for row in rows if row["batch"] == n]
        information = [row["information"] for row in at]
        for name in ("NWJ", "InfoNCE", "DV", "SMILE τ=5"):
            e = [row["estimators"][name] for row in at]
            line[0].errorbar(
                information, [v["bias"] for v in e], yerr=[v["bias_standard_error"] for v in e], label=name
            )
            line[1].plot(information, [v["median"] - v_i for v, v_i in zip(e, information, strict=True)])
            line[2].semilogy(information, [math.sqrt(v["variance"]) for v in e])
        line[2].semilogy(
            information, [math.sqrt(row["nwj_variance"]) for row in at], "k:", label="NWJ, closed form"
        )
        line[0].plot(information, [min(0.0, math.log(n) - i) for i in information], "k--", label="log n - I")
        line[0].set_ylabel(f"n = {n}")
        for axis, title in zip(
            line, ("bias of the mean", "bias of the median", "standard deviation"), strict=True
        ):
            axis.set_title(f"{title} (nats)")
            if title != "standard deviation":
                axis.set_ylim(-8.5, 2.5)
    for axis in axes[1]:
        axis.set_xlabel("true mutual information (nats)")
    axes[0, 0].legend(fontsize=8)
    axes[0, 2].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


TINY = Setting(information=(0.5, 2.0), batches=(2, 8), repetitions=40)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="a few small settings, for tests")
    options = parser.parse_args(arguments)
    results = measure(TINY if options.tiny else Setting())
    publish(options.out, results, tables(results), plot)


if __name__ == "__main__":
    main()
