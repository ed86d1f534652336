"""Draws the seconds of a packed row against its tokens: `python benchmarks/plot.py RESULT.json FILE.svg`."""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def main(source: str, target: str) -> None:
    result = json.loads(Path(source).read_text(encoding="utf-8"))["linearity"]
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    axes.loglog(result["tokens"], result["seconds"], "o-", color="#1f5c99")
    axes.set_xlabel("tokens of the row (examples of 512 + 128 + 128)")
    axes.set_ylabel("forward and backward pass, s")
    axes.set_title(f"time ∝ tokens^{result['exponent']:.2f}")
    axes.grid(alpha=0.3)
    figure.savefig(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
