"""Small random models and examples that tests share. They need neither the lab nor files."""

import random
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from infopo.data.examples import ExampleDataset
from infopo.records import PreferenceExample

VOCABULARY = 61

# Adam normalises gradients, which would hide a wrong scale. SGD keeps the scale.
PLAIN_SGD: dict[str, Any] = {
    "learning_rate": 1e-3,
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "activation_checkpointing": False,
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
    "probe_size": 0,  # measuring is for the tests of it
    "reference_sides": "both",
}


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **settings: object) -> PreTrainedModel:
    """Returns a random Llama of a few thousand parameters, with untied weights that are large enough to show errors."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **settings,  # type: ignore[arg-type]
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def tiny_of(config: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def ids(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(low, high))]


def random_examples(
    n: int, seed: int = 0, chosen: Sequence[int] = (1,), rejected: Sequence[int] = (1,)
) -> list[PreferenceExample]:
    """Returns `n` examples of unequal lengths, whose numbers of responses cycle through `chosen` and `rejected`."""
    rng = random.Random(seed)
    return [
        PreferenceExample(
            prompt_ids=ids(rng, 1, 9),
            chosen_ids=[ids(rng, 1, 7) for _ in range(chosen[i % len(chosen)])],
            rejected_ids=[ids(rng, 1, 12) for _ in range(rejected[i % len(rejected)])],
            row_id=f"rows.jsonl:{i + 1}",
        )
        for i in range(n)
    ]


def with_context(example: PreferenceExample) -> PreferenceExample:
    """The same example, whose responses of four tokens and more hold context: their second and third token."""
    spans = tuple(((1, 3),) if len(ids) > 3 else () for ids in example.response_ids)
    return replace(example, context=spans, row_id=f"{example.row_id} with context")


def random_dataset(n: int, seed: int = 0, **kwargs: Sequence[int]) -> ExampleDataset:
    return ExampleDataset.from_examples(random_examples(n, seed, **kwargs))


def quick(names: Iterable[str], *kept: str) -> list[Any]:
    """Parameters of a test of which only those kept run in the gate, and all in the long tier."""
    assert set(kept) <= set(names)
    return [name if name in kept else pytest.param(name, marks=pytest.mark.long) for name in names]


@contextmanager
def interruptible() -> Iterator[None]:
    """Processes that start here heed Ctrl-C, also if these tests run in the background of a shell, which do not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
