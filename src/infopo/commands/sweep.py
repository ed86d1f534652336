"""The command `sweep`, which takes a recipe with a section of that name."""

import argparse
from typing import Any

from infopo.commands.shared import checked, importing


def add(commands: Any) -> None:
    """Adds the command."""
    sweep = commands.add_parser(
        "sweep",
        help="train a recipe with every combination of some values: objectives, rates, seeds",
        description="Trains a run per combination of the values in the section `sweep` (infopo docs sweeps) "
        "and writes one table, one report and one comparison. The same command goes on where a killed one stood.",
    )
    sweep.add_argument("recipe", metavar="RECIPE.yaml")
    sweep.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="e.g. sweep.train.seed=[1,2,3]"
    )
    sweep.add_argument(
        "--workers", type=int, metavar="N", help="runs at a time (default: one per accelerator, else 1)"
    )
    sweep.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    checked(arguments.recipe, arguments.overrides, makes_a_run=False, section="sweep")
    with importing():
        from infopo.workflows.sweep import sweep

    sweep(arguments.recipe, arguments.overrides, workers=arguments.workers)
