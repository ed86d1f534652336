"""Models whose weights are distributed over processes: when FSDP or DeepSpeed cuts them up, and what follows from it.

transformers cuts a model up when training starts. The reference pass and the checks of the start come before that, and
a model that needs FSDP to fit on a device cannot run there as a whole. So the trainer cuts it up in its constructor,
exactly as accelerate would do it later (`shard_policy`), and training takes the model as it is (`taken_as_it_is`).

DeepSpeed's ZeRO-3 can cut up no model without its optimizer. It does so when training starts, and until then each
process holds the model whole, as under ZeRO-1 and 2.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, StateDictType
from transformers import Trainer
from transformers.integrations.fsdp import is_fsdp_enabled, update_fsdp_plugin_peft

from infopo.models import is_peft_model


def is_fsdp(accelerator: Accelerator) -> bool:
    """Returns whether FSDP, of either version, distributes the models of this run."""
    return getattr(accelerator.state, "fsdp_plugin", None) is not None


def is_cut_up(model: nn.Module, accelerator: Accelerator) -> bool:
    """Returns whether a process now holds a part of a model: FSDP's from the start, ZeRO-3's from training on."""
    return is_fsdp(accelerator) or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def take_precision(model: nn.Module, accelerator: Accelerator) -> None:
    """Rounds the weights to the type in which DeepSpeed trains them, before they become the reference.

    DeepSpeed does so itself when training starts. A reference with weights that are not rounded would be another
    function than the policy from the first step on. Buffers, and what a model keeps in float32, stay as they are.

    Args:
        model: The policy.
        accelerator: What distributes it.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or getattr(model, "quantization_method", None) is not None:
        return
    dtype = plugin.hf_ds_config.dtype()
    kept = [name for m in model.modules() for name in getattr(m, "_keep_in_fp32_modules_strict", None) or ()]
    for name, parameter in model.named_parameters() if dtype != torch.float32 else ():
        if parameter.is_floating_point() and not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)


def loads_on_first() -> bool:
    """Returns whether transformers loads weights on the first rank of a machine only.

    `accelerate launch --use_fsdp` asks for it (`fsdp_cpu_ram_efficient_loading`). Weights of the other ranks stay on
    the meta device until the model is sharded, when they get them from the first.
    """
    return bool(is_fsdp_enabled())


def shard_policy(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Returns the policy, distributed over the processes by accelerate as the settings of FSDP say.

    FSDP2 changes the model in place, and FSDP1 wraps it. All ranks must call this.

    Args:
        model: The policy, on any device, with its adapter.
        accelerator: What distributes it.
    """
    if accelerator.is_fsdp2:
        # accelerate takes a model with its optimizer only, whose parameters it would replace. There is none yet.
        unused = torch.optim.SGD(model.parameters(), lr=0.0)
        sharded, prepared = accelerator.prepare(model, unused)
        accelerator._optimizers.remove(prepared)
        return sharded
    if is_peft_model(model):
        update_fsdp_plugin_peft(model, accelerator)
    return accelerator.prepare(model)


def shard_reference(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Returns a frozen model, distributed as the policy is. All ranks must call this.

    Args:
        model: The reference, whose parameters ask for no gradient.
        accelerator: What distributes it.
    """
    models = list(accelerator._models)
    sharded = fsdp2_prepare_model(accelerator, model) if accelerator.is_fsdp2 else accelerator.prepare(model)
    # What accelerate does for each model it knows, such as clipping gradients, is for the policy alone.
    accelerator._models[:] = models
    return sharded.eval()


def reshard(model: nn.Module) -> None:
    """Gives back the weights that FSDP2 has gathered for a forward pass without a backward pass.

    FSDP keeps the last layers whole from the forward pass to the backward pass. Without one, `model.parameters()` has
    the gathered weights in place of the shards, and an optimizer made from them would train copies that nobody reads.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_part(value: Tensor) -> Tensor:
    """Returns what this process holds of a tensor that may be sharded, without its history.

    Example:
        >>> local_part(torch.ones(2))
        tensor([1., 1.])
    """
    if (part := getattr(value, "ds_tensor", None)) is not None:
        # That of the last ranks is filled up with memory as it was found.
        begin = part.numel() * dist.get_rank(value.ds_process_group)  # type: ignore[attr-defined]
        return part.detach()[: max(value.ds_numel - begin, 0)]  # type: ignore[attr-defined]
    value = value.detach()
    return value.to_local() if hasattr(value, "to_local") else value


@contextlib.contextmanager
def taken_as_it_is(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Within it, `accelerator.prepare` leaves this model and its parameters in an optimizer as they are.

    accelerate finds the parameters of an optimizer by the address of their shards. If there are more ranks than rows
    in a weight, as with a small LoRA, some shards are empty and all have the same address.

    Args:
        accelerator: What distributes models.
        model: A model that has been distributed before.
    """
    prepare = accelerator.prepare

    def prepare_one(each: Any, **kwargs: Any) -> Any:
        if each is model:
            return each
        # `prepare` refuses an optimizer without its model under FSDP2.
        is_optimizer = isinstance(each, torch.optim.Optimizer)
        return accelerator.prepare_optimizer(each) if is_optimizer else prepare(each, **kwargs)

    def prepared(*objects: Any, **kwargs: Any) -> Any:
        if not any(each is model for each in accelerator._models):
            accelerator._models.append(model)  # for which gradients are clipped
        result = [prepare_one(each, **kwargs) for each in objects]
        return result[0] if len(result) == 1 else tuple(result)

    accelerator.prepare = prepared
    try:
        yield
    finally:
        del accelerator.prepare


@contextlib.contextmanager
def saved_whole(accelerator: Accelerator) -> Iterator[None]:
    """Within it, transformers saves the weights of a sharded model as a whole, whatever checkpoints are made of."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        yield
        return
    kind, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        plugin.state_dict_type = kind


class ShardedTrainer(Trainer):
    """transformers' `Trainer`, which can distribute its model before training starts."""

    model: Any

    def shard(self) -> None:
        """Distributes the policy over the processes as FSDP's settings say. All ranks must call this."""
        self.model = self.model_wrapped = shard_policy(self.model, self.accelerator)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Overrides `Trainer`'s, which would distribute once more a model that has been distributed before."""
        if not is_fsdp(self.accelerator):
            return super()._prepare_for_training(*args, **kwargs)
        reshard(self.model)
        with taken_as_it_is(self.accelerator, self.model):
            return super()._prepare_for_training(*args, **kwargs)
