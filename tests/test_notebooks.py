"""The notebooks of examples/ run from top to bottom, and are kept without outputs."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path) -> list[str]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


@each_notebook
def test_a_notebook_is_valid_and_kept_without_outputs(path: Path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    for cell in cells(path):
        ast.parse(cell)


@pytest.mark.long
@each_notebook
def test_a_notebook_runs_from_top_to_bottom(path: Path, tmp_path: Path):
    """Cell by cell in one fresh process, as its kernel would; nothing is written beside it."""
    program = (
        "import json, sys\nscope = {'__name__': '__main__'}\n"
        "for cell in json.load(sys.stdin):\n    exec(compile(cell, '<cell>', 'exec'), scope)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(cells(path)), text=True, capture_output=True,
        cwd=tmp_path, env={**os.environ, "TMPDIR": str(tmp_path)}, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "InfoPO  epoch 4" in done.stdout
    assert "DPO     epoch 4" in done.stdout
