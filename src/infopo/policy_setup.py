"""Loads a policy by name, prepares it for training, and refuses one that a run could not change or save."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from infopo import hashing, late_failures, learning, models, noise, sharding, startup
from infopo.arguments import InfoPOConfig, init_kwargs
from infopo.errors import ConfigError, ModelError
from infopo.logps import router


@dataclass(frozen=True)
class PolicySetup:
    """A policy that is ready to be trained.

    Attributes:
        model: The policy, with its adapter.
        tokenizer: The tokenizer, which has a token for padding.
        path: How log-probs are computed, in words.
        changed_config: Settings of the model that were changed for the run. What is saved has them as they were.
        quiet: Modules that draw random numbers in training, and stay in evaluation mode.
        router_coef: Factor of the load-balancing loss of experts, or 0.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    path: str
    changed_config: models.ConfigValues
    quiet: list[nn.Module]
    router_coef: float


def name_of(model: str | nn.Module) -> str | None:
    """Returns the name or folder that a model was loaded from, or None if it has none."""
    if isinstance(model, str):
        return model
    return getattr(getattr(model, "config", None), "_name_or_path", "") or None


def short_name(name: str | None) -> str:
    """Returns the last part of a model's name or folder.

    Example:
        >>> short_name("org/sft/"), short_name(None)
        ('sft', 'model')
    """
    return (name or "model").rstrip("/").split("/")[-1]


def set_up_policy(
    model: str | nn.Module,
    ref_model: nn.Module | None,
    args: InfoPOConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    optimizer: Any,
    quantization_config: Any,
    peft_config: Any,
) -> PolicySetup:
    """Returns the policy of a run. A reference that is given is prepared with it.

    Args:
        model: The policy, or its name or folder.
        ref_model: The reference, or None.
        args: Settings.
        tokenizer: The tokenizer, or None for the one that belongs to the model.
        optimizer: The optimizer if it is given, else None.
        quantization_config: Argument of `from_pretrained`, if `model` is a name.
        peft_config: Adapter that is added to the model, or None.

    Raises:
        ModelError: Model, tokenizer or adapter cannot be used.
        ConfigError: Nothing would be trained, or the result could not be saved.
    """
    if isinstance(model, str):
        policy: nn.Module = models.load_policy(model, **init_kwargs(args, quantization_config))
    else:
        policy = model
    for each in (policy, ref_model):
        if each is not None:
            models.refuse_other_classes(each)
            if not sharding.loads_on_first():
                hashing.refuse_absent(each)
    if tokenizer is None:
        if (name := name_of(model)) is None:
            raise ModelError(
                "processing_class: the model was not loaded by a name, under which a tokenizer could be found; pass one"
            )
        tokenizer = models.load_tokenizer(name, trust_remote_code=args.trust_remote_code)
    models.set_pad_token(tokenizer, policy, args.pad_token)
    # This comes before an adapter is added, whose dropout was asked for, and has no effect while it adds 0.
    changed = models.disable_dropout(policy) if args.disable_dropout else []
    if peft_config is not None:
        policy = models.add_adapter(policy, peft_config)
    late_failures.make_savable(policy, tokenizer)
    late_failures.check_saving(policy, tokenizer, args)
    learning.refuse_frozen(policy, optimizer, keeps_float32=args.deepspeed_plugin is not None)
    if models.is_peft_model(policy) and args.activation_checkpointing:
        models.let_gradients_reach_adapters(policy)
    if args.disable_dropout and ref_model is not None:
        models.disable_dropout(ref_model)
    quiet = noise.random_modules(policy) if args.disable_dropout else []
    coefficient = router.coefficient(policy, args.router_aux_loss_coef)
    _refuse_reentrant(args, coefficient)
    path = startup.choose_path(policy, ref_model, args)
    return PolicySetup(policy, tokenizer, path, changed, list(quiet), coefficient)


def _refuse_reentrant(args: InfoPOConfig, coefficient: float) -> None:
    """Refuses checkpointing that leaves the routers' loss without a gradient: their logits are recorded without one.

    Raises:
        ConfigError: Layers are recomputed by PyTorch's reentrant variant, and the experts are to be balanced.
    """
    settings = (args.activation_checkpointing_kwargs or {}) | (args.gradient_checkpointing_kwargs or {})
    if args.activation_checkpointing and coefficient and settings.get("use_reentrant"):
        raise ConfigError(
            "gradient_checkpointing_kwargs: use_reentrant=True leaves the load-balancing loss of experts without a "
            "gradient; leave it out, or set router_aux_loss_coef=0"
        )
