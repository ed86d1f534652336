"""The runs of `infopo sweep`: one per combination of the values under `sweep`. Imports no torch."""

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infopo.errors import ConfigError
from infopo.validation import Problem
from infopo.yaml_tree import as_override, in_yaml, key_parts

SEEDS = ("train.seed", "train.data_seed")
"""Settings over which a sweep's table takes means."""

_LONGEST_NAME = 120
"""Bytes of a run's name. What is longer is cut, and ends with a hash of the whole."""

_NOT_SWEPT = ("output_dir", "sweep", "rounds", "train.resume_from_checkpoint")


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: Its folder's name, made of the values that differ.
        values: Value by dotted key.
    """

    name: str
    values: Mapping[str, Any]

    @property
    def overrides(self) -> list[str]:
        """The values as `key=value`. A section comes before what stands in it, which it would replace."""
        outer_first = sorted(self.values, key=lambda key: len(key_parts(key)))
        return [f"{key}={as_override(self.values[key])}" for key in outer_first]

    @property
    def group(self) -> str:
        """The values but for seeds, in words. Runs of one group differ in their seeds only."""
        words = [words for key, words in _words(self.values).items() if key not in SEEDS]
        return ", ".join(words) or "all runs"


def flattened(sweep: Any) -> Any:
    """Returns the section with dotted keys, because the override `sweep.train.seed=[1, 2]` opens sections.

    Example:
        >>> flattened({"objective": ["dpo"], "train": {"seed": [1, 2]}})
        {'objective': ['dpo'], 'train.seed': [1, 2]}
    """
    if not isinstance(sweep, dict):
        return sweep
    flat: dict[Any, Any] = {}
    for key, value in sweep.items():
        inner = flattened(value) if isinstance(value, dict) and value else None
        flat |= {key: value} if inner is None else {f"{key}.{name}": each for name, each in inner.items()}
    return flat


def grid_problems(sweep: Any) -> Iterator[Problem]:
    """Yields what is wrong with the section `sweep` of a recipe: (key, problem)."""
    if not isinstance(sweep, dict) or not sweep:
        yield (
            "sweep",
            "expected keys of the recipe, each with a list of values, e.g. train.learning_rate: [1e-6, 5e-6]",
        )
        return
    first: dict[tuple[str, ...], str] = {}
    for key, values in sweep.items():
        other = first.setdefault(tuple(key_parts(str(key))), key)
        if other != key:
            yield f"sweep.{key}", f"is the same setting as {other}; keep one"
        elif not isinstance(key, str) or key in _NOT_SWEPT or key.startswith(("sweep.", "rounds.")):
            yield f"sweep.{key}", f"cannot be swept; {', '.join(_NOT_SWEPT)} are the same for all runs"
        elif not isinstance(values, list) or not values:
            yield f"sweep.{key}", f"expected a list of values, got {in_yaml(values)}"
        elif len({as_override(value) for value in values}) < len(values):
            yield f"sweep.{key}", f"has a value twice: {in_yaml(values)}"


def cells(sweep: Mapping[str, Sequence[Any]]) -> list[Cell]:
    """Returns all combinations. The last key varies fastest.

    Raises:
        ConfigError: Two combinations have the same name.

    Example:
        >>> [cell.name for cell in cells({"objective": ["infopo", {"name": "dpo", "beta": 0.1}], "train.seed": [1, 2]})]
        ['infopo-seed-1', 'infopo-seed-2', 'dpo-beta-0.1-seed-1', 'dpo-beta-0.1-seed-2']
    """
    found = [
        Cell(_name(values), values)
        for combination in itertools.product(*sweep.values())
        if (values := dict(zip(sweep, combination, strict=True)))
    ]
    by_name: dict[str, Cell] = {}
    for cell in found:
        if (other := by_name.setdefault(cell.name, cell)) is not cell:
            raise ConfigError(
                f"sweep: {other.overrides} and {cell.overrides} would both be written to {cell.name}; "
                "choose values that differ in letters, digits, points or signs"
            )
    return found


def _name(values: Mapping[str, Any]) -> str:
    words = " ".join(_words(values).values())
    name = re.sub(r"[^\w.+-]+", "-", words).strip("-.") or "run"
    if len(name.encode()) <= _LONGEST_NAME:
        return name
    # File systems take 255 bytes, of which a log file and a staging folder need some.
    start = name.encode()[: _LONGEST_NAME - 9].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"


def _words(values: Mapping[str, Any]) -> dict[str, str]:
    """Returns each setting in a few words: `dpo beta 0.1`, `learning_rate 1e-06`.

    A key is written from its end, as far as it takes to tell it from the others.
    """
    paths = {key: key_parts(key.removesuffix(".name")) for key in values}
    found = {}
    for key, path in paths.items():
        others = [other for other in paths.values() if other != path]
        lengths = (n for n in range(1, len(path)) if all(other[-n:] != path[-n:] for other in others))
        length = next(lengths, len(path))
        found[key] = _value_in_words(".".join(path[-length:]), values[key], is_loss=path == ["objective"])
    return found


def _value_in_words(label: str, value: Any, is_loss: bool) -> str:
    if isinstance(value, dict):
        name = [str(value["name"])] if "name" in value else []
        return " ".join(name + [f"{k} {_plain(v)}" for k, v in value.items() if k != "name"])
    if is_loss and isinstance(value, list):
        return " + ".join(_value_in_words(label, term, is_loss) for term in value)
    return str(value) if is_loss else f"{label} {_plain(value)}"


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    return as_override(value) if isinstance(value, dict | list) else in_yaml(value)
