"""The command `completion`."""

import argparse
import re
from collections.abc import Iterator
from typing import Any

SHELLS = ("bash", "zsh", "fish", "tcsh")

_HOW = {
    "bash": "infopo completion bash > ~/.local/share/bash-completion/completions/infopo",
    "zsh": "infopo completion zsh > ~/.zfunc/_infopo      (with fpath+=~/.zfunc before compinit in ~/.zshrc)",
    "fish": "infopo completion fish > ~/.config/fish/completions/infopo.fish",
    "tcsh": "infopo completion tcsh > ~/.infopo.completion.csh      (source it in ~/.tcshrc)",
}


def add(commands: Any) -> None:
    """Adds the command."""
    completion = commands.add_parser(
        "completion",
        help="print what lets a shell complete commands, options and files",
        description="Prints a script for a shell:\n" + "\n".join(f"  {line}" for line in _HOW.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    completion.add_argument("shell", choices=SHELLS)
    completion.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    import shtab

    for action in _actions(arguments.root):
        names = action.metavar if isinstance(action.metavar, str) else ""
        if re.search(r"FILE|RECIPE|RUN|MODEL|DATA|\bDIR\b|RESULT", names):
            action.complete = shtab.DIRECTORY if names == "DIR" else shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(arguments.root, arguments.shell).rstrip("\n"))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yields the arguments of a parser and of all its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
