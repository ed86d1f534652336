"""What a model's values are, as a hash: the identity under which reference log-probs are stored and runs resume.

Weights are hashed as they lie in memory, whatever file they came from.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import torch
import xxhash
from torch import nn
from transformers import TrainingArguments

from infopo import ranks
from infopo.errors import ModelError
from infopo.models import DROPOUT_NAMES, is_peft_model


@dataclass(frozen=True)
class WeightsHash:
    """Hashes of a model's values: SHA-256 over names, shapes, dtypes and the XXH3 of each weight's bytes.

    Attributes:
        whole: Of all weights.
        base: Of the weights beneath a PEFT adapter, under the names they have without it. It equals `whole` if there
            is none.
        adapter: Of the adapter's weights and settings. It is None if there is no adapter, or if it changes nothing yet
            (LoRA whose B is zero), so that the model is the same function as its base.
    """

    whole: str
    base: str
    adapter: str | None


def hash_weights(model: nn.Module) -> WeightsHash:
    """Hashes every weight once, as it lies in memory: that is what will run, whatever file it came from.

    Raises:
        ModelError: This process does not hold the weights as a whole.
    """
    weights = model.state_dict()
    digests = _tensor_digests(weights)
    whole = _joined(digests)
    if not is_peft_model(model):
        return WeightsHash(whole, whole, None)
    base: nn.Module = model.get_base_model()  # type: ignore[operator]
    root = "base_model.model." if model.base_model is not base else "base_model."
    own, added = dict[str, str](), dict[str, str]()
    marks = (getattr(model.base_model, "prefix", None) or root, "modules_to_save.", "trainable_tokens_")
    for name, digest in digests.items():
        short = name.removeprefix(root)
        if short == name or any(mark in short for mark in marks):
            added[name] = digest
        else:
            own[short.replace(".base_layer", "").replace(".original_module", "")] = digest
    configs: dict[str, Any] = {name: config.to_dict() for name, config in model.peft_config.items()}  # type: ignore[operator, union-attr]
    if _changes_nothing(configs, {name: weights[name] for name in added}):
        return WeightsHash(whole, _joined(own), None)
    settings = {
        name: {k: v for k, v in config.items() if k not in _INERT_IN_ADAPTERS}
        for name, config in configs.items()
    }
    active = model.active_adapter  # of several, one runs
    return WeightsHash(whole, _joined(own), _joined(added | {"settings": _as_json([settings, active])}))


def hash_over_ranks(model: nn.Module, args: TrainingArguments) -> WeightsHash:
    """Returns `hash_weights` of a model that all ranks have loaded, or the first rank alone.

    All ranks must call this, before the model is sharded.

    Args:
        model: The model. Its weights may be on the meta device on other ranks than the first.
        args: Settings, which say how many ranks there are.

    Raises:
        ModelError: Ranks hold different weights, or no rank holds them as a whole.
    """
    is_elsewhere = any(weight.is_meta for weight in model.parameters())
    mine: WeightsHash | ModelError | None = None
    if not is_elsewhere or args.process_index == 0:
        try:
            mine = hash_weights(model)
        except ModelError as error:
            mine = error  # which is raised on all ranks, because the others would wait for this one
    hashes = [found for found in ranks.gathered(mine, args) if found is not None]
    for found in hashes:
        if isinstance(found, ModelError):
            raise found
        if found != hashes[0]:
            raise ModelError(
                f"{type(model).__name__}: ranks hold different weights, expected the same on all. Load the same files "
                "on all ranks, and set the same seed before anything is initialised at random"
            )
    return cast(WeightsHash, hashes[0])


def config_hash(model: nn.Module) -> str:
    """SHA-256 of the configuration's values that decide what the model computes: two models can have the same weights
    and other rotary frequencies, windows or soft caps.
    """
    base = model.get_base_model() if is_peft_model(model) else model  # type: ignore[operator]
    config: Any = getattr(base, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    return hashlib.sha256(_as_json([type(base).__name__, _functional(values)]).encode()).hexdigest()


_INERT = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation", "use_cache",
    "architectures", "pad_token_id", "bos_token_id", "eos_token_id", "id2label", "label2id", "problem_type",
    "output_attentions", "output_hidden_states", "return_dict", "initializer_range",
}  # fmt: skip
"""Configuration values that change no log-prob of a given sequence. What is not listed counts, known or not."""

_INERT_IN_ADAPTERS = {
    "base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping", "peft_version",
    "init_lora_weights", "lora_dropout",
}  # fmt: skip

_HASHED_AT_ONCE = 1 << 26
"""Bytes: pieces of a tensor that are hashed (and fetched from an accelerator) on their own."""


def _functional(values: Any) -> Any:
    """Configuration values without the inert ones and without dropout, which does not act in evaluation."""
    if not isinstance(values, dict):
        return values
    return {
        k: _functional(v)
        for k, v in values.items()
        if k not in _INERT and not any(name in k for name in DROPOUT_NAMES)
    }


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v))


def _changes_nothing(configs: Mapping[str, Any], added: Mapping[str, torch.Tensor]) -> bool:
    """Whether an adapter is LoRA that adds exactly 0: B = 0, and nothing beside A and B."""
    plain = all(
        c["peft_type"] == "LORA" and not c["use_dora"] and c["bias"] == "none" for c in configs.values()
    )
    if not plain or not all(".lora_" in name and "magnitude" not in name for name in added):
        return False
    return not any(
        bool(t.any()) for name, t in added.items() if ".lora_B" in name or ".lora_embedding_B" in name
    )


def _tensor_digests(weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Returns the XXH3 of each tensor's bytes, by several threads. A tensor that is tied to another is read once."""
    done: dict[tuple[Any, ...], list[Future[bytes]]] = {}
    pieces: dict[str, list[Future[bytes]]] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name, tensor in weights.items():
            _refuse_absent(name, tensor)
            place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            if place not in done or not tensor.numel():
                flat = tensor.detach().contiguous().flatten().view(torch.uint8)
                parts = flat.split(_HASHED_AT_ONCE)
                done[place] = [pool.submit(_digest, part) for part in parts]
            pieces[name] = done[place]
        return {
            name: f"{tuple(t.shape)} {t.dtype} {b''.join(part.result() for part in pieces[name]).hex()}"
            for name, t in weights.items()
        }


def refuse_absent(model: nn.Module) -> None:
    """Refuses a model whose weights are not all in this process as a whole.

    Raises:
        ModelError: A weight is on the meta device, or a part of it is elsewhere.
    """
    for name, parameter in model.named_parameters():
        _refuse_absent(name, parameter)


def _refuse_absent(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_meta or hasattr(tensor, "ds_id") or hasattr(tensor, "to_local"):
        raise ModelError(
            f"the weight {name!r} is not in this process as a whole, so it cannot be told apart from another: "
            + _where(tensor)
        )


def _where(tensor: torch.Tensor) -> str:
    """Returns where a weight is that is not in this process, and what to do."""
    if hasattr(tensor, "ds_id"):
        return (
            "DeepSpeed ZeRO-3 has cut it up. Pass the name of the model, or load it before InfoPOConfig(deepspeed=...) "
            "is made, since from_pretrained cuts models up from then on"
        )
    if hasattr(tensor, "to_local"):
        return "it is sharded already. Pass the model as from_pretrained gives it, and set fsdp to shard it"
    return "it is offloaded or was never loaded (device_map, or the meta device). Load the model without device_map"


def _digest(piece: torch.Tensor) -> bytes:
    return xxhash.xxh3_128_digest(piece.cpu().numpy().data)


def _joined(digests: Mapping[str, str]) -> str:
    lines = (f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
