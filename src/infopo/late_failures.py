"""What would fail late, found before anything is computed: at the first save, or after the first evaluation."""

import errno
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    EarlyStoppingCallback,
    GenerationConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_utils import SaveStrategy, align_special_tokens

from infopo import models
from infopo.arguments import InfoPOConfig
from infopo.catalog import suggestion
from infopo.data.examples import ExampleDataset
from infopo.errors import ConfigError, ModelError
from infopo.metrics import METRICS, MetricRule, metric_names
from infopo.output import get_logger
from infopo.records import Role
from infopo.reference import reference_sides
from infopo.reference_store import check_folder

logger = get_logger(__name__)

OF_MODEL = ("runtime", "samples_per_second", "steps_per_second", "aux_loss")
"""Metrics that do not depend on objective and data: of transformers, and of a mixture of experts."""


def make_savable(model: nn.Module, processing_class: Any) -> None:
    """Changes what transformers would change or ask for when it saves a model, so that what is tried is what is saved.

    Special tokens of the configurations become those of the tokenizer, as training makes them. A model that generates
    gets a configuration for it, and one whose configuration has a temperature without sampling gets sampling, which
    is logged as a warning. The base of an adapter stays as it is, because it is not saved.
    """
    if models.is_peft_model(model):
        return
    if isinstance(processing_class, PreTrainedTokenizerBase):
        align_special_tokens(model, processing_class)
    base: Any = model
    if getattr(base, "generation_config", True) is None and base.can_generate():
        base.generation_config = GenerationConfig.from_model_config(base.config)
    _repair_generation(getattr(model, "generation_config", None))


def check_saving(model: nn.Module, processing_class: Any, args: InfoPOConfig) -> None:
    """Saves everything but the weights once, to a folder that is removed: what fails would fail after hours.

    Raises:
        ConfigError: The output folder is a file, or cannot be written to.
        ModelError: The model's configuration, that of its generation or the tokenizer cannot be saved.
    """
    if problem := check_folder(Path(args.output_dir)):
        raise ConfigError(f"output_dir: {problem}")
    parts = {
        "processing_class": (processing_class, "save it with save_pretrained to see why, or pass another")
    }
    if not models.is_peft_model(model):  # an adapter is saved without the configurations of its base
        for name in ("config", "generation_config"):
            parts[name] = (getattr(model, name, None), f"change the values on model.{name}")
    with tempfile.TemporaryDirectory() as folder:
        for name, (part, remedy) in parts.items():
            try:
                if part is not None:
                    part.save_pretrained(folder)
            except Exception as error:  # a tokenizer may be anybody's code
                if _is_full(error):
                    return  # of the temporary folder: what is saved goes elsewhere
                raise ModelError(
                    f"{name}: {type(part).__name__} cannot be saved, so the trained model could not be either: "
                    f"{type(error).__name__}: {_in_short(error)}. Remedy: {remedy}"
                ) from error


def _is_full(error: Exception) -> bool:
    """Whether there was no room to write to. The tokenizers library gives the system's error as text."""
    codes = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS)
    return getattr(error, "errno", None) in codes or any(f"(os error {code})" in str(error) for code in codes)


def _repair_generation(config: Any) -> None:
    """Sampling is switched on where a temperature or the like is set without it, which transformers does not save."""
    if not isinstance(config, GenerationConfig) or config.do_sample or not _problem_of(config):
        return
    before, problem = config.do_sample, _problem_of(config)
    config.do_sample = True
    if _problem_of(config):
        config.do_sample = before
    else:
        logger.warning("generation_config: do_sample is now True, so that it can be saved: %s", problem)


def _problem_of(config: GenerationConfig) -> str | None:
    try:
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
    except ValueError as error:
        return _in_short(error)
    return None


def _in_short(error: Exception) -> str:
    """The first 200 characters, on one line, cut between words."""
    return textwrap.shorten(str(error), 200, placeholder=" ...")


def check_best_metric(
    args: InfoPOConfig,
    evaluation: ExampleDataset | Mapping[str, ExampleDataset] | None,
    callbacks: Sequence[Any],
    *,
    trainer: type[Trainer],
) -> None:
    """Refuses a `metric_for_best_model` that no evaluation will give, which transformers finds out after the first one.

    A callback or subclass of the user's may add metrics of its own, so that with one every name is taken.

    Raises:
        ConfigError: Evaluation gives no such metric, or the setting that needs one does not go with the others.
    """
    stops = any(isinstance(c, EarlyStoppingCallback) or c is EarlyStoppingCallback for c in callbacks)
    metric = args.metric_for_best_model
    problems = []
    if evaluation is None and (args.eval_strategy != "no" or args.eval_on_start):
        setting = (
            "eval_on_start" if args.eval_strategy == "no" else f"eval_strategy={args.eval_strategy.value!r}"
        )
        problems.append(f"{setting}: there is no eval_dataset; give one, or leave the setting out")
    if stops and args.eval_strategy == "no":
        problems.append("EarlyStoppingCallback: needs evaluation; set eval_strategy")
    if stops and metric is None:
        problems.append("EarlyStoppingCallback: needs metric_for_best_model, e.g. 'loss'")
    if args.save_strategy == SaveStrategy.BEST and (metric is None or args.eval_strategy == "no"):
        problems.append("save_strategy='best': needs metric_for_best_model and eval_strategy")
    if metric and args.eval_strategy != "no" and evaluation is not None and not _adds(callbacks, trainer):
        added = [name for callback in callbacks for name in getattr(callback, "metric_names", ())]
        if metric not in added and f"eval_{metric}" not in added:
            problems += _metric_problems(metric, args, evaluation, added)
    if problems:
        raise ConfigError(problems)


def _metric_problems(
    metric: str,
    args: InfoPOConfig,
    evaluation: ExampleDataset | Mapping[str, ExampleDataset],
    added: Sequence[str],
) -> list[str]:
    rule, mixture = MetricRule.of(args.mixture()), args.mixture()
    sets = evaluation if isinstance(evaluation, Mapping) else {"": evaluation}
    prefixes = {f"{name}_" if name else "": dataset for name, dataset in sets.items()}
    wanted = metric.removeprefix("eval_")

    def names(setting: str) -> list[str]:
        sides = reference_sides(mixture, setting, "eval")
        return [
            p + n for p, d in prefixes.items() for n in [*metric_names(rule, sides, **kinds(d)), *OF_MODEL]
        ]

    there = names(args.reference_sides)
    if wanted not in there:
        remedy = ""
        if wanted in names("both"):
            remedy = " reference_sides='both' (in a recipe, reference.sides: both) computes it."
        elif len(prefixes) > 1 and wanted in METRICS:
            remedy = f" There are several sets: write e.g. {next(iter(prefixes))}{wanted!s}."
        told = [*added, *(n for n in there if not n.endswith(OF_MODEL))]
        return [
            f"metric_for_best_model: evaluation will give no {metric!r}{suggestion(wanted, told)}.{remedy} "
            f"It gives: {', '.join(told)}"[:480]
        ]
    known = METRICS.get(
        next((wanted.removeprefix(p) for p in prefixes if p and wanted.startswith(p)), wanted)
    )
    if known is not None and known.better is None and args.direction_is_unset:
        return [
            f"greater_is_better: is not set, and whether a larger {wanted} is better is not plain; set it"
        ]
    return []


def check_evaluation(wanted: Any, sets: ExampleDataset | Mapping[str, ExampleDataset] | None) -> None:
    """Refuses an evaluation of nothing, and of a set that has another name.

    Args:
        wanted: A dataset, the name of one, or None for those of the trainer.
        sets: The trainer's.

    Raises:
        ConfigError: There is no such dataset.
    """
    if wanted is None and sets is None:
        raise ConfigError("evaluate: the trainer was given no eval_dataset; call evaluate(eval_dataset=...)")
    if isinstance(wanted, str) and (not isinstance(sets, Mapping) or wanted not in sets):
        names = ", ".join(map(repr, sets)) if isinstance(sets, Mapping) else "none that have a name"
        raise ConfigError(f"evaluate: there is no dataset {wanted!r}; the trainer has {names}")


def dropout_in_words(model: nn.Module, *, is_fresh: bool) -> str:
    """Returns what becomes of the adapters' dropout while `disable_dropout` is on, or empty text if they have none.

    Args:
        model: The policy.
        is_fresh: Whether its adapter was added for this run, so that its dropout was asked for by name.
    """
    configs = getattr(model, "peft_config", None) or {}
    asked = {
        f"{key}={value:g}"
        for config in configs.values()
        for key, value in vars(config).items()
        if "dropout" in key and isinstance(value, float) and value
    }
    if not asked:
        return ""
    settings = ", ".join(sorted(asked))
    if is_fresh:
        return f"dropout: {settings} in the adapter while it is trained, as asked; 0 in the model"
    return (
        f"dropout: {settings} of the adapter is set to 0, as the model's is; disable_dropout=False keeps both"
    )


def kinds(dataset: ExampleDataset) -> dict[str, bool]:
    """Which responses the examples of a dataset have, as `metric_names` takes it."""
    has = {side: dataset.has(role) for side, role in (("chosen", Role.CHOSEN), ("rejected", Role.REJECTED))}
    return {
        **{side: bool(there.any()) for side, there in has.items()},
        "pairs": bool((has["chosen"] & has["rejected"]).any()),
    }


def _adds(callbacks: Sequence[Any], trainer: type[Trainer]) -> bool:
    """Whether a callback or a trainer that is not of transformers or this package may add metrics."""
    own = [type(c) if isinstance(c, TrainerCallback) else c for c in callbacks]
    foreign = [
        c for c in own if not str(getattr(c, "__module__", "")).startswith(("transformers.", "infopo."))
    ]
    if any(getattr(c, "on_evaluate", None) is not TrainerCallback.on_evaluate for c in foreign):
        return True
    return any(
        not getattr(trainer, name).__module__.startswith(("transformers.", "infopo."))
        for name in ("evaluate", "evaluation_loop")
    )
