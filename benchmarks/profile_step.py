"""Measures where the time of our step goes on one core of a CPU: matrix products, attention, and all the rest.

    python benchmarks/profile_step.py --regime i --steps 5

It prints the share of each kind (median [quartiles] of the steps), and the rate of matrix products inside the step
beside that of one large product on its own.
"""

import argparse
import time

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

import flops
import regimes
from infopo.data.packing import PreferenceCollator
from infopo.logps import attention
from infopo.logps.forward import response_logps
from infopo.startup import CPU_TOKENS_PER_FORWARD
from shapes import build_model

JOB = {"model": "a4k", "vocabulary": 4096, "device": "cpu", "variant": "infopo"}
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"}


def shares(model: torch.nn.Module, step: regimes.Step) -> dict[str, float]:
    """Returns the seconds of one step, by kind of operation."""
    seconds = {
        "matrix products": 0.0,
        "attention, forward": 0.0,
        "attention, backward": 0.0,
        "all the rest": 0.0,
    }
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for batch in PreferenceCollator(CPU_TOKENS_PER_FORWARD, shared=True)(step):
            (response_logps(model, batch) * torch.linspace(-1, 1, batch.num_responses)).sum().backward()
    model.zero_grad()
    for event in profiler.key_averages():
        kind = "all the rest"
        if event.key in PRODUCTS:
            kind = "matrix products"
        elif "scaled_dot_product" in event.key:
            kind = "attention, backward" if "backward" in event.key else "attention, forward"
        seconds[kind] += event.self_cpu_time_total / 1e6
    return seconds


def large_product() -> float:
    """Returns the GFLOP/s of (3000, 256) @ (256, 688), the largest product of the layers."""
    a, b = torch.randn(3000, 256), torch.randn(256, 688)
    best = min(_seconds(a, b) for _ in range(20))
    return 2 * 3000 * 256 * 688 / best / 1e9


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    begin = time.perf_counter()
    a @ b
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--regime", choices=tuple(regimes.REGIMES), default="i")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = build_model(JOB, seed=0)
    attention.enable(model)
    size = regimes.REGIMES[args.regime].batch
    examples = regimes.draw(args.regime, (1 + args.steps) * size, JOB["vocabulary"])
    steps = [examples[i : i + size] for i in range(0, len(examples), size)]
    # The first step warms up and does not count.
    shares(model, steps[0])
    measured = [shares(model, step) for step in steps[1:]]
    print(f"regime {args.regime}, n = {args.steps} steps of {size} examples")
    for kind in measured[0]:
        low, median, high = np.percentile([s[kind] / sum(s.values()) for s in measured], [25, 50, 75])
        print(f"  {median:5.1%} [{low:.1%}, {high:.1%}]  {kind}")
    products, attentions = [], []
    for step, seconds in zip(steps[1:], measured, strict=True):
        total, _ = flops.variant_flops("infopo", model.config, [step])
        products.append((total.linear + total.head) / seconds["matrix products"] / 1e9)
        both = seconds["attention, forward"] + seconds["attention, backward"]
        attentions.append(total.attention / both / 1e9)
    print(f"  GFLOP/s: products {_spread(products)}, attention {_spread(attentions)}; "
          f"a large product on its own, at best, {large_product():.0f}")  # fmt: skip


def _spread(rates: list[float]) -> str:
    low, median, high = np.percentile(rates, [25, 50, 75])
    return f"{median:.0f} [{low:.0f}, {high:.0f}]"


if __name__ == "__main__":
    main()
