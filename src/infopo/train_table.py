"""What a recipe's `train` section accepts, known without loading torch or transformers.

This module reads the source text of the classes, so that a typing error costs no start-up. `build.train_fields` adds
what only the classes tell. What this module does not understand, it leaves to transformers.
"""

import ast
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any, get_type_hints

from infopo.config import TrainField
from infopo.settings import DataSettings, ModelSettings, ReferenceSettings, TrainSettings, arguments_of
from infopo.trl_names import LossSettings
from infopo.validation import PYTHON, YAML, Language, choices_of, parts_of

SET_ELSEWHERE = {
    "output_dir", "model_init_kwargs", "precompute_ref_log_probs", *(f.name for f in fields(LossSettings)),
    *arguments_of(ModelSettings).values(), *arguments_of(DataSettings).values(),
    *arguments_of(ReferenceSettings).values(),
}  # fmt: skip
"""Arguments that have a place of their own in a recipe, outside `train`."""

Domain = tuple[str, Callable[[float], bool]]
"""Admissible numbers in words, and the test for them."""


def _at_least(low: float) -> Domain:
    return f">= {low:g}", lambda value: low <= value < math.inf


_ABOVE_0: Domain = ("> 0", lambda value: 0 < value < math.inf)
_BELOW_1: Domain = ("in [0, 1)", lambda value: 0 <= value < 1)

DOMAINS: Mapping[str, Domain] = {
    **dict.fromkeys(("num_train_epochs", "logging_steps", "save_steps", "eval_steps"), _ABOVE_0),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), _BELOW_1),
    **dict.fromkeys(
        (
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
            "torch_empty_cache_steps", "eval_accumulation_steps", "dataloader_prefetch_factor", "ddp_timeout",
        ),
        _at_least(1),
    ),
    **dict.fromkeys(
        (
            "learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps",
            "neftune_noise_alpha", "dataloader_num_workers", "data_seed", "eval_delay",
        ),
        _at_least(0),
    ),
    "max_steps": ("> 0, or -1 to train for num_train_epochs", lambda value: value > 0 or value == -1),
    "seed": ("in [0, 2**32)", lambda value: 0 <= value < 2**32),
}  # fmt: skip
"""Numbers that transformers takes without a look, and fails on, or trains nothing with, once the data are read."""

CHOICES: Mapping[str, tuple[str, ...]] = {"include_num_input_tokens_seen": ("no", "all", "non_padding")}
"""Texts that are accepted where transformers declares no list of its own."""


@dataclass(frozen=True)
class NumberField(TrainField):
    """A `TrainField` with a domain."""

    domain: Domain = field(default=_ABOVE_0, repr=False)

    def problem(self, value: Any, language: Language = YAML) -> str | None:
        problem = super().problem(value, language)
        if problem or not isinstance(value, int | float) or isinstance(value, bool):
            return problem
        words, admits = self.domain
        return None if admits(value) else f"expected a value {words}, got {language.write(value)}"


class OwnField(TrainField):
    """A setting of `TrainSettings`, which judges it."""

    def problem(self, value: Any, language: Language = YAML) -> str | None:
        return dict(TrainSettings.wrong_values({self.name: value}, language)).get(self.name)


def own_fields() -> dict[str, TrainField]:
    """Returns the fields of this package's own settings of training."""
    table: dict[str, TrainField] = {}
    for name, hint in get_type_hints(TrainSettings, include_extras=True).items():
        kinds, constraints = parts_of(hint)
        table[name] = OwnField(name, tuple(kinds), choices_of(constraints))
    return table


def train_field(name: str, kinds: tuple[type, ...], choices: tuple[str, ...]) -> TrainField:
    """The field of this name, with the domain and the choices that are ours to know."""
    choices = CHOICES.get(name) or choices
    if name == "fsdp":
        # transformers declares text, which it will drop, and documents a switch.
        kinds = (str, bool, NoneType)
    if name in DOMAINS:
        return NumberField(name, kinds, choices, DOMAINS[name])
    return TrainField(name, kinds, choices)


def wrong_arguments(given: Mapping[str, Any]) -> list[str]:
    """Returns what is wrong with numbers and switches that a script has set, in sentences that begin with the name.

    transformers takes them without a look. It fails on some after the reference pass, and means another thing by others
    (`bf16="False"` is true, `gradient_accumulation_steps=-1` takes no step). Numbers of NumPy are taken too.

    Example:
        >>> wrong_arguments({"max_steps": 1e3, "bf16": "False", "optim": "sgd"})
        ['max_steps: expected an integer, got 1000.0', "bf16: expected True or False or None, got 'False'"]
    """
    problems = []
    for name, each in quick_train_fields().items():
        if name not in given or isinstance(each, OwnField):
            continue
        value: Any = given[name]
        if type(value) is not bool and isinstance(value, Real):
            value = int(value) if isinstance(value, Integral) else float(value)
        if value in (0, 1) and not {int, float} & set(each.kinds):  # as a switch
            continue
        is_judged = set(each.kinds) <= {int, float, bool, NoneType} or (each.choices and type(value) is str)
        if is_judged and (problem := each.problem(value, PYTHON)) is not None:
            problems.append(f"{name}: {problem}")
    return problems


@cache
def quick_train_fields() -> Mapping[str, TrainField]:
    """Returns what the sources of the classes tell of `build.train_fields`, which is nothing if they cannot be read."""
    spec = importlib.util.find_spec("transformers")  # finds the package without loading it
    if spec is None or spec.origin is None:
        return {}
    package = Path(spec.origin).parent
    try:
        modules = [
            ast.parse(path.read_text(encoding="utf-8"))
            for path in (
                package / "trainer_utils.py", package / "training_args.py", Path(__file__).with_name("arguments.py")
            )
        ]  # fmt: skip
    except (OSError, SyntaxError, ValueError):
        return {}
    classes = {
        node.name: node for module in modules for node in module.body if isinstance(node, ast.ClassDef)
    }
    if not {"TrainingArguments", "InfoPOConfig"} <= classes.keys():
        return {}
    enumerations = {name: values for name, node in classes.items() if (values := _values(node))}
    table: dict[str, TrainField] = {}
    for name in ("TrainingArguments", "InfoPOConfig"):
        for target, annotation, default in _fields(classes[name]):
            kinds, choices = _kinds(annotation, enumerations)
            if kinds and isinstance(default, ast.Constant) and default.value is None:
                kinds = tuple(dict.fromkeys((*kinds, NoneType)))
            table[target] = train_field(target, kinds, choices)
    return {name: each for name, each in table.items() if name not in SET_ELSEWHERE} | own_fields()


def _values(node: ast.ClassDef) -> tuple[str, ...]:
    """Returns the texts of an enumeration, which are none for another class."""
    if not any(isinstance(base, ast.Name) and base.id.endswith("Enum") for base in node.bases):
        return ()
    constants = [each.value for each in node.body if isinstance(each, ast.Assign)]
    return tuple(str(each.value) for each in constants if isinstance(each, ast.Constant))


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr, ast.expr | None]]:
    """Name, annotation and default of each field that the constructor takes."""
    for each in node.body:
        if not isinstance(each, ast.AnnAssign) or not isinstance(each.target, ast.Name):
            continue
        if "ClassVar" in ast.unparse(each.annotation):
            continue
        settings: dict[str | None, ast.expr] = {}
        default = each.value
        if isinstance(default, ast.Call):
            settings = {keyword.arg: keyword.value for keyword in default.keywords}
            default = default.args[0] if default.args else settings.get("default")
        init = settings.get("init")
        if not (isinstance(init, ast.Constant) and init.value is False):
            yield each.target.id, each.annotation, default


_NAMES: Mapping[str, type] = {
    "str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict, "None": NoneType,
}  # fmt: skip


def _kinds(
    annotation: ast.expr, enumerations: Mapping[str, tuple[str, ...]]
) -> tuple[tuple[type, ...], tuple[str, ...]]:
    """Returns accepted types and texts, which are none if a part of the annotation is not understood."""
    kinds: list[type] = []
    choices: list[str] = []
    for part in ast.unparse(annotation).strip("'\"").split("|"):
        name = part.strip().partition("[")[0]
        if name in enumerations:
            kinds.append(str)
            choices += enumerations[name]
        elif name in _NAMES:
            kinds.append(_NAMES[name])
        else:
            return (), ()
    return tuple(dict.fromkeys(kinds)), tuple(choices)
