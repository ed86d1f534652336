"""Objectives as data: their parameters and needs, read from the declarations above their functions. Imports no torch.

Recipes, command line, documentation and trainer check names and values against this table. The files with the functions
import torch, which takes seconds, so their declarations are read from the source text here. A test checks that the
table is what the functions declare. Losses from outside the package are found by `foreign`.
"""

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infopo.catalog import suggestion
from infopo.errors import ConfigError
from infopo.losses import declaration, foreign
from infopo.losses.declaration import KINDS, REQUIRED, STEP_STATISTICS, Declaration, Objective, Parameter

__all__ = ["OBJECTIVES", "STEP_STATISTICS", "UNPAIRED", "Objective", "Parameter"]


def read_declarations(path: Path) -> dict[str, Objective]:
    """Returns what the functions of a file declare with `@objective(...)`, without importing it.

    Its arguments may use the names of `declaration`, and no others.

    Example:
        >>> "sft" in read_declarations(FOLDER / "unpaired.py")
        True
    """
    rows = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for decorator in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "objective":
                assert isinstance(node, ast.FunctionDef)
                given = {str(each.arg): _value(each.value) for each in decorator.keywords}
                rows[node.name] = Declaration(**given).row(node.name, _signature(node.args))
    return rows


def _value(node: ast.expr) -> Any:
    return eval(compile(ast.Expression(node), "<declaration>", "eval"), dict(vars(declaration)))


def _signature(arguments: ast.arguments) -> dict[str, tuple[Any, type | None]]:
    return {
        each.arg: (
            REQUIRED if default is None else ast.literal_eval(default),
            KINDS.get(ast.unparse(each.annotation)) if each.annotation else None,
        )
        for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    }


FOLDER = Path(__file__).parent

OBJECTIVES: Mapping[str, Objective] = {
    name: row for path in sorted(FOLDER.glob("*.py")) for name, row in read_declarations(path).items()
}
"""The package's own objectives by the name that recipes use."""

UNPAIRED = tuple(name for name, objective in OBJECTIVES.items() if not objective.pairs)
"""Objectives that compare no pairs: rows with one side train them too."""


def row_of(name: str) -> Objective:
    """Returns the row of an objective: one of the package, or one from outside it, which is imported.

    Raises:
        ConfigError: There is no such objective.

    Example:
        >>> row_of("dpo").title
        'DPO'
    """
    return OBJECTIVES[name] if name in OBJECTIVES else foreign.find(name).row


def objective_name(name: str) -> str:
    """Returns the catalog's spelling of an objective's name or title. Case, hyphens and spaces do not matter.

    Example:
        >>> objective_name("KTO"), objective_name("R-DPO"), objective_name("SFT on chosen"), objective_name("nonsense")
        ('kto', 'rdpo', 'sft', 'nonsense')
    """

    def bare(text: str) -> str:
        return re.sub(r"[^\w]|_", "", text.lower())

    if ":" in name:
        return name
    titles = {bare(spec.title): key for key, spec in OBJECTIVES.items()}
    names = {bare(key): key for key in OBJECTIVES}
    return (titles | names).get(bare(name), name)


def check_objective(name: str, parameters: Mapping[str, Any], beside: tuple[str, ...] = ()) -> list[str]:
    """Returns everything that is wrong with an objective's name and parameters.

    Args:
        name: Name of the objective.
        parameters: Values by parameter name.
        beside: Keys that may stand beside the parameters, for what a misspelt one may have meant.

    Returns:
        One sentence per problem, which begins with the path of the setting.

    Example:
        >>> check_objective("ipo", {"beta": 0.0})
        ['objective.beta: expected a value > 0, got 0.0']
    """
    if name not in OBJECTIVES and not foreign.is_foreign(name):
        known = [*OBJECTIVES, *foreign.installed()]
        hint, names = suggestion(name.lower(), known), ", ".join(known)
        return [f"objective.name: no objective {name!r}{hint}; there are {names}, and MODULE:FUNCTION"]
    try:
        specs = row_of(name).parameters
    except ConfigError as error:
        return [f"objective.name: {problem}" for problem in error.problems]
    problems = []
    for key, value in parameters.items():
        if key not in specs:
            hint, names = suggestion(key, [*specs, *beside]), ", ".join(specs) or "none"
            problems.append(f"objective.{key}: {name} has no such parameter{hint}; it has {names}")
        elif problem := specs[key].problem(value):
            problems.append(f"objective.{key}: {problem}")
    missing = [key for key, spec in specs.items() if spec.default is REQUIRED and key not in parameters]
    return problems + [f"objective.{key}: is required: {name} gives it no default" for key in missing]


def complete_parameters(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all parameters of an objective, with defaults filled in and numbers as floats.

    Raises:
        ConfigError: A name or a value is wrong.

    Example:
        >>> complete_parameters("infopo", {"beta": 1})
        {'beta': 1.0, 'length_normalized': False, 'cap': 5.0}
    """
    if problems := check_objective(name, parameters):
        raise ConfigError(problems)
    specs = row_of(name).parameters
    values = {key: parameters.get(key, spec.default) for key, spec in specs.items()}
    return {key: float(value) if specs[key].kind is float else value for key, value in values.items()}


def with_defaults(objectives: Any) -> Any:
    """Returns objectives as a checkpoint records them, with the defaults of parameters that are younger than it.

    A new parameter of an objective has the default at which the loss is what it was.

    Example:
        >>> with_defaults([["ipo", {"beta": 0.2}, 1.0]])
        [['ipo', {'beta': 0.2, 'length_normalized': True}, 1.0]]
    """
    if not isinstance(objectives, list):
        return objectives
    return [
        [each[0], _defaults(each[0]) | each[1], *each[2:]]
        if isinstance(each, list) and len(each) > 1 and each[0] in OBJECTIVES and isinstance(each[1], dict)
        else each
        for each in objectives
    ]


def _defaults(name: str) -> dict[str, Any]:
    return {key: parameter.default for key, parameter in OBJECTIVES[name].parameters.items()}
