"""What a run records of where it was made."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from infopo import provenance, runs
from infopo.provenance import environment


def test_environment_is_strict_json_with_versions_and_hardware():
    found = json.loads(runs.to_json(environment(seed=7, accelerators=["H100"], extra={"model": "m"})))
    assert found["schema_version"] == provenance.SCHEMA_VERSION
    assert found["seed"] == 7
    assert found["model"] == "m"
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["packages"]["torch"]
    assert found["hardware"]["cores"] >= 1
    assert found["hardware"]["memory_bytes"] > 0
    assert found["hardware"]["accelerators"] == ["H100"]
    assert found["command_line"] == sys.argv
    assert found["created"].endswith("+00:00")


def test_package_that_is_not_installed_is_null():
    assert environment(seed=None, packages=["no-such-package"])["packages"] == {"no-such-package": None}


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=directory, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_commit_of_the_working_directory_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "-m", "first")
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert environment(seed=0)["git"] == {"commit": head, "dirty": False}
    (tmp_path / "inside" / "new").write_text("")
    assert environment(seed=0)["git"] == {"commit": head, "dirty": True}


def test_repository_without_a_commit_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    git(tmp_path, "init", "--quiet")
    monkeypatch.chdir(tmp_path)
    assert environment(seed=0)["git"] == {"commit": None, "dirty": False}


def test_outside_a_repository_git_is_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert environment(seed=0)["git"] is None


def test_without_git_installed_git_is_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment(seed=0)["git"] is None
