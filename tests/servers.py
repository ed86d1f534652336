"""A real HTTP server on loopback that speaks like an OpenAI-compatible one, or fails as a test asks."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], bytes] | None
"""Status, headers and body. None drops the connection."""


def completion(text: str | None, *, finish: str | None = "stop", kind: str = "chat") -> Answer:
    """A whole answer, as such a server gives it."""
    said: dict[str, Any] = (
        {"message": {"role": "assistant", "content": text}} if kind == "chat" else {"text": text}
    )
    body = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "served-model-2026",
        "choices": [{"index": 0, "finish_reason": finish, **said}],
        "usage": {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16},
    }
    return 200, {}, json.dumps(body).encode()


def failure(status: int, message: str, **headers: str) -> Answer:
    body = {"error": {"message": message, "type": "error", "param": None, "code": None}}
    return status, {key.replace("_", "-"): value for key, value in headers.items()}, json.dumps(body).encode()


@dataclass
class Served:
    """What a server was asked.

    Attributes:
        url: Its address.
        bodies: Bodies of the requests, in the order in which they came.
        keys: Their Authorization headers.
    """

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    most_at_once: int = 0


@contextmanager
def serving(
    answer: Callable[[dict[str, Any], int], Answer], models: tuple[str, ...] = ("served-model",)
) -> Iterator[Served]:
    """Serves within the block.

    Args:
        answer: Body and number (from 0) of a request -> what is answered.
        models: Models that the server lists.
    """
    lock, now = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = {"object": "list", "data": [{"id": name, "object": "model"} for name in models]}
            self._send((200, {}, json.dumps(body).encode()))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(served.bodies)
                served.bodies.append({**body, "path": self.path})
                served.keys.append(self.headers.get("Authorization"))
                now[0] += 1
                served.most_at_once = max(served.most_at_once, now[0])
            try:
                self._send(answer(body, number))
            finally:
                with lock:
                    now[0] -= 1

        def _send(self, found: Answer) -> None:
            self.close_connection = True
            if found is None:
                return
            status, headers, body = found
            self.send_response(status)
            for key, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args: Any) -> None:  # a client that has given up
            pass

    server = Server(("127.0.0.1", 0), Handler)
    served = Served(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
