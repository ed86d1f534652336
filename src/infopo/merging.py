"""Merges an adapter into the weights of its base, so that transformers alone computes what base and adapter did.

A weight W with a low-rank update becomes W + s B A. The sum is computed in float32 and rounded once to the type of W.
"""

import warnings
from typing import Any

import torch
from torch import nn

from infopo.errors import ModelError

_WIDE = torch.float32


def obstacle(model: Any) -> str | None:
    """Returns why the adapter of a `PeftModel` cannot become part of the weights, or None if it can."""
    for config in model.peft_config.values():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if getattr(config, "is_prompt_learning", False) or getattr(config, "is_adaption_prompt", False):
            return f"{kind} adds vectors to what the model reads, and changes no weight of it"
        if getattr(config, "alora_invocation_tokens", None):
            return f"{kind} with alora_invocation_tokens acts from certain tokens on, and weights act on all"
    if not hasattr(model.base_model, "merge_and_unload"):
        return f"{kind} has no merged form in peft"
    if getattr(model.get_base_model(), "is_quantized", False):
        return "its base is quantised, whose weights cannot take up the update"
    return None


def merge(model: Any) -> Any:
    """Returns the base of a `PeftModel` with the active adapter merged into it. The adapted model is used up.

    Weights that were tied and that the adapter makes different are no longer tied, which the configuration then says.

    Raises:
        ModelError: The adapter cannot be merged.
    """
    if (reason := obstacle(model)) is not None:
        raise ModelError(f"the adapter cannot be merged into its base: {reason}")
    is_tied = bool(getattr(model.get_base_model().config.get_text_config(), "tie_word_embeddings", False))
    if is_tied:
        _part(model)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # That all is merged, and that embeddings are no longer tied, is what is done here.
            warnings.filterwarnings("ignore", module="peft")
            _merge_layers(model)
            merged = model.merge_and_unload()
    except (ValueError, NotImplementedError, AttributeError, RuntimeError, TypeError) as error:
        raise ModelError(
            f"the adapter cannot be merged into its base: {type(error).__name__}: {str(error)[:250]}"
        ) from error
    if is_tied:
        _tie_again(merged)
    return merged


def _part(model: nn.Module) -> None:
    """Gives every module a weight of its own where several share one, as input and output embedding do.

    An update of the one would otherwise be an update of the other, too.
    """
    seen: set[int] = set()
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and id(weight) in seen:
                own = nn.Parameter(weight.detach().clone(), requires_grad=False)
                module._parameters[name] = own
            elif weight is not None:
                seen.add(id(weight))


def _tie_again(merged: Any) -> None:
    """Ties input and output embedding again if they have the same values, else the configuration says so."""
    inner, outer = merged.get_input_embeddings(), merged.get_output_embeddings()
    if inner is None or outer is None:
        return
    same = inner.weight.shape == outer.weight.shape and torch.equal(inner.weight, outer.weight)
    for config in {id(each): each for each in (merged.config, merged.config.get_text_config())}.values():
        config.tie_word_embeddings = same
    if same:
        outer.weight = inner.weight


def _merge_layers(model: nn.Module) -> None:
    """Merges layer by layer in float32, so that only one layer is wide at a time."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    for module in list(model.modules()):
        if isinstance(module, BaseTunerLayer) and not getattr(module, "merged", False):
            before = {name: weight.dtype for name, weight in module.get_base_layer().named_parameters()}
            module.to(_WIDE)
            module.merge(safe_merge=True)
            for name, weight in module.get_base_layer().named_parameters():
                weight.data = weight.data.to(before[name])
        elif isinstance(module, ModulesToSaveWrapper):
            dtype = next((weight.dtype for weight in module.original_module.parameters()), None)
            for copy in module.modules_to_save.values():
                copy.to(dtype)
