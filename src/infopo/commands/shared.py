"""Arguments that several commands take, and what is read from them."""

import argparse
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def importing() -> Iterator[None]:
    """Imports torch and transformers within it in a tenth less time, without looking for garbage among their objects.

    They create half a million objects, all of which stay. Each full collection meanwhile goes through those that are
    there and frees nothing.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def checked(
    recipe: str, overrides: Sequence[str], *, makes_a_run: bool = True, section: str | None = None
) -> None:
    """Reports what is wrong with a recipe before torch is loaded, which takes seconds."""
    from infopo import preflight

    preflight.preflight(recipe, overrides, makes_a_run=makes_a_run, section=section)


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


def refuse_unread(arguments: argparse.Namespace, names: Sequence[str], where: str) -> None:
    """Ends with an error if one of these arguments was given, to which nothing applies that the command does.

    Args:
        arguments: What was parsed.
        names: Names of arguments. One that has its default is taken for not given.
        where: To what they do not apply.
    """
    parser = arguments.parser
    given = [name for name in names if getattr(arguments, name) != parser.get_default(name)]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        parser.error(f"{options}: {'does' if len(given) == 1 else 'do'} not apply to {where}")


def served(arguments: argparse.Namespace) -> Any:
    """Returns the ServerSettings of a command that takes `add_subject`, or None if the model is loaded."""
    from infopo.evaluation.server import ServerSettings

    if arguments.server is None:
        refuse_unread(arguments, ("concurrency",), "a model that no --server serves")
        return None
    return ServerSettings(arguments.server, arguments.model, concurrency=arguments.concurrency)


def add_subject(command: argparse.ArgumentParser) -> None:
    """Adds the model that is asked, here or on a server."""
    command.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="local folder, adapter, run directory, hub name or lab:policy",
    )
    group = command.add_argument_group("model")
    group.add_argument(
        "--server",
        metavar="URL",
        help="ask an OpenAI-compatible server (vLLM, SGLang), e.g. http://localhost:8000/v1; MODEL is its name there",
    )
    group.add_argument(
        "--concurrency",
        type=int,
        default=8,
        metavar="N",
        help="requests to the server at a time (default: 8)",
    )
    group.add_argument(
        "--dtype", default="auto", metavar="TYPE", help="auto (as saved), float32, bfloat16 or float16"
    )


def add_sampling(command: argparse.ArgumentParser, *, temperature: float | None) -> None:
    """Adds how responses are drawn.

    Args:
        command: The command.
        temperature: Its default. None means greedy decoding for one sample, and 1 for several.
    """
    group = command.add_argument_group("sampling")
    described = (
        "default: 0 (greedy) for one sample, 1 for several" if temperature is None else "default: %(default)s"
    )
    group.add_argument("--temperature", type=float, default=temperature, metavar="T", help=described)
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default: %(default)s")
    group.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="tokens of a response (default: that of the task, else 512)",
    )
    group.add_argument(
        "--prompting", choices=("chat", "plain"), help="default: chat if the tokenizer has a chat template"
    )
    group.add_argument(
        "--num-fewshot",
        type=int,
        default=0,
        metavar="N",
        help="worked examples before each problem (default: 0)",
    )
    group.add_argument("--limit", type=int, metavar="N", help="the first N problems of each task")
    group.add_argument("--batch-size", type=int, default=32, metavar="N", help="default: %(default)s")
    group.add_argument("--seed", type=int, default=0, help="seed of the samples (default: %(default)s)")


def add_code_execution(command: argparse.ArgumentParser) -> None:
    """Adds whether, and how isolated, code that the model wrote may run."""
    group = command.add_argument_group("code that the model wrote")
    group.add_argument(
        "--allow-code-execution", action="store_true", help="run code that the model wrote, in a sandbox"
    )
    group.add_argument(
        "--isolation",
        default="uid",
        metavar="LEVEL",
        help="the weakest isolation that such code may run at: namespaces, uid (the default), or none, if this machine "
        "may be thrown away",
    )


def add_shard(command: argparse.ArgumentParser) -> None:
    """Adds the share of the samples that this process draws."""
    command.add_argument(
        "--shard", metavar="I/N", help="draw the I-th of N shares of the samples, and mark nothing"
    )


_SAMPLING = (
    "limit", "temperature", "top_p", "max_new_tokens", "prompting", "num_fewshot", "batch_size", "seed", "dtype",
    "allow_code_execution", "isolation",
)  # fmt: skip
"""Arguments of the functions above that are settings of an evaluation under the same names."""


def sampling_settings(arguments: argparse.Namespace, tasks: Sequence[str], **others: Any) -> Any:
    """Returns the EvaluationSettings of a command that takes the arguments above.

    Args:
        arguments: What was parsed.
        tasks: Names of tasks.
        others: Settings that have no argument above.
    """
    shard = _shard(arguments.shard, arguments.parser)
    from infopo.evaluation.settings import EvaluationSettings

    named = {name: getattr(arguments, name) for name in _SAMPLING}
    return EvaluationSettings(tasks=tasks, shard=shard, server=served(arguments), **named, **others)


def _shard(text: str | None, parser: argparse.ArgumentParser) -> tuple[int, int] | None:
    """Returns the numbers of `I/N`."""
    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal()):
        parser.error(f"--shard: expected I/N such as 1/4, got {text!r}")
    return int(number), int(count)
