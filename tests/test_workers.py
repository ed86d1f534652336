"""Worker processes: what Ctrl-C, a kill of their parent and a kill of one of them do to them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from infopo.data.pool import in_processes
from infopo.errors import TrainingError
from infopo.run_state import in_use
from infopo.workers import WorkerPool
from run_files import write_run
from worlds import interruptible

SCRIPT = """
import os, sys, time
from infopo.workers import WorkerPool

def work(path):
    open(path, "w").close()
    time.sleep(600)

if __name__ == "__main__":
    folder, method = sys.argv[1:]
    try:
        with WorkerPool(3, method) as pool:
            for done in [pool.submit(work, f"{folder}/{i}") for i in range(9)]:
                done.result()
    except KeyboardInterrupt:
        print("the parent was interrupted", flush=True)
        sys.exit(130)
"""


COMMANDS = """
import os, sys, threading
from infopo.workers import Commands

if __name__ == "__main__":
    try:
        with Commands() as commands, open(os.devnull, "wb") as output:
            jobs = [(sys.argv[1:] + [f"{i}.md"], output) for i in range(2)]
            threads = [threading.Thread(target=commands.run, args=job) for job in jobs]
            for each in threads:
                each.start()
            for each in threads:
                each.join()
    except KeyboardInterrupt:
        print("the parent was interrupted", flush=True)
        sys.exit(130)
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_commands_do_not_outlive_a_parent_that_is_ended_alone(tmp_path: Path, sent: signal.Signals):
    script, run = tmp_path / "script.py", write_run(tmp_path / "run", finished=False)
    script.write_text(COMMANDS, encoding="utf-8")
    with in_use(run), interruptible():
        process = subprocess.Popen(
            [sys.executable, str(script), "report", str(run), "--watch", "--format", "markdown", "--output"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
        )  # fmt: skip
        while len(list(tmp_path.glob("*.md"))) < 2:
            assert process.poll() is None
            time.sleep(0.02)
        commands = psutil.Process(process.pid).children()
        assert len(commands) == 2
        process.send_signal(sent)
        said, _ = process.communicate(timeout=30)
    assert process.returncode == (130 if sent == signal.SIGINT else -sent)
    assert "Traceback" not in said
    assert psutil.wait_procs(commands, timeout=30)[1] == []


def start(folder: Path, method: str, at_work: int) -> subprocess.Popen[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    (folder / "work").mkdir()
    with interruptible():
        process = subprocess.Popen(
            [sys.executable, str(script), str(folder / "work"), method],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
    while len(list((folder / "work").iterdir())) < at_work:
        assert process.poll() is None
    return process


@pytest.mark.parametrize(("method", "at_work"), [("fork", 3), ("spawn", 3), ("spawn", 1)])
def test_ctrl_c_reaches_the_parent_alone_which_ends_its_workers(tmp_path: Path, method: str, at_work: int):
    """With one worker at work, the others of `spawn` are still importing."""
    process = start(tmp_path, method, at_work)
    os.killpg(process.pid, signal.SIGINT)
    # The output ends when the last process that has it open ends.
    assert process.communicate(timeout=30) == ("the parent was interrupted\n", None)
    assert process.returncode == 130


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_workers_do_not_outlive_a_parent_that_is_killed(tmp_path: Path, method: str, sent: signal.Signals):
    process = start(tmp_path, method, 3)
    process.send_signal(sent)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == -sent
    assert "Traceback" not in said


def test_what_a_worker_raises_ends_the_others():
    with WorkerPool(2, "fork") as pool:
        wrong, waiting = pool.submit(divmod, 1, 0), [pool.submit(signal.pause) for _ in range(3)]
        with pytest.raises(ZeroDivisionError):
            wrong.result()
        with pytest.raises(KeyError), pool:
            raise KeyError
    assert all(future.done() for future in waiting)


def _killed(item: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_a_worker_that_is_killed_is_told_as_such():
    with pytest.raises(TrainingError, match=r"one of 2 processes that tokenize ended .* data\.num_proc"):
        list(in_processes(_killed, range(100), 2))
