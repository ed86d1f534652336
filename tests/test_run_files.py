"""A run of a script leaves the files of a run, metrics, versions and settings, and is reported like any other."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from transformers import Trainer, TrainerCallback
from transformers.utils.hub import hf_api

from infopo.lab import policy_path
from infopo.losses.unpaired import sft
from infopo.report.comparing import data_of, method_of, settings_of
from infopo.report.reading import read_runs
from infopo.runs import read_run
from trainers import ROWS, trainer_of
from worlds import random_dataset

QUIET = {"save_strategy": "no", "max_steps": 2, "probe_size": 2, "anchor_size": 0, "gradient_size": 0}


def records(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_metrics_are_the_log_and_the_report_knows_method_and_settings(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, ROWS, str(policy_path()), objective="dpo", beta=0.3, learning_rate=0.02, **QUIET
    )
    trainer.train()
    written = [{k: v for k, v in each.items() if k != "time"} for each in records(tmp_path)]
    assert written == trainer.state.log_history
    assert [each["step"] for each in written] == [0, 1, 2, 2]
    (run,) = read_runs([tmp_path])
    assert (method_of(run), run.state, run.source) == ("DPO (β 0.3)", "finished", "metrics.jsonl")
    settings = settings_of(run)
    assert settings["train.learning_rate"] == "0.02"
    assert settings["objective.name"] == "dpo"
    assert "train.weight_decay" not in settings  # a default
    assert run.run.environment is not None
    assert run.run.environment["rows"][0]["used"] == 3
    assert data_of(run) == "train_dataset, 3 rows"
    assert len(run.run.environment["model"]["hash"]) == 64


def test_a_mixture_and_a_loss_of_the_user_are_named(tmp_path: Path) -> None:
    def own(logps: Any, *, beta: float = 1.0) -> Any:
        """A loss."""
        return sft(logps)

    for folder, given in (("a", {"objective": own}), ("b", {"loss_type": ["sigmoid", "sft"]})):
        trainer_of(tmp_path / folder, **given, **QUIET).train()
    first, second = read_runs([tmp_path / "a", tmp_path / "b"])
    assert "own" in method_of(first)
    assert method_of(second) == "DPO (β 0.1) + SFT on chosen"


def test_a_second_run_in_the_same_folder_keeps_the_metrics_of_the_first(tmp_path: Path) -> None:
    for rate in (0.1, 0.2):
        trainer_of(tmp_path, learning_rate=rate, **QUIET).train()
    assert [each["step"] for each in records(tmp_path)] == [0, 1, 2, 2]
    assert [each["step"] for each in records(tmp_path, "metrics.before-1.jsonl")] == [0, 1, 2, 2]
    assert records(tmp_path)[1]["loss"] != records(tmp_path, "metrics.before-1.jsonl")[2]["loss"]


def test_an_evaluation_before_training_is_of_step_0_and_one_alone_writes_nothing(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, eval_dataset=random_dataset(4), **QUIET)
    before = trainer.evaluate()["eval_loss"]
    assert not (tmp_path / "metrics.jsonl").exists()
    trainer.train()
    trainer.evaluate()
    evaluated = [(each["step"], each["eval_loss"]) for each in records(tmp_path) if "eval_loss" in each]
    assert [step for step, _ in evaluated] == [0, 2]
    assert evaluated[0][1] == before
    content = (tmp_path / "metrics.jsonl").read_bytes()
    trainer_of(tmp_path, eval_dataset=random_dataset(4), **QUIET).evaluate()
    assert (tmp_path / "metrics.jsonl").read_bytes() == content


class Killed(Exception):  # noqa: N818 - as a process is
    pass


class Done:
    """An upload that has ended."""

    def done(self) -> bool:
        return True

    def result(self) -> None:
        return None


class Kill(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise Killed


def test_a_resumed_run_goes_on_in_the_same_file(tmp_path: Path) -> None:
    settings = {**QUIET, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "probe_steps": 1}
    with pytest.raises(Killed):
        trainer_of(tmp_path, callbacks=[Kill()], **settings).train()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    trainer_of(tmp_path, **settings).train(resume_from_checkpoint=True)
    assert [each["step"] for each in records(tmp_path)] == [0, 1, 2, 3, 4, 4]
    (resumed,) = (read_run(tmp_path).environment or {})["resumed"]
    assert resumed["from_step"] == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written_to_ends_no_script(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o500)
    trainer_of(folder, **QUIET).train()


def test_metrics_that_cannot_be_written_are_warned_about_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.jsonl").mkdir()  # which nothing can be appended to
    (tmp_path / "environment.json").mkdir()
    with caplog.at_level(logging.WARNING, "infopo"):
        trainer = trainer_of(tmp_path, **QUIET)
        trainer.train()
    assert trainer.state.global_step == 2
    said = [each.message for each in caplog.records if "are not written" in each.message]
    assert len(said) == 1
    assert "environment.json" in said[0]


def test_tensorboard_gets_the_same_metrics_under_the_same_names(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = {**QUIET, "report_to": "tensorboard", "gradient_size": 2, "probe_steps": 1}
    trainer = trainer_of(tmp_path / "run", eval_dataset=random_dataset(4), eval_strategy="steps", **settings)
    trainer.train()
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    shown = {tag: {each.step: each.value for each in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    for record in records(tmp_path / "run"):
        for name, value in record.items():
            if name in ("step", "time"):
                continue
            tag = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
            assert shown[tag][record["step"]] == pytest.approx(value, rel=1e-5, abs=1e-6), tag
    assert {"train/probe/change/chosen", "train/gradients/cosine", "eval/loss"} <= shown.keys()


@pytest.mark.parametrize("strategy", ["end", "every_save"])
def test_rows_of_the_data_are_not_uploaded_with_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """The hub is replaced, and what its client would upload is asked of the client's own filter."""
    uploaded: list[list[str]] = []

    def upload(self: Any, *, folder_path: str, ignore_patterns: Any = None, **_: Any) -> Any:
        names = [
            str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()
        ]
        uploaded.append(list(filter_repo_objects(names, ignore_patterns=ignore_patterns)))
        return Done()

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    made = {"hub_model_id": "me/it", "push_in_progress": None}
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, *_, **__: vars(self).update(made))
    settings = {"push_to_hub": True, "hub_strategy": strategy, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(tmp_path, **{**QUIET, "anchor_size": 2, "gradient_size": 1, **settings})
    marks = {"tasks/step-1/items.jsonl", "evaluation/items.jsonl", "evaluation/samples.jsonl"}
    for name in marks:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    trainer.train()
    trainer.save_model()
    there = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    private = marks | {"probe.json", "generations.jsonl", "forecast.jsonl", "data.json", "environment.json"}
    assert private <= there
    assert uploaded
    assert all(private.isdisjoint(names) for names in uploaded)
    assert "model.safetensors" in uploaded[-1]
    assert "upload_folder" not in vars(hf_api())
