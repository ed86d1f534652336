"""Objectives by name: from a name and its parameters to the function that computes the loss."""

import importlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from infopo.losses import family, foreign, moving, transport, unpaired
from infopo.losses.catalog import FOLDER, OBJECTIVES, complete_parameters, read_declarations, row_of
from infopo.losses.coupling import AnyStatistic
from infopo.records import LossTerms, ResponseLogps

LossFunction = Callable[[ResponseLogps], LossTerms]

FUNCTIONS: Mapping[str, Callable[..., LossTerms]] = {
    name: getattr(importlib.import_module(f"{__package__}.{path.stem}"), name)
    for path in sorted(FOLDER.glob("*.py"))
    for name in read_declarations(path)
}
"""The function of each of the package's own objectives."""


def loss_function(name: str, parameters: Mapping[str, Any] | None = None) -> LossFunction:
    """Returns the objective `name` with its parameters bound. What is not given takes the catalog's default.

    Raises:
        ConfigError: Unknown name, unknown parameter, or a value outside its domain.

    Example:
        >>> loss = loss_function("infopo", {"beta": 0.5})
        >>> [term.per for term in loss(ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0)))]
        ['chosen', 'rejected']
    """
    # Unknown names are refused here, so the look-up below cannot fail.
    bound = complete_parameters(name, parameters or {})
    return partial(FUNCTIONS[name] if name in OBJECTIVES else foreign.find(name).function, **bound)


def step_statistic(name: str, parameters: Mapping[str, Any] | None = None) -> AnyStatistic | None:
    """Returns the number of the optimizer step that couples the examples of objective `name`, or None if none does.

    Raises:
        ConfigError: As `loss_function`.

    Example:
        >>> step_statistic("dv").kind, step_statistic("infopo")
        ('log_mean', None)
    """
    bound = complete_parameters(name, parameters or {})
    statistic = row_of(name).statistic
    if not statistic:
        return None
    make = statistic if callable(statistic) else _STATISTICS[statistic]
    return make(**bound)


def _log_mean(
    beta: float,
    length_normalized: bool,
    tau: float = math.inf,
    rate: float = 1.0,
    **others: Any,
) -> AnyStatistic:
    return family.log_mean_statistic(beta, length_normalized, tau=tau, rate=rate)


_STATISTICS: Mapping[str, Callable[..., AnyStatistic]] = {
    "sorted_margins": lambda **parameters: transport.SORTED_MARGINS,
    "sorted_log_ratios": lambda **parameters: transport.SORTED_LOG_RATIOS,
    "log_mean": _log_mean,
    "moving_log_mean": _log_mean,
    "moving_margins": moving.moving_margins,
    "moving_gains": moving.moving_gains,
    "moving_rewards": moving.moving_rewards,
    "kl": lambda **parameters: unpaired.MISMATCH_KL,
}
"""What makes the statistic of each name in `STEP_STATISTICS` from the parameters of an objective."""
