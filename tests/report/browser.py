"""A headless browser of the Chromium family, spoken to through a pipe: no driver, no port, nothing to install beside."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge", "msedge")


def find_browser() -> str | None:
    """The one that KDLIT_BROWSER names, or the first on the PATH."""
    named = os.environ.get("KDLIT_BROWSER")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page in a browser process of its own; what it logs and asks of the network is kept."""

    def __init__(self, program: str) -> None:
        self.home = tempfile.TemporaryDirectory(prefix="kdlit-browser")
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()

        def wire() -> None:  # the browser reads from 3 and writes to 4
            spare = [os.dup(one) for one in (to_browser, from_browser)]
            os.dup2(spare[0], 3)
            os.dup2(spare[1], 4)

        flags = (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--hide-scrollbars",
            "--disable-dev-shm-usage",
        )
        self.process = subprocess.Popen(
            [program, *flags, f"--user-data-dir={self.home.name}", "--remote-debugging-pipe", "about:blank"],
            preexec_fn=wire,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._numbers, self._left, self._session = itertools.count(1), b"", None
        self.events: list[dict] = []
        target = next(one for one in self.do("Target.getTargets")["targetInfos"] if one["type"] == "page")
        self._session = self.do("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.do(f"{domain}.enable")

    def do(self, method: str, **parameters: object) -> dict:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _read(self, patience: float = 30.0) -> dict:
        end = time.monotonic() + patience
        while b"\0" not in self._left:
            if not select.select([self._in], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self._in, 1 << 20)
            if not part:
                raise ConnectionError("the browser has ended")
            self._left += part
        answer, _, self._left = self._left.partition(b"\0")
        return json.loads(answer)

    def show(self, path: Path, width: int, dark: bool = False, height: int = 800) -> None:
        """Open a file as a window of this width, in CSS pixels, shows it."""
        phone = width < 600
        self.do(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.do("Emulation.setEmulatedMedia", media="", features=[scheme])
        self.do("Page.navigate", url=path.absolute().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())
        self.events = [event for event in self.events if event.get("method") != "Page.loadEventFired"]

    def ask(self, expression: str) -> object:
        """The value of a JavaScript expression on the page."""
        result = self.do("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, path: Path, top: int = 0, height: int | None = None) -> None:
        size = self.do("Page.getLayoutMetrics")["cssContentSize"]
        clip = {
            "x": 0,
            "y": top,
            "width": size["width"],
            "height": min(height or size["height"], size["height"] - top),
            "scale": 1,
        }
        shot = self.do("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.do("Page.printToPDF", printBackground=True)["data"]))

    def complaints(self) -> list[str]:
        """Everything that the console was told, exceptions included."""
        told = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"])[:500] for event in self.events if event.get("method") in told]

    def requested(self) -> list[str]:
        """What was asked for, the parts that the page itself holds left out."""
        urls = [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith("data:")]

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._out)
        os.close(self._in)
        self.home.cleanup()
