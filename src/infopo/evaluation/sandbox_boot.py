"""The first thing that runs inside a sandbox: it lowers what the process may do, and then runs a program.

It is passed to the interpreter as text and imports nothing of this package. The job arrives on standard input as JSON.
"""

import contextlib
import importlib
import json
import os
import resource
import struct
import sys
import types


def begin() -> None:
    """Reads the job, gives up every privilege for good, and runs the program, which finds the job as `job`."""
    job = json.loads(sys.stdin.buffer.read())
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.close(nothing)
    _limit(job["limits"])
    if sys.platform == "linux":
        # If memory runs out, this goes first, and not whoever started it.
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    if job["chroot"] is not None:
        _change_root(job["chroot"])
    if job["uid"] is not None:
        os.setgroups([])
        os.setresgid(job["uid"], job["uid"], job["uid"])
        os.setresuid(job["uid"], job["uid"], job["uid"])
    if sys.platform == "linux":
        _promise(job["socketless"])
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


def _promise(socketless: bool) -> None:
    """Gives up, for this process and all that it starts, more privileges, outliving its parent, and system calls."""
    import ctypes

    prctl = ctypes.CDLL(None).prctl
    no_new_privileges, parent_death_signal, kill, seccomp, filtered = 38, 1, 9, 22, 2
    prctl(no_new_privileges, 1, 0, 0, 0)
    prctl(parent_death_signal, kill, 0, 0, 0)
    program = _filter(socketless)
    if program:
        code = ctypes.create_string_buffer(program)
        # struct sock_fprog. If the kernel refuses it, the probe finds what is open.
        whole = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
        prctl(seccomp, filtered, ctypes.create_string_buffer(whole), 0, 0)


# Number of the architecture, then clone, clone3 and socket, then what else is refused: unshare, setns, mount, umount2,
# pivot_root, chroot, ptrace, process_vm_readv and _writev, keyctl, add_key, request_key, bpf, perf_event_open,
# userfaultfd, shmget, msgget and semget. From 424 on all architectures agree: 425 to 433 are io_uring and newer mounts.
_CALLS = {
    "x86_64": (
        0xC000003E, 56, 435, 41,
        (
            272, 308, 165, 166, 155, 161, 101, 310, 311, 250, 248, 249, 321, 298, 323, 29, 68, 64, *range(425, 434),
        ),
    ),
    "aarch64": (
        0xC00000B7, 220, 435, 198,
        (
            97, 268, 40, 39, 41, 51, 117, 270, 271, 219, 217, 218, 280, 241, 282, 194, 186, 190, *range(425, 434),
        ),
    ),
}  # fmt: skip


def _filter(socketless: bool) -> bytes:
    """Returns a program for seccomp, which refuses namespaces, mounts, tracing, shared memory, and sockets if asked to.

    A user namespace would give a process the privileges in it that it has lost outside, and with them memory that no
    limit counts.
    """
    if os.uname().machine not in _CALLS:
        return b""
    architecture, clone, clone3, sockets, refused = _CALLS[os.uname().machine]
    load, equal, above, any_of, end = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, no_such_call, not_permitted, kill = 0x7FFF0000, 0x00050000 | 38, 0x00050000 | 1, 0x80000000
    new_namespaces = 0x7E020080

    def line(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, value)

    parts = [line(load, 4), line(equal, architecture, 1, 0), line(end, kill), line(load, 0)]
    # Another set of numbers of x86 begins here.
    parts += [line(above, 0x40000000, 0, 1), line(end, no_such_call)]
    # Its flags are out of sight. The C library takes the older call then.
    parts += [line(equal, clone3, 0, 1), line(end, no_such_call)]
    for number in (*refused, *((sockets,) if socketless else ())):
        parts += [line(equal, number, 0, 1), line(end, not_permitted)]
    parts += [
        line(equal, clone, 0, 3),
        line(load, 16),
        line(any_of, new_namespaces, 0, 1),
        line(end, not_permitted),
    ]
    return b"".join([*parts, line(end, allow)])


if __name__ == "__main__":
    begin()
