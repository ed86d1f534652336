"""InfoPOConfig: transformers' TrainingArguments plus what TRL's DPOConfig has, under the same names.

What TRL offers and this trainer cannot honour is refused by name when it is set; leaving it alone changes nothing.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, NewType

import torch
from transformers import TrainingArguments

from infopo import ranks, trl_names
from infopo.data.templates import check_variables
from infopo.errors import ConfigError, UnsupportedArgumentError
from infopo.losses.catalog import OBJECTIVES, complete_parameters
from infopo.losses.judgement import judge
from infopo.losses.mixture import with_names
from infopo.settings import (
    DataSettings,
    ModelSettings,
    ReferenceSettings,
    RowSettings,
    SourceSettings,
    TrainSettings,
    arguments_of,
)
from infopo.train_table import wrong_arguments
from infopo.validation import PYTHON, Settings, not_a_choice, setting

REFUSALS = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, OSError)
"""What transformers and torch raise at settings: a number, a name, a library that is not installed, a file."""

Fsdp = NewType("Fsdp", object)
"""True, or the text that transformers took before. As the parser of command lines calls it, it is no union."""


if TYPE_CHECKING:
    LossName = str | Callable[..., Any] | Sequence[str | Callable[..., Any] | Mapping[str, Any]]
else:  # no union, as for Fsdp
    LossName = NewType("LossName", object)


def argument(section: type[Settings], name: str) -> Any:
    """Declares an argument that is a setting of a section under another name or, as JSON text, of another type."""
    declared = section.__dataclass_fields__[name]
    return field(default=declared.default, metadata=declared.metadata)


_REFUSED = "Not honoured: refused when set."


@dataclass
class InfoPOConfig(RowSettings, TrainSettings, TrainingArguments):
    """Settings of `InfoPOTrainer`.

    It has all of transformers' `TrainingArguments`, with TRL's defaults for `learning_rate` (1e-6), `logging_steps`
    (10) and `gradient_checkpointing`, which transformers now calls `activation_checkpointing` (True). The default of
    `bf16` is True if the accelerator computes in bfloat16, and False on a CPU. The default of `dataloader_pin_memory`
    is True if there is an accelerator.

    Attributes:
        objective: Name of the loss (see `infopo objectives`), `my_module:my_loss` for one of yours, or the function
            itself, in whose place its name stands afterwards. A list of such, or of mappings with name, parameters and
            `weight` (1), is their weighted sum. If None, `loss_type` decides, or else it is InfoPO.
        loss_type: TRL's name(s) of the loss, e.g. `sigmoid` (DPO), `ipo`, `bco_pair`, `kto`, `simpo`, or any other of
            `infopo.trl_names.LOSS_TYPES`. Several are added up.
        loss_weights: Weights of several loss types, 1 each by default.
        beta: β of the objective, or None for the objective's default (InfoPO 1, DPO 0.1).
        objective_parameters: Further parameters of the objective, e.g. `{"length_normalized": True}`.
        label_smoothing: Assumed share of flipped labels, in [0, 0.5), for DPO (in TRL 1.16 `sigmoid` ignores it).
        precompute_ref_log_probs: TRL's name for `reference="precompute"`.
        model_init_kwargs: Keyword arguments of `from_pretrained`, if the model is given by name.

    Further settings are listed at the end of `help(InfoPOConfig)` and, with those of recipes, in `infopo docs recipes`.

    Example:
        >>> config = InfoPOConfig("out", objective="ipo", beta=0.2, use_cpu=True)
        >>> config.mixture()
        [('ipo', {'beta': 0.2, 'length_normalized': True}, 1.0)]
        >>> InfoPOConfig("out", objective=["infopo", {"name": "sft", "weight": 0.2}], use_cpu=True).mixture()
        [('infopo', {'beta': 1.0, 'length_normalized': False, 'cap': 5.0}, 1.0), ('sft', {'token_mean': False}, 0.2)]
    """

    # Sections are frozen, and this is not: transformers changes its own arguments.
    __setattr__ = object.__setattr__  # type: ignore[assignment]

    learning_rate: float = setting(1e-6, "Peak learning rate of AdamW.")
    logging_steps: float = setting(10, "Steps between two log records.")
    activation_checkpointing: bool | None = setting(
        None, "Recompute activations in the backward pass; default True."
    )
    bf16: bool | None = setting(None, "bfloat16 autocast; default where supported, not on CPU.")
    fsdp: Fsdp | None = field(
        default=None,
        metadata={"help": "Shard weights over processes; fsdp_config says how.", "nargs": "?", "const": True},
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.accelerator.is_available,
        metadata={"help": "Pin the memory of batches; default where there is an accelerator."},
    )
    logging_nan_inf_filter: bool = setting(False, "Must stay off: it hides NaN losses.")
    remove_unused_columns: bool = setting(True, "Has no effect: rows are tokenized here.")

    objective: LossName | None = setting(None, "Name of the loss; default InfoPO.")
    loss_type: list[str] | None = setting(None, "TRL's name(s) of the loss.")
    loss_weights: list[float] | None = setting(None, "Weights of several loss types.")
    beta: float | None = setting(None, "beta of the objective.")
    objective_parameters: dict[str, Any] | str | None = setting(None, "Further parameters of the objective.")
    label_smoothing: float = setting(0.0, "Assumed share of flipped labels (DPO).")
    columns: dict[str, str | None] | str | None = argument(RowSettings, "columns")  # type: ignore[assignment]
    chat_template_kwargs: dict[str, Any] | str | None = argument(  # type: ignore[assignment]
        RowSettings, "chat_template_kwargs"
    )
    reference: str = argument(ReferenceSettings, "source")
    reference_store: str | None = argument(ReferenceSettings, "store")
    reference_sides: str = argument(ReferenceSettings, "sides")
    reference_samples: str | None = argument(ReferenceSettings, "samples")
    precompute_ref_log_probs: bool = setting(False, "Same as reference=precompute.")
    dataset_num_proc: int | None = argument(SourceSettings, "num_proc")
    dataset_cache: str | None = argument(SourceSettings, "cache")
    model_init_kwargs: dict[str, Any] | str | None = setting(None, "For from_pretrained.")
    trust_remote_code: bool = argument(ModelSettings, "trust_remote_code")

    truncation_mode: str = setting("keep_start", "keep_start only.")
    padding_free: bool = setting(False, _REFUSED)
    pad_to_multiple_of: int | str | None = setting("auto", _REFUSED)
    ld_alpha: float | None = setting(None, _REFUSED)
    f_divergence_type: str = setting(
        "reverse_kl", "Divergence of DPO's loss: the objective fdpo, if not reverse_kl."
    )
    f_alpha_divergence_coef: float = setting(0.5, "alpha of alpha_divergence.")
    desirable_weight: float | None = setting(None, "KTO's weight of chosen responses.")
    undesirable_weight: float | None = setting(None, "KTO's weight of rejected responses.")
    simpo_gamma: float | None = setting(None, "SimPO's margin.")
    cpo_alpha: float | None = setting(None, "Weight of CPO's likelihood.")
    alpha: float = setting(0.0, "Shape of AlphaPO's reward, with SimPO.")
    max_completion_length: int | None = setting(None, _REFUSED)
    padding_value: int | None = setting(None, _REFUSED)
    generate_during_eval: bool = setting(False, _REFUSED)
    is_encoder_decoder: bool | None = setting(None, _REFUSED)
    use_weighting: bool = setting(False, "WPO: weigh DPO's pairs by how likely the policy is to sample them.")
    discopop_tau: float = setting(0.05, "DiscoPOP's temperature.")
    activation_offloading: bool = setting(False, _REFUSED)
    sync_ref_model: bool = setting(False, _REFUSED)
    ref_model_mixup_alpha: float = setting(0.6, "Has no effect without sync_ref_model.")
    ref_model_sync_steps: int = setting(512, "Has no effect without sync_ref_model.")

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "objective_parameters",
        "columns",
        "chat_template_kwargs",
    ]

    def __post_init__(self) -> None:
        if problems := wrong_arguments(vars(self)) + self._unknown_names():
            raise ConfigError(problems)
        if ranks.must_use_cpu():
            self.use_cpu = True
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and _accelerator_has_bf16()
        old, new = self.gradient_checkpointing, self.activation_checkpointing
        self.activation_checkpointing = new if new is not None else old in (None, True)
        # If nobody asked for it, it is switched off for models that lack it.
        self.asks_for_checkpointing = True in (old, new) or bool(
            self.activation_checkpointing_kwargs or self.gradient_checkpointing_kwargs
        )
        # `TrainingArguments.__post_init__` guesses the direction, after which nobody could tell.
        self.direction_is_unset = self.greater_is_better is None
        try:
            TrainingArguments.__post_init__(self)
        except REFUSALS as error:
            raise ConfigError(f"transformers refuses these settings: {error}") from error
        for name in ("reference", "reference_store", "reference_samples"):
            if isinstance(path := getattr(self, name), os.PathLike):
                setattr(self, name, os.fspath(path))
        is_contradiction = old is not None and new is not None and old != new
        self.check(
            [f"gradient_checkpointing={old} contradicts activation_checkpointing={new}"]
            if is_contradiction
            else []
        )
        ranks.refuse_strangers(self.world_size)

    def check(self, problems: Sequence[str] = ()) -> None:
        """Judges the settings as they are now. The trainer calls this, because a script may have changed them since.

        Args:
            problems: What else is wrong with them, one sentence each.

        Raises:
            UnsupportedArgumentError: A setting cannot be honoured.
            ConfigError: Settings are wrong, or contradict each other.

        Example:
            >>> config = InfoPOConfig("out", use_cpu=True)
            >>> config.beta = -1.0
            >>> config.check()
            Traceback (most recent call last):
            infopo.errors.ConfigError: beta: expected a value > 0, got -1.0
        """
        self.objective = with_names(_terms_of(self.objective))
        # TRL takes one name as well as a list of names.
        loss_type: Any = self.loss_type
        names = [loss_type] if isinstance(loss_type, str) else loss_type
        self.loss_type = names and [trl_names.canonical(name) for name in names]
        refused = trl_names.refused(self)
        problems = self._problems() + list(problems)
        if refused:
            raise UnsupportedArgumentError(refused + problems)
        if problems:
            raise ConfigError(problems)

    def _unknown_names(self) -> list[str]:
        """Returns what is wrong with texts for which transformers declares choices that it does not check."""
        texts = ((f, getattr(self, f.name)) for f in fields(self) if f.metadata.get("choices"))
        wrong = [(f, v) for f, v in texts if isinstance(v, str) and v not in f.metadata["choices"]]
        return [f"{f.name}: {not_a_choice(v, tuple(map(str, f.metadata['choices'])))}" for f, v in wrong]

    def _problems(self) -> list[str]:
        problems = self._loss().problems() or self._judged()
        for name in ("model_init_kwargs", "objective_parameters"):
            if not isinstance(getattr(self, name), dict | None):
                problems.append(
                    f"{name}: expected a dict (on the command line, JSON), got {getattr(self, name)!r}"
                )
        for section in (ModelSettings, DataSettings, ReferenceSettings, TrainSettings):
            problems += self._problems_of(section)
        if isinstance(self.chat_template_kwargs, dict):
            problems += check_variables(self.chat_template_kwargs, "chat_template_kwargs")
        if self.precompute_ref_log_probs and self.reference not in ("auto", "precompute"):
            problems.append(f"precompute_ref_log_probs=True contradicts reference={self.reference!r}")
        if self.fp16 and self.device.type == "cpu":
            problems.append(
                "fp16=True: there is no accelerator here, and a CPU has no fp16 mixed precision: it would run in "
                "float32 without a word. Leave it out, or set bf16=True"
            )
        if self.fsdp and self.world_size == 1 and not (self.fsdp_config or {}).get("xla"):
            problems.append(
                "fsdp: shards weights over processes, and there is one; start with torchrun or accelerate launch"
            )
        return problems + self._loader_problems()

    def _judged(self) -> list[str]:
        """Returns what is wrong with losses from outside the package."""
        found = (
            problem
            for name, parameters, _ in self.mixture()
            if name not in OBJECTIVES
            for problem in judge(name, parameters)
        )
        return list(dict.fromkeys(found))  # a loss may be two terms

    def _problems_of(self, section: type[Settings]) -> list[str]:
        """Returns what is wrong with the settings of a section, under the names that they have here."""
        names = arguments_of(section)
        given = {name: getattr(self, argument) for name, argument in names.items()}
        wrong = [(name, problem) for name, problem in section.wrong_values(given, PYTHON) if name in names]
        wrong += section.contradictions(SimpleNamespace(**section.defaults() | given))
        return [f"{names.get(name, name)}: {problem}" for name, problem in wrong]

    def _loader_problems(self) -> list[str]:
        """Returns problems with accelerate's settings, which could repeat rows or split batches that are packed."""
        loader = self.accelerator_config
        return [
            f"accelerator_config: {name}={getattr(loader, name)!r} does not go with packed batches; expected {right}"
            for name, right in (("split_batches", False), ("use_seedable_sampler", True))
            if getattr(loader, name) != right
        ] + (
            ["accelerator_config: dispatch_batches=True cannot be used with packed batches; leave it out"]
            if loader.dispatch_batches
            else []
        )

    def _loss(self) -> trl_names.LossSettings:
        """Returns the settings that name the loss."""
        values = {f.name: getattr(self, f.name) for f in fields(trl_names.LossSettings)}
        return trl_names.LossSettings(
            **values | {"objective_parameters": _as_dict(self.objective_parameters)}
        )

    def column_names(self) -> dict[str, str | None]:
        """Returns the setting `columns`, or an empty dict if there is none."""
        return _as_dict(self.columns)

    def mixture(self) -> list[tuple[str, dict[str, Any], float]]:
        """Returns the objectives to add up, as (name, all parameters, weight). `loss_type` may name several."""
        return [
            (name, complete_parameters(name, parameters), weight)
            for name, parameters, weight in self._loss().mixture()
        ]


def _listed() -> str:
    lines = [
        f"        {f.name}: {f.metadata['help']}"
        for f in fields(InfoPOConfig)
        for section in (ModelSettings, DataSettings, ReferenceSettings, TrainSettings)
        if f.name in arguments_of(section).values()
    ]
    return "\n".join(["", "    Further settings (null is None):", *lines, ""])


InfoPOConfig.__doc__ = (InfoPOConfig.__doc__ or "") + _listed()


def _terms_of(objective: Any) -> Any:
    """Returns a name or function as it is, and mappings as a list. On the command line they are JSON.

    Raises:
        ConfigError: It is nothing of these.
    """
    if isinstance(objective, str) and objective.lstrip().startswith(("[", "{")):
        try:
            objective = json.loads(objective)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"objective: terms of a loss are JSON here, and this is not: {error}"
            ) from error
    if isinstance(objective, Mapping):
        return [objective]
    if objective is None or isinstance(objective, str | list | tuple) or callable(objective):
        return objective
    raise ConfigError(f"objective: expected a name, a function, or a list of objectives, got {objective!r}")


def _as_dict(setting: dict[str, Any] | str | None) -> dict[str, Any]:
    """Returns a copy. Text is for the command line only, and TrainingArguments has parsed it by now."""
    return dict(setting) if isinstance(setting, dict) else {}


def _accelerator_has_bf16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.xpu.is_available()


def init_kwargs(args: InfoPOConfig, quantization_config: Any) -> dict[str, Any]:
    """Returns the keyword arguments of `from_pretrained`: `model_init_kwargs` and what has a setting of its own.

    Raises:
        ConfigError: `quantization_config` is given twice.
    """
    kwargs = dict(_as_dict(args.model_init_kwargs))
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    # `dtype` was `torch_dtype` until transformers 5.
    if "torch_dtype" in kwargs:
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
    # The default is TRL's, because updates of 1e-6 vanish in bfloat16 weights.
    kwargs.setdefault("dtype", "float32")
    if quantization_config is not None:
        if "quantization_config" in kwargs:
            raise ConfigError("quantization_config is given twice: as an argument and in model_init_kwargs")
        kwargs["quantization_config"] = quantization_config
    return kwargs
