"""The command `reference`."""

import argparse
from typing import Any

from infopo.commands.shared import checked, importing


def add(commands: Any) -> None:
    """Adds the command."""
    reference = commands.add_parser(
        "reference",
        help="compute the reference log-probs of a recipe's data and store them; list or prune the store",
    )
    reference.add_argument("recipe", nargs="?", metavar="RECIPE.yaml")
    reference.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. reference.store=/data/reference"
    )
    what = reference.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="show what the store holds, with sizes")
    what.add_argument(
        "--prune",
        nargs="*",
        metavar="ID",
        help="remove these references, named as --list shows them, or `all`",
    )
    reference.add_argument(
        "--older-than",
        type=float,
        metavar="DAYS",
        help="with --prune: those only that no run has used for so long",
    )
    reference.add_argument(
        "--store", metavar="DIR", help="with --list and --prune: the store (default: the user's)"
    )
    reference.set_defaults(run=_run, parser=reference)


def _run(arguments: argparse.Namespace) -> None:
    manages = arguments.list or arguments.prune is not None
    if manages == (arguments.recipe is not None):
        arguments.parser.error("expected either RECIPE.yaml, or --list or --prune")
    if not manages and arguments.store is not None:
        arguments.parser.error("--store goes with --list and --prune; a recipe has reference.store")
    if arguments.older_than is not None and arguments.prune is None:
        arguments.parser.error("--older-than goes with --prune")
    if arguments.list:
        from infopo.workflows.store import list_store

        list_store(arguments.store)
    elif manages:
        from infopo.workflows.store import prune

        prune(arguments.store, arguments.prune, arguments.older_than)
    else:
        checked(arguments.recipe, arguments.overrides, makes_a_run=False)
        with importing():
            from infopo.workflows.reference import reference

        reference(arguments.recipe, arguments.overrides)
