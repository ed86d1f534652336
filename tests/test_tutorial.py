"""The tutorial's commands work in an empty folder, one after the other, and leave what it speaks of."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorial.md"


@pytest.mark.long
def test_the_tutorial_from_its_first_command_to_its_last(tmp_path: Path) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", TUTORIAL.read_text(encoding="utf-8"), flags=re.DOTALL)
    command = f'infopo() {{ {shlex.quote(sys.executable)} -m infopo "$@"; }}'
    done = subprocess.run(
        ["bash", "-euc", "\n".join([command, *blocks])],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "INFOPO_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=570,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert {"prompt", "chosen", "rejected"} <= rows[0].keys()
    assert f"{len(rows)} rows with {len(rows)} pairs, from 1600 samples of 400 prompts" in done.stdout
    assert done.stdout.count("what changed until step") == 2
    assert "| lab (lab) | runs/infopo | 300 |" in done.stdout
    assert "| lab (lab) | runs/dpo | 300 |" in done.stdout
    assert (tmp_path / "report.html").is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path / "my-model")
    assert "InfoPO" in (tmp_path / "my-model" / "README.md").read_text(encoding="utf-8")
