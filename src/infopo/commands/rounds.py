"""The command `rounds`, which takes a recipe with a section of that name."""

import argparse
from typing import Any

from infopo.commands.shared import checked, importing


def add(commands: Any) -> None:
    """Adds the command."""
    rounds = commands.add_parser(
        "rounds",
        help="sample, mark, train and evaluate, again and again, on the newest policy's own samples",
        description="Trains in rounds as the section `rounds` of a recipe says (infopo docs rounds). Each round is a "
        "run directory. The same command goes on where a killed one stood.",
    )
    rounds.add_argument("recipe", metavar="RECIPE.yaml")
    rounds.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="e.g. rounds.number=5")
    rounds.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    checked(arguments.recipe, arguments.overrides, makes_a_run=False, section="rounds")
    with importing():
        from infopo.workflows.rounds import rounds

    rounds(arguments.recipe, arguments.overrides)
