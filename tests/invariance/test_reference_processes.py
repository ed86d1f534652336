"""The reference store among real processes: killed, side by side, and as ranks, they leave the same values."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infopo.data.examples import ExampleDataset
from infopo.logps import attention
from infopo.reference_pass import precompute
from worlds import random_examples, tiny_llama

SCRIPT = str(Path(__file__).with_name("score_reference.py"))
pytestmark = pytest.mark.long


def expected(first: int = 0, end: int = 60) -> np.ndarray:
    dataset = ExampleDataset.from_examples(random_examples(60)[first:end])
    both = frozenset({"chosen", "rejected"})
    model = tiny_llama()
    attention.enable(model)  # as the trainer does
    values = precompute(dataset, model, both, batch_size=2, device=torch.device("cpu")).reference
    assert values is not None
    return values


def start(folder: Path, first: int = 0, end: int = 60, seconds: float = 0.05) -> subprocess.Popen[str]:
    command = [sys.executable, SCRIPT, str(folder), str(first), str(end), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out + err


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("result-*.json"))]


def kill_at_pass(process: subprocess.Popen[str], number: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        number -= line == "pass\n"
        if number == 0:
            break
    else:
        raise AssertionError("the process ended before it could be killed")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def shards(folder: Path) -> list[Path]:
    return list((folder / "store").glob("*/*.safetensors"))


@pytest.mark.parametrize("number", [1, 2, 17])
def test_a_killed_computation_goes_on_and_ends_in_the_same_bits(tmp_path: Path, number: int) -> None:
    kill_at_pass(start(tmp_path), number)
    kept = len(shards(tmp_path))
    assert (kept > 0) == (number > 1)
    finish(start(tmp_path))
    (after,) = results(tmp_path)
    np.testing.assert_array_equal(after["values"], expected())
    assert (after["found"] > 0) == (number > 1)
    assert after["found"] + len(after["computed"]) == 120
    assert not list((tmp_path / "store").glob("*/.*.tmp"))
    assert not list((tmp_path / "store").glob("*/claims/*"))


def test_a_process_killed_again_and_again_leaves_whole_shards_and_comes_to_its_end(tmp_path: Path) -> None:
    kept = 0
    for delay in (0.05, 0.2, 0.3, 0.4, 0.6):
        process = start(tmp_path, seconds=0.02)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.communicate()
        assert len(shards(tmp_path)) >= kept
        kept = len(shards(tmp_path))
    said = finish(start(tmp_path, seconds=0.0))
    assert "is damaged" not in said
    np.testing.assert_array_equal(results(tmp_path)[-1]["values"], expected())


def test_two_processes_compute_each_response_once(tmp_path: Path) -> None:
    for process in [start(tmp_path), start(tmp_path)]:
        finish(process)
    one, two = results(tmp_path)
    assert one["computed"]
    assert two["computed"]
    assert not set(one["computed"]) & set(two["computed"])
    assert len(one["computed"]) + len(two["computed"]) == 120
    np.testing.assert_array_equal(one["values"], expected())
    np.testing.assert_array_equal(two["values"], expected())


def test_processes_with_other_data_share_what_they_have_in_common(tmp_path: Path) -> None:
    for process in [start(tmp_path, 0, 40), start(tmp_path, 20, 60)]:
        finish(process)
    one, two = results(tmp_path)
    assert not set(one["computed"]) & set(two["computed"])
    assert len(one["computed"]) + len(two["computed"]) == 120
    np.testing.assert_allclose(one["values"], expected(0, 40), rtol=1e-5)
    np.testing.assert_allclose(two["values"], expected(20, 60), rtol=1e-5)


def test_who_waits_for_a_process_that_is_killed_does_its_work(tmp_path: Path) -> None:
    slow = start(tmp_path, 0, 2, seconds=600)
    assert slow.stdout is not None
    assert slow.stdout.readline() == "pass\n"  # its only batch is claimed
    waiting = start(tmp_path, 0, 2, seconds=0)
    assert waiting.stderr is not None
    said = ""
    while f"1 batches that this run needs are being computed by another run (process {slow.pid})" not in said:
        said = waiting.stderr.readline()
        assert said, "it ended"
    assert not shards(tmp_path)
    slow.kill()
    slow.communicate()
    finish(waiting)
    (after,) = results(tmp_path)
    assert len(after["computed"]) == 4
    np.testing.assert_array_equal(after["values"], expected(0, 2))


def test_ranks_share_the_work_and_end_in_the_same_bits(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path), "0", "60", "0.05"], check=True, timeout=300, env=environment)
    one, two = results(tmp_path)
    assert one["computed"]
    assert two["computed"]
    assert not set(one["computed"]) & set(two["computed"])
    np.testing.assert_array_equal(one["values"], expected())
    np.testing.assert_array_equal(two["values"], expected())
    subprocess.run([*command, str(tmp_path), "0", "60", "0.0"], check=True, timeout=300, env=environment)
    assert sorted(len(each["computed"]) for each in results(tmp_path))[:2] == [0, 0]


def test_a_damaged_shard_is_computed_anew_to_the_same_bits(tmp_path: Path) -> None:
    finish(start(tmp_path, seconds=0))
    (first,) = results(tmp_path)
    shard = max(shards(tmp_path), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 64
    shard.write_bytes(content)
    said = finish(start(tmp_path, seconds=0))
    assert f"{shard}: is damaged" in said
    second = next(each for each in results(tmp_path) if each != first)
    np.testing.assert_array_equal(second["values"], first["values"])
    assert 0 < len(second["computed"]) < 120
    assert (shard.parent / "damaged" / shard.name).exists()
