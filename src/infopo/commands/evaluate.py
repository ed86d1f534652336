"""The command `evaluate`."""

import argparse
from typing import Any

from infopo.commands.shared import (
    add_code_execution,
    add_sampling,
    add_shard,
    add_subject,
    importing,
    sampling_settings,
    tasks_and_data,
)


def add(commands: Any) -> None:
    """Adds the command."""
    evaluate = commands.add_parser(
        "evaluate",
        help="ask a model the items of tasks and mark the answers: reasoning, code, the lab",
        description="Asks a model the items of tasks, marks the answers by named rules, and writes eval.json. Samples "
        "are kept, so that a killed evaluation goes on where it stood.",
    )
    add_subject(evaluate)
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
    evaluate.add_argument(
        "--num-samples", type=int, default=1, metavar="K", help="responses per item (default: 1)"
    )
    add_shard(evaluate)
    add_sampling(evaluate, temperature=None)
    add_code_execution(evaluate)
    evaluate.set_defaults(run=_run, parser=evaluate)


def _run(arguments: argparse.Namespace) -> None:
    tasks, data = tasks_and_data(arguments)
    settings = sampling_settings(
        arguments, tasks, data=data, num_samples=arguments.num_samples, include_path=arguments.include_path
    )
    with importing():
        from infopo.workflows.evaluate import evaluate

    evaluate(arguments.model, settings, output=arguments.output, responses=arguments.responses)
