"""A headless Chromium, spoken to over a pipe: Debian's `chromium-headless-shell`, or whichever is there."""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")


def find() -> str | None:
    """The browser's command: `LEAKBENCH_BROWSER`, or the first that is there."""
    own = os.environ.get("LEAKBENCH_BROWSER")
    found = [own, *map(shutil.which, NAMES)]
    played = sorted(Path("~/.cache/ms-playwright").expanduser().glob("chromium*/*/headless_shell"))
    return next((one for one in [*found, *map(str, played)] if one), None)


class Page:
    """One page, and all that it complained about: errors, and requests that it made."""

    def __init__(self, url: str, width: int = 1280, height: int = 900) -> None:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        into, self._out = os.pipe()
        self._in, out = os.pipe()

        def as_three_and_four() -> None:  # where Chromium's --remote-debugging-pipe reads and writes
            os.dup2(os.dup(into), 13)
            os.dup2(os.dup(out), 14)
            os.dup2(13, 3)
            os.dup2(14, 4)

        command = [find(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--remote-debugging-pipe", f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(
            command,
            preexec_fn=as_three_and_four,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(into)
        os.close(out)
        self._pending = b""
        self._count = 0
        self._session: str | None = None
        self.complaints: list[str] = []
        self.requests: list[str] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(one["targetId"] for one in targets if one["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.resize(width, height)
        self._loaded = False
        self.call("Page.navigate", url=url)
        while not self._loaded:
            self._read()

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """One command of the DevTools protocol."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._pending:
            got = os.read(self._in, 2**20)
            assert got, "the browser is gone"
            self._pending += got
        text, _, self._pending = self._pending.partition(b"\0")
        answer = json.loads(text)
        said, parameters = answer.get("method"), answer.get("params", {})
        if said == "Page.loadEventFired":
            self._loaded = True
        if said == "Runtime.exceptionThrown":
            self.complaints.append(str(parameters["exceptionDetails"]))
        if said == "Log.entryAdded":
            self.complaints.append(parameters["entry"]["text"])
        if said == "Page.javascriptDialogOpening":
            self.complaints.append(f"a script said {parameters['message']}")
        if said == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"][:60])
        return answer

    def resize(self, width: int, height: int) -> None:
        """The window's size, in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 700,
        )

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")


@pytest.fixture(scope="session")
def browser():
    """`Page`; the test is skipped where there is no browser."""
    if find() is None:
        pytest.skip("no browser: apt-get install chromium-headless-shell, or set LEAKBENCH_BROWSER")
    return Page
