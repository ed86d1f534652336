"""The command line: it finds the command, runs it and prints errors. Commands stand in `infopo.commands`."""

import argparse
import atexit
import contextlib
import io
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

from infopo import __version__
from infopo.commands import (
    chat,
    compare,
    completion,
    convert_recipe,
    demo,
    docs,
    doctor,
    evaluate,
    export,
    generate,
    init,
    objectives,
    pairs,
    recipes,
    reference,
    report,
    rounds,
    sweep,
    train,
    winrate,
)
from infopo.durable import with_home
from infopo.errors import InfoPOError
from infopo.output import say, shown
from infopo.secrets import masked_argument

COMMANDS = (
    demo,
    init,
    recipes,
    convert_recipe,
    train,
    reference,
    report,
    generate,
    chat,
    export,
    evaluate,
    compare,
    winrate,
    pairs,
    rounds,
    sweep,
    objectives,
    docs,
    doctor,
    completion,
)
"""Modules of commands, in the order of `infopo --help`."""

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
    _replace_home(arguments)
    status = _run(arguments)
    if os.environ.get("WORLD_SIZE", "") not in ("", "1"):
        _end_process(status)
    return status


def _replace_home(arguments: argparse.Namespace) -> None:
    """Replaces `~` at the beginning of what is no text for a model, since no shell does behind `--option=`."""
    for name, value in vars(arguments).items():
        if name in ("prompt", "system"):
            continue
        if isinstance(value, str):
            setattr(arguments, name, with_home(value))
        elif isinstance(value, list):
            setattr(arguments, name, [_home_in(each) for each in value])


def _home_in(value: Any) -> Any:
    """Returns one of several values with its `~` replaced, which may stand behind `TASK=`."""
    if not isinstance(value, str):
        return value
    key, equals, path = value.rpartition("=")
    return f"{key}{equals}{with_home(path)}" if key.isidentifier() or not equals else with_home(value)


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
    for module in COMMANDS:
        module.add(commands)
    parser.set_defaults(root=parser)
    return parser
