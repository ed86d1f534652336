"""The first thing that runs inside a sandbox: it lowers what the process may do, and then runs a program.

It is passed to the interpreter as text and imports nothing of this package. The job arrives on standard input as JSON.
"""

import importlib
import json
import os
import resource
import sys
import types


def begin() -> None:
    """Reads the job, gives up every privilege for good, and runs the program, which finds the job as `job`."""
    job = json.loads(sys.stdin.buffer.read())
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.close(nothing)
    _limit(job["limits"])
    if job["chroot"] is not None:
        _change_root(job["chroot"])
    if job["uid"] is not None:
        os.setgroups([])
        os.setresgid(job["uid"], job["uid"], job["uid"])
        os.setresuid(job["uid"], job["uid"], job["uid"])
    if sys.platform == "linux":
        _promise()
    for name, text in job["modules"].items():
        module = types.ModuleType(name)
        exec(compile(text, f"<{name}>", "exec"), module.__dict__)
        sys.modules[name] = module
    exec(compile(job["program"], "<program>", "exec"), {"__name__": "__main__", "job": job})


def _limit(limits: dict[str, list[int]]) -> None:
    for name, (soft, hard) in limits.items():
        kind = getattr(resource, name, None)
        if kind is None:
            continue
        # What the caller's own limits do not leave cannot be had.
        ceiling = resource.getrlimit(kind)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        try:
            resource.setrlimit(kind, (soft, hard))
        except (OSError, ValueError):  # macOS has limits in name only; the probe finds what does not bind
            continue


def _change_root(prefix: str) -> None:
    """Leaves nothing of the file system but the interpreter's own folder."""
    # These load libraries from elsewhere.
    for name in ("ctypes", "hashlib", "zlib"):
        importlib.import_module(name)
    os.chroot(prefix)
    os.chdir("/")
    paths = [sys.path, *(module.__path__ for module in sys.modules.values() if hasattr(module, "__path__"))]
    for path in paths:
        path[:] = ["/" + os.path.relpath(folder, prefix) for folder in path if folder.startswith(prefix)]
    sys.path_importer_cache.clear()


def _promise() -> None:
    """No program can raise privileges from here on, and nothing outlives the process that started this one."""
    import ctypes

    prctl = ctypes.CDLL(None).prctl
    no_new_privileges, parent_death_signal, kill = 38, 1, 9
    prctl(no_new_privileges, 1, 0, 0, 0)
    prctl(parent_death_signal, kill, 0, 0, 0)


if __name__ == "__main__":
    begin()
