"""The command `docs`."""

import argparse
import pydoc
import sys
from typing import Any

from infopo.output import say


def add(commands: Any) -> None:
    """Adds the command."""
    docs = commands.add_parser(
        "docs",
        help="list the pages of the documentation; with a name, show one",
        description="Lists the pages of the documentation of this version, or shows one: infopo docs data. On a "
        "terminal $PAGER or less shows it. Elsewhere it is written as it is, in Markdown.",
    )
    docs.add_argument("page", nargs="?", metavar="PAGE", help="e.g. data")
    docs.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from infopo.shipped import page, pages

    if arguments.page is not None:
        text = page(arguments.page).text
        if sys.stdout.isatty():
            pydoc.pager(text)
        else:
            sys.stdout.write(text)
        return
    found = pages()
    width = max(len(each.name) for each in found)
    say(*(f"{each.name:{width}}  {each.title}" for each in found))
    say("", "infopo docs PAGE shows one.")
