"""A hash of what a function computes: its source without comments, layout and docstrings, and what it uses.

Imports no torch. A checkpoint of a run whose loss comes from outside the package carries this hash, so that a loss that
has changed since is noticed.
"""

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from types import CodeType, FunctionType
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

    It covers the function's source, the numbers and texts that it takes from its module or encloses, and the functions
    of the same module that it calls. What it takes from other modules is not part of it.

    Example:
        >>> def one(x): return x + 1
        >>> digest(one) == digest(one)
        True
    """
    parts = "\n".join(_parts(function, set()))
    return hashlib.sha256(parts.encode("utf-8")).hexdigest()


def _parts(value: Any, seen: set[int]) -> Iterator[str]:
    """Returns the pieces of text that stand for a value: a plain one itself, a function's source and what it uses."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, _PLAIN):
        yield repr(value)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _parts(each, seen)
    elif isinstance(value, dict):
        for key in sorted(value, key=repr):
            yield repr(key)
            yield from _parts(value[key], seen)
    elif isinstance(value, partial):
        yield from _parts((value.func, value.args, value.keywords), seen)
    elif callable(value):
        inner = inspect.unwrap(value)
        yield from _function(getattr(inner, "__func__", inner), seen)


def _function(function: Any, seen: set[int]) -> Iterator[str]:
    yield _source(function)
    if not isinstance(function, FunctionType):
        # An object that can be called: its class above, its values here.
        yield from _parts(dict(getattr(function, "__dict__", {})), seen)
        return
    yield from _parts((function.__defaults__, function.__kwdefaults__), seen)
    for cell in function.__closure__ or ():
        yield from _parts(cell.cell_contents, seen)
    for name in sorted(_names(function.__code__)):
        value = function.__globals__.get(name)
        is_own = getattr(value, "__module__", None) == function.__module__
        if isinstance(value, (*_PLAIN, tuple, list, dict)) and value is not None:
            yield name
            yield from _parts(value, seen)
        elif isinstance(value, FunctionType) and is_own:
            yield from _parts(value, seen)


def _names(code: CodeType) -> set[str]:
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*(_names(each) for each in inner))


def _source(function: Any) -> str:
    """Returns the source as a tree, without docstrings. Without source, as in `python -c`, it is the bytecode."""
    try:
        target = function if isinstance(function, FunctionType) else type(function)
        tree = ast.parse(textwrap.dedent(inspect.getsource(target)))
    except (OSError, TypeError, SyntaxError):
        code = code_of(function)
        return repr((code.co_code, code.co_names, code.co_consts)) if code else repr(type(function))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)
