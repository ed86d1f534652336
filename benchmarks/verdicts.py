"""Are the thresholds of the verdicts right? Planted faults must be named first, and sound runs must get no verdict.

    python benchmarks/verdicts.py benchmarks/results/verdicts.json

Runs of 24 steps in the lab: five with a planted fault, and twenty sound ones (four losses, five seeds, both kinds of
labels), and four sound ones of 120 steps, in which what grows with time has time to grow. The result has effect and
interval of each check in each run: the margins of the thresholds. Takes about fifteen minutes on one core. Runs that an
earlier call has put into the result are not made again.
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from infopo.arguments import InfoPOConfig
from infopo.build import build_examples
from infopo.data.examples import ExampleDataset
from infopo.models import LAB_POLICY, load_policy, load_tokenizer
from infopo.provenance import environment
from infopo.records import PreferenceExample
from infopo.runs import write_json_atomic
from infopo.settings import DataSettings
from infopo.trainer import InfoPOTrainer

STEPS = 24
LONG_STEPS = 120
SOUND: dict[str, dict[str, Any]] = {
    "infopo": {"objective": "infopo", "learning_rate": 5.6e-5},
    "infopo_low_rate": {"objective": "infopo", "learning_rate": 2e-5},
    "dpo": {"objective": "dpo", "beta": 1.0, "learning_rate": 5.6e-5},
    "sft": {"objective": "sft", "learning_rate": 5.6e-5},
}
SEEDS = range(5)
LONG = ("infopo", "dpo")
"""Losses of the longer runs, on both kinds of labels."""


class Thaw(TrainerCallback):
    """Copies the policy into its live reference after each step, as a reference that shares weights would be."""

    trainer: InfoPOTrainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer.ref_model is not None
        with torch.no_grad():
            for theirs, own in zip(
                self.trainer.ref_model.parameters(), self.trainer.model.parameters(), strict=True
            ):
                theirs.copy_(own)


Change = Callable[[PreferenceExample], PreferenceExample]


def swapped(example: PreferenceExample) -> PreferenceExample:
    return replace(example, chosen_ids=example.rejected_ids, rejected_ids=example.chosen_ids, reference=None)


def long_chosen(example: PreferenceExample) -> PreferenceExample:
    """The chosen solution is written out twice before its end of turn."""
    (ids,) = example.chosen_ids
    return replace(example, chosen_ids=[[*ids[:-1], *ids]], reference=None)


def near_duplicate(example: PreferenceExample) -> PreferenceExample:
    """The rejected response is the chosen one with another character before its end of turn."""
    (ids,), (others,) = example.chosen_ids, example.rejected_ids
    other = next((token for token in others if token != ids[-2]), ids[0])
    return replace(example, rejected_ids=[[*ids[:-2], other, ids[-1]]], reference=None)


PLANTED: dict[str, tuple[str, dict[str, Any], Change | None]] = {
    "unfrozen reference": ("reference not frozen", {"reference": "live"}, None),
    "swapped labels": ("suspect labels", {}, swapped),
    "far too high learning rate": ("instability", {"learning_rate": 3e-2}, None),
    "long-chosen data": ("length bias", {}, long_chosen),
    "near-duplicate pairs": ("near-duplicate sides", {}, near_duplicate),
}
"""Fault -> the verdict that must be named first, settings, and what is done to each row."""


def judged(dataset: ExampleDataset, tokenizer: Any, *, thaw: bool = False, **settings: Any) -> dict[str, Any]:
    """Trains one model, and returns what its `verdicts.json` contains."""
    with tempfile.TemporaryDirectory() as folder:
        args = InfoPOConfig(
            folder,
            **{
                "max_steps": STEPS, "per_device_train_batch_size": 32, "logging_steps": 1, "save_strategy": "no",
                "activation_checkpointing": False, "use_cpu": True, "disable_tqdm": True, "report_to": "none",
                "reference_store": "off", "dataset_cache": "off", "reference_sides": "both", "probe_steps": 4,
                **settings,
            },
        )  # fmt: skip
        callbacks = [Thaw()] if thaw else []
        trainer = InfoPOTrainer(
            load_policy(LAB_POLICY, dtype="float32"),
            args=args,
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        for callback in callbacks:
            callback.trainer = trainer
        try:
            trainer.train()
            ended = "as planned"
        except Exception as error:  # a planted fault may end the run, and its verdicts are there all the same
            ended = f"{type(error).__name__}: {str(error)[:200]}"
        record: dict[str, Any] = json.loads((Path(folder) / "verdicts.json").read_text())
    return {"ended": ended, **record}


def changed(dataset: Iterable[PreferenceExample], change: Change | None) -> ExampleDataset:
    return ExampleDataset.from_examples(map(change, dataset) if change else dataset)


def runs(
    datasets: dict[str, ExampleDataset], tokenizer: Any, done: set[str]
) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """Yields name, expected verdict (None of a sound run) and record of each run that is not done."""
    for fault, (expected, settings, change) in PLANTED.items():
        if fault in done:
            continue
        settings = {"objective": "infopo", "learning_rate": 5.6e-5} | settings
        dataset = changed(datasets["verified"], change)
        yield fault, expected, judged(dataset, tokenizer, thaw=fault == "unfrozen reference", **settings)
    for seed in SEEDS:
        labels = ("verified", "graded")[seed % 2]
        for loss, settings in SOUND.items():
            name = f"{loss}, {labels}, seed {seed}"
            if name not in done:
                yield name, None, judged(datasets[labels], tokenizer, seed=seed, **settings)
    for loss, (labels, dataset) in itertools.product(LONG, datasets.items()):
        name = f"{loss}, {labels}, {LONG_STEPS} steps"
        if name not in done:
            settings = {"max_steps": LONG_STEPS, "probe_steps": 20, **SOUND[loss]}
            yield name, None, judged(dataset, tokenizer, seed=0, **settings)


def summary_of(name: str, expected: str | None, record: dict[str, Any]) -> dict[str, Any]:
    fired = [verdict["name"] for verdict in record["verdicts"]]
    return {
        "run": name,
        "expected_first": expected,
        "fired": fired,
        "as_expected": fired[:1] == ([expected] if expected else []),
        "ended": record["ended"],
        "checks": {
            each["name"]: {"effect": each["effect"], "interval": each["interval"]}
            if each["not_checked"] is None
            else {"not_checked": each["not_checked"]}
            for each in record["checked"]
        },
    }


def margins(records: list[dict[str, Any]], *, long: bool = False) -> dict[str, list[float]]:
    """Returns the least and largest effect of each check over the sound runs, the short or the long ones."""
    effects: dict[str, list[float]] = {}
    for record in records:
        if record["run"].endswith(f"{LONG_STEPS} steps") != long:
            continue
        for name, check in record["checks"].items():
            if record["expected_first"] is None and isinstance(check.get("effect"), int | float):
                effects.setdefault(name, []).append(check["effect"])
    return {name: [min(values), max(values)] for name, values in effects.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    tokenizer = load_tokenizer(LAB_POLICY)
    datasets = {
        labels: build_examples(DataSettings(path=f"lab:{labels}"), tokenizer)[0]
        for labels in ("verified", "graded")
    }
    records = json.loads(output.read_text())["runs"] if output.exists() else []
    for name, expected, record in runs(datasets, tokenizer, {each["run"] for each in records}):
        records.append(summary_of(name, expected, record))
        print(
            name,
            "|",
            *records[-1]["fired"],
            "|",
            "as expected" if records[-1]["as_expected"] else "NOT",
            flush=True,
        )
        result = {
            "schema_version": 1,
            "steps": STEPS,
            "n": len(records),
            "as_expected": sum(each["as_expected"] for each in records),
            "effects_of_sound_runs": margins(records),
            "effects_of_long_sound_runs": margins(records, long=True),
            "runs": records,
            "environment": environment(seed=None),
        }
        write_json_atomic(output, result)


if __name__ == "__main__":
    main()
