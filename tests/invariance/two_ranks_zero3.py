"""One rank of `test_zero3.py`; started by torch.distributed.run, which runs several cases one after the other."""

import faulthandler
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from infopo.arguments import InfoPOConfig
from infopo.errors import InfoPOError
from infopo.lab.tokenizer import build_tokenizer
from infopo.trainer import InfoPOTrainer
from worlds import PLAIN_SGD, random_dataset, tiny_llama

ZERO = Path(__file__).resolve().parents[2] / "recipes/deepspeed/zero3.json"
KEPT: list[Any] = []
"""References of all cases, which a run finds again for data that come later."""


def trainer_of(case: dict[str, Any], folder: Path) -> InfoPOTrainer:
    """The trainer of a case: its settings, and what stands for objects in JSON."""
    zero = json.loads(ZERO.read_text())
    zero["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # cut up the smallest, too
    model, data, lora = case.pop("model", None), case.pop("data", {}), case.pop("lora", False)
    policy, reference = tiny_llama(), tiny_llama(seed=1) if case.pop("ref_model", False) else None
    KEPT.append(reference)
    is_loaded = case.pop("is_loaded", False)
    settings = PLAIN_SGD | {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "reference_store": "off",
    }
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    args = InfoPOConfig(**settings | case, deepspeed=zero)
    if is_loaded:
        model = AutoModelForCausalLM.from_pretrained(model)
    return InfoPOTrainer(
        model=policy if model is None else model,
        ref_model=reference,
        args=args,
        train_dataset=random_dataset(21, **data),
        eval_dataset=random_dataset(5, seed=9),
        processing_class=build_tokenizer(),
        peft_config=adapter if lora else None,
    )


def outcome(trainer: InfoPOTrainer, *, late: bool) -> dict[str, Any]:
    """What a run gave: whole weights, records and what is said of it."""
    before, dtype = trainer.evaluate(), str(next(trainer.model.parameters()).dtype)
    trainer.train()
    after = trainer.evaluate(random_dataset(5, seed=9)) if late else None
    weights = trainer.accelerator.get_state_dict(trainer.deepspeed)  # of the first rank
    records = [{k: v for k, v in r.items() if k != "step"} for r in trainer.state.log_history if "loss" in r]
    return {
        "weights": weights,
        "logs": records,
        "evaluation": before,
        "late": after,
        "type": dtype,
        "policy": trainer.policy_hash,
        "reference": trainer.reference_hash,
        "flos": trainer.state.total_flos,
        "in place": sum(parameter.numel() for parameter in trainer.model.parameters()),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(400, exit=True)  # a rank that waits for another would do so for ever
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        late = case.pop("late", False)
        try:
            result = outcome(trainer_of(case, folder / name), late=late)
        except InfoPOError as error:
            result = {"refused": str(error), "traceback": traceback.format_exc()}
        torch.save(result, folder / f"{name}.rank{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # threads of the process group were seen to abort a rank at its exit, after its work was done
