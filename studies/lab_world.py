"""The labs of the studies: problems, a start policy, and pairs, samples and reference values that runs share.

All of them are kept in a work folder. Accuracy needs no generation: a problem is solved greedily if each token of its
worked solution is the most likely one after those before it, which one forward pass shows, and e^(log π(solution)) is
the probability that a sample at temperature 1 is the solution. A right answer behind a slip, which `verify` forgives,
is not counted.

Pairs of studies 04 to 08 are those of `infopo.lab.make_pairs`, which drew them before there was `infopo pairs`: other
samples would make their kept results those of other data. Study 09 draws by the workflow behind `infopo pairs`.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from infopo.data.counts import DataCounts
from infopo.data.encode import Encoder, encode_rows
from infopo.data.examples import ExampleDataset
from infopo.data.packing import PreferenceCollator
from infopo.data.sources import read_rows
from infopo.generate import sample
from infopo.lab import Problem, make_problems, verify
from infopo.lab.evaluation import as_prompt, longest_response
from infopo.lab.preferences import make_pairs
from infopo.logps import forest
from infopo.models import LAB_POLICY, load_policy, load_tokenizer
from infopo.records import PackedBatch, PreferenceExample
from infopo.reference_pass import precompute
from infopo.runs import write_text_atomic
from lab_train_policy import IGNORED, collate, encode

Array = NDArray[np.float64]
Record = dict[str, Any]

FOREIGN = "foreign"
"""Labels of verified pairs that the policy has not sampled: their sides begin with the same unlikely line."""

WORDY = "wordy"
"""Labels of verified pairs with sides that state each line twice: three chosen ones of four, one rejected of four."""

FORWARD = 48
"""Number of rows of a forward pass without gradient."""


@dataclass(frozen=True)
class Lab:
    """Problems, the policy that training starts from, and the sizes of what is measured.

    Attributes:
        operations: Smallest and largest number of operations of a problem.
        tuning_steps: Steps of maximum likelihood on worked solutions that lead from the shipped policy to the start.
            With 0 the start is the shipped policy itself.
        problems: Number of evaluation problems.
        anchors: Number of samples of the start policy, on which forward KL is measured.
        held_out: Number of held-out pairs.
        lengths: Number of sampled responses whose length is measured at the end of a run.
    """

    operations: tuple[int, int]
    tuning_steps: int = 0
    problems: int = 320
    anchors: int = 160
    held_out: int = 64
    lengths: int = 64


LABS = {
    "short": Lab((2, 3)),
    "long": Lab((10, 12), tuning_steps=800, problems=128, anchors=64, held_out=24, lengths=24),
    "tiny": Lab((1, 1), problems=8, anchors=4, held_out=3, lengths=2),
}
"""Labs by name. Responses of `long` have at least four times the tokens of those of `short`. `tiny` is for tests."""


@cache
def start_policy(work: Path, lab: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns the policy that runs of a lab start from, and its tokenizer. What has to be tuned is kept."""
    tokenizer, setting = load_tokenizer(LAB_POLICY), LABS[lab]
    if not setting.tuning_steps:
        return load_policy(LAB_POLICY).eval(), tokenizer
    folder = work / f"policy-{lab}-{setting.tuning_steps}"
    if not (folder / "config.json").is_file():
        print(f"tuning the start policy of the lab {lab!r}: {setting.tuning_steps} steps", flush=True)
        tuned(load_policy(LAB_POLICY), tokenizer, setting).save_pretrained(folder)
    return load_policy(str(folder)).eval(), tokenizer


def tuned(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lab: Lab) -> PreTrainedModel:
    """Trains the shipped policy on worked solutions of this lab's problems, in place.

    As for the shipped policy, the run is stopped before the learning rate has decayed to 0, so that preference
    training has something left to do.
    """
    batch, peak, warmup, schedule = 32, 3e-3, 50, 1000
    torch.manual_seed(0)
    rows = encode(tokenizer, make_problems(lab.tuning_steps * batch, 0, "sft", lab.operations))
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in range(lab.tuning_steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min((step + 1) / warmup, (schedule - step) / (schedule - warmup))
        ids, labels = collate(rows[step * batch : (step + 1) * batch], int(tokenizer.pad_token_id))
        logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def start(work: Path, lab: str) -> Record:
    """Returns what is measured of the start policy, with accuracy by generation and `verify` beside that without."""
    file = work / f"start-{lab}-{LABS[lab].tuning_steps}.json"
    if not file.is_file():
        setting, (policy, tokenizer) = LABS[lab], start_policy(work, lab)
        problems, _ = _evaluation(work, lab)
        with torch.no_grad():
            greedy, probability = solved(policy, encode(tokenizer, problems), int(tokenizer.pad_token_id))
        texts = sample(
            policy,
            tokenizer,
            [as_prompt(problem) for problem in problems],
            max_new_tokens=longest_response(setting.operations[1]),
            temperature=0.0,
            batch_size=256,
            seed=0,
        )
        right = [r.finished and verify(p, r.text) for p, (r,) in zip(problems, texts, strict=True)]
        record = {
            "accuracy": float(greedy.mean()),
            "verified_accuracy": float(np.mean(right)),
            "sampled_accuracy": float(probability.mean()),
            "problems": len(problems),
            "parameters": policy.num_parameters(),
        }
        work.mkdir(parents=True, exist_ok=True)
        write_text_atomic(file, json.dumps(record))
    found: Record = json.loads(file.read_text(encoding="utf-8"))
    return found


def pair_lengths(work: Path, lab: str, labels: str, seed: int, n: int) -> dict[str, float]:
    """Returns the mean number of tokens of chosen and of rejected responses of the first `n` pairs."""
    examples = _pairs(work, lab, labels, seed, n)
    return {
        "chosen_tokens": float(np.mean([len(ids) for e in examples for ids in e.chosen_ids])),
        "rejected_tokens": float(np.mean([len(ids) for e in examples for ids in e.rejected_ids])),
    }


@dataclass(frozen=True)
class World:
    """Objects that the runs of one lab, kind of labels and seed share.

    Attributes:
        lab: The lab.
        policy: The start policy, which is the reference, too.
        tokenizer: Its tokenizer.
        pairs: Training pairs, with reference values.
        held_out_pairs: Pairs on other problems, with reference values. They are the same for all seeds.
        held_out: The same as batches.
        anchors: Samples of the start policy on evaluation problems, with reference values.
        solutions: Worked solutions of the evaluation problems, as ids and length of the prompt.
        problems: The evaluation problems.
    """

    lab: Lab
    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pairs: list[PreferenceExample]
    held_out_pairs: list[PreferenceExample]
    held_out: list[PackedBatch]
    anchors: list[PackedBatch]
    solutions: list[tuple[list[int], int]]
    problems: list[Problem]


@lru_cache(maxsize=2)
def world(work: Path, lab: str, labels: str, seed: int, pairs: int) -> World:
    """Makes or loads what runs share."""
    setting, (policy, tokenizer) = LABS[lab], start_policy(work, lab)
    problems, anchors = _evaluation(work, lab)
    held_out = _pairs(work, lab, labels, 0, setting.held_out)
    asked = {tuple(example.prompt_ids) for example in held_out}
    own = _pairs(work, lab, labels, seed, pairs)
    # So few questions coincide that the number of pairs stays what it is said to be, but for a handful.
    own = own if lab == "tiny" else [example for example in own if tuple(example.prompt_ids) not in asked]
    batches = [packed(held_out[i : i + FORWARD // 2]) for i in range(0, len(held_out), FORWARD // 2)]
    return World(
        setting, policy, tokenizer, own, held_out, batches, anchors, encode(tokenizer, problems), problems
    )


@cache
def _evaluation(work: Path, lab: str) -> tuple[list[Problem], list[PackedBatch]]:
    """Returns evaluation problems and samples of the start policy on the first of them, with reference values."""
    setting, (policy, tokenizer) = LABS[lab], start_policy(work, lab)
    problems = make_problems(setting.problems, 0, "evaluation", setting.operations)
    examples = []
    for problem, ids in zip(
        problems, sampled(policy, tokenizer, setting, problems[: setting.anchors]), strict=False
    ):
        examples.append(PreferenceExample(_prompt_ids(tokenizer, problem), [ids], [], problem.question))
    examples = with_reference(examples, policy)
    return problems, [packed(examples[i : i + FORWARD]) for i in range(0, len(examples), FORWARD)]


def sampled(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lab: Lab, problems: Sequence[Problem]
) -> list[list[int]]:
    """Samples a response to each problem at temperature 1. Returns their tokens, with the end of turn if it came."""
    drawn = sample(
        policy,
        tokenizer,
        [as_prompt(problem) for problem in problems],
        max_new_tokens=longest_response(lab.operations[1]),
        temperature=1.0,
        batch_size=256,
        seed=0,
    )
    end = int(tokenizer.eos_token_id)
    return [[*response.token_ids, *([end] if response.finished else [])] or [end] for (response,) in drawn]


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        as_prompt(problem), add_generation_prompt=True, return_dict=False
    )
    return ids


def _pairs(work: Path, lab: str, labels: str, seed: int, n: int) -> list[PreferenceExample]:
    """Returns the first `n` pairs of a seed, with reference values. A smaller number is a prefix of a larger one."""
    file = work / "pairs" / f"{lab}-{LABS[lab].tuning_steps}-{labels}-{seed}.json"
    policy, tokenizer = start_policy(work, lab)
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"rows": [], "reference": []}
    if len(found["rows"]) < n:
        if labels in CHANGED:
            _pairs(work, lab, "verified", seed, n)
            kept = work / "pairs" / f"{lab}-{LABS[lab].tuning_steps}-verified-{seed}.json"
            verified = json.loads(kept.read_text(encoding="utf-8"))["rows"][:n]
            rows = [CHANGED[labels](row, index) for index, row in enumerate(verified)]
        else:
            rows = make_pairs(
                policy, tokenizer, labels=labels, n=n, seed=seed, operations=LABS[lab].operations
            ).rows
        values = [
            list(example.reference or ()) for example in with_reference(encoded(rows, tokenizer), policy)
        ]
        found = {"rows": rows, "reference": values}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(file, json.dumps(found))
    examples = encoded(found["rows"][:n], tokenizer)
    return [replace(e, reference=r) for e, r in zip(examples, found["reference"], strict=False)]


def _foreign(row: Record, index: int) -> Record:
    """Returns a pair whose sides both begin with a line that the policy would not write."""
    return _with(row, lambda side, text: f"0+0=0\n{text}")


def _wordy(row: Record, index: int) -> Record:
    """Returns a pair whose chosen side states its lines twice in three rows of four, and its rejected side in one."""

    def changed(side: str, text: str) -> str:
        is_wordy = index % 4 > 0 if side == "chosen" else index % 4 == 1
        return "\n".join(f"{line}\n{line}" for line in text.split("\n")) if is_wordy else text

    return _with(row, changed)


def _with(row: Record, change: Callable[[str, str], str]) -> Record:
    """Returns a row whose responses are changed."""
    sides = {
        side: [{**row[side][0], "content": change(side, row[side][0]["content"])}]
        for side in ("chosen", "rejected")
    }
    return {**row, **sides}


CHANGED = {FOREIGN: _foreign, WORDY: _wordy}
"""Labels whose pairs are verified ones that are changed."""


def encoded(rows: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> list[PreferenceExample]:
    counts = DataCounts(on_bad_row="raise", source="rows")
    dataset = encode_rows(
        read_rows(datasets.Dataset.from_list(list(rows)), counts),
        Encoder(tokenizer, max_length=512, max_prompt_length=256),
        counts,
    )
    return [dataset[i] for i in range(len(dataset))]


def with_reference(examples: Sequence[PreferenceExample], policy: PreTrainedModel) -> list[PreferenceExample]:
    sides = frozenset({"chosen", "rejected"})
    dataset = precompute(
        ExampleDataset.from_examples(examples), policy, sides, batch_size=FORWARD, device=torch.device("cpu")
    )
    return [dataset[i] for i in range(len(dataset))]


def packed(examples: Sequence[PreferenceExample]) -> PackedBatch:
    (batch,) = PreferenceCollator(plan=forest.Plan.of)(examples)
    return batch


def solved(
    policy: PreTrainedModel, solutions: Sequence[tuple[list[int], int]], pad: int
) -> tuple[Array, Array]:
    """Returns of each problem whether greedy decoding gives its worked solution, and the solution's probability."""
    greedy, probability = [], []
    for start in range(0, len(solutions), FORWARD):
        ids, labels = collate(solutions[start : start + FORWARD], pad)
        logits, wanted = policy(input_ids=ids, use_cache=False).logits, labels != IGNORED
        greedy.append(((logits.argmax(-1) == labels) | ~wanted).all(1))
        logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        probability.append((logps * wanted).double().sum(1).exp())
    return torch.cat(greedy).double().numpy(), torch.cat(probability).numpy()
