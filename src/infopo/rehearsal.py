"""Settings that fail when training begins, tried before anything is read: optimizer, schedule, trackers, workers."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, get_scheduler
from transformers.integrations import get_available_reporting_integrations

from infopo.arguments import REFUSALS, InfoPOConfig
from infopo.errors import ConfigError
from infopo.reference_store import check_folder

_WITH_MODEL = {"params", "model", "optimizer_dict"}
"""Arguments of optimizers that are made for the parameters of one model, which a rehearsal has not."""


def refuse(args: InfoPOConfig, trainer: type[Trainer], *, given: tuple[bool, bool] = (False, False)) -> None:
    """Refuses settings that transformers would refuse when training begins, after the reference was computed.

    Args:
        args: The settings.
        trainer: The trainer's class, which may make an optimizer or a schedule of its own.
        given: Whether the optimizer, and the schedule, come from the caller.

    Raises:
        ConfigError: They cannot be carried out on this machine.
    """
    problems = [
        *_folder_problems(args),
        *tracker_problems(args),
        *worker_problems(args),
        *compile_problems(args),
    ]
    if not given[0] and args.deepspeed_plugin is None and _is_ours(trainer, "create_optimizer"):
        makes_schedule = not given[1] and _is_ours(trainer, "create_scheduler")
        problems += optimizer_problems(args, with_schedule=makes_schedule)
    if problems:
        raise ConfigError(problems)


def _is_ours(trainer: type[Trainer], method: str) -> bool:
    names = (method, "create_optimizer_and_scheduler")
    return all(getattr(trainer, name).__module__.startswith(("transformers.", "infopo.")) for name in names)


def _folder_problems(args: InfoPOConfig) -> list[str]:
    """Makes the folder that the run writes to, as the trainer will do, and returns why it cannot be made."""
    if args.output_dir == "":
        return ["output_dir: is empty; expected a folder"]
    if args.output_dir is not None and (problem := check_folder(Path(args.output_dir))):
        return [f"output_dir: {problem}"]
    try:
        if args.should_save and args.output_dir is not None:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return [f"output_dir: {args.output_dir!r} cannot be made: {error.strerror}"]
    return []


def compile_problems(args: InfoPOConfig) -> list[str]:
    """Has torch judge the backend and the mode of `torch_compile`. Nothing is compiled before a first call."""
    if not args.torch_compile:
        return []
    backend = args.torch_compile_backend or "inductor"
    try:
        torch.compile(torch.nn.Linear(1, 1), backend=backend, mode=args.torch_compile_mode)
    except REFUSALS as error:
        text = str(error).partition(chr(10))[0]
        return [
            f"torch_compile: torch refuses its backend {backend!r} or mode {args.torch_compile_mode!r}: {text}"
        ]
    return []


def tracker_problems(args: InfoPOConfig) -> list[str]:
    """Returns a sentence for each tracker that is not there."""
    installed = get_available_reporting_integrations()
    return [
        f"report_to: {name!r} is unknown or not installed; installed are {', '.join(installed) or 'none'}"
        for name in args.report_to or []
        if name != "none" and name not in installed
    ]


def worker_problems(args: InfoPOConfig) -> list[str]:
    """Returns what is wrong with the workers of the data loader."""
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        return ["dataloader_persistent_workers: there are no workers; set dataloader_num_workers"]
    return []


def optimizer_problems(args: InfoPOConfig, *, with_schedule: bool = True) -> list[str]:
    """Builds optimizer and schedule of a single number, and returns why they cannot be built."""
    name = args.optim.value
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, torch.nn.Linear(1, 1))
        if _WITH_MODEL & settings.keys():
            return []
        optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **settings)
    except REFUSALS as error:
        # With `optim_target_modules`, modules are looked for that a single number does not have.
        if args.optim_target_modules is not None and not isinstance(error, ImportError):
            return []
        return [f"optim: {name} cannot be built: {error}"]
    problems = [
        f"optim_args: {argument!r} changes nothing with optim={name!r}; leave it out"
        for argument in _without_effect(args, settings)
    ]
    if not with_schedule:
        return problems
    return problems + _schedule_problems(args, optimizer)


def _schedule_problems(args: InfoPOConfig, optimizer: torch.optim.Optimizer) -> list[str]:
    name, given = args.lr_scheduler_type.value, args.lr_scheduler_kwargs

    def build(settings: Any) -> None:
        get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(10), 10, settings)

    try:
        build(given)
    except REFUSALS as error:
        return [f"lr_scheduler_type: {name} cannot be built with lr_scheduler_kwargs as it is: {error}"]
    if isinstance(given, dict) and given:
        with contextlib.suppress(*REFUSALS):
            build({"no schedule has this": 0})
            return [
                f"lr_scheduler_kwargs: {given} changes nothing with lr_scheduler_type={name!r}; leave it out"
            ]
    return []


def _without_effect(args: InfoPOConfig, settings: dict[str, Any]) -> Iterator[str]:
    """Yields arguments of the optimizer that change nothing; transformers drops those that it does not know.

    One that has the value which it would have anyway has an effect with another value, and is not meant.
    """

    def settings_with(pairs: Sequence[str]) -> Any:
        others = copy.copy(args)
        others.optim_args = ",".join(pairs) or None
        try:
            return Trainer.get_optimizer_cls_and_kwargs(others, torch.nn.Linear(1, 1))[1]
        except REFUSALS:
            return None

    pairs = [pair for pair in (args.optim_args or "").replace(" ", "").split(",") if pair]
    for i, pair in enumerate(pairs):
        left = (*pairs[:i], *pairs[i + 1 :])
        if settings_with(left) == settings_with([*left, f"{pair}1"]) == settings:
            yield pair
