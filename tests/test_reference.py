"""Reference log-probs through the store: never stale, never computed twice, and the same as without one.

The table of stale caches is that of TRL 1.16, measured there: what it took wrongly from its cache is computed anew.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from infopo.data.examples import ExampleDataset
from infopo.errors import LogpsError, ReferenceMismatchError, UnsupportedArgumentError
from infopo.hashing import hash_weights
from infopo.records import PreferenceExample
from infopo.reference import tolerance
from infopo.reference_pass import precompute
from infopo.reference_store import ReferenceStore
from stored_reference import BOTH, RESPONSES, ROWS, TOKENIZER, changed, counts, lab, lora, trainer_of, values
from worlds import random_dataset, random_examples, tiny_llama


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


# ---- the table -----------------------------------------------------------------------------------------------------


def one_bit() -> PreTrainedModel:
    model = lab()
    with torch.no_grad():
        model.get_input_embeddings().weight.view(torch.int32)[0, 0] ^= 1
    return model


def other_rope() -> PreTrainedModel:
    model = lab()
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 123.0}
    return model


Change = Callable[[Path], dict[str, Any]]

# name -> (settings, what TRL 1.16 did)
MISSES: dict[str, tuple[Change, str]] = {
    "max_length cuts responses": (lambda _: {"max_length": 30}, "missed, by accident"),
    "a smaller max_length": (lambda _: {"max_length": 29}, "missed, by accident"),
    "max_prompt_length keeps the prompt's end": (lambda _: {"max_prompt_length": 9}, "HIT under keep_end"),
    "a smaller max_prompt_length": (lambda _: {"max_prompt_length": 8}, "HIT under keep_end"),
    "bf16 autocast": (lambda _: {"bf16": True}, "HIT"),
    "weights in bfloat16": (lambda _: {"model": lab(dtype="bfloat16")}, "missed"),
    "one bit of one weight": (lambda _: {"model": one_bit()}, "missed"),
    "configuration, same weights": (lambda _: {"model": other_rope()}, "not in the key"),
    "attention implementation": (lambda _: {"model": lab(attn_implementation="eager")}, "not in the key"),
    "layout of batches": (lambda _: {"logps_path": "naive"}, "not in the key"),
    "an adapter": (lambda _: {"model": lora(lab(), 0)}, "missed"),
    "another adapter": (lambda _: {"model": lora(lab(), 1)}, "missed"),
    "the adapter's scale, same weights": (lambda _: {"model": lora(lab(), 1, lora_alpha=3)}, "not in the key"),
    "another reference model": (lambda _: {"ref_model": one_bit()}, "missed"),
    "other prompts": (lambda _: {"train": changed("prompt", lambda p: p + " ")}, "missed"),
    "a token moved from response to prompt": (
        lambda _: {
            "train": datasets.Dataset.from_list(
                [{"prompt": r["prompt"] + "1", "chosen": r["chosen"][1:], "rejected": r["rejected"][1:]} for r in ROWS]
            )
        },
        "missed",
    ),
}  # fmt: skip


def on_disk(folder: Path) -> datasets.Dataset:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS), encoding="utf-8")
    return datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(folder / "datasets")
    )


HITS: dict[str, tuple[Change, str]] = {
    "nothing": (lambda _: {}, "hit"),
    "learning_rate": (lambda _: {"learning_rate": 0.5, "max_length": 500}, "MISSED"),
    "output_dir": (lambda folder: {"output_dir": str(folder / "other"), "max_length": 500}, "MISSED"),
    "learning_rate, max_length=None": (lambda _: {"learning_rate": 0.5}, "hit"),
    "the same rows in memory, in a file": (lambda folder: {"train": on_disk(folder)}, "MISSED"),
    "objective": (lambda _: {"objective": "dpo"}, "hit"),
    "epochs, batch size, seed": (
        lambda _: {"num_train_epochs": 3, "per_device_train_batch_size": 3, "precompute_ref_batch_size": 2, "seed": 7},
        "missed",
    ),
    "order of rows": (lambda _: {"train": datasets.Dataset.from_list(ROWS[::-1])}, "missed"),
    "sides": (lambda _: {"reference_sides": "needed"}, "does not apply"),
    "a fresh adapter, which changes nothing": (
        lambda _: {"peft_config": LoraConfig(r=3, target_modules=["v_proj"], task_type="CAUSAL_LM")},
        "hit",
    ),
    "the policy's own weights as a second model": (lambda _: {"ref_model": lab()}, "hit"),
    "dropout and names in the configuration": (lambda _: {"model": lab(attention_dropout=0.3)}, "hit"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISSES)
def test_what_changes_a_value_is_computed_anew(tmp_path: Path, store: Path, name: str) -> None:
    change, _ = MISSES[name]
    for before in (
        {},
        {"max_length": 31},
        {"max_prompt_length": 10},
        {"model": lora(lab(), 1, lora_alpha=7)},
    ):
        trainer_of(store, tmp_path, **before)
    trainer = trainer_of(store, tmp_path, **change(tmp_path))
    assert counts(trainer) == (0, RESPONSES)
    in_memory = trainer_of(None, tmp_path, **change(tmp_path))
    np.testing.assert_allclose(values(trainer), values(in_memory), rtol=1e-12)


@pytest.mark.parametrize("name", HITS)
def test_what_changes_no_value_is_found(tmp_path: Path, store: Path, name: str) -> None:
    change, _ = HITS[name]
    first = trainer_of(store, tmp_path)
    assert counts(first) == (0, RESPONSES)
    trainer = trainer_of(store, tmp_path, **change(tmp_path))
    wanted = trainer.train_dataset.num_responses // (2 if name == "sides" else 1)
    assert counts(trainer) == (wanted, 0)
    kept = sorted(v for v in values(trainer) if not math.isnan(v))
    assert set(kept) <= set(values(first))
    assert len(kept) == wanted


def test_weighted_tokens_cannot_be_mistaken_for_unweighted_ones(tmp_path: Path, store: Path) -> None:
    """TRL's third stale case: its values have `ld_alpha` in them. Here tokens are stored as they are."""
    trainer = trainer_of(store, tmp_path)
    assert trainer.reference_store is not None
    for key, each in trainer.reference_store.found.items():
        tokens = trainer.reference_store.tokens(key)
        assert tokens is not None
        assert each.logp == tokens.sum(dtype=np.float64)
    with pytest.raises(UnsupportedArgumentError, match="ld_alpha"):
        trainer_of(store, tmp_path, ld_alpha=0.1)


def test_a_chat_template_is_in_the_tokens(tmp_path: Path, store: Path) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")},
        }
        for row in ROWS
    ]
    raw = datasets.Dataset.from_list(rows)
    assert counts(trainer_of(store, tmp_path, train=raw)) == (0, RESPONSES)
    assert counts(trainer_of(store, tmp_path, train=raw)) == (RESPONSES, 0)
    template = TOKENIZER.chat_template
    try:
        TOKENIZER.chat_template = template.replace("{{", "{{ '1' + ", 1)
        assert TOKENIZER.chat_template != template
        assert counts(trainer_of(store, tmp_path, train=raw)) == (0, RESPONSES)
    finally:
        TOKENIZER.chat_template = template


# ---- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", [{"chosen"}, {"rejected"}, BOTH])
def test_store_and_memory_give_the_same_bits(store: Path, sides: set[str]) -> None:
    """Repeated responses, several a prompt, none a side: in one batch size, whatever is stored already."""
    examples = random_examples(9, chosen=(1, 0, 2), rejected=(1, 2))
    dataset = ExampleDataset.from_examples([*examples, *examples[3:5]])
    model, device = tiny_llama(), torch.device("cpu")
    options: dict[str, Any] = {"batch_size": 4, "device": device}
    memory = precompute(dataset, model, frozenset(sides), **options).reference
    assert memory is not None
    expected = [r in sides for r in np.where(dataset.roles == 0, "chosen", "rejected")]
    assert np.isfinite(memory).tolist() == expected
    opened = store_of(store, model)
    stored = precompute(dataset, model, frozenset(sides), store=opened, **options).reference
    np.testing.assert_array_equal(stored, memory)
    again = precompute(dataset, model, frozenset(sides), store=store_of(store, model), **options).reference
    np.testing.assert_array_equal(again, memory)


@pytest.mark.parametrize(("seconds", "shards"), [(0.0, 8), (1e9, 4)])
def test_a_shard_is_as_large_as_its_time_allows(
    store: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, shards: int
) -> None:
    """A kill loses one shard's work at most. Eight batches: one by one, or 1, 2, 4 and the last."""
    monkeypatch.setattr("infopo.reference_pass.SECONDS_PER_SHARD", seconds)
    model, opened = tiny_llama(), store_of(store, tiny_llama())
    dataset, rejected = random_dataset(16), frozenset({"rejected"})
    precompute(dataset, model, rejected, store=opened, batch_size=2, device=torch.device("cpu"))
    assert len(list(opened.folder.glob("*.safetensors"))) == shards


def store_of(folder: Path, model: Any) -> ReferenceStore:
    from infopo.reference import identity_of

    return ReferenceStore(folder, identity_of(model, hash_weights(model), torch.device("cpu")))


def test_repeated_responses_are_computed_once() -> None:
    example = PreferenceExample([5, 6], [[7]], [[8], [8]], "a")
    dataset = ExampleDataset.from_examples([example] * 20)
    scored: list[int] = []
    model = tiny_llama()
    model.register_forward_pre_hook(
        lambda _, args, kwargs: scored.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    reference = precompute(dataset, model, BOTH, batch_size=4, device=torch.device("cpu")).reference
    assert reference is not None
    assert scored == [2]
    assert len(set(reference.tolist())) == 2


@pytest.mark.parametrize("share", [1, 5, 11])
def test_ranks_change_no_bit(share: int) -> None:
    """Each rank's share alone, added up by hand."""
    dataset, model, device = random_dataset(11), tiny_llama(), torch.device("cpu")
    one = precompute(dataset, model, BOTH, batch_size=2, device=device).reference
    parts: list[torch.Tensor] = []

    def keep(mine: torch.Tensor) -> torch.Tensor:
        parts.append(mine.clone())
        return mine

    for rank in range(share):
        precompute(
            dataset,
            model,
            BOTH,
            batch_size=2,
            device=device,
            rank=rank,
            world_size=share,
            add_over_ranks=keep,
        )
    if share > 1:
        np.testing.assert_array_equal(sum(parts).numpy(), one)  # type: ignore[union-attr]


def test_an_interrupted_computation_goes_on_to_the_same_bits(store: Path) -> None:
    dataset, model, device = random_dataset(24), tiny_llama(), torch.device("cpu")
    options: dict[str, Any] = {"batch_size": 2, "device": device}
    whole = precompute(dataset, model, BOTH, **options).reference
    passes = 0

    def interrupt(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 6:
            raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(interrupt)
    model.train()
    first = store_of(store, model)
    with pytest.raises(KeyboardInterrupt):
        precompute(dataset, model, BOTH, store=first, **options)
    hook.remove()
    assert model.training
    assert 0 < len(first.computed) < dataset.num_responses
    second = store_of(store, model)
    continued = precompute(dataset, model, BOTH, store=second, **options).reference
    np.testing.assert_array_equal(continued, whole)
    assert second.reused == len(first.computed)
    assert not first.computed & second.computed


def test_values_that_are_not_finite_are_not_stored(store: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    opened = store_of(store, model)
    with pytest.raises(LogpsError, match=r"rows.jsonl:\d+ \((chosen|rejected)\): log π_ref is not finite"):
        precompute(random_dataset(3), model, BOTH, batch_size=2, device=torch.device("cpu"), store=opened)
    assert list(opened.folder.glob("*.safetensors")) == []


# ---- spot checks ---------------------------------------------------------------------------------------------------


def forge(store: Path, offset: float) -> str:
    """Shifts every stored value, under a right checksum: what another function, or a faulty device, would have left."""
    import hashlib

    import safetensors.numpy

    names = []
    for path in store.glob("*/*.safetensors"):
        arrays = safetensors.numpy.load_file(path)
        content = safetensors.numpy.save({**arrays, "logps": arrays["logps"] + np.float32(offset)})
        path.unlink()
        names.append(f"{hashlib.sha256(content).hexdigest()}.safetensors")
        (path.parent / names[-1]).write_bytes(content)
    return names[0]


@pytest.mark.parametrize(
    ("settings", "small", "large"),
    [({}, 1e-5, 1e-2), ({"bf16": True}, 1e-2, 1.0)],
    ids=["float32", "bfloat16"],
)
def test_a_stored_value_that_the_model_does_not_give_stops_the_run_and_is_named(
    tmp_path: Path, store: Path, settings: dict[str, Any], small: float, large: float
) -> None:
    trainer_of(store, tmp_path, **settings)
    forge(store, small)
    assert counts(trainer_of(store, tmp_path, **settings)) == (RESPONSES, 0)
    forge(store, large)
    with pytest.raises(ReferenceMismatchError) as caught:
        trainer_of(store, tmp_path, **settings)
    message = str(caught.value)
    assert message.startswith("train_dataset:")
    assert any(str(path) in message for path in store.glob("*/*.safetensors"))
    (shelf,) = store.iterdir()
    assert f"infopo reference --prune {shelf.name[:8]}" in message
    assert counts(trainer_of(tmp_path / "another", tmp_path, **settings)) == (0, RESPONSES)


def test_tolerance_grows_as_rounding_does() -> None:
    assert tolerance(1, is_exact=True) == 1e-3
    assert tolerance(10_000, is_exact=True) == pytest.approx(0.0505)
    assert tolerance(256, is_exact=False) == pytest.approx(1.7)
