"""A headless Chromium driven over its debugging pipe: messages in JSON, ended by a zero byte.

That is what Puppeteer and Playwright speak to it; here it needs no package.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def _find() -> str | None:
    for program in filter(None, map(shutil.which, _PROGRAMS)):
        # On some systems it is a script that only says how to install one.
        said = subprocess.run([program, "--version"], capture_output=True, timeout=60)
        if said.returncode == 0:
            return program
    return None


PROGRAM = _find()

needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here")

_KEYS = {
    "ArrowDown": 40,
    "ArrowLeft": 37,
    "ArrowRight": 39,
    "ArrowUp": 38,
    "End": 35,
    "Enter": 13,
    "Escape": 27,
    "Home": 36,
    "Tab": 9,
}


class Page:
    """One page in a browser; ``events`` holds what it told that nobody asked for."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._number = 0
        self._received = b""
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """One command of the DevTools protocol; its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._from], [], [], 60)
            assert ready, "Chromium says nothing"
            part = os.read(self._from, 1 << 16)
            assert part, "Chromium has ended"
            self._received += part
        message, self._received = self._received.split(b"\0", 1)
        found: dict[str, Any] = json.loads(message)
        return found

    def open(self, path: Path) -> None:
        """Loads a file, until its scripts have run."""
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        limit = time.monotonic() + 60
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            assert time.monotonic() < limit, "the page does not load"
            self.events.append(self._read())

    def eval(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def place(self, selector: str) -> tuple[float, float]:
        """The middle of the first element that a selector finds, once it is scrolled to."""
        x, y = self.eval(
            f"(e => {{ e.scrollIntoView({{block: 'nearest'}}); const b = e.getBoundingClientRect();"
            f"return [b.left + b.width / 2, b.top + b.height / 2] }})"
            f"(document.querySelector({json.dumps(selector)}))"
        )
        return x, y

    def point(self, selector: str) -> None:
        """Moves the mouse onto an element."""
        x, y = self.place(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str, *, shift: bool = False) -> None:
        """Clicks on an element."""
        x, y = self.place(selector)
        where = {"x": x, "y": y, "button": "left", "clickCount": 1, "modifiers": 8 * shift}
        self.call("Input.dispatchMouseEvent", type="mousePressed", **where)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", **where)

    def press(self, key: str) -> None:
        """Presses a key."""
        code = _KEYS[key]
        for kind in ("rawKeyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                text="\r" if key == "Enter" and kind == "rawKeyDown" else "",
            )

    def problems(self) -> list[str]:
        """Errors of scripts, console messages and requests beyond the file itself."""
        found = []
        for event in self.events:
            method, parameters = event.get("method"), event.get("params", {})
            if method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                found.append(json.dumps(parameters))
            elif method == "Network.requestWillBeSent":
                url = parameters["request"]["url"]
                if not url.startswith("file:"):
                    found.append(f"request: {url}")
        return found


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A page in a Chromium of its own, which keeps what it writes in a folder."""
    assert PROGRAM is not None
    # It reads 3 and writes 4: with these taken here, Popen uses neither for itself.
    reserved = [os.open(os.devnull, os.O_RDONLY) for _ in range(5)]
    their_in, our_out = os.pipe()
    our_in, their_out = os.pipe()

    def pipes() -> None:
        os.dup2(fcntl.fcntl(their_in, fcntl.F_DUPFD, 10), 3)
        os.dup2(fcntl.fcntl(their_out, fcntl.F_DUPFD, 10), 4)

    process = subprocess.Popen(
        [
            PROGRAM,
            "--headless",
            "--remote-debugging-pipe",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            f"--user-data-dir={folder}",
            "--window-size=900,800",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=pipes,
        close_fds=False,
    )
    for number in (*reserved, their_in, their_out):
        os.close(number)
    try:
        page = Page(our_out, our_in)
        yield page
        page._session = None
        page.call("Browser.close")
        process.wait(20)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(our_out)
        os.close(our_in)
