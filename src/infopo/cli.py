"""The command line. It parses arguments and prints errors, nothing else."""

import argparse
import atexit
import contextlib
import io
import os
import sys
import textwrap
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

from infopo import __version__, cli_compare, cli_pairs
from infopo.errors import InfoPOError
from infopo.losses.catalog import OBJECTIVES
from infopo.output import say, shown
from infopo.secrets import masked_argument

EXIT_INPUT_AT_FAULT = 2
EXIT_INTERRUPTED = 130
EXIT_OUTPUT_CLOSED = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status.

    The status is 0, or 2 if the input is at fault, 130 on Ctrl-C, and 141 if nobody reads the output any more. One of
    several ranks does not return, because its process ends with that status.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if "run" not in arguments:
        parser.print_help(sys.stderr)
        return EXIT_INPUT_AT_FAULT
    status = _run(arguments)
    if os.environ.get("WORLD_SIZE", "") not in ("", "1"):
        _end_process(status)
    return status


def _run(arguments: argparse.Namespace) -> int:
    for stream in (sys.stdout, sys.stderr):
        # Data may contain characters that the terminal's encoding lacks.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Without this setting, tokenizers warn in every data-loader worker.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except InfoPOError as error:
        say(f"error: {error}", file=sys.stderr)
        return EXIT_INPUT_AT_FAULT
    except KeyboardInterrupt as stop:
        say(f"interrupted: {stop}" if str(stop) else "interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # As in `infopo check ... | head`. The flush at exit must not fail either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OUTPUT_CLOSED
    return 0


def _end_process(status: int) -> None:
    """Ends the process without the interpreter's teardown, after all exit handlers have run.

    A thread of gloo that needs the interpreter during the teardown, to release its last tensor, would abort the
    process. The launcher would then stop the other ranks, one of which may still be saving the model.
    """
    # This waits for threads, and for those of executors.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


class _Parser(argparse.ArgumentParser):
    """Tells users who write overrides with dashes how to write them."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()
        meant = [part.lstrip("-") for part in unknown if part.startswith("--") and "=" in part]
        if message.startswith("unrecognized arguments: ") and meant:
            keys = [masked_argument(part) for part in meant]
            message = f"overrides are written without dashes: {' '.join(keys)}"
        super().error(shown(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="infopo", description="Align language models with preference data.")
    parser.add_argument("--version", action="version", version=f"infopo {__version__}")
    commands = parser.add_subparsers(title="commands", parser_class=_Parser)

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
        command = commands.add_parser(
            name, help=text, epilog=_keys(), formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("recipe", metavar="RECIPE.yaml")
        command.add_argument(
            "overrides", nargs="*", default=[], metavar="key=value", help="e.g. train.learning_rate=1e-6"
        )
        command.set_defaults(run=run)
        if name == "check":
            command.add_argument(
                "--tasks",
                default="",
                metavar="NAME,...",
                help="look for problems of these tasks in the data, e.g. gsm8k",
            )
            command.add_argument(
                "--data", action="append", default=[], metavar="[TASK=]FILE", help="a task's data"
            )
            command.set_defaults(parser=command)

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
    reference.set_defaults(run=_reference, parser=reference)

    report = commands.add_parser(
        "report",
        help="write one HTML file about runs: results, curves, completions, settings side by side",
        description="Writes one self-contained file about run directories of finished, running or killed runs.",
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="a run directory (output_dir)")
    report.add_argument(
        "--output",
        metavar="FILE",
        help="where it goes (default: report.html; markdown and json: the terminal)",
    )
    report.add_argument(
        "--format",
        choices=("html", "markdown", "json"),
        default="html",
        help="default: %(default)s; markdown is for a pull request, json for a script",
    )
    report.add_argument("--watch", action="store_true", help="write it again until no run is running")
    report.set_defaults(run=_report)

    _add_evaluate(commands)
    cli_compare.add_compare(commands)
    cli_compare.add_winrate(commands)
    cli_pairs.add_pairs(commands)

    objectives = commands.add_parser(
        "objectives", help="list the losses; with a name, show its formula, parameters, needs and source"
    )
    objectives.add_argument("name", nargs="?", metavar="NAME", help="e.g. infopo, or my_module:my_loss")
    objectives.set_defaults(run=_objectives)
    return parser


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="ask a model the items of tasks and mark the answers: reasoning, code, the lab",
        description="Asks a model the items of tasks, marks the answers by named rules, and writes eval.json. Samples "
        "are kept, so that a killed evaluation goes on where it stood.",
    )
    evaluate.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="local folder, adapter, run directory, hub name or lab:policy",
    )
    evaluate.add_argument(
        "--tasks",
        required=True,
        metavar="NAME,...",
        help="e.g. gsm8k,lab, or lm-evaluation-harness's such as mmlu",
    )
    evaluate.add_argument("--output", metavar="DIR", help="default: infopo-eval/NAME, or RUN/evaluation")
    evaluate.add_argument(
        "--responses",
        metavar="FILE",
        help="mark responses of this file (JSONL, Parquet, ...) in place of a model",
    )
    evaluate.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="[TASK=]FILE",
        help="a task's data: a file or a hub name",
    )
    evaluate.add_argument(
        "--include-path", metavar="DIR", help="task files of lm-evaluation-harness, beside its own"
    )
    evaluate.add_argument("--limit", type=int, metavar="N", help="the first N items of each task")
    evaluate.add_argument(
        "--num-samples", type=int, default=1, metavar="K", help="responses per item (default: 1)"
    )
    evaluate.add_argument(
        "--temperature", type=float, metavar="T", help="default: 0 (greedy) for one sample, 1 for several"
    )
    evaluate.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default: %(default)s")
    evaluate.add_argument("--max-new-tokens", type=int, metavar="N", help="default: that of the task")
    evaluate.add_argument(
        "--prompting", choices=("chat", "plain"), help="default: chat if the tokenizer has a chat template"
    )
    evaluate.add_argument(
        "--num-fewshot",
        type=int,
        default=0,
        metavar="N",
        help="worked examples before each problem (default: 0)",
    )
    evaluate.add_argument("--batch-size", type=int, default=32, metavar="N", help="default: %(default)s")
    evaluate.add_argument("--seed", type=int, default=0, help="seed of the samples (default: %(default)s)")
    evaluate.add_argument(
        "--dtype", default="auto", metavar="TYPE", help="auto (as saved), float32, bfloat16 or float16"
    )
    evaluate.add_argument(
        "--server",
        metavar="URL",
        help="ask an OpenAI-compatible server (vLLM, SGLang), e.g. http://localhost:8000/v1; MODEL is its name there",
    )
    evaluate.add_argument(
        "--concurrency",
        type=int,
        default=8,
        metavar="N",
        help="requests to the server at a time (default: 8)",
    )
    evaluate.add_argument(
        "--shard",
        metavar="I/N",
        help="draw the I-th of N shares of the samples into --output, and mark nothing",
    )
    evaluate.add_argument(
        "--allow-code-execution", action="store_true", help="let tasks run code that the model wrote"
    )
    evaluate.add_argument(
        "--isolation", default="uid", metavar="LEVEL",
        help="the weakest isolation that such code may run at: namespaces, uid (the default), or none, if this machine "
        "may be thrown away",
    )  # fmt: skip
    evaluate.set_defaults(run=_evaluate, parser=evaluate)


def _keys() -> str:
    """Returns a text that says where the keys of a recipe are listed, and names the objectives."""
    names = textwrap.fill(", ".join(OBJECTIVES), 78, initial_indent="  ", subsequent_indent="  ")
    return (
        "A recipe has the sections model, data, objective, reference and train, and output_dir. All keys stand in\n"
        "docs/recipes.md; keys of train are those of transformers' TrainingArguments. A key that does not exist is\n"
        f"refused with those that do. Objectives (objective=NAME):\n{names}"
    )


# The functions below import when a command runs, because `infopo --help` must not load torch.


def _preflight(recipe: str, overrides: Sequence[str], *, makes_a_run: bool = True) -> None:
    """Reports what is wrong with a recipe before torch is loaded, which takes seconds."""
    from infopo import preflight

    preflight.preflight(recipe, overrides, makes_a_run=makes_a_run)


def _demo(arguments: argparse.Namespace) -> None:
    from infopo.preflight import check_demo

    check_demo(arguments.output, arguments.seed)
    from infopo.workflows.demo import demo

    demo(arguments.output, seed=arguments.seed, labels=arguments.labels)


def _train(arguments: argparse.Namespace) -> None:
    _preflight(arguments.recipe, arguments.overrides)
    from infopo.workflows.train import train

    train(arguments.recipe, arguments.overrides)


def _reference(arguments: argparse.Namespace) -> None:
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
        _preflight(arguments.recipe, arguments.overrides, makes_a_run=False)
        from infopo.workflows.reference import reference

        reference(arguments.recipe, arguments.overrides)


def _report(arguments: argparse.Namespace) -> None:
    from infopo.workflows.report import report

    report(arguments.runs, arguments.output, format=arguments.format, watch=arguments.watch)


def _evaluate(arguments: argparse.Namespace) -> None:
    tasks, data = cli_compare.tasks_and_data(arguments)
    shard = cli_pairs.shard_in(arguments.shard, arguments.parser)
    from infopo.evaluation.server import ServerSettings
    from infopo.evaluation.settings import EvaluationSettings
    from infopo.workflows.evaluate import evaluate

    server = None
    if arguments.server is not None:
        server = ServerSettings(arguments.server, arguments.model, concurrency=arguments.concurrency)
    settings = EvaluationSettings(
        tasks=tasks,
        data=data,
        shard=shard,
        server=server,
        **{name: getattr(arguments, name) for name in _EVALUATION},
    )
    evaluate(arguments.model, settings, output=arguments.output, responses=arguments.responses)


_EVALUATION = (
    "limit", "num_samples", "temperature", "top_p", "max_new_tokens", "prompting", "num_fewshot", "batch_size", "seed",
    "dtype", "allow_code_execution", "isolation", "include_path",
)  # fmt: skip
"""Arguments that are settings of an evaluation under the same names."""


def _objectives(arguments: argparse.Namespace) -> None:
    from infopo.workflows.objectives import list_objectives, show_objective

    if arguments.name is None:
        list_objectives()
    else:
        show_objective(arguments.name)


def _check(arguments: argparse.Namespace) -> None:
    tasks, data = cli_compare.tasks_and_data(arguments)
    _preflight(arguments.recipe, arguments.overrides, makes_a_run=False)
    from infopo.workflows.check import check

    check(arguments.recipe, arguments.overrides, tasks, data)
