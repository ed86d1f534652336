"""Composition root: recipe -> finished objects. Nothing else builds trainers from settings."""

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields
from enum import Enum
from functools import cache
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from infopo import models
from infopo.arguments import InfoPOConfig
from infopo.config import DataSection, Recipe, TrainField
from infopo.data.counts import DataCounts
from infopo.data.encode import Encoder, encode_rows
from infopo.data.examples import ExampleDataset
from infopo.data.sources import read_rows
from infopo.lab.source import is_lab_source, lab_dataset
from infopo.trainer import InfoPOTrainer

_SET_ELSEWHERE = {
    "output_dir", "objective", "loss_type", "loss_weights", "beta", "objective_parameters", "label_smoothing",
    "max_length", "max_prompt_length", "on_bad_row", "reference", "reference_sides", "precompute_ref_log_probs",
    "dataset_num_proc", "model_init_kwargs", "trust_remote_code",
}  # fmt: skip
"""Arguments that have a place of their own in a recipe, outside `train`."""


@cache
def train_fields() -> Mapping[str, TrainField]:
    """What a recipe's `train` section accepts: every trainer argument without another place in the recipe."""
    hints = typing.get_type_hints(InfoPOConfig)
    return {
        f.name: TrainField(f.name, *_kinds(hints[f.name], f.default))
        for f in fields(InfoPOConfig)
        if f.init and f.name not in _SET_ELSEWHERE
    }


def _kinds(hint: Any, default: Any) -> tuple[tuple[type, ...], tuple[str, ...]]:
    """Accepted types, and accepted texts where the type is an enumeration."""
    members = (
        typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) else (hint,)
    )
    if typing.get_origin(hint) in (list, dict):
        members = (typing.get_origin(hint),)
    kinds: list[type] = []
    choices: list[str] = []
    for member in members:
        member = typing.get_origin(member) or member
        if isinstance(member, type) and issubclass(member, Enum):
            kinds.append(str)
            choices += [str(choice.value) for choice in member]
        elif isinstance(member, type):
            kinds.append(member)
    if default is None and default is not MISSING:
        kinds.append(types.NoneType)
    return tuple(kinds), tuple(choices)


def build_arguments(recipe: Recipe) -> InfoPOConfig:
    """The trainer's settings.

    Raises:
        RecipeError: transformers refuses a combination of `train` arguments.
    """
    train = {key: value for key, value in recipe.train.items() if key != "resume_from_checkpoint"}
    train.setdefault("report_to", "none")
    data, reference = recipe.data, recipe.reference
    return InfoPOConfig(
        output_dir=recipe.output_dir,
        objective=recipe.objective.name,
        objective_parameters=dict(recipe.objective.parameters),
        max_length=data.max_length,
        max_prompt_length=data.max_prompt_length,
        on_bad_row=data.on_bad_row,
        dataset_num_proc=data.num_proc,
        reference=reference.source,
        reference_sides=reference.sides,
        trust_remote_code=recipe.model.trust_remote_code,
        **train,
    )


def build_policy(recipe: Recipe) -> torch.nn.Module:
    """The SFT policy. Its weights are float32 when all of them are trained, unless the recipe names a type."""
    section = recipe.model
    # A bfloat16 weight has 8 significant bits: the updates of a learning rate of 1e-6 would be rounded away.
    dtype = "float32" if section.dtype == "auto" and section.adapter is None else section.dtype
    kwargs: dict[str, Any] = {"dtype": dtype, "trust_remote_code": section.trust_remote_code}
    if section.attn_implementation is not None:
        kwargs["attn_implementation"] = section.attn_implementation
    if section.revision is not None:
        kwargs["revision"] = section.revision
    return models.load_policy(section.name_or_path, **kwargs)


def build_adapter(recipe: Recipe) -> Any:
    """The LoRA configuration, or None."""
    adapter = recipe.model.adapter
    if adapter is None:
        return None
    return models.lora_config(
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        target_modules=adapter.target_modules,
    )


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to the policy."""
    section = recipe.model
    kwargs = {"revision": section.revision} if section.revision else {}
    return models.load_tokenizer(section.name_or_path, trust_remote_code=section.trust_remote_code, **kwargs)


def build_examples(
    data: DataSection, tokenizer: PreTrainedTokenizerBase, *, evaluation: bool = False
) -> tuple[ExampleDataset, DataCounts]:
    """Rows of the training or evaluation data as examples, and the account of what happened to them.

    Raises:
        DataError: A file or row that cannot be used (rows: unless they are skipped).
    """
    path = (data.eval_path or data.path) if evaluation else data.path
    split = (data.eval_split or data.split) if evaluation else data.split
    counts = DataCounts(on_bad_row=data.on_bad_row, source=path)
    encoder = Encoder(tokenizer, max_length=data.max_length, max_prompt_length=data.max_prompt_length)
    source = lab_dataset(path, split) if is_lab_source(path) else path
    rows = islice(read_rows(source, counts, split=split, shape=data.shape), data.limit)
    return encode_rows(rows, encoder, counts, num_proc=data.num_proc), counts


def build_trainer(
    recipe: Recipe, callbacks: list[TrainerCallback] | None = None
) -> tuple[InfoPOTrainer, list[DataCounts]]:
    """Everything a recipe asks for, ready to train, with the accounts of its data."""
    tokenizer = build_tokenizer(recipe)
    train, counts = build_examples(recipe.data, tokenizer)
    accounts, evaluation = [counts], None
    if recipe.data.has_eval:
        evaluation, eval_counts = build_examples(recipe.data, tokenizer, evaluation=True)
        accounts.append(eval_counts)
    return build_trainer_on(recipe, tokenizer, train, evaluation, callbacks), accounts


def build_trainer_on(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    train: ExampleDataset,
    evaluation: ExampleDataset | None,
    callbacks: list[TrainerCallback] | None = None,
) -> InfoPOTrainer:
    """The recipe's trainer on examples that are at hand."""
    return InfoPOTrainer(
        model=build_policy(recipe),
        args=build_arguments(recipe),
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        callbacks=callbacks,
        peft_config=build_adapter(recipe),
    )
