"""The page's server: a light shell at once, the forms when Gradio is there, one login in front of everything."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import threading
import time
import traceback
import webbrowser
from collections.abc import AsyncIterator
from dataclasses import replace

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from whitetuner.errors import EXIT_ENVIRONMENT, UserError
from whitetuner.gui import data_page, form_api, run_api, shell
from whitetuner.gui.access import Access, App, Receive, Scope, Send
from whitetuner.gui.run_state import Runs
from whitetuner.gui.settings import Settings
from whitetuner.gui.tensorboard import Board
from whitetuner.runs.state import machine_secret, state_folder
from whitetuner.tongue import say

#: So many ports after the wanted one are tried when it is taken.
PORTS_TRIED = 20


class Forms:
    """Gradio's two pages: built beside the running server, since its import alone takes seconds."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.app: App | None = None
        self.failed = ""

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(self._open())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def _open(self) -> None:
        try:
            host = await asyncio.to_thread(self._build)
            async with host.router.lifespan_context(host):
                self.app = host
                await asyncio.Event().wait()
        except BaseException as error:
            if not isinstance(error, asyncio.CancelledError):
                self.failed = f"{type(error).__name__}: {error}"
                traceback.print_exc()
            raise

    def _build(self) -> Starlette:
        from whitetuner.gui.page import mounted

        return mounted(self.settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is not None:
            await self.app(scope, receive, send)
            return
        if scope["type"] == "http":
            page = scope["path"].rstrip("/") in ("/zh", "/en")
            answer: Response = (
                HTMLResponse(shell.waiting(scope["path"][1:3])) if page else Response(status_code=503)
            )
            await answer(scope, receive, send)
            return
        await receive()
        await send({"type": "websocket.close", "code": 1013})


def make_app(settings: Settings) -> Access:
    """The whole page as an ASGI application, login included."""
    forms = Forms(settings)

    async def root(request: Request) -> Response:
        language = shell.language_of(dict(request.cookies), request.headers.get("accept-language", ""))
        return RedirectResponse(
            f"/{language}/", headers={"cache-control": "no-store", "vary": "cookie, accept-language"}
        )

    async def ready(request: Request) -> Response:
        return JSONResponse({"ready": forms.app is not None, "failed": forms.failed})

    async def language(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in shell.LANGUAGES:
            return Response(status_code=404)
        answer = RedirectResponse(f"/{name}/")
        answer.set_cookie("wt_lang", name, max_age=365 * 24 * 3600, samesite="lax")
        return answer

    async def icon(request: Request) -> Response:
        return Response(shell.ICON, media_type="image/svg+xml", headers={"cache-control": "max-age=86400"})

    board = Board(settings)

    @contextlib.asynccontextmanager
    async def lifespan(own: Starlette) -> AsyncIterator[None]:
        async with forms.lifespan(own):
            yield
        await board.close()

    routes: list[BaseRoute] = [
        Route("/", root),
        Route("/favicon.ico", icon),
        Route("/api/ready", ready),
        Route("/lang/{name}", language),
        *run_api.routes(settings, Runs()),
        *form_api.routes(settings.paths(), state_folder()),
        *data_page.routes(settings.paths(), state_folder()),
        *board.routes(),
        Mount("/static", StaticFiles(packages=[("whitetuner.gui", "static")])),
    ]
    own = Starlette(routes=routes, lifespan=lifespan)

    async def dispatch(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        is_form = path.startswith(("/zh/", "/en/")) or path in ("/zh", "/en")
        await (forms if is_form else own)(scope, receive, send)

    return Access(dispatch, settings, machine_secret())


def bound(settings: Settings) -> socket.socket:
    """A listening socket at the wanted port or the next free one. Raises UserError when there is none."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    reason = "ports are numbers up to 65535"
    for port in range(settings.port, min(65536, settings.port + PORTS_TRIED)):
        one = socket.socket(family, socket.SOCK_STREAM)
        if os.name != "nt":  # there the option would let two servers share a port
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((settings.host, port))
            one.listen(128)
            return one
        except (OSError, OverflowError) as error:
            one.close()
            reason = getattr(error, "strerror", None) or str(error)
            if isinstance(error, socket.gaierror):
                break
    raise UserError(
        "the page cannot be opened at {host}, port {port} ({reason})",
        where="--listen / --port",
        mend="choose another port, e.g. --port {other}",
        code=EXIT_ENVIRONMENT,
        host=settings.host,
        port=settings.port,
        reason=reason,
        other=8000 if settings.port != 8000 else 8100,
    )


def serve(settings: Settings) -> int:
    """Serves until Ctrl-C; trainings that the page started go on. Returns the exit code."""
    listening = bound(settings)
    port = listening.getsockname()[1]
    if settings.port and port != settings.port:
        say(f"port {settings.port} is taken; using {port}")
    settings = replace(settings, port=port)
    access = make_app(settings)
    name = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    address = f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"
    link = access.link(address)
    say(f"White Tuner: {link if settings.made_up else address}")
    if settings.made_up:
        say(f"  this link logs in once; the password: {settings.password}")
        say("  from another machine put this one's name or address in place of 127.0.0.1")
    server = uvicorn.Server(
        uvicorn.Config(
            access, log_level="warning", timeout_graceful_shutdown=2, ws_max_size=1 << 24, lifespan="on"
        )
    )
    if settings.open_browser and not settings.server and _has_display():
        threading.Thread(target=_open_when_up, args=(server, link), daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is how it is closed
        server.run(sockets=[listening])
    say("the page is closed; trainings go on")
    return 0


def _has_display() -> bool:
    return sys.platform in ("win32", "darwin") or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )


def _open_when_up(server: uvicorn.Server, link: str) -> None:
    while not server.started and not server.should_exit:
        time.sleep(0.05)
    if server.started:
        webbrowser.open(link)
