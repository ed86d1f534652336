"""One rank of `test_sharded_models_give_the_same`; started by torch.distributed.run.

FSDP itself, since accelerate, and with it the trainer, has it on accelerators only.
"""

import copy
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from families import EXAMPLES, assert_same_gradients, prepared, results
from infopo.data.packing import pack
from infopo.logps import attention, lm_head
from infopo.logps.forward import path_of
from infopo.logps.wrappers import base_of

kind, family = sys.argv[1:]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
batch, model = pack(EXAMPLES), prepared(family)
if kind.endswith("padded"):
    attention.disable(model)
if kind.endswith("LoRA"):
    lora = peft.LoraConfig(
        target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(model, lora)
path = path_of(model)
whole = copy.deepcopy(model)
if path == "forest":
    attention.enable(whole)
expected, expected_gradients = results(whole, batch, "naive")
layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
if kind.startswith("FSDP1"):
    policy = ModuleWrapPolicy({type(layers[0])})
    sharded = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )
else:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    options = {"reshard_after_forward": True} if "reshard" in kind else {}
    for layer in layers:
        fully_shard(layer, mesh=mesh, **options)
    if "tail" in kind:  # as accelerate has it
        base = base_of(model)
        tail = [base.model.norm, base.get_output_embeddings()]
        if base.config.tie_word_embeddings:
            tail.insert(1, base.get_input_embeddings())
        else:
            fully_shard(base.get_input_embeddings(), mesh=mesh, **options)
        fully_shard(tail, mesh=mesh, reshard_after_forward=False)
    sharded = fully_shard(model, mesh=mesh, **options)
assert path_of(sharded) == path
assert lm_head.plain_head(sharded) is not None
values, gradients = results(sharded, batch, path)
if kind.startswith("FSDP1"):
    with FullyShardedDataParallel.summon_full_params(sharded, with_grads=True):
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
else:
    gradients = [gradient.full_tensor() for gradient in gradients]
torch.testing.assert_close(values, expected, rtol=0, atol=1e-4)
assert_same_gradients(gradients, expected_gradients)
torch.distributed.destroy_process_group()
os._exit(0)  # threads of the process group were seen to abort a rank at its exit, after its work was done
