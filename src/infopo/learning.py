"""Judges whether a run can change its policy, before anything is computed for it.

A run that cannot learn logs losses for hours and saves the model that it was given. Settings are judged first. Then
one row goes through the policy in both directions, which shows whatever the reason is.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from infopo import models, sharding
from infopo.arguments import InfoPOConfig
from infopo.data.packing import pack
from infopo.errors import ConfigError, InfoPOError, ModelError
from infopo.logps.forward import response_logps
from infopo.logps.wrappers import base_of
from infopo.noise import in_training
from infopo.output import get_logger
from infopo.records import PackedBatch, PreferenceExample

logger = get_logger(__name__)

Optimizers = tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None]

PROBE_TOKENS = 16
"""Tokens of a prompt, and of each of two responses, that go through the policy in both directions."""


def refuse_frozen(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, *, keeps_float32: bool = False
) -> None:
    """Refuses a policy that no step could change, and one that float16 would spoil.

    Args:
        model: The policy, with its adapter.
        optimizer: The user's own, or None.
        keeps_float32: Whether updates are made on float32 copies (by DeepSpeed), whatever the weights are.

    Raises:
        ModelError: No parameter asks for a gradient, or parameters to train are in float16.
        ConfigError: The optimizer holds none of the parameters to train.
    """
    name = type(model).__name__
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trained:
        loaded = "peft loads adapters frozen: pass is_trainable=True to PeftModel.from_pretrained"
        raise ModelError(
            f"{name}: no parameter asks for a gradient, so there is nothing to train. "
            + (
                loaded
                if models.is_peft_model(model)
                else "Call model.requires_grad_(True), or pass peft_config"
            )
        )
    if optimizer is not None:
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ConfigError(
                f"optimizers: {type(optimizer).__name__} evaluates the loss several times a step, by a closure that "
                "transformers' Trainer does not give it; take an optimizer that needs none"
            )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        left_out = [n for n, p in trained.items() if id(p) not in held]
        if len(left_out) == len(trained):
            raise ConfigError(
                f"optimizers: the optimizer holds none of the {len(trained)} trainable parameters of {name}, e.g. "
                f"{left_out[0]!r}: make it from this model's parameters, after its adapter was added"
            )
        if left_out:
            logger.warning(
                "the optimizer holds %d of %d trainable parameters; the others stay as they are, e.g. %r",
                len(trained) - len(left_out), len(trained), left_out[0],
            )  # fmt: skip
    halves = [n for n, p in trained.items() if p.dtype == torch.float16]
    is_torchs = optimizer is None or type(optimizer).__module__.startswith("torch.optim")
    if halves and is_torchs and not keeps_float32:
        raise ModelError(
            f"{name}: {len(halves)} parameters to train are float16, e.g. {halves[0]!r}. AdamW's epsilon is 0 there, "
            "and squares of small gradients are too, so updates are 0/0 or enormous. Load it in float32 (dtype), "
            "with fp16=True for speed, in bfloat16, or train a float32 adapter on it"
        )


def refuse_schedule(args: InfoPOConfig, optimizers: Optimizers, rows: int | None) -> None:
    """Refuses a run without steps, and one whose learning rate is 0 throughout.

    Args:
        args: The settings.
        optimizers: The user's own optimizer and schedule, or None for each.
        rows: Number of rows of the training data, or None if it is not known.

    Raises:
        ConfigError: There is no step, or the learning rate never rises above 0.
    """
    if args.max_steps == 0 or (args.max_steps < 0 and not args.num_train_epochs > 0):
        raise ConfigError(
            f"max_steps={args.max_steps}, num_train_epochs={args.num_train_epochs:g}: no step would be taken; "
            "expected a positive number of one of them (max_steps=-1 leaves the length to the epochs)"
        )
    optimizer, schedule = optimizers
    if optimizer is None:
        if not 0 < args.learning_rate < math.inf:
            raise ConfigError(
                f"learning_rate: expected a positive number, got {args.learning_rate:g}: no weight would change"
            )
        _warn_of_warmup(args, rows)
        return
    if schedule is not None and not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
        return  # it may set any rate later
    rates = [group["lr"] for group in optimizer.param_groups] if schedule is None else schedule.base_lrs
    if not any(float(rate) for rate in rates):
        raise ConfigError("optimizers: the optimizer's learning rate is 0, and its schedule only scales it")


def _warn_of_warmup(args: InfoPOConfig, rows: int | None) -> None:
    """Says so if the rate is still 0 at the only step there is."""
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps
    if steps < 0:
        steps = math.ceil(args.num_train_epochs * max(1, (rows or per_step) // per_step))
    if steps == 1 and args.get_warmup_steps(steps) > 0 and args.lr_scheduler_type != "reduce_lr_on_plateau":
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=args.learning_rate)
        kwargs = args.lr_scheduler_kwargs if isinstance(args.lr_scheduler_kwargs, dict) else None
        schedule = get_scheduler(
            args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps,
            scheduler_specific_kwargs=kwargs,
        )  # fmt: skip
        if not any(schedule.get_last_lr()):
            logger.warning(
                "the run has one step, and its learning rate is 0 there (warmup): no weight changes"
            )


def check_gradients(
    model: nn.Module,
    example: PreferenceExample,
    args: InfoPOConfig,
    context: Callable[[], AbstractContextManager[object]],
    quiet: Sequence[nn.Module] = (),
    over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """One row in both directions, in the mode of training: some parameter must get a gradient.

    If that fails with activation checkpointing alone, checkpointing is switched off with a warning, unless the user
    asked for it. Weights, modes and random numbers are left as they were.

    Args:
        model: The policy on its device, prepared for its path.
        example: A row of the data.
        args: Its `activation_checkpointing` may be switched off.
        context: Entered around the forward pass (autocast, say).
        quiet: Modules that stay in evaluation mode.
        over_ranks: Adds a tensor up over the ranks that share the model's weights, which then decide alike. None if
            this process holds the whole model.

    Raises:
        ModelError: The model does not run, or no parameter to train gets a gradient that is finite and not 0.
        ConfigError: It trains without activation checkpointing only, which the user asked for.
    """
    batch = pack([_probe(example)]).to(args.device)
    tried = bool(args.activation_checkpointing)

    def problem_with(checkpointing: bool) -> str | None:
        how = " with gradient_checkpointing" if checkpointing else ""
        try:
            with in_training(model, quiet), _checkpointed(model, args, checkpointing):
                problem = _problem(model, batch, context, how, over_ranks)
        except _NoCheckpointing as error:
            problem = str(error).removesuffix(".")
        if over_ranks is None or not int(over_ranks(torch.tensor(int(problem is not None)))):
            return problem
        return problem or f"{type(base_of(model)).__name__}: another rank cannot train it{how}"

    problem = problem_with(tried)
    if problem is None:
        return
    if (plain := problem_with(False) if tried else problem) is not None:
        raise ModelError(plain + (_adapter_remedy(model) if _FAILS in plain else ""))
    if args.asks_for_checkpointing:
        raise ConfigError(f"{problem}. It trains without: set gradient_checkpointing=False")
    logger.warning("gradient_checkpointing is switched off, because %s", problem)
    args.activation_checkpointing = args.gradient_checkpointing = False


def _probe(example: PreferenceExample) -> PreferenceExample:
    """Returns two short responses to a prompt, of which the second repeats it, so that some token is no certainty."""
    prompt = list(example.prompt_ids)[-PROBE_TOKENS:]
    response = list(example.response_ids[0])[:PROBE_TOKENS]
    return PreferenceExample(prompt, [response], [prompt[::-1]], example.row_id)


def _problem(
    model: nn.Module,
    batch: PackedBatch,
    context: Callable[[], AbstractContextManager[object]],
    how: str,
    over_ranks: Callable[[Tensor], Tensor] | None,
) -> str | None:
    """Why no gradient reaches the policy, in a sentence, or None."""
    name = type(base_of(model)).__name__
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    try:
        with context():
            with torch.no_grad():  # as before the first step: aLoRA's hooks do not take it with checkpointing
                response_logps(model, batch)
            total = response_logps(model, batch).sum()
        if not total.isfinite():
            return f"{name}: log-probs are not finite before the first update: {_NAN}"
        if not total.requires_grad:
            return f"{name}: {_UNREACHED}"
        total.backward()
        return _judge(name, {n: p.grad for n, p in trained.items()}, over_ranks)
    except (InfoPOError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a model of any class may raise
        what = models.first_lines(error, 1)[:200].rstrip(".")
        return f"{name}{_FAILS}{len(batch.input_ids)} tokens{how}: {type(error).__name__}: {what}"
    finally:
        for parameter in trained.values():
            parameter.grad = None


_FAILS = " does not run on "


def _adapter_remedy(model: nn.Module) -> str:
    """Returns a sentence for a model with adapters, which may ask for what preference rows do not have."""
    if not models.is_peft_model(model):
        return ""
    kinds = ", ".join(sorted({config.peft_type.value for config in model.peft_config.values()}))  # type: ignore
    return (
        f". It has an adapter ({kinds}). Some adapters need more than tokens with each row (task_ids, say), which "
        "preferences do not have, and some fit certain layers only: leave out target_modules for the default ones, or "
        "use another adapter, such as LoRA"
    )


_UNREACHED = (
    "no gradient reaches a parameter to train. Adapters may be on layers that this model does not use, or trainable "
    "layers stand behind something that passes no gradient on (a frozen part, torch.no_grad, checkpointing)"
)


_NAN = "its weights hold NaN or inf, or its adapter divides by 0 (DoRA on rows of zeros, say)"


def _judge(
    name: str, gradients: dict[str, Tensor | None], over_ranks: Callable[[Tensor], Tensor] | None
) -> str | None:
    """Returns what is wrong with gradients, in a sentence, or None. Ranks that hold parts of them judge the whole."""
    is_reached, is_moved, is_broken = _flags(gradients, over_ranks)
    if not any(is_moved.values()):
        return f"{name}: {_UNREACHED}"
    if all(is_broken[n] for n in gradients if is_moved[n]):
        return f"{name}: gradients are not finite on a row of the data; expected finite ones"
    # Of experts, only some run on a row.
    left_out = [n for n in gradients if not is_reached[n] and "expert" not in n]
    if left_out:
        logger.warning(
            "%d of %d trainable parameters get no gradient and stay as they are, e.g. %r",
            len(left_out), len(gradients), left_out[0],
        )  # fmt: skip
    return None


def _flags(
    gradients: dict[str, Tensor | None], over_ranks: Callable[[Tensor], Tensor] | None
) -> tuple[dict[str, bool], dict[str, bool], dict[str, bool]]:
    """Returns which parameters have a gradient, which have one that is not 0, and which one that is not finite."""
    flags = []
    for gradient in gradients.values():
        part = None if gradient is None else sharding.local_part(gradient)
        found = [] if part is None else [True, bool(part.any()), not bool(part.isfinite().all())]
        flags.append(found or [False] * 3)
    table = torch.tensor(flags, dtype=torch.int64)
    if over_ranks is not None:
        table = over_ranks(table).cpu()
    reached, moved, broken = (dict(zip(gradients, column, strict=True)) for column in (table.T > 0).tolist())
    return reached, moved, broken


class _NoCheckpointing(Exception):  # noqa: N818 - no error of a run, which goes on without
    """The model cannot be checkpointed, in the words of transformers."""


@contextmanager
def _checkpointed(model: nn.Module, args: InfoPOConfig, wanted: bool) -> Iterator[None]:
    """Within it, activations are checkpointed as `Trainer.train` sets it up, if wanted."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    if not wanted or enable is None or getattr(model, "is_activation_checkpointing", False):
        yield
        return
    given = args.activation_checkpointing_kwargs
    settings = dict(given) if isinstance(given, dict) else {}
    layers = {key: settings.pop(key) for key in ("every_n_layers", "offload") if key in settings}
    try:
        enable(activation_checkpointing_kwargs=settings or None, **layers)
    except ValueError as error:
        raise _NoCheckpointing(str(error)) from error
    try:
        yield
    finally:
        model.activation_checkpointing_disable()  # type: ignore[operator]
