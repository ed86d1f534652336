"""Measures forward and backward pass of the LM head on a CPU: whole logits against tiles of several sizes, in turns.

    python benchmarks/head.py --rounds 9

It prints the median of the rounds and their quartiles in milliseconds, for each shape.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from infopo.logps import lm_head, naive

WIDTH = 256
SHAPES = ((1_123, 4_096), (4_346, 4_096), (2_201, 32_000))
"""Numbers of scored tokens and of the vocabulary's tokens."""
TILES = (2**18, 2**20, 2**22)
COLUMNS = (1_024, 4_096, 32_000)
KEPT = lm_head.KEPT_LOGITS["cpu"]


def whole(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return naive.logps_from(hidden @ weight.T, targets)


def tiled(tile: int, columns: int, kept: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        lm_head.TILE_LOGITS["cpu"], lm_head.TILE_COLUMNS["cpu"] = tile, columns
        lm_head.KEPT_LOGITS["cpu"] = kept
        return lm_head.token_logps(hidden, weight, None, targets)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    default = lm_head.TILE_LOGITS["cpu"], lm_head.TILE_COLUMNS["cpu"]
    for scored, vocabulary in SHAPES:
        hidden = torch.randn(scored, WIDTH, requires_grad=True)
        weight = (torch.randn(vocabulary, WIDTH) / 16).requires_grad_()
        targets = torch.randint(vocabulary, (scored,))
        ways = {"whole logits": whole, "as it is": tiled(*default, KEPT), "nothing kept": tiled(*default, 0)}
        ways |= {
            f"nothing kept, tiles of {tile >> 10}k, {columns} columns": tiled(tile, columns, 0)
            for tile in TILES
            for columns in COLUMNS
            if columns <= max(vocabulary, COLUMNS[0])
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(1 + args.rounds):
            for name, way in ways.items():
                begin = time.perf_counter()
                way(hidden, weight, targets).sum().backward()
                seconds[name].append(time.perf_counter() - begin)
        print(f"{scored} scored tokens, vocabulary {vocabulary}, n = {args.rounds}")
        for name, rounds in seconds.items():
            low, median, high = np.percentile(rounds[1:], [25, 50, 75]) * 1e3
            print(f"  {median:7.1f} [{low:.1f}, {high:.1f}] ms  {name}")


if __name__ == "__main__":
    main()
