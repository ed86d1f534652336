"""Measures what it costs to hash a model, beside the reference pass whose results the hash identifies.

    python benchmarks/reference_hash.py [--repeats 7] [--pairs 64] [--json results.json]

On this machine it measures the hash of a small Llama (hidden 256, 6 layers, vocabulary 4096), the hash of 1 GiB of
bfloat16 weights, and the reference pass of the small model over random pairs. It projects an 8B model in bfloat16,
whose pass takes 2 x parameters FLOP per token at a stated rate, and whose hash runs at the rate measured here.
"""

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from infopo.data.examples import ExampleDataset
from infopo.hashing import hash_weights
from infopo.logps import attention
from infopo.records import PreferenceExample
from infopo.reference_pass import precompute

PROMPT, RESPONSE = 200, 100
"""Tokens of each prompt and each response."""

PARAMETERS, BYTES = 8.0e9, 16.1e9
"""Size of an 8B model in bfloat16."""

FLOPS = 400e12
"""Useful bfloat16 FLOP per second of one H100, 40 % of its dense peak. A faster pass makes the hash weigh more."""

TOKENS_PROJECTED = {
    "UltraFeedback, rejected sides (61k pairs x 450 tokens)": 61e3 * 450,
    "10k pairs": 10e3 * 450,
}


class Weights(torch.nn.Module):
    """Contains 1 GiB of bfloat16 weights, in matrices as large as those of an 8B model."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(4096, 14336)] * 6 + [(4096, 4096)] * 11
        self.matrices = torch.nn.ParameterList(torch.randn(s).to(torch.bfloat16) for s in sizes)


def spread(run: Callable[[], object], repeats: int) -> dict[str, float]:
    """Returns median, minimum and maximum of the seconds of `repeats` runs, after one run that does not count."""
    run()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "n": repeats}


def formatted(seconds: dict[str, float], scale: float = 1.0) -> str:
    low, high = scale * seconds["min"], scale * seconds["max"]
    return (
        f"{scale * seconds['median']:.3g} [{low:.3g}, {high:.3g}] (n = {seconds['n']:.0f}, median [min, max])"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    small = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()
    attention.enable(small)
    rng = random.Random(0)

    def ids(length: int) -> list[int]:
        return [rng.randrange(3, 4096) for _ in range(length)]

    pairs = [
        PreferenceExample(ids(PROMPT), [ids(RESPONSE)], [ids(RESPONSE)], f"{i}") for i in range(options.pairs)
    ]
    dataset, rejected = ExampleDataset.from_examples(pairs), frozenset({"rejected"})
    big = Weights()
    size = sum(p.numel() * p.element_size() for p in big.parameters())
    hash_big = spread(lambda: hash_weights(big), options.repeats)
    hash_small = spread(lambda: hash_weights(small), options.repeats)
    device = torch.device("cpu")
    pass_small = spread(
        lambda: precompute(dataset, small, rejected, batch_size=4, device=device), options.repeats
    )
    tokens = options.pairs * (PROMPT + RESPONSE)
    rate = size / hash_big["median"]
    print(f"cores {os.cpu_count()}, torch threads {torch.get_num_threads()}")
    print(f"hash of {size / 2**30:.2f} GiB: {formatted(hash_big)} s; {rate / 1e9:.2f} GB/s at the median")
    print(f"hash of the small model ({small.num_parameters() / 1e6:.1f} M): {formatted(hash_small)} s")
    print(f"its reference pass, {options.pairs} pairs, {tokens} tokens: {formatted(pass_small)} s")
    share = hash_small["median"] / pass_small["median"]
    least = 100 * tokens * share / 3
    print(f"share of the hash in that pass: {share:.2%}; below 3 % from {least:.0f} tokens on")
    projected = {}
    for name, count in TOKENS_PROJECTED.items():
        passed = 2 * PARAMETERS * count / FLOPS
        projected[name] = BYTES / rate / passed
        print(
            f"projected, 8B on one accelerator at {FLOPS / 1e12:.0f} TFLOP/s, {name}: pass {passed:.0f} s, hash "
            f"{BYTES / rate:.1f} s, {projected[name]:.2%}"
        )
    least_pass = BYTES / rate / 0.03
    print(f"projected: the hash of an 8B model is below 3 % of passes that take more than {least_pass:.0f} s")
    if options.json:
        results = {"hash_big": hash_big, "hash_small": hash_small, "pass_small": pass_small}
        results |= {"bytes": size, "share": share, "projected": projected}
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
