"""TRL's files (`trl dpo --config FILE`, `trl kto --config FILE`)."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from infopo.elsewhere.conversion import Conversion, Named, listed
from infopo.elsewhere.losses import put_loss
from infopo.trl_names import LossSettings

NEEDLESS: Mapping[str, str] = {
    "use_peft": "there is no adapter in the recipe", "remove_unused_columns": "it has no effect",
    "lora_task_type": "models are causal language models", "load_in_4bit": "false is the default",
    "load_in_8bit": "false is the default", "bnb_4bit_quant_type": "4 bits are NF4",
    "use_bnb_nested_quant": "4 bits are quantized twice",
    "bf16": "bfloat16 arithmetic is on where the accelerator has it",
    "precompute_ref_log_probs": "the reference is computed once and kept anyway", "gradient_checkpointing": "it is on",
    "bnb_4bit_quant_storage": "this is bitsandbytes's default", "use_dora": "false is the default",
    "use_rslora": "false is the default", "ignore_bias_buffers": "buffers of a model are not broadcast",
    "model_revision": "main is the default",
}  # fmt: skip
"""Settings that need none here -> why."""

LOST: Mapping[str, str] = {
    "dataset_config": "a data set on the hub has no second name here; name its files in data.path",
    "lora_modules_to_save": "only the adapter is trained", "lora_target_parameters": "modules are adapted",
    "use_dora": "LoRA is", "use_rslora": "the scale is lora_alpha / r",
    "test_split_size": "no share of the rows is held out; name data.eval_path or data.eval_split",
    "env": "set the variables before the command", "reward_model_path": "losses here take given responses",
}  # fmt: skip
"""Settings without a counterpart -> what to do."""


def conversion(given: Mapping[str, Any], path: Path) -> Conversion:
    """Takes the settings of a file apart. What it does not take, `Conversion.rest` passes on.

    Raises:
        ConfigError: The loss is none of those that infopo has.
    """
    made = Conversion("TRL", given)
    _model(made)
    _data(made)
    _objective(made)
    made.put("output_dir", made.take("output_dir", "runs/converted"), "output_dir")
    _reference(made)
    made.checkpointing()
    if made.get("warmup_ratio"):
        made.train("warmup_steps", "warmup_ratio")
    made.evaluation()
    for key in ("use_dora", "use_rslora"):
        if made.get(key) is False:
            made.need_not(key, NEEDLESS[key])
    made.account(LOST, NEEDLESS)
    return made


def _model(made: Conversion) -> None:
    made.move("model_name_or_path", "model.name_or_path")
    if made.get("model_revision") != "main":
        made.move("model_revision", "model.revision")
    for key in ("trust_remote_code", "attn_implementation"):
        made.move(key, f"model.{key}")
    for key in ("torch_dtype", "dtype"):
        made.move(key, "model.dtype")
    if not made.get("use_peft"):
        settings = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
        made.without_adapter(settings, "without use_peft there is no adapter, as in TRL")
        return
    made.take("use_peft")
    made.put("model.adapter.r", made.take("lora_r", 16), "use_peft; lora_r")
    made.put("model.adapter.lora_alpha", made.take("lora_alpha", 32), "lora_alpha")
    made.put(
        "model.adapter.lora_dropout",
        made.take("lora_dropout", 0.05),
        "lora_dropout, which is 0.05 by default",
    )
    if made.has("lora_target_modules"):
        modules = listed(made.take("lora_target_modules"))
        target = modules[0] if modules == ["all-linear"] else modules
        made.put("model.adapter.target_modules", target, "lora_target_modules")
    made.quantization()


def _data(made: Conversion) -> None:
    made.move("dataset_name", "data.path")
    made.move("dataset_train_split", "data.split")
    if made.get("eval_strategy", "no") != "no":
        made.put("data.eval_split", made.take("dataset_test_split", "test"), "dataset_test_split")
    made.need_not("dataset_test_split", "nothing is evaluated (eval_strategy)")
    for key in ("dataset_streaming", "streaming"):
        made.move(key, "data.streaming")
    entries = made.get("datasets")
    if isinstance(entries, list) and all(isinstance(entry, dict) and entry.get("path") for entry in entries):
        made.take("datasets")
        paths = [entry["path"] for entry in entries]
        made.put("data.path", paths[0] if len(paths) == 1 else paths, "datasets: path")
        for index, entry in enumerate(entries):
            for key, value in entry.items():
                if key == "split" and len(entries) == 1:
                    made.put("data.split", value, "datasets[0].split")
                elif key != "path" and value is not None:
                    made.lost.append(
                        Named(f"datasets[{index}].{key}", value, "name files that have it already")
                    )
    made.lose("datasets", "expected a list of mappings with a path each")
    made.put("data.max_length", made.take("max_length", 1024), "max_length")
    made.move("max_prompt_length", "data.max_prompt_length")
    made.move("dataset_num_proc", "data.num_proc")
    if made["data.path"] is None and made["model.name_or_path"]:
        made.differences.append("The file names no data; TRL takes them from its command line.")


def _objective(made: Conversion) -> None:
    names = {each.name for each in fields(LossSettings)} - {"objective", "objective_parameters"}
    given = {name: made.take(name) for name in sorted(names) if made.has(name)}
    is_kto = (
        bool(given.keys() & {"desirable_weight", "undesirable_weight"}) or given.get("loss_type") == "kto"
    )
    losses = given.get("loss_type", "kto" if is_kto else "sigmoid")
    origins = {
        "name": "loss_type"
        if "loss_type" in given
        else "TRL's default; " + ("" if is_kto else "of `trl dpo`")
    }
    if "loss_type" not in given and not is_kto:
        made.differences.append(
            "The file does not say which command reads it: DPO is taken. If it was `trl kto`, write objective: kto."
        )
    given["loss_type"] = listed(losses)
    weight = "loss_weights" if "loss_weights" in given else "cpo_alpha"
    settings = {
        "gamma": "simpo_gamma",
        "nll_weight": weight,
        "tau": "discopop_tau",
        "divergence": "f_divergence_type",
    }
    origins |= {name: settings.get(name, name) for name in (*names, *settings) if name not in ("name",)}
    origins["name"] += "".join(f"; {name}" for name in ("loss_weights", "use_weighting", "f_divergence_type",
                               "f_alpha_divergence_coef") if name in given)  # fmt: skip
    put_loss(made, given, origins)
    for name in given.keys() - {"loss_type", "beta"}:
        made.mention(name, given[name])


def _reference(made: Conversion) -> None:
    made.move("ref_model", "reference.source")
    if made["model.name_or_path"] and made.get("precompute_ref_log_probs") is False:
        made.need_not("precompute_ref_log_probs", "the reference is computed once and kept")
