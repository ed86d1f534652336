"""What is wrong with a recipe is found before torch is loaded; and what is found is wrong indeed."""

import json
import subprocess
import sys
from dataclasses import fields
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from infopo.arguments import InfoPOConfig
from infopo.build import train_fields
from infopo.errors import RecipeError
from infopo.preflight import preflight
from infopo.train_table import quick_train_fields

GOOD = {"prompt": "1+1=?", "chosen": "2", "rejected": "3"}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("good.jsonl").write_text(f"{json.dumps(GOOD)}\n")
    Path("recipe.yaml").write_text("model: lab:policy\ndata: good.jsonl\noutput_dir: run\ntrain: {}\n")
    return tmp_path


FAULTS: dict[str, tuple[list[str], str]] = {
    "no recipe": (["none.yaml"], "none.yaml: no such file"),
    "a typing error": (["recipe.yaml", "train.learning_rat=1"], "did you mean 'learning_rate'?"),
    "a wrong choice": (["recipe.yaml", "train.optim=adamw_tourch"], "train.optim (override): expected one of"),
    "out of its domain": (["recipe.yaml", "train.seed=-1"], "train.seed (override): expected a value in"),
    "a run in the way": (["recipe.yaml", "output_dir=taken"], "output_dir: taken already holds a run"),
    "no directory for a run": (["recipe.yaml", "output_dir=/proc/x"], "output_dir: /proc/x cannot be written"),
    "no such file": (["recipe.yaml", "data=none.jsonl"], "data.path (override): none.jsonl: no such file"),
    "no such model": (["recipe.yaml", "model=./none"], "model.name_or_path (override): there is no folder"),
    "no such tracker": (["recipe.yaml", "train.report_to=wandb"], "train.report_to (override): 'wandb' is not"),
    "no bitsandbytes": (
        ["recipe.yaml", "model.adapter={}", "model.quantization=4bit"], "bitsandbytes is not installed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_costs_no_start_up(work: Path, fault: str):
    arguments, expected = FAULTS[fault]
    Path("taken").mkdir()
    Path("taken/model.safetensors").touch()
    code = (
        "import sys\nfrom infopo.cli import main\n"
        f"status = main({['train', *arguments]!r})\n"
        "loaded = {'torch', 'transformers', 'datasets', 'accelerate', 'peft'} & set(sys.modules)\n"
        "assert status == 2 and not loaded, (status, loaded)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "fault"), [("peft", "model.adapter={}"), ("matplotlib", None), ("bokeh", None)]
)
def test_a_library_that_is_missing_costs_no_start_up(work: Path, module: str, fault: str | None):
    """In a process that finds everything but this library."""
    arguments = ["train", "recipe.yaml", fault] if fault else ["demo", "--output", "demo"]
    code = (
        "import importlib.util, sys\n"
        "class Hides:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}: raise ModuleNotFoundError(name)\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *more: None if name == {module!r} else find(name, *more)\n"
        "from infopo.cli import main\n"
        f"assert main({arguments!r}) == 2\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install 'infopo[" in done.stderr


def test_short_forms_are_their_sections(work: Path):
    recipe = preflight("recipe.yaml")
    assert (recipe.model.name_or_path, recipe.data.path) == ("lab:policy", "good.jsonl")
    assert preflight("recipe.yaml", ["data=[good.jsonl, good.jsonl]"]).data.path == ["good.jsonl"] * 2


@pytest.mark.parametrize(
    ("key", "home"),
    [("learning_rate", "train"), ("max_length", "data"), ("beta", "objective"), ("dtype", "model")],
)
def test_a_setting_at_the_top_level_is_told_its_section(work: Path, key: str, home: str):
    with pytest.raises(
        RecipeError, match=rf"{key} \(override\): no such setting \(did you mean {home}.{key}\?\)"
    ):
        preflight("recipe.yaml", [f"{key}=1"])


def test_a_problem_is_named_with_its_line(work: Path):
    Path("recipe.yaml").write_text(
        "output_dir: run\ndata:\n  path: good.jsonl\nmodel:\n  name_or_path: ./none\n"
    )
    with pytest.raises(RecipeError, match=r"model.name_or_path \(line 5\): there is no folder ./none here"):
        preflight("recipe.yaml")


# --- the table of training arguments ---


def test_the_quick_table_has_the_arguments_of_the_true_one():
    assert quick_train_fields().keys() == train_fields().keys()


def kinds_of(hint: Any, default: Any) -> set[type]:
    """The types that a class of transformers declares, with text for an enumeration."""
    members = (
        get_args(hint) if isinstance(hint, UnionType) or get_origin(hint) in (Union, Literal) else (hint,)
    )
    kinds = {get_origin(member) or member for member in members} | ({NoneType} if default is None else set())
    return {str if isinstance(kind, type) and issubclass(kind, Enum) else kind for kind in kinds}


def test_the_table_that_is_read_from_sources_says_what_the_classes_say():
    hints, table = get_type_hints(InfoPOConfig), train_fields()
    declared = {f.name: kinds_of(hints[f.name], f.default) for f in fields(InfoPOConfig) if f.name in table}
    other = {name for name, kinds in declared.items() if kinds != set(table[name].kinds)}
    assert other <= {"fsdp", "parallelism_config", "trackio_static_space_id"}
    assert set(table["fsdp"].kinds) == {str, bool, NoneType}
    assert table["optim"].choices == tuple(OptimizerNames)
    assert table["lr_scheduler_type"].choices == tuple(kind.value for kind in SchedulerType)
    assert "debug" in table["log_level"].choices
