"""The command `demo`."""

import argparse
from typing import Any

from infopo.commands.shared import importing


def add(commands: Any) -> None:
    """Adds the command."""
    demo = commands.add_parser("demo", help="compare InfoPO, DPO and SFT on the built-in lab, in minutes")
    demo.add_argument(
        "--output", default="infopo-demo", metavar="DIR", help="where results go (default: %(default)s)"
    )
    demo.add_argument(
        "--seed", type=int, default=0, help="seed of problems, samples and order (default: %(default)s)"
    )
    demo.add_argument(
        "--labels", choices=("verified", "graded"), default="verified", help="how pairs are labelled"
    )
    demo.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from infopo.preflight import check_demo

    check_demo(arguments.output, arguments.seed)
    with importing():
        from infopo.workflows.demo import demo

    demo(arguments.output, seed=arguments.seed, labels=arguments.labels)
