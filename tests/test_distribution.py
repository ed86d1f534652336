"""What strangers see of the package: its page on an index, its citation, its workflow, its types."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import infopo
from infopo.citations import INFOPO

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def on_an_index() -> str:
    """README as the wheel's metadata has it: the build's substitutions, applied as its plug-in applies them."""
    text = README
    for each in PYPROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(each["pattern"], each["replacement"], text)
    return text


def test_no_link_of_the_page_on_an_index_is_dead():
    targets = re.findall(r"\]\(([^)]*)\)", on_an_index())
    assert len(re.findall(r"\]\(", README)) > len(targets) > 1
    assert [target for target in targets if not re.match(r"https?://|#", target)] == []


def test_the_page_on_an_index_keeps_every_word():
    """Only targets of links and the picture go."""
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)\n+", "", README)
    text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)
    assert re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", on_an_index()) == text


def test_readme_names_every_extra():
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", README, flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert set(PYPROJECT["project"]["optional-dependencies"]) <= named


def test_the_citation_is_of_this_version_and_of_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == infopo.__version__
    assert citation["license"] == PYPROJECT["project"]["license"]
    paper = citation["preferred-citation"]
    assert INFOPO in str(paper["identifiers"])
    assert len(paper["authors"]) == 8


def test_the_changelog_has_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(
        rf"^## \[{re.escape(infopo.__version__)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE
    )


def test_the_workflow_tests_every_python_that_the_package_claims():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    tested = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    claimed = re.findall(r"Python :: (3\.\d+)", "\n".join(PYPROJECT["project"]["classifiers"]))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert tested == claimed == re.findall(r"for version in (.*); do", makefile)[0].split()
    for job in workflow["jobs"].values():
        for target in re.findall(r"make ([\w-]+)", str(job["steps"])):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE)


SCRIPT = '''"""A script of a user's."""

from infopo import InfoPOConfig, InfoPOTrainer, LossTerm, ResponseLogps, check_loss, objective


@objective(title="Margin", formula="max(0, -m)", pairs=True)
def margin(logps: ResponseLogps) -> list[LossTerm]:
    values = (-logps.margins(logps.policy - logps.reference)).clamp(min=0)
    return [LossTerm(values, per="pair")]


def train(name: str) -> list[str]:
    config = InfoPOConfig(output_dir="out", learning_rate=1e-6, beta=0.5, report_to="none")
    trainer = InfoPOTrainer(model=name, args=config)
    trainer.train()
    check_loss(margin)
    return trainer.description()
'''
WRONG = SCRIPT.replace("beta=0.5", "beta='half'").replace("-> list[str]:", "-> int:")


@pytest.mark.long
def test_a_users_script_passes_a_strict_checker_and_its_mistakes_do_not(tmp_path: Path):
    """mypy finds the package where the interpreter has it; `py.typed` says that its types count."""
    pytest.importorskip("mypy")
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "wrong.py").write_text(WRONG, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(
        [*command, "script.py", "wrong.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    if "import-not-found" in done.stdout:
        pytest.skip("infopo runs from its sources here; it is not installed")
    lines = [line for line in done.stdout.splitlines() if "error:" in line]
    assert [line for line in lines if not line.startswith("wrong.py")] == []
    assert len(lines) == 2, done.stdout
    assert 'Argument "beta" to "InfoPOConfig" has incompatible type "str"' in done.stdout
