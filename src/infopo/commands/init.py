"""The command `init`."""

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Adds the command."""
    init = commands.add_parser(
        "init",
        help="write a commented recipe for your model and data",
        description="Writes a commented recipe. What no option says is asked for at a terminal, and takes its default "
        "elsewhere. Nothing is overwritten.",
    )
    init.add_argument(
        "file", nargs="?", default="recipe.yaml", metavar="FILE", help="where it goes (default: %(default)s)"
    )
    init.add_argument("--model", metavar="MODEL", help="folder or hub name of the model to train")
    init.add_argument("--data", metavar="DATA", help="preference data: file, folder, glob or hub name")
    init.add_argument("--eval-data", metavar="DATA", help="data to evaluate on")
    init.add_argument("--eval-split", metavar="SPLIT", help="split of the data to evaluate on")
    # The choices are those of infopo.scaffold, which judges them.
    init.add_argument("--method", metavar="full|lora|qlora", help="what is trained (default: full)")
    init.add_argument(
        "--parallel", metavar="none|fsdp|deepspeed", help="how devices share a model (default: none)"
    )
    init.add_argument(
        "--data-kind",
        metavar="paired|unpaired|scores|lists",
        dest="kind",
        help="default: seen in the rows of a file",
    )
    init.add_argument("--objective", metavar="NAME", help="default: infopo; `infopo objectives` lists all")
    init.add_argument("--output-dir", metavar="DIR", help="the run directory (default: runs/FILE)")
    init.set_defaults(run=_run)


_SETTINGS = (
    "model", "data", "eval_data", "eval_split", "method", "parallel", "kind", "objective", "output_dir",
)  # fmt: skip


def _run(arguments: argparse.Namespace) -> None:
    from infopo.workflows.init import asker, init

    init(arguments.file, {name: getattr(arguments, name) for name in _SETTINGS}, asker())
