"""`infopo doctor` says what is here, is never stopped by what is broken, and gives no secret away."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infopo import __version__
from infopo.cli import main
from infopo.logps.kernels import KERNELS
from infopo.workflows import doctor

PARTS = [
    "versions", "devices", "attention kernels", "extras", "code execution", "stores", "hub", "environment",
]  # fmt: skip


def test_every_part_is_there_and_is_true(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == PARTS
    assert found["versions"]["infopo"].startswith(__version__)
    # An index's build of torch may leave the platform out of its metadata.
    assert found["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert "deepspeed" not in found["versions"]
    plain = found["attention kernels"]["float32, plain"]
    if not torch.cuda.is_available():
        assert plain["runs"] == "sdpa"
        assert found["devices"]["accelerators"] == "none"
        assert found["attention kernels"]["bfloat16, soft cap"]["runs"] == "written out"
    # Every kernel before the one that runs says why it does not.
    names = [kernel.name for kernel in KERNELS]
    for each in found["attention kernels"].values():
        before = names[: names.index(each["runs"])]
        assert [reason.partition(": ")[0] for reason in each["because"]] == [f"not {name}" for name in before]


def test_what_is_printed_has_a_heading_per_part(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert [
        line[:-1] for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")
    ] == PARTS
    assert "float32, plain" in out


def test_a_part_that_fails_is_named_and_the_others_are_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("INFOPO_CACHE", str(tmp_path / "file" / "below"))
    (tmp_path / "file").write_text("", encoding="utf-8")
    found = doctor.findings()
    assert list(found) == PARTS
    assert not {"failed"} & set(found["devices"])


def test_a_library_that_cannot_be_imported_is_what_the_command_says(tmp_path: Path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so: no such file')", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    token = "hf_" + "a1B2" * 6
    done = subprocess.run(
        [sys.executable, "-m", "infopo", "doctor"],
        env={**os.environ, "PYTHONPATH": path, "HF_TOKEN": token, "WANDB_API_KEY": "0123456789abcdef",
             "CUDA_LAUNCH_URL": f"https://me:{token}@host/"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "failed: OSError: libcudart.so: no such file" in done.stdout
    assert "reference log-probs:" in done.stdout
    assert token not in done.stdout
    assert "0123456789abcdef" not in done.stdout
    assert "  HF_TOKEN: ***\n" in done.stdout
    assert "  WANDB_API_KEY: ***\n" in done.stdout
    # A machine that is neither in offline mode nor signed in is not told to be offline.
    assert re.search(r"^  offline mode \(HF_HUB_OFFLINE\): (yes|no)$", done.stdout, flags=re.MULTILINE)
    assert "  signed in: yes\n" in done.stdout
