"""The recipes that ship: each is read, its settings are built, and it takes a step on a small model and file."""

import json
import re
from pathlib import Path

import pytest
from accelerate.utils.deepspeed import HfDeepSpeedConfig

from infopo.build import build_adapter, build_arguments, train_fields
from infopo.cli import main
from infopo.config import load_recipe, parse_recipe, to_yaml
from infopo.errors import ConfigError
from infopo.shipped import FOLDER, shipped_recipe, shipped_recipes

RECIPES = sorted(FOLDER.rglob("*.yaml"))
PAPER = sorted((FOLDER / "paper").glob("*.yaml"))
each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(FOLDER)))
TRAINED_ONCE = [path for path in RECIPES if path.name != "rounds.yaml"]


def test_there_are_recipes_for_the_lab_for_real_data_for_all_weights_and_for_an_adapter():
    ours = {"lab.yaml", "hh.yaml", "full.yaml", "lora.yaml", "qlora.yaml", "fsdp8.yaml"}
    assert ours <= {path.name for path in RECIPES}
    assert len(PAPER) == 4


@pytest.mark.parametrize("stage", [2, 3])
def test_the_configuration_of_deepspeed_leaves_to_the_settings_what_they_say(stage: int):
    """It is read as accelerate reads it; the library itself needs an accelerator."""
    config = HfDeepSpeedConfig(str(FOLDER / "deepspeed" / f"zero{stage}.json"))
    assert (config.is_zero2(), config.is_zero3()) == (stage == 2, stage == 3)
    assert not config.is_offload()
    for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        assert config.get_value(name) == "auto"


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.name)
def test_every_value_of_a_paper_recipe_says_whose_it_is(path: Path):
    """And none but what the paper's abstract and loss say is called the paper's: no other value could be cited."""
    lines = path.read_text(encoding="utf-8").splitlines()
    settings = [
        line for line in lines if re.match(r"\s*\w+: *\S", line) and not line.startswith("output_dir")
    ]
    assert [line for line in settings if not re.search(r"# (paper|sister|ours)", line)] == []
    # A value of a sister names the repository with its commit, or the paper, that it was read in.
    sisters = [line for line in settings if "sister" in line.partition("#")[2]]
    assert len(sisters) > 6
    read_in = r"sister \([\w-]+/[\w-]+@[0-9a-f]{7}\)|sister \(arXiv \d{4}\.\d{5}, [^)]+\)"
    assert [line for line in sisters if not re.search(read_in, line)] == []
    called_paper = {line.split(":")[0].strip() for line in settings if "# paper" in line}
    assert called_paper <= {"name_or_path", "path", "name", "beta", "length_normalized", "reference"}


@each_recipe
def test_every_recipe_is_sound(path: Path):
    # One process can shard nothing, which is refused: see the first lines of the recipe.
    sharding = ["train.fsdp=", "train.fsdp_config="] if path.name == "fsdp8.yaml" else []
    recipe = load_recipe(path, sharding, train_fields())
    build_arguments(recipe)
    build_adapter(recipe)
    assert recipe.objective[0].name == "infopo"
    assert recipe.output_dir == f"runs/{'-'.join(path.relative_to(FOLDER).with_suffix('').parts)}"


@each_recipe
def test_every_recipe_survives_being_written(path: Path):
    recipe = load_recipe(path, (), train_fields())
    assert parse_recipe(to_yaml(recipe), source="written", train_fields=train_fields()) == recipe


@each_recipe
def test_every_recipe_names_its_commands(path: Path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    name = path.relative_to(FOLDER).with_suffix("").as_posix()
    assert f"\n#   infopo recipes {name} > {path.name}\n" in text
    assert f"infopo {'train' if path in TRAINED_ONCE else 'rounds'} {path.name}" in text


def test_every_file_is_shipped_by_a_name_of_its_own_with_a_line_that_says_what_it_is_for():
    shipped = shipped_recipes()
    assert {each.path for each in shipped} == {path for path in FOLDER.rglob("*") if path.is_file()}
    assert all(20 < len(each.title) < 130 and "#" not in each.title for each in shipped)
    for each in shipped:
        # By the whole name, with its ending, and without the folder.
        for name in (each.name, each.path.name, each.name.rpartition("/")[2]):
            assert shipped_recipe(name) == each


def test_a_checkout_has_the_recipes_where_they_were():
    assert (FOLDER.parents[2] / "recipes" / "lab.yaml").resolve() == FOLDER / "lab.yaml"


def test_a_name_that_is_none_is_told_the_nearest():
    with pytest.raises(ConfigError, match=r"no recipe 'loar' \(did you mean 'lora'\?\); there are lab, full"):
        shipped_recipe("loar")


@pytest.mark.parametrize("path", TRAINED_ONCE, ids=lambda path: str(path.relative_to(FOLDER)))
def test_every_recipe_takes_a_step(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{i}+1=?"}],
            "chosen": [{"role": "assistant", "content": f"{i + 1}"}],
            "rejected": [{"role": "assistant", "content": f"{i}!"}],
        }
        for i in range(6)
    ]
    Path("pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    small = ["model.name_or_path=lab:policy", "data.path=pairs.jsonl", "data.num_proc=", "data.max_length=128",
             "data.max_prompt_length=", "train.per_device_train_batch_size=3",
             # What needs accelerators: several of them, a library for them, arithmetic of theirs.
             "train.fsdp=", "train.fsdp_config=", "model.quantization=", "train.bf16=false"]  # fmt: skip
    assert main(["check", str(path), *small]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "pairs.jsonl: 6 rows, 6 used, 0 skipped" in out
    assert "one step: loss " in out
    assert [p.name for p in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_what_the_command_prints_is_the_file(capsys: pytest.CaptureFixture[str]):
    assert main(["recipes", "lora"]) == 0
    assert capsys.readouterr().out == (FOLDER / "lora.yaml").read_text(encoding="utf-8")
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.partition("\n\n")[0].splitlines()] == [
        r.name for r in shipped_recipes()
    ]


def test_a_shipped_recipe_that_is_not_in_the_folder_is_told_how_to_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert main(["check", "recipes/lab.yaml"]) == 2
    assert "`infopo recipes lab > lab.yaml` writes the one that ships" in capsys.readouterr().err
