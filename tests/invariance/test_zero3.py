"""Runs under DeepSpeed's ZeRO-3 are the runs of a whole model: two CPU processes. It needs the package DeepSpeed."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sharded import MEASURED, launch, placed, save_models, whole
from test_ranks import needs_no_accelerator

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytestmark = [pytest.mark.long, pytest.mark.timeout(900), needs_no_accelerator]

CASES: dict[str, dict[str, Any]] = {
    "by name": {"model": "policy", **MEASURED, "gradient_size": 0},
    "live": {"reference": "live"},
    "named": {"model": "policy", "reference": "other"},
    "given": {"ref_model": True, "objective": "dpo", "late": True},
    "adapter": {"model": "policy", "lora": True, "learning_rate": 0.005, "late": True},
    "adapter-off": {"lora": True, "reference": "adapter-off", "objective": "dpo", "learning_rate": 0.05},
    "step statistic": {"objective": "dv"},
    "kto": {"objective": "kto", "data": {"chosen": [1, 2], "rejected": [1, 1, 3]}},
    "naive": {"logps_path": "naive"},
    "accumulated": {"gradient_accumulation_steps": 2},
    "checkpointed": {"activation_checkpointing": True},
}

ALL = {**CASES, "loaded late": {"model": "policy", "is_loaded": True}, "rounded": {"bf16": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models."""
    return save_models(tmp_path_factory.mktemp("zero3"))


@cache
def results(folder: Path) -> list[dict[str, Any]]:
    """What the cases gave on each of two ranks with 4 rows at a time. They run one after the other in one launch."""
    cases = {name: placed(case, folder) | {"num_train_epochs": 1} for name, case in ALL.items()}
    return launch(Path(__file__).with_name("two_ranks_zero3.py"), folder, cases, DS_ACCELERATOR="cpu")


def test_a_model_that_was_cut_up_when_it_was_loaded_is_refused_by_name(folder: Path) -> None:
    for of_rank in results(folder):
        assert (
            "Pass the name of the model, or load it before InfoPOConfig" in of_rank["loaded late"]["refused"]
        )


def test_the_reference_has_the_weights_that_deepspeed_trains(folder: Path) -> None:
    """In bfloat16 it rounds them when training starts, and the reference is computed before."""
    for of_rank in results(folder):
        assert of_rank["rounded"]["type"] == "torch.bfloat16"
        assert of_rank["live"]["type"] == "torch.float32"


@pytest.mark.parametrize("name", CASES)
def test_a_run_under_zero_3_is_the_run_of_a_whole_model(folder: Path, name: str) -> None:
    """Weights, losses, hashes and evaluations; 21 rows on 2 ranks x 4, so that the last step leaves one rank short."""
    trainer, evaluation = whole(CASES[name], folder)
    trainer.train()
    logs = [record for record in trainer.state.log_history if "loss" in record]
    first, second = (of_rank[name] for of_rank in results(folder))
    assert "refused" not in first, first.get("traceback")
    assert first["in place"] == second["in place"] == 0  # it is cut up to the last weight
    assert first["policy"] == second["policy"] == trainer.policy_hash
    assert first["reference"] == second["reference"] == trainer.reference_hash
    assert first["flos"] == trainer.state.total_flos
    for record, expected in zip(first["logs"], logs, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4, abs=1e-5)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4, abs=1e-4)
        measured = [key for key in expected if key.split("/")[0] in ("probe", "drift")]
        assert bool(measured) == ("probe_size" in CASES[name])
        for key in measured:
            assert record[key] == pytest.approx(expected[key], rel=2e-3, abs=2e-3), key
    assert first["evaluation"]["eval_loss"] == pytest.approx(evaluation["eval_loss"], rel=1e-4, abs=1e-5)
    if CASES[name].get("late"):
        late = trainer.evaluate()["eval_loss"]
        assert first["late"]["eval_loss"] == pytest.approx(late, rel=1e-4, abs=1e-5)
    expected_weights = dict(trainer.model.named_parameters())
    for key, value in expected_weights.items():
        torch.testing.assert_close(first["weights"][key], value.detach(), rtol=0, atol=2e-5, msg=key)
