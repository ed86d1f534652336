"""What is measured during training is true of the policy, and changes nothing of it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from infopo import probes
from infopo.data.examples import ExampleDataset
from infopo.data.packing import pack
from infopo.errors import CheckpointError, NonFiniteLossError
from infopo.generate import sample_ids
from infopo.intervals import wilson
from infopo.logps import spread
from infopo.logps.forward import prepare, response_logps
from infopo.records import Role
from infopo.report.headline import column
from infopo.report.reading import read_runs
from infopo.runs import JsonLines
from infopo.trainer import InfoPOTrainer
from infopo.workflows.forecast import forecast
from infopo.workflows.forecast import lines as lines_of
from trainers import TOKENIZER, trainer_of, weights
from worlds import random_dataset, random_examples, tiny_llama

MEASURED: dict[str, Any] = {
    "probe_size": 6, "probe_steps": 2, "anchor_size": 4, "anchor_tokens": 5, "gradient_size": 3,
    "gradient_steps": 2, "generation_steps": 2, "max_steps": 4, "logging_steps": 2, "learning_rate": 0.05,
}  # fmt: skip


def measured(folder: Path, train: Any = None, **settings: Any) -> InfoPOTrainer:
    trainer = trainer_of(folder, train, **MEASURED | settings)
    trainer.train()
    return trainer


def records(trainer: InfoPOTrainer) -> list[dict[str, float]]:
    return [record for record in trainer.state.log_history if "probe/n" in record]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": True, "disable_dropout": False}])
def test_training_is_the_same_with_and_without_it(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = {"attention_dropout": 0.3} if settings else {}
    plain = trainer_of(tmp_path / "off", model=tiny_llama(**model), **MEASURED | {"probe_size": 0} | settings)
    plain.train()
    observed = trainer_of(tmp_path / "on", model=tiny_llama(**model), **MEASURED | settings)
    observed.train()
    assert len(records(observed)) == 3
    assert not records(plain)
    assert torch.equal(weights(plain.model), weights(observed.model))
    assert not (tmp_path / "off" / "probe.json").exists()


def test_log_probs_are_those_of_the_policy(tmp_path: Path) -> None:
    trainer = measured(tmp_path, eval_dataset=random_dataset(6, seed=3), reference_store="off")
    held_out = list(random_dataset(6, seed=3))
    batch = pack(held_out)
    with torch.no_grad():
        start = response_logps(tiny_llama(), batch, "naive").numpy()
        now = response_logps(trainer.model, batch, "naive").numpy()
    chosen = np.array([role == Role.CHOSEN for role in batch.roles])
    first, *_, last = records(trainer)
    assert first["step"] == 0
    assert last["step"] == 4
    assert first["probe/logps/chosen"] == pytest.approx(start[chosen].mean(), rel=1e-5)
    assert last["probe/logps/rejected"] == pytest.approx(now[~chosen].mean(), rel=1e-5)
    assert last["probe/change/chosen"] == pytest.approx((now - start)[chosen].mean(), abs=1e-4)
    assert last["drift/chosen"] == last["probe/change/chosen"]  # the policy at the start is the reference
    assert first["probe/change/chosen"] == first["drift/rejected"] == first["kl/forward"] == 0
    assert last["kl/forward"] != 0
    kept = probes.read(tmp_path)
    assert kept is not None
    assert kept[0] is not None
    assert kept[0].row_ids == [each.row_id for each in held_out]


def test_gradients_are_those_of_the_loss(tmp_path: Path) -> None:
    """Norms of the two sides against gradients of the loss itself, and what a small step does to the likelihood."""
    trainer = trainer_of(tmp_path, objective="dpo", beta=1.0, **MEASURED)
    model, [first, *_] = trainer.model, [list(trainer.train_dataset)]
    tools = trainer.subject().instruments
    found = tools.balance(first[:4])
    batch = pack(first[:4])
    policy = response_logps(model, batch)
    logps = batch.with_logps(policy, policy.detach() + torch.linspace(-1, 1, len(policy)))
    assert found.weight_chosen == pytest.approx(0.5) == found.weight_rejected  # β σ(0), the mean over pairs
    gradients = {}
    for side, which in (("chosen", logps.chosen), ("rejected", logps.rejected)):
        model.zero_grad()
        (0.5 * response_logps(model, batch)[which].mean()).backward()
        gradients[side] = torch.cat([p.grad.flatten().double() for p in model.parameters()])
    assert found.chosen == pytest.approx(float(gradients["chosen"].norm()), rel=1e-4)
    assert found.rejected == pytest.approx(float(gradients["rejected"].norm()), rel=1e-4)
    assert found.inner == pytest.approx(float(gradients["chosen"] @ gradients["rejected"]), rel=1e-3)


def test_a_forecast_is_what_a_small_step_does(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, train=random_dataset(12, seed=5), **MEASURED)
    tools = trainer.subject().instruments
    agreed = []
    for pair in list(trainer.train_dataset)[:8]:
        found = tools.balance([pair])
        batch = pack([pair])
        model = tiny_llama().double()
        policy = response_logps(model, batch, "naive")
        (policy[batch.rejected].sum() - policy[batch.chosen].sum()).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 1e-6 * p.grad
            moved = response_logps(model, batch, "naive") - policy
        agreed.append(found.chosen_falls == bool(moved[batch.chosen] < 0))
    assert all(agreed)


def test_a_change_along_a_step_is_what_a_small_step_on_all_rows_does(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, train=random_dataset(6, seed=5), **MEASURED)
    pairs = list(trainer.train_dataset)
    found = trainer.subject().instruments.along_a_step(pairs[:4], pairs)
    batch, model = pack(pairs), tiny_llama().double()
    policy = response_logps(model, batch, "naive")
    ((policy[batch.rejected].sum() - policy[batch.chosen].sum()) / len(pairs)).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 1e-6 * p.grad
        moved = (response_logps(model, batch, "naive") - policy)[batch.chosen] / 1e-6
    assert found == pytest.approx(moved[:4].tolist(), rel=5e-3)
    assert all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize("path", ["forest", "padded", "naive"])
def test_spread_is_that_of_the_whole_logits(path: str) -> None:
    model, examples = tiny_llama(), random_examples(4)
    prepare([model], "naive" if path == "naive" else "auto")
    with torch.no_grad(), spread.measured() as found:
        response_logps(model, pack(examples), path)
    entropy, log_p_max = [], []
    for example in examples:
        for ids in example.response_ids:
            row = torch.tensor([[*example.prompt_ids, *ids]])
            with torch.no_grad():
                logits = model(input_ids=row).logits[0, len(example.prompt_ids) - 1 : -1].double()
            logp = logits.log_softmax(-1)
            entropy += (-(logp.exp() * logp).sum(-1)).tolist()
            log_p_max += logp.amax(-1).tolist()
    assert found.positions == len(entropy)
    assert found.means() == pytest.approx((np.mean(entropy), np.mean(log_p_max)), rel=1e-4)
    with spread.measured() as none:
        pass
    assert all(math.isnan(value) for value in none.means())


def test_spread_in_tiles_and_with_excluded_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from infopo.logps import lm_head

    hidden, weight = torch.randn(5, 8), torch.randn(37, 8)
    bias = torch.zeros(37)
    bias[3] = -torch.inf
    whole = (hidden @ weight.T + bias).double().log_softmax(-1)
    monkeypatch.setitem(lm_head.TILE_LOGITS, "cpu", 24)
    monkeypatch.setitem(lm_head.TILE_COLUMNS, "cpu", 8)
    entropy, log_p_max = lm_head.token_spread(hidden, weight, bias)
    expected = torch.special.entr(whole.exp()).sum(-1)
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_p_max.double(), whole.amax(-1), rtol=1e-4, atol=1e-4)


def test_a_resumed_run_goes_on_with_the_same_sets(tmp_path: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 2}
    whole = measured(tmp_path / "whole", **saved)
    first = trainer_of(tmp_path / "parts", **MEASURED | saved | {"max_steps": 4})
    first.train()
    for name in ("generations.jsonl", "forecast.jsonl"):
        JsonLines(tmp_path / "parts" / name).append({"step": 3, "of": "a part that is repeated"})
    second = trainer_of(tmp_path / "parts", model=tiny_llama(), **MEASURED | saved)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert torch.equal(weights(whole.model), weights(second.model))
    want, got = records(whole)[-1], records(second)[-1]
    same = {name for name in want if not name.startswith("memory/")}
    assert {name: want[name] for name in same} == {name: got[name] for name in same}
    for name in ("probe.json", "generations.jsonl", "forecast.jsonl"):
        assert (
            lines(tmp_path / "whole" / name) == lines(tmp_path / "parts" / name)
            if name != "probe.json"
            else True
        )
    assert (tmp_path / "whole/probe.json").read_text() == (tmp_path / "parts/probe.json").read_text()


def test_a_checkpoint_without_a_probe_set_starts_one_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(tmp_path, **MEASURED | saved | {"probe_size": 0, "max_steps": 2}).train()
    second = trainer_of(tmp_path, model=tiny_llama(), **MEASURED | saved)
    second.train(resume_from_checkpoint=True)
    assert "changes of likelihood are counted from step 2 on" in caplog.text
    assert [record["step"] for record in records(second)] == [4]


def test_a_damaged_probe_set_is_named(tmp_path: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 2}
    measured(tmp_path, **saved)
    for damage in ('{"schema_version": 1, "probe": {}}', "{", '{"schema_version": 9}', "[]"):
        (tmp_path / "checkpoint-2" / "probe.json").write_text(damage)
        with pytest.raises(CheckpointError, match=r"probe\.json.*remove the file"):
            probes.read(tmp_path / "checkpoint-2")


def test_files_hold_what_was_sampled_and_forecast(tmp_path: Path) -> None:
    measured(tmp_path)
    generations = lines(tmp_path / "generations.jsonl")
    assert [row["step"] for row in generations] == [0] * 4 + [2] * 4 + [4] * 4
    assert all(row["tokens"] <= 5 and isinstance(row["finished"], bool) for row in generations)
    forecast = lines(tmp_path / "forecast.jsonl")
    assert [row["step"] for row in forecast] == [0, 2, 4]
    assert all(len(row["rows"]) == 3 for row in forecast)


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "sft"},
        {"objective": "kto"},
        pytest.param({"objective": "mine"}, marks=pytest.mark.long),
        pytest.param({"objective": "aot"}, marks=pytest.mark.long),
        {"reference": "live"},
    ],
)
def test_every_kind_of_objective_is_measured(tmp_path: Path, settings: dict[str, Any]) -> None:
    last = records(measured(tmp_path, **settings))[-1]
    assert {
        "probe/change/chosen",
        "drift/chosen",
        "gradients/chosen",
        "kl/forward",
        "forecast/chosen_falls",
    } <= set(last)
    assert all(math.isfinite(value) for value in last.values())
    assert ("kl/reverse" in last) == ("reference" in settings) == ("reference/moved" in last)
    if "reference" in settings:
        assert last["reference/moved"] == 0


def test_a_live_reference_that_moves_is_seen(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, reference="live", **MEASURED)
    ref_model = trainer.ref_model
    assert ref_model is not None
    step = trainer.training_step

    def thaws(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():  # not before the first step, which would be refused
            next(ref_model.parameters()).mul_(1.01 if trainer.state.global_step else 1.0)
        return step(*args, **kwargs)

    trainer.training_step = thaws  # type: ignore[method-assign]
    trainer.train()
    moved = [record["reference/moved"] for record in records(trainer)]
    assert moved[0] == 0
    assert 0 < moved[1] < moved[2]


def test_one_sided_rows_and_little_data_are_measured(tmp_path: Path) -> None:
    rows = ExampleDataset.from_examples(random_examples(5, chosen=(0, 2), rejected=(1, 2)))
    last = records(measured(tmp_path, rows, objective="infopo", per_device_train_batch_size=2))[-1]
    pairs = sum(len(row.chosen_ids) * len(row.rejected_ids) for row in rows)
    chosen = sum(len(row.chosen_ids) for row in rows)
    assert len({5, pairs, chosen}) == 3
    assert (last["probe/n"], last["probe/n_pairs"], last["probe/n_chosen"]) == (5, pairs, chosen)
    (run,) = read_runs([tmp_path])
    for title, name, n in (
        ("Chosen that fell", "probe/chosen_fell", chosen),
        ("Ranking accuracy", "probe/ranking_accuracy", pairs),
    ):
        found = column(title).estimate(run)
        assert found is not None
        assert (found.low, found.high) == pytest.approx(wilson(last[name], n))


def test_intervals_follow_from_what_measuring_costs(tmp_path: Path) -> None:
    found: list[tuple[int, int]] = []

    class Seen(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            assert trainer._observer is not None
            found.append((trainer._observer.probe_steps, trainer._observer.gradient_steps))

    trainer = trainer_of(
        tmp_path, random_dataset(40), max_steps=3, probe_size=8, anchor_size=4, gradient_size=2,
        anchor_tokens=2, per_device_train_batch_size=4, logging_steps=10, callbacks=[Seen()],
    )  # fmt: skip
    trainer.train()
    # 8 + 4/2 pairs at 1.4 against 12 a step: 1.17 steps, which are 1.5 % of 78. Gradients: 2 at 45, 7.5 steps of 500.
    assert found == [(80, 500)] * 3
    assert [record["step"] for record in records(trainer)] == [0, 3]


def test_samples_end_where_the_context_does() -> None:
    model = tiny_llama()
    model.config.max_position_embeddings = 12
    found = sample_ids(model, TOKENIZER, [[5] * 8, [6] * 4], max_new_tokens=50, batch_size=2, seed=0)
    assert all(1 <= len(ids) <= 4 for ids, _ in found)


def test_a_forecast_before_training_names_rows_and_their_shared_hidden_states(tmp_path: Path) -> None:
    data = random_dataset(9, seed=5, chosen=(1, 2), rejected=(1, 2))
    trainer = trainer_of(tmp_path, train=data, **MEASURED | {"probe_size": 9, "gradient_size": 4})
    before = weights(trainer.model)
    rows = forecast(trainer, trainer.train_dataset)
    assert torch.equal(before, weights(trainer.model))
    assert len(rows) == 9
    changes = [row.change for row in rows]
    assert changes == sorted(changes)
    assert [row.falls for row in rows] == [change < 0 for change in changes]
    for example in list(trainer.train_dataset)[:3]:
        sums = []
        for ids in (example.chosen_ids[0], example.rejected_ids[0]):
            row = torch.tensor([[*example.prompt_ids, *ids]])
            with torch.no_grad():
                states = trainer.model(input_ids=row, output_hidden_states=True).hidden_states[-1]
            sums.append(states[0, len(example.prompt_ids) - 1 : -1].double().mean(0).numpy())
        [found] = [row for row in rows if row.row_id == example.row_id]
        assert found.ches == pytest.approx(sums[0] @ sums[1] - sums[0] @ sums[0], rel=1e-4)


def test_without_the_reference_of_a_row_hidden_states_alone_are_compared(tmp_path: Path) -> None:
    rows = forecast(trainer_of(tmp_path, ref_model=tiny_llama(seed=1), **MEASURED), random_dataset(4))
    assert {row.change for row in rows} == {None}
    assert "4 rows by their hidden states alone" in lines_of(rows)[0]


def test_training_goes_on_where_what_is_measured_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("probe.json", "generations.jsonl", "forecast.jsonl"):
        (tmp_path / name).mkdir()
    assert len(records(measured(tmp_path))) == 3
    assert sum("what is measured is not written" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("reference", ["auto", "live"])
def test_the_page_names_all_that_is_measured(tmp_path: Path, reference: str) -> None:
    page = (Path(__file__).parents[1] / "docs" / "diagnostics.md").read_text(encoding="utf-8")
    measured_names = {name for record in records(measured(tmp_path, reference=reference)) for name in record}
    for name in measured_names:
        family, _, rest = name.partition("/")
        if family in {"probe", "drift", "kl", "anchor", "reference", "gradients", "forecast", "ratio_tail",
                      "length", "generations", "memory"}:  # fmt: skip
            plain = name.removesuffix("_ci95").removesuffix("_per_token")
            assert f"`{plain}`" in page or (family == "ratio_tail" and f"`{rest}`" in page), name


def test_a_policy_that_breaks_ends_the_run_by_its_loss_and_not_by_its_samples(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = MEASURED | {"learning_rate": 1e6, "generation_steps": 1, "max_steps": 6}
    with pytest.raises(NonFiniteLossError):
        trainer_of(tmp_path, **settings).train()
    assert "no responses could be sampled: probability tensor contains" in caplog.text
