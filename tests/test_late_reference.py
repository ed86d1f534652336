"""`evaluate(new_dataset)` after training gives what the constructor would have given, if a reference can be had."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from infopo.arguments import InfoPOConfig
from infopo.errors import RecipeError
from infopo.lab.tokenizer import build_tokenizer
from infopo.trainer import InfoPOTrainer
from worlds import PLAIN_SGD, random_dataset, tiny_llama

TOKENIZER = build_tokenizer()
LATE = random_dataset(6, seed=9)


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings)


def trained(folder: Path, **settings: Any) -> InfoPOTrainer:
    names = ("model", "ref_model", "peft_config", "eval_dataset")
    given = {name: settings.pop(name) for name in names if name in settings}
    trainer = InfoPOTrainer(
        args=InfoPOConfig(
            output_dir=str(folder),
            **PLAIN_SGD
            | {"reference_sides": "auto", "max_steps": 2, "learning_rate": 0.05, "report_to": "none"}
            | {"reference_store": "off"}
            | settings,
        ),
        train_dataset=random_dataset(8),
        processing_class=TOKENIZER,
        **{"model": tiny_llama()} | given,
    )
    trainer.train()
    return trainer


def numbers(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if not k.endswith(("runtime", "_per_second", "epoch"))}


HELD = tiny_llama(seed=1)
WAYS: dict[str, Any] = {
    "a fresh adapter, off": lambda folder: {"peft_config": lora()},
    "a fresh adapter with dropout": lambda folder: {"peft_config": lora(lora_dropout=0.3)},
    "a ref_model that the caller holds": lambda folder: {"ref_model": HELD},
    "a reference given by path": lambda folder: {"reference": str(folder / "other")},
    "a model given by name": lambda folder: {"model": str(folder / "sft")},
    "live": lambda folder: {"reference": "live"},
}


each_store = pytest.mark.parametrize("stores", [False, True], ids=["in memory", "stored"])


@each_store
@pytest.mark.parametrize("way", WAYS)
def test_a_set_that_comes_after_training_is_evaluated_as_if_the_constructor_had_it(
    tmp_path: Path, way: str, stores: bool
) -> None:
    store = {"reference_store": str(tmp_path / "store") if stores else "off"}
    tiny_llama().save_pretrained(tmp_path / "sft")
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    given = trained(tmp_path / "a", eval_dataset=LATE, **store, **WAYS[way](tmp_path))
    expected = numbers(given.evaluate())
    trainer = trained(tmp_path / "b", **store, **WAYS[way](tmp_path))
    training = [module.training for module in trainer.model.modules()]
    before = [p.detach().clone() for p in trainer.model.parameters()]
    assert numbers(trainer.evaluate(LATE)) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert expected["eval_logratios/chosen"] != pytest.approx(0.0, abs=1e-3)
    got = trainer.evaluate({"late": LATE})
    assert got["eval_late_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert len(training) == len(list(trainer.model.modules()))


def changed(folder: Path) -> dict[str, Any]:
    """An SFT adapter that is trained further: without it, the policy is not the reference."""
    torch.manual_seed(0)
    return {"model": get_peft_model(tiny_llama(), lora(init_lora_weights=False))}


GONE: dict[str, Any] = {
    "all weights were trained": lambda folder: {},
    "a trained adapter is trained on": changed,
    "a ref_model that nobody keeps": lambda folder: {"ref_model": tiny_llama(seed=1)},
}


@each_store
@pytest.mark.parametrize("way", GONE)
def test_where_it_is_gone_the_message_names_every_way_out(tmp_path: Path, way: str, stores: bool) -> None:
    store = str(tmp_path / "store") if stores else "off"
    trainer = trained(tmp_path, reference_store=store, **GONE[way](tmp_path))
    gc.collect()
    with pytest.raises(RecipeError) as caught:
        trainer.evaluate(LATE)
    for remedy in (
        "constructor",
        "reference='live'",
        "adapter-off",
        "ref_model",
        "by name",
        "without a reference",
    ):
        assert remedy in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_ref_model_that_has_changed_since_is_no_reference(tmp_path: Path) -> None:
    reference = tiny_llama(seed=1)
    trainer = trained(tmp_path, ref_model=reference)
    with torch.no_grad():
        reference.lm_head.weight.mul_(1.1)
    with pytest.raises(RecipeError, match="is gone or has changed since"):
        trainer.evaluate(LATE)
