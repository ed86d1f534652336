"""A run is judged while it trains: what is written, what is said and when, what stops, and what a resumed run keeps."""

import json
import logging
import random
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from infopo.data.examples import ExampleDataset
from infopo.records import PreferenceExample
from infopo.trainer import InfoPOTrainer
from test_ranks import needs_no_accelerator, torchrun
from trainers import trainer_of
from worlds import ids, random_dataset

OFF = {"save_strategy": "no", "max_steps": 4}


def biased(n: int = 24) -> ExampleDataset:
    """Rows whose chosen responses are far longer."""
    rng = random.Random(0)
    return ExampleDataset.from_examples(
        PreferenceExample(ids(rng, 2, 6), [ids(rng, 15, 22)], [ids(rng, 2, 5)], f"rows.jsonl:{i}")
        for i in range(n)
    )


def written(folder: Path, name: str = "verdicts.json") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / name).read_text())
    return content


def names(folder: Path) -> list[str]:
    return [verdict["name"] for verdict in written(folder)["verdicts"]]


def test_a_script_gets_verdicts_in_its_log_and_its_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "infopo"):
        trainer_of(tmp_path, biased(), **OFF).train()
    lines = [record.message for record in caplog.records if record.message.startswith("verdict: ")]
    assert [line.split(" (")[0] for line in lines] == ["verdict: length bias"]  # said once
    assert names(tmp_path) == ["length bias"]
    assert written(tmp_path)["finished"]
    assert written(tmp_path)["step"] == 4
    assert written(tmp_path, "data.json")["length"]["cohens_d"] > 2


def test_a_sound_run_is_not_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "infopo"):
        trainer_of(tmp_path, **OFF).train()
    assert names(tmp_path) == []
    assert "verdict" not in caplog.text


class Plant(TrainerCallback):
    """Logs a reference that moves from a step on, as a measurement of it would."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.trainer: InfoPOTrainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        self.trainer.log({"reference/moved": 0.5 if state.global_step >= self.step else 0.0})


def planted(folder: Path, step: int, **settings: Any) -> InfoPOTrainer:
    plant = Plant(step)
    plant.trainer = trainer_of(folder, random_dataset(12), callbacks=[plant], **settings)
    return plant.trainer


def test_stop_saves_a_checkpoint_and_ends_training(tmp_path: Path):
    trainer = planted(tmp_path, 3, on_verdict="stop", save_strategy="no", max_steps=9)
    trainer.train()
    assert trainer.state.global_step == 3
    assert (tmp_path / "checkpoint-3").is_dir()
    assert written(tmp_path)["verdicts"][0]["step"] == 3
    assert written(tmp_path)["finished"]


def test_what_the_data_say_stops_after_the_first_step(tmp_path: Path):
    trainer = trainer_of(tmp_path, biased(), on_verdict="stop", max_steps=9)
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_resumed_run_keeps_the_verdicts_of_its_past_and_no_others(tmp_path: Path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    planted(tmp_path, 4, **settings).train()
    assert names(tmp_path) == ["reference not frozen"]
    # From the checkpoint of step 2 on, nothing moves.
    planted(tmp_path, 99, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert names(tmp_path) == []
    planted(tmp_path, 1, **settings | {"max_steps": 2}).train()
    resumed = planted(tmp_path, 99, **settings)
    said: list[str] = []
    next(c for c in resumed.callback_handler.callbacks if type(c).__name__ == "Judge").announce = said.append
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [verdict["step"] for verdict in written(tmp_path)["verdicts"]] == [1]
    assert said == []  # it was said before


def test_a_folder_that_cannot_be_written_to_costs_the_verdicts_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    trainer = trainer_of(tmp_path, biased(), **OFF)
    (tmp_path / "verdicts.json").mkdir()
    with caplog.at_level(logging.WARNING, "infopo"):
        trainer.train()
    assert trainer.state.global_step == 4
    assert caplog.text.count("verdicts are not written: ") == 1


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import os
from pathlib import Path
from test_judging import planted
settings = dict(on_verdict="stop", max_steps=9, logging_steps=2, per_device_train_batch_size=2, use_cpu=True)
trainer = planted(Path({run!r}), 4, **settings)
trainer.train()
print(f"rank {{os.environ['RANK']}} ended after step {{trainer.state.global_step}}", flush=True)
"""


@pytest.mark.long
@needs_no_accelerator
def test_all_ranks_stop_after_the_same_step(tmp_path: Path) -> None:
    """The first rank judges. What it logs with step 4 is asked for after the next step."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), run=str(tmp_path / "run")))
    done = torchrun(str(script))
    assert done.returncode == 0, done.stderr
    # Ranks write to one stream, so that a line of one can begin within a line of the other.
    ended = sorted(re.findall(r"rank \d ended after step \d", done.stdout))
    assert ended == ["rank 0 ended after step 5", "rank 1 ended after step 5"]
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-5"]
    assert written(tmp_path / "run")["step"] == 5
