"""The command `convert-recipe`."""

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Adds the command."""
    convert = commands.add_parser(
        "convert-recipe",
        help="write a recipe from a file of LLaMA-Factory, Axolotl or TRL",
        description="Converts a YAML file of LLaMA-Factory, Axolotl or TRL. Every setting without a counterpart is "
        "named on standard error, and in a comment of the recipe.",
    )
    convert.add_argument("file", metavar="FILE", help="the other tool's YAML file")
    # The names are those of infopo.elsewhere.TOOLS, which takes longer to import than `infopo --help` may.
    convert.add_argument(
        "--from",
        dest="tool",
        choices=("llama-factory", "axolotl", "trl"),
        help="whose file it is (default: recognised from its settings)",
    )
    convert.add_argument(
        "--output", metavar="RECIPE.yaml", help="where the recipe goes (default: the terminal)"
    )
    convert.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from infopo.workflows.convert import convert_recipe

    convert_recipe(arguments.file, arguments.tool, arguments.output)
