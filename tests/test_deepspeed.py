"""ZeRO-1, 2 and 3 train what DistributedDataParallel trains, on two CPU processes. It needs DeepSpeed, which no extra
brings: `pip install deepspeed`."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from test_ranks import needs_no_accelerator, torchrun

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytestmark = [pytest.mark.long, pytest.mark.timeout(900), needs_no_accelerator]

ROOT = Path(__file__).resolve().parents[1]

RECIPE = """
model: lab:policy
data: {path: lab:verified, limit: 64, eval_split: test}
train: {max_steps: 4, per_device_train_batch_size: 4, save_steps: 2, logging_steps: 1, learning_rate: 1.0e-3,
  lr_scheduler_type: constant, anchor_size: 8, anchor_tokens: 16, gradient_size: 0}
output_dir: run
"""

LORA = "model.adapter={r: 4, target_modules: [q_proj, v_proj]}"


def trained(
    folder: Path, stage: int, *overrides: str, without: str = ""
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns records and weights of a run under ZeRO of this stage, or without DeepSpeed for stage 0.

    `without` is a setting of ZeRO that is left out.
    """
    folder.mkdir(exist_ok=True)
    recipe, config = folder / "recipe.yaml", folder / "zero.json"
    recipe.write_text(RECIPE)
    shipped = json.loads((ROOT / f"recipes/deepspeed/zero{max(stage, 2)}.json").read_text())
    shipped["zero_optimization"]["stage"] = stage
    shipped["zero_optimization"].pop(without, None)
    config.write_text(json.dumps(shipped))
    done = torchrun(
        "-m", "infopo", "train", str(recipe), f"output_dir={folder}/run", f"train.deepspeed={config if stage else ''}",
        *overrides, DS_ACCELERATOR="cpu", INFOPO_CACHE=os.environ["INFOPO_CACHE"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    [model] = (folder / "run").glob("*model.safetensors")
    return records, load_file(model)


@pytest.mark.parametrize(("stage", "settings"), [(1, []), (2, []), (3, []), (3, [LORA])])
def test_a_run_under_zero_is_the_run_of_replicas_and_resumes_to_the_same_weights(
    stage: int, settings: list[str], tmp_path: Path
) -> None:
    # A model that ZeRO-3 has cut up is not sampled from.
    settings = [*settings, *["train.anchor_size=0"] * (stage == 3)]
    records, weights = trained(tmp_path / "replicas", 0, *settings)
    found, own = trained(tmp_path / "zero", stage, *settings)
    # DeepSpeed adds gradients up in another order, and the first steps of Adam do not shrink with the gradient.
    assert_close(own, weights, rtol=1e-3, atol=1e-4)
    for name in ("loss", "grad_norm", "probe/change/chosen", *["kl/forward"] * (stage < 3)):
        values, others = ([record[name] for record in each if name in record] for each in (records, found))
        assert len(values) > 0
        assert others == pytest.approx(values, rel=1e-3, abs=1e-4), name
    trained(tmp_path / "resumed", stage, *settings, "train.max_steps=2")
    _, resumed = trained(tmp_path / "resumed", stage, *settings, "train.resume_from_checkpoint=true")
    assert_close(resumed, own, rtol=0, atol=0)


def test_zero_3_without_a_model_at_its_end_is_refused_by_name(tmp_path: Path) -> None:
    key = "stage3_gather_16bit_weights_on_model_save"
    with pytest.raises(AssertionError, match=f"no model is saved without {key}"):
        trained(tmp_path, 3, without=key)
