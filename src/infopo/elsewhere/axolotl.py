"""Axolotl's files (`axolotl train FILE`) with `rl: dpo`, `ipo`, `kto`, `orpo` or `simpo`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infopo.elsewhere import axolotl_data
from infopo.elsewhere.conversion import Conversion, Named, is_number, listed
from infopo.elsewhere.losses import put_loss
from infopo.errors import ConfigError

METHODS = ("dpo", "ipo", "kto", "orpo", "simpo")
"""Values of `rl` that are converted."""

DEFAULT = "Axolotl's default"

DEFAULTS: Mapping[str, Any] = {
    "num_epochs": 1.0, "micro_batch_size": 1, "gradient_accumulation_steps": 1, "lr_scheduler": "cosine",
    "optimizer": "adamw_torch_fused", "learning_rate": 5e-5,
}  # fmt: skip
"""Settings that are written out where the file leaves them out."""

TRAIN: Mapping[str, str] = {
    "num_epochs": "num_train_epochs", "micro_batch_size": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps", "learning_rate": "learning_rate",
    "optimizer": "optim", "lr_scheduler": "lr_scheduler_type", "eval_batch_size": "per_device_eval_batch_size",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs", "fsdp_config": "fsdp_config",
}  # fmt: skip
"""Settings -> arguments of training; those of the same name pass on by themselves."""

NEEDLESS: Mapping[str, str] = {
    "model_type": "the model's own configuration tells", "tokenizer_type": "the model's own configuration tells",
    "is_llama_derived_model": "the model's own configuration tells",
    "is_mistral_derived_model": "the model's own configuration tells",
    "is_qwen_derived_model": "the model's own configuration tells",
    "tokenizer_use_fast": "tokenizers are fast ones",
    "dataset_prepared_path": "encoded rows are kept by content (data.cache)",
    "shuffle_merged_datasets": "rows of all sources are shuffled",
    "dataset_keep_in_memory": "rows are read as they are needed",
    "skip_prepare_dataset": "rows are encoded once, and found by content",
    "sample_packing": "nothing is padded where the model's attention allows it",
    "eval_sample_packing": "nothing is padded where the model's attention allows it",
    "pad_to_sequence_len": "nothing is padded where the model's attention allows it",
    "dpo_padding_free": "nothing is padded where the model's attention allows it",
    "pad_to_multiple_of": "nothing is padded where the model's attention allows it",
    "flash_attention": "kernels for shared prompts are chosen by themselves",
    "sdp_attention": "kernels for shared prompts are chosen by themselves",
    "xformers_attention": "kernels for shared prompts are chosen by themselves",
    "flex_attention": "kernels for shared prompts are chosen by themselves",
    "eager_attention": "kernels for shared prompts are chosen by themselves",
    "attn_implementation": "kernels for shared prompts are chosen by themselves",
    "bf16": "bfloat16 arithmetic is on where the accelerator has it",
    "bfloat16": "bfloat16 arithmetic is on where the accelerator has it",
    "train_on_inputs": "responses are scored, and prompts are not",
    "precompute_ref_log_probs": "the reference is computed once and kept anyway",
    "dpo_use_liger_kernel": "the head is computed in chunks anyway, which saves that memory",
    "remove_unused_columns": "it has no effect",
    "strict": "a recipe is always judged strictly",
    "save_safetensors": "weights are always saved as safetensors",
    "do_causal_lm_eval": "evaluation gives the loss and the metrics of preferences",
    "wandb_watch": "gradients of both sides are measured (train.gradient_size)",
    "load_in_4bit": "false is the default", "load_in_8bit": "false is the default",
    "lora_target_linear": "the modules are named",
    "dpo_use_weighting": "false is the default", "gradient_checkpointing": "true is the default",
    "group_by_length": "false is the default", "use_tensorboard": "false is the default",
    "use_wandb": "false is the default", "use_swanlab": "false is the default",
    "warmup_ratio": "0 is the default", "dp_shard_size": "FSDP shares out over all processes",
    "dp_replicate_size": "FSDP shares out over all processes",
    "tensor_parallel_size": "1 is no tensor parallelism", "context_parallel_size": "1 is no context parallelism",
    "sequence_parallel_degree": "1 is no sequence parallelism", "merge_lora": "merging is a step after training",
    "evals_per_epoch": "0 is no evaluation", "saves_per_epoch": "0 is no checkpoint",
}  # fmt: skip
"""Settings that need none here -> why."""

LOST: Mapping[str, str] = {
    "val_set_size": "no share of the training rows is held out; name data.eval_path or data.eval_split",
    "dataset_exact_deduplication": "`infopo check` counts duplicate rows; remove them from the file",
    "lora_model_dir": "name the adapter's folder as model.name_or_path to train it further",
    "lora_modules_to_save": "only the adapter is trained",
    "chat_template": "the tokenizer's own chat template is applied: save the tokenizer with this one if it is another",
    "special_tokens": "expected a mapping",
    "eot_tokens": "what ends a turn is read from the tokenizer's chat template",
    "tokens": "save the tokenizer and the model with the new tokens first",
    "plugins": "there are no plug-ins of Axolotl's here",
    "loss_watchdog_threshold": "verdicts judge a run while it trains; train.on_verdict: stop ends it",
    "loss_watchdog_patience": "verdicts judge a run while it trains; train.on_verdict: stop ends it",
    "tensor_parallel_size": "tensor parallelism would split prompts that are shared; use FSDP",
    "context_parallel_size": "context parallelism would split prompts that are shared; use FSDP",
    "sequence_parallel_degree": "sequence parallelism would split prompts that are shared; use FSDP",
    "wandb_project": "set WANDB_PROJECT in the environment", "wandb_entity": "set WANDB_ENTITY in the environment",
    "wandb_log_model": "set WANDB_LOG_MODEL in the environment", "wandb_run_id": "set WANDB_RUN_ID in the environment",
    "trl": "its settings are for training with generation",
    "chat_template_jinja": "save the tokenizer with this template",
    "default_system_message": "write the system message into the rows",
    "cosine_constant_lr_ratio": "transformers has no such schedule",
    "early_stopping_patience": "runs end where they are told to; train.on_verdict: stop ends them at a verdict",
}  # fmt: skip
"""Settings without a counterpart that people ask about -> what to do."""


def conversion(given: Mapping[str, Any], path: Path) -> Conversion:
    """Takes the settings of a file apart. What it does not take, `Conversion.rest` passes on.

    Raises:
        ConfigError: The file asks for no method that compares given responses.
    """
    made = Conversion("Axolotl", given)
    method = str(made.take("rl")).lower()
    if method not in METHODS:
        raise ConfigError(
            f"{path}: rl: {method}: infopo trains on preferences; {', '.join(METHODS)} are converted"
        )
    _model(made)
    _objective(made, method)
    axolotl_data.data(made, method)
    _training(made)
    made.evaluation()
    for key in ("tensor_parallel_size", "context_parallel_size", "sequence_parallel_degree"):
        if made.get(key) == 1:
            made.need_not(key, NEEDLESS[key])
    if made.get("val_set_size") == 0:
        made.need_not("val_set_size", "0 is no evaluation")
    if made.get("chat_template") == "tokenizer_default":
        made.need_not("chat_template", "the tokenizer's own chat template is applied")
    if made.get("sample_packing"):
        made.lose("sample_packing", "nothing is padded where the model's attention allows it")
    made.account(LOST, NEEDLESS)
    return made


def _model(made: Conversion) -> None:
    made.move("base_model", "model.name_or_path")
    made.move("revision_of_model", "model.revision")
    made.move("trust_remote_code", "model.trust_remote_code")
    adapter = made.get("adapter")
    if adapter not in ("lora", "qlora"):
        made.lose("adapter", "`lora` and `qlora` are converted; all weights are trained here")
        settings = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_linear")
        made.without_adapter(settings, "there is no adapter in the recipe")
        return
    made.take("adapter")
    made.quantization()
    if adapter == "qlora" and made["model.quantization"] is None:
        made.put("model.quantization", "4bit", "adapter")
    made.put("model.adapter.r", made.take("lora_r", 8), "adapter; lora_r")
    for key in ("lora_alpha", "lora_dropout"):
        made.move(key, f"model.adapter.{key}")
    modules = listed(made.get("lora_target_modules"))
    if made.get("lora_target_linear"):
        made.take("lora_target_linear")
        made.put("model.adapter.target_modules", "all-linear", "lora_target_linear")
        made.need_not("lora_target_modules", "lora_target_linear names all of them")
    elif modules:
        made.take("lora_target_modules")
        made.put("model.adapter.target_modules", modules, "lora_target_modules")


def _objective(made: Conversion, method: str) -> None:
    """Sets the loss, which Axolotl hands to TRL's trainers."""
    given: dict[str, Any] = {"beta": 0.1}
    origin = DEFAULT
    for key in ("orpo_alpha", "rl_beta"):  # rl_beta takes precedence
        if made.has(key) and (key == "rl_beta" or not made.has("rl_beta")):
            given["beta"], origin = made.take(key), key
    losses, weights = listed(made.get("dpo_loss_type")) or ["sigmoid"], made.get("dpo_loss_weights")
    if method == "dpo":
        made.take("dpo_loss_type"), made.take("dpo_loss_weights")
        given |= {"loss_type": losses, "loss_weights": weights}
        if made.has("dpo_label_smoothing"):
            given["label_smoothing"] = made.take("dpo_label_smoothing")
        if made.get("dpo_use_weighting"):
            given["use_weighting"] = made.take("dpo_use_weighting")
    elif method == "kto":
        for key, name in (
            ("kto_desirable_weight", "desirable_weight"),
            ("kto_undesirable_weight", "undesirable_weight"),
        ):
            if made.has(key):
                given[name] = made.take(key)
        given["loss_type"] = ["kto"]
    elif method == "simpo":
        likelihood = made.take("cpo_alpha", 1.0)
        given |= {"simpo_gamma": made.take("simpo_gamma", 0.5), "loss_type": ["simpo"]}
        if likelihood:
            given |= {"loss_type": ["simpo", "sft"], "loss_weights": [1.0, likelihood]}
        else:
            made.needless.append(Named("cpo_alpha", likelihood, "0 adds no likelihood"))
    else:
        given["loss_type"] = [method]
    put_loss(made, given, origins={
        "name": "rl; dpo_loss_type; dpo_loss_weights; dpo_use_weighting" if method == "dpo" else "rl",
        "beta": origin, "desirable_weight": "kto_desirable_weight", "undesirable_weight": "kto_undesirable_weight",
        "label_smoothing": "dpo_label_smoothing", "gamma": "simpo_gamma", "sft": "cpo_alpha",
    })  # fmt: skip
    for key in ("orpo_alpha", "rl_beta", "simpo_gamma", "cpo_alpha", "kto_desirable_weight", "kto_undesirable_weight",
                "dpo_loss_type", "dpo_loss_weights", "dpo_label_smoothing"):  # fmt: skip
        made.need_not(key, f"rl: {method} does not read it")


def _training(made: Conversion) -> None:
    made.put("output_dir", made.take("output_dir", "runs/converted"), "output_dir")
    epochs = made.get("num_epochs", 1.0)
    for key, default in DEFAULTS.items():
        if not made.has(key):
            made.put(f"train.{TRAIN[key]}", default, DEFAULT)
    _schedule(made)
    for key, strategy in (("evals_per_epoch", "eval"), ("saves_per_epoch", "save")):
        per_epoch = made.get(key)
        has_data = strategy == "save" or made["data.eval_path"] or made["data.eval_split"]
        is_known = is_number(per_epoch) and is_number(epochs) and per_epoch > 0 and epochs > 0
        if is_known and has_data and made.get("max_steps") is None:
            made.take(key)
            # As Axolotl itself computes it: a number below 1 is a share of all steps.
            share = 1 / (per_epoch * epochs) if per_epoch > 1 else 1
            made.put(f"train.{strategy}_strategy", "steps" if share < 1 else "epoch", key)
            if share < 1:
                made.put(f"train.{strategy}_steps", round(share, 6), f"{key}; num_epochs")
        elif per_epoch:
            made.lose(key, f"set train.{strategy}_strategy and train.{strategy}_steps")
    made.checkpointing()
    if made.get("gradient_checkpointing") not in (None, True):
        made.lose("gradient_checkpointing", "activations are recomputed, and not offloaded")
    if made.get("group_by_length"):
        made.take("group_by_length")
        made.put("train.train_sampling_strategy", "group_by_length", "group_by_length")
    if made.get("tf32") == "auto":
        made.need_not("tf32", "torch's own default")
    tokens = made.get("special_tokens")
    if isinstance(tokens, dict):
        made.take("special_tokens")
        for key, token in tokens.items():
            if key == "pad_token" and token:
                made.put("train.pad_token", token, "special_tokens.pad_token")
            elif token is not None:
                made.lost.append(
                    Named(f"special_tokens.{key}", token, "save the tokenizer with it: it is read from there")
                )
    _trackers(made)
    _sharding(made)
    for key, name in TRAIN.items():
        made.train(name, key)


def _schedule(made: Conversion) -> None:
    if made.get("warmup_ratio"):
        made.train("warmup_steps", "warmup_ratio")
    elif not made.has("warmup_steps"):
        made.differences.append(
            "Without a setting, Axolotl warms up for 3 % of the steps, at most 100, and this recipe does not "
            "(train.warmup_steps)."
        )
    if made.has("cosine_min_lr_ratio") and made.get("lr_scheduler", "cosine") == "cosine":
        made.take("lr_scheduler")
        made.put("train.lr_scheduler_type", "cosine_with_min_lr", "lr_scheduler; cosine_min_lr_ratio")
        rate = made.take("cosine_min_lr_ratio")
        made.put("train.lr_scheduler_kwargs", {"min_lr_rate": rate}, "cosine_min_lr_ratio")
    if made.get("embedding_lr") or made.get("loraplus_lr_ratio"):
        made.differences.append("All weights have one learning rate here.")


def _trackers(made: Conversion) -> None:
    asked = {
        "wandb": ("use_wandb", "wandb_project"),
        "tensorboard": ("use_tensorboard",),
        "swanlab": ("use_swanlab",),
    }
    for tracker, keys in asked.items():
        if any(made.get(key) for key in keys) and made["train.report_to"] is None:
            made.put("train.report_to", tracker, "; ".join(key for key in keys if made.has(key)))
            for key in keys:
                if key.startswith("use_"):
                    made.take(key)
    if made.has("wandb_name"):
        made.train("run_name", "wandb_name")


def _sharding(made: Conversion) -> None:
    """FSDP: a list of switches in version 1, a mapping in version 2. Recipes have version 2, whose runs are resumed."""
    config = made.get("fsdp_config")
    if not isinstance(config, dict) and not made.has("fsdp"):
        made.need_not("fsdp_version", "there is no FSDP")
        return
    if not isinstance(config, dict):
        made.lose("fsdp_config", "expected a mapping")
        config = {}
    read = ["fsdp_config", *(["fsdp_version"] if made.has("fsdp_version") else [])]
    made.take("fsdp_version"), made.take("fsdp_config")
    settings: dict[str, Any] = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    if made.has("fsdp"):
        made.differences.append(
            "fsdp: version 2 shares out the same tensors as version 1, each along its first side."
        )
    for key, value in config.items():
        name = key.removeprefix("fsdp_")
        if name in FSDP:
            read += [key] if name != key else []
            settings[name] = listed(value) if name == "transformer_layer_cls_to_wrap" else value
        elif name == "offload_params":
            group = made.lost if value else made.needless
            group.append(Named(f"fsdp_config.{key}", value, "parameters stay on the accelerators"))
        elif name != "version":
            made.lost.append(Named(f"fsdp_config.{key}", value, "not passed on"))
    for switch in listed(made.take("fsdp")):
        if switch not in ("full_shard", "auto_wrap", None, ""):
            made.lost.append(Named("fsdp", switch, "FSDP shares out weights, gradients and Adam's moments"))
    made.put("train.fsdp", True, "fsdp; fsdp_config")
    made.put("train.fsdp_config", settings, "; ".join(read))


FSDP = (
    "auto_wrap_policy", "transformer_layer_cls_to_wrap", "state_dict_type", "reshard_after_forward",
    "cpu_ram_efficient_loading", "activation_checkpointing", "sync_module_states", "use_orig_params",
    "backward_prefetch", "forward_prefetch", "limit_all_gathers", "min_num_params",
)  # fmt: skip
"""Keys of `fsdp_config` that are passed on."""
