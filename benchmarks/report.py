"""How large a report of many long runs is, and how long it takes: `python benchmarks/report.py --out FILE`.

Fifteen runs of 10,000 log steps, with the metrics of twelve panels. The time is that of the command as a user starts
it, with the reading of 150,000 records and the import of Bokeh.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from infopo.provenance import environment
from infopo.runs import RunWriter, to_json, write_json_atomic

NAMES = (
    "probe/change/chosen", "probe/change/rejected", "probe/logps/chosen", "probe/logps/rejected", "probe/margin",
    "probe/accuracy", "probe/ranking_accuracy", "kl/forward", "drift/chosen", "drift/rejected", "gradients/chosen",
    "gradients/rejected", "grad_norm", "gradients/cosine", "loss", "learning_rate", "length/sampled", "memory/peak_gib",
)  # fmt: skip
"""Metrics of twelve panels, 18 curves per run."""

RUNS = 15
STEPS = 10_000


def write_runs(folder: Path) -> list[Path]:
    """Writes the runs: random walks, whose points are all different."""
    paths = []
    for number in range(RUNS):
        path = folder / f"run{number:02}"
        writer = RunWriter(path)
        writer.write_environment(environment(seed=number))
        walks = np.random.default_rng(number).normal(size=(STEPS, len(NAMES))).cumsum(axis=0)
        lines = (
            to_json({"step": step + 1, **dict(zip(NAMES, row, strict=True))})
            for step, row in enumerate(walks.tolist())
        )
        (path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        paths.append(path)
    return paths


def measure(rounds: int) -> dict[str, object]:
    """Returns size, seconds of the command (wall and CPU, the least of the rounds), and panels."""
    with tempfile.TemporaryDirectory() as folder:
        paths = write_runs(Path(folder))
        page = Path(folder) / "report.html"
        command = [sys.executable, "-m", "infopo", "report", *map(str, paths), "--output", str(page)]
        wall, cpu = [], []
        for _ in range(rounds):
            before, begin = os.times(), time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            after = os.times()
            wall.append(time.perf_counter() - begin)
            cpu.append(
                after.children_user + after.children_system - before.children_user - before.children_system
            )
        text = page.read_text(encoding="utf-8")
        return {
            "runs": RUNS, "steps": STEPS, "panels": text.count('<article class="panel"'),
            "bytes": page.stat().st_size, "seconds": wall, "cpu_seconds": cpu,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = {
        "schema_version": 1,
        **measure(arguments.rounds),
        "environment": environment(seed=0, packages=("bokeh", "numpy")),
    }
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}))
    if arguments.out:
        write_json_atomic(arguments.out, result)


if __name__ == "__main__":
    main()
