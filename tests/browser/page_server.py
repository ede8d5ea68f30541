"""`whitetuner gui` as a user starts it, and a Chromium page that remembers what it should not have done."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
from playwright.sync_api import BrowserContext, ConsoleMessage, Page, Request

SOURCE = Path(__file__).parents[2] / "src"


class Server:
    """`whitetuner gui` as a user starts it, in a folder of its own."""

    def __init__(self, folder: Path, *words: str, port: int = 0, **environment: str) -> None:
        self.folder, self.words = folder, words
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(SOURCE),
            "WHITETUNER_STATE": str(folder / "state"),
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        folder.mkdir(parents=True, exist_ok=True)
        self.process: subprocess.Popen[str] | None = None
        self.headers: dict[str, str] = {}
        self.port, self.said = port, ""
        self.start()

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "whitetuner",
            "gui",
            "--no-browser",
            f"--port={self.port}",
            "--tensorboard=0",
            *self.words,
        ]
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            encoding="utf-8",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line
            found = re.search(r"White Tuner: (http://127\.0\.0\.1:(\d+)\S*)", line)
            if found:
                self.port, self.url, self.link = int(found[2]), f"http://127.0.0.1:{found[2]}", found[1]
                break
        else:
            raise AssertionError(self.said)
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line

    def ready(self) -> float:
        """Seconds from the launch until the forms were there."""
        while not self.get("/api/ready").json()["ready"]:
            assert not self.get("/api/ready").json()["failed"], self.said
            time.sleep(0.1)
        return time.monotonic() - self.began

    def get(self, path: str, **more: Any) -> httpx.Response:
        for _ in range(100):
            try:
                headers = {**self.headers, **more.pop("headers", {})}
                return httpx.get(self.url + path, trust_env=False, timeout=30, headers=headers, **more)
            except httpx.ConnectError:
                time.sleep(0.05)
        raise AssertionError(f"no answer from {self.url}")

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, trust_env=False, timeout=60)

    def log_in(self, password: str) -> str:
        """The cookie of a login."""
        answer = httpx.post(f"{self.url}/login", data={"password": password}, trust_env=False, timeout=30)
        assert answer.status_code == 200
        return answer.headers["set-cookie"].split(";")[0]

    def cpu_s(self) -> float:
        """Seconds of work that the server has done so far."""
        assert self.process is not None
        spent = psutil.Process(self.process.pid).cpu_times()
        return spent.user + spent.system

    def close(self) -> None:
        """As Ctrl-C does: what it started for itself ends with it."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def run_cli(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "whitetuner", *words]
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, encoding="utf-8", capture_output=True, timeout=120
        )

    def fake(self, name: str, *words: object) -> subprocess.Popen[bytes]:
        """A scripted run in this server's output folder (fake_trainer.py)."""
        script = Path(__file__).with_name("fake_trainer.py")
        command = [sys.executable, str(script), str(self.folder / "output" / name), *map(str, words)]
        return subprocess.Popen(command, cwd=self.folder, env=self.environment)


class Watched:
    """A page that remembers what it should not have done."""

    def __init__(self, context: BrowserContext) -> None:
        self.page: Page = context.new_page()
        self.page.set_default_timeout(30_000)
        self.outside: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", self._request)
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _request(self, request: Request) -> None:
        if not request.url.startswith(("http://127.0.0.1:", "data:", "blob:")):
            self.outside.append(request.url)

    def _console(self, message: ConsoleMessage) -> None:
        # A killed server is seen as broken and refused connections, which the page reports in its own words.
        if message.type == "error" and "net::ERR_" not in message.text:
            self.errors.append(message.text)
