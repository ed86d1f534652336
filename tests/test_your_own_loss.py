"""The page on a loss of one's own does what it says, block by block, in a fresh folder."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from infopo.cli import main
from infopo.config import load_recipe
from infopo.errors import ConfigError
from infopo.losses import foreign
from infopo.losses.catalog import row_of

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "your-own-loss.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, flags=re.DOTALL)
MODULE, CHECK, FROM_PYTHON, COMPARE = (text for kind, text in BLOCKS if kind == "python")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(foreign, "_found", {})
    monkeypatch.setattr(foreign, "_folders", [])
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "my_losses.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "recipes").mkdir()
    text = (ROOT / "recipes" / "lab.yaml").read_text(encoding="utf-8")
    (tmp_path / "recipes" / "lab.yaml").write_text(text, encoding="utf-8")
    yield tmp_path
    sys.modules.pop("my_losses", None)


def test_the_loss_of_the_page_is_checked_and_named_as_it_says(here: Path) -> None:
    for block in (CHECK, FROM_PYTHON):
        exec(compile(block, "docs/your-own-loss.md", "exec"), {"__name__": "page"})
    [recipe] = [text for kind, text in BLOCKS if kind == "yaml"]
    (here / "recipe.yaml").write_text(
        f"{recipe}model: lab:policy\ndata: lab:verified\noutput_dir: runs/page\n", encoding="utf-8"
    )
    assert load_recipe("recipe.yaml").objective[0].parameters == {"k": 0.5}
    with pytest.raises(ConfigError, match="expected a value > 0"):
        load_recipe("recipe.yaml", ["objective.k=0"])


def test_the_arguments_in_the_table_are_those_of_the_decorator() -> None:
    from dataclasses import fields

    from infopo.losses.declaration import Declaration

    table = PAGE.split("## Declare what it needs")[1].split("##")[0]
    named = {
        name
        for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    }
    assert named == {f.name for f in fields(Declaration)} - {"bound", "ratio", "trl_loss_type"}


@pytest.mark.long
def test_the_commands_of_the_page_train_and_compare(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On fewer rows than the page's, so that the test takes seconds."""
    [commands] = [text for kind, text in BLOCKS if kind == "bash"]
    for line in commands.strip().splitlines():
        words = shlex.split(line)
        small = (
            ["data.limit=64", "train.num_train_epochs=1", "reference.store=off"]
            if words[1] == "train"
            else []
        )
        command, _, target = " ".join(words[1:]).partition(" > ")
        if target:  # what the shell would do
            capsys.readouterr()
            assert main(command.split()) == 0
            Path(target).write_text(capsys.readouterr().out, encoding="utf-8")
            continue
        assert main([*words[1:], *small]) == 0, capsys.readouterr().err
    assert row_of("my_losses:soft_infopo").location == str(here / "my_losses.py")
    done = subprocess.run([sys.executable, "-c", COMPARE], capture_output=True, text=True, check=True)
    assert re.findall(r"^runs/\w+ \{'eval_logps/chosen'", done.stdout, re.MULTILINE) == [
        "runs/soft {'eval_logps/chosen'",
        "runs/infopo {'eval_logps/chosen'",
    ]
