"""The command `recipes`."""

import argparse
import sys
from typing import Any

from infopo.output import say


def add(commands: Any) -> None:
    """Adds the command."""
    recipes = commands.add_parser(
        "recipes",
        help="list the recipes that ship; with a name, print one to begin with",
        description="Lists the recipes that ship with the package, or prints one: infopo recipes lora > mine.yaml",
    )
    recipes.add_argument("name", nargs="?", metavar="NAME", help="e.g. lora")
    recipes.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from infopo.shipped import shipped_recipe, shipped_recipes

    if arguments.name is not None:
        sys.stdout.write(shipped_recipe(arguments.name).text)
        return
    recipes = shipped_recipes()
    width = max(len(recipe.name) for recipe in recipes)
    say(*(f"{recipe.name:{width}}  {recipe.title}" for recipe in recipes))
    say("", "infopo recipes NAME > mine.yaml writes one; infopo check mine.yaml tells whether it can run.")
