"""Settings of the reference store, and the command `infopo reference`."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest

from infopo.cli import main
from infopo.errors import RecipeError
from infopo.reference import resolve
from stored_reference import RESPONSES, ROWS, changed, counts, trainer_of, values
from worlds import random_dataset


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


# ---- settings ------------------------------------------------------------------------------------------------------


def test_auto_is_stored_where_rows_can_be_enumerated_and_live_where_they_stream() -> None:
    stream = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    assert resolve("auto", random_dataset(2)) == "precompute"
    assert resolve("auto", stream) == "live"
    assert resolve("adapter-off", stream) == "adapter-off"


@pytest.mark.parametrize("setting", [None, "off"])
def test_off_writes_nothing(tmp_path: Path, setting: str | None) -> None:
    trainer = trainer_of(None, tmp_path, reference_store=setting)
    assert trainer.reference_store is None
    assert np.isfinite(values(trainer)).all()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_auto_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFOPO_CACHE", str(tmp_path / "cache"))
    trainer = trainer_of(None, tmp_path, reference_store="auto")
    assert trainer.reference_store is not None
    assert trainer.reference_store.folder.parent == tmp_path / "cache" / "reference"
    line = f"reference store: {trainer.reference_store.folder}: 0 responses found, {RESPONSES} computed"
    assert line in trainer.description()


def test_without_a_cache_to_write_to_values_stay_in_memory_but_a_folder_that_was_named_must_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("INFOPO_CACHE", str(tmp_path / "file"))
    trainer = trainer_of(None, tmp_path, reference_store="auto")
    assert trainer.reference_store is None
    assert np.isfinite(values(trainer)).all()
    assert "kept in memory only" in caplog.text
    with pytest.raises(Exception, match=r"reference_store: .*file/store cannot be made: .*file is a file"):
        trainer_of(tmp_path / "file" / "store", tmp_path)


def test_a_store_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="reference_store: expected a folder, auto or off, got ''"):
        trainer_of(None, tmp_path, reference_store="")


def test_training_and_evaluation_data_share_the_store(tmp_path: Path, store: Path) -> None:
    raw = datasets.Dataset.from_list(ROWS)
    trainer = trainer_of(
        store, tmp_path, eval_dataset={"same": raw, "other": changed("chosen", lambda c: c + "1")}
    )
    assert counts(trainer) == (RESPONSES + len(ROWS), RESPONSES + len(ROWS))
    trainer.evaluate()
    late = trainer_of(store, tmp_path)
    late.evaluate(changed("rejected", lambda r: r + "2"))
    assert counts(late) == (RESPONSES + len(ROWS), len(ROWS))


def test_an_objective_without_reference_opens_no_store(tmp_path: Path, store: Path) -> None:
    trainer = trainer_of(store, tmp_path, objective="simpo", reference_sides="needed")
    assert trainer.reference_store is None
    assert not store.exists()


# ---- infopo reference ----------------------------------------------------------------------------------------------

RECIPE = """\
model: {name_or_path: lab:policy}
data: {path: rows.jsonl, eval_path: rows.jsonl, max_length: 64}
reference: {sides: both, store: store}
train: {max_steps: 1, per_device_train_batch_size: 4, activation_checkpointing: false, use_cpu: true, bf16: false}
output_dir: run
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS), encoding="utf-8")
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return tmp_path


def test_what_infopo_reference_stores_infopo_train_finds(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reference", "recipe.yaml"]) == 0
    assert (
        f": {RESPONSES} responses found, {RESPONSES} computed\n" in capsys.readouterr().out
    )  # evaluation finds it
    assert sorted(path.name for path in work.iterdir()) == ["recipe.yaml", "rows.jsonl", "store"]
    assert main(["train", "recipe.yaml"]) == 0
    assert f": {2 * RESPONSES} responses found, 0 computed\n" in capsys.readouterr().out
    assert main(["reference", "--list", "--store", "store"]) == 0
    out = capsys.readouterr().out
    assert f"{RESPONSES} responses" in out
    assert "policy (float32, forest, sdpa)" in out
    (shelf,) = (work / "store").iterdir()
    assert main(["reference", "--prune", shelf.name[:8], "--store", "store"]) == 0
    assert list((work / "store").iterdir()) == []


def test_check_writes_nothing(work: Path) -> None:
    assert main(["check", "recipe.yaml"]) == 0
    assert sorted(path.name for path in work.iterdir()) == ["recipe.yaml", "rows.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["recipe.yaml", "reference.source=live"],
            "reference.source: live computes the reference in every step",
        ),
        (["recipe.yaml", "reference.store=off"], "reference.store: is off; name a folder"),
        (["recipe.yaml", "reference.store=null"], "reference.store: is off; name a folder"),
        (
            ["recipe.yaml", "reference.store=rows.jsonl"],
            "reference.store: rows.jsonl cannot be made: rows.jsonl is a",
        ),
        (
            ["recipe.yaml", "objective=simpo", "reference.sides=needed"],
            "objective: simpo needs no reference",
        ),
        (["recipe.yaml", "reference.store=3"], "reference.store (override): expected text or null, got 3"),
        (["--prune"], "--prune: name references as --list shows them"),
        (["--prune", "ab"], "--prune: 0 references begin with 'ab'"),
        (["--list", "--store", "off"], "--store: expected a folder, got 'off'"),
    ],
)
def test_what_cannot_be_stored_is_refused_in_words(
    work: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reference", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (work / "run").exists()


@pytest.mark.parametrize("command", ["train", "check"])
def test_a_store_that_cannot_be_written_to_is_refused_at_the_door(
    work: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "recipe.yaml", "reference.store=rows.jsonl/store"]) == 2
    message = f"reference.store: rows.jsonl/store cannot be made: {work / 'rows.jsonl'} is a file"
    assert message in capsys.readouterr().err
    assert not (work / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [[], ["recipe.yaml", "--list"], ["recipe.yaml", "--store", "a"], ["--older-than", "3", "--list"],
     ["--list", "--prune", "a"]],
)  # fmt: skip
def test_the_command_line_says_what_goes_together(
    work: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["reference", *arguments])
    assert caught.value.code == 2
    assert "usage: infopo reference" in capsys.readouterr().err
