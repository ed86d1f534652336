"""Every setting of transformers' and TRL's configurations is honoured, refused, or without effect for a reason."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from infopo import trl_names
from infopo.arguments import InfoPOConfig
from infopo.lab.tokenizer import build_tokenizer
from infopo.trainer import InfoPOTrainer
from worlds import PLAIN_SGD, random_dataset, tiny_llama

INERT = {
    "remove_unused_columns": "rows are tokenized here; unknown columns are listed by `check`",
    "length_column_name": "lengths are counted, not read from a column",
    "eval_do_concat_batches": "no predictions are kept that could be joined",
    "eval_use_gather_object": "no predictions are kept that could be gathered",
    "do_train": "read by scripts, not by trainers",
    "do_eval": "read by scripts, not by trainers",
    "do_predict": "read by scripts, not by trainers",
    "resume_from_checkpoint": "read by scripts, which hand it to train()",
    "local_rank": "set by the launcher",
    "log_on_each_node": "decides which ranks log; there is one line a record in any case",
    "ref_model_mixup_alpha": "goes with sync_ref_model, which is refused",
    "ref_model_sync_steps": "goes with sync_ref_model, which is refused",
}
"""Setting -> why another value changes nothing."""

BY_TRANSFORMERS = {
    "output_dir", "per_device_train_batch_size", "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type",
    "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "optim_target_modules", "gradient_accumulation_steps", "max_grad_norm", "bf16", "fp16", "tf32",
    "activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "torch_compile", "torch_compile_backend", "torch_compile_mode",
    "torch_empty_cache_steps", "auto_find_batch_size", "logging_strategy", "logging_steps", "logging_first_step",
    "include_num_input_tokens_seen", "log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name",
    "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "eval_strategy", "eval_steps",
    "eval_delay", "per_device_eval_batch_size", "eval_on_start", "save_only_model", "save_strategy", "save_steps",
    "save_on_each_node", "save_total_limit", "enable_jit_checkpoint", "push_to_hub", "hub_token", "hub_private_repo",
    "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision", "load_best_model_at_end",
    "metric_for_best_model", "greater_is_better", "ignore_data_skip", "restore_callback_states_from_checkpoint",
    "full_determinism", "seed", "data_seed", "use_cpu", "accelerator_config", "dataloader_drop_last",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "dataloader_in_order", "ddp_find_unused_parameters", "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "deepspeed",
    "skip_memory_metrics",
}  # fmt: skip
"""Honoured by transformers' own code, which runs as it is, or by an override of this package (tests of their own)."""

OF_TRL = {
    "model_init_kwargs", "trust_remote_code", "router_aux_loss_coef", "disable_dropout", "dataset_num_proc",
    "max_length",
    "precompute_ref_log_probs", "precompute_ref_batch_size", "loss_type", "loss_weights", "f_divergence_type",
    "f_alpha_divergence_coef", "label_smoothing", "beta", "pad_token", "desirable_weight", "undesirable_weight",
    "simpo_gamma", "cpo_alpha",
    "alpha", "discopop_tau", "use_weighting",
}  # fmt: skip
"""Honoured under TRL's name."""


def test_every_setting_of_transformers_has_its_place() -> None:
    """A new version with a new setting fails here, until somebody has looked at it."""
    every = {f.name for f in fields(TrainingArguments)}
    assert every - trl_names.NOT_HONOURED.keys() - INERT.keys() - BY_TRANSFORMERS == set()
    assert every >= BY_TRANSFORMERS


def test_every_setting_of_trls_preference_trainers_has_its_place() -> None:
    pytest.importorskip("trl")
    from trl import DPOConfig, KTOConfig
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig

    every = {f.name for config in (DPOConfig, KTOConfig, CPOConfig, ORPOConfig) for f in fields(config)}
    every -= {f.name for f in fields(TrainingArguments)}
    assert every - trl_names.NOT_HONOURED.keys() - INERT.keys() - OF_TRL == set()
    assert every >= OF_TRL


def test_no_setting_has_two_places() -> None:
    places = [set(trl_names.NOT_HONOURED), set(INERT), BY_TRANSFORMERS, OF_TRL]
    for i, one in enumerate(places):
        for other in places[i + 1 :]:
            assert not one & other


def losses(folder: Path, **settings: Any) -> list[float]:
    trainer = InfoPOTrainer(
        model=tiny_llama(),
        args=InfoPOConfig(
            output_dir=str(folder), **PLAIN_SGD | {"max_steps": 2, "report_to": "none"} | settings
        ),
        train_dataset=random_dataset(8),
        eval_dataset=random_dataset(4, seed=3),
        processing_class=build_tokenizer(),
    )
    trainer.train()
    return [r["loss"] for r in trainer.state.log_history if "loss" in r] + [trainer.evaluate()["eval_loss"]]


def test_what_is_said_to_be_inert_changes_nothing(tmp_path: Path) -> None:
    other = {
        "remove_unused_columns": False, "length_column_name": "len", "eval_do_concat_batches": False,
        "eval_use_gather_object": True, "do_train": True, "do_eval": True, "do_predict": True,
        "resume_from_checkpoint": "nowhere", "log_on_each_node": False,
        "ref_model_mixup_alpha": 0.1, "ref_model_sync_steps": 3,
    }  # fmt: skip
    assert other.keys() == INERT.keys() - {"local_rank"}
    assert losses(tmp_path / "a", **other) == losses(tmp_path / "b")


@pytest.mark.parametrize(
    "settings",
    [
        {"auto_find_batch_size": True},
        {"skip_memory_metrics": False},
        {"torch_empty_cache_steps": 1},
        {"dataloader_num_workers": 1, "dataloader_in_order": False},
        {"logging_first_step": True},
    ],
    ids=repr,
)
def test_settings_of_how_a_run_is_carried_out_leave_its_losses_as_they_are(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    assert losses(tmp_path / "a", **settings) == losses(tmp_path / "b")
