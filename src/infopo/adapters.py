"""Loads adapters on their bases, and models for use: complete ones, and those that an adapter was trained on."""

from typing import Any

import torch
from transformers.utils import find_adapter_config_file

from infopo import merging
from infopo.errors import ModelError
from infopo.models import DTYPES, cannot_load, load_policy, renamed_quietly, resolve_name


def load_for_use(name_or_path: str, dtype: str = "auto", **kwargs: Any) -> Any:
    """Loads a model to ask it things: complete, or an adapter, merged into its base if it can be.

    It is on the accelerator, if there is one, and in evaluation mode.

    Args:
        name_or_path: Local folder or hub name of a model or an adapter, or `lab:policy`.
        dtype: Type of the weights. `auto` is that of the files.
        kwargs: Further arguments of `from_pretrained`.

    Raises:
        ModelError: It cannot be loaded.
    """
    if is_adapter(name_or_path):
        model = load_adapter(name_or_path, dtype, **kwargs)
        if merging.obstacle(model) is None:
            model = merging.merge(model)
    else:
        model = load_policy(name_or_path, dtype=dtype, **kwargs)
    device = torch.accelerator.current_accelerator(check_available=True)
    return model.to(device or "cpu").eval()


def is_adapter(name_or_path: str) -> bool:
    """Returns whether a name is that of an adapter, which needs its base."""
    return find_adapter_config_file(resolve_name(name_or_path)) is not None


def load_adapter(name_or_path: str, dtype: str = "auto", **kwargs: Any) -> Any:
    """Loads an adapter on its base, as a `PeftModel`.

    Args:
        name_or_path: Local folder or hub name of the adapter.
        dtype: Type of the base's weights. `auto` is that of its files.
        kwargs: Further arguments of `from_pretrained`.

    Raises:
        ModelError: peft is missing, or the adapter or its base cannot be loaded.
    """
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ModelError(f"model {name_or_path!r} is an adapter: pip install 'infopo[peft]'") from error
    if dtype not in ("auto", *DTYPES):
        raise ModelError(f"dtype: expected auto, {', '.join(DTYPES)}, got {dtype!r}")
    try:
        config = PeftConfig.from_pretrained(name_or_path)
        base = load_policy(
            config.base_model_name_or_path or "", dtype=dtype, revision=config.revision or "main", **kwargs
        )
        # AutoPeftModel would add random embeddings for tokens of the tokenizer that neither base nor adapter has.
        if (rows := _saved_embeddings(name_or_path, base)) not in (
            None,
            base.get_input_embeddings().weight.shape[0],
        ):
            base.resize_token_embeddings(rows)
        with renamed_quietly():
            return PeftModel.from_pretrained(base, name_or_path, config=config)
    except Exception as error:  # its base may be anything
        raise cannot_load(f"adapter {name_or_path!r} or its base", name_or_path, error) from error


def _saved_embeddings(name_or_path: str, base: Any) -> int | None:
    """Returns the number of tokens of the embedding or head that an adapter was saved with, or None if it has none."""
    from peft import load_peft_weights

    tables = [
        each for each in (base.get_input_embeddings(), base.get_output_embeddings()) if each is not None
    ]
    names = [name for name, module in base.named_modules() if any(module is each for each in tables)]
    ends = tuple(f"{name}.{middle}weight" for name in names for middle in ("", "base_layer."))
    saved = load_peft_weights(name_or_path, device="cpu").items()
    return next((int(weight.shape[0]) for name, weight in saved if name.endswith(ends)), None)
