"""An optimizer step is the same however its examples are cut into batches, pieces and ranks (rule 4)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

from infopo import estimators
from infopo.arguments import InfoPOConfig
from infopo.data import sampling
from infopo.data.examples import ExampleDataset
from infopo.data.packing import pack
from infopo.data.sampling import PaddedSampler
from infopo.logps.forward import response_logps
from infopo.losses.catalog import OBJECTIVES
from infopo.losses.registry import loss_function
from infopo.records import Role
from infopo.trainer import InfoPOTrainer
from worlds import PLAIN_SGD, quick, random_dataset, tiny_llama

TOLERANCE = 2e-5


class Logs(TrainerCallback):
    def __init__(self) -> None:
        self.records: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.records.append(dict(logs))


def run(tmp_path: Path, dataset: ExampleDataset, tokenizer: Any, **settings: Any) -> tuple[list, list]:
    """Weights after training, and the log records."""
    logs = Logs()
    args = InfoPOConfig(output_dir=str(tmp_path), **{**PLAIN_SGD, "max_steps": 3, **settings})
    model = tiny_llama()
    InfoPOTrainer(
        model=model, args=args, train_dataset=dataset, processing_class=tokenizer, callbacks=[logs]
    ).train()
    return [p.detach().clone() for p in model.parameters()], logs.records[:-1]


def assert_same(a: tuple[list, list], b: tuple[list, list]) -> None:
    for ours, theirs in zip(a[0], b[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
    for number, (ours, theirs) in enumerate(zip(a[1], b[1], strict=True)):
        assert ours.keys() == theirs.keys()
        # Before the first update every margin is zero up to rounding, whose sign decides the accuracy.
        left_out = {"grad_norm", "epoch", "memory/peak_gib"}
        left_out |= {"rewards/accuracies"} if number == ("loss" not in a[1][0]) else set()
        for name in ours.keys() - left_out:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-4), name


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from infopo.lab.tokenizer import build_tokenizer

    return build_tokenizer()


@pytest.mark.parametrize("objective", quick(sorted(OBJECTIVES), "infopo", "dv", "aot", "kto"))
def test_accumulation_and_pieces_change_neither_loss_nor_weights(
    tmp_path: Path, tokenizer: Any, objective: str
) -> None:
    """1 x 8 = 8 x 1 = 8 in pieces of at most 60 tokens, unequal numbers of responses a prompt included."""
    data = random_dataset(24, chosen=(1, 2), rejected=(1, 1, 3))
    whole = run(tmp_path, data, tokenizer, objective=objective, per_device_train_batch_size=8)
    accumulated = run(
        tmp_path,
        data,
        tokenizer,
        objective=objective,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
    )
    pieces = run(
        tmp_path,
        data,
        tokenizer,
        objective=objective,
        per_device_train_batch_size=8,
        max_tokens_per_forward=60,
    )
    assert_same(whole, accumulated)
    assert_same(whole, pieces)


def test_unpaired_data_train_infopo_and_an_uneven_last_step_weighs_its_own_rows(
    tmp_path: Path, tokenizer: Any
) -> None:
    data = random_dataset(10, chosen=(1, 0), rejected=(0, 1))
    a = run(tmp_path, data, tokenizer, per_device_train_batch_size=4)
    b = run(tmp_path, data, tokenizer, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert_same(a, b)


@pytest.mark.parametrize("objective", ["dv", "smile", "mine", "kto", "aot_unpaired"])
def test_unpaired_data_train_what_couples_them_and_a_step_without_rejected_is_no_trouble(
    tmp_path: Path, tokenizer: Any, objective: str
) -> None:
    """12 rows a step of 4, whole or in batches of 1; the first step holds chosen responses only."""
    data = random_dataset(12, chosen=(1, 1, 1, 1, 0, 1), rejected=(0, 0, 0, 0, 1, 0))
    settings = {"objective": objective, "train_sampling_strategy": "sequential"}
    a = run(tmp_path, data, tokenizer, per_device_train_batch_size=4, **settings)
    b = run(
        tmp_path, data, tokenizer, per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings
    )
    assert_same(a, b)


def first_scores(data: ExampleDataset) -> tuple[torch.Tensor, torch.Tensor]:
    """log r of another policy than the reference, of chosen and of rejected responses."""
    batch = pack(list(data))
    with torch.no_grad():
        f = response_logps(tiny_llama(), batch) - response_logps(tiny_llama(seed=1), batch)
    return f[batch.chosen], f[batch.rejected]


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (2, 4)])
def test_the_logged_loss_is_donsker_varadhan_of_the_whole_steps_scores(
    tmp_path: Path, tokenizer: Any, batch_size: int, accumulation: int
) -> None:
    """The reference is another model, so that the scores are no zeros; evaluation likewise, over its set."""
    data = random_dataset(8, chosen=(1, 2), rejected=(1, 3))
    logs = Logs()
    args = InfoPOConfig(
        output_dir=str(tmp_path),
        objective="dv",
        objective_parameters={"beta": 0.5},
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=accumulation,
        **{**PLAIN_SGD, "max_steps": 1},
    )
    trainer = InfoPOTrainer(
        model=tiny_llama(),
        ref_model=tiny_llama(seed=1),
        args=args,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        callbacks=[logs],
    )
    chosen, rejected = first_scores(data)
    expected = -float(estimators.donsker_varadhan(0.5 * chosen, 0.5 * rejected))
    assert abs(expected) > 0.1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.train()
    losses = [record["loss"] for record in logs.records if "loss" in record]
    assert losses[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (1, 8)])
@pytest.mark.parametrize("reference", ["live", "precompute"])
def test_ktos_reference_point_is_that_of_the_whole_step(
    tmp_path: Path, tokenizer: Any, batch_size: int, accumulation: int, reference: str
) -> None:
    """Weights after one step, and the loss in training and evaluation, by the definition."""
    data = random_dataset(8, seed=1, chosen=(1, 0), rejected=(0, 1))
    policy, other = tiny_llama(), tiny_llama(seed=5)
    args = InfoPOConfig(
        output_dir=str(tmp_path),
        objective="kto",
        objective_parameters={"beta": 0.3},
        reference=reference,
        reference_store="off",
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=accumulation,
        **{**PLAIN_SGD, "max_steps": 1, "learning_rate": 1.0},
    )
    trainer = InfoPOTrainer(
        model=tiny_llama(),
        ref_model=tiny_llama(seed=5),
        args=args,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
    )
    batch = pack(list(data.mismatched(None)))
    with torch.no_grad():
        reference_logps = response_logps(other, batch)
    logps = batch.with_logps(response_logps(policy, batch), reference_logps)
    z = (logps.policy - logps.reference)[logps.role == Role.KL].mean()
    assert z > 0.1
    loss = loss_function("kto", {"beta": 0.3})(logps)[0].values.sum() / 8
    loss.backward()
    evaluated = trainer.evaluate()
    assert evaluated["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert evaluated["eval_kl"] == pytest.approx(z.item(), rel=1e-5)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert logged["kl"] == pytest.approx(z.item(), rel=1e-4)
    for before, after in zip(policy.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(after, before - before.grad, rtol=0, atol=1e-5)


def test_mine_that_forgets_at_once_is_donsker_varadhan(tmp_path: Path, tokenizer: Any) -> None:
    data = random_dataset(12)
    dv = run(tmp_path, data, tokenizer, objective="dv", per_device_train_batch_size=4)
    settings = {"objective": "mine", "per_device_train_batch_size": 4}
    forgets = run(tmp_path, data, tokenizer, objective_parameters={"rate": 1.0, "cap": 50.0}, **settings)
    remembers = run(tmp_path, data, tokenizer, objective_parameters={"rate": 0.1, "cap": 50.0}, **settings)
    assert all(torch.equal(a, b) for a, b in zip(dv[0], forgets[0], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(dv[0], remembers[0], strict=True))


def test_checkpointing_activations_changes_nothing(tmp_path: Path, tokenizer: Any) -> None:
    data = random_dataset(12)
    plain = run(tmp_path, data, tokenizer, per_device_train_batch_size=4)
    for reentrant in (True, False):
        kwargs = {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"use_reentrant": reentrant},
        }
        assert_same(plain, run(tmp_path, data, tokenizer, per_device_train_batch_size=4, **kwargs))


@pytest.mark.parametrize("reference", ["live", "precompute"])
def test_where_the_reference_comes_from_changes_nothing(
    tmp_path: Path, tokenizer: Any, reference: str
) -> None:
    data = random_dataset(12)
    auto = run(tmp_path, data, tokenizer, per_device_train_batch_size=4)
    assert_same(auto, run(tmp_path, data, tokenizer, per_device_train_batch_size=4, reference=reference))


def test_absent_rows_fill_the_last_batch_and_no_row_comes_twice() -> None:
    sampler = PaddedSampler(SequentialSampler(range(10)), 4)
    assert list(sampler) == [*range(10), 10, 11]
    assert len(sampler) == 12
    assert list(PaddedSampler(SequentialSampler(range(8)), 4)) == list(range(8))


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_ranks_carry_equal_work_if_rows_are_grouped_by_length(tmp_path: Path, ranks: int) -> None:
    """And their rows of a step are those of one rank with as large a batch."""

    class Shared(InfoPOConfig):
        processes = 1

        @property
        def world_size(self) -> int:
            return self.processes

    def order(batch_size: int, processes: int) -> list[int]:
        settings = {"gradient_accumulation_steps": 2, "dataloader_drop_last": True, "use_cpu": True}
        args = Shared(str(tmp_path), train_sampling_strategy="group_by_length", **settings)
        args.processes = processes  # the constructor looks for them
        sampler = sampling.for_training(data, lambda: None, args, batch_size, lambda: 0)
        assert sampler is not None
        return list(sampler)

    data = random_dataset(64 * 60)
    rows = order(2, ranks)
    assert rows == order(2 * ranks, 1)
    work = torch.tensor(data.lengths[rows]).reshape(-1, ranks, 2).sum(2).double()
    assert (work.amax(1).sum() / work.mean(1).sum()).item() < 1.15


@pytest.mark.long
@pytest.mark.parametrize(
    "objective", ["infopo", "dpo", "dv", "smile", "mine", "kto", "aot", "aot_unpaired", "beta_dpo"]
)
def test_two_ranks_are_one_rank_with_twice_the_batch(tmp_path: Path, tokenizer: Any, objective: str) -> None:
    """21 rows on 2 ranks x 4: the last step leaves one rank short, and no row may count twice."""
    data = random_dataset(21, chosen=(1, 2), rejected=(1, 1, 3))
    more: dict[str, Any] = {}
    if objective == "kto":  # so that its reference point leaves 0
        more = {"learning_rate": 0.1, "objective_parameters": {"beta": 0.5, "undesirable_weight": 0.0}}
    if objective == "dv":  # with what is measured of the policy on the way
        more = {"probe_size": 6, "probe_steps": 2, "gradient_size": 3, "gradient_steps": 2, "anchor_size": 4}
    settings = {"objective": objective, "max_steps": -1, "num_train_epochs": 2, **more}
    one = run(tmp_path, data, tokenizer, per_device_train_batch_size=8, **settings)
    script = Path(__file__).with_name("two_ranks.py")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    subprocess.run([*command, str(tmp_path / "out.pt"), objective, json.dumps(more)], check=True, timeout=300)
    two = torch.load(tmp_path / "out.pt", weights_only=True)
    assert_same(one, (two["weights"], two["logs"]))
