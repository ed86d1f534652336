"""Loads models and tokenizers, and adds adapters. Only this module calls their `from_pretrained`.

A name is a local folder, a hub name, or `lab:policy`, the small model that ships with this package.
"""

import contextlib
import copy
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import deepspeed

from infopo.durable import with_home
from infopo.errors import ModelError
from infopo.output import get_logger
from infopo.runs import runs_named

logger = get_logger(__name__)

LAB_POLICY = "lab:policy"
LAB_POLICY_FOLDER = Path(__file__).parent / "lab" / "policy"

DROPOUT_NAMES = ("drop",)
"""Parts of names of dropout settings: dropout, pdrop, layerdrop, drop_path_rate, ..."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


_LOADING_ERRORS = (
    OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, AttributeError, SafetensorError,
)  # fmt: skip
"""Errors that transformers raises for a folder or a name without a model. They have no common class."""


def resolve_name(name_or_path: str) -> str:
    """Returns the folder of `lab:policy`, that of a name with `~`, and any other name unchanged.

    Raises:
        ModelError: A name that can only be a folder's is none, or the lab has no such model.

    Example:
        >>> resolve_name("meta-llama/Llama-3.2-1B")
        'meta-llama/Llama-3.2-1B'
    """
    if name_or_path == LAB_POLICY:
        return str(LAB_POLICY_FOLDER)
    if name_or_path.startswith("lab:"):
        raise ModelError(f"model {name_or_path!r}: the lab has only {LAB_POLICY!r}")
    name = with_home(name_or_path)
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise ModelError(f"model {name_or_path!r}: there is no such folder")
    if "/" in name and not Path(name).is_dir():
        _warn_beside_runs(name)
    return name


@functools.cache
def _warn_beside_runs(name: str) -> None:
    """Warns, once for a name, if it may be a mistyped run, since it takes minutes until a hub is known to be away."""
    if runs := runs_named(Path(name).parent):
        logger.warning("there is no folder %s here, only %s; the hub is asked for the model", name, runs)


def frozen_copy(model: nn.Module) -> nn.Module:
    """Returns a copy of a model, which may keep results of its last pass (recurrent states) with their graph.

    Raises:
        ModelError: It cannot be copied.
    """
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                setattr(module, name, value.detach())
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever a model of any class may hold
        raise ModelError(
            f"reference='live': {type(model).__name__} cannot be copied: {type(error).__name__}: "
            f"{first_lines(error)[:200]}. Pass a ref_model, or use reference='precompute'"
        ) from error


def let_gradients_reach_adapters(model: nn.Module) -> None:
    """Lets gradients reach adapters under activation checkpointing.

    With a frozen embedding, recomputed segments would have no input that requires a gradient.
    """
    model.enable_input_require_grads()  # type: ignore[operator]


def load_policy(name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """Loads a causal language model by `from_pretrained`, from safetensors, with errors in plain words.

    Args:
        name_or_path: Local folder, hub name or `lab:policy`.
        kwargs: Arguments of `from_pretrained`: `dtype`, `attn_implementation`, `revision`, `quantization_config`, ...

    Raises:
        ModelError: The model cannot be found, or its weights do not fit its architecture.
    """
    kwargs.setdefault("use_safetensors", True)
    if isinstance(dtype := kwargs.get("dtype"), str) and dtype != "auto":
        if dtype not in DTYPES:
            raise ModelError(f"dtype: expected auto, {', '.join(DTYPES)} or a torch.dtype, got {dtype!r}")
        kwargs["dtype"] = DTYPES[dtype]
    folder = resolve_name(name_or_path)
    # Before it is built, since building a thousand million layers would not end.
    if (other := _other_class(folder, kwargs)) is not None:
        raise ModelError(f"model {name_or_path!r} {other}")
    try:
        with _loaded_whole():
            model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **kwargs)
    except Exception as error:  # impossible configurations raise whatever their arithmetic does
        raise cannot_load(f"model {name_or_path!r}", name_or_path, error) from error
    if getattr(model, "_hf_peft_config_loaded", False):
        # Loaded this way the adapter is frozen, and a second one would nest on it.
        raise ModelError(
            f"model {name_or_path!r} is an adapter, not a complete model. Merge it into its base (infopo export), "
            "or in Python pass AutoPeftModelForCausalLM.from_pretrained(..., is_trainable=True) to go on training it"
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"model {name_or_path!r}: {len(missing)} weights are not in its files and would be random, "
            f"e.g. {missing[0]!r}; expected a complete causal language model"
        )
    return model


@contextlib.contextmanager
def _loaded_whole() -> Iterator[None]:
    """Within it, a model is loaded as a whole though DeepSpeed's ZeRO-3 is to train it.

    Checks and the reference come before training, when DeepSpeed cuts up whatever it is given.
    """
    config, deepspeed._hf_deepspeed_config_weak_ref = deepspeed._hf_deepspeed_config_weak_ref, None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


def load_reward(name_or_path: str) -> PreTrainedModel:
    """Loads a sequence-classification model with one output, a reward, for use.

    Raises:
        ModelError: It cannot be loaded, lacks weights, or has more outputs than one.
    """
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            resolve_name(name_or_path),
            dtype="auto",
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise cannot_load(f"reward model {name_or_path!r}", name_or_path, error) from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"reward model {name_or_path!r}: {len(missing)} weights are not in its files and would be random, e.g. "
            f"{missing[0]!r}; expected a sequence-classification model"
        )
    if model.config.num_labels != 1:
        raise ModelError(f"reward model {name_or_path!r}: expected one output, got {model.config.num_labels}")
    device = torch.accelerator.current_accelerator(check_available=True)
    return model.to(device or "cpu").eval()


_EXPECTED = "expected a causal language model (one that AutoModelForCausalLM loads)"

_MOST_LAYERS = 10_000

_OTHER_HEADS = (
    "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM", "ForMultipleChoice",
    "ForImageClassification", "ForNextSentencePrediction", "ForPreTraining", "ForRewardModel",
)  # fmt: skip


def _other_class(folder: str, kwargs: dict[str, Any]) -> str | None:
    """Returns what a model of another class is, in a sentence, or None if it is a causal language model."""
    wanted = ("revision", "trust_remote_code", "cache_dir", "token")
    try:
        config = AutoConfig.from_pretrained(folder, **{k: kwargs[k] for k in wanted if k in kwargs})
    except Exception:  # the error of loading says more
        return None
    return _no_language_model(config)


def _no_language_model(config: Any) -> str | None:
    names = list(getattr(config, "architectures", None) or [])
    what = names[0] if names else type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        return f"is {what}, an encoder with a decoder; {_EXPECTED}"
    if names and all(name.endswith(_OTHER_HEADS) for name in names):
        return f"is {what}, whose head gives no next tokens; {_EXPECTED}"
    known = type(config) in AutoModelForCausalLM._model_mapping
    if not known and not getattr(config, "auto_map", None):
        return f"is {what}, which has no such head; {_EXPECTED}"
    return _impossible_layers(config)


def _impossible_layers(config: Any) -> str | None:
    """Returns that a model has no layers, or more than any model, or None.

    transformers builds a model without layers, as embeddings and a head.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = getattr(text, "num_hidden_layers", 1)
    if isinstance(layers, int) and not 1 <= layers <= _MOST_LAYERS:
        return f"has num_hidden_layers={layers} in its configuration; expected 1 to {_MOST_LAYERS}"
    return None


def refuse_other_classes(model: nn.Module) -> None:
    """Refuses a model object that is not a causal language model, and one that has been wrapped or has no weights.

    Raises:
        ModelError: It is no model of transformers or PEFT, is an encoder with a decoder, reads no tokens, or has
            another head.
    """
    base: Any = model.get_base_model() if is_peft_model(model) else model  # type: ignore[operator]
    if not isinstance(base, PreTrainedModel):
        raise ModelError(
            f"model: expected a PreTrainedModel or PeftModel, got {type(model).__name__}{_wrapped(model)}"
        )
    name, what = type(base).__name__, None
    if (problem := _impossible_layers(base.config)) is not None:
        raise ModelError(f"{name} {problem}")
    if getattr(base.config, "is_encoder_decoder", False):
        what = "an encoder with a decoder"
    elif getattr(base, "main_input_name", "input_ids") != "input_ids":
        what = f"which reads {base.main_input_name}, not tokens"
    elif name.endswith(_OTHER_HEADS) or ("LM" not in name and base.get_output_embeddings() is None):
        what = "whose head gives no next tokens"
    if what is not None:
        raise ModelError(f"model: {name} is a model of another class, {what}; {_EXPECTED}")


def _wrapped(model: nn.Module) -> str:
    """Returns what to do with a model inside a wrapper of torch, in a clause, or nothing."""
    wrappers = {
        "_orig_mod": "set torch_compile=True",
        "module": "start with torchrun or accelerate launch, which distribute it",
    }
    for name, instead in wrappers.items():
        if isinstance(getattr(model, name, None), PreTrainedModel):
            return f": pass the model inside (.{name}) as it was, and {instead}"
    return ""


def load_tokenizer(name_or_path: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Loads a tokenizer by `AutoTokenizer.from_pretrained`, with errors in plain words.

    Raises:
        ModelError: The tokenizer cannot be found or read.
    """
    try:
        return AutoTokenizer.from_pretrained(resolve_name(name_or_path), **kwargs)
    except Exception as error:  # it reads the model's configuration
        raise cannot_load(f"tokenizer of {name_or_path!r}", name_or_path, error) from error


def is_peft_model(model: nn.Module) -> bool:
    """Returns whether the model has PEFT adapters. Without peft, no model has any."""
    try:
        from peft import PeftModel
    except ImportError:
        return False
    return isinstance(model, PeftModel)


@contextlib.contextmanager
def renamed_quietly() -> Iterator[None]:
    """Within it, transformers does not warn that peft asks for something by its former name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        yield


def add_adapter(model: nn.Module, peft_config: Any) -> nn.Module:
    """Returns the model with a new adapter, which alone is trained.

    Raises:
        ModelError: peft is missing, the model has an adapter already, or the adapter fits no module of it.
    """
    try:
        from peft import PeftConfig, get_peft_model
    except ImportError as error:
        raise ModelError("an adapter needs the peft library: pip install 'infopo[peft]'") from error
    if not isinstance(peft_config, PeftConfig):
        raise ModelError(
            f"peft_config: expected a peft.PeftConfig such as LoraConfig, got {type(peft_config).__name__}"
        )
    if is_peft_model(model):
        raise ModelError(
            "peft_config: the model already carries an adapter. Merge it first (model.merge_and_unload()), "
            "or pass the model without peft_config to go on training the adapter it has."
        )
    try:
        with renamed_quietly():
            adapted = get_peft_model(model, peft_config)
    except (
        _LOADING_ERRORS
    ) as error:  # peft judges some settings by using them: a dict without a key, a missing library
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ModelError(
            f"peft_config does not fit {type(model).__name__}: {kind}{first_lines(error)}"
        ) from error
    for config in adapted.peft_config.values():
        base = config.base_model_name_or_path
        if base and Path(base).is_dir():
            # A relative path would be wrong if the adapter is loaded from another folder than it was made in.
            config.base_model_name_or_path = str(Path(base).resolve())
    return adapted


def lora_config(**settings: Any) -> Any:
    """peft's `LoraConfig` for a causal language model.

    Raises:
        ModelError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ModelError("an adapter needs the peft library: pip install 'infopo[peft]'") from error
    return LoraConfig(task_type="CAUSAL_LM", **settings)


def set_pad_token(tokenizer: PreTrainedTokenizerBase, model: nn.Module, pad_token: str | None) -> None:
    """Generation needs a padding token, and model and tokenizer must agree on it.

    Args:
        tokenizer: Gets `pad_token`; without one and without its own, its end of sequence.
        model: Its configurations name the same token.
        pad_token: The token's text, or None.

    Raises:
        ModelError: The tokenizer has no such token.
    """
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise ModelError(f"pad_token: {pad_token!r} is not in the tokenizer's vocabulary")
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for settings in (getattr(model, "config", None), getattr(model, "generation_config", None)):
        if settings is not None:
            settings.pad_token_id = tokenizer.pad_token_id


ConfigValues = list[tuple[Any, str, float]]
"""(configuration, name, value) of what was changed in a configuration."""


def disable_dropout(model: nn.Module) -> ConfigValues:
    """Sets every dropout probability to 0: policy and reference must be the same function at step 0.

    Returns:
        The former values of the model's configurations, which a saved model should have (`original_config`).
    """
    before: ConfigValues = []
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        # Functional dropout reads a number of the module, or of the module's configuration.
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(vars(holder).items()) if holder is not None else []:
                if isinstance(value, float) and value and any(word in name for word in DROPOUT_NAMES):
                    if holder is not module:
                        before.append((holder, name, value))
                    setattr(holder, name, 0.0)
    return before


@contextlib.contextmanager
def original_config(changed: ConfigValues) -> Iterator[None]:
    """Gives configurations back their values from before `disable_dropout`, within the block."""
    for config, name, value in changed:
        setattr(config, name, value)
    try:
        yield
    finally:
        for config, name, _ in changed:
            setattr(config, name, 0.0)


def check_fit(model: nn.Module, longest_row: int, largest_token_id: int) -> None:
    """Refuses data that the model cannot read, before its first batch fails on it.

    Args:
        model: The policy.
        longest_row: Largest number of tokens of a prompt with one of its responses.
        largest_token_id: Largest token id of the data.

    Raises:
        ModelError: A row is longer than the model's context, or a token has no embedding.
    """
    name = type(model).__name__
    embeddings = _num_embeddings(model)
    if embeddings is not None and largest_token_id >= embeddings:
        raise ModelError(
            f"{name} has {embeddings} token embeddings, but the data hold token {largest_token_id}: "
            "the tokenizer does not belong to this model"
        )
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    context = getattr(text, "max_position_embeddings", None)
    if context is not None and 0 <= context < longest_row:  # XLNet's -1 says that there is no limit
        raise ModelError(
            f"{name} reads at most {context} tokens, but a prompt with its response has {longest_row}: "
            f"set max_length to {context} or less"
        )


def _num_embeddings(model: nn.Module) -> int | None:
    """Returns the number of rows of the input embedding, with or without adapter, or None if it is not torch's."""
    layer = model.get_input_embeddings()  # type: ignore[operator]
    tables = (module for module in layer.modules() if isinstance(module, nn.Embedding))
    table = next(tables, layer)
    return getattr(table, "num_embeddings", None)


def cannot_load(what: str, name_or_path: str, error: Exception) -> ModelError:
    """Returns the error for a name that cannot be loaded. For a name that is no folder, it has the hub's answer."""
    if isinstance(error, ModelError):
        return error
    reason = first_lines(error)
    if "ignore_mismatched_sizes" in reason:
        reason = (
            "weights in its files have other shapes than its configuration gives; the report above names them"
        )
    if isinstance(error, KeyError):
        reason = f"it needs {reason}, which is not known, or not there"
    if not isinstance(error, _LOADING_ERRORS):
        reason = f"its configuration describes no model that can be built ({type(error).__name__}: {reason})"
    is_missing = isinstance(error, OSError) and name_or_path != LAB_POLICY and not Path(name_or_path).is_dir()
    reason = shorten(reason, 200 if is_missing else 300, placeholder=" ...")
    if is_missing:
        reason = f"there is no folder {name_or_path} here, and the hub has no answer ({reason})"
    return ModelError(f"{what} cannot be loaded: {reason}")


def first_lines(error: Exception, count: int = 2) -> str:
    """Returns the beginning of an error's message, in one line.

    Example:
        >>> first_lines(ValueError("first" + chr(10) + "second"))
        'first second'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:count]) or type(error).__name__
