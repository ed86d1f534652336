"""Checks annotations at every call while tests run: types by beartype, and shapes of arrays by jaxtyping.

jaxtyping's own decorator, which its import hook puts on every function, checks the parameters of a call twice, binds
them to a signature first, and compiles two functions for each `def` that is reached, thus for nested functions at
every call of the outer one. That took two thirds of the CPU time of tests that train. `checked` takes its place. It
checks the same annotations with one wrapper of beartype's per function, opens jaxtyping's scope for the names of axes
only for functions that have arrays in their annotations, and compiles the wrapper of a nested function once.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable, Hashable
from dataclasses import is_dataclass
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, TypeCheckError

# Integers are accepted where a float is, as type checkers do.
_typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeCheckError))

_scope = jaxtyping.jaxtyped("context")
"""Opens a scope for the names of axes. It keeps no state of its own, so that one serves every call."""

_wrapped = "__beartype_func"
"""Parameter by whose default a wrapper of beartype's knows the function that it calls."""

_templates: dict[Hashable, types.FunctionType | None] = {}
"""Wrappers of nested functions by code and annotations, without a function. None: there is nothing to check."""


def checked(decorated: Any = None, *, typechecker: object = None) -> Any:
    """Takes the place of `jaxtyping.jaxtyped` on functions and dataclasses, in the form that its import hook writes."""
    if decorated is None:
        return checked
    if not inspect.isclass(decorated):
        return _function(decorated)
    init = vars(decorated).get("__init__")
    if is_dataclass(decorated) and init is not None and not hasattr(init, "__wrapped__"):
        decorated.__init__ = _function(init)  # type: ignore[misc]
    return decorated


def _function(function: types.FunctionType) -> Callable[..., Any]:
    annotations = function.__annotations__
    for name, annotation in annotations.items():
        if _quotes(annotation):
            annotations[name] = _meaning(annotation, function.__globals__)
    typed = _nested(function) if "<locals>" in function.__qualname__ else _typechecked(function)
    if not any(_has_arrays(annotation) for annotation in annotations.values()):
        return typed

    @functools.wraps(function)
    def with_scope(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        with _scope:
            return typed(*args, **kwargs)

    return with_scope


def _nested(function: types.FunctionType) -> Callable[..., Any]:
    """The wrapper that beartype made of the same `def` before, around this function."""
    key = (function.__code__, *map(_hashable, function.__annotations__.values()))
    if key not in _templates:
        _templates[key] = _template(function)
    template = _templates[key]
    if template is None:
        return function
    wrapper = types.FunctionType(template.__code__, template.__globals__, template.__name__)
    wrapper.__kwdefaults__ = {**template.__kwdefaults__, _wrapped: function}
    return functools.update_wrapper(wrapper, function)


def _template(function: types.FunctionType) -> types.FunctionType | None:
    # Of a copy that closes over nothing: beartype may keep what it wraps, and models would stay in memory.
    closure = tuple(types.CellType() for _ in function.__code__.co_freevars)
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, closure
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__annotations__ = function.__annotations__
    wrapper = _typechecked(copy)
    return None if wrapper is copy else wrapper


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


def _hashable(annotation: Any) -> Hashable:
    try:
        hash(annotation)
    except TypeError:
        return repr(annotation)
    return annotation
