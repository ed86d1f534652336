"""Runs of study 08 on problems with many right answers, kept on disk one by one.

A policy is trained on random right answers. Pairs are made of its own samples, each method trains on them with
`InfoPOTrainer` at several learning rates, and each policy that comes of it answers held-out questions several times.
"""

import hashlib
import importlib.util
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from infopo.build import build_examples, build_trainer_on
from infopo.config import Recipe
from infopo.data.examples import ExampleDataset
from infopo.evaluation.asking import in_memory, wanted
from infopo.evaluation.diversity import self_bleu
from infopo.evaluation.expressions_task import expression_item, expressions_task
from infopo.evaluation.items import Item
from infopo.evaluation.law import Law
from infopo.evaluation.pass_at_k import pass_at_k
from infopo.evaluation.prompting import Prompts
from infopo.evaluation.samples import Sample
from infopo.evaluation.subjects import LoadedModel
from infopo.lab.expressions import Puzzle, is_right, make_puzzles
from infopo.records import PreferenceExample
from infopo.reference_pass import precompute
from infopo.runs import write_json_atomic, write_text_atomic
from infopo.settings import DataSettings, ModelSettings, ObjectiveSettings, ReferenceSettings

Record = dict[str, Any]
T = TypeVar("T")

VERSION = 1
"""Part of the name of every kept result. It is raised when a change of this file changes results."""

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "InfoPO sum, β 1": ("infopo", {"beta": 1.0}),
    "InfoPO mean, β 1": ("infopo", {"beta": 1.0, "length_normalized": True}),
    "DPO, β 1": ("dpo", {"beta": 1.0}),
    "DPO, β 0.1": ("dpo", {"beta": 0.1}),
    "SFT on chosen": ("sft", {}),
}
"""Objective and parameters by name."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the study, on which its results depend.

    Attributes:
        sft_steps: Steps of supervised training, 128 answers each.
        pairs: Number of pairs, one per puzzle.
        steps: Steps of preference training.
        batch: Pairs per step.
        puzzles: Held-out questions.
        samples: Answers to each.
        rates: Learning rates, ascending.
        tries: Samples of a puzzle, of which a right one and a wrong one become its pair. With 0 the chosen response is
            a right answer that nobody sampled, for tests with a policy that gives none.
    """

    sft_steps: int
    pairs: int
    steps: int
    batch: int
    puzzles: int
    samples: int
    rates: tuple[float, ...]
    tries: int


FULL = Shape(600, 512, 64, 16, 200, 16, (3e-5, 1e-4, 3e-4), 8)
TINY = Shape(2, 4, 2, 2, 4, 4, (1e-4, 1e-3), 0)
"""For tests, with a policy that has learned nothing."""


@dataclass(frozen=True)
class Answered:
    """A row of supervised training: a question and one of its right answers."""

    question: str
    solution: str


@dataclass(frozen=True)
class Run:
    """What a result depends on besides the shape. The start policy is a run without a method."""

    seed: int
    method: str | None = None
    rate: float = 0.0


def grid(shape: Shape, seeds: int) -> list[Run]:
    """Returns all runs, one seed after the other, so that what is finished is balanced."""
    return [
        run
        for seed in range(1, seeds + 1)
        for run in (Run(seed), *(Run(seed, *each) for each in itertools.product(METHODS, shape.rates)))
    ]


def finish(work: Path, shape: Shape, runs: Sequence[Run], minutes: float | None = None) -> list[Record]:
    """Computes what is missing, in the order given, and returns the results of the runs that are finished.

    Args:
        work: Folder in which the policy, pairs and results are kept.
        shape: Sizes.
        runs: The runs.
        minutes: Time after which no further run is begun, or None.
    """
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    files = {run: work / f"expressions-{_key(shape, run)}.json" for run in runs}
    begin, missing = time.monotonic(), [run for run, file in files.items() if not file.is_file()]
    for number, run in enumerate(missing):
        if minutes is not None and time.monotonic() - begin > 60 * minutes:
            break
        start = time.process_time()
        subject = loaded(policy(work, shape)) if run.method is None else trained(work, shape, run)
        result = {**asdict(run), **measure(subject, policy(work, shape), shape, run.seed)}
        write_json_atomic(files[run], {**result, "seconds": time.process_time() - start})
        print(f"{number + 1} of {len(missing)} runs, {time.monotonic() - begin:.0f} s: {run}", flush=True)
    return [json.loads(file.read_text(encoding="utf-8")) for file in files.values() if file.is_file()]


def _key(shape: Shape, run: Run | None = None) -> str:
    method = METHODS[run.method] if run and run.method else None
    content = [VERSION, asdict(shape), run and asdict(run), method]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def policy(work: Path, shape: Shape) -> Path:
    """Returns the folder of the start policy, which is trained on a random right answer to each question it sees.

    As for the lab's own policy, the run is stopped before the learning rate has decayed to 0, so that preference
    training has something left to do.
    """
    folder = work / f"expressions-policy-{VERSION}-{shape.sft_steps}"
    if (folder / "config.json").is_file():
        return folder
    parts = _parts_of_the_lab_policy()
    torch.manual_seed(0)
    tokenizer = parts.build_tokenizer()
    model = parts.build_model(tokenizer)
    encoded = parts.encode(tokenizer, answered(shape.sft_steps * parts.BATCH_SIZE))
    parts.train(model, encoded, tokenizer.pad_token_id, shape.sft_steps)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def answered(n: int) -> list[Answered]:
    """Returns rows of supervised training. There are fewer questions than rows, which come again with other answers."""
    draw = random.Random(0)
    drawn = draw.choices(make_puzzles(min(5000, n), 0, "sft"), k=n)
    return [Answered(each.question, draw.choice(each.answers)) for each in drawn]


def _parts_of_the_lab_policy() -> ModuleType:
    """Returns the script that trains the lab's policy, whose parts train the one of this study."""
    path = Path(__file__).resolve().parents[1] / "scripts" / "lab_train_policy.py"
    spec = importlib.util.spec_from_file_location("lab_train_policy", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def loaded(folder: Path) -> LoadedModel:
    """Returns the policy of a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return LoadedModel(str(folder), model, AutoTokenizer.from_pretrained(folder), 256)


def answers(
    subject: LoadedModel, puzzles: Sequence[Puzzle], samples: int, seed: int
) -> list[tuple[Item, Sample]]:
    """Returns samples of a policy at temperature 1, those of a puzzle one after the other."""
    task = expressions_task()
    prompts, law = Prompts(subject.tokenizer, task), Law(task.max_new_tokens, 1.0)
    items = [expression_item(puzzle, n) for n, puzzle in enumerate(puzzles)]
    needed = list(wanted(subject, prompts, items, law, num_samples=samples, seed=seed))
    return in_memory(subject, prompts, task.name, needed, law)


def pairs(work: Path, shape: Shape, seed: int) -> Path:
    """Returns the file of the pairs of a seed.

    Chosen is one of a puzzle's right samples, rejected one of its wrong ones, each as often as the policy wrote it.
    Chosen responses thus have the start policy's law given that they are right, where SFT and InfoPO have their
    minimum.
    """
    path = work / f"expressions-pairs-{_key(shape, Run(seed))}.jsonl"
    if path.is_file():
        return path
    subject, draw, rows = loaded(policy(work, shape)), random.Random(seed), []
    for puzzles in groups(make_puzzles(4 * shape.pairs, seed, "preference"), max(64, shape.pairs // 2)):
        drawn = answers(subject, puzzles, shape.tries or 1, seed)
        for puzzle, group in zip(puzzles, groups(drawn, shape.tries or 1), strict=True):
            # What was cut off is never chosen, and here it is not rejected either.
            texts = [sample.text for _, sample in group if sample.finished or not shape.tries]
            right = [text for text in texts if is_right(puzzle, text)] if shape.tries else puzzle.answers
            wrong = [text for text in texts if not is_right(puzzle, text)]
            if right and wrong:
                turns = {
                    "prompt": puzzle.question,
                    "chosen": draw.choice(right),
                    "rejected": draw.choice(wrong),
                }
                rows.append(json.dumps({key: [_turn(key, text)] for key, text in turns.items()}))
        if len(rows) >= shape.pairs:
            break
    assert len(rows) >= shape.pairs, f"only {len(rows)} pairs"
    write_text_atomic(path, "".join(f"{row}\n" for row in rows[: shape.pairs]))
    return path


def groups(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Returns the items in groups of a size, of which the last may be smaller."""
    return [items[begin : begin + size] for begin in range(0, len(items), size)]


def _turn(key: str, text: str) -> Mapping[str, str]:
    return {"role": "user" if key == "prompt" else "assistant", "content": text}


def trained(work: Path, shape: Shape, run: Run) -> LoadedModel:
    """Returns the policy that a method makes of the pairs."""
    assert run.method is not None
    start = policy(work, shape)
    recipe = Recipe(
        model=ModelSettings(str(start)),
        data=DataSettings(path=str(pairs(work, shape, run.seed)), cache="off"),
        objective=(ObjectiveSettings(*METHODS[run.method]),),
        reference=ReferenceSettings(store="off"),
        train={
            "learning_rate": run.rate, "max_steps": shape.steps, "per_device_train_batch_size": shape.batch,
            "warmup_steps": 0.1, "seed": run.seed, "save_strategy": "no", "disable_tqdm": True, "probe_size": 0,
            "anchor_size": 0, "gradient_size": 0, "activation_checkpointing": False,
        },
        output_dir=str(work / "expressions-run"),
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(start)
    examples, _ = build_examples(recipe.data, tokenizer)
    trainer = build_trainer_on(recipe, tokenizer, examples, None)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return LoadedModel(run.method, trainer.model, tokenizer, 256)


def measure(subject: LoadedModel, start: Path, shape: Shape, seed: int) -> Record:
    """Returns the figures of a policy (`points`, of one point) and its scores by question (`questions`)."""
    puzzles, k = make_puzzles(shape.puzzles, 0, "evaluation"), shape.samples
    drawn = answers(subject, puzzles, k, seed)
    by_puzzle = list(zip(puzzles, groups([sample for _, sample in drawn], k), strict=True))
    right = [
        Counter(sample.text for sample in group if sample.finished and is_right(puzzle, sample.text))
        for puzzle, group in by_puzzle
    ]
    logps = np.array([sample.logp for _, sample in drawn])
    log_ratio = logps - log_probs(start, drawn, subject)
    bleu = self_bleu([[sample.text for sample in group] for _, group in by_puzzle], most=len(drawn))
    questions: dict[str, list[float | None]] = {
        "pass@1": [counts.total() / k for counts in right],
        "share": [len(counts) / len(puzzle.answers) for puzzle, counts in zip(puzzles, right, strict=True)],
        "differ": [differing(counts) for counts in right],
    }
    point = {
        **{name: mean(values) for name, values in questions.items()},
        **{f"pass@{n}": mean([pass_at_k(k, c.total(), n) for c in right]) for n in (k // 4, k)},
        "found": mean([len(counts) for counts in right]),
        "entropy": -mean(logps),
        "self_bleu": bleu["value"] if bleu else float("nan"),
        # E[π_start/π] = 1 over samples of π, so that this has the mean of log π/π_start and far less variance.
        "kl": mean(np.expm1(-log_ratio) + log_ratio),
    }
    return {"points": [point], "questions": questions}


def mean(values: Any) -> float:
    """Returns the mean of those that are known, or NaN."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")


def differing(counts: Mapping[str, int]) -> float | None:
    """Returns the probability that two right samples of a question are different answers, or None with fewer than two.

        1 - Σ n (n - 1) / (N (N - 1)),  n: how often each answer came, N = Σ n

    It is without bias whatever N is, so that a policy which is right more often does not seem more diverse for that.

    References:
        Simpson, 1949, Measurement of Diversity, Nature 163.

    Example:
        >>> differing({"a": 2, "b": 2}), differing({"a": 1})
        (0.6666666666666667, None)
    """
    total = sum(counts.values())
    if total < 2:
        return None
    return 1.0 - sum(n * (n - 1) for n in counts.values()) / (total * (total - 1))


def log_probs(start: Path, drawn: Sequence[tuple[Item, Sample]], subject: LoadedModel) -> Any:
    """Returns log π_start of samples (nats), each (samples,)."""
    prompts = Prompts(subject.tokenizer, expressions_task())
    ids = {item.id: prompts.ids(item) for item, _ in drawn}
    examples = [PreferenceExample(ids[item.id], [list(s.token_ids)], [], item.id) for item, s in drawn]
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    dataset = ExampleDataset.from_examples(examples)
    sides = frozenset({"chosen", "rejected"})
    return precompute(dataset, model, sides, batch_size=256, device=torch.device("cpu")).reference
