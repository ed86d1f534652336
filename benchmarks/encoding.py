"""Measures how fast rows are encoded, beside the tokenizer alone on the same texts, and what a second start costs.

    python benchmarks/encoding.py [--rounds 7] [--pairs 1000] [--start-pairs 61135] [--json results.json]

Texts are words of this project's pages and sources, with log-normal lengths; the tokenizer is a byte-level BPE that is
trained on the same files. Per pair, the tokenizer alone reads three texts, as TRL does: the prompt, and the prompt with
each response. In conversations, `apply_chat_template` writes them. Each round runs ours, the tokenizer
alone (all pairs in one call, on all cores) and TRL's preprocessing, one after the other, each round begun by another; a
round's share is the tokenizer's seconds by ours. Seconds of the processor leave out how many cores each keeps busy.
"""

import argparse
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import trl
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from infopo.build import build_examples
from infopo.data.counts import DataCounts
from infopo.data.encode import Encoder, encode_rows
from infopo.data.sources import read_rows
from infopo.provenance import environment
from infopo.records import PreferenceRow
from infopo.settings import DataSettings

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = Path(trl.__file__).parent / "chat_templates"

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS_OF_GPT_4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

KINDS = {"text": None, "phi3": "phi3", "qwen3": "qwen3"}
"""Plain text, and conversations under two of the chat templates that TRL ships: a plain one, and a long program."""

WORDS = {"prompt": 120, "response": 180}
"""Mean number of words of a prompt's text and of a response's, as in UltraFeedback."""


def corpus() -> list[str]:
    """Returns the texts that words are taken from."""
    files = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("src/**/*.py"), *ROOT.glob("tests/*.py")])
    return [file.read_text(encoding="utf-8") for file in files]


def tokenizer_of(texts: list[str], template: str | None) -> PreTrainedTokenizerFast:
    """Returns a tokenizer as current models have, with as many words as these texts teach it."""
    core = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS_OF_GPT_4), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=32_000, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=None if template is None else (TEMPLATES / f"{template}.jinja").read_text(),
    )


def rows_of(texts: list[str], n: int, chat: bool) -> list[dict[str, Any]]:
    """Returns pairs, as conversations of three turns before the response, or as text."""
    rng, words = random.Random(0), [word for text in texts for word in re.findall(r"[A-Za-z]+[.,;:]?", text)]

    def said(mean: int) -> str:
        length = max(1, round(mean * rng.lognormvariate(-0.125, 0.5)))
        start = rng.randrange(len(words) - length)
        return " ".join(words[start : start + length])

    rows = []
    for _ in range(n):
        asked = [said(WORDS["prompt"] // 3) for _ in range(3)]
        answers = [said(WORDS["response"]) for _ in range(2)]
        if chat:
            roles = ("user", "assistant", "user")
            prompt: Any = [{"role": r, "content": text} for r, text in zip(roles, asked, strict=True)]
            sides: list[Any] = [[{"role": "assistant", "content": text}] for text in answers]
        else:
            prompt, sides = "\n\n".join(asked), [f" {text}" for text in answers]
        rows.append({"prompt": prompt, "chosen": sides[0], "rejected": sides[1]})
    return rows


def tokenizer_alone(tokenizer: PreTrainedTokenizerFast, rows: list[PreferenceRow]) -> int:
    """Writes and tokenizes the three texts of each pair, all pairs in one call. Returns the number of tokens."""
    texts = list[str]()
    for row in rows:
        sides: list[Any] = [*row.chosen, *row.rejected]
        if isinstance(row.prompt, str):
            texts += [row.prompt, *(f"{row.prompt}{side}{tokenizer.eos_token}" for side in sides)]
        else:
            template = tokenizer.apply_chat_template
            texts.append(template(row.prompt, tokenize=False, add_generation_prompt=True))
            texts += [template(row.prompt + side, tokenize=False) for side in sides]
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return sum(len(encoding.ids) for encoding in encodings)


def trl_alone(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]], folder: str) -> None:
    """Runs TRL's own preprocessing, which looks at its trainer's tokenizer only."""
    arguments = trl.DPOConfig(output_dir=folder, max_length=None, bf16=False, report_to="none")
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    # A new data set each time, because `datasets` keeps what a function has made of one.
    dataset = datasets.Dataset.from_list(rows)
    trl.DPOTrainer._prepare_dataset(trainer, dataset, tokenizer, arguments, "train")


def spread(values: list[float]) -> dict[str, float]:
    """Returns median, minimum, maximum and number."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def measure(kind: str, texts: list[str], pairs: int, rounds: int, folder: str) -> dict[str, Any]:
    """Returns seconds of each way to encode, and their ratios round by round."""
    tokenizer = tokenizer_of(texts, KINDS[kind])
    raw = rows_of(texts, pairs, chat=KINDS[kind] is not None)
    rows = list(read_rows(raw, DataCounts()))
    encoder = Encoder(tokenizer, max_length=None)
    ways: dict[str, Callable[[], object]] = {
        "infopo": lambda: encode_rows(rows, encoder, DataCounts()),
        "tokenizer": lambda: tokenizer_alone(tokenizer, rows),
        "trl": lambda: trl_alone(tokenizer, raw, folder),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-1, rounds):
        names = list(ways)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            begin, computed = time.perf_counter(), time.process_time()
            ways[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - begin)
                processor[name].append(time.process_time() - computed)
    tokens = tokenizer_alone(tokenizer, rows)

    def ratio(values: dict[str, list[float]], other: str) -> dict[str, float]:
        return spread([theirs / ours for theirs, ours in zip(values[other], values["infopo"], strict=True)])

    return {
        "pairs": pairs,
        "tokens": tokens,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "tokens_per_second": tokens / statistics.median(seconds["infopo"]),
        "share_of_the_tokenizers_rate": ratio(seconds, "tokenizer"),
        "share_in_processor_seconds": ratio(processor, "tokenizer"),
        "times_trl": ratio(seconds, "trl"),
    }


def starts(texts: list[str], pairs: int, folder: str, later: int) -> dict[str, Any]:
    """Returns the seconds from a file of conversations to examples: the first start, and later ones."""
    tokenizer, path = tokenizer_of(texts, "qwen3"), Path(folder) / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for row in rows_of(texts, pairs, chat=True):
            file.write(json.dumps(row) + "\n")
    data = DataSettings(path=str(path), cache=str(Path(folder) / "cache"))
    taken = []
    for _ in range(1 + later):
        begin = time.perf_counter()
        examples, _ = build_examples(data, tokenizer)
        taken.append(time.perf_counter() - begin)
    kept = sum(entry.stat().st_size for entry in (Path(folder) / "cache").iterdir())
    return {
        "pairs": len(examples),
        "bytes_of_rows": path.stat().st_size,
        "bytes_kept": kept,
        "first_start_seconds": taken[0],
        "later_start_seconds": spread(taken[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--start-pairs", type=int, default=61_135, help="0 leaves the starts out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    texts = corpus()
    results: dict[str, Any] = {"command": " ".join(["python", "benchmarks/encoding.py", *sys.argv[1:]])}
    with tempfile.TemporaryDirectory() as folder:
        results["rates"] = {}
        for kind in KINDS:
            result = results["rates"][kind] = measure(kind, texts, options.pairs, options.rounds, folder)
            share, times = result["share_of_the_tokenizers_rate"], result["times_trl"]
            print(
                f"{kind}: {result['tokens_per_second']:,.0f} tokens/s, {share['median']:.0%} [{share['min']:.0%}, "
                f"{share['max']:.0%}] of the tokenizer's rate, {times['median']:.2f} times TRL's (n = {share['n']})",
                flush=True,
            )
        if options.start_pairs:
            result = results["starts"] = starts(texts, options.start_pairs, folder, later=5)
            later = result["later_start_seconds"]
            print(
                f"{result['pairs']} pairs: first start {result['first_start_seconds']:.1f} s, later ones "
                f"{later['median']:.2f} s [{later['min']:.2f}, {later['max']:.2f}] (n = {later['n']})"
            )
    results["environment"] = environment(seed=0)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
