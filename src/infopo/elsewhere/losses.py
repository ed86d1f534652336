"""The loss that settings of TRL's trainers mean, as a recipe's objective."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from infopo.elsewhere.conversion import Conversion, is_number, number
from infopo.errors import ConfigError
from infopo.losses.catalog import OBJECTIVES
from infopo.losses.mixture import as_written
from infopo.trl_names import LossSettings
from infopo.yaml_tree import in_yaml

Loss = tuple[str, Mapping[str, Any], float]
"""Name in the catalog, parameters, weight."""


def put_loss(made: Conversion, given: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    """Sets the recipe's objective.

    Args:
        made: The conversion.
        given: Settings of `LossSettings`.
        origins: Parameter of the objective, or `name` -> where it came from.

    Raises:
        ConfigError: There is no such loss, or a value is outside of its domain.
    """
    settings = LossSettings(**{name: _typed(name, value) for name, value in given.items()})
    if problems := settings.problems():
        raise ConfigError(problems)
    losses = list(settings.mixture())
    put_terms(made, losses, origins)
    names = [name for name, *_ in losses]
    if "kto" in names:
        made.put("train.train_sampling_strategy", "sequential", "KTO reads rows in their order there")
        made.differences.append(
            "KTO's reference point is that of a whole step here, and that of a batch there."
        )
    if "orpo" in names:
        made.differences.append(
            "ORPO's likelihood runs over the tokens of chosen responses here, and in TRL over their prompts' too."
        )


def put_terms(made: Conversion, losses: Sequence[Loss], origins: Mapping[str, str]) -> None:
    """Sets the recipe's objective to the weighted sum of some losses. See `put_loss` for `origins`."""
    (name, parameters, weight), *others = losses
    if [other for other, *_ in others] == ["sft"] and name in ("dpo", "cpo", "slic") and weight == 1:
        # The same sum, as a parameter of the loss, which may have a likelihood of its own.
        own = parameters.get("nll_weight", OBJECTIVES[name].parameters["nll_weight"].default)
        parameters, others = {**parameters, "nll_weight": own + others[0][2]}, []
    if others or weight != 1:
        made.put(
            "objective",
            as_written(losses),
            "; ".join(dict.fromkeys([origins["name"], *_sources(losses, origins)])),
        )
        return
    made.put("objective.name", name, origins["name"])
    for parameter, value in parameters.items():
        made.put(f"objective.{parameter}", value, origins.get(parameter, origins["name"]))


def _sources(losses: Sequence[Loss], origins: Mapping[str, str]) -> Iterator[str]:
    """Yields where the terms of a sum, and their parameters, came from."""
    for name, parameters, _ in losses:
        yield from (origins[key] for key in (name, *parameters) if key in origins)


def _typed(name: str, value: Any) -> Any:
    """Returns the value if it has the type of the setting, and text that is a number as that number."""
    if name == "loss_type":
        is_right, expected = all(isinstance(each, str) for each in value), "names of losses"
    elif name == "f_divergence_type":
        is_right, expected = isinstance(value, str), "text"
    elif name == "use_weighting":
        is_right, expected = isinstance(value, bool), "true or false"
    elif name == "loss_weights":
        is_right = value is None or (isinstance(value, list) and all(map(is_number, value)))
        expected = "a list of numbers"
    else:
        value = number(value) if isinstance(value, str) else value
        is_right, expected = is_number(value), "a number"
    if not is_right:
        raise ConfigError(f"{name}: expected {expected}, got {in_yaml(value)}")
    return value
