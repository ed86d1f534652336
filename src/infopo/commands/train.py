"""The commands `train` and `check`, which take a recipe."""

import argparse
import textwrap
from typing import Any

from infopo.commands.shared import checked, importing, tasks_and_data
from infopo.losses.catalog import OBJECTIVES


def add(commands: Any) -> None:
    """Adds the commands."""
    train = _add(commands, "train", "train a model as a recipe says")
    train.set_defaults(run=_train)
    check = _add(
        commands, "check", "do everything that train does but for training: one step, nothing written"
    )
    check.add_argument(
        "--tasks",
        default="",
        metavar="NAME,...",
        help="look for problems of these tasks in the data, e.g. gsm8k",
    )
    check.add_argument("--data", action="append", default=[], metavar="[TASK=]FILE", help="a task's data")
    check.set_defaults(run=_check, parser=check)


def _add(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, epilog=_keys(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("recipe", metavar="RECIPE.yaml")
    command.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="e.g. train.learning_rate=1e-6"
    )
    return command


def _keys() -> str:
    """Returns a text that says where the keys of a recipe are listed, and names the objectives."""
    names = textwrap.fill(", ".join(OBJECTIVES), 78, initial_indent="  ", subsequent_indent="  ")
    return (
        "A recipe has the sections model, data, objective, reference and train, and output_dir. `infopo docs recipes`\n"
        "lists all keys; keys of train are those of transformers' TrainingArguments. A key that does not exist is\n"
        f"refused with those that do. Objectives (objective=NAME):\n{names}"
    )


def _train(arguments: argparse.Namespace) -> None:
    checked(arguments.recipe, arguments.overrides)
    with importing():
        from infopo.workflows.train import train

    train(arguments.recipe, arguments.overrides)


def _check(arguments: argparse.Namespace) -> None:
    tasks, data = tasks_and_data(arguments)
    checked(arguments.recipe, arguments.overrides, makes_a_run=False)
    with importing():
        from infopo.workflows.check import check

    check(arguments.recipe, arguments.overrides, tasks, data)
