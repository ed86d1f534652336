"""The commands `compare` and `winrate`: their arguments, and nothing else."""

import argparse
from typing import Any


def add_compare(commands: Any) -> None:
    """Adds the command `compare`."""
    compare = commands.add_parser(
        "compare",
        help="compare models on the items that both answered: tests, intervals, wins and losses",
        description="Compares each with the first, paired by item. An evaluation is a folder of infopo evaluate, a run "
        "directory, a file with a score per row (also of lm-evaluation-harness), or a file of responses.",
    )
    compare.add_argument("sources", nargs="+", metavar="EVALUATION", help="two or more")
    compare.add_argument("--tasks", default="", metavar="NAME,...", help="default: all that both have")
    compare.add_argument("--rule", metavar="RULE", help="mark by this rule (default: each task's headline)")
    compare.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="[TASK=]FILE",
        help="data of tasks that grade files of responses",
    )
    compare.add_argument(
        "--items", type=int, default=5, metavar="N", help="list N won and N lost items (default: %(default)s)"
    )
    compare.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default: %(default)s)")
    compare.add_argument(
        "--format", choices=("markdown", "json"), default="markdown", help="default: %(default)s"
    )
    compare.add_argument("--output", metavar="FILE", help="default: the terminal")
    compare.set_defaults(run=_compare, parser=compare)


def add_winrate(commands: Any) -> None:
    """Adds the command `winrate`."""
    winrate = commands.add_parser(
        "winrate",
        help="let a judge compare the responses of two models, in both orders",
        description="A and B are files of responses, folders of infopo evaluate, models, or `chosen` or `rejected` of "
        "the data in --prompts. Answers of the judge are kept, so that nothing is asked twice.",
    )
    winrate.add_argument("a", nargs="?", metavar="A", help="the model whose win rate is computed")
    winrate.add_argument("b", nargs="?", metavar="B", help="its opponent, e.g. chosen")
    winrate.add_argument(
        "--prompts", metavar="FILE", help="data with the prompts (default: those beside the responses)"
    )
    winrate.add_argument(
        "--judge", required=True, metavar="URL", help="an OpenAI-compatible server, or my_module:my_judge"
    )
    winrate.add_argument("--judge-model", metavar="NAME", help="default: the only model that the server has")
    winrate.add_argument(
        "--template", choices=("summaries", "dialogue", "chat"), default="chat", help="default: %(default)s"
    )
    winrate.add_argument(
        "--calibrate",
        metavar="FILE",
        help="compare the judge with people's votes (PandaLM's test set) instead of A with B",
    )
    winrate.add_argument("--limit", type=int, metavar="N", help="the first N prompts")
    winrate.add_argument("--output", metavar="DIR", help="default: infopo-winrate/A-against-B")
    winrate.add_argument(
        "--format",
        choices=("markdown", "json", "alpaca_eval"),
        default="markdown",
        help="default: %(default)s; alpaca_eval also writes what AlpacaEval reads",
    )
    winrate.add_argument(
        "--answer-tokens",
        type=int,
        default=400,
        metavar="N",
        help="largest number of tokens of an answer (default: %(default)s; judges that think need more)",
    )
    winrate.add_argument(
        "--yes", action="store_true", help="ask the judge without a question on the terminal"
    )
    winrate.add_argument(
        "--prices",
        type=float,
        nargs=2,
        metavar=("IN", "OUT"),
        help="price of a million tokens, for the estimate",
    )
    winrate.add_argument(
        "--key-variable",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable with the judge's key (default: %(default)s)",
    )
    winrate.add_argument(
        "--concurrency", type=int, default=8, metavar="N", help="requests at a time (default: %(default)s)"
    )
    winrate.add_argument(
        "--per-minute", type=float, metavar="N", help="largest number of requests per minute"
    )
    winrate.add_argument(
        "--timeout", type=float, default=300, metavar="S", help="seconds per request (default: %(default)s)"
    )
    winrate.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="of models (default: %(default)s)"
    )
    winrate.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="of models (default: 0, greedy)"
    )
    winrate.add_argument(
        "--seed", type=int, default=0, help="seed of samples and bootstrap (default: %(default)s)"
    )
    winrate.set_defaults(run=_winrate, parser=winrate)


def _compare(arguments: argparse.Namespace) -> None:
    tasks, data = tasks_and_data(arguments)
    from infopo.workflows.compare import compare

    compare(
        arguments.sources,
        tasks,
        data=data,
        rule=arguments.rule,
        seed=arguments.seed,
        format=arguments.format,
        output=arguments.output,
        items=arguments.items,
    )


def _winrate(arguments: argparse.Namespace) -> None:
    if (arguments.calibrate is None) == (arguments.a is None) or (arguments.a is None) != (
        arguments.b is None
    ):
        arguments.parser.error("expected A and B, or --calibrate FILE")
    from infopo.workflows.ask_judge import JudgeSettings

    judge = JudgeSettings(
        arguments.judge,
        arguments.judge_model,
        template=arguments.template,
        key_variable=arguments.key_variable,
        concurrency=arguments.concurrency,
        per_minute=arguments.per_minute,
        timeout=arguments.timeout,
        answer_tokens=arguments.answer_tokens,
        prices=tuple(arguments.prices) if arguments.prices else None,
        yes=arguments.yes,
    )
    shared = {"limit": arguments.limit, "output": arguments.output, "format": arguments.format}
    if arguments.calibrate is not None:
        from infopo.workflows.calibrate import calibrate

        calibrate(arguments.calibrate, judge, **shared)
        return
    from infopo.workflows.winrate import SamplingSettings, winrate

    sampling = SamplingSettings(arguments.max_new_tokens, arguments.temperature, arguments.seed)
    winrate(arguments.a, arguments.b, judge, prompts=arguments.prompts, sampling=sampling, **shared)


def tasks_and_data(arguments: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """Returns the names of --tasks, and the files of --data by task."""
    tasks = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    data = {}
    for given in arguments.data:
        name, found, path = given.partition("=")
        if name in tasks and found:
            data[name] = path
        elif len(tasks) == 1:
            data[tasks[0]] = given
        else:
            arguments.parser.error(f"--data {given}: expected TASK=FILE, with one of the names in --tasks")
    return tasks, data
