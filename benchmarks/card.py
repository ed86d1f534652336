"""Measures what a GPU can do: the rate of large matrix products, and of copies."""

from collections.abc import Callable
from typing import Any

import torch


def milliseconds(run: Callable[[], Any], rounds: int) -> list[float]:
    """Returns the device's milliseconds of each round, after one that warms up."""
    run()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def ceilings() -> dict[str, float]:
    """Returns the rate of products of 8192 x 8192 bfloat16 matrices (TFLOP/s), and of copies, read and write (GB/s)."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = median(milliseconds(lambda: a @ b, 20))
    source = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = median(milliseconds(lambda: target.copy_(source), 10))
    return {"tflops": 2 * 8192**3 / product / 1e9, "copy_gb_s": 4 * 2**30 / copy / 1e6}
