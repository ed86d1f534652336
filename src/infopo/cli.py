"""The command line: infopo demo · train · check. Parses arguments, prints errors, decides nothing."""

import argparse
import io
import os
import sys
from collections.abc import Sequence

from infopo import __version__
from infopo.errors import InfoPOError

EXIT_INPUT_AT_FAULT = 2
EXIT_INTERRUPTED = 130
EXIT_OUTPUT_CLOSED = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status.

    0; 2 where the input is at fault; 130 on Ctrl-C; 141 where nobody reads the output any more.
    """
    arguments = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # data may hold what a terminal's encoding does not
            stream.reconfigure(errors="backslashreplace")
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # else tokenizers warn in every data-loader worker
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except InfoPOError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_INPUT_AT_FAULT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `infopo check ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor may the flush at exit fail
        return EXIT_OUTPUT_CLOSED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="infopo", description="Align language models with preference data.")
    parser.add_argument("--version", action="version", version=f"infopo {__version__}")
    commands = parser.add_subparsers(title="commands", required=True)

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
    demo.set_defaults(run=_demo)

    for name, run, text in (
        ("train", _train, "train a model as a recipe says"),
        ("check", _check, "do everything that train does but for training: one step, nothing written"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("recipe", metavar="RECIPE.yaml")
        command.add_argument(
            "overrides", nargs="*", metavar="key=value", help="e.g. train.learning_rate=1e-6"
        )
        command.set_defaults(run=run)
    return parser


# Imports wait until a command runs: `infopo --help` must not load torch.


def _demo(arguments: argparse.Namespace) -> None:
    from infopo.workflows.demo import demo

    demo(arguments.output, seed=arguments.seed, labels=arguments.labels)


def _train(arguments: argparse.Namespace) -> None:
    from infopo.workflows.train import train

    train(arguments.recipe, arguments.overrides)


def _check(arguments: argparse.Namespace) -> None:
    from infopo.workflows.check import check

    check(arguments.recipe, arguments.overrides)
