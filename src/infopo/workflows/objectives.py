"""`infopo objectives` lists the losses, or shows one. It loads no torch, unless a loss from outside does."""

import textwrap

from infopo.errors import ConfigError
from infopo.losses import foreign
from infopo.losses.catalog import OBJECTIVES, check_objective, objective_name, row_of
from infopo.losses.declaration import REQUIRED, STEP_STATISTICS
from infopo.output import say
from infopo.yaml_tree import dump_tree


def list_objectives() -> None:
    """Prints name, title and needs of all losses: the package's own, and those that other packages register."""
    width = max(map(len, OBJECTIVES))
    for name, row in OBJECTIVES.items():
        say(f"{name:{width}}  {row.title} ({row.needs})")
    for name, point in foreign.installed().items():
        say(f"{name:{width}}  {point.value}, of the package {point.dist.name if point.dist else 'unknown'}")
    say(
        "one of yours: objective=my_module:my_loss, with the module in the recipe's folder or the current one; "
        "infopo objectives NAME shows one"
    )


def show_objective(name: str) -> None:
    """Prints formula, needs, parameters and source of a loss.

    Raises:
        ConfigError: There is no such loss, or it cannot be imported.
    """
    name = objective_name(name)
    if problems := [p for p in check_objective(name, {}) if p.startswith("objective.name: ")]:
        raise ConfigError(problems)
    row = row_of(name)
    say(f"{name}: {row.title}", f"  loss    {row.formula}", f"  needs   {row.needs}")
    if row.when:
        say(f"  when    {row.when}")
    if row.bound:
        say(f"  bounds  {row.bound}")
    if row.statistic:
        what = "a number of the whole step, of its own"
        say(f"  step    {what if callable(row.statistic) else STEP_STATISTICS[row.statistic]}")
    say(f"  source  {row.source or 'not said'}")
    if row.location:
        say(f"  file    {row.location}", f"  sha256  {row.digest}")
    for key, parameter in row.parameters.items():
        default = "required"
        if parameter.default is not REQUIRED:
            default = dump_tree({"value": parameter.default}).partition(":")[2].strip()
        help = f"{key}: {default}, {parameter.domain}. {parameter.help}"
        say(textwrap.fill(help, 100, initial_indent="  ", subsequent_indent="      "))
