"""Checks annotations at every call while tests run: types by beartype, and shapes of arrays by jaxtyping.

jaxtyping's own decorator, which its import hook puts on every function, checks the parameters of a call twice, binds
them to a signature first, and compiles two functions for each `def` that is reached, thus for nested functions at
every call of the outer one. That took two thirds of the CPU time of tests that train. `checked` takes its place. It
checks with one wrapper of beartype's per function, and opens jaxtyping's scope for the names of axes only for functions
that have arrays in their annotations. Nested functions are not checked: only mypy sees their annotations.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, TypeCheckError

# Integers are accepted where a float is, as type checkers do.
_typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeCheckError))

_scope = jaxtyping.jaxtyped("context")
"""Opens a scope for the names of axes. It keeps no state of its own, so that one serves every call."""


def checked(decorated: Any = None, *, typechecker: object = None) -> Any:
    """Takes the place of `jaxtyping.jaxtyped` on functions and dataclasses, in the form that its import hook writes.

    As jaxtyping's, it lets everything pass while `jaxtyping_disable` is set.
    """
    if decorated is None:
        return checked
    if not inspect.isclass(decorated):
        return _function(decorated)
    init = vars(decorated).get("__init__")
    if is_dataclass(decorated) and init is not None and not hasattr(init, "__wrapped__"):
        decorated.__init__ = _function(init)  # type: ignore[misc]
    return decorated


def _function(function: types.FunctionType) -> Callable[..., Any]:
    if "<locals>" in function.__qualname__:
        return function
    annotations = function.__annotations__
    for name, annotation in annotations.items():
        if _quotes(annotation):
            annotations[name] = _meaning(annotation, function.__globals__)
    typed = _typechecked(function)
    if typed is function:
        # It has no annotations.
        return function
    scope = _scope if any(_has_arrays(annotation) for annotation in annotations.values()) else None

    @functools.wraps(function)
    def checking(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        if scope is None:
            return typed(*args, **kwargs)
        with scope:
            return typed(*args, **kwargs)

    return checking


def _quotes(annotation: Any) -> bool:
    return isinstance(annotation, str | typing.ForwardRef) or any(map(_quotes, typing.get_args(annotation)))


def _meaning(annotation: Any, names: dict[str, Any]) -> Any:
    """What an annotation with quotes stands for. Names that only type checkers import stand for anything."""
    try:
        return typing.get_type_hints(types.SimpleNamespace(__annotations__={"it": annotation}), names)["it"]
    except Exception:  # as in jaxtyping
        return Any


def _has_arrays(annotation: Any) -> bool:
    return (inspect.isclass(annotation) and issubclass(annotation, AbstractArray)) or any(
        _has_arrays(part) for part in typing.get_args(annotation)
    )
