"""Composition root: recipe -> finished objects. Nothing else builds trainers from settings."""

import contextlib
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase, TrainerCallback

from infopo import models
from infopo.arguments import REFUSALS, InfoPOConfig
from infopo.config import SECTIONS, Recipe, TrainField
from infopo.data.counts import DataCounts
from infopo.data.encode import encode_rows
from infopo.data.examples import ExampleDataset
from infopo.data.sources import Located, located, read_mixture, read_rows
from infopo.data.streaming import ExampleStream
from infopo.encoding import encode_once
from infopo.errors import ConfigError, DataError, InfoPOError, ModelError
from infopo.evaluation.during import TaskEvaluation, refuse_sharded
from infopo.evaluation.settings import EvaluationSettings
from infopo.intake import encoder_of, rule_of
from infopo.lab.source import is_lab_source, lab_dataset
from infopo.losses.mixture import as_written
from infopo.records import PreferenceRow
from infopo.rehearsal import optimizer_problems, tracker_problems, worker_problems
from infopo.secrets import MASK, masked
from infopo.settings import DataSettings, EvaluateSettings, arguments_of
from infopo.train_table import SET_ELSEWHERE, quick_train_fields
from infopo.trainer import InfoPOTrainer
from infopo.validation import options_named


@cache
def train_fields() -> Mapping[str, TrainField]:
    """Returns what a recipe's `train` section accepts: every trainer argument without another place in the recipe.

    The sources of the classes tell types (`quick_train_fields`), and the classes which arguments and choices there are.
    """
    quick = quick_train_fields()
    choices = {f.name: f.metadata.get("choices") for f in fields(InfoPOConfig)}
    choices["torch_compile_backend"] = [backend.value.lower() for backend in DynamoBackend]
    table = {}
    for f in fields(InfoPOConfig):
        if f.init and f.name not in SET_ELSEWHERE:
            known = quick.get(f.name, TrainField(f.name))
            table[f.name] = replace(known, choices=tuple(known.choices or choices[f.name] or ()))
    return table


def build_arguments(recipe: Recipe) -> InfoPOConfig:
    """The trainer's settings.

    Raises:
        ConfigError: transformers or torch refuse a `train` argument, or a combination of them, on this machine.
    """
    # A secret that was masked when the recipe was written comes from the environment (HF_TOKEN).
    train = {key: value for key, value in recipe.without_resume().train.items() if value != MASK}
    train.setdefault("report_to", "none")
    given = {
        argument: getattr(section, name)
        for section in (recipe.model, recipe.data, recipe.reference)
        for name, argument in arguments_of(type(section)).items()
    }
    try:
        args = InfoPOConfig(
            output_dir=recipe.output_dir,
            **_loss_arguments(recipe),
            **given,
            **train,
        )
    except ConfigError as error:
        of_transformers = "train: " if isinstance(error.__cause__, REFUSALS) else ""
        problems = [of_transformers + _in_recipe(problem) for problem in error.problems]
        raise type(error)(problems) from error
    tried = [*tracker_problems(args), *worker_problems(args), *optimizer_problems(args)]
    if problems := [*map(_in_recipe, tried), *_combination_problems(args)]:
        raise ConfigError(problems)
    return args


def _loss_arguments(recipe: Recipe) -> dict[str, Any]:
    """Returns the arguments that name the loss. A single objective has its parameters beside it."""
    written = as_written([(term.name, term.parameters, term.weight) for term in recipe.objective])
    if isinstance(written, list):
        return {"objective": written}
    return {"objective": written.pop("name"), "objective_parameters": written}


def _in_recipe(problem: str) -> str:
    """Returns a problem of the trainer, in which the first word is the setting, under the name that recipes have."""
    places = {name: f"train.{name}" for name in train_fields()}
    for name, section in SECTIONS.items():
        places |= {argument: f"{name}.{setting}" for setting, argument in arguments_of(section).items()}
    return re.sub(r"^\w+", lambda name: places.get(name[0], name[0]), problem)


def _combination_problems(args: InfoPOConfig) -> list[str]:
    problems = []
    if args.save_strategy == "best" and args.metric_for_best_model is None:
        problems.append("train.save_strategy: best needs train.metric_for_best_model, e.g. loss")
    if args.save_strategy == "best" and args.eval_strategy == "no":
        problems.append("train.save_strategy: best needs evaluation; set train.eval_strategy")
    return problems


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
    if section.quantization is not None:
        kwargs["quantization_config"] = _quantization(section.quantization)
    with _model_named(recipe):
        return models.load_policy(section.name_or_path, **kwargs)


def _quantization(bits: str) -> BitsAndBytesConfig:
    """The configuration of QLoRA's authors for 4 bits: NF4, double quantization, arithmetic in bfloat16.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("model.quantization: bitsandbytes is not installed; pip install bitsandbytes")
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def build_adapter(recipe: Recipe) -> Any:
    """The LoRA configuration, or None.

    Raises:
        ConfigError: The modules are named by a regular expression that is none.
        ModelError: peft is not installed.
    """
    adapter = recipe.model.adapter
    if adapter is None:
        return None
    if isinstance(adapter.target_modules, str):
        try:
            re.compile(adapter.target_modules)
        except re.error as error:
            raise ConfigError(
                f"model.adapter.target_modules: {adapter.target_modules!r} is no regular expression: {error}"
            ) from error
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
    with _model_named(recipe):
        return models.load_tokenizer(
            section.name_or_path, trust_remote_code=section.trust_remote_code, **kwargs
        )


@contextlib.contextmanager
def settings_named(recipe: Recipe) -> Iterator[None]:
    """Within it, an error of a source that cannot be found names the setting with its line."""
    try:
        yield
    except DataError as error:
        if error.reason not in ("no such file", "hub"):
            raise
        evaluates = error.row_id in _names(recipe.data.eval_path or [])
        key = "data.eval_path" if evaluates and error.row_id not in _names(recipe.data.path) else "data.path"
        raise ConfigError(f"{recipe.located(key)}: {error}") from error


@contextlib.contextmanager
def _model_named(recipe: Recipe) -> Iterator[None]:
    """Within it, an error of a model that is not on this machine names the setting with its line."""
    name = recipe.model.name_or_path
    try:
        yield
    except ModelError as error:
        if name == models.LAB_POLICY or Path(name).expanduser().is_dir():
            raise
        raise ModelError(f"{recipe.located('model.name_or_path')}: {error}") from error


def build_examples(
    data: DataSettings, tokenizer: PreTrainedTokenizerBase, *, evaluation: bool = False
) -> tuple[ExampleDataset, DataCounts]:
    """Rows of the training or evaluation data as examples, and the account of what happened to them.

    Raises:
        DataError: A file or row that cannot be used (rows: unless they are skipped).
    """
    path = (data.eval_path or data.path) if evaluation else data.path
    split = (data.eval_split or data.split) if evaluation else data.split
    named = data.eval_split if evaluation else data.split if data.split != DataSettings.split else None
    counts = DataCounts(on_bad_row=data.on_bad_row, source=masked(" + ".join(_names(path))))
    encoder, sources = encoder_of(data, tokenizer), _located(data, path, split)

    def encode(counts: DataCounts) -> ExampleDataset:
        rows = islice(_open_rows(data, path, sources, counts), data.limit)
        return encode_rows(rows, encoder, counts, num_proc=data.num_proc)

    names = ("shape", "columns", "score_rule", "score_threshold", "limit")
    reading = {"path": path, "split": split, **{name: getattr(data, name) for name in names}}
    examples = encode_once(sources, encoder, counts, encode, reading=reading, cache=data.cache)
    if all(Path(name).expanduser().is_file() for name in _names(path)):
        if named is not None:
            counts.notes[f"read although the split {named!r} was asked for: a file has no splits"] = len(
                examples
            )
        if evaluation and path == data.path:
            counts.warnings.append(
                f"these {len(examples)} rows are evaluated on, and trained on as well: name data.eval_path, or set "
                "data.eval_split to null"
            )
    return examples, counts


def build_stream(data: DataSettings, tokenizer: PreTrainedTokenizerBase) -> ExampleStream:
    """Returns the training data, which are read and encoded while they are trained on. Its ledger is `counts`.

    Raises:
        DataError: A source cannot be opened.
    """
    counts = DataCounts(on_bad_row=data.on_bad_row, source=masked(" + ".join(_names(data.path))))

    def open_rows(counts: DataCounts) -> Iterator[PreferenceRow]:
        return training_rows(data, counts)

    return ExampleStream(open_rows, encoder_of(data, tokenizer), counts)


def training_rows(data: DataSettings, counts: DataCounts) -> Iterator[PreferenceRow]:
    """Returns the rows that a recipe trains on, which are read one by one.

    Raises:
        DataError: A source is not there, or a row cannot be used and `counts.on_bad_row` is `raise`.
    """
    sources = _located(data, data.path, data.split)
    return islice(_open_rows(data, data.path, sources, counts), data.limit)


def _names(path: str | list[str] | dict[str, float]) -> list[str]:
    return [path] if isinstance(path, str) else list(path)


def _located(data: DataSettings, path: str | list[str] | dict[str, float], split: str) -> list[Located]:
    """The sources that `data.path` names, found and not yet read.

    Raises:
        DataError: One of them is not there.
    """
    return [
        lab_dataset(name, split) if is_lab_source(name) else located(name, name, split, data.streaming)
        for name in _names(path)
    ]


def _open_rows(
    data: DataSettings,
    path: str | list[str] | dict[str, float],
    found: Sequence[Located],
    counts: DataCounts,
) -> Iterator[PreferenceRow]:
    """Rows of one source, or of several as `data.path` says."""
    rule = rule_of(data)
    sources = [
        (
            name,
            read_rows(
                source,
                counts,
                shape=data.shape,
                rule=rule,
                name=name,
                columns=None if is_lab_source(name) else data.columns,
            ),
        )
        for name, source in zip(_names(path), found, strict=True)
    ]
    if isinstance(path, str):
        return sources[0][1]
    return read_mixture(sources, list(path.values()) if isinstance(path, dict) else None, counts)


def build_trainer(recipe: Recipe, callbacks: list[TrainerCallback] | None = None) -> InfoPOTrainer:
    """Returns everything a recipe asks for, ready to train. `data_counts` has the accounts of its data."""
    build_arguments(recipe)  # what is wrong with them should not cost the reading of the data
    tokenizer = build_tokenizer(recipe)
    evaluation: ExampleDataset | None = None
    train: ExampleDataset | ExampleStream
    accounts: dict[str, DataCounts] = {}
    if recipe.data.streaming:
        train = build_stream(recipe.data, tokenizer)
        accounts["train"] = train.counts
    else:
        with settings_named(recipe):
            train, accounts["train"] = build_examples(recipe.data, tokenizer)
    if recipe.data.has_eval:
        with settings_named(recipe):
            evaluation, accounts["eval"] = build_examples(recipe.data, tokenizer, evaluation=True)
    trainer = build_trainer_on(recipe, tokenizer, train, evaluation, callbacks)
    trainer.data_counts.update(accounts)
    return trainer


def build_trainer_on(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    train: ExampleDataset | ExampleStream,
    evaluation: ExampleDataset | None,
    callbacks: list[TrainerCallback] | None = None,
) -> InfoPOTrainer:
    """The recipe's trainer on examples that are at hand.

    Raises:
        ConfigError: A library is not installed, or a folder or the hub cannot be written to.
    """
    tasks = build_tasks(recipe)
    model, args, adapter = build_policy(recipe), build_arguments(recipe), build_adapter(recipe)
    try:
        trainer = InfoPOTrainer(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            callbacks=[*([tasks] if tasks is not None else []), *(callbacks or [])],
            peft_config=adapter,
        )
    except ConfigError as error:
        raise type(error)([_in_recipe(problem) for problem in error.problems], error.source) from error
    except InfoPOError:
        raise
    except (OSError, ImportError, ValueError) as error:
        raise ConfigError(f"train: the trainer cannot be set up: {error}") from error
    # What the user has named, and not the folder that it stands for.
    trainer.base_name = recipe.model.name_or_path
    trainer.dataset_names = [path] if isinstance(path := recipe.data.path, str) else list(path)
    if tasks is not None:
        refuse_sharded([tasks], trainer.accelerator)
        tasks.log = trainer.log
    return trainer


def build_tasks(recipe: Recipe) -> TaskEvaluation | None:
    """Returns what asks the policy tasks at each evaluation, or None if the recipe names no tasks.

    Raises:
        ConfigError: A task does not exist, or a setting does not go with it.
        DataError: Data of a task cannot be used.
    """
    with options_named("evaluate"):
        settings = evaluation_settings(recipe.evaluate)
        return None if settings is None else TaskEvaluation(settings)


def evaluation_settings(given: EvaluateSettings) -> EvaluationSettings | None:
    """Returns how the tasks of a recipe are asked, or None if it names none.

    Raises:
        ConfigError: A setting does not go with another. It is named as an option of the command line.
    """
    if not given.names:
        return None
    values = {f.name: getattr(given, f.name) for f in fields(given)}
    return EvaluationSettings(**values | {"tasks": given.names, "data": given.data or {}})
