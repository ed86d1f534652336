"""The processes that share a run: whether they have found each other, and what each run says of them at its start."""

import atexit
import functools
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from infopo.data.examples import ExampleDataset
from infopo.errors import ConfigError, InfoPOError
from infopo.output import counted
from infopo.records import Role

T = TypeVar("T")

_AS_LONG_AS_IT_TAKES = timedelta(days=30)

SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
"""What torchrun and the usual kinds of MPI say to the processes that they start."""


def launched() -> int:
    """Returns how many processes a launcher such as `torchrun` has started for this run, which is 1 without one."""
    sizes = (os.environ.get(name, "") for name in SIZES)
    return next((int(size) for size in sizes if size.isdecimal() and int(size) > 0), 1)


def is_first() -> bool:
    """Whether this process is the first of those that a launcher has started, or the only one."""
    return next((os.environ[name] for name in RANKS if name in os.environ), "0") == "0"


def must_use_cpu() -> bool:
    """Whether `use_cpu` has to be set for the ranks to find each other.

    transformers connects ranks through their accelerators. On a machine that has none it takes each rank for a run of
    its own unless `use_cpu` is set.
    """
    has_rank = any(name in os.environ for name in RANKS)
    return launched() > 1 and has_rank and not torch.accelerator.is_available()


def refuse_strangers(world_size: int) -> None:
    """Refuses ranks that have not found each other: each would train a copy of the model into the same directory.

    Args:
        world_size: Number of processes that the trainer sees.

    Raises:
        ConfigError: The launcher has started another number of processes, or was asked for more than it has started.
    """
    if launched() != world_size:
        raise ConfigError(
            f"WORLD_SIZE is {launched()} in the environment, but the trainer sees "
            f"{counted(world_size, 'process')}: each rank would train alone, into one output_dir. Start with "
            "torchrun or accelerate launch, with use_cpu=True if there is no accelerator, or unset WORLD_SIZE"
        )
    # accelerate names an address only if it is asked for several processes, and starts one all the same without MPI.
    if world_size == 1 and "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ:
        raise ConfigError(
            "accelerate launch was asked for several processes on CPUs, but starts only one unless it is given MPI "
            "(--mpirun_hostfile): use torchrun --nproc-per-node N, or --num_processes 1"
        )


@functools.cache
def leave_at_exit() -> None:
    """Has this process leave its process group before the interpreter is torn down, if the script does not do so.

    A thread of the group that still needs the interpreter then aborts the process, and the launcher takes a run that
    has succeeded for one that failed.
    """
    atexit.register(_leave)


def _leave() -> None:
    # After an error other ranks may be in the middle of a collective, and leaving could wait for them.
    if dist.is_available() and dist.is_initialized() and getattr(sys, "last_value", None) is None:
        dist.destroy_process_group()


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether a process holds a part of the training state only, as under FSDP and DeepSpeed.

    The processes then wait for each other in every pass.
    """
    plugins = ("fsdp_plugin", "deepspeed_plugin")
    return any(getattr(accelerator.state, name, None) is not None for name in plugins)


def has_all_weights(accelerator: Accelerator) -> bool:
    """Whether each process holds the whole model, so that it can sample from it. Under ZeRO-1 and 2 it does."""
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    return not is_sharded(accelerator) or (deepspeed is not None and int(deepspeed.zero_stage) < 3)


def from_first(function: Callable[[], T], args: TrainingArguments) -> T:
    """Returns, on all ranks, what `function` returns on the first, or raises its `InfoPOError`."""
    if args.world_size == 1:
        return function()
    outcome: list[Any] = [None]
    if args.process_index == 0:
        try:
            outcome = [function()]
        except InfoPOError as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], InfoPOError):
        raise outcome[0]
    return cast(T, outcome[0])


def number() -> int:
    """Number of processes that have found each other."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def from_first_of_machine(function: Callable[[], T]) -> T:
    """Returns what `function` gives on the first process of this machine, on all of its processes.

    The others wait for as long as it takes. If any of the first processes raises an `InfoPOError`, all raise it.
    """
    if number() == 1:
        return function()
    state = PartialState()
    outcome: Any = None
    if state.is_local_main_process:
        try:
            outcome = function()
        except InfoPOError as error:
            outcome = error
    outcomes = _exchanged(outcome)
    for each in outcomes:
        if isinstance(each, InfoPOError):
            raise each
    # Launchers number the processes of one machine after each other.
    return cast(T, outcomes[state.process_index - state.local_process_index])


def wait_for_each_other() -> None:
    """Returns when all processes have called this."""
    if number() > 1:
        _exchanged(None)


def _exchanged(value: Any) -> list[Any]:
    """Returns the value of each process, in the order of their ranks.

    The processes meet in a group of their own, which never gives up waiting: the limit of the run's own group is made
    for steps of training, and ends the run.
    """
    group = None
    if dist.is_gloo_available():
        group = dist.new_group(backend="gloo", timeout=_AS_LONG_AS_IT_TAKES)
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    if group is not None:
        dist.destroy_process_group(group)
    return values


def gathered(value: T, args: TrainingArguments) -> list[T]:
    """Returns what each rank passes, in the order of ranks. All ranks must call this."""
    return cast(list[T], gather_object([value])) if args.world_size > 1 else [value]


def largest(number: int, args: TrainingArguments) -> int:
    """Returns the largest of the numbers that ranks pass. All ranks must call this."""
    return max(gathered(number, args))


class StartLine(TrainerCallback):
    """Says once, on the first rank, what is about to run: `2 processes, cpu, float32, 20 steps of 32 pairs`.

    Args:
        say: Takes the line, as `print` does.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            dataset = kwargs["train_dataloader"].dataset
            self.say(start_line(args, state, _items(dataset), kwargs["model"].dtype))


def autocast_in_words(args: TrainingArguments) -> str:
    """Returns the end of a text that names the type of weights. DeepSpeed rounds the weights in place of autocast."""
    mixed = "bf16" if args.bf16 else "fp16" if args.fp16 else None
    return f" with {mixed} autocast" if mixed and args.deepspeed_plugin is None else ""


def start_line(args: TrainingArguments, state: TrainerState, items: str, dtype: torch.dtype) -> str:
    """Processes, device, precision, steps and rows per step, in one line.

    Args:
        args: Settings of the run.
        state: The trainer's state, as it is when training begins.
        items: What the rows of a step are called.
        dtype: Type of the weights.
    """
    precision = str(dtype).removeprefix("torch.") + autocast_in_words(args)
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    done = f", of which {state.global_step} are done" if state.global_step else ""
    processes = counted(args.world_size, "process")
    steps = counted(state.max_steps, "step")
    return f"{processes}, {args.device.type}, {precision}, {steps} of {rows} {items}{done}"


def _items(dataset: object) -> str:
    """`pairs` if every row has one chosen and one rejected response, else `rows`."""
    if not isinstance(dataset, ExampleDataset):
        return "rows"
    roles = dataset.roles[dataset.roles != int(Role.KL)]
    pairs = len(roles) == 2 * len(dataset) and all(
        int((roles == int(role)).sum()) == len(dataset) for role in (Role.CHOSEN, Role.REJECTED)
    )
    return "pairs" if pairs else "rows"
