"""The command `pairs`: its arguments, and nothing else."""

import argparse
from typing import Any

_SAMPLING = (
    "limit", "temperature", "top_p", "max_new_tokens", "prompting", "num_fewshot", "batch_size", "seed", "dtype",
    "allow_code_execution", "isolation",
)  # fmt: skip

_PAIRING = (
    "rule", "pairs_per_prompt", "threshold", "min_pass_rate", "max_pass_rate", "reject_unfinished", "seed",
)  # fmt: skip


def add_pairs(commands: Any) -> None:
    """Adds the command `pairs`."""
    pairs = commands.add_parser(
        "pairs",
        help="make preference data from a model's own samples: sample, verify, pair",
        description="Samples a model, marks the samples, and writes pairs that infopo train and TRL read. Samples are "
        "kept beside the output, so that a killed command goes on and other pairs cost no sampling.",
    )
    pairs.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="local folder, adapter, run directory, hub name or lab:policy",
    )
    pairs.add_argument(
        "--prompts", metavar="FILE", help="problems of the verifier's task, rows with a prompt, or lab"
    )
    pairs.add_argument(
        "--verifier",
        required=True,
        metavar="NAME",
        help="a task (gsm8k, lab, ...), my_module:my_reward, reward:MODEL or judge:URL",
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
        "--rule",
        default="random",
        metavar="RULE",
        help="random, best-worst, longest-prefix, length-matched or lists (default: %(default)s)",
    )
    pairs.add_argument(
        "--pairs-per-prompt", type=int, default=1, metavar="N", help="at most so many (default: %(default)s)"
    )
    pairs.add_argument(
        "--threshold", type=float, metavar="SCORE", help="score from which a response is right"
    )
    pairs.add_argument(
        "--min-pass-rate",
        type=float,
        metavar="P",
        help="leave out prompts with a smaller share of right samples",
    )
    pairs.add_argument("--max-pass-rate", type=float, metavar="P", help="leave out prompts with a larger one")
    pairs.add_argument(
        "--reject-unfinished", action="store_true", help="let responses that were cut off be rejected"
    )
    pairs.add_argument("--limit", type=int, metavar="N", help="the first N prompts")
    pairs.add_argument("--temperature", type=float, default=1.0, metavar="T", help="default: %(default)s")
    pairs.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default: %(default)s")
    pairs.add_argument("--max-new-tokens", type=int, metavar="N", help="default: that of the task, else 512")
    pairs.add_argument(
        "--prompting", choices=("chat", "plain"), help="default: chat if the tokenizer has a chat template"
    )
    pairs.add_argument(
        "--num-fewshot", type=int, default=0, metavar="N", help="worked examples before each prompt"
    )
    pairs.add_argument("--batch-size", type=int, default=32, metavar="N", help="default: %(default)s")
    pairs.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    pairs.add_argument(
        "--dtype", default="auto", metavar="TYPE", help="auto (as saved), float32, bfloat16 or float16"
    )
    pairs.add_argument("--shard", metavar="I/N", help="draw a share of the samples only")
    pairs.add_argument(
        "--server", metavar="URL", help="ask an OpenAI-compatible server; MODEL is its name there"
    )
    pairs.add_argument(
        "--concurrency", type=int, default=16, metavar="N", help="requests to the server at a time"
    )
    pairs.add_argument(
        "--allow-code-execution", action="store_true", help="let verifiers run code that the model wrote"
    )
    pairs.add_argument(
        "--isolation", default="uid", metavar="LEVEL",
        help="the weakest isolation that such code may run at: namespaces, uid (the default) or none",
    )  # fmt: skip
    pairs.add_argument(
        "--judge-model", metavar="NAME", help="of judge:URL (default: the only model that it serves)"
    )
    pairs.add_argument(
        "--template", choices=("summaries", "dialogue", "chat"), default="chat",
        help="what judge:URL looks at (default: %(default)s)",
    )  # fmt: skip
    pairs.add_argument("--yes", action="store_true", help="ask judge:URL as often as it takes")
    pairs.set_defaults(run=_pairs, parser=pairs)


def shard_in(text: str | None, parser: argparse.ArgumentParser) -> tuple[int, int] | None:
    """Returns the numbers of `I/N`."""
    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal()):
        parser.error(f"--shard: expected I/N such as 1/4, got {text!r}")
    return int(number), int(count)


def _pairs(arguments: argparse.Namespace) -> None:
    shard = shard_in(arguments.shard, arguments.parser)
    from infopo.evaluation.pairing import PairingSettings
    from infopo.evaluation.server import ServerSettings
    from infopo.evaluation.settings import EvaluationSettings
    from infopo.workflows.ask_judge import JudgeSettings
    from infopo.workflows.pairs import pairs

    judge = None
    if arguments.verifier.startswith("judge:"):
        target = arguments.verifier.removeprefix("judge:")
        judge = JudgeSettings(target, arguments.judge_model, arguments.template, yes=arguments.yes)
    server = None
    if arguments.server is not None:
        server = ServerSettings(arguments.server, arguments.model, concurrency=arguments.concurrency)
    settings = EvaluationSettings(
        tasks=[arguments.verifier],
        num_samples=arguments.num_generations,
        shard=shard,
        server=server,
        **{name: getattr(arguments, name) for name in _SAMPLING},
    )
    pairing = PairingSettings(**{name: getattr(arguments, name) for name in _PAIRING})
    pairs(arguments.model, arguments.verifier, settings, pairing, prompts=arguments.prompts,
          samples=arguments.samples, judge=judge, output=arguments.output)  # fmt: skip
