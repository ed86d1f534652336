"""A script prints the records that its user knows. All that was measured stands in files, and callbacks get it."""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from infopo.printing import MEASURED, ShortPrinter, ShortProgress, printed
from infopo.runs import read_run
from test_observing import MEASURED as SETTINGS
from trainers import trainer_of
from worlds import random_dataset


class Seen(TrainerCallback):
    def __init__(self) -> None:
        self.names: set[str] = set()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.names |= set(logs)


@pytest.mark.parametrize(("disable_tqdm", "kind"), [(False, ShortProgress), (True, ShortPrinter)])
def test_a_script_prints_no_measurements_and_nothing_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], disable_tqdm: bool, kind: type
) -> None:
    seen = Seen()
    trainer = trainer_of(
        tmp_path, eval_dataset=random_dataset(4, seed=5), callbacks=[seen], disable_tqdm=disable_tqdm,
        eval_strategy="steps", eval_steps=2, **SETTINGS,
    )  # fmt: skip
    trainer.train()
    out = "".join(capsys.readouterr())
    lines = [line for line in out.splitlines() if line.startswith("{")]
    names = {name for line in lines for name in re.findall(r"'([\w/]+)':", line)}
    assert len([line for line in lines if "'loss'" in line]) == 2
    assert {"loss", "rewards/rejected", "eval_loss", "train_runtime", "epoch"} <= names
    assert not [name for name in names if name.startswith(MEASURED)]
    measured = {name for name in seen.names if name.startswith(MEASURED)}
    assert len(measured) > 30
    assert measured <= {name for record in read_run(tmp_path).metrics for name in record}
    assert seen.names - measured - names <= {"total_flos"}
    assert [type(each) for each in trainer.callback_handler.callbacks if isinstance(each, kind)] == [kind]


@pytest.mark.parametrize("usual", [ProgressCallback, PrinterCallback])
def test_a_subclass_of_the_users_stays(tmp_path: Path, usual: type) -> None:
    own = type("Own", (usual,), {})()
    assert own in trainer_of(tmp_path, callbacks=[own]).callback_handler.callbacks


def test_every_family_of_the_page_on_diagnostics_is_left_out() -> None:
    page = (Path(__file__).parents[1] / "docs" / "diagnostics.md").read_text(encoding="utf-8")
    names = [
        name
        for line in page.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`([a-z_]+/\w+)`", line)
    ]
    assert len(names) > 30
    assert printed(dict.fromkeys(names, 0.0)) == {}
    assert printed({"my/own": 1.0, "eval_probe_loss": 2.0}) == {"my/own": 1.0, "eval_probe_loss": 2.0}
