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
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from infopo import hashing
from infopo.arguments import InfoPOConfig
from infopo.cli import main
from infopo.data.examples import ExampleDataset
from infopo.errors import LogpsError, RecipeError, ReferenceMismatchError, UnsupportedArgumentError
from infopo.hashing import config_hash, hash_weights
from infopo.lab.tokenizer import build_tokenizer
from infopo.models import load_policy
from infopo.records import PreferenceExample
from infopo.reference import resolve, tolerance
from infopo.reference_pass import precompute
from infopo.reference_store import ReferenceStore
from infopo.trainer import InfoPOTrainer
from worlds import PLAIN_SGD, random_dataset, random_examples, tiny_llama

TOKENIZER = build_tokenizer()
ROWS = [
    {
        "prompt": f"{i}+{i}+{i}+{i}+{i}+{i}=?",
        "chosen": f"{i}+{i}={2 * i}, {i}+{i}={2 * i}, {6 * i}",
        "rejected": f"={i}+{i}={2 * i}, {i}+{i}={2 * i}, {6 * i}",
    }
    for i in range(10, 16)
]
RESPONSES = 2 * len(ROWS)
BOTH = frozenset({"chosen", "rejected"})


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def trainer_of(store: Path | None, folder: Path, model: Any = None, **settings: Any) -> InfoPOTrainer:
    """A trainer of the lab's policy on rows of text, with a store in a folder of its own."""
    arguments = {
        name: settings.pop(name) for name in ("peft_config", "ref_model", "eval_dataset") if name in settings
    }
    raw = settings.pop("train", None)
    return InfoPOTrainer(
        load_policy("lab:policy", dtype="float32") if model is None else model,
        args=InfoPOConfig(
            **{
                "output_dir": str(folder / "run"),
                "reference_store": None if store is None else str(store),
                **PLAIN_SGD,
                "max_steps": 1,
                "report_to": "none",
                "max_length": None,
                **settings,
            }
        ),
        train_dataset=datasets.Dataset.from_list(ROWS) if raw is None else raw,
        processing_class=TOKENIZER,
        **arguments,
    )


def counts(trainer: InfoPOTrainer) -> tuple[int, int]:
    """(found, computed)."""
    assert trainer.reference_store is not None
    return trainer.reference_store.reused, len(trainer.reference_store.computed)


def values(trainer: InfoPOTrainer) -> np.ndarray:
    assert trainer.train_dataset.reference is not None
    return trainer.train_dataset.reference


# ---- the table -----------------------------------------------------------------------------------------------------


def lora(model: PreTrainedModel, seed: int, **settings: Any) -> Any:
    """The lab's policy with an adapter that does something."""
    torch.manual_seed(seed)
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return adapted


def lab(**settings: Any) -> PreTrainedModel:
    return load_policy("lab:policy", **{"dtype": "float32", **settings})


def one_bit() -> PreTrainedModel:
    model = lab()
    with torch.no_grad():
        model.get_input_embeddings().weight.view(torch.int32)[0, 0] ^= 1
    return model


def other_rope() -> PreTrainedModel:
    model = lab()
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 123.0}
    return model


def changed(key: str, text: Callable[[str], str]) -> datasets.Dataset:
    return datasets.Dataset.from_list([{**row, key: text(row[key])} for row in ROWS])


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


# ---- hashes --------------------------------------------------------------------------------------------------------


def test_weights_are_hashed_by_value() -> None:
    model, again = tiny_llama(), tiny_llama()
    assert hash_weights(model).whole == hash_weights(again).whole
    hashes = {
        hash_weights(model).whole,
        hash_weights(tiny_llama(seed=1)).whole,
        hash_weights(tiny_llama(dtype=torch.bfloat16)).whole,
    }
    assert len(hashes) == 3
    with torch.no_grad():
        again.lm_head.weight.copy_(
            again.lm_head.weight.t().contiguous().t()
        )  # the same values, laid out otherwise
    assert hash_weights(model).whole == hash_weights(again).whole
    with torch.no_grad():
        again.model.norm.weight[3] += 1e-6
    assert hash_weights(model).whole != hash_weights(again).whole


def test_a_weight_in_pieces_has_all_its_bytes_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "_HASHED_AT_ONCE", 100)
    model = tiny_llama()
    seen = {hash_weights(model).whole}
    flat = model.lm_head.weight.detach().view(-1)
    for place in (0, 24, 25, len(flat) // 2, len(flat) - 1):
        flat[place] += 1
        seen.add(hash_weights(model).whole)
    assert len(seen) == 6
    with torch.no_grad():
        model.lm_head.weight[[0, 1]] = model.lm_head.weight[[1, 0]]
    assert hash_weights(model).whole not in seen


def test_an_adapter_has_a_hash_of_its_own_once_it_changes_something() -> None:
    plain = hash_weights(lab())
    assert plain.whole == plain.base
    assert plain.adapter is None
    fresh = hash_weights(
        get_peft_model(lab(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    )
    assert (fresh.base, fresh.adapter) == (plain.base, None)
    adapted = [hash_weights(lora(lab(), 1, **s)) for s in ({}, {"lora_alpha": 3}, {"use_rslora": True}, {})]
    assert {each.base for each in adapted} == {plain.base}
    assert adapted[0].adapter == adapted[3].adapter is not None
    assert len({each.adapter for each in adapted}) == 3
    dora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", use_dora=True)
    assert hash_weights(get_peft_model(lab(), dora)).adapter is not None
    saved = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    with_head = hash_weights(get_peft_model(lab(), saved))
    assert with_head.adapter is not None
    assert with_head.base == plain.base


def test_weights_that_are_elsewhere_are_not_hashed() -> None:
    with torch.device("meta"):
        model = torch.nn.Linear(2, 2)
    with pytest.raises(Exception, match="'weight' is not in this process as a whole"):
        hash_weights(model)


def test_a_configuration_counts_where_it_changes_what_is_computed() -> None:
    model = tiny_llama()
    before = config_hash(model)
    for name, value in {
        "pad_token_id": 7,
        "use_cache": False,
        "attention_dropout": 0.5,
        "_name_or_path": "x",
    }.items():
        setattr(model.config, name, value)
    assert config_hash(model) == before
    for name, value in {"rms_norm_eps": 0.1, "num_key_value_heads": 4, "something_new": 1}.items():
        old = getattr(model.config, name, None)
        setattr(model.config, name, value)
        assert config_hash(model) != before, name
        setattr(model.config, name, old) if old is not None else delattr(model.config, name)
    assert config_hash(model) == before


# ---- settings ------------------------------------------------------------------------------------------------------


def test_auto_is_stored_where_rows_can_be_enumerated_and_live_where_they_stream() -> None:
    stream = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    assert resolve("auto", random_dataset(2)) == "precompute"
    assert resolve("auto", stream) == "live"
    assert resolve("adapter-off", stream) == "adapter-off"


@pytest.mark.parametrize("setting", [None, "off"])
def test_off_writes_nothing(tmp_path: Path, setting: str | None) -> None:
    trainer = trainer_of(None, tmp_path, reference_store=setting)
    assert trainer.reference_store is None
    assert np.isfinite(values(trainer)).all()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_auto_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFOPO_CACHE", str(tmp_path / "cache"))
    trainer = trainer_of(None, tmp_path, reference_store="auto")
    assert trainer.reference_store is not None
    assert trainer.reference_store.folder.parent == tmp_path / "cache" / "reference"
    line = f"reference store: {trainer.reference_store.folder}: 0 responses found, {RESPONSES} computed"
    assert line in trainer.description()


def test_without_a_cache_to_write_to_values_stay_in_memory_but_a_folder_that_was_named_must_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("INFOPO_CACHE", str(tmp_path / "file"))
    trainer = trainer_of(None, tmp_path, reference_store="auto")
    assert trainer.reference_store is None
    assert np.isfinite(values(trainer)).all()
    assert "kept in memory only" in caplog.text
    with pytest.raises(Exception, match=r"reference_store: .*file/store cannot be made: .*file is a file"):
        trainer_of(tmp_path / "file" / "store", tmp_path)


def test_a_store_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="reference_store: expected a folder, auto or off, got ''"):
        trainer_of(None, tmp_path, reference_store="")


def test_training_and_evaluation_data_share_the_store(tmp_path: Path, store: Path) -> None:
    raw = datasets.Dataset.from_list(ROWS)
    trainer = trainer_of(
        store, tmp_path, eval_dataset={"same": raw, "other": changed("chosen", lambda c: c + "1")}
    )
    assert counts(trainer) == (RESPONSES + len(ROWS), RESPONSES + len(ROWS))
    trainer.evaluate()
    late = trainer_of(store, tmp_path)
    late.evaluate(changed("rejected", lambda r: r + "2"))
    assert counts(late) == (RESPONSES + len(ROWS), len(ROWS))


def test_an_objective_without_reference_opens_no_store(tmp_path: Path, store: Path) -> None:
    trainer = trainer_of(store, tmp_path, objective="simpo", reference_sides="needed")
    assert trainer.reference_store is None
    assert not store.exists()


# ---- infopo reference ----------------------------------------------------------------------------------------------

RECIPE = """\
model: {name_or_path: lab:policy}
data: {path: rows.jsonl, eval_path: rows.jsonl, max_length: 64}
reference: {sides: both, store: store}
train: {max_steps: 1, per_device_train_batch_size: 4, activation_checkpointing: false, use_cpu: true, bf16: false}
output_dir: run
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS), encoding="utf-8")
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return tmp_path


def test_what_infopo_reference_stores_infopo_train_finds(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reference", "recipe.yaml"]) == 0
    assert (
        f": {RESPONSES} responses found, {RESPONSES} computed\n" in capsys.readouterr().out
    )  # evaluation finds it
    assert sorted(path.name for path in work.iterdir()) == ["recipe.yaml", "rows.jsonl", "store"]
    assert main(["train", "recipe.yaml"]) == 0
    assert f": {2 * RESPONSES} responses found, 0 computed\n" in capsys.readouterr().out
    assert main(["reference", "--list", "--store", "store"]) == 0
    out = capsys.readouterr().out
    assert f"{RESPONSES} responses" in out
    assert "policy (float32, forest, sdpa)" in out
    (shelf,) = (work / "store").iterdir()
    assert main(["reference", "--prune", shelf.name[:8], "--store", "store"]) == 0
    assert list((work / "store").iterdir()) == []


def test_check_writes_nothing(work: Path) -> None:
    assert main(["check", "recipe.yaml"]) == 0
    assert sorted(path.name for path in work.iterdir()) == ["recipe.yaml", "rows.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["recipe.yaml", "reference.source=live"],
            "reference.source: live computes the reference in every step",
        ),
        (["recipe.yaml", "reference.store=off"], "reference.store: is off; name a folder"),
        (["recipe.yaml", "reference.store=null"], "reference.store: is off; name a folder"),
        (
            ["recipe.yaml", "reference.store=rows.jsonl"],
            "reference.store: rows.jsonl cannot be made: rows.jsonl is a",
        ),
        (
            ["recipe.yaml", "objective=simpo", "reference.sides=needed"],
            "objective.name: simpo needs no reference",
        ),
        (["recipe.yaml", "reference.store=3"], "reference.store (override): expected text or null, got 3"),
        (["--prune"], "--prune: name references as --list shows them"),
        (["--prune", "ab"], "--prune: 0 references begin with 'ab'"),
        (["--list", "--store", "off"], "--store: expected a folder, got 'off'"),
    ],
)
def test_what_cannot_be_stored_is_refused_in_words(
    work: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reference", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (work / "run").exists()


@pytest.mark.parametrize("command", ["train", "check"])
def test_a_store_that_cannot_be_written_to_is_refused_at_the_door(
    work: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "recipe.yaml", "reference.store=rows.jsonl/store"]) == 2
    message = f"reference.store: rows.jsonl/store cannot be made: {work / 'rows.jsonl'} is a file"
    assert message in capsys.readouterr().err
    assert not (work / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [[], ["recipe.yaml", "--list"], ["recipe.yaml", "--store", "a"], ["--older-than", "3", "--list"],
     ["--list", "--prune", "a"]],
)  # fmt: skip
def test_the_command_line_says_what_goes_together(
    work: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["reference", *arguments])
    assert caught.value.code == 2
    assert "usage: infopo reference" in capsys.readouterr().err
