"""The runs that studies share: they are those of the trainer, are kept, and measure what they say."""

import copy
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "studies"))

import drift
import lab_runs
import lab_world
from lab_runs import Run, finish, train_and_measure
from watched_runs import WatchedRun, Watcher, log_probs, train_and_watch

from infopo.arguments import InfoPOConfig
from infopo.data.examples import ExampleDataset
from infopo.generate import sample
from infopo.lab import make_problems
from infopo.lab.evaluation import as_prompt
from infopo.models import LAB_POLICY, load_policy, load_tokenizer
from infopo.trainer import InfoPOTrainer


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studies")


# A step takes all pairs, so that their order does not matter.
WHOLE = Run("tiny", "graded", 1, 6, "infopo", (("beta", 0.5),), 1e-4, batch=6, steps=2)


@pytest.mark.parametrize("objective", ["infopo", "dv"])
def test_a_run_ends_where_the_trainer_does(objective: str, work: Path, tmp_path: Path) -> None:
    run = replace(WHOLE, objective=objective)
    shared = lab_world.world(work, run.lab, run.labels, run.seed, run.pairs)
    trainer = InfoPOTrainer(
        model=load_policy(LAB_POLICY),
        args=InfoPOConfig(
            output_dir=str(tmp_path),
            objective=objective,
            beta=0.5,
            learning_rate=run.rate,
            num_train_epochs=run.steps,
            per_device_train_batch_size=run.batch,
            activation_checkpointing=False,
            reference_store="off",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=ExampleDataset.from_examples([replace(e, reference=None) for e in shared.pairs]),
        processing_class=shared.tokenizer,
    )
    trainer.train()
    own = train_and_measure(run, shared)["points"][-1]
    start = lab_runs.measure(shared.policy, shared)
    theirs = lab_runs.measure(trainer.model.eval(), shared)
    assert abs(own["chosen_change"]) > 1e-3
    assert own["sampled_accuracy"] != start["sampled_accuracy"]
    assert {k: own[k] for k in theirs} == pytest.approx(theirs, abs=2e-5)


def test_what_is_finished_is_not_computed_again(work: Path) -> None:
    runs = [replace(WHOLE, seed=seed, steps=1) for seed in (1, 2)]
    assert finish(work, runs, minutes=0) == []
    (first,) = finish(work, runs[:1])
    file = work / "runs" / f"{runs[0].key}.json"
    file.write_text(json.dumps({**first, "mark": 1}))
    again = finish(work, runs)
    assert [record.get("mark") for record in again] == [1, None]
    assert [record["seed"] for record in again] == [1, 2]


def test_every_setting_of_a_run_is_in_its_name() -> None:
    others = [
        replace(WHOLE, **{name: value})
        for name, value in {
            "lab": "short",
            "labels": "verified",
            "seed": 2,
            "pairs": 7,
            "objective": "dpo",
            "parameters": (("beta", 1.0),),
            "rate": 2e-4,
            "batch": 3,
            "steps": 3,
            "warmup": 1,
            "checkpoints": (1,),
        }.items()
    ]
    assert len({run.key for run in [WHOLE, *others]}) == 1 + len(others)


def test_greedy_accuracy_is_that_of_generation_and_probability_that_of_samples() -> None:
    policy, tokenizer = load_policy(LAB_POLICY).eval(), load_tokenizer(LAB_POLICY)
    problems = make_problems(60, 0, "evaluation")
    with torch.no_grad():
        greedy, probability = lab_world.solved(
            policy, lab_world.encode(tokenizer, problems), tokenizer.pad_token_id
        )
    prompts = [as_prompt(problem) for problem in problems]
    texts = sample(policy, tokenizer, prompts, max_new_tokens=44, temperature=0.0, batch_size=60, seed=0)
    assert greedy.tolist() == [r.text == p.solution for p, (r,) in zip(problems, texts, strict=True)]
    assert 0 < greedy.mean() < 1
    # 3.3 standard errors of 60 · 8 samples, whose share is their problem's probability.
    drawn = sample(
        policy,
        tokenizer,
        prompts,
        max_new_tokens=44,
        num_return_sequences=8,
        temperature=1.0,
        batch_size=480,
        seed=1,
    )
    share = sum(r.text == p.solution for p, rs in zip(problems, drawn, strict=True) for r in rs) / 480
    error = (probability * (1 - probability)).sum() ** 0.5 * 8**0.5 / 480
    assert share == pytest.approx(probability.mean(), abs=3.3 * error)


def test_the_trace_of_a_sum_starts_at_equal_shares_and_of_sft_has_none(work: Path) -> None:
    shared = lab_world.world(work, WHOLE.lab, WHOLE.labels, WHOLE.seed, WHOLE.pairs)
    share = {}
    for objective, parameters in (("infopo", (("beta", 1.0),)), ("sft", ())):
        run = replace(WHOLE, objective=objective, parameters=parameters, steps=1)
        share[objective] = train_and_measure(run, shared)["trace"][lab_runs.TRACE.index("rejected share")]
    assert share["infopo"] == pytest.approx([0.5], abs=1e-4)
    assert share["sft"] == [0.0]


def test_values_at_a_drift_lie_on_the_line_by_learning_rate_or_by_checkpoint() -> None:
    start = {"accuracy": 0.5}
    slow = {"rate": 1e-5, "points": [{"kl": 0.01, "accuracy": 0.52}, {"kl": 0.02, "accuracy": 0.54}]}
    fast = {"rate": 1e-4, "points": [{"kl": 0.1, "accuracy": 0.6}, {"kl": 0.22, "accuracy": 0.74}]}
    assert drift.at_drift([fast, slow], start, "accuracy", 0.12) == pytest.approx(0.64)
    assert drift.along_runs([fast, slow], start, "accuracy", 0.05) == pytest.approx(0.55)
    assert drift.along_runs([fast, slow], start, "accuracy", 0.015) == pytest.approx(0.53)
    assert drift.at_drift([fast, slow], start, "accuracy", 0.3) != 0


def test_an_interval_is_students() -> None:
    # Mean 2, SD 1, n = 3: 4.303 / √3.
    assert drift.interval([1.0, 2.0, 3.0, float("nan")]) == pytest.approx(
        {"mean": 2.0, "half": 4.303 / 3**0.5, "n": 3}
    )
    assert drift.interval([1.0, float("nan")]) is None


def test_watching_a_run_changes_nothing_and_gradients_forecast_a_small_step(work: Path) -> None:
    shared = lab_world.world(work, WHOLE.lab, WHOLE.labels, WHOLE.seed, WHOLE.pairs)
    run = WatchedRun(
        **{**asdict(WHOLE), "parameters": WHOLE.parameters},
        looks=(0, 2),
        gradients=(0,),
        judged=2,
        direction=6,
    )
    found, plain = train_and_watch(run, shared), train_and_measure(WHOLE, shared)
    assert found["points"] == plain["points"]
    assert [look["step"] for look in found["looks"]] == [0, 2]
    rows = found["gradients"][0]["rows"]
    policy = copy.deepcopy(shared.policy)
    before = log_probs(policy, shared.pairs[:2])
    watcher = Watcher(run, shared)
    direction = watcher.of_loss(policy, list(policy.parameters()), shared.pairs[:6])
    rate, place = 1e-6, 0
    with torch.no_grad():
        for p in policy.parameters():
            p -= rate * direction[place : place + p.numel()].view_as(p)
            place += p.numel()
    moved = (log_probs(policy, shared.pairs[:2]) - before)[::2] / rate
    assert rows["along_gradient"][:2] == pytest.approx(moved.tolist(), rel=0.05)


def test_foreign_pairs_are_the_verified_ones_behind_the_same_line(work: Path) -> None:
    plain, foreign = (lab_world.world(work, "tiny", labels, 1, 3) for labels in ("verified", "foreign"))
    for one, other in zip(plain.pairs, foreign.pairs, strict=True):
        added = len(other.chosen_ids[0]) - len(one.chosen_ids[0])
        assert added == len(b"0+0=0\n")
        assert list(other.chosen_ids[0])[added:] == list(one.chosen_ids[0])
        assert list(other.rejected_ids[0])[:added] == list(other.chosen_ids[0])[:added]
