"""The package as users import it: public names, lazy torch, one version."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import infopo

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_public_names():
    of_losses = ["LossTerm", "ResponseLogps", "__version__", "check_loss", "objective"]
    assert infopo.__all__ == ["InfoPOConfig", "InfoPOTrainer", *of_losses]


def test_public_names_resolve_to_what_they_say():
    assert infopo.InfoPOTrainer.__name__ == "InfoPOTrainer"
    assert infopo.InfoPOConfig.__name__ == "InfoPOConfig"
    assert set(infopo.__all__) <= set(dir(infopo))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'InfoTrainer'"):
        _ = infopo.InfoTrainer


@pytest.mark.parametrize(
    "module", ["infopo", "infopo.cli", "infopo.config", "infopo.runs", "infopo.report.page"]
)
def test_starting_and_reporting_import_no_torch(module: str):
    done = run("-c", f"import {module}, sys; assert not {{'torch', 'transformers'}} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_help_is_printed_without_torch():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['infopo', '--help']\n"
        "try:\n    runpy.run_module('infopo', run_name='__main__')\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: infopo")


def test_version_is_the_same_everywhere():
    assert infopo.__version__ == PYPROJECT["project"]["version"]
    try:
        installed = importlib.metadata.version("infopo")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("infopo runs from its sources here; it is not installed")
    assert installed == infopo.__version__


def test_every_requirement_has_an_exact_version_in_the_constraints():
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    names = {name.lower().replace("_", "-") for name in pinned}
    extras = PYPROJECT["project"]["optional-dependencies"].values()
    required = [*PYPROJECT["project"]["dependencies"], *(need for extra in extras for need in extra)]
    wanted = {re.match(r"[\w-]+", need)[0].lower().replace("_", "-") for need in required} - {"infopo"}
    assert wanted - names == set()
