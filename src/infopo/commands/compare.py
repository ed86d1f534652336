"""The command `compare`."""

import argparse
from typing import Any

from infopo.commands.shared import tasks_and_data


def add(commands: Any) -> None:
    """Adds the command."""
    compare = commands.add_parser(
        "compare",
        help="compare models on the items that both answered: tests, intervals, wins and losses",
        description="Compares each with the first, paired by item. An evaluation is a folder of infopo evaluate, a run "
        "directory, a file with a score per row (also of lm-evaluation-harness), or a file of responses.",
    )
    compare.add_argument("sources", nargs="+", metavar="EVALUATION", help="two or more")
    compare.add_argument("--tasks", default="", metavar="NAME,...", help="default: all that both have")
    compare.add_argument("--rule", metavar="RULE", help="mark by this rule (default: each task's headline)")
    compare.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="[TASK=]FILE",
        help="data of tasks that grade files of responses",
    )
    compare.add_argument(
        "--items", type=int, default=5, metavar="N", help="list N won and N lost items (default: %(default)s)"
    )
    compare.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default: %(default)s)")
    compare.add_argument(
        "--format", choices=("markdown", "json"), default="markdown", help="default: %(default)s"
    )
    compare.add_argument("--output", metavar="FILE", help="default: the terminal")
    compare.set_defaults(run=_run, parser=compare)


def _run(arguments: argparse.Namespace) -> None:
    tasks, data = tasks_and_data(arguments)
    from infopo.workflows.compare import compare

    compare(
        arguments.sources,
        tasks,
        data=data,
        rule=arguments.rule,
        seed=arguments.seed,
        format=arguments.format,
        output=arguments.output,
        items=arguments.items,
    )
