"""Decides and checks, before the first update, how log-probs are computed, and whether they can be trusted.

These functions have no state. `InfoPOTrainer` calls them.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import Tensor, nn

from infopo import models, ranks, sharding
from infopo.arguments import InfoPOConfig
from infopo.data.examples import ExampleDataset
from infopo.data.packing import PreferenceCollator, pack, select
from infopo.data.streaming import ExampleStream
from infopo.errors import (
    ConfigError,
    LogpsError,
    ModelError,
    ReferenceMismatchError,
    UnsupportedArgumentError,
)
from infopo.logps import attention, lm_head, rope
from infopo.logps.compiling import compiled
from infopo.logps.forward import (
    DISAGREEMENT,
    PLANS,
    path_of,
    prepare,
    response_lengths,
    response_logps,
    rows_apart,
    self_test,
)
from infopo.logps.rounding import moved_by_rounding
from infopo.logps.wrappers import adapter_moved, base_of
from infopo.noise import evaluating, first_difference
from infopo.noise import in_training as noise_free_training
from infopo.output import counted, get_logger
from infopo.records import PackedBatch, PreferenceExample
from infopo.reference import tolerance

logger = get_logger(__name__)

CPU_TOKENS_PER_FORWARD = 2048
"""Default of `max_tokens_per_forward` on a CPU. benchmarks/LOG.md says what it saves, and that it costs no time."""
SELF_TEST_TOKENS = 256
LEAST_PROBED = 16
"""Least number of tokens of the self-test's longest response."""

_PATH_IN_WORDS = {
    "forest": "each prompt once, without padding",
    "padded": "one padded row per response",
    "naive": "one padded row per response, logits of every position",
}


def choose_path(policy: nn.Module, ref_model: nn.Module | None, args: InfoPOConfig) -> str:
    """Prepares the models for the fastest path that `logps_path` and the models allow, and returns its description."""
    both = [model for model in (policy, ref_model) if model is not None]
    shared = {"measure": partial(ranks.from_first, args=args)} if sharding.loads_on_first() else {}
    path, reason = prepare(both, args.logps_path, is_compiled=args.torch_compile, **shared)
    if path == "forest" and args.torch_compile:
        reason = "the parts of its layers compiled"
    return f"{_PATH_IN_WORDS[path]} ({reason})" if reason else _PATH_IN_WORDS[path]


@contextlib.contextmanager
def compiling(accelerator: Accelerator, args: InfoPOConfig, policy: nn.Module) -> Iterator[None]:
    """Has this run's policy compiled within the block, if `torch_compile` asks for it.

    A policy that shares prefixes is compiled in parts, and has them back as they were after the block. Any other one is
    compiled as a whole when accelerate prepares it. accelerate keeps its setting for all trainers of the process, and
    takes it from whoever came first.

    Args:
        accelerator: The trainer's.
        args: Settings, of which `torch_compile` and its backend and mode count.
        policy: The policy, whose attention is that of the run.
    """
    plugin = accelerator.state.dynamo_plugin
    before = plugin.backend, plugin.mode
    in_parts = attention.is_enabled(policy)
    is_whole = args.torch_compile and not in_parts
    backend = args.torch_compile_backend or "inductor"
    plugin.backend = DynamoBackend(backend.upper() if is_whole else "NO")
    plugin.mode = args.torch_compile_mode or "default"
    parts: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if args.torch_compile and in_parts:
        parts = compiled(policy, backend, args.torch_compile_mode)
    try:
        with parts:
            yield
    finally:
        plugin.backend, plugin.mode = before


def collator(policy: nn.Module, args: InfoPOConfig, router_coef: float = 0.0) -> PreferenceCollator:
    """Returns the collator for the path that the policy is prepared for.

    The load-balancing loss of experts is one of a device batch, so that batches stay whole unless pieces are asked for.
    """
    limit = args.max_tokens_per_forward
    if limit is None and args.device.type == "cpu" and not router_coef:
        limit = CPU_TOKENS_PER_FORWARD
    plan = PLANS.get(path := path_of(policy))
    return PreferenceCollator(limit, shared=path == "forest", plan=plan)


def check_fit(model: nn.Module, *data: Any) -> None:
    """Refuses datasets (or dicts of them) with rows that the model cannot read.

    Raises:
        ModelError: A row is longer than the model's context, or a token has no embedding.
    """
    for datasets in data:
        for dataset in datasets.values() if isinstance(datasets, dict) else [datasets]:
            if isinstance(dataset, ExampleDataset):
                models.check_fit(model, dataset.longest_row, dataset.largest_token_id)


def refuse_processes(
    args: InfoPOConfig,
    model: nn.Module,
    dataset: ExampleDataset | ExampleStream,
    accelerator: Accelerator,
) -> None:
    """Refuses settings and data that cannot be shared among the processes of the run.

    Raises:
        UnsupportedArgumentError: One process sees several GPUs, or ranks would wait for each other for ever.
        ModelError: As `refuse_passes_of_unequal_number`.
        ConfigError: There is less than one batch for all ranks, and `dataloader_drop_last` drops it.
    """
    if args.n_gpu > 1:
        raise UnsupportedArgumentError(
            "torch.nn.DataParallel is not supported, and one process sees several GPUs: start with "
            "`accelerate launch` or `torchrun`, or make one GPU visible with CUDA_VISIBLE_DEVICES"
        )
    if ranks.is_sharded(accelerator):
        if not ranks.has_all_weights(accelerator) and accelerator.state.deepspeed_plugin is not None:
            refuse_zero3_settings(accelerator.state.deepspeed_plugin.deepspeed_config, model)
        if args.max_tokens_per_forward:
            raise UnsupportedArgumentError(
                "max_tokens_per_forward: ranks would run different numbers of forward passes, on which FSDP and "
                "DeepSpeed wait for each other; use per_device_train_batch_size and gradient_accumulation_steps"
            )
        refuse_passes_of_unequal_number(model, dataset)
    per_pass = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and isinstance(dataset, ExampleDataset) and len(dataset) < per_pass:
        raise ConfigError(
            f"dataloader_drop_last: {len(dataset)} rows are less than one batch of {per_pass}, so all are "
            "dropped; leave it out, or lower per_device_train_batch_size"
        )


def refuse_zero3_settings(settings: Mapping[str, Any], model: nn.Module) -> None:
    """Refuses what cannot be trained or saved under ZeRO-3.

    Args:
        settings: DeepSpeed's, as its file has them.
        model: The policy.

    Raises:
        UnsupportedArgumentError: The model would not be saved, or has quantized weights.
    """
    key = "stage3_gather_16bit_weights_on_model_save"
    if not settings.get("zero_optimization", {}).get(key):
        raise UnsupportedArgumentError(
            f"deepspeed: under ZeRO-3 no model is saved without {key}: set it to true in zero_optimization (as "
            "in the file that infopo recipes deepspeed/zero3.json prints), or use ZeRO-2"
        )
    if getattr(model, "quantization_method", None) is not None:
        raise UnsupportedArgumentError(
            "deepspeed: ZeRO-3 with quantized weights is not supported; use ZeRO-2, or weights that are not quantized"
        )


def refuse_passes_of_unequal_number(model: nn.Module, dataset: ExampleDataset | ExampleStream) -> None:
    """Refuses rows that must not share a forward pass, if ranks wait for each other in each pass.

    Raises:
        ModelError: A batch may take more forward passes on one rank than on another.
    """
    apart = rows_apart(model)
    if apart is not None and (
        not isinstance(dataset, ExampleDataset) or apart(dataset.longest_row) != apart(1)
    ):
        limit = rope.boundary(model)
        raise ModelError(
            f"{type(base_of(model)).__name__}: rows of different lengths take forward passes of their own, and FSDP "
            "and DeepSpeed need the same number of passes on all ranks: "
            + ("train without them" if limit is None else f"set max_length to {limit} or less")
        )


def check_log_probs(
    model: nn.Module,
    dataset: ExampleDataset | ExampleStream,
    args: InfoPOConfig,
    *,
    exact: bool,
    quiet: Sequence[nn.Module],
) -> float:
    """Runs the start-up self-test on a small batch of the data, on one row as long as the longest, and in training
    mode.

    Rows run without gradients, and the long one both alone and beside a short one, so that the test needs the memory of
    one forward pass of two rows. Every rank runs the same number of forward passes, because the ranks of a sharded
    model wait for each other in each.

    Args:
        model: The policy as it is distributed.
        dataset: The training data.
        args: Settings. `disable_dropout` means that training is without noise, and `max_length` is the longest row of a
            stream.
        exact: Whether the model computes in float32 or better throughout.
        quiet: Modules that stay in evaluation mode.

    Returns:
        Rounding noise, which is the change of a response's log-prob (nats) by padding, divided by 1 + √tokens.

    Raises:
        LogpsError: The model's log-probs cannot be trusted.
    """
    was_training = model.training
    model.eval()
    probes = pack(_probes(first(dataset))).to(args.device)
    alone = [select(probes, [response]) for response in range(probes.num_responses)]
    noise = self_test(model, probes, alone, exact=exact)
    unit = noise / (1 + math.sqrt(max(response_lengths(probes))))
    checked = [f"{counted(probes.num_responses, 'response')} together and alone"]
    with adapter_moved(model) as is_moved:
        if is_moved:  # an adapter that is 0 at first would pass whatever it does
            self_test(model, probes, alone, exact=exact)
            checked.append("the same with an adapter that is not 0")
    if args.disable_dropout:
        _check_training_mode(model, probes, quiet)
        checked.append("training mode against evaluation mode")
    mode = partial(noise_free_training, model, quiet) if args.disable_dropout else contextlib.nullcontext
    if (long := _longest(dataset, args.max_length)) is not None:
        _check_long_row(model, long, args.device, mode, partial(tolerance, is_exact=exact, noise=unit))
        checked.append(f"a row of {_row_length(long)} tokens")
    if not exact:
        report = logger.warning if noise > 0.1 else logger.info
        report("rounding noise of a response's log-prob: %.2g nats (measured by padding alone)", noise)
    logger.info("start-up test: %s", ", ".join(checked))
    model.train(was_training)
    return unit


def _check_training_mode(model: nn.Module, probes: PackedBatch, quiet: Sequence[nn.Module]) -> None:
    """Refuses a policy that is not the same function in training mode as in evaluation mode."""

    def run() -> Tensor:
        return response_logps(model, probes)

    with torch.no_grad():
        expected = run()
        with noise_free_training(model, quiet):
            values = [run(), run()]
        again = run()
    # Sums on a GPU may vary from run to run.
    allowed = 1e-4 + 2 * float((again - expected).abs().max())
    difference = max(float((value - expected).abs().max()) for value in values)
    if not difference <= allowed:
        place = first_difference(model, run, quiet)
        raise LogpsError(
            f"{type(base_of(model)).__name__}: in training mode a log-prob differs by {difference:.3g} nats from "
            f"evaluation mode, first in {place}: noise that is no dropout. Policy and reference would not be the same "
            "function. Switch it off in the model's configuration, or set disable_dropout=False to train with it"
        )


def _check_long_row(
    model: nn.Module,
    long: PreferenceExample,
    device: torch.device,
    mode: Callable[[], contextlib.AbstractContextManager[None]],
    allowed: Callable[[int], float],
) -> None:
    """Compares a row as long as the data's longest beside a short one, in training mode, with the same row alone."""
    response = list(long.response_ids[0])
    half = response[: max(1, len(response) // 2)]
    short = PreferenceExample(list(long.prompt_ids)[:4], [half], [], long.row_id)
    together = pack([replace(long, chosen_ids=[response], rejected_ids=[half]), short]).to(device)
    path = path_of(model)
    with torch.no_grad():
        with mode():
            tested = response_logps(model, together)
        # The slow twin should not form the logits of every position, for which a long row may have no memory.
        slow = "padded" if lm_head.plain_head(model) is not None and path != "naive" else "naive"
        for number in range(together.num_responses):
            run = partial(response_logps, model, select(together, [number]), slow)
            expected = run()
            difference = float((tested[number] - expected[0]).abs())
            limit = allowed(int(together.length[number]))
            if not difference <= limit:
                limit = max(limit, float(moved_by_rounding(model, run, expected)))
            if not difference <= limit:
                raise LogpsError(
                    f"{type(base_of(model)).__name__}: beside a row of {_row_length(long)} tokens, as long as the "
                    f"data's longest, a log-prob changes by {difference:.3g} nats (path {path!r}); expected at most "
                    f"{limit:.2g}. {DISAGREEMENT[path]}"
                )


def _longest(dataset: ExampleDataset | ExampleStream, max_length: int | None) -> PreferenceExample | None:
    """Returns the longest row, scored at its end alone. For a stream, its first row is repeated to `max_length`."""
    if isinstance(dataset, ExampleDataset):
        example, response = dataset.longest_response
        row = [*example.prompt_ids, *response]
    else:
        example = dataset.first()
        if max_length is None:
            return None
        tokens = [*example.prompt_ids, *example.response_ids[0]]
        row = (tokens * math.ceil(max_length / len(tokens)))[:max_length]
    scored = min(SELF_TEST_TOKENS // 4, len(row) - 1)
    return PreferenceExample(row[:-scored], [row[-scored:]], [], example.row_id)


def _row_length(example: PreferenceExample) -> int:
    return len(example.prompt_ids) + len(example.response_ids[0])


def check_step_0(
    model: nn.Module,
    batch: PackedBatch,
    reference: Callable[[PackedBatch], Tensor],
    quiet: Sequence[nn.Module] | None,
    allowed: Callable[[int], float],
    most: Callable[[int], int] = int,
) -> None:
    """Refuses to start if policy and reference are not the same function before the first update.

    Args:
        model: The policy as it is distributed.
        batch: The first batch.
        reference: Returns the reference's log-probs.
        quiet: Modules that stay in evaluation mode. None if training has noise that was asked for, so that all do.
        allowed: Returns the largest difference (nats) between two values of a response of so many tokens, as
            `reference.tolerance` does.
        most: Returns the largest of a number over the ranks that take part in each forward pass. All of them run a row
            again for each row that is far off on one of them.

    Raises:
        ReferenceMismatchError: They differ on a row of this batch.
    """
    was_training = model.training
    model.eval()
    with torch.no_grad():
        with contextlib.nullcontext() if quiet is None else noise_free_training(model, quiet):
            policy = response_logps(model, batch)
        log_ratio = (policy - reference(batch)).abs().nan_to_num()
        limits = [allowed(tokens) for tokens in batch.length.tolist()]
        order = torch.argsort(log_ratio, descending=True).tolist()
        far_off = [response for response in order if not log_ratio[response] < limits[response]]
        runs = [
            partial(response_logps, model, select(batch, far_off[i : i + 1]))
            for i in range(most(len(far_off)))
        ]
        again = [(alone := run(), moved_by_rounding(model, run, alone)) for run in runs]
        for worst, (alone, moved) in zip(far_off, again, strict=False):
            # Rounding that moves this very response may have moved it in the reference, too.
            if log_ratio[worst] < max(5 * (policy[worst] - alone[0]).abs(), moved[0]):
                continue
            raise ReferenceMismatchError(
                f"{batch.row_ids[int(batch.example[worst])]}: before the first update, policy and reference differ "
                f"by {float(log_ratio[worst]):.3g} nats on this row, expected less than {limits[worst]:.2g}. "
                "They should be the same function, so something else differs: dropout, attention kernel, "
                "precision, or an adapter that rewrites the base at first (then use reference='precompute')."
            )
    model.train(was_training)


def check_adapter_off(
    model: nn.Module,
    example: PreferenceExample,
    off: Callable[[], contextlib.AbstractContextManager[object]],
    *,
    is_fresh: bool,
    exact: bool,
    most: Callable[[int], int] = int,
) -> None:
    """Refuses a policy that cannot have itself without its adapter as the reference.

    Training must leave the model without the adapter as it is, and a new adapter must change nothing at first.

    Args:
        model: The policy on its device.
        example: A row of the data.
        off: Switches the adapter off.
        is_fresh: Whether the adapter is new, so that policy and reference must be the same function.
        exact: Whether the model computes in float32 or better throughout.
        most: Returns the largest of a number over the ranks that hold parts of the model, which then decide alike.

    Raises:
        ConfigError: The reference would change during training, or it is not the policy that training starts from.
    """
    problem = _adapter_off_problem(model, example, off, is_fresh=is_fresh, exact=exact)
    if most(int(problem is not None)):
        raise ConfigError(f"reference='adapter-off': {problem or 'another rank refuses it'}")


def _adapter_off_problem(
    model: nn.Module,
    example: PreferenceExample,
    off: Callable[[], contextlib.AbstractContextManager[object]],
    *,
    is_fresh: bool,
    exact: bool,
) -> str | None:
    """Returns why the policy without its adapter is no reference, or None. Arguments as in `check_adapter_off`."""
    batch = pack(_probes(example)).to(next(model.parameters()).device)

    def without() -> Tensor:
        with off():
            return response_logps(model, batch)

    with torch.no_grad(), evaluating(model):
        policy, reference, again = response_logps(model, batch), without(), without()
        with adapter_moved(model):
            moved = without()
    # Sums on a GPU may vary from run to run.
    allowed = 1e-4 + 2 * float((again - reference).abs().max())
    remedy = "use reference='precompute' or 'live', the policy as it is now"
    if not float((moved - reference).abs().max()) <= allowed:
        return (
            "the adapter also trains weights of the model itself (bias='all', say), which stay as trained when it is "
            f"switched off, so the reference would change during training; {remedy}"
        )
    # The same kernel computes the same rows here, so only a new adapter's own rounding is allowed for.
    limits = [tolerance(n, is_exact=exact) / (10 if exact else 1) for n in response_lengths(batch)]
    differences = (policy - reference).abs().tolist()
    if is_fresh and any(
        not difference <= limit for difference, limit in zip(differences, limits, strict=True)
    ):
        return (
            f"the new adapter changes the policy at once, by {max(differences):.3g} nats on {example.row_id}, since it "
            "starts at random or rewrites the model, so the model without it is not the policy that training starts "
            f"from; {remedy}"
        )
    return None


def first(dataset: ExampleDataset | ExampleStream) -> PreferenceExample:
    """Returns the first row of the data."""
    return dataset[0] if isinstance(dataset, ExampleDataset) else dataset.first()


def _probes(example: PreferenceExample) -> list[PreferenceExample]:
    """Returns two responses of one prompt and another example, with at most `SELF_TEST_TOKENS` tokens of rows."""
    quarter = SELF_TEST_TOKENS // 4
    prompt, response = list(example.prompt_ids)[-quarter:], list(example.response_ids[0])[:quarter]
    if len(response) < LEAST_PROBED:
        # A response of one token would not reveal a model that sees later tokens.
        response = list(islice(cycle(response), LEAST_PROBED))
    half = response[: max(1, len(response) // 2)]
    short = SELF_TEST_TOKENS // 16
    return [
        PreferenceExample(prompt, [response, half], [], example.row_id),
        PreferenceExample(prompt[:short], [half[:short]], [], example.row_id),
    ]
