"""What the trainer refuses: models, data, arguments, and losses that are not finite."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithPadding,
    GPT2Config,
    TrainerCallback,
    TrainingArguments,
)

from infopo.arguments import InfoPOConfig
from infopo.constructor import refuse_arguments
from infopo.data.examples import ExampleDataset
from infopo.data.packing import pack
from infopo.errors import (
    DataError,
    ModelError,
    NonFiniteLossError,
    RecipeError,
    UnsupportedArgumentError,
)
from infopo.hashing import hash_weights
from infopo.lab import policy_path
from infopo.lab.tokenizer import build_tokenizer
from infopo.losses.registry import loss_function
from infopo.metrics import non_finite_rows
from infopo.records import PreferenceExample, Role
from infopo.trainer import InfoPOTrainer
from trainers import ROWS, TOKENIZER, marked_rows, step_records, trainer_of, weights
from worlds import random_dataset, random_examples, tiny_llama, tiny_of

# ---- a loss that is not finite -------------------------------------------------------------------------------------


class Spoil(TrainerCallback):
    """Makes the log-probs of rows with token 60 NaN from the second step on, and keeps the weights of before."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 1:
            with torch.no_grad():
                model.model.embed_tokens.weight[60] = math.inf
            self.before = weights(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 6},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
        {"per_device_train_batch_size": 6, "max_tokens_per_forward": 30},
        {"per_device_train_batch_size": 6, "objective": "dpo"},
    ],
    ids=["one batch", "accumulated", "pieces", "pairs"],
)
def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_its_rows(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    spoil = Spoil()
    trainer = trainer_of(
        tmp_path, marked_rows(6), callbacks=[spoil], train_sampling_strategy="sequential", **settings
    )
    with pytest.raises(NonFiniteLossError, match=r"step 2: the loss is not finite; rows: rows.jsonl:3\. "):
        trainer.train()
    assert torch.equal(weights(trainer.model).nan_to_num(posinf=1e9), spoil.before.nan_to_num(posinf=1e9))
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("objective", ["infopo", "dpo"])
@pytest.mark.parametrize("spoiled", range(3))
def test_a_term_that_is_not_finite_names_the_row_of_its_own_response(objective: str, spoiled: int) -> None:
    """The log-probs are finite, a reference is not; and the rows hold unequal numbers of responses."""
    batch = pack(random_examples(3, chosen=(2, 1, 3), rejected=(1, 4, 1)))
    owned = (batch.example == spoiled) & (batch.role == Role.REJECTED)
    reference = torch.zeros(batch.num_responses, dtype=torch.float64)
    reference[owned.nonzero()[-1]] = math.nan
    logps = batch.with_logps(torch.full_like(reference, -3.0), reference)
    assert non_finite_rows(batch, logps, loss_function(objective)(logps)) == [f"rows.jsonl:{spoiled + 1}"]


# ---- models and data at the door -----------------------------------------------------------------------------------


def test_a_model_given_by_name_comes_with_its_tokenizer_in_float32(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, datasets.Dataset.from_list(ROWS), str(policy_path()), processing_class=None, max_steps=1
    )
    assert trainer.model.dtype == torch.float32
    trainer.train()
    trainer.save_final_model()
    assert (
        hash_weights(AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")).whole
        == hash_weights(trainer.model).whole
    )


def test_model_init_kwargs_reach_the_model(tmp_path: Path) -> None:
    raw = datasets.Dataset.from_list(ROWS)
    trainer = trainer_of(tmp_path, raw, str(policy_path()), model_init_kwargs={"dtype": "bfloat16"})
    assert trainer.model.dtype == torch.bfloat16
    with pytest.raises(RecipeError, match=r"quantization_config is given twice: .* in model_init_kwargs"):
        trainer_of(
            tmp_path,
            raw,
            str(policy_path()),
            quantization_config={"a": 1},
            model_init_kwargs={"quantization_config": {"a": 1}},
        )


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"61 token embeddings, but the data hold token .*tokenizer does not belong"
    ):
        trainer_of(tmp_path, datasets.Dataset.from_list(ROWS))


ENDS = {"bos_token_id": 1, "eos_token_id": 2}
LONG = ExampleDataset.from_examples([PreferenceExample([5] * 200, [[5] * 57], [[6] * 3], "rows.jsonl:1")])
JUST = ExampleDataset.from_examples([PreferenceExample([5] * 200, [[5] * 56], [[6] * 3], "rows.jsonl:1")])


@pytest.mark.parametrize("where", ["train", "eval", "eval of a dict", "late eval", "reference"])
def test_rows_beyond_the_context_are_refused_wherever_they_are(tmp_path: Path, where: str) -> None:
    trainer_of(tmp_path, JUST, eval_dataset=JUST)
    short = tiny_of(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, **ENDS))
    settings: dict[str, Any] = {
        "train": {"train": LONG},
        "eval": {"eval_dataset": LONG},
        "eval of a dict": {"eval_dataset": {"a": JUST, "b": LONG}},
        "late eval": {},
        "reference": {"train": JUST, "ref_model": short},
    }[where]
    message = r"reads at most (256|64) tokens, but .* has 25[67]: set max_length to"
    if where == "late eval":
        trainer = trainer_of(tmp_path)
        with pytest.raises(ModelError, match=message):
            trainer.evaluate(LONG)
    else:
        with pytest.raises(ModelError, match=message):
            trainer_of(tmp_path, **settings)


@pytest.mark.parametrize(
    ("data", "objective", "message"),
    [
        (
            random_dataset(4, chosen=(1, 1, 0), rejected=(1,)),
            "dpo",
            "rows.jsonl:3: has no chosen response; DPO",
        ),
        (random_dataset(4, chosen=(1,), rejected=(1, 0)), "simpo", "rows.jsonl:2: has no rejected response"),
        (
            random_dataset(4, chosen=(0,), rejected=(1,)),
            "sft",
            "holds no chosen response, which SFT on chosen",
        ),
        (ExampleDataset.from_examples([]), "infopo", "holds no example"),
    ],
    ids=["no chosen", "no rejected", "sft without chosen", "empty"],
)
def test_rows_that_an_objective_can_make_nothing_of_are_refused(
    tmp_path: Path, data: ExampleDataset, objective: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        trainer_of(tmp_path, data, objective=objective)
    with pytest.raises(DataError, match=message):
        trainer_of(tmp_path, eval_dataset=data, objective=objective)


@pytest.mark.parametrize(("chosen", "rejected"), [((1, 0), (0, 1)), ((1,), (0,)), ((0,), (1,))])
def test_infopo_takes_what_is_there(
    tmp_path: Path, chosen: tuple[int, ...], rejected: tuple[int, ...]
) -> None:
    trainer = trainer_of(
        tmp_path, random_dataset(8, chosen=chosen, rejected=rejected), reference_sides="both"
    )
    trainer.train()
    assert all(math.isfinite(value) for record in step_records(trainer) for value in record.values())
    assert not {"rewards/accuracies", "logps/margins"} & step_records(trainer)[0].keys()


# ---- refusals ------------------------------------------------------------------------------------------------------

NOT_HONOURED: dict[str, Any] = {
    "truncation_mode": "keep_end",
    "padding_free": True,
    "pad_to_multiple_of": 8,
    "ld_alpha": 0.5,
    "activation_offloading": True,
    "sync_ref_model": True,
    "train_sampling_strategy": "batch_rebalance",
}


@pytest.mark.parametrize("name", NOT_HONOURED)
def test_an_argument_that_is_not_honoured_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsupportedArgumentError, match=rf"^{name}="):
        InfoPOConfig(output_dir=str(tmp_path), use_cpu=True, **{name: NOT_HONOURED[name]})


def test_all_of_them_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedArgumentError) as caught:
        InfoPOConfig(output_dir=str(tmp_path), use_cpu=True, **NOT_HONOURED)
    assert sorted(p.split("=")[0] for p in caught.value.problems) == sorted(NOT_HONOURED)


def test_trl_has_no_argument_that_we_do_not_know_and_its_defaults_are_all_accepted(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from dataclasses import MISSING, fields

    ours = {f.name: f for f in fields(InfoPOConfig)}
    theirs = {f.name: f for f in fields(trl.DPOConfig) if f.init}
    assert theirs.keys() <= ours.keys()
    # Transformers' defaults there, ours here. Memory is pinned by default where there is an accelerator to pin it for.
    own = {"logging_nan_inf_filter", "remove_unused_columns", "dataloader_pin_memory"}
    for name, f in theirs.items():
        if f.default is not MISSING and name not in own | {"loss_type", "output_dir"}:
            assert ours[name].default in (f.default, None), name


def test_contradictions_are_listed_together(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        InfoPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            objective="dpo",
            loss_type=["sigmoid", "kto_pair"],
            loss_weights=[1.0],
            on_bad_row="drop",
            reference="live",
            precompute_ref_log_probs=True,
            reference_sides="left",
            max_length=0,
            max_tokens_per_forward=-1,
            logging_nan_inf_filter=True,
        )
    text = str(caught.value)
    for name in ("give one of the two", "'kto_pair'", "loss_weights", "on_bad_row", "precompute_ref_log_probs",
                 "reference_sides", "max_length", "max_tokens_per_forward", "logging_nan_inf_filter"):  # fmt: skip
        assert name in text
    assert len(caught.value.problems) == 9


class OtherStream(IterableDataset[Any]):
    """A stream of torch, whose rows have no shape."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def test_what_the_trainer_cannot_take_is_refused_at_once() -> None:
    model = tiny_llama()
    with pytest.raises(UnsupportedArgumentError) as caught:
        refuse_arguments(
            model,
            ref_model=model,
            args=TrainingArguments(output_dir="unused", use_cpu=True),
            data_collator=DataCollatorWithPadding(TOKENIZER),
            train_dataset=OtherStream(),
            compute_metrics=lambda prediction: {},
            quantization_config={"load_in_4bit": True},
        )
    named = [problem.split(":")[0] for problem in caught.value.problems]
    assert named == [
        "data_collator", "compute_metrics", "train_dataset", "args", "ref_model", "quantization_config",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config: the model is already loaded"),
        ({"ref_model": "the model"}, "ref_model: is the same object as model"),
    ],
)
def test_the_trainer_asks_before_it_works(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    model = tiny_llama()
    if "ref_model" in settings:
        settings = {"ref_model": model}
    with pytest.raises(RecipeError, match=message):
        trainer_of(tmp_path, model=model, **settings)


def test_a_train_dataset_is_required(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="train_dataset: is required"):
        InfoPOTrainer(tiny_llama(), args=InfoPOConfig(output_dir=str(tmp_path), use_cpu=True))


def test_an_unknown_pad_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="pad_token: '<nothing>' is not in"):
        trainer_of(tmp_path, pad_token="<nothing>", processing_class=build_tokenizer())
