"""What is settled and checked before the first update: how log-probs are computed, and whether they can be trusted.

No mathematics and no state: `InfoPOTrainer` calls these functions with what it has.
"""

import logging
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from infopo import models
from infopo.arguments import InfoPOConfig
from infopo.data.examples import ExampleDataset
from infopo.data.packing import PreferenceCollator, pack, select
from infopo.data.streaming import ExampleStream
from infopo.errors import ReferenceMismatchError
from infopo.logps.forward import path_of, prepare, response_logps, self_test
from infopo.records import PackedBatch, PreferenceExample

logger = logging.getLogger(__name__)

MAX_STEP_0_LOG_RATIO = 1e-3
CPU_TOKENS_PER_FORWARD = 2048
"""Where no limit is given; benchmarks/LOG.md says what it saves, and that it costs no time."""
SELF_TEST_TOKENS = 256
LEAST_PROBED = 16
"""Tokens of the longest response of the self-test."""

_PATH_IN_WORDS = {
    "forest": "each prompt once, without padding",
    "padded": "one padded row a response",
    "naive": "one padded row a response, logits of every position",
}


def choose_path(policy: nn.Module, ref_model: nn.Module | None, args: InfoPOConfig) -> str:
    """Prepares the models for the fastest path that `logps_path` and the models allow; says which, and why."""
    both = [model for model in (policy, ref_model) if model is not None]
    path, reason = prepare(both, "naive" if args.torch_compile else args.logps_path)
    if args.torch_compile:  # the layout of each batch would be compiled anew
        reason = "torch_compile is on"
    return f"{_PATH_IN_WORDS[path]} ({reason})" if reason else _PATH_IN_WORDS[path]


def collator(policy: nn.Module, args: InfoPOConfig) -> PreferenceCollator:
    """The collator for the path that the policy is prepared for."""
    limit = args.max_tokens_per_forward
    if limit is None and args.device.type == "cpu":
        limit = CPU_TOKENS_PER_FORWARD
    return PreferenceCollator(limit, shared=path_of(policy) == "forest")


def check_fit(model: nn.Module, *data: Any) -> None:
    """Refuses datasets (or dicts of them) with rows that the model cannot read.

    Raises:
        ModelError: A row is longer than the model's context, or a token has no embedding.
    """
    for each in data:
        for dataset in each.values() if isinstance(each, dict) else [each]:
            if isinstance(dataset, ExampleDataset):
                models.check_fit(model, dataset.longest_row, dataset.largest_token_id)


def check_paths(
    model: nn.Module, dataset: ExampleDataset | ExampleStream, device: torch.device, *, exact: bool
) -> None:
    """Start-up self-test on a small batch of the data.

    Every rank runs the same number of forward passes: sharded models wait for each other in each.

    Raises:
        LogpsError: The model's log-probs cannot be trusted.
    """
    was_training = model.training
    model.eval()
    probes = pack(_probes(dataset)).to(device)
    alone = [select(probes, [response]) for response in range(probes.num_responses)]
    noise = self_test(model, probes, alone, exact=exact)
    if not exact:
        report = logger.warning if noise > 0.1 else logger.info
        report("rounding noise of a response's log-prob: %.2g nats (measured by padding alone)", noise)
    model.train(was_training)


def check_step_0(model: nn.Module, batch: PackedBatch, reference: Callable[[PackedBatch], Tensor]) -> None:
    """Before the first update, policy and reference are the same function.

    Raises:
        ReferenceMismatchError: They differ on a row of this batch.
    """
    was_training = model.training
    model.eval()
    with torch.no_grad():
        log_ratio = (response_logps(model, batch) - reference(batch)).abs().nan_to_num()
    if batch.num_responses and log_ratio.max() >= MAX_STEP_0_LOG_RATIO:
        worst = int(log_ratio.argmax())
        raise ReferenceMismatchError(
            f"{batch.row_ids[int(batch.example[worst])]}: before the first update, policy and reference differ "
            f"by {float(log_ratio[worst]):.3g} nats on this row, expected less than {MAX_STEP_0_LOG_RATIO}. "
            "They should be the same function, so something else differs: dropout, attention kernel, "
            "precision, or an adapter that rewrites the base at first (then use reference='precompute')."
        )
    model.train(was_training)


def first(dataset: ExampleDataset | ExampleStream) -> PreferenceExample:
    """The first row of the data."""
    return dataset[0] if isinstance(dataset, ExampleDataset) else dataset.first()


def _probes(dataset: ExampleDataset | ExampleStream) -> list[PreferenceExample]:
    """Responses of one prompt and another example, together at most `SELF_TEST_TOKENS` tokens of rows."""
    example = first(dataset)
    quarter = SELF_TEST_TOKENS // 4
    prompt, response = list(example.prompt_ids)[-quarter:], list(example.response_ids[0])[:quarter]
    if (
        len(response) < LEAST_PROBED
    ):  # a response of one token would not tell a model that sees what comes after it
        response = list(islice(cycle(response), LEAST_PROBED))
    half = response[: max(1, len(response) // 2)]
    short = SELF_TEST_TOKENS // 16
    return [
        PreferenceExample(prompt, [response, half], [], example.row_id),
        PreferenceExample(prompt[:short], [half[:short]], [], example.row_id),
    ]
