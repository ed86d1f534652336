"""Draws pictures of results from files alone. It needs matplotlib (the `demo` extra), and imports no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infopo.errors import InfoPOError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The Okabe-Ito colours can be told apart by colour-blind readers, and the markers in black and white.
STYLES: Mapping[str, tuple[str, str, str]] = {
    "infopo": ("InfoPO", "#0072B2", "o"),
    "dpo_beta0.1": ("DPO, β = 0.1", "#D55E00", "s"),
    "dpo_beta1": ("DPO, β = 1", "#E69F00", "D"),
    "dpo_nll": ("DPO + NLL, β = 0.1", "#CC79A7", "v"),
    "sft": ("SFT on chosen", "#009E73", "^"),
}
"""Method -> label, colour, marker."""

PANELS: Mapping[str, tuple[str, str]] = {
    "learning_rate": ("learning rate", "log"),
    "chosen_logp_change": ("change of chosen log-prob (nats per response)", "symlog"),
    "kl_from_reference": ("KL from the start (nats per response)", "symlog"),
}
"""Field of a result on the horizontal axis -> label and scale."""


def draw_demo(summary: Mapping[str, Any], directory: Path) -> list[Path]:
    """Draws accuracy against learning rate and against drift, as `demo.png` and `demo.svg`.

    Args:
        summary: Content of the demo's `summary.json`.
        directory: Folder that the pictures are written to.

    Returns:
        The paths of the pictures.

    Raises:
        InfoPOError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InfoPOError("pictures need matplotlib: pip install 'infopo[demo]'") from error
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True)
    for ax, (field, (label, scale)) in zip(axes, PANELS.items(), strict=True):
        _panel(ax, summary, field, label, scale)
    axes[0].set_ylabel(f"greedy accuracy, n = {summary['start']['n']}, 95 % interval")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(
        f"One small model, {summary['labels']} preference pairs, five methods at three learning rates"
    )
    paths = [directory / "demo.png", directory / "demo.svg"]
    for path in paths:
        figure.savefig(path, dpi=110)
    return paths


def _panel(ax: "Axes", summary: Mapping[str, Any], field: str, label: str, scale: str) -> None:
    start = summary["start"]
    ax.axhline(start["accuracy"], color="0.5", lw=1, ls="--", label="SFT policy (start)")
    ax.axhspan(*start["accuracy_ci95"], color="0.5", alpha=0.12, lw=0)
    for method, results in summary["methods"].items():
        name, colour, marker = STYLES[method]
        x = [r[field] for r in results]
        y = [r["accuracy"] for r in results]
        low = [r["accuracy"] - r["accuracy_ci95"][0] for r in results]
        high = [r["accuracy_ci95"][1] - r["accuracy"] for r in results]
        ax.errorbar(x, y, yerr=[low, high], color=colour, marker=marker, ms=6, lw=1.4, capsize=2, label=name)
    ax.set_xlabel(label)
    if scale == "symlog":
        ax.set_xscale(scale, linthresh=0.1)
        ticks = [0, 0.1, 0.3, 1, 3, 10, 30]
        shown = sorted({*ticks, *(-t for t in ticks)})
        low_x, high_x = ax.get_xlim()
        ax.set_xticks([t for t in shown if low_x <= t <= high_x], minor=False)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
    else:
        ax.set_xscale(scale)
    if field == "chosen_logp_change":
        ax.axvline(0, color="0.5", lw=1)
    ax.set_ylim(-0.02, 1.02)
    ax.grid(alpha=0.25, lw=0.5)
