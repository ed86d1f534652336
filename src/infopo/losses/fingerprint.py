"""A hash of what a function computes: its source without comments, layout and docstrings, and what it uses.

Imports no torch. A checkpoint of a run whose loss comes from outside the package carries this hash, so that a loss that
has changed since is noticed.
"""

import ast
import contextlib
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import partial
from types import CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def code_of(function: Callable[..., Any]) -> CodeType | None:
    """Returns the code of a function, of what a `partial` wraps, or of an object that can be called."""
    if isinstance(function, partial):
        return code_of(function.func)
    inner = inspect.unwrap(function)
    inner = getattr(inner, "__func__", inner)
    return (
        inner.__code__ if isinstance(inner, FunctionType) else getattr(type(inner).__call__, "__code__", None)
    )


def digest(function: Callable[..., Any]) -> str:
    """Returns a SHA-256 in hexadecimal of what a function computes.

    It covers the function's source, the numbers, texts, tensors and dataclasses that it takes from its module or
    encloses, and the functions and classes of the same module that it uses. What it takes from other modules is not
    part of it.

    Example:
        >>> def one(x): return x + 1
        >>> digest(one) == digest(one)
        True
    """
    parts = "\n".join(_parts(function, {}))
    return hashlib.sha256(parts.encode("utf-8")).hexdigest()


def _parts(value: Any, seen: dict[int, Any]) -> Iterator[str]:
    """Returns the pieces of text that stand for a value: a plain one itself, a function's source and what it uses.

    Args:
        value: Any value.
        seen: The values that have been described, by `id`. They are kept, because another value may have the `id` of
            one that is gone.
    """
    if isinstance(value, _PLAIN):
        # This comes before the test below: equal numbers may be one object, and each of them counts.
        yield repr(value)
        return
    if id(value) in seen:
        yield "seen"
        return
    seen[id(value)] = value
    try:
        inside = list(_inside(value, seen))
    except Exception:
        # Of an object that fails when it is looked at, there is the type. No run is stopped for its hash.
        inside = []
    yield from (f"{type(value).__qualname__}(", *inside, ")")


def _inside(value: Any, seen: dict[int, Any]) -> Iterator[str]:
    """Returns the pieces of text for what a value consists of."""
    if isinstance(value, tuple | list):
        for each in value:
            yield from _parts(each, seen)
    elif isinstance(value, set | frozenset):
        yield from sorted("\n".join(_parts(each, {})) for each in value)
    elif isinstance(value, dict):
        texts = {"\n".join(_parts(key, {})): each for key, each in value.items()}
        for key in sorted(texts):
            yield key
            yield from _parts(texts[key], seen)
    elif isinstance(value, partial):
        yield from _parts((value.func, value.args, value.keywords), seen)
    elif isinstance(value, type):
        yield value.__module__
    elif _is_array(value):
        yield from _array(value, seen)
    elif callable(value):
        yield from _function(inspect.unwrap(value), seen)
    elif is_dataclass(value):
        yield from _parts({each.name: getattr(value, each.name) for each in fields(value)}, seen)
    elif isinstance(value, SimpleNamespace):
        yield from _parts(vars(value), seen)
    elif not hasattr(value, "__dict__") and " at 0x" not in (text := repr(value)):
        # Such as a path or a `torch.dtype`. Other objects, such as a logger, have a state that is no part of a loss.
        yield text


def _is_array(value: Any) -> bool:
    has_values = hasattr(value, "detach") or hasattr(value, "tobytes")
    return has_values and hasattr(value, "dtype") and hasattr(value, "shape")


def _array(value: Any, seen: dict[int, Any]) -> Iterator[str]:
    """Returns shape, type and a hash of the values of a tensor or an array. A tensor on `meta` has no values."""
    said = f"{tuple(value.shape)} {value.dtype}"
    yield said
    if str(value.dtype) == "object":
        yield from _parts(value.tolist(), seen)
        return
    with contextlib.suppress(TypeError, RuntimeError):
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            # NumPy has no bfloat16, and float32 has all its values.
            value = (value.float() if "bfloat16" in said else value).numpy()
        yield hashlib.sha256(value.tobytes()).hexdigest()


def _function(function: Any, seen: dict[int, Any]) -> Iterator[str]:
    if (owner := getattr(function, "__self__", None)) is not None and hasattr(function, "__func__"):
        yield from _parts(getattr(owner, "__dict__", {}), seen)
        function = function.__func__
    yield _source(function)
    if not isinstance(function, FunctionType):
        # An object that can be called: its class above, its values here.
        yield from _parts(getattr(function, "__dict__", {}), seen)
        return
    yield from _parts((function.__defaults__, function.__kwdefaults__), seen)
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # the cell of a name that has no value yet is empty
            yield from _parts(cell.cell_contents, seen)
    for name in sorted(_names(function.__code__) & function.__globals__.keys()):
        value = function.__globals__[name]
        if isinstance(value, ModuleType) or (callable(value) and not _is_of(value, function.__module__)):
            continue
        yield name
        yield from [_source(value)] if isinstance(value, type) else _parts(value, seen)


def _is_of(value: Any, module: str) -> bool:
    """Returns whether a module defines a value or its class. An object may fail when it is asked."""
    try:
        return module in (getattr(value, "__module__", None), type(value).__module__)
    except Exception:
        return type(value).__module__ == module


def _names(code: CodeType) -> set[str]:
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*(_names(each) for each in inner))


def _source(function: Any) -> str:
    """Returns the source as a tree, without docstrings. Without source, as in `python -c`, it is the bytecode."""
    try:
        target = function if isinstance(function, FunctionType | type) else type(function)
        tree = ast.parse(textwrap.dedent(inspect.getsource(target)))
    except (OSError, TypeError, SyntaxError):
        code = code_of(function)
        return _bytecode(code) if code else repr(type(function))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)


def _bytecode(code: CodeType) -> str:
    """Returns what code does, without the addresses that the `repr` of inner functions has."""
    consts = [
        _bytecode(const) if isinstance(const, CodeType) else "\n".join(_parts(const, {}))
        for const in code.co_consts
    ]
    return repr((code.co_code, code.co_names, consts))
