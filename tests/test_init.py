"""`infopo init`: whatever the case, the recipe that is written is sound, and overwrites nothing."""

import itertools
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from infopo.build import build_adapter, build_arguments, train_fields
from infopo.cli import main
from infopo.config import parse_recipe
from infopo.errors import ConfigError
from infopo.losses.catalog import OBJECTIVES, UNPAIRED
from infopo.machine import number_of_parameters
from infopo.scaffold import KINDS, METHODS, PARALLEL, Case, batch_of, recipe_for
from infopo.train_table import quick_train_fields
from infopo.workflows.init import init

CASES = [
    Case("m", "d.jsonl", method, parallel, kind, objective, eval_data=held_out, devices=devices)
    for method, parallel, kind, objective, (held_out, devices) in itertools.product(
        METHODS, PARALLEL, KINDS, OBJECTIVES, ((None, 1), ("e.jsonl", 8))
    )
    if (method, parallel) != ("qlora", "fsdp") and (kind != "unpaired" or objective in UNPAIRED)
]


@pytest.mark.parametrize(
    "share", ["each objective, each way to train", pytest.param("all", marks=pytest.mark.long)]
)
def test_every_recipe_that_can_be_written_is_sound_and_is_what_was_asked_for(share: str):
    assert len(CASES) > 1000
    fields = quick_train_fields()
    few = [
        c
        for c in CASES
        if c.objective == "infopo" or (c.method, c.parallel, c.devices) == ("full", "none", 1)
    ]
    for case in CASES if share == "all" else few:
        recipe = parse_recipe(recipe_for(case, "mine.yaml"), source=str(case), train_fields=fields)
        assert recipe.objective[0].name == case.objective
        assert recipe.objective[0].parameters == {
            n: p.default for n, p in OBJECTIVES[case.objective].parameters.items()
        }
        assert (recipe.model.adapter is not None) == (case.method != "full")
        assert (recipe.model.quantization == "4bit") == (case.method == "qlora")
        assert (recipe.train.get("fsdp") is True) == (case.parallel == "fsdp")
        assert ("deepspeed" in recipe.train) == (case.parallel == "deepspeed")
        assert (recipe.train["eval_strategy"] == "epoch") == (case.eval_data is not None)


def test_transformers_takes_the_arguments_of_every_kind_of_recipe():
    for method in METHODS:
        text = recipe_for(Case("m", "d.jsonl", method), "mine.yaml")
        recipe = parse_recipe(text, source=method, train_fields=train_fields())
        assert build_arguments(recipe).per_device_train_batch_size == (2 if method == "qlora" else 4)
        assert (build_adapter(recipe) is None) == (method == "full")


@pytest.mark.parametrize("name", ["a: b", "#x", "- y", "{z}", "null", "1e5", "a 'b' \"c\"", "ü/ø", "x" * 200])
def test_names_that_yaml_would_misread_are_written_as_text(name: str):
    case = Case(name, name, eval_data=name, output_dir=name)
    recipe = parse_recipe(recipe_for(case, "x.yaml"), source="x", train_fields=quick_train_fields())
    assert {recipe.model.name_or_path, recipe.data.path, recipe.data.eval_path, recipe.output_dir} == {name}


@pytest.mark.parametrize("rows", [None, 1, 100, 400, 1279])
@pytest.mark.parametrize("devices", [1, 2, 3, 8, 64])
def test_a_step_has_64_examples_or_a_twentieth_of_little_data(rows: int | None, devices: int):
    per_device, accumulated = batch_of(Case("m", "d", rows=rows, devices=devices))
    together = per_device * accumulated * devices
    assert max(devices, 4) <= together <= max(64, devices)
    if rows is not None and together > max(8, devices):
        assert rows >= 10 * together


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"method": "lorra"}, "did you mean 'lora'"),
        ({"parallel": "ddp"}, "--parallel: expected one of none, fsdp, deepspeed, got 'ddp'"),
        ({"kind": "pairs"}, "--data-kind: expected one of paired, unpaired, scores, lists"),
        ({"objective": "dpx"}, "did you mean"),
        ({"objective": "dpo", "kind": "unpaired"}, "DPO compares pairs, and the data are unpaired"),
        ({"method": "qlora", "parallel": "fsdp"}, "FSDP does not cut up weights of 4 bits"),
        ({"model": " "}, "--model: is empty"),
    ],
)
def test_a_case_that_cannot_be_is_refused(given: dict[str, Any], told: str):
    with pytest.raises(ConfigError, match=re.escape(told)):
        Case(**({"model": "m", "data": "d"} | given))


# ---- the command -----------------------------------------------------------------------------------------------------

ROWS: dict[str, list[dict[str, Any]]] = {
    "paired": [
        {"prompt": f"{i}+1=?", "chosen": f"{i}+1={i + 1}", "rejected": f"{i}+1={i}"} for i in range(8)
    ],
    "unpaired": [{"prompt": f"{i}+1=?", "completion": str(i + 1), "label": i % 2 == 0} for i in range(8)],
    "scores": [
        {"prompt": f"{i}+1=?", "responses": [str(i), str(i + 1)], "scores": [0.1, 0.9]} for i in range(8)
    ],
    "lists": [
        {"prompt": f"{i}+1=?", "chosen": [str(i + 1)], "rejected": [str(i), str(i + 2)]} for i in range(8)
    ],
}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for kind, rows in ROWS.items():
        Path(f"{kind}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [pytest.param("full", marks=pytest.mark.long), "lora"])
def test_a_recipe_for_data_of_each_kind_runs_as_it_is(
    kind: str, method: str, work: Path, capsys: pytest.CaptureFixture[str]
):
    """The kind is seen in the rows; nothing stands between what is written and a step."""
    assert (
        main(["init", "mine.yaml", "--model=lab:policy", f"--data={kind}.jsonl", f"--method={method}"]) == 0
    )
    out = capsys.readouterr().out
    assert f"{kind}.jsonl: 8 rows, {kind}: {KINDS[kind]}" in out
    assert "to mend" not in out
    if method == "full":
        assert main(["check", "mine.yaml"]) == 0, capsys.readouterr().err
        assert "one step: loss " in capsys.readouterr().out


def test_what_keeps_the_recipe_from_running_is_said_and_the_recipe_written(
    work: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = [
        "--model",
        "./not/there",
        "--data",
        "nothing.jsonl",
        "--method",
        "qlora",
        "--parallel",
        "deepspeed",
    ]
    assert main(["init", "mine.yaml", *arguments]) == 0
    out = capsys.readouterr().out
    assert "to mend: model.name_or_path (line" in out
    assert "there is no folder ./not/there here" in out
    assert "to mend: data.path (line" in out
    assert "nothing.jsonl: no file here, so its rows are not looked at" in out
    assert "note: the rows could not be looked at: the data are taken for paired" in out
    assert "note: deepspeed shares a model out over several accelerators; there are 0 here" in out
    assert (
        "Next: infopo check mine.yaml train.deepspeed=, then torchrun --nproc-per-node 2 -m infopo train"
        in out
    )
    assert Path("mine.yaml").is_file()


def test_nothing_is_overwritten_and_nothing_is_asked_where_nobody_is(
    work: Path, capsys: pytest.CaptureFixture[str]
):
    Path("mine.yaml").write_text("mine", encoding="utf-8")
    assert main(["init", "mine.yaml", "--model=m", "--data=d"]) == 2
    assert "mine.yaml is there already, and is not overwritten" in capsys.readouterr().err
    assert Path("mine.yaml").read_text(encoding="utf-8") == "mine"
    assert main(["init", "other.yaml", "--model=m"]) == 2
    assert "--data: is required where nobody can be asked" in capsys.readouterr().err
    assert main(["init", "no/such/folder/x.yaml", "--model=m", "--data=paired.jsonl"]) == 2
    assert "cannot be written: No such file or directory" in capsys.readouterr().err


def test_questions_have_defaults_and_wrong_choices_are_asked_for_again(
    work: Path, capsys: pytest.CaptureFixture[str]
):
    answers = {"Model": "lab:policy", "Preference": "unpaired.jsonl", "Objective": "kto"}
    choices = iter(["lorra", "lora"])
    asked = []

    def ask(question: str) -> str:
        asked.append(question)
        return next(choices) if question.startswith("What to train") else answers.get(question.split()[0], "")

    init("mine.yaml", {}, ask)
    recipe = parse_recipe(Path("mine.yaml").read_text(encoding="utf-8"), source="mine.yaml")
    assert (recipe.model.name_or_path, recipe.objective[0].name, recipe.output_dir) == (
        "lab:policy",
        "kto",
        "runs/mine",
    )
    assert recipe.model.adapter is not None
    assert "expected one of full, lora, qlora" in capsys.readouterr().out
    assert len(asked) == 6
    assert not any("Kind" in question for question in asked)


def test_a_model_that_is_not_there_is_told_of_before_the_next_question(
    work: Path, capsys: pytest.CaptureFixture[str]
):
    said = []

    def ask(question: str) -> str:
        said.append(capsys.readouterr().out)
        return "models/not/here" if question.startswith("Model") else ""

    init("mine.yaml", {}, ask)
    assert said[1].startswith("to mend: there is no folder models/not/here here")


@pytest.mark.long
def test_a_person_at_a_terminal_is_asked(work: Path):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "infopo", "init", "mine.yaml"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ)
    os.close(theirs)
    os.write(ours, b"\npaired.jsonl\n\n\n\n")
    assert process.wait(timeout=120) == 0
    assert (
        parse_recipe(Path("mine.yaml").read_text(encoding="utf-8"), source="mine.yaml").data.path
        == "paired.jsonl"
    )
    os.close(ours)


def test_parameters_are_counted_from_the_files_headers(tmp_path: Path):
    assert number_of_parameters(tmp_path) is None
    save_file(
        {"a": torch.zeros(3, 4), "b": torch.zeros(())}, tmp_path / "model-1.safetensors", {"format": "pt"}
    )
    save_file({"c": torch.zeros(5)}, tmp_path / "model-2.safetensors")
    assert number_of_parameters(tmp_path) == 12 + 1 + 5
    (tmp_path / "model-3.safetensors").write_bytes(b"\xff" * 9)
    assert number_of_parameters(tmp_path) is None
