"""Noise of a model in training: what draws random numbers there, and how it is kept from doing so.

Policy and reference are the same function before the first update only if the policy in training is a function at all.
Dropout has a probability that can be set to 0 (`models.disable_dropout`). Routers of experts are not so simple: what
is called their jitter may act in evaluation too, so that setting it to 0 makes another model. They are run in
evaluation mode instead, module by module.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_DRAWS = {
    "rand", "rand_like", "randn", "randn_like", "randint", "randperm", "multinomial", "bernoulli", "bernoulli_",
    "uniform_", "normal_", "exponential_", "geometric_", "cauchy_", "log_normal_", "random_", "normal", "uniform",
    "gumbel_softmax", "Gumbel", "Normal", "Uniform", "Bernoulli", "RelaxedBernoulli",
}  # fmt: skip
"""Names of functions and methods that draw random numbers."""


def random_modules(model: nn.Module) -> list[nn.Module]:
    """Modules whose code asks whether they are trained and draws random numbers, itself or in a function it calls.

    Left out are dropout layers of torch, which have a probability, and modules that need their training mode because
    they checkpoint activations.
    """
    return [
        module
        for module in model.modules()
        if not hasattr(module, "gradient_checkpointing")
        and not isinstance(module, nn.modules.dropout._DropoutNd)
        and _is_random(type(module))
    ]


def _is_random(kind: type[nn.Module]) -> bool:
    """Whether some method of this class reads `training` and reaches a draw."""
    bases = [base for base in kind.__mro__ if base not in nn.Module.__mro__]
    members = (inspect.unwrap(m) for base in bases for m in vars(base).values() if callable(m))
    methods = [m for m in members if inspect.isfunction(m)]
    return any("training" in names and names & _DRAWS for names in map(_names_in, methods))


def _names_in(method: Any) -> set[str]:
    """Names that a function's code uses, with those of the functions of its own module that it names."""
    code = method.__code__
    names = set(code.co_names)
    for name in code.co_names:
        called = method.__globals__.get(name)
        if inspect.isfunction(called) and called.__module__ == method.__module__:
            names |= set(called.__code__.co_names)
    return names


@contextmanager
def in_training(model: nn.Module, quiet: Sequence[nn.Module]) -> Iterator[None]:
    """Within it, the model is in training mode but for the `quiet` modules; random numbers are drawn aside."""
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    model.train()
    silence(quiet)
    try:
        with torch.random.fork_rng(devices), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # checkpointing warns of inputs without a gradient
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model into evaluation mode within the block, and afterwards each module into the mode that it had.

    `model.train()` would put frozen and quiet modules into training mode too, and the forward pass that activation
    checkpointing repeats during the backward pass would then be of another function.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def silence(modules: Sequence[nn.Module]) -> None:
    """Puts these modules, not what is beneath them, in evaluation mode: `Trainer` sets all to training in each step."""
    for module in modules:
        module.training = False


def first_difference(model: nn.Module, run: Callable[[], Tensor], quiet: Sequence[nn.Module]) -> str:
    """Name of the innermost module whose output in training is not that of evaluation, the first of a pass.

    Args:
        model: In evaluation mode.
        run: A forward pass of it.
        quiet: As in `in_training`.
    """
    expected: list[Tensor | None] = []
    names: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            names.append(f"{name} ({type(module).__name__})")
            expected.append(_tensor_of(output))

        return hook

    def recorded() -> tuple[list[str], list[Tensor | None]]:
        names.clear()
        expected.clear()
        with torch.no_grad():
            run()
        return list(names), list(expected)

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    try:
        _, before = recorded()
        with in_training(model, quiet):
            order, after = recorded()
    finally:
        for handle in handles:
            handle.remove()
    pairs = zip(order, before, after, strict=False)  # a layer that is left out ends the comparison earlier
    for name, a, b in pairs:
        if a is not None and b is not None and (a.shape != b.shape or not torch.equal(a, b)):
            return name
    return "a part that is no module"


def _tensor_of(output: Any) -> Tensor | None:
    values = output if isinstance(output, tuple) else [output]
    return next((v.detach().clone() for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)
