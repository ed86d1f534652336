"""Peak memory of `infopo pairs` by number of prompts: sampling a model, and pairing samples of a file again.

    python benchmarks/pairs_memory.py                       # 1,000, 3,000 and 10,000 prompts, 8 samples each
    python benchmarks/pairs_memory.py --prompts 100 400 --out /tmp/memory.json

Each measurement is a process of its own. The model is random and tiny, so that what grows is not hidden by what it
needs. Samples of the file have 2,000 characters each, so that 10,000 prompts are 160 MB of text.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from infopo.provenance import environment
from infopo.runs import write_json_atomic

SAMPLES = 8
CHARACTERS = 2000
OUT = Path(__file__).parent / "results" / "pairs-memory.json"

MARKS = """\
def length(prompts, completions, **columns):
    return [float(len(completion[0]["content"])) for completion in completions]
"""


def write_prompts(folder: Path, count: int) -> Path:
    """Writes short prompts, and the function that scores responses to them. The rows have a text of 600 characters."""
    path = folder / f"prompts-{count}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = {"prompt": [{"role": "user", "content": f"{number}+{number}=?"}], "about": "1+1=2 " * 100}
            file.write(json.dumps(row) + "\n")
    (folder / "marks.py").write_text(MARKS, encoding="utf-8")
    return path


def write_model(folder: Path) -> Path:
    """Writes a random model of a few thousand weights, with the lab's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from infopo.models import load_tokenizer

    tokenizer = load_tokenizer("lab:policy")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=1024, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    path = folder / "model"
    model = LlamaForCausalLM(config)
    # A model that knows nothing ends a response once in as many tokens as there are.
    model.generation_config.eos_token_id = [*range(0, len(tokenizer), 4), tokenizer.eos_token_id]
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write_samples(path: Path, prompts: Path) -> Path:
    """Writes samples to prompts as a store has them, line by line."""
    with path.open("w", encoding="utf-8") as file:
        for number, line in enumerate(prompts.read_text(encoding="utf-8").splitlines()):
            for sample in range(SAMPLES):
                record = {
                    "key": f"{number:016x}{sample:016x}", "task": "pairs", "item": f"row/{number}", "sample": sample,
                    "seed": 0, "weights": "made up", "law": {}, "prompt": json.loads(line)["prompt"],
                    "text": "x" * (CHARACTERS + sample), "token_ids": [], "tokens": None, "finished": True,
                    "logp": None,
                }  # fmt: skip
                file.write(json.dumps(record) + "\n")
    return path


def peak() -> float:
    """Returns the largest memory that this process has had (MiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def work(kind: str, count: int, folder: Path) -> dict[str, Any]:
    """Runs `infopo pairs` in this process, and returns its peak memory before and after."""
    from infopo.evaluation.pairing import PairingSettings
    from infopo.evaluation.settings import EvaluationSettings
    from infopo.workflows.pairs import pairs

    def run(prompts: Path, name: str) -> None:
        # Stored samples are paired as they are, however they were drawn.
        drawing = {} if kind == "pair" else {"max_new_tokens": 4, "batch_size": 512}
        settings = EvaluationSettings(tasks=["marks:length"], num_samples=SAMPLES, temperature=1.0, **drawing)
        samples = write_samples(folder / "samples.jsonl", prompts) if kind == "pair" else None
        pairs(
            None if kind == "pair" else str(folder / "model"), "marks:length", settings,
            PairingSettings(rule="best-worst", reject_unfinished=True), prompts=str(prompts), samples=samples,
            output=folder / f"{name}.jsonl",
        )  # fmt: skip

    # What is needed once for any number of prompts is there before the first measurement.
    run(write_prompts(folder, 64), "warm")
    before = peak()
    run(write_prompts(folder, count), "pairs")
    return {"kind": kind, "prompts": count, "before_mib": before, "peak_mib": peak()}


def measure(kind: str, count: int) -> dict[str, Any]:
    """Measures in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        # Memory that threads keep for themselves would hide what grows.
        alone = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", kind, str(count), folder]
        done = subprocess.run(command, env=alone, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[1000, 3000, 10_000])
    parser.add_argument("--kinds", nargs="+", default=["sample", "pair"], choices=("sample", "pair"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        kind, count, folder = options.worker
        print(json.dumps(work(kind, int(count), Path(folder))))
        return []
    rows = []
    for kind in options.kinds:
        for count in options.prompts:
            rows.append(measure(kind, count))
            print(rows[-1], flush=True)
    record = {
        "samples_per_prompt": SAMPLES,
        "characters": CHARACTERS,
        "rows": rows,
        "environment": environment(seed=0),
    }
    write_json_atomic(options.out, record)
    return rows


if __name__ == "__main__":
    main()
