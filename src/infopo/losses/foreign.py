"""Losses from outside the package: callables, functions of a user's module, names that other packages register.

Imports no torch itself. A loss is found under the name that a recipe gives it: `my_module:my_loss`, or a name in the
entry-point group `infopo.objectives`. A callable that a script passes is registered under such a name.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from itertools import chain, count
from pathlib import Path
from typing import Any

from infopo.catalog import suggestion
from infopo.errors import ConfigError
from infopo.losses.declaration import Declaration, Objective, declared, signature_of, with_place
from infopo.losses.fingerprint import digest

GROUP = "infopo.objectives"
"""Entry-point group in which other packages register losses."""


@dataclass(frozen=True)
class Foreign:
    """A loss from outside: what it declares, and its function."""

    row: Objective
    function: Callable[..., Any]


_found: dict[str, Foreign] = {}
_folders: list[Path] = []
_loaded_here: set[str] = set()


def look_in(folder: str | Path) -> None:
    """Adds a folder, as that of a recipe, in which modules of losses are looked for before the current one.

    A name that was found in another folder, and leads to a file of this one now, is looked up again.
    """
    folder = Path(folder).resolve()
    if folder in _folders:
        _folders.remove(folder)
    _folders.insert(0, folder)
    for name in [name for name in _found if ":" in name and _leads_elsewhere(_top(name))]:
        del _found[name]


def installed() -> dict[str, EntryPoint]:
    """Returns the losses that installed packages register, by name. It imports none."""
    return {point.name: point for point in entry_points(group=GROUP)}


def is_foreign(name: str) -> bool:
    """Whether a name is that of a loss from outside: a registered one, or `module:function`."""
    return name in _found or ":" in name or name in installed()


def find(name: str) -> Foreign:
    """Returns the loss of this name, which is imported when it is first asked for.

    Raises:
        ConfigError: It cannot be found or imported, or is no function.
    """
    if name not in _found:
        points = {} if ":" in name else installed()
        if name not in points and ":" not in name:
            raise ConfigError(f"no objective {name!r}; expected a name, or MODULE:FUNCTION")
        target = points[name].value if name in points else name
        _found[name] = _described(_imported(target), name)
    return _found[name]


def register(function: Callable[..., Any]) -> str:
    """Returns the name under which a callable is from now on known, `module:function`.

    Two callables of one name, such as two closures, differ in what follows `#`. They do so even if their hashes are
    equal, because a hash does not cover all that a closure may hold.

    Raises:
        ConfigError: The declaration of the callable does not fit it.
    """
    inner = function.func if isinstance(function, partial) else function
    module = getattr(inner, "__module__", None) or type(inner).__module__
    qualified = getattr(inner, "__qualname__", None) or type(inner).__qualname__
    if module.startswith("infopo.losses.") and declared(function):
        return qualified
    name = f"{module}:{qualified}"
    found = _described(function, name)
    marked = f"{name}#{found.row.digest[:8]}"
    names = chain([name, marked], (f"{marked}-{number}" for number in count(2)))
    name = next(each for each in names if each not in _found or _is_same(_found[each].function, function))
    _found[name] = found
    return name


def _is_same(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Returns whether two callables are one. A method is another object each time it is named."""
    return one is other or (inspect.ismethod(one) and one == other)


def is_undeclared(name: str) -> bool:
    """Whether a loss comes from outside and declares nothing."""
    return name in _found and declared(_found[name].function) is None


def compares_pairs(name: str) -> Objective:
    """Notes that a loss which declares nothing was seen to compare pairs, and returns its row."""
    _found[name] = replace(_found[name], row=replace(_found[name].row, pairs=True))
    return _found[name].row


def plain_name(name: str) -> str:
    """Returns a name without what tells apart two callables of one name.

    Example:
        >>> plain_name("my_module:my_loss#0123abcd"), plain_name("dpo")
        ('my_module:my_loss', 'dpo')
    """
    return name.partition("#")[0]


def sources(mixture: Sequence[tuple[str, Mapping[str, Any], float]]) -> dict[str, str]:
    """Returns the hash of the source of each loss that comes from outside, by name. Empty if there is none.

    Several callables of one name, such as closures, have their hashes one after the other.
    """
    by_name: dict[str, list[str]] = {}
    for name, _, _ in mixture:
        if name in _found:
            by_name.setdefault(plain_name(name), []).append(_found[name].row.digest)
    return {name: " + ".join(each if len(set(each)) > 1 else each[:1]) for name, each in by_name.items()}


def records(mixture: Sequence[tuple[str, Mapping[str, Any], float]]) -> list[dict[str, str]]:
    """Returns name, file and SHA-256 of the source of each loss that comes from outside."""
    rows = {name: _found[name].row for name, _, _ in mixture if name in _found}
    return [
        {"name": plain_name(name), "file": row.location, "sha256": row.digest} for name, row in rows.items()
    ]


def _described(function: Callable[..., Any], name: str) -> Foreign:
    row = declared(function)
    if row is None:
        title = name.rpartition(":")[2].rpartition(".")[2]
        words = (inspect.getdoc(function) or "not described").strip().splitlines()
        try:
            row = Declaration(title=title, formula=words[0]).row(title, signature_of(function))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{name}: its parameters cannot be read: {error}") from error
    try:
        place = inspect.getsourcefile(inspect.unwrap(function)) or ""
    except TypeError:
        place = inspect.getsourcefile(type(function)) or "" if not isinstance(function, partial) else ""
    return Foreign(with_place(row, place, digest(function)), function)


def _imported(target: str) -> Callable[..., Any]:
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute or "/" in module_name or module_name.endswith(".py"):
        stem = Path(module_name).stem or "my_module"
        raise ConfigError(
            f"{target!r}: expected MODULE:FUNCTION, with the module's name as Python imports it, e.g. "
            f"{stem}:{attribute or 'my_loss'}"
        )
    value: Any = load_module(module_name, target)
    for part in attribute.split("."):
        known = [key for key, each in vars(value).items() if callable(each) and not key.startswith("_")]
        if not hasattr(value, part):
            where = getattr(value, "__file__", module_name)
            raise ConfigError(f"{target!r}: {where} has no {part!r}{suggestion(part, known)}")
        value = getattr(value, part)
    if not callable(value) or inspect.isclass(value):
        raise ConfigError(f"{target!r}: expected a function of ResponseLogps, got {type(value).__name__}")
    return value


def load_module(name: str, target: str) -> Any:
    """Imports a module of the user, from the folders that are searched or from where Python looks.

    Args:
        name: Name of the module.
        target: What the user wrote, for errors.

    Raises:
        ConfigError: There is no such module, or it cannot be imported.
    """
    folders, top = _searched_folders(), _top(name)
    if _leads_elsewhere(top):
        for key in [key for key in sys.modules if _top(key) == top]:
            del sys.modules[key]
    try:
        with _searched(folders):
            importlib.invalidate_caches()
            is_new = top not in sys.modules
            module = importlib.import_module(name)
            if is_new:
                _loaded_here.add(top)
            return module
    except Exception as error:
        missing = getattr(error, "name", None)
        if isinstance(error, ModuleNotFoundError) and missing and f"{name}.".startswith(f"{missing}."):
            places = ", ".join(dict.fromkeys(str(folder) for folder in folders))
            raise ConfigError(
                f"{target!r}: there is no module {missing!r}; looked in {places} and where Python looks"
            ) from error
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ConfigError(
            f"{target!r}: the module cannot be imported: {type(error).__name__}: {error}{line}"
        ) from error


def _searched_folders() -> list[Path]:
    return [*_folders, Path.cwd()]


def _top(name: str) -> str:
    """Returns the package or module at the top of `package.module:function`."""
    return name.partition(":")[0].partition(".")[0]


def _leads_elsewhere(top: str) -> bool:
    """Returns whether a module was loaded for a loss from another folder, and one of the same name is now nearer."""
    names = (f"{top}.py", f"{top}/__init__.py")
    here = [path for folder in _searched_folders() for name in names if (path := folder / name).is_file()]
    loaded = getattr(sys.modules.get(top), "__file__", None)
    return bool(top in _loaded_here and here and loaded and Path(loaded).resolve() != here[0].resolve())


@contextmanager
def _searched(folders: list[Path]) -> Iterator[None]:
    """Searches the folders first, as Python does that of a script. Afterwards they come last, for late imports."""
    before = list(sys.path)
    sys.path[:0] = [str(folder) for folder in folders]
    try:
        yield
    finally:
        sys.path[:] = [*before, *(str(folder) for folder in folders if str(folder) not in before)]
