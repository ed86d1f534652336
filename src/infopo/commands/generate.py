"""The command `generate`."""

import argparse
from typing import Any

from infopo.commands.shared import add_subject, importing, served


def add(commands: Any) -> None:
    """Adds the command."""
    generate = commands.add_parser(
        "generate",
        help="let a model answer prompts, on the terminal or into a file; two models with --against",
        description="Answers prompts as infopo evaluate asks its tasks. With --output, samples are kept beside the "
        "file, so that a killed command goes on, and infopo evaluate --responses and infopo winrate read it.",
    )
    add_subject(generate)
    generate.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be given again"
    )
    generate.add_argument(
        "--prompts",
        metavar="FILE",
        help="rows with a prompt (JSONL, CSV, Parquet, ..., or the hub), a .txt file with one a line, or -, standard "
        "input",
    )
    generate.add_argument("--output", metavar="FILE.jsonl", help="default: the terminal")
    generate.add_argument(
        "--against", metavar="MODEL", help="a second model, whose responses stand beside the first's"
    )
    generate.add_argument("--system", metavar="TEXT", help="system message")
    group = generate.add_argument_group("sampling")
    group.add_argument(
        "--num-samples", type=int, default=1, metavar="K", help="responses per prompt (default: 1)"
    )
    group.add_argument(
        "--temperature", type=float, metavar="T", help="default: 0 (greedy) for one sample, 1 for several"
    )
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default: %(default)s")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens of a response (default: 256)")
    group.add_argument(
        "--prompting", choices=("chat", "plain"), help="default: chat if the tokenizer has a chat template"
    )
    group.add_argument("--limit", type=int, metavar="N", help="the first N prompts")
    group.add_argument("--batch-size", type=int, default=32, metavar="N", help="default: %(default)s")
    group.add_argument("--seed", type=int, default=0, help="seed of the samples (default: %(default)s)")
    generate.set_defaults(run=_run, parser=generate)


_SETTINGS = (
    "num_samples", "temperature", "top_p", "max_new_tokens", "prompting", "limit", "batch_size", "seed", "dtype",
)  # fmt: skip


def _run(arguments: argparse.Namespace) -> None:
    from infopo.evaluation.settings import EvaluationSettings

    named = {name: getattr(arguments, name) for name in _SETTINGS}
    settings = EvaluationSettings(tasks=["generate"], server=served(arguments), **named)
    with importing():
        from infopo.workflows.generate import generate

    generate(
        arguments.model,
        settings,
        prompts=arguments.prompt,
        file=arguments.prompts,
        system=arguments.system,
        against=arguments.against,
        output=arguments.output,
    )
