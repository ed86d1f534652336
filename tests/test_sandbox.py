"""Sandboxes: what the probe finds is what holds, and levels are refused by name."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from infopo.errors import ConfigError
from infopo.evaluation import sandbox
from infopo.evaluation.code_grading import Graded, Program, grade

ROOT = os.name == "posix" and os.geteuid() == 0


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What one test finds and allows is nothing to the next."""
    before = sandbox._allowed
    sandbox._strongest.cache_clear()
    yield
    sandbox._strongest.cache_clear()
    sandbox._allowed = before


def only(monkeypatch: pytest.MonkeyPatch, *levels: str) -> None:
    """Leaves the ways of some levels, as on a machine that has no others."""
    ways = [way for way in sandbox._ways() if way.level in levels]
    monkeypatch.setattr(sandbox, "_ways", lambda: ways)


def isolation(level: str, monkeypatch: pytest.MonkeyPatch) -> sandbox.Isolation:
    """Allows code at exactly a level, or skips with the reason why this machine does not have it."""
    only(monkeypatch, level)
    try:
        return sandbox.allow(level)
    except ConfigError as error:
        pytest.skip(str(error))


def run(code: str) -> Graded:
    """Runs code that may raise, and grades `f()`, which has to be true."""
    return grade([Program(code, ("f",), "assert f() is True")])[0]


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are of Linux")
def test_namespaces_contain_everything(monkeypatch: pytest.MonkeyPatch):
    found = isolation("namespaces", monkeypatch)
    assert set(found.contained) == sandbox._NEEDS["namespaces"]
    assert all(found.contained.values())
    assert found.as_record()["level"] == "namespaces"


@pytest.mark.skipif(not ROOT, reason="another user needs root")
def test_a_user_of_its_own_contains_all_but_the_network_and_the_result_says_so(
    monkeypatch: pytest.MonkeyPatch,
):
    found = isolation("uid", monkeypatch)
    assert {name for name, holds in found.contained.items() if not holds} <= {"network"}
    assert "network" in found.as_record()["contained"]
    # A stronger level was not asked for and cannot be had.
    with pytest.raises(ConfigError, match="expected at least namespaces, this machine has uid"):
        sandbox.allow("namespaces")


@pytest.mark.skipif(not ROOT, reason="the kernel exempts root alone")
def test_the_probe_finds_that_a_limit_on_processes_does_not_bind_root(monkeypatch: pytest.MonkeyPatch):
    """A user namespace makes root another user in name only. A level is called so if its forks are really limited."""
    ways = [way for way in sandbox._ways() if "user namespace" in way.how]
    if not ways:
        pytest.skip("no bubblewrap here")
    contained, problem = sandbox._probed(ways[0])
    if problem is not None:
        pytest.skip(problem)
    assert not contained["processes"]
    monkeypatch.setattr(sandbox, "_ways", lambda: [*ways, sandbox._Way("none", "limits alone")])
    with pytest.raises(ConfigError, match="does not contain processes"):
        sandbox.allow("uid")


def test_no_isolation_is_taken_only_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    only(monkeypatch, "none")
    for least in ("namespaces", "uid"):
        with pytest.raises(ConfigError, match=f"expected at least {least}, this machine has none"):
            sandbox.allow(least)
    found = sandbox.allow("none")
    assert found.level == "none"
    assert not found.contained["files"]
    assert run("def f(): return True").passed
    # The limit on CPU time holds without walls too, and so does the separation of tests and response.
    equal = "class A:\n    def __eq__(self, other): return True\ndef f(): return A()"
    assert run(equal).note == "no plain value"


def test_nothing_runs_unless_it_was_allowed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "_allowed", None)
    with pytest.raises(ConfigError, match="--allow-code-execution"):
        run("def f(): return True")
    with pytest.raises(ConfigError, match="expected one of namespaces, uid, none, got 'docker'"):
        sandbox.allow("docker")


@pytest.mark.parametrize("level", ["namespaces", "uid"])
def test_the_library_is_there_and_the_packages_of_this_environment_are_not(
    level: str, monkeypatch: pytest.MonkeyPatch
):
    isolation(level, monkeypatch)
    names = "bisect cmath collections datetime decimal functools hashlib heapq itertools json math random re "
    names += "statistics string struct typing zlib dataclasses enum copy operator"
    imports = "\n".join(f"import {name}" for name in names.split())
    assert run(f"{imports}\ndef f():\n    return hashlib.md5(b'').hexdigest()[:4] == 'd41d'") == Graded(True)
    assert run("import torch\ndef f(): return True").detail == "ModuleNotFoundError: No module named 'torch'"
    # No file of this project, and no variable of this process.
    secret = f"import os\ndef f(): return os.path.exists({__file__!r}) or 'PYTEST_CURRENT_TEST' in os.environ"
    assert run(secret).note is None
    assert not run(secret).passed


INSIDE = """
import ctypes, os, resource, signal, socket, tempfile

def refused(attempt):
    try:
        attempt()
    except (OSError, ValueError):
        return True
    return False

def write(path):
    with open(path, "w") as file:
        file.write("x")

def f():
    libc = ctypes.CDLL(None, use_errno=True)
    found = {
        "a user namespace": libc.unshare(0x10000000) == -1,
        "a mount": libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == -1,
        "memory that is shared beyond the process": libc.shmget(0x1234, 4096, 0o1600) == -1,
        "tracing": libc.ptrace(0, 0, 0, 0) == -1,
        "a raised limit": refused(lambda: resource.setrlimit(resource.RLIMIT_NPROC, (1000, 1000))),
        "the network": refused(lambda: socket.create_connection(("127.0.0.1", PORT), 2)),
        "a message to a socket of the machine": refused(lambda: socket.socket(socket.AF_UNIX).connect("\\0NAME")),
        "priority": refused(lambda: os.nice(-5)),
        "the process above": refused(lambda: os.kill(os.getppid(), signal.SIGKILL)),
        "root": refused(lambda: os.setuid(0)),
        "a device": refused(lambda: os.mknod("/tmp/x", 0o60600, os.makedev(8, 0))),
    }
    for place in ("/x", "/dev/x", "/dev/shm/x", "/usr/x", "/etc/x", os.__file__, PREFIX + "/x", "/proc/sys/kernel/x"):
        found["writing to " + place] = refused(lambda: write(place))
    for place in ("/etc/passwd", "/root/.bashrc", "/home", "/proc/1/environ", "/proc/1/mem", "/var"):
        found["reading " + place] = not os.access(place, os.R_OK)
    return sorted(name for name, holds in found.items() if not holds)
"""


@pytest.mark.parametrize("level", ["namespaces", "uid"])
def test_a_second_look_from_inside(level: str, monkeypatch: pytest.MonkeyPatch):
    """Other ways out than those that the probe tries."""
    found = isolation(level, monkeypatch)
    name = f"infopo-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(f"\0{name}")
        local.listen()
        code = INSIDE.replace("PORT", str(server.getsockname()[1])).replace("NAME", name)
        code = code.replace("PREFIX", repr(sys.base_prefix))
        graded = grade([Program(code, ("f",), "found = f()\nassert found == [], found")])[0]
    if not found.contained["network"]:
        pytest.skip("the network is open at this level here, and the result says so")
    assert graded == Graded(True)


@pytest.mark.parametrize("level", ["namespaces", "uid", "none"])
def test_nothing_is_left_of_a_response(level: str, monkeypatch: pytest.MonkeyPatch):
    """Neither a process that has left its group, nor a file, nor a module, is there for the next one."""
    isolation(level, monkeypatch)
    monkeypatch.setattr(sandbox, "WALL_SECONDS", 20.0)
    mark = f"left{os.getpid()}"
    leaves = f"""
import os, sys, time
def f():
    sys.modules["{mark}"] = sys
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            sys.argv = ["{mark}"]
            time.sleep(15)
        os._exit(0)
    return True
"""
    assert run(leaves).passed
    assert not run(f"import sys\ndef f(): return '{mark}' in sys.modules").passed
    if level != "none" and ROOT:
        # The kernel ends them all, and takes a moment.
        deadline = time.monotonic() + 10
        while processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert processes() == []


KILLED = """
import sys
from infopo.evaluation import sandbox
from infopo.evaluation.code_grading import Program, grade

CODE = '''
import os, time
def f():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(600)
        os._exit(0)
    time.sleep(600)
'''

ways = [way for way in sandbox._ways() if way.level == sys.argv[1]]
sandbox._ways = lambda: ways
sandbox.allow(sys.argv[1])
print("begins", flush=True)
grade([Program(CODE, ("f",), "assert f()")])
"""


@pytest.mark.long
@pytest.mark.skipif(not ROOT, reason="another user needs root")
def test_nothing_outlives_an_evaluation_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not even what has left the group of its sandbox and has another parent. Namespaces end all by themselves."""
    isolation("uid", monkeypatch)
    script = tmp_path / "script.py"
    script.write_text(KILLED, encoding="utf-8")
    before = set(psutil.pids())

    def left() -> list[psutil.Process]:
        # The interpreter of a sandbox alone has this option.
        return [each for each in psutil.process_iter() if each.pid not in before and "-S" in command_of(each)]

    killed = subprocess.Popen([sys.executable, str(script), "uid"], stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "begins\n"
    deadline = time.monotonic() + 60
    # The response, its tests, what the response has left, and what is to end that.
    while len(ours := left()) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    assert psutil.wait_procs(ours, timeout=30)[1] == []
    assert left() == []


def command_of(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def processes() -> list[str]:
    """Returns the processes of the users that only sandboxes of this process have."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # What has ended and was not waited for has no command any more.
            line = (entry / "cmdline").read_text(errors="replace")
            if line and entry.stat().st_uid in sandbox._free_users():
                found.append(line[:80])
    return found
