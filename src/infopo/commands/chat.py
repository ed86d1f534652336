"""The command `chat`."""

import argparse
from typing import Any

from infopo.commands.shared import importing


def add(commands: Any) -> None:
    """Adds the command."""
    chat = commands.add_parser(
        "chat",
        help="talk with a model in the terminal, or with two at once",
        description="Talks with a model. With --against, a second one gets the same messages, and the answers stand "
        "one below the other. /reset, /system TEXT, /save FILE and /quit are commands; Ctrl-C stops an answer.",
    )
    chat.add_argument("model", metavar="MODEL", help="run directory, adapter, folder, hub name or lab:policy")
    chat.add_argument("--against", metavar="MODEL", help="a second model")
    chat.add_argument("--system", metavar="TEXT", help="system message")
    chat.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="default: 0, the most likely token"
    )
    chat.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default: %(default)s")
    chat.add_argument(
        "--max-new-tokens",
        type=int,
        default=512,
        metavar="N",
        help="tokens of an answer (default: %(default)s)",
    )
    chat.add_argument(
        "--prompting", choices=("chat", "plain"), help="default: chat if the tokenizer has a chat template"
    )
    chat.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    chat.add_argument(
        "--dtype", default="auto", metavar="TYPE", help="auto (as saved), float32, bfloat16 or float16"
    )
    chat.set_defaults(run=_run, parser=chat)


def _run(arguments: argparse.Namespace) -> None:
    from infopo.evaluation.law import Law

    law = Law(arguments.max_new_tokens, arguments.temperature, arguments.top_p)
    with importing():
        from infopo.workflows.chat import chat

    chat(
        arguments.model,
        against=arguments.against,
        system=arguments.system,
        law=law,
        prompting=arguments.prompting,
        seed=arguments.seed,
        dtype=arguments.dtype,
    )
