"""LLaMA-Factory's training files (`llamafactory-cli train FILE`), stages `dpo` and `kto`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infopo.elsewhere import llama_factory_data
from infopo.elsewhere.conversion import Conversion, Named, is_number, listed
from infopo.elsewhere.losses import Loss, put_terms
from infopo.errors import ConfigError
from infopo.losses.mixture import is_weight

LOSSES: Mapping[str, str] = {
    "sigmoid": "dpo", "hinge": "hinge", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo", "kto_pair": "kto",
}  # fmt: skip
"""`pref_loss` -> objective."""

DEFAULT = "LLaMA-Factory's default"

DEFAULTS: Mapping[str, Any] = {
    "learning_rate": 5e-5, "num_train_epochs": 3.0, "per_device_train_batch_size": 8, "lr_scheduler_type": "linear",
}  # fmt: skip
"""Arguments of training that are written out where the file leaves them out."""

NEEDLESS: Mapping[str, str] = {
    "do_train": "`infopo train` trains",
    "overwrite_cache": "encoded rows are kept by content",
    "overwrite_output_dir": "a run directory is not overwritten: name another one",
    "preprocessing_batch_size": "rows are encoded by content, in batches of any size",
    "data_shared_file_system": "the store of encoded rows works across machines",
    "plot_loss": "`infopo report RUN` draws the curves",
    "use_fast_tokenizer": "tokenizers are fast ones",
    "low_cpu_mem_usage": "this is always so",
    "print_param_status": "`infopo check` says what is trained",
    "include_effective_tokens_per_second": "include_num_input_tokens_seen counts tokens",
    "flash_attn": "kernels for shared prompts are chosen by themselves",
    "upcast_layernorm": "all weights that are trained are float32",
    "bf16": "bfloat16 arithmetic is on where the accelerator has it",
    "use_unsloth_gc": "train.activation_checkpointing saves the same memory",
    "use_reentrant_gc": "checkpointing is not reentrant",
    "quantization_method": "bitsandbytes is used",
    "double_quantization": "4 bits are NF4 with double quantization",
    "quantization_type": "4 bits are NF4 with double quantization",
    "ray_num_workers": "processes are started by torchrun",
    "enable_liger_kernel": "the head is computed in chunks anyway, which saves that memory",
    "packing": "nothing is padded where the model's attention allows it",
    "model_revision": "main is the default",
    "disable_gradient_checkpointing": "checkpointing of activations is on by default",
    "disable_shuffling": "rows are shuffled by default",
    "warmup_ratio": "0 is the default",
    "group_by_length": "false is the default",
    "pref_ftx": "0 adds nothing",
    "save_safetensors": "weights are always saved as safetensors",
    "ignore_pad_token_for_loss": "padding is never scored",
}
"""Settings that need none here -> why."""

LOST: Mapping[str, str] = {
    "template": "the tokenizer's own chat template is applied: save the tokenizer with this one if it is another",
    "val_size": "no share of the training rows is held out; name data.eval_path or data.eval_split",
    "ref_model_adapters": "merge the adapter into the reference with peft, and name the result as reference.source",
    "ref_model_quantization_bit": "the reference has the precision of the policy",
    "pref_bco_weight": "no BCO term beside DPO; the objective bco is BCO alone",
    "ld_alpha": "LD-DPO weighs tokens, and a loss here sees sums over a response",
    "adapter_name_or_path": "name the adapter's folder as model.name_or_path to train it further",
    "early_stopping_steps": "runs end where they are told to; train.on_verdict: stop ends them at a verdict",
    "default_system": "write the system message into the rows",
    "tool_format": "the tokenizer's template writes tools",
    "enable_thinking": "data.chat_template_kwargs: {enable_thinking: ...} says it to a template that knows it",
}  # fmt: skip
"""Settings without a counterpart that people ask about -> what to do."""


def conversion(given: Mapping[str, Any], path: Path) -> Conversion:
    """Takes the settings of a training file apart. What it does not take, `Conversion.rest` passes on.

    Raises:
        ConfigError: The file is of another stage than `dpo` and `kto`, or names an unknown loss.
    """
    if "train_dataset" in given:
        raise ConfigError(
            f"{path}: this is a file of LLaMA-Factory's v1, which names no loss; files of `stage` are converted"
        )
    made = Conversion("LLaMA-Factory", given)
    stage, loss = made.take("stage", "sft"), str(made.take("pref_loss", "sigmoid"))
    if stage not in ("dpo", "kto"):
        raise ConfigError(
            f"{path}: stage: {stage}: infopo trains on preferences; the stages dpo and kto are converted"
        )
    if loss not in LOSSES:
        raise ConfigError(f"{path}: pref_loss: {loss!r} is none of {', '.join(LOSSES)}")
    _model(made)
    llama_factory_data.data(made, path)
    _objective(made, "kto" if stage == "kto" else LOSSES[loss])
    _training(made)
    made.account(LOST, NEEDLESS)
    return made


def _model(made: Conversion) -> None:
    made.move("model_name_or_path", "model.name_or_path")
    if made.get("model_revision") != "main":
        made.move("model_revision", "model.revision")
    made.move("trust_remote_code", "model.trust_remote_code")
    kind = made.take("finetuning_type", "lora")
    if kind == "lora":
        made.put("model.adapter.r", made.take("lora_rank", 8), "finetuning_type; lora_rank")
        rank = made["model.adapter.r"]
        alpha = made.take("lora_alpha", 2 * rank if is_number(rank) else 16)
        made.put("model.adapter.lora_alpha", alpha, "lora_alpha; twice the rank by default")
        made.move("lora_dropout", "model.adapter.lora_dropout")
        modules = listed(made.take("lora_target", "all"))
        made.put(
            "model.adapter.target_modules", "all-linear" if modules == ["all"] else modules, "lora_target"
        )
        if made.get("quantization_bit") in (4, 8):
            made.put("model.quantization", f"{made.take('quantization_bit')}bit", "quantization_bit")
        made.lose("quantization_bit", "frozen weights take 4 or 8 bits")
    elif kind == "full":
        made.needless.append(Named("finetuning_type", kind, "all weights are trained without an adapter"))
    else:
        made.lost.append(
            Named("finetuning_type", kind, "all weights are trained here; `full` and `lora` are converted")
        )
    for key in ("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "quantization_bit"):
        made.lose(key, "there is no adapter in the recipe")


_OF_METHOD: Mapping[str, Mapping[str, str]] = {
    "kto": {"kto_chosen_weight": "desirable_weight", "kto_rejected_weight": "undesirable_weight"},
    "dpo": {"dpo_label_smoothing": "label_smoothing"},
}
"""Settings of a method there -> parameter of the objective."""


def _objective(made: Conversion, name: str) -> None:
    origins = {"name": "stage; pref_loss", "beta": "pref_beta" if made.has("pref_beta") else DEFAULT}
    parameters: dict[str, Any] = {"beta": made.take("pref_beta", 0.1)}
    if name == "simpo":
        parameters["gamma"], origins["gamma"] = made.take("simpo_gamma", 0.5), "simpo_gamma"
    for key, parameter in _OF_METHOD.get(name, {}).items():
        if made.has(key):
            parameters[parameter], origins[parameter] = made.take(key), key
    if name == "kto":
        made.differences.append(
            "KTO's reference point is that of a whole step here, and that of a batch there."
        )
    losses: list[Loss] = [(name, parameters, 1.0)]
    if made.get("pref_ftx") and is_weight(made.get("pref_ftx")):
        losses.append(("sft", {"token_mean": True}, made.take("pref_ftx")))
        origins |= {"sft": "pref_ftx", "nll_weight": "pref_ftx"}
    put_terms(made, losses, origins)
    if name == "orpo" or len(losses) > 1:
        made.differences.append(
            "The likelihood of chosen responses is a mean over the tokens of a step here, and a mean over responses of "
            "each one's mean there."
        )
    if made.get("pref_ftx") != 0:
        made.lose("pref_ftx", "expected a finite number >= 0")
    for key in ("simpo_gamma", "kto_chosen_weight", "kto_rejected_weight", "dpo_label_smoothing"):
        made.need_not(key, f"the objective {name} does not read it")
    made.move("ref_model", "reference.source")


def _training(made: Conversion) -> None:
    made.put("output_dir", made.take("output_dir", "runs/converted"), "output_dir")
    for name, default in DEFAULTS.items():
        if not made.has(name):
            made.put(f"train.{name}", default, DEFAULT)
    if made.get("warmup_ratio") and not made.get("warmup_steps"):
        made.need_not("warmup_steps", "0 leaves warmup_ratio in force")
        made.train("warmup_steps", "warmup_ratio")
    made.train("router_aux_loss_coef", "moe_aux_loss_coef")
    if made.get("disable_gradient_checkpointing"):
        made.take("disable_gradient_checkpointing")
        made.put("train.activation_checkpointing", False, "disable_gradient_checkpointing")
    for key, strategy in (("disable_shuffling", "sequential"), ("group_by_length", "group_by_length")):
        if made.get(key):
            made.take(key)
            made.put("train.train_sampling_strategy", strategy, key)
    if made.get("packing"):
        made.lose(
            "packing",
            "rows are not packed by length; nothing is padded where the model's attention allows it",
        )
    if made.get("val_size") == 0:
        made.need_not("val_size", "0 is no evaluation")
    made.evaluation()
