"""What the trainer promises: its metrics, evaluation, reference, refusals and checkpoints."""

import copy
import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import IterableDataset
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    FalconConfig,
    GPT2Config,
    OPTConfig,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)

from infopo.arguments import InfoPOConfig, refuse_arguments
from infopo.data.examples import ExampleDataset
from infopo.data.packing import pack
from infopo.errors import (
    DataError,
    ModelError,
    NonFiniteLossError,
    RecipeError,
    ReferenceMismatchError,
    UnsupportedArgumentError,
)
from infopo.hashing import hash_weights
from infopo.lab import policy_path
from infopo.lab.tokenizer import build_tokenizer
from infopo.losses.registry import loss_function
from infopo.metrics import MetricSums, non_finite_rows
from infopo.models import disable_dropout
from infopo.records import PreferenceExample, ResponseLogps, Role
from infopo.reference import LiveReference
from infopo.trainer import InfoPOTrainer
from worlds import PLAIN_SGD, random_dataset, random_examples, tiny_llama, tiny_of

SETTINGS: dict[str, Any] = {
    **PLAIN_SGD,
    "max_steps": 3,
    "reference_sides": "needed",
    "report_to": "none",
    "per_device_train_batch_size": 4,
}
TOKENIZER = build_tokenizer()
# Sums over at most 12 tokens in float32, in another order.
FLOAT32 = {"rel": 1e-4, "abs": 1e-4}


def trainer_of(
    folder: Path, train: Any = None, model: Any = None, callbacks: Any = None, **settings: Any
) -> InfoPOTrainer:
    """A trainer of a tiny model on random rows; `settings` are arguments of the trainer or of its configuration."""
    names = (
        "ref_model",
        "eval_dataset",
        "peft_config",
        "data_collator",
        "compute_metrics",
        "quantization_config",
    )
    arguments = {name: settings.pop(name) for name in names if name in settings}
    processing_class = settings.pop("processing_class", TOKENIZER)
    return InfoPOTrainer(
        model=tiny_llama() if model is None else model,
        args=InfoPOConfig(output_dir=str(folder), **{**SETTINGS, **settings}),
        train_dataset=random_dataset(12) if train is None else train,
        processing_class=processing_class,
        callbacks=callbacks,
        **arguments,
    )


def step_records(trainer: InfoPOTrainer) -> list[dict[str, float]]:
    return [record for record in trainer.state.log_history if "loss" in record]


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


def hand_logps(
    policy: PreTrainedModel, reference: PreTrainedModel, examples: list[PreferenceExample]
) -> ResponseLogps:
    """Log-probs by the definition, each response alone and unpadded."""

    def logp(model: PreTrainedModel, prompt: Any, response: Any) -> float:
        ids = torch.tensor([[*prompt, *response]])
        rows = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return float(rows.gather(1, torch.tensor(list(response))[:, None]).double().sum())

    columns: tuple[list, ...] = ([], [], [], [], [])
    with torch.no_grad():
        for index, example in enumerate(examples):
            sides = [(Role.CHOSEN, r) for r in example.chosen_ids] + [
                (Role.REJECTED, r) for r in example.rejected_ids
            ]
            for role, response in sides:
                values = (
                    logp(policy, example.prompt_ids, response),
                    logp(reference, example.prompt_ids, response),
                    len(response),
                    int(role),
                    index,
                )
                for column, value in zip(columns, values, strict=True):
                    column.append(value)
    floats = [torch.tensor(c, dtype=torch.float64) for c in columns[:2]]
    return ResponseLogps.of(*floats, *(torch.tensor(c) for c in columns[2:]))


def hand_metrics(logps: ResponseLogps, beta: float, cap: float) -> dict[str, float]:
    """Every metric, response by response in plain Python."""
    rows = [
        {
            "logp": float(p),
            "log_ratio": float(p - r),
            "reward": beta * float(p - r),
            "role": int(role),
            "example": int(e),
        }
        for p, r, role, e in zip(logps.policy, logps.reference, logps.role, logps.example, strict=True)
    ]
    chosen = [r for r in rows if r["role"] == Role.CHOSEN]
    rejected = [r for r in rows if r["role"] == Role.REJECTED]
    pairs = [(c, r) for c in chosen for r in rejected if c["example"] == r["example"]]
    margins = [c["reward"] - r["reward"] for c, r in pairs]
    of_policy = [c["logp"] - r["logp"] for c, r in pairs]
    ratios = [math.exp(min(r["reward"], cap)) for r in rejected]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return {
        "logps/chosen": mean([r["logp"] for r in chosen]),
        "logps/rejected": mean([r["logp"] for r in rejected]),
        "logps/margins": mean(of_policy),
        "logps/accuracies": mean([float(m > 0) for m in of_policy]),
        "logratios/chosen": mean([r["log_ratio"] for r in chosen]),
        "logratios/rejected": mean([r["log_ratio"] for r in rejected]),
        "rewards/chosen": mean([r["reward"] for r in chosen]),
        "rewards/rejected": mean([r["reward"] for r in rejected]),
        "rewards/margins": mean(margins),
        "rewards/accuracies": mean([float(m > 0) for m in margins]),
        "ratio/mean": mean(ratios),
        "ratio/max": max(ratios),
        "ratio/capped": mean([float(r["reward"] > cap) for r in rejected]),
    }


def hand_loss(logps: ResponseLogps, name: str, parameters: dict[str, Any]) -> float:
    return sum(float(term.values.mean()) for term in loss_function(name, parameters)(logps))


# ---- metrics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [None, 30])
def test_metrics_are_means_over_all_responses_since_the_last_record(
    tmp_path: Path, pieces: int | None
) -> None:
    """8 rows in device batches of 3, 3, 2 with unequal numbers of responses: a mean of means would differ."""
    policy, reference = tiny_llama(), tiny_llama(seed=1)
    examples = random_examples(8, chosen=(1, 2), rejected=(1, 3, 1))
    trainer = trainer_of(
        tmp_path,
        ExampleDataset.from_examples(examples),
        copy.deepcopy(policy),
        ref_model=reference,
        objective_parameters={"beta": 0.3, "cap": 1.0},
        reference_sides="both",
        train_sampling_strategy="sequential",
        learning_rate=1e-30,
        per_device_train_batch_size=3,
        logging_steps=3,
        max_tokens_per_forward=pieces,
    )
    trainer.train()
    (record,) = step_records(trainer)
    expected = hand_metrics(hand_logps(policy, reference, examples), beta=0.3, cap=1.0)
    assert 0 < expected["ratio/capped"] < 1
    assert {name: record[name] for name in expected} == pytest.approx(expected, **FLOAT32)


def test_the_ratio_of_the_length_normalized_loss_is_normalized_and_its_rewards_are_not(
    tmp_path: Path,
) -> None:
    policy, reference = tiny_llama(), tiny_llama(seed=1)
    examples = random_examples(4)
    logps = hand_logps(policy, reference, examples)
    trainer = trainer_of(
        tmp_path,
        ExampleDataset.from_examples(examples),
        policy,
        ref_model=reference,
        objective_parameters={"length_normalized": True},
        max_steps=1,
    )
    trainer.train()
    (record,) = step_records(trainer)
    log_ratio = (logps.policy - logps.reference)[logps.rejected]
    per_token = (log_ratio / logps.length[logps.rejected]).clamp(max=5.0)
    assert record["ratio/mean"] == pytest.approx(float(per_token.exp().mean()), **FLOAT32)
    assert record["rewards/rejected"] == pytest.approx(float(log_ratio.mean()), **FLOAT32)


@pytest.mark.parametrize("pieces", [None, 30])
def test_the_loss_of_every_step_is_that_of_its_rows_by_hand(tmp_path: Path, pieces: int | None) -> None:
    """Mean over the step's chosen responses plus mean over its rejected ones, whatever the micro-batches hold."""
    policy, reference = tiny_llama(), tiny_llama(seed=1)
    examples = random_examples(10, chosen=(1, 2), rejected=(1, 3, 1))
    trainer = trainer_of(
        tmp_path,
        ExampleDataset.from_examples(examples),
        copy.deepcopy(policy),
        ref_model=reference,
        train_sampling_strategy="sequential",
        learning_rate=1e-30,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        max_steps=2,
        max_tokens_per_forward=pieces,
    )
    trainer.train()
    for record, rows in zip(step_records(trainer), (examples[:6], examples[6:]), strict=True):
        by_hand = hand_loss(hand_logps(policy, reference, rows), "infopo", {})
        assert record["loss"] == pytest.approx(by_hand, **FLOAT32)


def test_several_loss_types_are_added_with_their_weights_and_rewards_take_the_beta_that_there_is(
    tmp_path: Path,
) -> None:
    policy, reference = tiny_llama(), tiny_llama(seed=1)
    examples = random_examples(4)
    logps = hand_logps(policy, reference, examples)
    trainer = trainer_of(
        tmp_path,
        ExampleDataset.from_examples(examples),
        policy,
        ref_model=reference,
        loss_type=["sft", "sigmoid"],
        loss_weights=[0.25, 2.0],
        beta=0.2,
        max_steps=1,
    )
    assert trainer.objective_in_words().startswith(
        "0.25 x SFT on chosen (token_mean=True) + 2 x DPO (beta=0.2"
    )
    trainer.train()
    (record,) = step_records(trainer)
    tokens = logps.length[logps.chosen].sum()
    nll = float(-logps.policy[logps.chosen].sum() / tokens)
    dpo = hand_loss(logps, "dpo", {"beta": 0.2})
    assert record["loss"] == pytest.approx(0.25 * nll + 2.0 * dpo, **FLOAT32)
    expected = hand_metrics(logps, beta=0.2, cap=5.0)
    assert record["rewards/margins"] == pytest.approx(expected["rewards/margins"], **FLOAT32)


def test_sums_and_maxima_are_over_everything_added_and_start_afresh() -> None:
    sums = MetricSums()
    for total, count, highest in ((4.0, 1, 3.0), (2.0, 3, 7.0), (0.0, 0, -math.inf), (3.0, 2, 5.0)):
        sums.add(
            {"mean": (torch.tensor(total), count), "absent": (torch.tensor(0.0), 0)},
            {"max": torch.tensor(highest), "no max": torch.tensor(-math.inf)},
        )
    assert sums.reduce(lambda values: values) == {"mean": 1.5, "max": 7.0}
    assert sums.reduce(lambda values: values) == {}


def test_a_second_training_starts_its_metrics_afresh(tmp_path: Path) -> None:
    """The last step of the first one is never logged, and must not count in the second one's first record."""
    trainer = trainer_of(tmp_path, learning_rate=1e-30, logging_steps=2)
    trainer.train()
    first = step_records(trainer)
    trainer.train()
    assert step_records(trainer)[0] == pytest.approx(first[0])


def test_tokens_seen_are_those_of_all_rows(tmp_path: Path) -> None:
    examples = random_examples(8)
    trainer = trainer_of(
        tmp_path,
        ExampleDataset.from_examples(examples),
        max_steps=2,
        include_num_input_tokens_seen="all",
    )
    trainer.train()
    tokens = sum(len(e.prompt_ids) + len(r) for e in examples for r in e.response_ids)
    assert trainer.state.num_input_tokens_seen == tokens
    parameters = trainer.model.num_parameters(exclude_embeddings=True)
    assert trainer.state.total_flos == 6 * parameters * tokens


def test_tensorboard_gets_our_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = trainer_of(
        tmp_path, report_to="tensorboard", reference_sides="both", eval_dataset=random_dataset(4, seed=3)
    )
    trainer.train()
    evaluated = trainer.evaluate()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    margins = events.Scalars("train/rewards/margins")
    assert [event.step for event in margins] == [1, 2, 3]
    assert [event.value for event in margins] == pytest.approx(
        [record["rewards/margins"] for record in step_records(trainer)]
    )
    assert events.Scalars("train/ratio/mean")
    assert events.Scalars("eval/loss")[0].value == pytest.approx(evaluated["eval_loss"])


# ---- evaluation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["infopo", "dpo", "sft"])
def test_evaluation_is_over_the_whole_set_whatever_the_batch(tmp_path: Path, objective: str) -> None:
    policy, reference = tiny_llama(), tiny_llama(seed=1)
    examples = random_examples(7, seed=5, chosen=(1, 2), rejected=(3, 1, 1))
    logps = hand_logps(policy, reference, examples)
    loss = hand_loss(logps, objective, {})
    metrics = hand_metrics(logps, beta=0.1 if objective == "dpo" else 1.0, cap=5.0)
    for settings in (
        {"per_device_eval_batch_size": 1},
        {"per_device_eval_batch_size": 3, "dataloader_drop_last": True},
        {"per_device_eval_batch_size": 8, "max_tokens_per_forward": 25},
    ):
        trainer = trainer_of(
            tmp_path,
            model=policy,
            ref_model=reference,
            objective=objective,
            reference_sides="both",
            eval_dataset=ExampleDataset.from_examples(examples),
            **settings,
        )
        got = trainer.evaluate()
        assert got["eval_loss"] == pytest.approx(loss, **FLOAT32)
        own = set() if objective == "infopo" else {"ratio/mean", "ratio/max", "ratio/capped"}
        own |= {n for n in metrics if n.startswith("rewards/")} if objective == "sft" else set()
        for name in metrics.keys() - own:
            assert got[f"eval_{name}"] == pytest.approx(metrics[name], **FLOAT32), name
        assert trainer.args.dataloader_drop_last is settings.get("dataloader_drop_last", False)


def test_evaluation_twice_gives_the_same_numbers_and_an_interrupted_one_leaves_no_trace(
    tmp_path: Path,
) -> None:
    class Interrupt(TrainerCallback):
        armed = False

        def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.armed:
                raise KeyboardInterrupt

    interrupt = Interrupt()
    trainer = trainer_of(
        tmp_path, callbacks=[interrupt], eval_dataset=random_dataset(6, seed=2), per_device_eval_batch_size=2
    )

    def numbers() -> dict[str, float]:
        metrics = trainer.evaluate()
        return {k: v for k, v in metrics.items() if not k.endswith(("runtime", "_per_second"))}

    before = numbers()
    interrupt.armed = True
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate()
    interrupt.armed = False
    assert numbers() == before


def test_evaluation_during_training_changes_nothing(tmp_path: Path) -> None:
    plain = trainer_of(tmp_path)
    plain.train()
    evaluating = trainer_of(
        tmp_path, eval_dataset=random_dataset(5, seed=2), eval_strategy="steps", eval_steps=1
    )
    evaluating.train()
    assert torch.equal(weights(plain.model), weights(evaluating.model))
    for a, b in zip(step_records(plain), step_records(evaluating), strict=True):
        assert a == b
    assert len([r for r in evaluating.state.log_history if "eval_loss" in r]) == 3


def test_each_of_several_sets_is_evaluated_under_its_name(tmp_path: Path) -> None:
    sets = {"near": random_dataset(5, seed=2), "far": random_dataset(3, seed=3)}
    trainer = trainer_of(tmp_path, eval_dataset=sets)
    metrics = trainer.evaluate()
    for name, dataset in sets.items():
        alone = trainer_of(tmp_path, eval_dataset=dataset).evaluate()
        assert metrics[f"eval_{name}_loss"] == pytest.approx(alone["eval_loss"], rel=1e-9)
        assert metrics[f"eval_{name}_ratio/mean"] == pytest.approx(1.0, abs=1e-4)
    assert trainer.evaluate("far", metric_key_prefix="x")["x_loss"] == metrics["eval_far_loss"]


def test_a_set_that_comes_later_is_completed_with_its_reference_before_training_only(tmp_path: Path) -> None:
    late = random_dataset(5, seed=2)
    trainer = trainer_of(tmp_path, reference_sides="both")
    expected = trainer_of(tmp_path, eval_dataset=late, reference_sides="both").evaluate()
    for data, prefix in ((late, "eval"), ({"late": late}, "eval_late")):
        got = trainer.evaluate(data)
        assert got[f"{prefix}_loss"] == pytest.approx(expected["eval_loss"], rel=1e-9)
        assert got[f"{prefix}_rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    trainer.train()
    with pytest.raises(RecipeError, match=r"evaluate\(eval_dataset=.*Give this dataset to the constructor"):
        trainer.evaluate(late)


@pytest.mark.parametrize("settings", [{"reference": "live"}, {"objective": "simpo"}])
def test_with_a_reference_at_hand_or_none_needed_a_set_may_come_after_training(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    late = random_dataset(5, seed=2)
    given = trainer_of(tmp_path, eval_dataset=late, **settings)
    given.train()
    trainer = trainer_of(tmp_path, **settings)
    trainer.train()
    assert trainer.evaluate(late)["eval_loss"] == given.evaluate()["eval_loss"]


ROWS = [
    {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 11"},
    {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 22 or so"},
    {"prompt": "3 + 3 =", "chosen": " it is 6", "rejected": " 33"},
]


def test_a_raw_dataset_is_tokenized_wherever_it_is_given(tmp_path: Path) -> None:
    raw = datasets.Dataset.from_list(ROWS)
    trainer = trainer_of(tmp_path, raw, str(policy_path()), eval_dataset=raw)
    late = trainer.evaluate(raw)["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(late, rel=1e-9)
    assert trainer.train_dataset.row_ids == ["train_dataset:1", "train_dataset:2", "train_dataset:3"]
    assert trainer.eval_dataset.row_ids == ["eval_dataset:1", "eval_dataset:2", "eval_dataset:3"]
    trainer.train()


def test_predict_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedArgumentError, match=r"evaluate\(dataset, metric_key_prefix='test'\)"):
        trainer_of(tmp_path).predict(random_dataset(3))


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


def marked_rows(n: int) -> ExampleDataset:
    """Random rows; the third alone holds token 60, in its prompt."""
    rows = [
        PreferenceExample(
            [t % 60 or 1 for t in e.prompt_ids],
            [[t % 60 or 1 for t in r] for r in e.chosen_ids],
            [[t % 60 or 1 for t in r] for r in e.rejected_ids],
            e.row_id,
        )
        for e in random_examples(n)
    ]
    marked = PreferenceExample([60], rows[2].chosen_ids, rows[2].rejected_ids, rows[2].row_id)
    return ExampleDataset.from_examples([*rows[:2], marked, *rows[3:]])


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
    "use_weighting": True,
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


# ---- order and checkpoints -----------------------------------------------------------------------------------------


def order_of(folder: Path, **settings: Any) -> list[list[str]]:
    """Rows of every step, as the trainer gets them."""
    trainer = trainer_of(folder, learning_rate=1e-30, **settings)
    steps: list[list[str]] = []
    plain = trainer.get_batch_samples

    def noted(*args: Any) -> Any:
        batches, counts = plain(*args)
        steps.append([row for batch in batches for piece in batch for row in piece.row_ids])
        return batches, counts

    trainer.get_batch_samples = noted  # type: ignore[method-assign]
    trainer.train()
    return steps


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_an_epoch_holds_every_row_once_in_an_order_of_seed_and_epoch(tmp_path: Path, strategy: str) -> None:
    data = random_dataset(46, rejected=(1, 4))
    settings = {"max_steps": -1, "num_train_epochs": 2, "train_sampling_strategy": strategy, "train": data}
    steps = order_of(tmp_path, **settings)
    first, second = [*chain(*steps[:12])], [*chain(*steps[12:])]
    assert sorted(first) == sorted(second) == sorted(data.row_ids)
    assert first != second
    assert order_of(tmp_path, **settings) == steps
    seeds = [order_of(tmp_path, **settings, seed=7, data_seed=seed) for seed in (None, 0, 1)]
    assert seeds[0] != seeds[1] != seeds[2]
    assert order_of(tmp_path, **settings, seed=8, data_seed=0) == seeds[1]
    if strategy == "group_by_length":
        length = dict(zip(data.row_ids, data.lengths.tolist(), strict=True))
        spread = [
            max(length[r] for r in step) - min(length[r] for r in step) for step in steps if len(step) > 2
        ]
        assert sum(spread) / len(spread) < (max(length.values()) - min(length.values())) / 2


def test_the_best_checkpoint_is_kept_named_by_its_place_and_loaded_at_the_end(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path,
        eval_dataset=random_dataset(6, seed=2),
        max_steps=6,
        learning_rate=0.03,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    trainer.train()
    losses = {r["step"]: r["eval_loss"] for r in trainer.state.log_history if "eval_loss" in r}
    best = min(losses, key=lambda step: losses[step])
    assert best < 5, losses  # so that the limit of 2 would have removed it
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{best}", "checkpoint-6"]
    saved = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint, dtype="float32")
    assert hash_weights(saved).whole == hash_weights(trainer.model).whole
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-9)
    assert not (tmp_path / ".staging").exists()


def test_early_stopping_works_on_our_metrics(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path,
        eval_dataset=random_dataset(6, seed=2),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
        reference_sides="both",
        max_steps=30,
        learning_rate=1e-30,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/accuracies",
        greater_is_better=True,
    )
    trainer.train()
    assert trainer.state.global_step == 4
