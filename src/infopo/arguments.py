"""InfoPOConfig: transformers' TrainingArguments plus what TRL's DPOConfig has, under the same names.

What TRL offers and this trainer cannot honour is refused by name when it is set; leaving it alone changes nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NewType

import datasets
import torch
from transformers import TrainingArguments

from infopo import ranks, trl_names
from infopo.catalog import (
    LOGPS_PATHS,
    ON_BAD_ROW,
    REFERENCE_SIDES,
    REFERENCE_STORES,
    SCORE_RULES,
)
from infopo.data.packing import PreferenceCollator
from infopo.data.streaming import ExampleStream
from infopo.data.templates import check_variables
from infopo.errors import ConfigError, UnsupportedArgumentError
from infopo.losses.catalog import complete_parameters
from infopo.vocabulary import check_columns

Fsdp = NewType("Fsdp", object)
"""True, or the text that transformers took before. As the parser of command lines calls it, it is no union."""


@dataclass
class InfoPOConfig(TrainingArguments):
    """Settings of `InfoPOTrainer`.

    It has all of transformers' `TrainingArguments`, with TRL's defaults for `learning_rate` (1e-6), `logging_steps`
    (10) and `gradient_checkpointing`, which transformers now calls `activation_checkpointing` (True). The default of
    `bf16` is True if the accelerator computes in bfloat16, and False on a CPU. The default of `dataloader_pin_memory`
    is True if there is an accelerator.

    Attributes:
        objective: Name of the loss (see `infopo.catalog.OBJECTIVES`). If None, `loss_type` decides, or else it is
            InfoPO.
        loss_type: TRL's name(s) of the loss, e.g. `sigmoid` (DPO), `ipo`, `bco_pair`, `kto`, `simpo`, or any other of
            `infopo.trl_names.LOSS_TYPES`. Several are added up.
        loss_weights: Weights of several loss types, 1 each by default.
        beta: β of the objective, or None for the objective's default (InfoPO 1, DPO 0.1).
        objective_parameters: Further parameters of the objective, e.g. `{"length_normalized": True}`.
        label_smoothing: Assumed share of flipped labels, in [0, 0.5), for DPO (in TRL 1.16 `sigmoid` ignores it).
        max_length: Largest number of tokens of prompt + response, of which the response's end is cut off. None for no
            limit.
        max_prompt_length: Largest number of tokens of a prompt, whose beginning is cut off. None for no limit but
            `max_length`.
        on_too_long: `cut` rows to these lengths, or `drop` and count rows that are longer.
        score_rule: How responses with scores are split into chosen and rejected ones: `best-worst`, `best-rest`,
            or `threshold` with `score_threshold`.
        score_threshold: Least score of a chosen response.
        columns: Columns of the data by the names that shapes know, for data of other names:
            `{"prompt": "question", "chosen": "good", "rejected": "bad"}`. A name that is mapped to None is left out.
        chat_template_kwargs: Template variables for all rows, e.g. `{"enable_thinking": False}`. A row's own column of
            this name takes precedence. `{"strftime_now": "2026-11-26"}` is today for templates that write the date.
        as_chat: Whether plain text is taken as a conversation, to which the chat template is applied.
        on_bad_row: `raise` stops at the first row that cannot be used, and `skip` counts it and continues.
        reference: `precompute` (once, before training), `live` (a second model beside the policy), `adapter-off` (the
            policy without its adapter), `auto` (`precompute` if rows can be enumerated, else `live`), or the path of a
            model.
        reference_store: Folder in which precomputed values are kept for later runs, by content. `auto` is
            `$INFOPO_CACHE/reference`, else `~/.cache/infopo/reference`. `off` or None keeps them in memory only.
        reference_sides: `needed` computes the reference log-probs that the loss needs, `both` also those that
            only metrics need, and `auto` those that the loss needs for training and both for evaluation.
        precompute_ref_log_probs: TRL's name for `reference="precompute"`.
        precompute_ref_batch_size: Number of examples per forward pass of the reference. The default is
            `per_device_train_batch_size`.
        max_tokens_per_forward: Largest number of tokens that go through the model at once. A larger device batch runs
            in pieces, with the same loss and gradient. None is 2048 on a CPU, where pieces save memory and cost no
            time, and no limit elsewhere.
        logps_path: `auto` encodes each prompt once, without padding, if the model's attention can do so. `naive` runs
            one padded row per response and computes the logits of every position.
        disable_dropout: Whether dropout is set to 0 in policy and reference. The dropout of an adapter that
            `peft_config` adds is kept, because it was asked for, and changes nothing before the first update.
        dataset_num_proc: Number of processes that tokenize.
        model_init_kwargs: Keyword arguments of `from_pretrained`, if the model is given by name.
        trust_remote_code: Whether models may bring code of their own.
        router_aux_loss_coef: Factor of the load-balancing loss of mixture-of-experts models, which is added to the loss
            and logged as `aux_loss`. None is the value of the model's configuration, and 0 leaves it out.
        pad_token: Token to pad with. The default is the tokenizer's own, or else its end of sequence.

    Example:
        >>> config = InfoPOConfig("out", objective="ipo", beta=0.2, use_cpu=True)
        >>> config.mixture()
        [('ipo', {'beta': 0.2, 'length_normalized': True}, 1.0)]
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate of AdamW."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two log records."})
    activation_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations in the backward pass; default True."}
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "bfloat16 autocast; default where supported, not on CPU."}
    )
    fsdp: Fsdp | None = field(
        default=None,
        metadata={"help": "Shard weights over processes; fsdp_config says how.", "nargs": "?", "const": True},
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.accelerator.is_available,
        metadata={"help": "Pin the memory of batches; default where there is an accelerator."},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Must stay off: it hides NaN losses."}
    )
    remove_unused_columns: bool = field(
        default=True, metadata={"help": "Has no effect: rows are tokenized here."}
    )

    objective: str | None = field(default=None, metadata={"help": "Name of the loss; default InfoPO."})
    loss_type: list[str] | None = field(default=None, metadata={"help": "TRL's name(s) of the loss."})
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of several loss types."}
    )
    beta: float | None = field(default=None, metadata={"help": "beta of the objective."})
    objective_parameters: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further parameters of the objective."}
    )
    label_smoothing: float = field(default=0.0, metadata={"help": "Assumed share of flipped labels (DPO)."})
    max_length: int | None = field(default=1024, metadata={"help": "Most tokens of prompt + response."})
    max_prompt_length: int | None = field(default=None, metadata={"help": "Most tokens of a prompt."})
    on_too_long: str = field(default="cut", metadata={"help": "cut or drop."})
    score_rule: str = field(default=SCORE_RULES[0], metadata={"help": "best-worst, best-rest or threshold."})
    score_threshold: float | None = field(
        default=None, metadata={"help": "Least score of a chosen response."}
    )
    columns: dict[str, str | None] | str | None = field(
        default=None, metadata={"help": "Columns of the data by the names that shapes know (JSON)."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Template variables for all rows."}
    )
    as_chat: bool = field(default=False, metadata={"help": "Take plain text for a conversation."})
    on_bad_row: str = field(default="raise", metadata={"help": "raise or skip."})
    reference: str = field(
        default="auto", metadata={"help": "auto, precompute, live, adapter-off or a model's path."}
    )
    reference_store: str | None = field(
        default="auto", metadata={"help": "Folder for reference log-probs; auto or off."}
    )
    reference_sides: str = field(default="auto", metadata={"help": "auto, needed or both."})
    precompute_ref_log_probs: bool = field(default=False, metadata={"help": "Same as reference=precompute."})
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Examples a reference forward pass."}
    )
    max_tokens_per_forward: int | None = field(
        default=None, metadata={"help": "Most tokens through the model at once."}
    )
    logps_path: str = field(default="auto", metadata={"help": "auto or naive."})
    disable_dropout: bool = field(
        default=True, metadata={"help": "Set dropout to 0 in policy and reference."}
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "For from_pretrained."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Allow models that ship their own code."}
    )
    pad_token: str | None = field(default=None, metadata={"help": "Token to pad with."})

    truncation_mode: str = field(default="keep_start", metadata={"help": "keep_start only."})
    padding_free: bool = field(default=False, metadata={"help": "Not honoured: refused when set."})
    pad_to_multiple_of: int | str | None = field(
        default="auto", metadata={"help": "Not honoured: refused when set."}
    )
    ld_alpha: float | None = field(default=None, metadata={"help": "Not honoured: refused when set."})
    f_divergence_type: str = field(
        default="reverse_kl",
        metadata={"help": "Divergence of DPO's loss: the objective fdpo, if not reverse_kl."},
    )
    f_alpha_divergence_coef: float = field(default=0.5, metadata={"help": "alpha of alpha_divergence."})
    desirable_weight: float | None = field(
        default=None, metadata={"help": "KTO's weight of chosen responses."}
    )
    undesirable_weight: float | None = field(
        default=None, metadata={"help": "KTO's weight of rejected responses."}
    )
    simpo_gamma: float | None = field(default=None, metadata={"help": "SimPO's margin."})
    cpo_alpha: float | None = field(default=None, metadata={"help": "Weight of CPO's likelihood."})
    alpha: float = field(default=0.0, metadata={"help": "Not honoured: refused when set."})
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Not honoured: refused when set."}
    )
    padding_value: int | None = field(default=None, metadata={"help": "Not honoured: refused when set."})
    generate_during_eval: bool = field(default=False, metadata={"help": "Not honoured: refused when set."})
    is_encoder_decoder: bool | None = field(
        default=None, metadata={"help": "Not honoured: refused when set."}
    )
    use_weighting: bool = field(default=False, metadata={"help": "Not honoured: refused when set."})
    discopop_tau: float = field(
        default=0.05, metadata={"help": "Has no effect: the loss discopop is refused."}
    )
    activation_offloading: bool = field(default=False, metadata={"help": "Not honoured: refused when set."})
    sync_ref_model: bool = field(default=False, metadata={"help": "Not honoured: refused when set."})
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata={"help": "Has no effect without sync_ref_model."}
    )
    ref_model_sync_steps: int = field(default=512, metadata={"help": "Has no effect without sync_ref_model."})
    router_aux_loss_coef: float | None = field(
        default=None, metadata={"help": "Factor of the load-balancing loss."}
    )

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "objective_parameters",
        "columns",
        "chat_template_kwargs",
    ]

    def __post_init__(self) -> None:
        if ranks.must_use_cpu():
            self.use_cpu = True
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and _accelerator_has_bf16()
        old, new = self.gradient_checkpointing, self.activation_checkpointing
        self.activation_checkpointing = new if new is not None else old in (None, True)
        # If nobody asked for it, it is switched off for models that lack it.
        self.asks_for_checkpointing = True in (old, new)
        # `super().__post_init__` guesses the direction, after which nobody could tell.
        self.direction_is_unset = self.greater_is_better is None
        super().__post_init__()
        # TRL takes one name as well as a list of names.
        loss_type: Any = self.loss_type
        names = [loss_type] if isinstance(loss_type, str) else loss_type
        self.loss_type = names and [trl_names.canonical(name) for name in names]
        self.objective = trl_names.canonical(self.objective)
        refused = trl_names.refused(self)
        problems = self._problems()
        if old is not None and new is not None and old != new:
            problems.append(f"gradient_checkpointing={old} contradicts activation_checkpointing={new}")
        if refused:
            raise UnsupportedArgumentError(refused + problems)
        if problems:
            raise ConfigError(problems)
        ranks.refuse_strangers(self.world_size)

    def _problems(self) -> list[str]:
        problems = self._loss().problems()
        for name in ("model_init_kwargs", "objective_parameters", "chat_template_kwargs"):
            if not isinstance(getattr(self, name), dict | None):
                problems.append(
                    f"{name}: expected a dict (on the command line, JSON), got {getattr(self, name)!r}"
                )
        if isinstance(self.columns, dict):
            problems += [f"columns: {problem}" for problem in check_columns(self.columns)]
        if isinstance(self.chat_template_kwargs, dict):
            problems += check_variables(self.chat_template_kwargs, "chat_template_kwargs")
        if self.on_bad_row not in ON_BAD_ROW:
            problems.append(f"on_bad_row: expected one of {', '.join(ON_BAD_ROW)}, got {self.on_bad_row!r}")
        if self.reference_store is not None and (
            not isinstance(self.reference_store, str) or not self.reference_store
        ):
            problems.append(
                f"reference_store: expected a folder, {' or '.join(REFERENCE_STORES)}, got {self.reference_store!r}"
            )
        if self.reference_sides not in REFERENCE_SIDES:
            problems.append(
                f"reference_sides: expected one of {', '.join(REFERENCE_SIDES)}, got {self.reference_sides!r}"
            )
        if self.logps_path not in LOGPS_PATHS:
            problems.append(f"logps_path: expected one of {', '.join(LOGPS_PATHS)}, got {self.logps_path!r}")
        if self.precompute_ref_log_probs and self.reference not in ("auto", "precompute"):
            problems.append(f"precompute_ref_log_probs=True contradicts reference={self.reference!r}")
        for name in (
            "max_length",
            "max_prompt_length",
            "max_tokens_per_forward",
            "precompute_ref_batch_size",
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                problems.append(f"{name}: expected a positive number or None, got {value!r}")
        if self.fp16 and self.device.type == "cpu":
            problems.append(
                "fp16=True: there is no accelerator here, and a CPU has no fp16 mixed precision: it would run in "
                "float32 without a word. Leave it out, or set bf16=True"
            )
        return problems + self._loader_problems()

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


def _as_dict(setting: dict[str, Any] | str | None) -> dict[str, Any]:
    """Returns a copy. Text is for the command line only, and TrainingArguments has parsed it by now."""
    return dict(setting) if isinstance(setting, dict) else {}


def _accelerator_has_bf16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return hasattr(torch, "xpu") and torch.xpu.is_available()


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


def _stream_problems(args: Any) -> list[str]:
    """Returns what is missing or wrong in the settings for training on a stream."""
    problems = []
    if getattr(args, "max_steps", -1) <= 0:
        problems.append(
            "max_steps: is required for a stream: how many rows there are, and so when an epoch ends and how the "
            "learning rate falls, is not known before it ends"
        )
    if getattr(args, "dataloader_num_workers", 0):
        problems.append(
            "dataloader_num_workers: expected 0 for a stream, whose rows are read, judged and counted in this process"
        )
    if getattr(args, "train_sampling_strategy", "random") == "group_by_length":
        problems.append("train_sampling_strategy: group_by_length needs all rows; a stream keeps its order")
    return problems


def refuse_arguments(
    model: Any,
    ref_model: Any,
    args: Any,
    data_collator: Any,
    train_dataset: Any,
    compute_metrics: Callable[..., Any] | None,
    quantization_config: Any,
) -> None:
    """Checks the arguments of `InfoPOTrainer`, all at once.

    Raises:
        UnsupportedArgumentError: One of them cannot be honoured.
        ConfigError: One is missing, or two contradict each other.
    """
    problems: list[str] = []
    unsupported: list[str] = []
    if not isinstance(args, InfoPOConfig | None):
        problems.append(f"args: expected an InfoPOConfig, got {type(args).__name__}")
    if not isinstance(model, str | torch.nn.Module):
        problems.append(f"model: expected a model or the name of one, got {type(model).__name__}")
    if not isinstance(ref_model, torch.nn.Module | None):
        problems.append(
            f"ref_model: expected a model, got {type(ref_model).__name__}; the name of one goes into reference"
        )
    if train_dataset is None:
        problems.append("train_dataset: is required")
    if ref_model is not None and ref_model is model:
        problems.append("ref_model: is the same object as model; leave it out to use the policy as it is now")
    if quantization_config is not None and not isinstance(model, str):
        problems.append("quantization_config: the model is already loaded; give its name, or leave this out")
    if data_collator is not None and not isinstance(data_collator, PreferenceCollator):
        unsupported.append(
            f"data_collator: expected infopo.data.packing.PreferenceCollator, got {type(data_collator).__name__}; "
            "batches are packed, so other collators cannot be used"
        )
    if compute_metrics is not None:
        unsupported.append(
            "compute_metrics: no logits are kept to pass to it; read the metrics in a TrainerCallback's on_evaluate"
        )
    if isinstance(train_dataset, datasets.IterableDataset | ExampleStream):
        problems += _stream_problems(args)
    elif isinstance(train_dataset, torch.utils.data.IterableDataset):
        unsupported.append(
            "train_dataset: iterable datasets of torch are not supported; give a datasets.IterableDataset"
        )
    if unsupported:
        raise UnsupportedArgumentError(unsupported + problems)
    if problems:
        raise ConfigError(problems)
