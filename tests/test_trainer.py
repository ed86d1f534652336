"""What the trainer promises: its metrics, evaluation, order of rows and checkpoints."""

import copy
import math
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    TrainerCallback,
)

from infopo.data.examples import ExampleDataset
from infopo.errors import (
    RecipeError,
    UnsupportedArgumentError,
)
from infopo.hashing import hash_weights
from infopo.lab import policy_path
from infopo.metrics import MetricSums
from trainers import (
    FLOAT32,
    ROWS,
    hand_logps,
    hand_loss,
    hand_metrics,
    step_records,
    trainer_of,
    weights,
)
from worlds import quick, random_dataset, random_examples, tiny_llama

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


@pytest.mark.parametrize("strategy", quick(["random", "group_by_length"], "random"))
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
