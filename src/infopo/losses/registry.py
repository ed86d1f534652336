"""Objectives by name: from a name and its parameters to the function that computes the loss."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from infopo.losses import family, pairwise, unpaired
from infopo.losses.catalog import OBJECTIVES, complete_parameters
from infopo.losses.coupling import StepStatistic
from infopo.records import LossTerms, ResponseLogps

LossFunction = Callable[[ResponseLogps], LossTerms]

FUNCTIONS: Mapping[str, Callable[..., LossTerms]] = {
    "infopo": family.infopo,
    "infonce": family.infonce,
    "interpolated": family.interpolated,
    "js": family.js,
    "chi2": family.chi2,
    "hellinger": family.hellinger,
    "dv": family.dv,
    "smile": family.smile,
    "mine": family.mine,
    "dpo": pairwise.dpo,
    "ipo": pairwise.ipo,
    "hinge": pairwise.hinge,
    "simpo": pairwise.simpo,
    "fdpo": pairwise.fdpo,
    "sft": unpaired.sft,
    "cpo": pairwise.cpo,
    "slic": pairwise.slic,
    "orpo": pairwise.orpo,
    "rdpo": pairwise.rdpo,
    "dpop": pairwise.dpop,
    "nca": pairwise.nca,
    "exo": pairwise.exo,
    "kto": unpaired.kto,
    "apo_zero": unpaired.apo_zero,
    "apo_down": pairwise.apo_down,
    "cal_dpo": pairwise.cal_dpo,
    "robust_dpo": pairwise.robust_dpo,
}


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
    return partial(FUNCTIONS[name], **bound)


def step_statistic(name: str, parameters: Mapping[str, Any] | None = None) -> StepStatistic | None:
    """Returns the number of the optimizer step that couples the examples of objective `name`, or None if none does.

    Raises:
        ConfigError: As `loss_function`.

    Example:
        >>> step_statistic("dv").kind, step_statistic("infopo")
        ('log_mean', None)
    """
    bound = complete_parameters(name, parameters or {})
    if not OBJECTIVES[name].statistic:
        return None
    if OBJECTIVES[name].statistic == "kl":
        return unpaired.MISMATCH_KL
    return family.log_mean_statistic(
        bound["beta"],
        bound["length_normalized"],
        tau=bound.get("tau", math.inf),
        rate=bound.get("rate", 1.0),
    )
