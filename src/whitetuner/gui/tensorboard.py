"""TensorBoard over the runs: on loopback at a port of its own as in the seed, and at /tb behind the page's login.

It is started when it is first looked at, as a process of its own, and ended with the page.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from whitetuner.errors import EXIT_ENVIRONMENT, UserError
from whitetuner.gui.asked import whole
from whitetuner.gui.pickers import Roots
from whitetuner.gui.settings import Settings
from whitetuner.paths import PYTHON
from whitetuner.runs import jobs
from whitetuner.runs.files import write_atomically
from whitetuner.runs.state import state_folder

PREFIX = "/tb"
#: Seconds between TensorBoard's looks at the files; ports tried when the wanted one is taken.
_RELOAD_S, _PORTS_TRIED = 5, 20
#: Headers that belong to one connection and are not passed on.
_HOPS = {
    "connection",
    "keep-alive",
    "transfer-encoding",
    "te",
    "trailer",
    "upgrade",
    "proxy-authorization",
    "content-length",
    "host",
}
#: The page's cookie is nobody else's business; the encoding is left to the two ends.
_KEPT_BACK = _HOPS | {"cookie", "authorization", "origin", "referer"}


def folders(roots: Roots) -> list[Path]:
    """Folders of runs that have curves and may be looked at, the newest run's first."""
    found = [Path(job.run) for job in jobs.jobs() if (Path(job.run) / "tensorboard").is_dir()]
    found = [path for path in found if roots.allows(path.parent)]
    return list(dict.fromkeys(path.parent for path in found))


class Board:
    """The one TensorBoard of a page."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.port: int | None = None
        self.folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._client: httpx.AsyncClient | None = None
        self._starting = asyncio.Lock()

    def routes(self) -> list[Route]:
        verbs = ["GET", "HEAD", "POST"]
        return [
            Route("/api/tensorboard", self.asked),
            Route(PREFIX, self.passed, methods=verbs),
            Route(PREFIX + "/{path:path}", self.passed, methods=verbs),
            Route("/font-roboto/{path:path}", self.passed),  # its style sheet asks for these from the root
        ]

    async def asked(self, request: Request) -> Response:
        """Starts it over the chosen folder (its place in `folders`); {ready, port, folders, chosen}."""
        there = await asyncio.to_thread(folders, self.settings.paths())
        given = whole(request.query_params.get("folder"), 0)
        chosen = given if given < len(there) else 0
        if not there:
            return JSONResponse({"ready": False, "folders": [], "chosen": 0, "port": None})
        try:
            async with self._starting:
                if self.folder != there[chosen] or not self._alive():
                    await asyncio.to_thread(self._start, there[chosen])
        except UserError as error:
            return JSONResponse({"error": str(error)}, 500)
        found: dict[str, Any] = {"ready": await self._answers(), "folders": [str(one) for one in there]}
        return JSONResponse(
            {**found, "chosen": chosen, "port": self.port}, headers={"cache-control": "no-store"}
        )

    async def passed(self, request: Request) -> Response:
        """A request to TensorBoard and its answer, as they are."""
        if not self._alive():
            return JSONResponse({"error": "TensorBoard is not running"}, 503)
        if self._client is None:  # trust_env: a proxy of the environment must not get between us and loopback
            self._client = httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{self.port}", trust_env=False, timeout=60
            )
        path = request.scope["path"].removeprefix(PREFIX) or "/"
        headers = [one for one in request.headers.raw if one[0].decode("latin-1").lower() not in _KEPT_BACK]
        try:
            address = httpx.URL(path=path, query=request.scope["query_string"])
        except httpx.InvalidURL:  # two slashes in front, control characters: nothing that TensorBoard has
            return JSONResponse({"error": "no such page"}, 404)
        outgoing = self._client.build_request(
            request.method, address, headers=headers, content=await request.body()
        )
        try:
            answer = await self._client.send(outgoing, stream=True)
        except httpx.TransportError:
            return JSONResponse({"error": "TensorBoard does not answer"}, 503)
        kept = {name: value for name, value in answer.headers.items() if name not in _HOPS}
        return StreamingResponse(_body(answer), answer.status_code, kept)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None
        await asyncio.to_thread(self._stop)

    def _alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def _answers(self) -> bool:
        try:
            async with httpx.AsyncClient(trust_env=False, timeout=2) as client:
                return (await client.get(f"http://127.0.0.1:{self.port}/data/environment")).status_code == 200
        except httpx.TransportError:
            return False

    def _start(self, folder: Path) -> None:
        self._stop()
        _end_orphan()
        self.port, self.folder = free_port(self.settings.tensorboard_port), folder
        log = state_folder() / "tensorboard.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [
            *PYTHON,
            "-m",
            "tensorboard.main",
            f"--logdir={folder}",
            "--host=127.0.0.1",
            f"--port={self.port}",
        ]
        command += ["--load_fast=false", f"--reload_interval={_RELOAD_S}"]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUTF8": "1"},
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        told = [[pid, psutil.Process(pid).create_time()] for pid in (self._process.pid, os.getpid())]
        write_atomically(state_folder() / "tensorboard.json", json.dumps(told))

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(3)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._process, self._client = None, None


def _end_orphan() -> None:
    """Ends a TensorBoard whose page was killed and could not."""
    try:
        (board, board_born), (page, page_born) = json.loads(
            (state_folder() / "tensorboard.json").read_text(encoding="utf-8")
        )
    except (OSError, ValueError):
        return
    if _is(board, board_born) and not _is(page, page_born):
        with contextlib.suppress(psutil.Error):
            psutil.Process(board).kill()


def _is(pid: int, born: float) -> bool:
    """Whether that process lives, and is not a later one of its number."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - born) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


async def _body(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for part in answer.aiter_raw():
            yield part
    finally:
        await answer.aclose()


def free_port(wanted: int) -> int:
    """The wanted port of loopback or the next free one. Raises UserError when there is none."""
    for port in range(wanted, min(65536, wanted + _PORTS_TRIED)):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as one:
            if os.name != "nt":
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(one.getsockname()[1])
    raise UserError(
        "no port is free for TensorBoard from {port} on",
        where="--tensorboard",
        mend="give another one",
        code=EXIT_ENVIRONMENT,
        port=wanted,
    )
