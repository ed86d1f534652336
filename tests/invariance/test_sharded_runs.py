"""Runs whose model FSDP has cut up are the runs of a whole model: two CPU processes, with accelerate's own FSDP."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sharded import MEASURED, launch, placed, save_models, whole
from worlds import quick

SCRIPT = Path(__file__).with_name("two_ranks_sharded.py")

EFFICIENT = {"cpu_ram_efficient_loading": True}
"""What `accelerate launch --use_fsdp` sets by default: only the first rank loads weights."""

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "efficient": {"model": "policy", "fsdp_config": EFFICIENT, "reference_store": "store", **MEASURED},
    "found": {"model": "policy", "fsdp_config": EFFICIENT, "reference_store": "store"},
    "live": {"model": "policy", "fsdp_config": EFFICIENT, "reference": "live"},
    "named": {"model": "policy", "fsdp_config": EFFICIENT, "reference": "other"},
    "given": {"ref_model": True, "objective": "dpo", "late": True},
    "given live": {"ref_model": True, "objective": "dpo", "reference": "live"},
    "adapter": {
        "model": "policy",
        "fsdp_config": EFFICIENT,
        "lora": True,
        "learning_rate": 0.005,
        "late": True,
    },
    "adapter-off": {"lora": True, "reference": "adapter-off", "objective": "dpo", "learning_rate": 0.05},
    "kto": {"objective": "kto", "data": {"chosen": [1, 2], "rejected": [1, 1, 3]}},
    "naive": {"logps_path": "naive"},
    "FSDP1": {"version": 1, **MEASURED},
    "FSDP1 adapter-off": {"version": 1, "lora": True, "reference": "adapter-off", "learning_rate": 0.005},
}


REFUSED: dict[str, Any] = {"lora": "random", "reference": "adapter-off"}

QUICK = ("efficient", "found", "adapter-off")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models."""
    return save_models(tmp_path_factory.mktemp("sharded"))


@cache
def results(folder: Path, are_quick: bool) -> list[dict[str, Any]]:
    """What the cases gave on each of two ranks with 4 rows at a time. They run one after the other in one launch."""
    names = [name for name in CASES if (name in QUICK) == are_quick]
    cases = {name: placed(CASES[name], folder) | {"num_train_epochs": 1} for name in names}
    return launch(SCRIPT, folder, ({"refused": dict(REFUSED)} if are_quick else {}) | cases)


@pytest.mark.parametrize("name", quick(CASES, *QUICK))
def test_a_sharded_run_is_the_run_of_a_whole_model(folder: Path, name: str) -> None:
    """Weights, losses, hashes and evaluations; 21 rows on 2 ranks x 4, so that the last step leaves one rank short.

    FSDP2 shows the last layers' weights gathered after a pass without gradient, and an optimizer made from those would
    leave the layers as they are: the weights after training tell.
    """
    trainer, evaluation = whole(CASES[name], folder)
    trainer.train()
    logs = [record for record in trainer.state.log_history if "loss" in record]
    first, second = (of_rank[name] for of_rank in results(folder, name in QUICK))
    assert "refused" not in first, first.get("traceback")
    assert first["policy"] == second["policy"] == trainer.policy_hash
    assert first["reference"] == second["reference"] == trainer.reference_hash
    assert first["map"] == second["map"]
    assert (first["map"] == "none") == (name == "naive")
    if "FSDP1" not in name:
        numbers = [sum(torch.Size(shape).numel() for shape in result["shards"]) for result in (first, second)]
        assert sum(numbers) == sum(p.numel() for p in trainer.model.parameters())
    for record, expected in zip(first["logs"], logs, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4, abs=1e-5)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4, abs=1e-4)
        measured = [
            key for key in expected if key.split("/")[0] in ("probe", "drift", "gradients", "forecast")
        ]
        assert bool(measured) == ("probe_size" in CASES[name])
        for key in measured:
            assert record[key] == pytest.approx(expected[key], rel=2e-3, abs=2e-3), key
    assert first["evaluation"]["eval_loss"] == pytest.approx(evaluation["eval_loss"], rel=1e-4, abs=1e-5)
    if CASES[name].get("late"):
        late = trainer.evaluate()["eval_loss"]
        assert first["late"]["eval_loss"] == pytest.approx(late, rel=1e-4, abs=1e-5)
    expected_weights = trainer.model.state_dict()
    assert first["weights"].keys() == expected_weights.keys()
    for key, value in expected_weights.items():
        torch.testing.assert_close(first["weights"][key], value, rtol=0, atol=2e-5, msg=key)


def test_ranks_of_a_sharded_model_refuse_together_a_policy_that_is_no_reference_without_its_adapter(
    folder: Path,
) -> None:
    """Those that went on would wait for the others for ever: the cases that follow would not run."""
    for of_rank in results(folder, True):
        assert "reference='adapter-off': the new adapter changes the policy" in of_rank["refused"]["refused"]


def test_the_first_rank_keeps_the_store_for_all(folder: Path) -> None:
    """Each response is computed once and found by the next run."""
    first, second = results(folder, True)
    responses = 2 * 21 + 2 * 5
    assert first["efficient"]["store"] == [0, responses]
    assert first["found"]["store"] == [responses, 0]
    assert second["efficient"]["store"] == second["found"]["store"] == [0, 0]


@pytest.mark.long
@pytest.mark.parametrize("is_adapter", [False, True])
def test_a_sharded_run_resumes_where_it_stopped(folder: Path, is_adapter: bool) -> None:
    """From whole and from sharded checkpoints; and the final model is saved whole, whatever checkpoints are made of."""
    common = {
        "model": str(folder / "policy"),
        "lora": is_adapter,
        "optim": "adamw_torch",
        "num_train_epochs": 2,
    }
    cases = {}
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        run = f"{kind}-{is_adapter}"
        settings = common | {
            "fsdp_config": EFFICIENT | {"state_dict_type": kind},
            "run": run,
            "save_steps": 99,
        }
        cases[f"{run} whole"] = settings | {"run": f"{run}-whole"}
        cases[f"{run} stopped"] = settings | {"save_strategy": "steps", "stop": True}
        cases[f"{run} resumed"] = settings | {"save_strategy": "steps", "resume": True}
    first, _ = launch(SCRIPT, folder, cases)
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        run = f"{kind}-{is_adapter}"
        whole, resumed = first[f"{run} whole"], first[f"{run} resumed"]
        assert "refused" not in resumed, resumed.get("traceback")
        assert len(first[f"{run} stopped"]["logs"]) == 2
        assert [r["loss"] for r in resumed["logs"]] == [r["loss"] for r in whole["logs"]]
        assert all(torch.equal(resumed["weights"][key], value) for key, value in whole["weights"].items())
        saved = load_file(folder / run / ("adapter_model.safetensors" if is_adapter else "model.safetensors"))
        names = {key.replace(".default", ""): value for key, value in whole["weights"].items()}
        assert len(saved) == sum("lora" in key for key in names) if is_adapter else len(names)
        assert all(torch.equal(value, names[key]) for key, value in saved.items())
