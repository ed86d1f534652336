"""What drawing with a seed per sample costs beside transformers' own sampling.

    python benchmarks/generation.py --json benchmarks/results/generation.json

Both draw responses of the same length to the same prompts by the same law, in the same batches, and take turns. The
model is a random Llama (width 256, 6 layers, vocabulary 4096), and none of its tokens ends a response, so that all
have the same length. Times are those of the processor, because other work may share it.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from infopo.evaluation.drawing import Request, draw
from infopo.evaluation.law import Law
from infopo.generate import left_pad
from infopo.models import LAB_POLICY, load_tokenizer
from infopo.provenance import environment
from infopo.runs import write_json_atomic

PROMPT, RESPONSE, PROMPTS = 64, 64, 128
VOCABULARY = 4096


def model_of(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def ours(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]], batch: int
) -> None:
    requests = [Request(ids, seed) for seed, ids in enumerate(prompts)]
    found = list(draw(model, tokenizer, requests, Law(RESPONSE, 1.0), ends=[VOCABULARY], batch_size=batch))
    assert [len(drawn.token_ids) for _, drawn in found] == [RESPONSE] * len(prompts)


def theirs(model: LlamaForCausalLM, prompts: list[list[int]], batch: int) -> None:
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=RESPONSE, pad_token_id=0
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for start in range(0, len(prompts), batch):
            input_ids, mask = left_pad(prompts[start : start + batch], 0)
            rows = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=settings)
            assert rows.shape[1] == PROMPT + RESPONSE


def timed(function: Callable[..., None], *arguments: Any) -> tuple[float, float]:
    """Returns seconds of the processor and of the clock that a call takes."""
    processor, clock = time.process_time(), time.perf_counter()
    function(*arguments)
    return time.process_time() - processor, time.perf_counter() - clock


def compared(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    batch: int,
    rounds: int,
) -> dict[str, Any]:
    """Returns tokens per second of both, and their ratios over rounds in which they take turns, each first in half."""
    ours(model, tokenizer, prompts[:batch], batch)
    theirs(model, prompts[:batch], batch)
    calls = {
        "infopo": (ours, model, tokenizer, prompts, batch),
        "transformers": (theirs, model, prompts, batch),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: 1 if number % 2 else -1]:
            seconds[name].append(timed(*calls[name]))
    tokens = len(prompts) * RESPONSE
    ratios = [
        [mine[kind] / other[kind] for mine, other in zip(*seconds.values(), strict=True)] for kind in (0, 1)
    ]
    return {
        "tokens_per_second": {
            name: tokens / statistics.median(processor for processor, _ in values)
            for name, values in seconds.items()
        },
        "ratio": spread(ratios[0]),
        "ratio_of_the_clock": spread(ratios[1]),
        "rounds": rounds,
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-sizes", default="1,8,32,128")
    parser.add_argument("--json", help="where the result goes")
    arguments = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = model_of(0), load_tokenizer(LAB_POLICY)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(5, VOCABULARY, (PROMPTS, PROMPT), generator=generator).tolist()
    results = {}
    for batch in map(int, arguments.batch_sizes.split(",")):
        results[str(batch)] = compared(model, tokenizer, prompts[: max(8, batch)], batch, arguments.rounds)
        print(f"batch {batch}: {results[str(batch)]}", flush=True)
    if arguments.json:
        about = {"prompt": PROMPT, "response": RESPONSE, "threads": arguments.threads}
        write_json_atomic(
            arguments.json, {"settings": about, "batches": results, "environment": environment(seed=0)}
        )


if __name__ == "__main__":
    main()
