"""Compares InfoPOTrainer with TRL's DPOTrainer: seconds and memory of a training step on the same examples.

    python benchmarks/speed.py --regimes i,ii,iii,hh,k,m --rounds 9 --json benchmarks/results/cpu.json

benchmarks/README.md says what is measured, and how.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

import flops
import regimes
from shapes import SHAPES, build_model, build_tokenizer, model_config

HERE = Path(__file__).resolve().parent
VARIANTS = ("infopo", "trl", "trl_precomputed", "trl_best")
EXTRA = ("trl_accumulated", "infopo_whole", "infopo_compiled", "infopo_objective")
PEERS = (*VARIANTS[1:], *EXTRA[:3])
"""Variants that compute the same loss as `infopo`, in another way."""
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "67108864",
}
"""Settings of glibc under which freed memory stays in the process, as in the allocator of a GPU.

With glibc's defaults TRL, whose temporaries are larger, spends half of its time on page faults.
"""

LINEARITY_COUNTS = (1, 2, 5, 10, 21, 42)
"""Numbers of examples of 768 tokens, which are rows of 768 to 32,256 tokens."""
ALLOWED_LOSS_DIFFERENCE = {"cpu": 1e-3, "cuda": 5e-2}
Result = dict[str, Any]


# ---- processes ------------------------------------------------------------------------------------------------------


class Worker:
    """The process of a variant, which runs `worker.py`."""

    def __init__(self, job: Mapping[str, Any], log: IO[str]) -> None:
        self.job, self.log = job, log
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={
                **os.environ,
                **ALLOCATOR,
                "OMP_NUM_THREADS": str(job["threads"]),
                "MKL_NUM_THREADS": str(job["threads"]),
                "HF_HUB_OFFLINE": "1",
                "HF_DATASETS_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "PYTHONPATH": os.pathsep.join(
                    filter(None, [str(HERE.parent / "src"), os.environ.get("PYTHONPATH")])
                ),
            },
        )

    def turn(self) -> dict[str, Any]:
        """Lets the process run its next turn, during which nothing else runs, and returns its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            # The process has ended. What went wrong is in its log, which is shown below.
            pass
        answer = self.process.stdout.readline()
        if not answer:
            self.log.flush()
            tail = Path(self.log.name).read_text(encoding="utf-8")[-3000:]
            raise RuntimeError(f"{self.job['kind']} of {self.job['variant']} ended early:\n{tail}")
        return json.loads(answer)

    def stop(self) -> None:
        """Ends the process, even if it still waits for a turn."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def workers(jobs: Sequence[Mapping[str, Any]]) -> Iterator[list[Worker]]:
    """Starts one process per job, and ends them when the block is left."""
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        started = []
        for number, job in enumerate(jobs):
            folder = Path(job["logs"] or temporary)
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{job['kind']}-{job.get('regime')}-{job['variant']}-{number}.log"
            log = stack.enter_context((folder / name).open("w", encoding="utf-8"))
            started.append(Worker(job, log))
            stack.callback(started[-1].stop)
        yield started


def interleaved(jobs: Sequence[Mapping[str, Any]], turns: int) -> list[list[dict[str, Any]]]:
    """Returns the answers of each job's turns, (jobs, turns).

    The jobs take turns, one process at a time, and each round begins with another job. On a GPU the jobs run one after
    the other, unless `--together` says that their models fit beside each other.
    """
    if jobs[0]["device"] == "cuda" and not jobs[0]["together"] and len(jobs) > 1:
        return [answers for job in jobs for answers in interleaved([job], turns)]
    answers: list[list[dict[str, Any]]] = [[] for _ in jobs]
    with workers(jobs) as started:
        for turn in range(turns):
            for shift in range(len(jobs)):
                number = (turn + shift) % len(jobs)
                begin = time.perf_counter()
                answers[number].append(started[number].turn())
                # A run that is cut off leaves its turns here. The first turn includes the start of the process.
                said = {k: jobs[number].get(k) for k in ("kind", "variant", "regime")}
                said |= {"turn": turn, "waited": round(time.perf_counter() - begin, 2)}
                said |= {"seconds": answers[number][-1].get("seconds")}
                print(json.dumps(said), file=sys.stderr, flush=True)
    return answers


# ---- measurements ---------------------------------------------------------------------------------------------------


def spread(rounds: Sequence[float]) -> dict[str, Any]:
    """Returns median, quartiles and range of the rounds, with the rounds themselves."""
    low, median, high = np.percentile(rounds, [25, 50, 75])
    return {
        "median": float(median),
        "quartiles": [float(low), float(high)],
        "range": [min(rounds), max(rounds)],
        "rounds": list(rounds),
    }


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """Returns how many times as long they take as we do, round by round."""
    return spread([a / b for a, b in zip(theirs, ours, strict=True)])


def measure_regime(name: str, job: Mapping[str, Any], variants: Sequence[str], rounds: int) -> Result:
    """Measures seconds, memory and losses of one regime."""
    batch = job["batch"] or regimes.REGIMES[name].batch
    job = {**job, "kind": "train", "regime": name, "rounds": rounds, "batch": batch}
    turns = regimes.plan(name, rounds, job["steps"], batch, job["vocabulary"], job["seed"])
    answers = dict(
        zip(variants, interleaved([{**job, "variant": v} for v in variants], len(turns)), strict=True)
    )
    seconds = {v: [a["seconds"] for a in answers[v][1:-1]] for v in variants}
    step_mib = {v: _worst(answers[v][-1]["step_mib"]) for v in variants}
    work = {v: _work(v, job, turns[1:-1]) for v in variants}
    peers = [v for v in variants if v in PEERS]
    result: Result = {"regime": name, "examples_a_step": batch, "steps_a_round": job["steps"]}
    for v in peers:
        result[f"ratio_{v}"] = ratios(seconds[v], seconds["infopo"])
    flop_ratio = {v: work[v]["flops"] / work["infopo"]["flops"] for v in peers}
    result |= {
        "peak_memory_ratio": {
            v: step_mib["infopo"] / step_mib[v] if step_mib["infopo"] and step_mib[v] else None for v in peers
        },
        "step_mib": step_mib,
        "flop_ratio": flop_ratio,
        "flop_share": {v: result[f"ratio_{v}"]["median"] / flop_ratio[v] for v in peers},
        "seconds": {v: spread(seconds[v]) for v in variants},
        "flops_a_second": {
            v: work[v]["flops"] / sum(seconds[v]) for v in variants
        },
        "mfu": {
            v: _needed(job, turns[1:-1]) / sum(seconds[v]) / job["tflops"] / 1e12 for v in variants
        } if job["tflops"] and not job["lora"] else None,
        "loss": answers["infopo"][0]["losses"][0],
        "losses": {v: answers[v][0]["losses"][0] for v in variants},
        "loss_difference": None,
        "tokens": _tokens(turns[1:-1], work),
        "parts": {v: _parts(answers[v][1:-1]) for v in variants if v.startswith("infopo") and job["parts"]},
    }  # fmt: skip
    return result


def loss_difference(losses: Mapping[str, float], device: str) -> float:
    """Returns the largest difference of DPO's loss from ours on the first step, which all variants share.

    They share its examples and weights. The reference has other weights than the policy, because otherwise the loss
    would be log 2 whatever is computed.

    Raises:
        RuntimeError: The difference is more than rounding.
    """
    losses = {v: loss for v, loss in losses.items() if v != "infopo_objective"}
    differences = [abs(loss - losses["infopo"]) for loss in losses.values()]
    # Written so that NaN fails, too.
    if not all(d <= ALLOWED_LOSS_DIFFERENCE[device] for d in differences):
        raise RuntimeError(f"the variants do not compute the same loss: {losses}")
    return max(differences)


def _worst(step_mib: Sequence[float | None]) -> float | None:
    return max((mib for mib in step_mib if mib is not None), default=None)


def _work(variant: str, job: Mapping[str, Any], turns: Sequence[regimes.Turn]) -> dict[str, float]:
    """Returns FLOPs and positions of the rounds, by the formula in README.md."""
    config = model_config(job["model"], job["vocabulary"])
    if not variant.startswith("infopo"):
        turns = regimes.as_pairs(turns)
    if variant == "trl_best":
        turns = [regimes.grouped(turn) for turn in turns]
    total, tokens = flops.variant_flops(
        variant, config, [s for t in turns for s in t], job["device"] == "cuda"
    )
    return {"flops": total.total, "tokens": tokens}


def _needed(job: Mapping[str, Any], turns: Sequence[regimes.Turn]) -> float:
    """Returns the FLOPs that the rounds need, with each token once and nothing computed twice."""
    config = model_config(job["model"], job["vocabulary"])
    works = [flops.packed_work(step) for turn in turns for step in turn]
    return sum(flops.step_flops(config, work, head_matmuls=3).total for work in works)


def _tokens(turns: Sequence[regimes.Turn], work: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Returns the positions per step that each variant computes, and those that the data contain."""
    steps = [step for turn in turns for step in turn]
    pairs = [p for turn in regimes.as_pairs(turns) for step in turn for p in step]
    rows = sum(len(p.prompt_ids) + len(ids) for p in pairs for ids in p.response_ids)
    # TRL's own sampler would group over the whole run, which saves a little more padding than grouping over a round.
    group = len(pairs) // len(steps)
    whole_run = regimes.grouped([pairs[i : i + group] for i in range(0, len(pairs), group)])
    padded = sum(flops.padded_work(step, responses_only=True).tokens for step in whole_run)
    return {
        "computed": {v: w["tokens"] / len(steps) for v, w in work.items()},
        "response": sum(len(ids) for s in steps for e in s for ids in e.response_ids) / len(steps),
        "rows": rows / len(steps),
        "grouped_over_the_whole_run": padded / len(steps),
    }


def _parts(answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the shares of a step: layers forward, head and layout, backward, optimizer, and all that is outside."""
    seconds = sum(a["seconds"] for a in answers)
    part = {name: sum(a["parts"][name] for a in answers) / seconds for name in answers[0]["parts"]}
    return {
        "layers_forward": part["layers"],
        "head_and_layout_forward": part["logps"] - part["layers"],
        "backward": part["backward"],
        "optimizer": part["optimizer"],
        "outside": 1 - part["logps"] - part["backward"] - part["optimizer"],
    }


def measure_reference(job: Mapping[str, Any], rounds: int) -> Result:
    """Measures the reference pass of regime i: ours for DPO (both sides) and for InfoPO (rejected), and TRL's."""
    batch = job["batch"] or regimes.REGIMES["i"].batch
    job = {**job, "kind": "reference", "regime": "i", "rounds": rounds, "batch": batch}
    variants = ("infopo", "infopo_objective", "trl_precomputed")
    answers = interleaved([{**job, "variant": v} for v in variants], rounds + 1)
    seconds = {v: [x["seconds"] for x in a[1:]] for v, a in zip(variants, answers, strict=True)}
    return {
        "regime": "i",
        "ratio_both_sides": ratios(seconds["trl_precomputed"], seconds["infopo"]),
        "ratio_infopo": ratios(seconds["trl_precomputed"], seconds["infopo_objective"]),
        "seconds": {v: spread(s) for v, s in seconds.items()},
        "largest_difference": max(
            abs(ours["sum"] - theirs["sum"]) for ours, theirs in zip(answers[1], answers[2], strict=True)
        ),
    }


def measure_linearity(job: Mapping[str, Any], rounds: int) -> Result:
    """Measures the seconds per token of packed rows of 1k to 32k tokens, and the exponent of time in tokens.

    An exponent of 1 means that time is linear in tokens.
    """
    counts = [c for _ in range(1 + rounds) for c in LINEARITY_COUNTS]
    [answers] = interleaved(
        [{**job, "kind": "linearity", "variant": "infopo", "counts": counts}], len(counts)
    )
    measured = answers[len(LINEARITY_COUNTS) :]
    tokens = [a["tokens"] for a in measured[: len(LINEARITY_COUNTS)]]
    seconds = [statistics.median(a["seconds"] for a in measured if a["tokens"] == t) for t in tokens]
    exponent = np.polyfit(np.log(tokens), np.log(seconds), 1)[0]
    return {
        "tokens": tokens,
        "seconds": seconds,
        "seconds_a_token": [s / t for s, t in zip(seconds, tokens, strict=True)],
        "exponent": float(exponent),
    }


def measure_end_to_end(job: Mapping[str, Any], pairs: int, rounds: int) -> Result:
    """Measures one epoch of regime i, from rows of text to a saved model, as a user's script calls each trainer."""
    variants = ("infopo", "trl", "trl_precomputed")
    batch = job["batch"] or regimes.REGIMES["i"].batch
    seconds: dict[str, list[float]] = {v: [] for v in variants}
    with tempfile.TemporaryDirectory() as folder:
        build_model({**job, "device": "cpu", "variant": "infopo"}, seed=0).save_pretrained(f"{folder}/model")
        build_tokenizer(job["vocabulary"]).save_pretrained(f"{folder}/model")
        write_text(Path(folder, "pairs.jsonl"), regimes.draw("i", pairs, job["vocabulary"], job["seed"]))
        for number in range(rounds):
            for shift in range(len(variants)):
                variant = variants[(number + shift) % len(variants)]
                # Each run has a cache of its own. Otherwise a later round would reuse the tokens of an earlier one.
                own = Path(folder, f"{number}-{variant}")
                paths = {"folder": f"{folder}/model", "data": f"{folder}/pairs.jsonl",
                         "output": f"{own}/out", "cache": f"{own}/cache"}  # fmt: skip
                run = {**job, "kind": "end_to_end", "variant": variant, "batch": batch, **paths}
                [[answer]] = interleaved([run], 1)
                seconds[variant].append(answer["seconds"])
    return {
        "regime": "i",
        "pairs": pairs,
        "ratio_trl": ratios(seconds["trl"], seconds["infopo"]),
        "ratio_trl_precomputed": ratios(seconds["trl_precomputed"], seconds["infopo"]),
        "seconds": {v: spread(s) for v, s in seconds.items()},
    }


def write_text(path: Path, examples: Sequence[Any]) -> None:
    """Writes rows of text whose tokens are those of the examples."""
    with path.open("w", encoding="utf-8") as file:
        for e in examples:
            row = {
                "prompt": " ".join(map(str, e.prompt_ids)),
                "chosen": "".join(f" {i}" for i in e.chosen_ids[0]),
                "rejected": "".join(f" {i}" for i in e.rejected_ids[0]),
            }
            file.write(json.dumps(row) + "\n")


# ---- the record -----------------------------------------------------------------------------------------------------


def hardware(device: str) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        cpu = next((x.split(":")[1].strip() for x in info.open() if x.startswith("model name")), cpu)
    facts: dict[str, Any] = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    if device == "cuda":
        import torch

        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def versions() -> dict[str, str]:
    names = ("infopo", "torch", "transformers", "trl", "accelerate")
    installed = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    return {"python": platform.python_version()} | {
        n: importlib.metadata.version(n) for n in names if n in installed
    }


def commit() -> str | None:
    """Returns the commit that is measured, marked if files differ from it, or None outside of a checkout."""
    done = subprocess.run(
        ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
        cwd=HERE, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip() or None


SHOWN = {
    "trl": "TRL, reference in the loop",
    "trl_precomputed": "TRL, precomputed",
    "trl_best": "TRL at its best",
    "trl_accumulated": "that, a pair a batch",
    "infopo_whole": "ours in one piece",
    "infopo_compiled": "ours, compiled",
}


def table(result: Result) -> str:
    """Returns a Markdown table of the regimes.

    It shows how many times as long others take (median of rounds [quartiles]), and the memory of our step relative to
    theirs.
    """
    peers = [v for v in SHOWN if any(f"ratio_{v}" in regime for regime in result["regimes"])]
    memory = [v for v in peers if v != "trl"]
    header = ["regime", *(f"time: {SHOWN[v]}" for v in peers), "of the FLOP ratio", "step: MiB"]
    header += [f"memory: {SHOWN[v]}" for v in memory]
    lines = [header, ["---"] * len(header)]
    for regime in result["regimes"]:
        if "skipped" in regime:
            lines.append([regime["regime"], regime["skipped"], *[""] * (len(header) - 2)])
            continue
        cells = [regime["regime"], *(_ratio(regime.get(f"ratio_{v}")) for v in peers)]
        cells.append(" / ".join(_cell(regime["flop_share"].get(v), ".0%") for v in peers))
        cells.append(_cell(regime["step_mib"]["infopo"], ".0f"))
        cells += [_cell(regime["peak_memory_ratio"].get(v), ".2f") for v in memory]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _ratio(ratio: Mapping[str, Any] | None) -> str:
    if ratio is None:
        return "-"
    low, high = ratio["quartiles"]
    return f"{ratio['median']:.2f} [{low:.2f}, {high:.2f}]"


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


# ---- command line ---------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--regimes", default=",".join(regimes.REGIMES), help="comma-separated, or empty for none"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps per round")
    parser.add_argument("--pairs-per-step", type=int, help="examples per step (default: each regime's own)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--autocast", action="store_true", help="on a GPU: float32 weights under bfloat16 autocast"
    )
    parser.add_argument(
        "--together", action="store_true", help="on a GPU: all variants at once, in turns, as on a CPU"
    )
    parser.add_argument(
        "--lora", action="store_true", help="train adapters of rank 16 on all linear layers, as TRL with PEFT"
    )
    parser.add_argument("--logs", type=Path, help="folder in which what the processes print is kept")
    parser.add_argument("--model", choices=tuple(SHAPES), help="default: a4k on a CPU, 1b on a GPU")
    parser.add_argument("--vocab", type=int, help="default: the model's own")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument(
        "--variants",
        default=",".join(VARIANTS),
        help=f"infopo and any of the others and of {', '.join(EXTRA)}",
    )
    parser.add_argument(
        "--clock",
        choices=("wall", "processor"),
        default="wall",
        help="processor: seconds that a processor worked for the turn, which other work on the machine changes little; "
        "with one thread and nothing else running, both are the same",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--json", type=Path, required=True, help="the result file, which is written after each part"
    )
    parser.add_argument("--reference", action="store_true", help="also the reference pass")
    parser.add_argument(
        "--overhead", action="store_true", help="also the parts of our step (this synchronises with the GPU)"
    )
    parser.add_argument("--linearity", action="store_true", help="also rows of 1k to 32k tokens")
    parser.add_argument("--end-to-end", action="store_true", help="also an epoch from text to a saved model")
    parser.add_argument("--end-to-end-pairs", type=int, default=2000)
    parser.add_argument("--end-to-end-rounds", type=int, default=3)
    args = parser.parse_args(argv)
    args.regimes = [name for name in args.regimes.split(",") if name]
    args.variants = args.variants.split(",")
    args.model = args.model or ("1b" if args.device == "cuda" else "a4k")
    args.vocab = args.vocab or SHAPES[args.model]["vocab_size"]
    if args.clock == "processor" and (args.device == "cuda" or args.threads > 1 or args.end_to_end):
        parser.error("--clock processor: is of turns on a CPU with --threads 1")
    if unknown := set(args.regimes) - set(regimes.REGIMES):
        parser.error(f"--regimes: expected some of {', '.join(regimes.REGIMES)}, got {', '.join(unknown)}")
    if "infopo" not in args.variants or set(args.variants) - {*VARIANTS, *EXTRA}:
        parser.error(f"--variants: expected infopo and some of {', '.join((*PEERS, *EXTRA[2:]))}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    job = {"model": args.model, "vocabulary": args.vocab, "device": args.device, "threads": args.threads,
           "steps": args.steps, "batch": args.pairs_per_step, "seed": args.seed, "parts": args.overhead,
           "autocast": args.autocast, "together": args.together, "lora": args.lora,
           "logs": args.logs and str(args.logs), "clock": args.clock}  # fmt: skip
    rates = None
    if args.device == "cuda":
        from card import ceilings

        rates = ceilings()
    job["tflops"] = rates and rates["tflops"]
    result: Result = {
        "schema": 1,
        "hardware": {**hardware(args.device), **(rates or {})},
        "versions": versions(),
        "commit": commit(),
        "command": shlex.join(
            ["python", "benchmarks/speed.py", *(argv if argv is not None else sys.argv[1:])]
        ),
        "settings": {
            "model": {"name": args.model, **SHAPES[args.model], "vocab_size": args.vocab},
            "dtype": "float32 weights, bfloat16 autocast"
            if args.autocast
            else "bfloat16"
            if args.device == "cuda"
            else "float32",
            "gradient_checkpointing": args.device == "cuda",
            "lora": args.lora,
            "device": args.device,
            "threads": args.threads,
            "clock": args.clock,
            "allocator": ALLOCATOR,
            "optimizer": "adamw_torch_fused, learning rate 1e-5, no weight decay, gradient norm clipped at 1",
            "loss": "DPO, beta 0.1",
            "steps_a_round": args.steps,
            "seed": args.seed,
        },
        "regimes": [],
    }

    def write() -> None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    print(json.dumps({k: result[k] for k in ("hardware", "versions", "settings")}, indent=1), flush=True)
    for name in args.regimes:
        try:
            result["regimes"].append(measure_regime(name, job, args.variants, args.rounds))
            # What was measured is kept, even if it turns out to be worth nothing.
            write()
            result["regimes"][-1]["loss_difference"] = loss_difference(
                result["regimes"][-1]["losses"], args.device
            )
        except FileNotFoundError as error:
            result["regimes"].append({"regime": name, "skipped": str(error)})
        write()
        print(table(result), flush=True)
    if args.overhead:
        result["overhead"] = {
            r["regime"]: r["parts"]["infopo"]["outside"] for r in result["regimes"] if "parts" in r
        }
    if args.reference:
        result["reference_pass"] = measure_reference(job, args.rounds)
        write()
    if args.linearity:
        result["linearity"] = measure_linearity(job, min(args.rounds, 3))
        write()
    if args.end_to_end:
        result["end_to_end"] = measure_end_to_end(job, args.end_to_end_pairs, args.end_to_end_rounds)
    write()
    extras = {k: result[k] for k in ("overhead", "reference_pass", "linearity", "end_to_end") if k in result}
    print(json.dumps(extras, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
