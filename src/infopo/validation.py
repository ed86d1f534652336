"""Settings that judge themselves: a dataclass of typed fields, all of whose values pydantic checks at once.

What pydantic does not do is here: messages in the words of those who wrote the value, in YAML or in Python.
"""

import contextlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, FrozenInstanceError, dataclass, field, fields
from functools import cache
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Lt, MinLen
from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic_core import CoreSchema, core_schema

from infopo.catalog import suggestion
from infopo.errors import ConfigError, DataError
from infopo.yaml_tree import in_yaml, shorten

Problem = tuple[str, str]
"""The name of a setting, and what is wrong with it."""

Text = Annotated[str, MinLen(1)]
"""Text that is not empty."""


@dataclass(frozen=True)
class OneOf:
    """Annotation of text that is one of several choices: `Annotated[str, OneOf(("raise", "skip"))]`."""

    choices: tuple[str, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.literal_schema(list(self.choices))


@dataclass(frozen=True)
class Language:
    """How messages write a value, and what they call the kinds of values that differ between YAML and Python."""

    write: Callable[[Any], str]
    null: str
    switch: str
    mapping: str

    def kinds(self, kinds: Iterable[Any]) -> str:
        """Returns a description of what is expected.

        Example:
            >>> YAML.kinds((int, NoneType)), PYTHON.kinds((bool, NoneType))
            ('an integer or null', 'True or False or None')
        """
        names = {
            str: "text", int: "an integer", float: "a number", bool: self.switch, NoneType: self.null,
            list: "a list", list[str]: "a list of texts", dict: self.mapping,
            dict[str, Any]: f"{self.mapping} of named values", dict[str, float]: f"{self.mapping} to numbers",
            dict[str, str | None]: f"{self.mapping} of a shape's columns to those of the data",
        }  # fmt: skip
        return " or ".join(names.get(kind, getattr(kind, "__name__", str(kind))) for kind in kinds)


YAML = Language(in_yaml, "null", "true or false", "a mapping")
PYTHON = Language(lambda value: shorten(repr(value)), "None", "True or False", "a dict")


class Meaning(str):
    """What a setting means, and more about it.

    It is text because transformers' parser of command lines hands all of a field's metadata to argparse.

    Attributes:
        argument: Its name in `InfoPOConfig`, if that is no name of a field there already.
        expects: A description of good texts, for messages about an empty one.
        see: Page of the documentation.
    """

    argument: str = ""
    expects: str = ""
    see: str = ""


def setting(default: Any = MISSING, text: str = "", **more: str) -> Any:
    """Declares a setting, which is required if it has no default.

    Args:
        default: What it is if nobody sets it.
        text: What it means. The page on recipes and the help of command lines show this text.
        more: Attributes of `Meaning`.
    """
    meaning = Meaning(text)
    vars(meaning).update(more)
    return field(default=default, metadata={"help": meaning})


@dataclass
class Settings:
    """Base of settings, which are frozen and cannot be made of wrong values.

    Raises:
        ConfigError: A value is wrong, or values contradict each other. The error lists every problem.
    """

    # The decorator's `frozen=True` would keep InfoPOConfig, which is not frozen, from having these fields.
    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            raise FrozenInstanceError(f"cannot assign to field {name!r}")
        super().__setattr__(name, value)

    def __post_init__(self) -> None:
        problems = [
            *self.wrong_values(vars(self), PYTHON),
            *self.contradictions(SimpleNamespace(**vars(self))),
        ]
        if problems:
            raise ConfigError([f"{name}: {problem}" for name, problem in problems])

    @classmethod
    def wrong_values(cls, given: Mapping[str, Any], language: Language) -> list[Problem]:
        """Returns what is wrong with single values. What is not given takes its default."""
        try:
            _model(cls).model_validate(dict(given))  # type: ignore[arg-type]  # a class is hashable
        except ValidationError as error:
            types: dict[Any, set[str]] = defaultdict(set)
            for each in error.errors(include_url=False, include_input=False):
                types[each["loc"][0]].add(each["type"])
            return [(name, _sentence(cls, name, given.get(name), types[name], language)) for name in types]
        return []

    @classmethod
    def contradictions(cls, given: Any) -> Iterator[Problem]:
        """Yields what does not go together. `given` has all values, the wrong ones too."""
        yield from ()

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Returns each setting's default, which is None if the setting is required."""
        return {f.name: None if f.default is MISSING else f.default for f in fields(cls)}


@cache
def _model(cls: type[Settings]) -> type[BaseModel]:
    """Returns pydantic's model of these settings. It is strict: text is no number, and 1 is not true."""
    hints = get_type_hints(cls, include_extras=True)
    kinds: dict[str, Any] = {
        f.name: (hints[f.name], ... if f.default is MISSING else f.default) for f in fields(cls)
    }
    return create_model(cls.__name__, __config__=ConfigDict(strict=True), **kinds)


def _sentence(cls: type[Settings], name: str, value: Any, types: set[str], language: Language) -> str:
    """Returns what is wrong with a value, from the types of pydantic's errors."""
    if "missing" in types:
        return "is required"
    got = language.write(value)
    kinds, constraints = parts_of(get_type_hints(cls, include_extras=True)[name])
    if "string_too_short" in types:
        expects = cls.__dataclass_fields__[name].metadata["help"].expects
        return f"expected {expects}, got {got}" if expects else "is empty; expected text"
    if "literal_error" in types:
        choices = choices_of(constraints)
        if isinstance(value, str):
            return not_a_choice(value, choices)
        null = f" or {language.null}" if NoneType in kinds else ""
        return f"expected one of {', '.join(choices)}{null}, got {got}"
    if types & {"greater_than_equal", "less_than"}:
        return f"expected a value {_domain(constraints)}, got {got}"
    return f"expected {language.kinds(kinds)}, got {got}"


def parts_of(hint: Any) -> tuple[list[Any], list[Any]]:
    """Returns the kinds of values that an annotation admits, and its constraints.

    Example:
        >>> parts_of(Annotated[int, Ge(2)] | None)
        ([<class 'int'>, <class 'NoneType'>], [Ge(ge=2)])
    """
    kinds, constraints = [], []
    for member in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        kind, *found = get_args(member) if get_origin(member) is Annotated else (member,)
        kinds.append(kind)
        constraints += found
    return kinds, constraints


def choices_of(constraints: Iterable[Any]) -> tuple[str, ...]:
    """Returns the choices among the constraints of an annotation, which are none if it has no `OneOf`."""
    return tuple(choice for each in constraints if isinstance(each, OneOf) for choice in each.choices)


def not_a_choice(value: str, choices: tuple[str, ...]) -> str:
    """Returns the message about text that is none of the choices."""
    return f"expected one of {', '.join(choices)}, got {value!r}{suggestion(value, choices)}"


@contextlib.contextmanager
def options_named(section: str) -> Iterator[None]:
    """Within it, errors about options of the command line name the settings of a recipe's section instead."""
    try:
        yield
    except ConfigError as error:
        problems = [_with_settings(problem, section) for problem in error.problems]
        raise ConfigError(problems, error.source) from error
    except DataError as error:
        problem = _with_settings(error.problem, section)
        if problem == error.problem:
            raise
        raise DataError(problem, error.row_id, error.reason) from error


_OTHER_NAMES: Mapping[str, Mapping[str, str]] = {
    "rounds": {
        "tasks": "rounds.verifier",
        "judge": "rounds.verifier",
        "num-samples": "rounds.num_generations",
        "data": "rounds.prompts",
        "output": "output_dir",
    },
    "evaluate": {"output": "output_dir"},
}
"""Section -> option of the command line -> the setting that stands for it, if that has another name."""


def _with_settings(problem: str, section: str) -> str:
    """Returns a problem that names settings of a section in place of options.

    Example:
        >>> _with_settings("raise --num-generations, or give a file: --data gsm8k=FILE", "rounds")
        'raise rounds.num_generations, or give a file: rounds.prompts=FILE'
        >>> _with_settings("give a file: --data gsm8k=FILE", "evaluate")
        'give a file: evaluate.data={gsm8k: FILE}'
    """
    file = "rounds.prompts=FILE" if section == "rounds" else rf"{section}.data={{\1: FILE}}"
    problem = re.sub(r"--data (\w+)=FILE", file, problem)
    others = _OTHER_NAMES.get(section, {})
    return re.sub(
        r"--([a-z]+(?:-[a-z]+)*)",
        lambda option: others.get(option[1], f"{section}.{option[1].replace('-', '_')}"),
        problem,
    )


def _domain(constraints: list[Any]) -> str:
    low = next((each.ge for each in constraints if isinstance(each, Ge)), None)
    below = next((each.lt for each in constraints if isinstance(each, Lt)), None)
    return f">= {low}" if below is None else f"in [{low}, {below})"
