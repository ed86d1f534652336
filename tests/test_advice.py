"""Messages about recipes of rounds and sweeps, and about their folders, advise what exists and does it."""

from argparse import ArgumentParser
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from infopo.cli import _parser, main
from infopo.config import load_recipe
from infopo.errors import ConfigError
from infopo.round_settings import RoundsSettings
from infopo.runs import write_json_atomic
from infopo.settings import EvaluateSettings, Settings
from infopo.sweep_grid import Cell
from infopo.validation import options_named
from infopo.workflows.round_state import settle_recipe
from infopo.workflows.sweep import Planned
from run_files import write_run

RECIPE: dict[str, Any] = {"model": "lab:policy", "output_dir": "out", "train": {"max_steps": 1}}
DATA = {"data": {"path": "lab:verified"}}
ROUNDS = {"rounds": {"prompts": "lab", "verifier": "lab"}}
SWEEP = {"sweep": {"train.seed": [1, 2]}}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(**sections: Any) -> str:
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE | sections), encoding="utf-8")
    return "recipe.yaml"


@pytest.mark.parametrize("command", ["train", "check", "reference", "rounds", "sweep"])
def test_a_recipe_of_both_is_sent_to_no_other_command(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, write(**ROUNDS, **SWEEP)]) == 2
    assert (
        "no command takes both; remove one of them, or write rounds=null or sweep=null"
        in capsys.readouterr().err
    )


def test_the_way_out_that_a_recipe_of_rounds_names_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    path = write(**ROUNDS)
    assert main(["train", path]) == 2
    assert "write rounds=null, and set data.path" in capsys.readouterr().err
    assert load_recipe(path, ["rounds=null", "data.path=lab:verified"]).rounds is None
    with pytest.raises(ConfigError, match=r"data\.path: is required"):
        load_recipe(path, ["rounds=null"])


def options_of(command: str) -> list[str]:
    [commands] = [action for action in _parser()._actions if isinstance(action.choices, dict)]
    parser = commands.choices[command]  # type: ignore[index, call-overload]
    assert isinstance(parser, ArgumentParser)
    return [
        option[2:] for action in parser._actions for option in action.option_strings if option[:2] == "--"
    ]


ALONE = {
    "rounds": {"help", "samples", "skip", "server", "concurrency", "dtype", "shard", "template"},
    "evaluate": {"help", "server", "concurrency", "dtype", "shard", "responses", "include-path", "top-p"},
}
"""Options that no recipe has, so that nothing about them is ever said of one."""


@pytest.mark.parametrize(
    ("section", "settings", "command"),
    [("rounds", RoundsSettings, "pairs"), ("evaluate", EvaluateSettings, "evaluate")],
)
def test_an_option_that_an_error_names_is_a_setting_of_the_recipe(
    section: str, settings: type[Settings], command: str
) -> None:
    known = {f"{section}.{field.name}" for field in fields(settings)} | {"output_dir"}
    options = options_of(command) + (["tasks", "data"] if section == "rounds" else [])
    for option in sorted(set(options) - ALONE[section]):
        with pytest.raises(ConfigError) as caught, options_named(section):
            raise ConfigError(f"--{option}: expected another")
        name, _, rest = caught.value.problems[0].partition(": ")
        assert name in known, option
        assert rest == "expected another"


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("rounds", "an em -- dash, rounds.prompts=FILE"),
        ("evaluate", "an em -- dash, evaluate.data={gsm8k: FILE}"),
    ],
)
def test_a_file_for_a_task_is_given_as_the_recipe_takes_it(section: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught, options_named(section):
        raise ConfigError("an em -- dash, --data gsm8k=FILE")
    assert caught.value.problems == [said]
    if section == "evaluate":
        override = said.partition(", ")[2].replace("FILE", "a.jsonl")
        recipe = load_recipe(write(**DATA), [override])
        assert recipe.evaluate.data == {"gsm8k": "a.jsonl"}


def test_resuming_as_messages_advise_is_what_rounds_and_sweeps_do() -> None:
    """`train.resume_from_checkpoint=true` changes no setting of what is there already."""
    path, resume = write(**ROUNDS), ["train.resume_from_checkpoint=true"]
    Path("out").mkdir()
    settle_recipe(load_recipe(path).without_resume(), "prompts")
    first = Path("out/round-1")
    first.mkdir()
    (first / "pairs.jsonl").touch()
    write_json_atomic(first / "pairs.provenance.json", {"counts": {"rows": 1}})
    settle_recipe(load_recipe(path, resume).without_resume(), "prompts")
    path = write(**DATA)
    cell = Cell("run", {})
    digests = {Planned(cell, load_recipe(path, given), []).digest for given in ([], resume)}
    assert len(digests) == 1


def test_a_checkpoint_of_its_own_is_nothing_for_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", write(**DATA, **SWEEP), "train.resume_from_checkpoint=out/a/checkpoint-1"]) == 2
    assert "a sweep goes on by itself" in capsys.readouterr().err


@pytest.mark.parametrize("section", [SWEEP, ROUNDS])
def test_runs_are_not_mixed_into_a_run(section: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("out"))
    data = DATA if section is SWEEP else {}
    assert main([next(iter(section)), write(**data, **section)]) == 2
    assert "out holds a run of its own" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["report", "out"], ["evaluate", "out", "--tasks", "lab"], ["chat", "out"], ["export", "out"],
        ["generate", "out", "--prompt", "1+1="], ["compare", "out", "lab:policy"],
    ],
)  # fmt: skip
def test_a_folder_of_runs_names_them(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b", "c", "d"):
        write_run(Path("out") / name)
    assert main(command) == 2
    assert "; runs in its folders are out/a, out/b, out/c and 1 more" in capsys.readouterr().err
