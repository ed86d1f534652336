"""One rank of `test_sharded_runs.py`; started by torch.distributed.run, which runs several cases one after the other.

accelerate has FSDP on accelerators only, and decides by the kind of processes it finds. It is told here that these are
processes of accelerators, which then turn out to be CPUs. All that follows is accelerate's, transformers' and torch's.
"""

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
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainerCallback

from infopo.arguments import InfoPOConfig
from infopo.errors import InfoPOError
from infopo.lab.tokenizer import build_tokenizer
from infopo.logps import lm_head
from infopo.logps.wrappers import base_of
from infopo.trainer import InfoPOTrainer
from worlds import PLAIN_SGD, random_dataset, tiny_llama

KEPT: list[Any] = []
"""References of all cases, which a run finds again for data that come later."""


def set_device(state: PartialState) -> None:
    if state.device is None:
        state.device = torch.device("cpu")


PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = set_device


def trainer_of(case: dict[str, Any], folder: Path) -> InfoPOTrainer:
    """The trainer of a case: its settings, and what stands for objects in JSON."""
    case = dict(case)
    version, model = case.pop("version", 2), case.pop("model", None)
    fsdp = {"version": version, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", **case.pop("fsdp_config", {})}
    if version == 1:
        fsdp["sync_module_states"] = False  # it needs an accelerator
    adapter = case.pop("lora", False)  # True, or "random" for one that changes the policy at once
    lora = LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights=adapter != "random",
    )
    reference = tiny_llama(seed=1) if case.pop("ref_model", False) else None
    KEPT.append(reference)
    settings = {k: v for k, v in PLAIN_SGD.items() if k != "use_cpu"}
    settings |= {"output_dir": str(folder), "per_device_train_batch_size": 4, "reference_store": "off"}
    data = case.pop("data", {})
    callbacks = [Stop()] if case.pop("stop", False) else []
    return InfoPOTrainer(
        callbacks=callbacks,
        model=tiny_llama() if model is None else model,
        ref_model=reference,
        args=InfoPOConfig(**settings | case, fsdp=True, fsdp_config=fsdp),
        train_dataset=random_dataset(21, **data),
        eval_dataset=random_dataset(5, seed=9),
        processing_class=build_tokenizer(),
        peft_config=lora if adapter else None,
    )


def clean_state(model: FullyShardedDataParallel) -> dict[str, torch.Tensor]:
    """Parameters under their own names; buffers are none here."""
    return {
        name.replace("_fsdp_wrapped_module.", ""): value.detach() for name, value in model.named_parameters()
    }


class Stop(TrainerCallback):
    """Saves and ends the run after two steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            control.should_save = control.should_training_stop = True


def outcome(trainer: InfoPOTrainer, *, resume: bool, late: bool) -> dict[str, Any]:
    """What a run gave: whole weights, records and what is said of it."""
    before = None if resume else trainer.evaluate()
    trainer.train(resume_from_checkpoint=resume)
    if resume:
        trainer.save_final_model()
    after = trainer.evaluate(random_dataset(5, seed=9)) if late else None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    if trainer.accelerator.is_fsdp2:
        weights = get_model_state_dict(trainer.model, options=options)
    else:  # the state dict of FSDP1 was seen to end a process on a CPU
        with FullyShardedDataParallel.summon_full_params(trainer.model):
            weights = {k: v.clone() for k, v in clean_state(trainer.model).items()}
    shapes = [tuple(p.to_local().shape) for p in trainer.model.parameters() if hasattr(p, "to_local")]
    store = trainer.reference_store
    return {
        "weights": weights,
        "logs": [
            {k: v for k, v in r.items() if k != "step"} for r in trainer.state.log_history if "loss" in r
        ],
        "evaluation": before,
        "late": after,
        "policy": trainer.policy_hash,
        "reference": trainer.reference_hash,
        "store": None if store is None else [store.reused, len(store.computed)],
        "map": str(getattr(base_of(trainer.model), lm_head._MAP, "none")),
        "shards": shapes,
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(240, exit=True)  # a rank that waits for another would do so for ever
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        then = {"resume": case.pop("resume", False), "late": case.pop("late", False)}
        try:
            result = outcome(trainer_of(case, folder / case.pop("run", name)), **then)
        except InfoPOError as error:
            result = {"refused": str(error), "traceback": traceback.format_exc()}
        torch.save(result, folder / f"{name}.rank{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # threads of the process group were seen to abort a rank at its exit, after its work was done
