"""The command `winrate`."""

import argparse
from typing import Any

from infopo.commands.shared import importing, refuse_unread

_JUDGE = ("template", "key_variable", "concurrency", "per_minute", "timeout", "answer_tokens", "yes")
"""Arguments that are settings of a judge under the same names."""

_OF_SIDES = ("prompts", "max_new_tokens", "temperature", "seed")
"""Arguments that are of A and B alone."""


def add(commands: Any) -> None:
    """Adds the command."""
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
        "--max-new-tokens", type=int, default=256, metavar="N", help="of models (default: %(default)s)"
    )
    winrate.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="of models (default: 0, greedy)"
    )
    winrate.add_argument(
        "--seed", type=int, default=0, help="seed of samples and bootstrap (default: %(default)s)"
    )
    _add_judge(winrate)
    winrate.set_defaults(run=_run, parser=winrate)


def _add_judge(winrate: argparse.ArgumentParser) -> None:
    group = winrate.add_argument_group("judge")
    group.add_argument(
        "--judge", required=True, metavar="URL", help="an OpenAI-compatible server, or my_module:my_judge"
    )
    group.add_argument("--judge-model", metavar="NAME", help="default: the only model that the server has")
    group.add_argument(
        "--template", choices=("summaries", "dialogue", "chat"), default="chat", help="default: %(default)s"
    )
    group.add_argument(
        "--answer-tokens",
        type=int,
        default=400,
        metavar="N",
        help="largest number of tokens of an answer (default: %(default)s; judges that think need more)",
    )
    group.add_argument("--yes", action="store_true", help="ask the judge without a question on the terminal")
    group.add_argument(
        "--prices",
        type=float,
        nargs=2,
        metavar=("IN", "OUT"),
        help="price of a million tokens, for the estimate",
    )
    group.add_argument(
        "--key-variable",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable with the judge's key (default: %(default)s)",
    )
    group.add_argument(
        "--concurrency", type=int, default=8, metavar="N", help="requests at a time (default: %(default)s)"
    )
    group.add_argument("--per-minute", type=float, metavar="N", help="largest number of requests per minute")
    group.add_argument(
        "--timeout", type=float, default=300, metavar="S", help="seconds per request (default: %(default)s)"
    )


def _run(arguments: argparse.Namespace) -> None:
    if (arguments.calibrate is None) == (arguments.a is None) or (arguments.a is None) != (
        arguments.b is None
    ):
        arguments.parser.error("expected A and B, or --calibrate FILE")
    if arguments.calibrate is not None:
        refuse_unread(arguments, _OF_SIDES, "--calibrate")
    from infopo.workflows.ask_judge import JudgeSettings

    judge = JudgeSettings(
        arguments.judge,
        arguments.judge_model,
        prices=tuple(arguments.prices) if arguments.prices else None,
        **{name: getattr(arguments, name) for name in _JUDGE},
    )
    shared = {"limit": arguments.limit, "output": arguments.output, "format": arguments.format}
    if arguments.calibrate is not None:
        with importing():
            from infopo.workflows.calibrate import calibrate

        calibrate(arguments.calibrate, judge, **shared)
        return
    with importing():
        from infopo.workflows.winrate import SamplingSettings, winrate

    sampling = SamplingSettings(arguments.max_new_tokens, arguments.temperature, arguments.seed)
    winrate(arguments.a, arguments.b, judge, prompts=arguments.prompts, sampling=sampling, **shared)
