"""Who may use the page: one login in front of every route, requests of foreign pages refused, bodies bounded.

Without a password only names of this machine are answered, so that a foreign name that was pointed at 127.0.0.1 (DNS rebinding)
reads nothing. With one, any name is answered (cloud machines have many), and the password decides.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from whitetuner.gui import shell
from whitetuner.gui.settings import Settings, is_loopback

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

SESSION_S = 30 * 24 * 3600
#: Wrong passwords from one address until it has to wait, and from everywhere together.
FREE_TRIES, FREE_TRIES_OF_ALL = 5, 50
LONGEST_WAIT_S = 300
#: Addresses remembered; from so many the bound on all of them together is what holds.
REMEMBERED = 10_000
#: Bytes of a request's body: of the page's own commands, and of what Gradio takes (uploads of pictures and clips).
SMALL_BODY, UPLOAD = 4 << 20, 2 << 30
_SAFE = ("GET", "HEAD", "OPTIONS")
#: The browser itself keeps the page from reaching any other host. Gradio's bundle needs inline and evaluated scripts.
_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "SAMEORIGIN",
    "referrer-policy": "same-origin",
    "content-security-policy": "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'; "
    "form-action 'self'; base-uri 'self'; object-src 'none'",
}


class Tries:
    """Counts wrong passwords by address. After the free ones each further one doubles the wait."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.failed: dict[str, tuple[int, float]] = {}

    def wait_s(self, address: str) -> int:
        """Seconds until a try from there is heard; 0: now."""
        until = max(self.failed.get(name, (0, 0.0))[1] for name in (address, "*"))
        return max(0, -int(-(until - self.clock()) // 1))

    def fail(self, address: str) -> None:
        if len(self.failed) > REMEMBERED:
            self.failed = {name: one for name, one in self.failed.items() if name == "*"}
        for name, free in ((address, FREE_TRIES), ("*", FREE_TRIES_OF_ALL)):
            count = self.failed.get(name, (0, 0.0))[0] + 1
            over = count - free
            wait = min(LONGEST_WAIT_S, 2.0 ** min(over, 20)) if over >= 0 else 0.0
            self.failed[name] = (count, self.clock() + wait)

    def succeed(self, address: str) -> None:
        self.failed.pop(address, None)
        self.failed.pop("*", None)


class Access:
    """ASGI application around the page's. secret: of this machine's user, so that logins outlive a restart."""

    def __init__(self, app: App, settings: Settings, secret: bytes, tries: Tries | None = None) -> None:
        self.app, self.settings = app, settings
        self.tries = tries or Tries()
        self.key = hmac.digest(secret, (settings.password or "").encode(), "sha256")
        self.cookie = f"wt_session_{settings.port}"  # cookies of one host are shared by its ports
        self.once = secrets.token_urlsafe(24) if settings.password is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        answer = self._refusal(scope, headers)
        if answer is None and self.settings.password is not None and not self._knows(headers):
            answer = (
                await self._login(scope, headers, receive)
                if scope["type"] == "http" and scope["path"] == "/login"
                else self._unknown(scope, headers)
            )
        if answer is None and scope["path"] in ("/login", "/logout"):
            answer = self._leave() if scope["path"] == "/logout" else _html(200, shell.entered("/"))
        if answer is not None:
            await _reply(scope, receive, send, *answer)
            return
        takes_files = scope["path"].startswith(("/zh/", "/en/")) or scope["path"] == "/api/data/upload"
        limit = UPLOAD if takes_files else SMALL_BODY
        if headers.get("content-length", "0").isdigit() and int(headers.get("content-length", "0")) > limit:
            await _reply(scope, receive, send, *_json(413, "too much at once"))
            return
        bound = _Bound(receive, _with_headers(send), limit)
        try:
            await self.app(scope, bound.receive, bound.send)
        except TooMuch:
            if not bound.begun:
                await _reply(scope, receive, send, *_json(413, "too much at once"))

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> Answer | None:
        """Requests that are nobody's: a wrong host, or another site's page acting through the user's browser."""
        host = headers.get("host", "")
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if self.settings.password is None and not is_loopback(name):
            return _json(400, "wrong host")
        if scope["type"] == "http" and scope["method"] in _SAFE:
            return None
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        if site is not None:
            return None if site in ("same-origin", "none") else _json(403, "asked by another site")
        if origin is None:
            return None
        try:
            ours = urlsplit(origin).netloc in (host, headers.get("x-forwarded-host"))
        except ValueError:
            ours = False
        return None if ours else _json(403, "asked by another site")

    # -- sessions --------------------------------------------------------------------------------------------------

    def session(self, now: float | None = None) -> str:
        """A cookie's value: when it ends, something random, and our seal over both."""
        body = f"{int((time.time() if now is None else now) + SESSION_S)}.{secrets.token_urlsafe(9)}"
        return f"{body}.{self._seal(body)}"

    def _seal(self, body: str) -> str:
        return hmac.new(self.key, body.encode(), hashlib.sha256).hexdigest()

    def _knows(self, headers: dict[str, str]) -> bool:
        value = cookies(headers).get(self.cookie, "")
        body, _, seal = value.rpartition(".")
        if not body or not hmac.compare_digest(seal.encode(), self._seal(body).encode()):
            return False
        return int(body.partition(".")[0]) > time.time()

    # -- the login -------------------------------------------------------------------------------------------------

    async def _login(self, scope: Scope, headers: dict[str, str], receive: Receive) -> Answer:
        language = shell.language_of(cookies(headers), headers.get("accept-language", ""))
        address = (scope.get("client") or ("?", 0))[0]
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        form: dict[str, list[str]] = {}
        if scope["method"] == "POST":
            form = parse_qs((await _body(receive, 1 << 14)).decode("utf-8", "replace"))
        target = _own_path((form.get("target") or query.get("target") or ["/"])[0])
        given = (form.get("password") or [""])[0]
        token = (query.get("once") or [""])[0]
        if not given and not token:
            return _html(401, shell.login(language, target=target))
        wait = self.tries.wait_s(address)
        if wait:
            status, page, more = _html(429, shell.login(language, wait_s=wait, target=target))
            return status, page, [*more, ("retry-after", str(wait))]
        assert self.settings.password is not None, "only a page with a password asks for one"
        right = hmac.compare_digest(given.encode(), self.settings.password.encode())
        if token and self.once is not None and hmac.compare_digest(token.encode(), self.once.encode()):
            right, self.once = True, None
        if not right:
            self.tries.fail(address)
            return _html(401, shell.login(language, wrong=True, target=target))
        self.tries.succeed(address)
        status, page, more = _html(200, shell.entered(target))
        secure = (
            "; Secure"
            if scope.get("scheme") == "https" or headers.get("x-forwarded-proto") == "https"
            else ""
        )
        cookie = (
            f"{self.cookie}={self.session()}; Path=/; Max-Age={SESSION_S}; HttpOnly; SameSite=Strict{secure}"
        )
        return status, page, [*more, ("set-cookie", cookie)]

    def _unknown(self, scope: Scope, headers: dict[str, str]) -> Answer:
        """The login page for a person, a bare 401 for a program; the status is 401 for both."""
        wants_page = (
            scope["type"] == "http" and scope["method"] == "GET" and "text/html" in headers.get("accept", "")
        )
        if not wants_page:
            return _json(401, "log in first")
        language = shell.language_of(cookies(headers), headers.get("accept-language", ""))
        return _html(401, shell.login(language, target=_own_path(scope["path"])))

    def _leave(self) -> Answer:
        status, page, more = _html(200, shell.entered("/"))
        return (
            status,
            page,
            [*more, ("set-cookie", f"{self.cookie}=; Path=/; Max-Age=0; HttpOnly; SameSite=Strict")],
        )

    def link(self, address: str) -> str:
        """The page's address with the word that logs in once."""
        return f"{address}/login?once={quote(self.once)}" if self.once else address


Answer = tuple[int, bytes, list[tuple[str, str]]]


def cookies(headers: dict[str, str]) -> dict[str, str]:
    """Name -> value, of lower-case request headers; empty for a header that is no cookie."""
    try:
        return {name: morsel.value for name, morsel in SimpleCookie(headers.get("cookie", "")).items()}
    except CookieError:
        return {}


def _own_path(target: str) -> str:
    """Where to go after the login: a path of this page, never another site."""
    # Browsers drop tabs and newlines of an address, so that "/<tab>/evil.example" would be another site.
    plain = "\\" not in target and not any(ord(char) <= 32 or ord(char) == 127 for char in target)
    ours = target.startswith("/") and not target.startswith(("//", "/login", "/logout"))
    return target if plain and ours else "/"


def _json(status: int, text: str) -> Answer:
    return status, json.dumps({"error": text}).encode(), [("content-type", "application/json")]


def _html(status: int, page: str) -> Answer:
    return (
        status,
        page.encode(),
        [("content-type", "text/html; charset=utf-8"), ("cache-control", "no-store")],
    )


async def _body(receive: Receive, most: int) -> bytes:
    found = b""
    while True:
        message = await receive()
        found += message.get("body", b"")
        if not message.get("more_body") or len(found) > most:
            return found[:most]


async def _reply(
    scope: Scope, receive: Receive, send: Send, status: int, body: bytes, headers: Iterable[tuple[str, str]]
) -> None:
    kind = "http.response"
    if scope["type"] == "websocket":
        await receive()
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008})
            return
        kind = "websocket.http.response"
    listed = [*headers, *_HEADERS.items(), ("content-length", str(len(body)))]
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in listed]
    await send({"type": f"{kind}.start", "status": status, "headers": raw})
    await send({"type": f"{kind}.body", "body": b"" if scope.get("method") == "HEAD" else body})


class TooMuch(Exception):
    """A body beyond its bound that did not announce its length."""


class _Bound:
    """Counts a body's bytes. Whatever the application answers after too many of them is told as 413."""

    def __init__(self, receive: Receive, send: Send, limit: int) -> None:
        self._receive, self._send, self._left = receive, send, limit
        self.begun = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise TooMuch
        return message

    async def send(self, message: Message) -> None:
        if self._left < 0 and not self.begun and message["type"] == "http.response.start":
            message = {**message, "status": 413}
        self.begun = True
        await self._send(message)


def _with_headers(send: Send) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            given = {name.lower() for name, _ in message.get("headers", [])}
            more = [(k.encode(), v.encode()) for k, v in _HEADERS.items() if k.encode() not in given]
            message = {**message, "headers": [*message.get("headers", []), *more]}
        await send(message)

    return wrapped
