"""Files and folders are whole or not there. Kills and full disks: test_runs, test_full_disk, test_checkpoint_files."""

import os
import time
from pathlib import Path

import pytest

from infopo import durable


def test_what_fails_halfway_leaves_the_old_file_alone_and_nothing_beside_it(tmp_path: Path):
    path = tmp_path / "file"
    durable.write(path, [b"old"])

    def parts():
        yield b"ne"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        durable.write(path, parts())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("old", ["nothing", "file", "folder"])
@pytest.mark.parametrize("new", ["file", "folder"])
def test_files_and_folders_replace_each_other(tmp_path: Path, old: str, new: str):
    staging = tmp_path / "staging"
    for kind, path in ((old, tmp_path / "thing"), (new, staging / "thing")):
        if kind == "folder":
            path.mkdir(parents=True)
            (path / "inside").write_text(str(path.parent))
        elif kind == "file":
            path.parent.mkdir(exist_ok=True)
            path.write_text(str(path.parent))
    durable.put(staging / "thing", tmp_path / "thing", aside=staging)
    put = tmp_path / "thing" / ("inside" if new == "folder" else "")
    assert put.read_text() == str(staging)
    assert not (staging / "thing").exists()


def test_only_temporary_files_are_taken_for_left_ones_and_only_old_ones_if_others_may_write(tmp_path: Path):
    for name, age in ((".old.tmp", 7200), (".new.tmp", 0), ("kept.tmp", 7200)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    durable.remove_left_behind(tmp_path, seconds=3600)
    assert {path.name for path in tmp_path.iterdir()} == {".new.tmp", "kept.tmp"}
    durable.remove_left_behind(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.tmp"]
    durable.remove_left_behind(tmp_path / "missing")
