"""What a sandbox contains, found out from inside by trying. It is passed to the interpreter as text.

`job` has the pipe to answer on, a port that listens, a file that anybody may read, a folder that anybody may write to,
and the number of a process outside.
"""

import json
import os
import socket
import time
from typing import Any

job: dict[str, Any]


def _processes(most: int) -> bool:
    """Returns whether the number of processes ends somewhere. The children end with the pipe."""
    reading, writing = os.pipe()
    for _ in range(most):
        try:
            child = os.fork()
        except OSError:
            return True
        if child == 0:
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
    return False


def _memory(size: int) -> bool:
    try:
        bytearray(size)
    except MemoryError:
        return True
    return False


def _network(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 2).close()
    except OSError:
        return True
    return False


def _files(readable: str, folder: str) -> bool:
    try:
        with open(readable, "rb"):
            return False
    except OSError:
        pass
    try:
        with open(os.path.join(folder, "written"), "wb"):
            return False
    except OSError:
        return True


def _signals(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError:
        return True
    return False


def _privileges() -> bool:
    """Returns whether the process can get none, neither here nor in a user namespace of its own."""
    import ctypes

    new_user_namespace = 0x10000000
    if os.uname().sysname == "Linux" and ctypes.CDLL(None).unshare(new_user_namespace) == 0:
        return False
    for attempt in (lambda: os.setuid(0), lambda: os.chroot("/"), lambda: os.setgroups([0])):
        try:
            attempt()
        except OSError:
            continue
        return False
    return True


def _probe() -> None:
    started = time.process_time()
    found = {
        "network": _network(job["port"]),
        "files": _files(job["readable"], job["folder"]),
        "signals": _signals(job["process"]),
        "privileges": _privileges(),
        "memory": _memory(job["memory"]),
        # The last, since no process can be started after it.
        "processes": _processes(job["processes"]),
    }
    os.write(job["fd"], json.dumps({"contained": found, "seconds": time.process_time() - started}).encode())


if __name__ == "__main__":
    _probe()
