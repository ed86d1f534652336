"""Shows what a step costs on a GPU, beside what the card can do: rates, kernels, waits of the host, and the head.

    python benchmarks/gpu_profile.py --json benchmarks/results/gpu-profile.json

It measures the card's matrix rate and bandwidth first. MFU is the model's FLOPs without recomputation over time and
that rate.
"""

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import flops
import regimes
from card import ceilings, median, milliseconds
from infopo.data.packing import PreferenceCollator
from infopo.logps import attention, forest, kernels, lm_head
from infopo.logps.compiling import compile_layers
from infopo.logps.forward import response_logps
from shapes import SHAPES, build_model
from speed import hardware, versions

Result = dict[str, Any]


def waits(run: Callable[[], Any]) -> list[str]:
    """Returns where the host waits for the device during a run."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sorted({f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)})


def step(job: Result, autocast: bool, compiled: bool, rounds: int, rate: float) -> Result:
    """Measures forward and backward pass of one device batch of the job's regime, with activation checkpointing."""
    torch.cuda.empty_cache()
    model = build_model(job, seed=0)
    if autocast:
        model = model.float()
    reason = attention.enable(model)
    model.activation_checkpointing_enable()
    model.train()
    seconds = time.perf_counter()
    if compiled:
        compile_layers(model, "inductor")
    examples = regimes.draw(job["regime"], job["batch"], job["vocabulary"])
    [on_host] = PreferenceCollator(shared=True, plan=forest.Plan.of)(examples)
    signs = torch.linspace(-1, 1, on_host.num_responses, device="cuda", dtype=torch.float64)

    def run() -> None:
        with torch.autocast("cuda", torch.bfloat16) if autocast else nullcontext():
            logps = response_logps(model, on_host.to("cuda"))
        (logps * signs).sum().backward()
        model.zero_grad(set_to_none=False)

    def forward() -> None:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16) if autocast else nullcontext():
            response_logps(model, on_host.to("cuda"))

    run()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - seconds
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = milliseconds(run, rounds)
    peak = torch.cuda.max_memory_allocated() - start
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    host = (time.perf_counter() - begin) * 1e3
    torch.cuda.synchronize()
    work = flops.packed_work(examples)
    needed = flops.step_flops(model.config, work, head_matmuls=3)
    found = waits(run)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    averages = profiler.key_averages()
    top = sorted(averages, key=lambda e: -e.self_device_time_total)[:25]
    total = sum(e.self_device_time_total for e in averages)
    return {
        "autocast": autocast,
        "compiled": compiled,
        "seconds_of_first": seconds,
        "path": reason or "forest",
        "tokens": work.tokens,
        "scored": work.scored,
        "ms": times,
        "forward_ms": median(milliseconds(forward, rounds)),
        "host_ms": host,
        "step_mib": peak / 2**20,
        "tflops": needed.total / 1e12,
        "flop_parts": {n: getattr(needed, n) / 1e12 for n in ("linear", "attention", "head")},
        "mfu": needed.total / 1e9 / median(times) / rate,
        "waits": found,
        "device_ms": total / 1e3,
        "top": [[e.key[:90], e.count, round(e.self_device_time_total / 1e3, 2)] for e in top],
    }  # fmt: skip


def fused_heads(rounds: int, scored: int = 8192, width: int = 2048, vocabulary: int = 128256) -> Result:
    """Measures heads of other libraries beside ours: milliseconds, MiB, and the error of gradients with weights.

    The weights of the gradient are random between -4 and 4, as those of a preference loss may be. The error is the norm
    of the difference from whole logits in float32, relative to the norm.
    """
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    hidden = torch.randn(scored, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocabulary, width, device="cuda") / width**0.5).bfloat16().requires_grad_()
    targets = torch.randint(vocabulary, (scored,), device="cuda")
    signs = torch.empty(scored, device="cuda").uniform_(-4, 4)

    def whole(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return -torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")

    exact = torch.zeros_like(hidden, dtype=torch.float32), torch.zeros_like(weight, dtype=torch.float32)
    for rows in torch.arange(scored, device="cuda").split(1024):
        h, w = hidden[rows].detach().float().requires_grad_(), weight.detach().float().requires_grad_()
        loss = torch.nn.functional.cross_entropy(h @ w.T, targets[rows], reduction="none")
        (-loss * signs[rows]).sum().backward()
        exact[0][rows] = h.grad
        exact[1].add_(w.grad)

    heads: dict[str, Callable[..., torch.Tensor]] = {
        "infopo": lambda h, w: lm_head.token_logps(h, w, None, targets),
        "whole logits": whole,
    }
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        heads["liger"] = lambda h, w: (
            -liger_fused_linear_cross_entropy(h, w, targets, reduction="none", accum_dtype=torch.float32)
        )
    except ImportError as error:
        print(f"no Liger: {error}")
    try:
        from cut_cross_entropy import linear_cross_entropy

        heads["cce_exact"] = lambda h, w: (
            -linear_cross_entropy(h, w, targets, reduction="none", impl="cce_exact")
        )
    except ImportError as error:
        print(f"no CCE: {error}")
    found: Result = {}
    for name, run in heads.items():
        try:

            def both(run: Callable[..., torch.Tensor] = run) -> None:
                hidden.grad = weight.grad = None
                (run(hidden, weight).float() * signs).sum().backward()

            both()
            torch.cuda.reset_peak_memory_stats()
            start = torch.cuda.memory_allocated()
            times = milliseconds(both, rounds)
            peak = (torch.cuda.max_memory_allocated() - start) / 2**20
            errors = [
                float((p.grad.float() - e).norm() / e.norm())
                for p, e in zip((hidden, weight), exact, strict=True)
            ]
            found[name] = {"ms": times, "mib": peak, "errors of gradients": errors}
        except Exception as error:
            found[name] = {"failed": repr(error)[:300]}
    return found


def head(rounds: int, scored: int = 8192, width: int = 2048, vocabulary: int = 128256) -> Result:
    """Measures forward and backward pass of the head, as it is and in tiles of other sizes: milliseconds and MiB."""
    torch.cuda.empty_cache()
    hidden = torch.randn(scored, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocabulary, width, device="cuda") / width**0.5).bfloat16().requires_grad_()
    targets = torch.randint(vocabulary, (scored,), device="cuda")
    found: Result = {}
    tile = lm_head.DEFAULT_TILE_LOGITS
    for name, logits, columns, kept in (
        ("as it is", tile, None, 0),
        ("tiles of 2^27", 2**27, None, 0),
        ("tiles of 2^28", 2**28, None, 0),
        ("whole rows, 2^26", 2**26, vocabulary, 0),
        ("whole rows, 2^28", 2**28, vocabulary, 0),
        ("as it is, 2^28 kept", tile, None, 2**28),
        ("as it is, all kept", tile, None, 2**31),
    ):
        lm_head.DEFAULT_TILE_LOGITS, lm_head.KEPT_LOGITS["cuda"] = logits, kept
        lm_head.TILE_COLUMNS.pop("cuda", None)
        if columns is not None:
            lm_head.TILE_COLUMNS["cuda"] = columns

        def run() -> None:
            hidden.grad = weight.grad = None
            lm_head.token_logps(hidden, weight, None, targets).sum().backward()

        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        times = milliseconds(run, rounds)
        found[name] = [median(times), (torch.cuda.max_memory_allocated() - start) / 2**20]
    lm_head.DEFAULT_TILE_LOGITS, lm_head.KEPT_LOGITS["cuda"] = tile, 0
    lm_head.TILE_COLUMNS.pop("cuda", None)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", default="1b")
    parser.add_argument("--regime", default="i")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--heads-only", action="store_true", help="only the head, beside other libraries'")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    logging.getLogger("infopo").setLevel(logging.INFO)
    result: Result = {"hardware": hardware("cuda"), "versions": versions(), "ceilings": ceilings()}
    print(json.dumps(result), flush=True)

    def write() -> None:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    vocabulary = SHAPES[args.model]["vocab_size"]
    job = {"model": args.model, "vocabulary": vocabulary, "device": "cuda", "variant": "infopo",
           "regime": args.regime, "batch": args.batch}  # fmt: skip
    result["steps"] = []
    for autocast, compiled in () if args.heads_only else ((False, False), (True, False), (False, True)):
        result["steps"].append(step(job, autocast, compiled, args.rounds, result["ceilings"]["tflops"]))
        write()
        shown = {name: value for name, value in result["steps"][-1].items() if name != "top"}
        print(json.dumps(shown), flush=True)
    result["head"] = head(args.rounds)
    write()
    result["fused heads"] = fused_heads(args.rounds)
    result["kernels"] = {str(call): kernel.name for call, kernel in kernels._chosen.items()}
    write()
    print(json.dumps([result["head"], result["fused heads"]], indent=1))


if __name__ == "__main__":
    main()
