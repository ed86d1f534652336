"""The command `pairs`."""

import argparse
from typing import Any

from infopo.commands.shared import (
    add_code_execution,
    add_sampling,
    add_shard,
    add_subject,
    importing,
    refuse_unread,
    sampling_settings,
)

_PAIRING = (
    "rule", "pairs_per_prompt", "threshold", "min_pass_rate", "max_pass_rate", "reject_unfinished", "seed",
)  # fmt: skip


def add(commands: Any) -> None:
    """Adds the command."""
    pairs = commands.add_parser(
        "pairs",
        help="make preference data from a model's own samples: sample, verify, pair",
        description="Samples a model, marks the samples, and writes pairs that infopo train and TRL read. Samples are "
        "kept beside the output, so that a killed command goes on and other pairs cost no sampling.",
    )
    add_subject(pairs)
    pairs.add_argument(
        "--prompts", metavar="FILE", help="problems of the verifier's task, rows with a prompt, or lab"
    )
    pairs.add_argument(
        "--samples", metavar="FILE", help="pair the samples of this file in place of a model's"
    )
    pairs.add_argument("--output", default="pairs.jsonl", metavar="FILE", help="default: %(default)s")
    pairs.add_argument(
        "--num-generations",
        "--num-samples",
        type=int,
        default=8,
        metavar="K",
        help="samples per prompt (default: %(default)s)",
    )
    pairs.add_argument(
        "--skip",
        type=int,
        default=0,
        metavar="N",
        help="leave out the first N prompts (default: %(default)s)",
    )
    add_shard(pairs)
    _add_verifying(pairs)
    _add_pairing(pairs)
    add_sampling(pairs, temperature=1.0)
    pairs.set_defaults(run=_run, parser=pairs)


def _add_verifying(pairs: argparse.ArgumentParser) -> None:
    group = pairs.add_argument_group("verifier")
    group.add_argument(
        "--verifier",
        required=True,
        metavar="NAME",
        help="a task (gsm8k, lab, ...), my_module:my_reward, reward:MODEL or judge:URL",
    )
    group.add_argument(
        "--judge-model", metavar="NAME", help="of judge:URL (default: the only model that it serves)"
    )
    group.add_argument(
        "--template",
        choices=("summaries", "dialogue", "chat"),
        default="chat",
        help="what judge:URL looks at (default: %(default)s)",
    )
    group.add_argument("--yes", action="store_true", help="ask judge:URL as often as it takes")
    add_code_execution(pairs)


def _add_pairing(pairs: argparse.ArgumentParser) -> None:
    group = pairs.add_argument_group("pairs")
    group.add_argument(
        "--rule",
        default="random",
        metavar="RULE",
        help="random, best-worst, longest-prefix, length-matched or lists (default: %(default)s)",
    )
    group.add_argument(
        "--pairs-per-prompt", type=int, default=1, metavar="N", help="at most so many (default: %(default)s)"
    )
    group.add_argument(
        "--threshold", type=float, metavar="SCORE", help="score from which a response is right"
    )
    group.add_argument(
        "--min-pass-rate",
        type=float,
        metavar="P",
        help="leave out prompts with a smaller share of right samples",
    )
    group.add_argument("--max-pass-rate", type=float, metavar="P", help="leave out prompts with a larger one")
    group.add_argument(
        "--reject-unfinished", action="store_true", help="let responses that were cut off be rejected"
    )


def _run(arguments: argparse.Namespace) -> None:
    if arguments.samples is not None:
        refuse_unread(arguments, ("num_generations",), "--samples, of which all are paired")
    settings = sampling_settings(arguments, [arguments.verifier], num_samples=arguments.num_generations)
    from infopo.evaluation.pairing import PairingSettings
    from infopo.workflows.ask_judge import JudgeSettings

    with importing():
        from infopo.workflows.pairs import pairs

    judge = None
    if not arguments.verifier.startswith("judge:"):
        refuse_unread(arguments, ("judge_model", "template"), f"the verifier {arguments.verifier}")
    else:
        target = arguments.verifier.removeprefix("judge:")
        judge = JudgeSettings(target, arguments.judge_model, arguments.template, yes=arguments.yes)
    pairing = PairingSettings(**{name: getattr(arguments, name) for name in _PAIRING})
    pairs(
        arguments.model,
        arguments.verifier,
        settings,
        pairing,
        prompts=arguments.prompts,
        skip=arguments.skip,
        samples=arguments.samples,
        judge=judge,
        output=arguments.output,
    )
