"""Weighted sums of objectives, L = Σ_i w_i L_i, as recipes and `InfoPOConfig` write them. Imports no torch."""

import sys
from collections.abc import Mapping, Sequence
from reprlib import repr as brief
from typing import Any

from infopo.losses import foreign
from infopo.losses.catalog import check_objective, objective_name, row_of

Term = tuple[str, dict[str, Any], float]
"""Name of an objective, the parameters that are given, and its weight w_i."""


def read_terms(terms: Sequence[Any]) -> tuple[list[Term], list[str]]:
    """Returns the terms of a sum, and everything that is wrong with them.

    Args:
        terms: Names of objectives, or mappings with `name`, parameters and `weight`, which is 1 if it is not given.

    Returns:
        The terms that have a name, and one sentence per problem, which begins with the place of the setting.

    Example:
        >>> read_terms(["infopo", {"name": "SFT", "weight": 0.2}])
        ([('infopo', {}, 1.0), ('sft', {}, 0.2)], [])
        >>> read_terms(["infopo", {"name": "dpo", "beta": -1.0}])[1]
        ['objective[1].beta: expected a value > 0, got -1.0']
        >>> read_terms(["infopo", {"name": "sft", "wieght": 0.2}])[1]
        ["objective[1].wieght: sft has no such parameter (did you mean 'weight'?); it has token_mean"]
    """
    found: list[Term] = []
    problems = [] if terms else ["objective: is an empty list; name an objective"]
    for number, term in enumerate(terms):
        place = f"objective[{number}]"
        given = {"name": term} if isinstance(term, str) else term
        if not isinstance(given, Mapping):
            problems.append(
                f"{place}: expected a name, or a mapping with name, parameters and weight, got {brief(term)}"
            )
            continue
        if not isinstance(given.get("name"), str):
            wrong = f"expected text, got {brief(given['name'])}" if "name" in given else "is required"
            problems.append(f"{place}.name: {wrong}")
            continue
        if odd := [key for key in given if not isinstance(key, str)]:
            problems.append(f"{place}: keys are names of parameters, got {brief(odd[0])}")
            continue
        parameters = {key: value for key, value in given.items() if key not in ("name", "weight")}
        name, weight = objective_name(given["name"]), given.get("weight", 1.0)
        of_term = check_objective(name, parameters, beside=("weight",))
        if not of_term and "weight" in row_of(name).parameters:
            of_term.append(
                f"objective.weight: is the weight in the sum, but {name} has a parameter of this name"
            )
        if not is_weight(weight):
            of_term.append(f"objective.weight: expected a finite number >= 0, got {brief(weight)}")
        problems += [place + problem.removeprefix("objective") for problem in of_term]
        found.append((name, parameters, float(weight) if is_weight(weight) else 1.0))
    if found and not any(weight for *_, weight in found):
        problems.append("objective: all weights are 0, so that there is nothing to minimise")
    return found, problems


def is_weight(value: object) -> bool:
    """Whether a value is a number of at least 0 that a float can represent."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return 0 <= value <= sys.float_info.max


def with_names(objective: Any) -> Any:
    """Returns an objective, or the terms of a sum, with a name for each function. Names are spelt as in the catalog.

    Example:
        >>> with_names([{"name": "DPO", "weight": 0.5}, "sft"])
        [{'name': 'dpo', 'weight': 0.5}, 'sft']
    """
    if isinstance(objective, list | tuple):
        return [with_names(term) for term in objective]
    if isinstance(objective, Mapping) and "name" in objective:
        return {**objective, "name": with_names(objective["name"])}
    if isinstance(objective, str):
        return objective_name(objective)
    return foreign.register(objective) if callable(objective) else objective


def as_written(
    mixture: Sequence[tuple[str, Mapping[str, Any], float]],
) -> dict[str, Any] | list[dict[str, Any]]:
    """Returns a loss as a recipe has it: a single objective as a mapping, and what has weights as a list.

    Example:
        >>> as_written([("dpo", {"beta": 0.1}, 1.0)])
        {'name': 'dpo', 'beta': 0.1}
        >>> as_written([("dpo", {"beta": 0.1}, 0.5)])
        [{'name': 'dpo', 'beta': 0.1, 'weight': 0.5}]
    """
    if len(mixture) == 1 and mixture[0][2] == 1:
        (name, parameters, _), *_ = mixture
        return {"name": name, **parameters}
    return [{"name": name, **parameters, "weight": weight} for name, parameters, weight in mixture]


def mixture_in_words(mixture: Sequence[tuple[str, Mapping[str, Any], float]]) -> str:
    """Returns names and parameters of a loss that is made of (objective, parameters, weight).

    Example:
        >>> mixture_in_words([("dpo", {"beta": 0.1}, 1.0)])
        'DPO (beta=0.1)'
        >>> mixture_in_words([("dpo", {"beta": 0.1}, 1.0), ("sft", {}, 0.5)])
        '1 x DPO (beta=0.1) + 0.5 x SFT on chosen ()'
    """
    parts = []
    for name, parameters, weight in mixture:
        factor = "" if len(mixture) == 1 and weight == 1 else f"{weight:g} x "
        values = ", ".join(f"{key}={value}" for key, value in parameters.items())
        parts.append(f"{factor}{row_of(name).title} ({values})")
    return " + ".join(parts)
