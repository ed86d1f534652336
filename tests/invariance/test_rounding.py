"""What rounding does to a log-prob in half precision is measured on the model, and refuses no sound one."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import (
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from infopo import reference_pass
from infopo.arguments import InfoPOConfig
from infopo.data.examples import ExampleDataset
from infopo.data.packing import pack, select
from infopo.errors import LogpsError, ReferenceMismatchError
from infopo.hashing import hash_weights
from infopo.lab.tokenizer import build_tokenizer
from infopo.logps import attention, rounding
from infopo.logps.forward import response_logps, self_test
from infopo.logps.rounding import moved_by_rounding, rounded_otherwise
from infopo.models import disable_dropout
from infopo.records import PackedBatch, PreferenceExample
from infopo.reference import identity_of
from infopo.reference_pass import precompute
from infopo.reference_store import ReferenceStore
from infopo.trainer import InfoPOTrainer
from worlds import PLAIN_SGD, tiny_of

SHAPE = {
    "vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ROUTED = {"num_local_experts": 4, "num_experts_per_tok": 1}
CAPPED = {"sliding_window": 4, "attn_logit_softcapping": 2.0}
FAMILIES: dict[str, Callable[[float], PreTrainedModel]] = {
    "plain": lambda r: tiny_of(LlamaConfig(**SHAPE, initializer_range=r)),
    "soft caps": lambda r: tiny_of(Gemma2Config(**SHAPE, **CAPPED, initializer_range=r)),
    "experts and sinks": lambda r: tiny_of(GptOssConfig(**SHAPE, **ROUTED, initializer_range=r)),
    "experts": lambda r: tiny_of(MixtralConfig(**SHAPE, **ROUTED, initializer_range=r)),
    "many experts": lambda r: tiny_of(
        Qwen3MoeConfig(**SHAPE, num_experts=8, num_experts_per_tok=1, moe_intermediate_size=64, initializer_range=r)
    ),
}  # fmt: skip
EXAMPLES = [
    PreferenceExample(
        [5 + i % 50 for i in range(100)],
        [[7 + i % 40 for i in range(chosen)]],
        [[9 + i % 40 for i in range(rejected)]],
        f"row {chosen}",
    )
    for chosen, rejected in ((20, 100), (150, 60), (200, 30))
]


def model_of(family: str, spread: float = 0.1) -> PreTrainedModel:
    model = FAMILIES[family](spread).to(torch.bfloat16)
    disable_dropout(model)
    assert attention.enable(model) is None
    return model


def one_by_one(batch: PackedBatch) -> list[PackedBatch]:
    return [select(batch, [r]) for r in range(batch.num_responses)]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_half_precision_and_another_order_of_sums_change_lies_within(family: str) -> None:
    """The bound is measured on the slow path alone, and must hold the error of half precision itself."""
    model, batch = model_of(family), pack(EXAMPLES)
    bound = torch.cat(
        [moved_by_rounding(model, partial(response_logps, model, one, "naive")) for one in one_by_one(batch)]
    )
    with torch.no_grad():
        slow, shared = (response_logps(model, batch, path) for path in ("naive", "forest"))
        exact = response_logps(model.float(), batch, "naive")
    assert ((slow - exact).abs() <= bound).all()
    assert ((shared - slow).abs() <= bound).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_in_float32_it_is_next_to_nothing(family: str) -> None:
    """So that nothing which the bounds for float32 refuse is taken for rounding."""
    model, batch = model_of(family).float(), pack(EXAMPLES)
    assert moved_by_rounding(model, partial(response_logps, model, batch)).max() < 1e-3


def test_the_model_and_the_global_random_numbers_are_left_alone() -> None:
    model, batch = model_of("plain"), pack(EXAMPLES)
    state, expected = torch.get_rng_state(), response_logps(model, batch)
    assert moved_by_rounding(model, partial(response_logps, model, batch)).min() > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(response_logps(model, batch), expected)


def test_a_sound_model_whose_rounding_exceeds_the_usual_bound_passes_the_start_up_test(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch = model_of("soft caps", 0.6), pack(EXAMPLES)
    self_test(model, batch, one_by_one(batch), exact=False)
    monkeypatch.setattr(rounding, "TIMES", 0.0)
    with pytest.raises(LogpsError):
        self_test(model, batch, one_by_one(batch), exact=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_path_that_is_wrong_is_still_refused(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """This one does not look at position ids, so that every response behind the first of a row is misplaced."""
    model, batch = model_of(family), pack(EXAMPLES)
    forward = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda **kwargs: forward(**{k: v * 0 if k == "position_ids" else v for k, v in kwargs.items()}),
    )
    with pytest.raises(LogpsError, match="cannot share their prompt"):
        self_test(model, batch, one_by_one(batch), exact=False)


def test_stored_values_that_were_rounded_otherwise_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of another device are, or of other batches on a GPU."""
    model, device = model_of("experts and sinks", 0.3), torch.device("cpu")
    monkeypatch.setattr(reference_pass, "SPOT_CHECKS", 6)

    def run() -> npt.NDArray[np.float64] | None:
        store = ReferenceStore(tmp_path, identity_of(model, hash_weights(model), device))
        dataset = ExampleDataset.from_examples(EXAMPLES)
        sides = frozenset({"chosen", "rejected"})
        return precompute(dataset, model, sides, batch_size=3, device=device, store=store).reference

    with rounded_otherwise(model, seed=99):
        first = run()
    assert np.array_equal(run(), first)
    monkeypatch.setattr(rounding, "TIMES", 0.0)
    with pytest.raises(ReferenceMismatchError):
        run()


def test_training_starts_where_rounding_moves_a_long_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train() -> None:
        args = InfoPOConfig(output_dir=str(tmp_path), **PLAIN_SGD | {"max_steps": 1}, reference_store="off")
        InfoPOTrainer(
            FAMILIES["experts and sinks"](0.3).to(torch.bfloat16),
            args=args,
            train_dataset=ExampleDataset.from_examples(EXAMPLES),
            processing_class=build_tokenizer(),
        ).train()

    train()
    monkeypatch.setattr(rounding, "TIMES", 0.0)
    with pytest.raises(LogpsError):
        train()
