"""Which reference the trainer takes, with adapters and without."""

import copy
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    OPTConfig,
    TrainerCallback,
)

from infopo.data.examples import ExampleDataset
from infopo.data.packing import pack
from infopo.errors import (
    ModelError,
    RecipeError,
    ReferenceMismatchError,
)
from infopo.hashing import hash_weights
from infopo.lab import policy_path
from infopo.models import disable_dropout
from infopo.reference import LiveReference
from infopo.trainer import InfoPOTrainer
from trainers import (
    FLOAT32,
    ROWS,
    hand_logps,
    hand_loss,
    hand_metrics,
    marked_rows,
    step_records,
    trainer_of,
    weights,
)
from worlds import random_dataset, random_examples, tiny_llama, tiny_of

# ---- reference -----------------------------------------------------------------------------------------------------


class Disturb(TrainerCallback):
    """Changes weights between construction and the first step."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        with torch.no_grad():
            model.lm_head.weight.mul_(1.05)


@pytest.mark.parametrize("reference", ["auto", "live"])
def test_a_policy_that_is_not_its_reference_at_step_0_is_refused_with_the_row(
    tmp_path: Path, reference: str
) -> None:
    trainer = trainer_of(tmp_path, callbacks=[Disturb()], reference=reference)
    before = weights(trainer.model)
    with pytest.raises(
        ReferenceMismatchError, match=r"rows.jsonl:\d+: before the first update.*nats on this row"
    ):
        trainer.train()
    after = weights(trainer.model)
    assert not torch.equal(before, after)  # the disturbance
    with torch.no_grad():
        trainer.model.lm_head.weight.div_(1.05)
    torch.testing.assert_close(weights(trainer.model), before, rtol=0, atol=1e-6)  # and nothing else


def test_of_the_rows_the_one_that_differs_is_named(tmp_path: Path) -> None:
    class DisturbOneToken(TrainerCallback):
        def on_train_begin(
            self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
        ) -> None:
            with torch.no_grad():
                model.model.embed_tokens.weight[60] += 1

    trainer = trainer_of(
        tmp_path, marked_rows(6), callbacks=[DisturbOneToken()], per_device_train_batch_size=6
    )
    with pytest.raises(ReferenceMismatchError, match=r"^rows.jsonl:3: "):
        trainer.train()


@pytest.mark.parametrize("given", ["model", "live model", "path", "live is another precompute"])
def test_another_model_as_reference_is_used_however_it_is_given(tmp_path: Path, given: str) -> None:
    reference = tiny_llama(seed=1)
    examples = random_examples(4)
    settings: dict[str, Any] = {"ref_model": reference}
    if given == "path":
        reference.save_pretrained(tmp_path / "reference")
        settings = {"reference": str(tmp_path / "reference")}
    elif given == "live model":
        settings["reference"] = "live"
    elif given == "live is another precompute":
        settings |= {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3}
    trainer = trainer_of(
        tmp_path, ExampleDataset.from_examples(examples), max_steps=1, reference_sides="both", **settings
    )
    assert trainer.reference_hash == hash_weights(reference).whole != trainer.policy_hash
    assert trainer.reference_in_words == "a model of its own"
    trainer.train()
    (record,) = step_records(trainer)
    logps = hand_logps(tiny_llama(), reference, examples)
    assert record["loss"] == pytest.approx(hand_loss(logps, "infopo", {}), **FLOAT32)
    assert record["rewards/margins"] == pytest.approx(
        hand_metrics(logps, beta=1.0, cap=5.0)["rewards/margins"], **FLOAT32
    )


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_live_reference_runs_on_the_sides_that_are_asked_for_only(side: str) -> None:
    examples = random_examples(5, chosen=(1, 2), rejected=(1, 3))
    batch, model = pack(examples), tiny_llama(seed=1)
    rows: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    values = LiveReference(model, frozenset({side}))(batch)
    asked = batch.chosen if side == "chosen" else batch.rejected
    assert values.isfinite().nonzero().flatten().tolist() == asked.tolist()
    assert sum(rows) == len(asked)
    torch.testing.assert_close(
        values[asked], hand_logps(tiny_llama(), model, examples).reference[asked], rtol=1e-5, atol=1e-4
    )


def test_training_changes_no_reference(tmp_path: Path) -> None:
    reference = tiny_llama(seed=1)
    before = hash_weights(reference).whole
    trainer = trainer_of(tmp_path, ref_model=reference, reference="live")
    trainer.train()
    assert hash_weights(reference).whole == before
    own = trainer_of(tmp_path, reference="live", eval_dataset=random_dataset(4, seed=2))
    own.train()
    assert hash_weights(own.ref_model).whole == own.policy_hash != hash_weights(own.model).whole


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reference": "adapter-off"}, "no adapter to switch off"),
        ({"reference": "some/path", "ref_model": 1}, "reference='some/path' and ref_model are both given"),
        (
            {"reference": "adapter-off", "ref_model": 1},
            "reference='adapter-off' and ref_model are both given",
        ),
    ],
)
def test_a_reference_is_named_once(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    if "ref_model" in settings:
        settings = settings | {"ref_model": tiny_llama(seed=1)}
    with pytest.raises(RecipeError, match=message):
        trainer_of(tmp_path, **settings)


@pytest.mark.parametrize(
    "config",
    [
        OPTConfig(vocab_size=61, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                  word_embed_proj_dim=32, dropout=0.3, layerdrop=0.5, bos_token_id=1, eos_token_id=2),
        BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.3, attention_dropout=0.3),
        FalconConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, hidden_dropout=0.3,
                     attention_dropout=0.3, bos_token_id=1, eos_token_id=2),
        GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.3, resid_pdrop=0.3,
                   embd_pdrop=0.3, bos_token_id=1, eos_token_id=2),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_without_dropout_a_model_in_training_is_a_function(config: Any) -> None:
    model = tiny_of(config)
    ids = torch.arange(3, 21).reshape(2, 9)
    model.train()
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    disable_dropout(model)
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


# ---- adapters ------------------------------------------------------------------------------------------------------

LORA = LoraConfig(
    r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
)


def lora_run(folder: Path, **settings: Any) -> InfoPOTrainer:
    settings = {"learning_rate": 0.05, "reference_sides": "both", "max_steps": 4, **settings}
    trainer = trainer_of(folder, peft_config=copy.deepcopy(LORA), **settings)
    trainer.train()
    return trainer


def test_with_a_fresh_adapter_every_reference_is_the_base_and_trains_alike(tmp_path: Path) -> None:
    runs = [lora_run(tmp_path, reference=name) for name in ("auto", "adapter-off", "live")]
    first = step_records(runs[0])
    assert first[0]["rewards/rejected"] == pytest.approx(0, abs=1e-4)
    assert abs(first[-1]["rewards/rejected"]) > 1e-2
    for other in runs[1:]:
        for a, b in zip(first, step_records(other), strict=True):
            names = a.keys() - {"rewards/accuracies"}  # of margins that are zero up to rounding
            assert {k: b[k] for k in names} == pytest.approx({k: a[k] for k in names}, **FLOAT32)
    assert runs[1].reference_in_words == "the policy without its adapter"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_adapter_is_trained(tmp_path: Path, checkpointing: bool) -> None:
    trainer = lora_run(tmp_path, activation_checkpointing=checkpointing)
    assert isinstance(trainer.model, PeftModel)
    base = dict(tiny_llama().named_parameters())
    moved = []
    for name, parameter in trainer.model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if "lora_" in name:
            moved.append(bool(parameter.abs().max() > 0))
        else:
            assert torch.equal(parameter, base[plain]), name
    assert len(moved) == 8
    assert all(moved)


def test_a_trained_adapter_is_its_own_reference_as_it_is_now(tmp_path: Path) -> None:
    """Not the base model: the SFT policy of the second training is base and adapter together."""
    trained = lora_run(tmp_path).model
    examples = random_examples(4, seed=8)
    frozen = copy.deepcopy(trained)
    trainer = trainer_of(
        tmp_path, ExampleDataset.from_examples(examples), trained, reference_sides="both", max_steps=2,
        learning_rate=0.05,
    )  # fmt: skip
    trainer.train()
    first, second = step_records(trainer)
    assert first["rewards/rejected"] == pytest.approx(0, abs=1e-4)
    assert first["logps/chosen"] == pytest.approx(
        hand_metrics(hand_logps(frozen, frozen, examples), 1.0, 5.0)["logps/chosen"], **FLOAT32
    )
    assert abs(second["rewards/rejected"]) > 1e-3


def test_adapter_off_under_a_trained_adapter_is_the_base(tmp_path: Path) -> None:
    trained = lora_run(tmp_path).model
    examples = random_examples(4, seed=8)
    logps = hand_logps(copy.deepcopy(trained), tiny_llama(), examples)
    trainer = trainer_of(
        tmp_path,
        ExampleDataset.from_examples(examples),
        trained,
        reference="adapter-off",
        reference_sides="both",
        max_steps=1,
    )
    trainer.train()
    (record,) = step_records(trainer)
    expected = hand_metrics(logps, 1.0, 5.0)
    assert abs(expected["rewards/rejected"]) > 1e-2
    assert {k: record[k] for k in expected} == pytest.approx(expected, **FLOAT32)


def test_a_saved_adapter_loads_on_its_base(tmp_path: Path) -> None:
    raw = datasets.Dataset.from_list(ROWS)
    trainer = trainer_of(
        tmp_path, raw, str(policy_path()), peft_config=copy.deepcopy(LORA), learning_rate=0.5
    )
    trainer.train()
    trainer.save_final_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32").eval()
    ids = torch.arange(3, 12)[None]
    trainer.model.eval()
    with torch.no_grad():
        logits = loaded(input_ids=ids).logits
        torch.testing.assert_close(logits, trainer.model(input_ids=ids).logits)
        base = AutoModelForCausalLM.from_pretrained(policy_path(), dtype="float32")(input_ids=ids).logits
    assert (base - logits).abs().max() > 1e-3
    assert not list(tmp_path.glob(".*"))


def test_a_second_adapter_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), copy.deepcopy(LORA))
    with pytest.raises(ModelError, match="already carries an adapter"):
        trainer_of(tmp_path, model=model, peft_config=copy.deepcopy(LORA))
