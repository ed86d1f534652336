"""Measures whether more rejected responses per prompt help, at equal prompts and at equal tokens (see README.md).

    python studies/03_many_responses/run.py              # writes results.json, plot.png and the README's tables
    python studies/03_many_responses/run.py --out elsewhere --tiny

The lab needs nothing else. The real data are read from ../shared/data beside the repository, and left out without it.
"""

import argparse
import contextlib
import io
import itertools
import json
import platform
import random
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from readme import publish, table

from infopo.arguments import InfoPOConfig
from infopo.data.counts import DataCounts
from infopo.data.encode import Encoder, encode_rows
from infopo.data.examples import ExampleDataset
from infopo.data.sources import read_rows
from infopo.generate import sample
from infopo.lab import Problem, make_problems, verify
from infopo.lab.evaluation import MAX_NEW_TOKENS, accuracy, as_prompt
from infopo.losses.catalog import OBJECTIVES
from infopo.models import LAB_POLICY, load_policy, load_tokenizer
from infopo.provenance import environment
from infopo.records import PreferenceExample, Role
from infopo.reference_pass import precompute
from infopo.runs import write_json_atomic
from infopo.trainer import InfoPOTrainer
from infopo.workers import WorkerPool
from published_data import mbpp_rows

Array = NDArray[np.float64]
Run = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"

REJECTED = 7
TIMES = (1 + REJECTED) // 2
"""Number of pairs that have as many responses as one list."""
SAMPLES = 16
"""Samples per problem. A problem with a right response and seven wrong ones gives a list."""
TARGET_KL = 0.1
"""Drift (nats per response) at which arms are compared."""
T_QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""97.5 % quantiles of Student's law, by number of seeds."""

LISTS, PAIRS, PROMPTS, EPOCHS = "lists", "pairs", "pairs, more prompts", "pairs, more epochs"
ARMS = (
    *((LISTS, method) for method in ("infopo", "infonce", "dpo")),
    *((data, method) for data in (PAIRS, PROMPTS) for method in ("infopo", "dpo", "sft")),
    *((EPOCHS, method) for method in ("infopo", "dpo")),
)
"""Data and method of each arm. With one rejected response InfoNCE is DPO. SFT sees the pairs' chosen responses only."""

COMPARED = tuple(
    (many, one, data)
    for many, one in (("infopo", "infopo"), ("infonce", "dpo"), ("dpo", "dpo"))
    for data in (PAIRS, PROMPTS, EPOCHS)
)
"""Comparisons: method on lists, method on pairs, which pairs."""

MBPP_ARMS = ((LISTS, "infopo"), (LISTS, "infonce"), (LISTS, "dpo"), (PAIRS, "infopo"), (PAIRS, "dpo"))
LONGEST = 512
"""Largest number of tokens (bytes, on real data) of a prompt with a response."""
UNPAIRED_ARMS = tuple(("unpaired", method) for method in ("infopo", "kto") if method in OBJECTIVES)


@dataclass(frozen=True)
class Size:
    """Settings that the time depends on.

    Attributes:
        seeds: Number of repetitions, each with new problems, samples, splits and order.
        prompts: Number of prompts of the lists and of the pairs.
        epochs: Number of passes over them.
        batch: Number of prompts per optimizer step.
        rates: Learning rates that each arm is tried with.
        validation: Number of problems on which an arm's learning rate is chosen.
        test: Number of problems on which its results are reported.
        kl_samples: Number of samples of the policy on the test problems.
        held_out: Number of lists on evaluation problems, for log-probs.
        real_rates: Learning rates on real data.
        real_rows: Largest number of rows of a real data set.
        base_epochs: Number of passes of maximum likelihood that make the reference on real data.
        real: Names of the real data sets.
    """

    seeds: int
    prompts: int = 64
    epochs: int = 2
    batch: int = 16
    rates: tuple[float, ...] = (8e-5, 2.4e-4)
    validation: int = 200
    test: int = 500
    kl_samples: int = 128
    held_out: int = 48
    real_rates: tuple[float, ...] = (2e-4, 1e-3)
    real_rows: int = 1000
    base_epochs: int = 4
    real: tuple[str, ...] = ("MBPP", "KTO rows")


TINY = Size(2, 3, 1, 4, (1e-4,), 8, 8, 4, 3, (1e-3,), 24, 1, ("KTO rows",))


# --- training and measuring ---------------------------------------------------------------------------------


def encode(rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> ExampleDataset:
    counts = DataCounts(on_bad_row="skip", source="rows")
    dataset = datasets.Dataset.from_list(list(rows))
    return encode_rows(
        read_rows(dataset, counts), Encoder(tokenizer, max_length=LONGEST, max_prompt_length=256), counts
    )


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: ExampleDataset,
    objective: str,
    beta: float,
    rate: float,
    epochs: int,
    batch: int,
    seed: int,
) -> PreTrainedModel:
    """Trains the model in place, and returns it."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = InfoPOTrainer(
            model=model,
            args=InfoPOConfig(
                output_dir=folder,
                objective=objective,
                beta=beta if "beta" in OBJECTIVES[objective].parameters else None,
                learning_rate=rate,
                num_train_epochs=epochs,
                per_device_train_batch_size=batch,
                activation_checkpointing=False,
                # KTO puts responses behind other prompts, which may be longer.
                max_length=LONGEST,
                reference_store="off",
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                seed=seed,
            ),
            train_dataset=data,
            processing_class=tokenizer,
        )
        trainer.train()
    return model.eval()


def logps(data: ExampleDataset, model: PreTrainedModel) -> Array:
    """Returns log π(y|x) of every response (nats)."""
    sides = frozenset({"chosen", "rejected"})
    values = precompute(data, model, sides, batch_size=64, device=torch.device("cpu")).reference
    assert values is not None
    return values


def response_tokens(data: ExampleDataset, sides: frozenset[Role]) -> int:
    """Returns the number of tokens of the responses that a loss uses."""
    return sum(
        len(ids)
        for example in data
        for ids, role in zip(
            example.response_ids,
            [Role.CHOSEN] * len(example.chosen_ids) + [Role.REJECTED] * len(example.rejected_ids),
            strict=True,
        )
        if role in sides
    )


def sides_of(method: str) -> frozenset[Role]:
    roles = {"chosen": Role.CHOSEN, "rejected": Role.REJECTED}
    return frozenset(roles[side] for side in OBJECTIVES[method].sides)


# --- the lab ------------------------------------------------------------------------------------------------


def make_lists(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, n: int, seed: int, split: str
) -> tuple[list[Run], dict[str, float]]:
    """Makes `n` lists of the policy's own samples: a problem's first right one and its first seven wrong ones.

    Wrong samples are used as they were drawn, repeated ones too, because they are then independent draws from the law
    of wrong responses.
    """
    rows: list[Run] = []
    round_size = min(64, 4 * n)
    for start in itertools.count(0, round_size):
        problems = make_problems(start + round_size, seed, split)[start:]
        drawn = draw(model, tokenizer, problems, SAMPLES, seed=seed * 100_003 + start)
        for problem, responses in zip(problems, drawn, strict=True):
            right = [text for text, finished in responses if finished and verify(problem, text)]
            wrong = [text for text, finished in responses if finished and not verify(problem, text)]
            if right and len(wrong) >= REJECTED and len(rows) < n:
                chosen, *rejected = [
                    [{"role": "assistant", "content": text}] for text in (right[0], *wrong[:REJECTED])
                ]
                rows.append({"prompt": as_prompt(problem), "chosen": [chosen], "rejected": rejected})
        if len(rows) == n:
            distinct = np.mean([len({r[0]["content"] for r in row["rejected"]}) for row in rows])
            return rows, {"problems": start + round_size, "distinct_rejected": float(distinct)}
    raise AssertionError("unreachable")


def draw(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    times: int,
    seed: int,
) -> list[list[tuple[str, bool]]]:
    """Samples at temperature 1. Returns each text, and whether it ended before the token limit."""
    prompts = [as_prompt(problem) for problem in problems]
    drawn = sample(
        model,
        tokenizer,
        prompts,
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=1.0,
        num_return_sequences=times,
        batch_size=1024,
        seed=seed,
    )
    return [[(response.text, response.finished) for response in responses] for responses in drawn]


@dataclass(frozen=True)
class Lab:
    """Objects that the runs of one seed share."""

    tokenizer: PreTrainedTokenizerBase
    reference: PreTrainedModel
    data: dict[str, ExampleDataset]
    held_out: ExampleDataset
    held_out_logps: Array
    validation: list[Problem]
    test: list[Problem]
    facts: dict[str, float]


def lab(size: Size, seed: int) -> Lab:
    """Makes the training data of this seed. The problems for measurements are the same for all seeds."""
    reference, tokenizer = load_policy(LAB_POLICY).eval(), load_tokenizer(LAB_POLICY)
    rows, facts = make_lists(reference, tokenizer, TIMES * size.prompts, seed, "preference")
    held_out_rows, _ = make_lists(reference, tokenizer, size.held_out, 0, "evaluation")
    pairs = [{**row, "rejected": row["rejected"][:1]} for row in rows]
    few = encode(pairs[: size.prompts], tokenizer)
    data = {
        LISTS: encode(rows[: size.prompts], tokenizer),
        PAIRS: few,
        PROMPTS: encode(pairs, tokenizer),
        EPOCHS: few,
    }
    asked = {row["prompt"][0]["content"] for row in held_out_rows}
    problems = [
        p
        for p in make_problems(size.validation + size.test + size.held_out, 1, "evaluation")
        if p.question not in asked
    ]
    held_out = encode(held_out_rows, tokenizer)
    return Lab(
        tokenizer,
        reference,
        data,
        held_out,
        logps(held_out, reference),
        problems[: size.validation],
        problems[size.validation : size.validation + size.test],
        facts,
    )


def measure_policy(world: Lab, policy: PreTrainedModel, kl_samples: int) -> Run:
    """Measures greedy accuracy, change of held-out log-probs, and KL(π_θ ‖ π_ref) by samples of π_θ."""
    problems = world.test[:kl_samples]
    drawn = draw(policy, world.tokenizer, problems, 1, seed=0)
    examples = []
    for problem, ((text, finished),) in zip(problems, drawn, strict=True):
        prompt = world.tokenizer.apply_chat_template(
            as_prompt(problem), add_generation_prompt=True, return_dict=False
        )
        ids = world.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += [world.tokenizer.eos_token_id] if finished else []
        if ids:
            examples.append(PreferenceExample(prompt, [ids], [], problem.question))
    samples = ExampleDataset.from_examples(examples)
    change = logps(world.held_out, policy) - world.held_out_logps
    chosen = world.held_out.roles == Role.CHOSEN
    return {
        "validation_accuracy": accuracy(policy, world.tokenizer, world.validation, batch_size=512).accuracy,
        "accuracy": accuracy(policy, world.tokenizer, world.test, batch_size=512).accuracy,
        "sampled_accuracy": float(
            np.mean([f and verify(p, t) for p, ((t, f),) in zip(problems, drawn, strict=True)])
        ),
        "kl": float((logps(samples, policy) - logps(samples, world.reference)).mean()),
        "chosen_change": float(change[chosen].mean()),
        "rejected_change": float(change[~chosen].mean()),
    }


def lab_runs(size: Size, seed: int) -> Run:
    """Runs all arms at all learning rates, for one seed."""
    torch.set_num_threads(1)
    world = lab(size, seed)
    runs = []
    for (data, method), rate in itertools.product(ARMS, size.rates):
        epochs = size.epochs * (TIMES if data == EPOCHS else 1)
        policy = train(
            load_policy(LAB_POLICY),
            world.tokenizer,
            world.data[data],
            method,
            1.0,
            rate,
            epochs,
            size.batch,
            seed,
        )
        runs.append(
            {
                "seed": seed,
                "data": data,
                "method": method,
                "rate": rate,
                "tokens": epochs * response_tokens(world.data[data], sides_of(method)),
                "steps": epochs * -(-len(world.data[data]) // size.batch),
                **measure_policy(world, policy, size.kl_samples),
            }
        )
    return {
        "seed": seed,
        "facts": world.facts,
        "start": measure_policy(world, world.reference, size.kl_samples),
        "runs": runs,
    }


# --- real data ----------------------------------------------------------------------------------------------


def mbpp() -> tuple[list[Run], list[Run]]:
    """Reads tasks with right and wrong solutions, and those with right ones only, which are for the reference."""
    files = sorted((SHARED / "code_mbpp").glob("mbpp_seed_*.jsonl*"))
    if not files:
        raise FileNotFoundError("no MBPP solutions beside the repository (shared/data/code_mbpp)")
    rows = mbpp_rows(files).rows
    return [r for r in rows if r["chosen"] and r["rejected"]], [r for r in rows if not r["rejected"]]


def unpaired() -> tuple[list[Run], list[Run]]:
    """Reads rows that are labelled good or bad. The first 60 good ones are for the reference."""
    file = SHARED / "llamafactory" / "kto_en_demo.json.gz"
    if not file.is_file():
        raise FileNotFoundError("no unpaired rows beside the repository (shared/data/llamafactory)")
    rows = [
        {"prompt": r.prompt, "chosen": list(r.chosen), "rejected": list(r.rejected)}
        for r in read_rows(file, DataCounts(on_bad_row="skip"))
    ]
    base = [row for row in rows if row["chosen"]][:60]
    return [row for row in rows if row not in base], base


REAL = {"MBPP": (mbpp, MBPP_ARMS), "KTO rows": (unpaired, UNPAIRED_ARMS)}
REAL_BETA = 0.1
MEASURES = ("accuracy", "sampled_accuracy", "kl", "chosen_change", "rejected_change", "tokens", "steps")
REAL_MEASURES = ("preference_accuracy", "chosen_change", "rejected_change", "tokens")


@cache
def byte_model(name: str, size: Size) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Makes π_ref: a small Llama on bytes, trained by maximum likelihood on rows that are used for nothing else."""
    tokenizer = load_tokenizer(LAB_POLICY)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LONGEST,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    base = encode(REAL[name][0]()[1][: min(size.real_rows, 120)], tokenizer)
    return train(model, tokenizer, base, "sft", 1.0, 3e-3, size.base_epochs, 8, 0), tokenizer


def score(data: ExampleDataset, model: PreTrainedModel, reference: Array, within: bool) -> Run:
    """Returns the share of (chosen, rejected) pairs whose chosen one has the larger log-ratio, and log-prob changes.

    Args:
        data: Held-out rows.
        model: π_θ.
        reference: log π_ref of the responses (nats).
        within: Whether pairs are of the same prompt, with the same weight for each prompt. Otherwise they are of all
            rows.
    """
    ratio = logps(data, model) - reference
    owner = np.repeat(np.arange(len(data)), np.diff(data.response_offsets))
    groups = [owner == i for i in range(len(data))] if within else [np.ones(len(ratio), dtype=bool)]
    shares = []
    for group in groups:
        chosen, rejected = (ratio[group & (data.roles == role)] for role in (Role.CHOSEN, Role.REJECTED))
        if len(chosen) and len(rejected):
            above = chosen[:, None] - rejected
            shares.append(float(((above > 0) + 0.5 * (above == 0)).mean()))
    return {
        "preference_accuracy": float(np.mean(shares)),
        "chosen_change": float(ratio[data.roles == Role.CHOSEN].mean()),
        "rejected_change": float(ratio[data.roles == Role.REJECTED].mean()),
    }


def real_runs(name: str, size: Size, seed: int) -> list[Run]:
    """Trains on half of the rows, chooses the learning rate on a sixth, and reports on a third, divided by seed."""
    torch.set_num_threads(1)
    load, arms = REAL[name]
    rows = load()[0]
    random.Random(f"{name}:{seed}").shuffle(rows)
    rows = rows[: size.real_rows]
    first, second = len(rows) // 2, 2 * len(rows) // 3
    reference, tokenizer = byte_model(name, size)
    within = name == "MBPP"
    validation, test = encode(rows[first:second], tokenizer), encode(rows[second:], tokenizer)
    validation_logps, test_logps = logps(validation, reference), logps(test, reference)
    runs = []
    for (form, method), rate in itertools.product(arms, size.real_rates):
        part = rows[:first]
        if form == PAIRS:
            part = [{**row, "chosen": row["chosen"][:1], "rejected": row["rejected"][:1]} for row in part]
        data = encode(part, tokenizer)
        policy = LlamaForCausalLM(reference.config)
        policy.load_state_dict(reference.state_dict())
        train(policy, tokenizer, data, method, REAL_BETA, rate, 1, 8, seed)
        runs.append(
            {
                "seed": seed,
                "data": form,
                "method": method,
                "rate": rate,
                "tokens": response_tokens(data, sides_of(method)),
                "rows": len(data),
                "validation_accuracy": score(validation, policy, validation_logps, within)[
                    "preference_accuracy"
                ],
                **score(test, policy, test_logps, within),
            }
        )
    return runs


# --- summaries ----------------------------------------------------------------------------------------------


def mean_se(values: Sequence[float]) -> dict[str, float]:
    spread = np.std(values, ddof=1) if len(values) > 1 else np.nan
    return {"mean": float(np.mean(values)), "se": float(spread / np.sqrt(len(values))), "n": len(values)}


def at_drift(runs: Sequence[Run], start: Run, target: float) -> float:
    """Returns the accuracy at which KL first reaches `target`, linear between learning rates, or NaN if none does."""
    points = [(0.0, start["accuracy"]), *((r["kl"], r["accuracy"]) for r in runs)]
    for (kl_0, a_0), (kl_1, a_1) in itertools.pairwise(points):
        if kl_0 < target <= kl_1:
            return float(a_0 + (a_1 - a_0) * (target - kl_0) / (kl_1 - kl_0))
    return float("nan")


def chosen_rate(runs: Sequence[Run], rates: Sequence[float]) -> float:
    """Returns the learning rate with the highest mean accuracy on the validation problems, the first of equals."""
    return max(rates, key=lambda rate: np.mean([r["validation_accuracy"] for r in runs if r["rate"] == rate]))


def summarise(
    arms: Sequence[tuple[str, str]], runs: Sequence[Run], rates: Sequence[float], measures: Sequence[str]
) -> list[Run]:
    """Returns mean and standard error of each arm over the seeds, at the learning rate that validation chose."""
    rows = []
    for data, method in arms:
        arm = [r for r in runs if (r["data"], r["method"]) == (data, method)]
        rate = chosen_rate(arm, rates)
        best = [r for r in arm if r["rate"] == rate]
        summary = {m: mean_se([r[m] for r in best]) for m in measures}
        rows.append({"data": data, "method": method, "rate": rate, **summary})
    return rows


def differences(parts: Sequence[Run], arms: Sequence[Run]) -> list[Run]:
    """Returns lists minus pairs, seed by seed, each at its own learning rate, and at the same drift."""
    rate = {(a["data"], a["method"]): a["rate"] for a in arms}
    rows = []
    for many, one, data in COMPARED:
        tuned: list[float] = []
        matched: list[float] = []
        chosen: list[float] = []
        for part in parts:
            sides = []
            for key in ((LISTS, many), (data, one)):
                arm = [r for r in part["runs"] if (r["data"], r["method"]) == key]
                (best,) = [r for r in arm if r["rate"] == rate[key]]
                sides.append(
                    (best["accuracy"], at_drift(arm, part["start"], TARGET_KL), best["chosen_change"])
                )
            for values, index in ((tuned, 0), (matched, 1), (chosen, 2)):
                values.append(sides[0][index] - sides[1][index])
        reached = [d for d in matched if not np.isnan(d)]
        rows.append(
            {
                "many": many,
                "one": one,
                "data": data,
                "accuracy": mean_se(tuned),
                "chosen_change": mean_se(chosen),
                "accuracy_at_drift": mean_se(reached) if len(reached) > 1 else None,
            }
        )
    return rows


def kept(folder: Path | None, kind: str, size: Size, seed: int) -> Any:
    """Returns the runs of one seed, from `folder` if an earlier call with the same settings left them there."""
    settings = {**vars(size), "seeds": None, "kind": kind, "seed": seed}
    settings = json.loads(json.dumps(settings))
    file = folder / f"{kind}-{seed}.json" if folder else None
    if file is not None and file.exists():
        part = json.loads(file.read_text(encoding="utf-8"))
        if part["settings"] == settings:
            return part["result"]
    result = lab_runs(size, seed) if kind == "lab" else real_runs(kind, size, seed)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(file, {"settings": settings, "result": result})
    return result


def measure(size: Size, workers: int, folder: Path | None = None) -> Run:
    seeds = range(1, size.seeds + 1)
    with WorkerPool(workers, "spawn") if workers > 1 else contextlib.nullcontext() as pool:
        map_ = pool.map if pool else map

        def run_all(kind: str) -> list[Any]:
            return list(map_(kept, [folder] * size.seeds, [kind] * size.seeds, [size] * size.seeds, seeds))

        parts = run_all("lab")
        real: dict[str, Any] = {}
        for name in size.real:
            load, form_arms = REAL[name]
            try:
                rows, _ = load()
            except FileNotFoundError as error:
                real[name] = {"skipped": str(error)}
                continue
            runs = [run for part in run_all(name) for run in part]
            real[name] = {
                "rows": len(rows),
                "chosen_per_row": float(np.mean([len(r["chosen"]) for r in rows])),
                "rejected_per_row": float(np.mean([len(r["rejected"]) for r in rows])),
                "arms": summarise(form_arms, runs, size.real_rates, REAL_MEASURES),
                "runs": runs,
            }
    runs = [run for part in parts for run in part["runs"]]
    arms = summarise(ARMS, runs, size.rates, MEASURES)
    return {
        "environment": environment(
            seed=1,
            packages=("torch", "transformers", "numpy"),
            extra={
                "platform": platform.system(),
                "command_line": ["python", "studies/03_many_responses/run.py"],
            },
        ),
        "size": vars(size) | {"rejected": REJECTED, "samples": SAMPLES, "target_kl": TARGET_KL},
        "seeds": list(seeds),
        "lab": {
            "start": parts[0]["start"],
            "problems": [p["facts"]["problems"] for p in parts],
            "distinct_rejected": mean_se([p["facts"]["distinct_rejected"] for p in parts]),
            "arms": arms,
            "differences": differences(parts, arms),
            "runs": runs,
        },
        "real": real,
    }


def show(value: Mapping[str, float] | None, places: int, signed: bool = False) -> str:
    """Returns mean ± standard error as text."""
    if value is None:
        return "not reached"
    sign = "+" if signed else ""
    return f"{round(value['mean'], places) + 0.0:{sign}.{places}f} ± {value['se']:.{places}f}"


def tables(results: Run) -> dict[str, str]:
    """Returns the README's tables, from the results alone."""
    in_lab = results["lab"]
    title = {name: spec.title for name, spec in OBJECTIVES.items()}
    start = in_lab["start"]
    arms = [
        [
            "start",
            "",
            "",
            "0",
            f"{start['accuracy']:.3f}",
            f"{start['sampled_accuracy']:.3f}",
            "0",
            "0",
            "0",
        ]
    ] + [
        [
            a["data"],
            title[a["method"]],
            f"{a['rate']:.1e}",
            f"{a['tokens']['mean'] / 1000:.0f}",
            show(a["accuracy"], 3),
            show(a["sampled_accuracy"], 3),
            show(a["kl"], 2),
            show(a["chosen_change"], 2, True),
            show(a["rejected_change"], 2, True),
        ]
        for a in in_lab["arms"]
    ]
    rows = []
    for d in in_lab["differences"]:
        quantile = T_QUANTILE[d["accuracy"]["n"]]
        clear = abs(d["accuracy"]["mean"]) > quantile * d["accuracy"]["se"]
        at = d["accuracy_at_drift"]
        rows.append(
            [
                title[d["many"]],
                f"{title[d['one']]}, {d['data']}",
                show(d["accuracy"], 3, True),
                "yes" if clear else "no",
                show(at, 3, True) + ("" if at is None else f" ({at['n']})"),
                show(d["chosen_change"], 2, True),
            ]
        )
    facts = [
        [
            f"{in_lab['distinct_rejected']['mean']:.2f}",
            f"{results['size']['prompts']} of {np.mean(in_lab['problems']) / TIMES:.0f}",
            str(len(results["seeds"])),
        ]
    ]
    real = []
    for name, part in results["real"].items():
        if "skipped" in part:
            real.append([name, f"not run: {part['skipped']}", *[""] * 5])
        real += [
            [
                name,
                a["data"],
                title[a["method"]],
                f"{a['rate']:.1e}",
                show(a["preference_accuracy"], 3),
                show(a["chosen_change"], 1, True),
                show(a["rejected_change"], 1, True),
            ]
            for a in part.get("arms", [])
        ]
    return {
        "facts": table(
            ["distinct responses among 7 rejected", "prompts kept of problems asked", "seeds"], facts
        ),
        "arms": table(
            [
                "data",
                "method",
                "learning rate",
                "response tokens (1000)",
                "accuracy",
                "accuracy, sampled",
                "KL",
                "chosen log-prob",
                "rejected log-prob",
            ],
            arms,
        ),
        "differences": table(
            [
                "lists",
                "minus",
                "accuracy",
                "clear",
                f"accuracy at KL {results['size']['target_kl']:g} (seeds)",
                "chosen log-prob",
            ],
            rows,
        ),
        "real": table(
            [
                "data",
                "form",
                "method",
                "learning rate",
                "preference accuracy",
                "chosen log-prob",
                "rejected log-prob",
            ],
            real,
        ),
    }


def plot(results: Run, path: Path) -> None:
    """Draws accuracy against drift at each arm's learning rates, as means over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    in_lab = results["lab"]
    figure, grid = plt.subplots(1, 3, figsize=(14, 4.4), sharey=True, layout="constrained")
    colours = {LISTS: "#0072B2", PAIRS: "#D55E00", PROMPTS: "#009E73", EPOCHS: "#CC79A7"}
    panels = (("InfoPO", ("infopo",)), ("InfoNCE and DPO", ("infonce", "dpo")), ("SFT on chosen", ("sft",)))
    for axis, (name, methods) in zip(grid, panels, strict=True):
        axis.axhline(in_lab["start"]["accuracy"], color="0.5", ls="--", lw=1, label="start")
        for data, method in [arm for arm in ARMS if arm[1] in methods]:
            points = []
            for rate in results["size"]["rates"]:
                at = [
                    r for r in in_lab["runs"] if (r["data"], r["method"], r["rate"]) == (data, method, rate)
                ]
                points.append(
                    [mean_se([r[m] for r in at])[k] for m in ("kl", "accuracy") for k in ("mean", "se")]
                )
            kl, kl_se, mean, se = np.array(points).T
            label = f"{data}: InfoNCE" if method == "infonce" else data
            style = ":" if method == "infonce" else "-"
            axis.errorbar(
                kl,
                mean,
                yerr=se,
                xerr=kl_se,
                color=colours[data],
                ls=style,
                marker="o",
                capsize=2,
                label=label,
            )
        axis.set_xscale("symlog", linthresh=0.1)
        axis.set_title(name)
        axis.set_xlabel("KL from the start (nats per response)")
        axis.legend(fontsize=7)
    grid[0].set_ylabel("greedy accuracy, mean ± standard error over seeds")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the results")
    parser.add_argument("--seeds", type=int, default=5, help="repetitions, 2 to 10")
    parser.add_argument(
        "--workers", type=int, default=1, help="processes side by side, which do not change the numbers"
    )
    parser.add_argument(
        "--parts", type=Path, help="folder in which finished seeds are kept for the next call"
    )
    parser.add_argument("--tiny", action="store_true", help="small settings, for tests")
    options = parser.parse_args(arguments)
    results = measure(TINY if options.tiny else Size(options.seeds), options.workers, options.parts)
    publish(options.out, results, tables(results), plot)


if __name__ == "__main__":
    main()
