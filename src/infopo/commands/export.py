"""The command `export`."""

import argparse
from typing import Any

from infopo.commands.shared import importing, refuse_unread


def add(commands: Any) -> None:
    """Adds the command."""
    export = commands.add_parser(
        "export",
        help="write a model that transformers loads on its own: adapter merged, model card, optionally uploaded",
        description="Merges an adapter into its base, or copies a full model, and writes safetensors, tokenizer, chat "
        "template, generation settings and the model card into one folder, without anything private of the run.",
    )
    export.add_argument("model", metavar="RUN", help="run directory, checkpoint, adapter, folder or hub name")
    export.add_argument("--output", metavar="DIR", help="default: RUN-export")
    export.add_argument(
        "--dtype",
        default="auto",
        metavar="TYPE",
        help="type of the weights: auto (as in the files), float32, bfloat16 or float16",
    )
    export.add_argument(
        "--push-to-hub", metavar="NAME", help="upload it to this repository, e.g. my-org/my-model"
    )
    export.add_argument("--private", action="store_true", help="make the repository private if it is new")
    export.set_defaults(run=_run, parser=export)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.push_to_hub is None:
        refuse_unread(arguments, ("private",), "an export that no --push-to-hub uploads")
    with importing():
        from infopo.workflows.export import export

    export(
        arguments.model,
        output=arguments.output,
        dtype=arguments.dtype,
        push_to_hub=arguments.push_to_hub,
        private=arguments.private,
    )
