"""Hashes of weights: by value, with everything that changes what is computed, and nothing else."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from infopo import hashing
from infopo.hashing import config_hash, hash_weights
from stored_reference import lab, lora
from worlds import tiny_llama


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
