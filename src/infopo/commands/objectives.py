"""The command `objectives`."""

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Adds the command."""
    objectives = commands.add_parser(
        "objectives", help="list the losses; with a name, show its formula, parameters, needs and source"
    )
    objectives.add_argument("name", nargs="?", metavar="NAME", help="e.g. infopo, or my_module:my_loss")
    objectives.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from infopo.workflows.objectives import list_objectives, show_objective

    if arguments.name is None:
        list_objectives()
    else:
        show_objective(arguments.name)
