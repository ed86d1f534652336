"""From recipe to finished objects: what `train` accepts, what is refused before anything is loaded, weight types."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from infopo import train_table
from infopo.arguments import InfoPOConfig
from infopo.build import build_adapter, build_arguments, build_examples, build_policy, train_fields
from infopo.config import Recipe, parse_recipe
from infopo.errors import DataError, RecipeError
from infopo.lab import source
from infopo.losses.catalog import complete_parameters
from infopo.models import LAB_POLICY, load_tokenizer
from infopo.settings import DataSettings

MINIMAL = "model: {name_or_path: lab:policy}\ndata: {path: p.jsonl, eval_path: e.jsonl}\noutput_dir: run\n"


def recipe(*overrides: str) -> Recipe:
    return parse_recipe(MINIMAL, source="r.yaml", overrides=overrides, train_fields=train_fields())


def pairs_file(path: Path, n: int = 4) -> str:
    rows = [{"prompt": f"{i}+1=?", "chosen": f"{i + 1}", "rejected": f"{i}!"} for i in range(n)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


# --- what `train` accepts ---


def test_train_accepts_every_default_of_the_trainer():
    defaults = {f.name: f.default for f in fields(InfoPOConfig) if f.init}
    refused = {
        name: problem
        for name, field in train_fields().items()
        if isinstance(defaults[name], bool | int | float | str | None)
        and (problem := field.problem(defaults[name]))
    }
    assert refused == {}


def test_what_has_a_place_of_its_own_in_a_recipe_is_not_accepted_under_train():
    assert train_table.SET_ELSEWHERE - {f.name for f in fields(InfoPOConfig)} == set()
    assert train_table.SET_ELSEWHERE & train_fields().keys() == set()


def test_every_domain_and_list_of_choices_belongs_to_an_argument():
    assert (train_table.DOMAINS.keys() | train_table.CHOICES.keys()) - train_fields().keys() == set()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("per_device_train_batch_size", 0), ("per_device_train_batch_size", -1), ("per_device_eval_batch_size", 0),
        ("gradient_accumulation_steps", 0), ("learning_rate", -1), ("learning_rate", ".inf"), ("num_train_epochs", 0),
        ("num_train_epochs", -1), ("max_steps", 0), ("max_steps", -2), ("warmup_steps", -1), ("weight_decay", -0.1),
        ("adam_beta1", 1), ("adam_beta2", -0.1), ("adam_epsilon", -1), ("seed", -1), ("seed", 2**32), ("data_seed", -1),
        ("logging_steps", 0), ("save_steps", 0), ("eval_steps", 0), ("dataloader_num_workers", -1),
        ("dataloader_prefetch_factor", 0), ("torch_empty_cache_steps", 0), ("precompute_ref_batch_size", 0),
        ("max_tokens_per_forward", 0), ("max_grad_norm", -1), ("neftune_noise_alpha", -1),
        ("lr_scheduler_type", "foo"), ("optim", "foo"), ("eval_strategy", "foo"), ("log_level", "foo"),
        ("ddp_backend", "foo"), ("torch_compile_backend", "foo"), ("train_sampling_strategy", "foo"),
        ("include_num_input_tokens_seen", "foo"), ("learning_rate", "fast"), ("seed", 1.5), ("bf16", "maybe"),
        ("learning_rat", 1), ("objective", "dpo"), ("max_length", 5),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_when_the_recipe_is_read(key: str, value: Any):
    with pytest.raises(RecipeError) as caught:
        recipe(f"train.{key}={value}")
    assert [problem.partition(" ")[0] for problem in caught.value.problems] == [f"train.{key}"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_steps", -1), ("max_steps", 1), ("learning_rate", 0), ("num_train_epochs", 0.01), ("warmup_steps", 0.1),
        ("seed", 0), ("seed", 2**32 - 1), ("eval_steps", ""), ("max_tokens_per_forward", ""), ("report_to", "[]"),
        ("include_num_input_tokens_seen", "true"), ("dataloader_num_workers", 0), ("logging_steps", 0.5),
    ],
)  # fmt: skip
def test_values_at_the_edge_of_their_range_are_accepted(key: str, value: Any):
    assert key in recipe(f"train.{key}={value}").train


# --- what transformers and torch refuse on this machine ---


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.lr_scheduler_type=cosine_with_min_lr"], "train.lr_scheduler_type: cosine_with_min_lr cannot be built"),
        (["train.lr_scheduler_kwargs={foo: 1}"], "train.lr_scheduler_type: linear cannot be built"),
        (["train.lr_scheduler_type=reduce_lr_on_plateau"], "requires an eval strategy"),
        (["train.optim_args=foo"], "train.optim: adamw_torch_fused cannot be built"),
        (["train.optim=galore_adamw"], "train.optim: galore_adamw cannot be built"),
        (["train.report_to=foo"], "train.report_to: 'foo' is unknown or not installed; installed are "),
        (["train.report_to=[tensorboard, foo]"], "train.report_to: 'foo' is unknown or not installed; installed are "),
        (["train.debug=foo"], "foo is not a valid DebugOption"),
        (["train.accelerator_config={foo: 1}"], "unexpected keyword argument 'foo'"),
        (["train.dataloader_prefetch_factor=2"], "dataloader_num_workers"),
        (["train.dataloader_persistent_workers=true"], "train.dataloader_persistent_workers: there are no workers"),
        (["train.logging_steps=1.5"], "must be an integer"),
        (["train.save_strategy=best", "train.eval_strategy=epoch"], "best needs train.metric_for_best_model"),
        (["train.save_strategy=best", "train.metric_for_best_model=loss"], "best needs evaluation"),
        (
            ["train.load_best_model_at_end=true", "train.eval_strategy=steps", "train.save_strategy=epoch"],
            "--load_best_model_at_end requires the save and eval strategy to match",
        ),
        (["train.padding_free=true"], "train.padding_free=True: nothing is padded already"),
        (["train.logging_nan_inf_filter=true"], "train.logging_nan_inf_filter=True: it would hide a loss"),
        (["train.train_sampling_strategy=batch_rebalance"], "train.train_sampling_strategy='batch_rebalance'"),
    ],
)  # fmt: skip
def test_combinations_that_cannot_run_are_recipe_errors(overrides: list[str], expected: str):
    with pytest.raises(RecipeError) as caught:
        build_arguments(recipe(*overrides))
    (problem,) = caught.value.problems
    assert problem.startswith("train")
    assert expected in problem


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine computes in bfloat16")
def test_precision_that_the_machine_does_not_have_is_a_recipe_error():
    with pytest.raises(RecipeError, match=r"train: transformers refuses these settings: .*bf16"):
        build_arguments(recipe("train.bf16=true"))


@pytest.mark.parametrize(
    "name", ["linear", "cosine", "polynomial", "constant", "inverse_sqrt", "warmup_stable_decay"]
)
def test_ordinary_schedules_and_their_settings_are_accepted(name: str):
    kwargs = "{num_decay_steps: 2}" if name == "warmup_stable_decay" else ""
    assert (
        build_arguments(
            recipe(f"train.lr_scheduler_type={name}", f"train.lr_scheduler_kwargs={kwargs}")
        ).lr_scheduler_type
        == name
    )


def test_arguments_say_what_the_recipe_says():
    args = build_arguments(
        recipe("objective={name: dpo, beta: 0.3}", "reference={source: live, sides: both}", "train.seed=7",
               "train.resume_from_checkpoint=true", "data.max_length=99")
    )  # fmt: skip
    assert args.mixture() == [("dpo", complete_parameters("dpo", {"beta": 0.3}), 1.0)]
    assert (args.reference, args.reference_sides, args.seed, args.max_length) == ("live", "both", 7, 99)
    assert args.resume_from_checkpoint is None
    assert args.report_to == []


# --- models ---


def test_weights_are_float32_when_all_are_trained_and_the_checkpoints_own_beneath_an_adapter(tmp_path: Path):
    build_policy(recipe()).to(torch.bfloat16).save_pretrained(tmp_path)
    name = f"model.name_or_path={tmp_path}"
    assert build_policy(recipe(name)).dtype == torch.float32
    assert build_policy(recipe(name, "model.adapter={}")).dtype == torch.bfloat16
    assert build_policy(recipe(name, "model.dtype=float16")).dtype == torch.float16


def test_adapter_is_the_recipes():
    adapter = build_adapter(
        recipe("model.adapter={r: 3, lora_alpha: 5, lora_dropout: 0.1, target_modules: [q_proj]}")
    )
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout, adapter.target_modules) == (
        3,
        5,
        0.1,
        {"q_proj"},
    )
    assert build_adapter(recipe()) is None


# --- data ---


def test_a_split_of_a_file_is_noted_for_there_is_none(tmp_path: Path):
    data = DataSettings(pairs_file(tmp_path / "p.jsonl"), split="validation")
    _, counts = build_examples(data, load_tokenizer(LAB_POLICY))
    assert dict(counts.notes) == {
        "read although the split 'validation' was asked for: a file has no splits": 4
    }


def test_evaluation_on_the_rows_of_training_is_noted(tmp_path: Path):
    data = DataSettings(pairs_file(tmp_path / "p.jsonl"), eval_split="test")
    tokenizer = load_tokenizer(LAB_POLICY)
    _, counts = build_examples(data, tokenizer)
    assert dict(counts.notes) == {}
    _, counts = build_examples(data, tokenizer, evaluation=True)
    (note,) = counts.notes
    assert note.startswith("read although the split 'test' was asked for")
    (warning,) = [w for w in counts.warnings if "are evaluated on, and trained on as well" in w]
    assert f"  warning: {warning}" in counts.lines()


def test_a_file_of_its_own_for_evaluation_needs_no_note(tmp_path: Path):
    data = DataSettings(pairs_file(tmp_path / "p.jsonl"), eval_path=pairs_file(tmp_path / "e.jsonl", 3))
    examples, counts = build_examples(data, load_tokenizer(LAB_POLICY), evaluation=True)
    assert (len(examples), counts.rows, dict(counts.notes)) == (3, 3, {})


def test_limit_reads_the_first_rows(tmp_path: Path):
    data = DataSettings(pairs_file(tmp_path / "p.jsonl"), limit=2)
    examples, counts = build_examples(data, load_tokenizer(LAB_POLICY))
    assert [row_id.rpartition(":")[2] for row_id in examples.row_ids] == ["1", "2"]
    assert counts.used == 2


def test_splits_of_the_lab_hold_different_problems(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(source, "SPLITS", {"train": range(6), "test": range(6, 8)})
    source._rows.cache_clear()
    train, test = source.lab_dataset("lab:graded", "train"), source.lab_dataset("lab:graded", "test")
    source._rows.cache_clear()
    assert (len(train), len(test)) == (6, 2)
    asked = [row["prompt"][0]["content"] for row in [*train, *test]]
    assert len(set(asked)) == 8


@pytest.mark.parametrize(("path", "split"), [("lab:nonsense", "train"), ("lab:verified", "validation")])
def test_what_the_lab_has_not_is_named(path: str, split: str):
    with pytest.raises(DataError, match=f"^{path}: no "):
        source.lab_dataset(path, split)
