"""A headless Chromium that opens a page from disk, by its DevTools protocol: no driver and no other package."""

import asyncio
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from tornado.websocket import WebSocketClientConnection, websocket_connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find_browser() -> str | None:
    """Returns the path of a browser, or None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab. Everything that it logs, throws or requests is in `events`."""

    def __init__(self, program: str) -> None:
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                     "--remote-debugging-port=0", f"--user-data-dir={self.profile.name}", "about:blank"]  # fmt: skip
        self.process = subprocess.Popen(
            [program, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.events: list[dict[str, Any]] = []
        self.number = 0
        self.socket: WebSocketClientConnection | None = None

    async def start(self) -> None:
        """Waits for the browser and attaches to its tab."""
        port_file, until = Path(self.profile.name) / "DevToolsActivePort", time.monotonic() + 60
        while not (port_file.exists() and len(port_file.read_text().splitlines()) > 1):
            assert time.monotonic() < until, "the browser did not start"
            assert self.process.poll() is None, "the browser ended at once"
            await asyncio.sleep(0.1)
        port = port_file.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            tabs = json.load(answer)
        address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        self.socket = await websocket_connect(address, max_message_size=1 << 28)
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        assert self.socket is not None
        self.number += 1
        await self.socket.write_message(
            json.dumps({"id": self.number, "method": method, "params": parameters})
        )
        while True:
            text = await asyncio.wait_for(self.socket.read_message(), 60)
            assert text is not None, "the browser ended"
            message = json.loads(text)
            if message.get("id") == self.number:
                assert "error" not in message, message["error"]
                return message["result"]
            self.events.append(message)

    async def run(self, script: str) -> Any:
        """Returns the value of an expression in the page."""
        answer = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def press(self, key: str) -> None:
        """Presses and releases a key, which the element in focus gets."""
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        codes = {
            "Tab": 9,
            "Enter": 13,
            "Escape": 27,
            " ": 32,
            "End": 35,
            "Home": 36,
            "ArrowLeft": 37,
            "ArrowRight": 39,
        }
        about = {
            "key": key,
            "code": "Space" if key == " " else key,
            "windowsVirtualKeyCode": codes.get(key, 0),
        }
        await self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **about)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    async def until(self, condition: str, seconds: float = 60) -> None:
        """Waits until an expression is true."""
        end = time.monotonic() + seconds
        while not await self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, f"not true after {seconds} s: {condition}"
            await asyncio.sleep(0.1)

    async def open(self, path: Path) -> None:
        await self.call("Page.navigate", url=path.as_uri())
        await self.until("document.documentElement?.dataset.drawn")

    def complaints(self) -> list[str]:
        """Returns what the page logged as a warning or an error, or threw, and what it asked for beside itself."""
        found = []
        for event in self.events:
            parameters = event.get("params", {})
            match event.get("method"):
                case "Log.entryAdded" if parameters["entry"]["level"] in ("warning", "error"):
                    found.append(parameters["entry"]["text"])
                case "Runtime.exceptionThrown":
                    found.append(json.dumps(parameters["exceptionDetails"])[:500])
                case "Runtime.consoleAPICalled" if parameters["type"] in ("warning", "error"):
                    found.append(json.dumps(parameters["args"])[:500])
                case "Network.requestWillBeSent" if not parameters["request"]["url"].startswith(
                    ("data:", "file:")
                ):
                    found.append(parameters["request"]["url"])
        return found

    def close(self) -> None:
        if self.socket is not None:
            self.socket.close()
        self.process.kill()
        self.process.wait()
        self.profile.cleanup()
