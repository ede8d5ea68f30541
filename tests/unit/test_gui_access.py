"""One login in front of every route; foreign hosts and foreign pages are refused; attempts and bodies are bounded."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocket

from whitetuner.errors import UserError
from whitetuner.gui import shell
from whitetuner.gui.access import FREE_TRIES, SMALL_BODY, Access, Tries
from whitetuner.gui.settings import Settings, is_loopback, password_for

PASSWORD = "correct horse"
ROUTES = [
    "/",
    "/zh/",
    "/en/gradio_api/queue/join",
    "/api/runs",
    "/tb/",
    "/static/run.js",
    "/api/runs/x/preview/0/0",
    "/nowhere",
]
BROWSER = {"accept": "text/html,*/*", "accept-language": "zh-CN,zh;q=0.9"}


async def hello(request: Request) -> PlainTextResponse:
    return PlainTextResponse(f"secret {len(await request.body())}")


async def talk(socket: WebSocket) -> None:
    await socket.accept()
    await socket.send_text("secret")
    await socket.close()


def client(
    password: str | None = PASSWORD, tries: Tries | None = None, base: str = "http://box:7860"
) -> TestClient:
    app = Starlette(
        routes=[
            WebSocketRoute("/ws", talk),
            Route("/{path:path}", hello, methods=["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"]),
        ]
    )
    access = Access(app, Settings(password=password), b"k" * 32, tries)
    found = TestClient(access, base_url=base, follow_redirects=False)
    found.access = access  # type: ignore[attr-defined]
    return found


def log_in(one: TestClient, password: str = PASSWORD) -> int:
    return one.post("/login", data={"password": password}, headers=BROWSER).status_code


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"])
@pytest.mark.parametrize("path", ROUTES)
def test_every_route_is_401_without_the_password(path: str, method: str) -> None:
    answer = client().request(method, path)
    assert answer.status_code == 401 and "secret" not in answer.text


def test_a_browser_gets_the_login_page_in_its_language_with_the_same_status() -> None:
    answer = client().get("/zh/", headers=BROWSER)
    assert answer.status_code == 401 and "请输入密码" in answer.text and 'value="/zh/"' in answer.text
    assert "Please log in" in client().get("/", headers={**BROWSER, "accept-language": "fr"}).text


def test_websockets_are_401_too() -> None:
    with pytest.raises(WebSocketDenialResponse) as refused, client().websocket_connect("/ws"):
        pass
    assert refused.value.status_code == 401
    one = client()
    cookie = f"wt_session_7860={one.access.session()}"  # type: ignore[attr-defined]
    with one.websocket_connect("/ws", headers={"cookie": cookie}) as socket:
        assert socket.receive_text() == "secret"


def test_the_password_lets_in_and_the_cookie_is_out_of_scripts_reach() -> None:
    one = client()
    answer = one.post("/login", data={"password": PASSWORD, "target": "/zh/"}, headers=BROWSER)
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and "url=/zh/" in answer.text
    assert one.get("/api/runs").text == "secret 0"
    one.get("/logout")
    assert one.get("/api/runs").status_code == 401


@pytest.mark.parametrize(
    "target",
    [
        "//evil.example",
        "https://evil.example",
        "/\\evil.example",
        "javascript:alert(1)",
        "/\t/evil.example",
        "/\n/evil.example",
        "/\t\\evil.example",
    ],
)
def test_the_login_leads_to_no_other_site(target: str) -> None:
    answer = client().post("/login", data={"password": PASSWORD, "target": target}, headers=BROWSER)
    assert "url=/" in answer.text and "evil" not in answer.text and "alert" not in answer.text


def test_an_origin_that_is_no_address_is_another_site() -> None:
    answer = client().post("/login", data={"password": PASSWORD}, headers={"origin": "http://["})
    assert answer.status_code == 403


def test_the_login_page_escapes_where_it_came_from() -> None:
    answer = client().get('/"><script>alert(1)</script>', headers=BROWSER)
    assert "<script>" not in answer.text


def test_a_one_time_link_works_once() -> None:
    one = client()
    link = one.access.link("http://box:7860")  # type: ignore[attr-defined]
    path = link.removeprefix("http://box:7860")
    assert one.get(path, headers=BROWSER).status_code == 200 and one.get("/").text == "secret 0"
    one.cookies.clear()
    assert one.get(path, headers=BROWSER).status_code == 401 and one.get("/").status_code == 401


@pytest.mark.parametrize(
    "change",
    [lambda v: v[:-1] + ("0" if v[-1] != "0" else "1"), lambda v: "9" + v, lambda v: "..", lambda v: ""],
)
def test_a_changed_cookie_is_worth_nothing(change) -> None:  # type: ignore[no-untyped-def]
    one = client()
    one.cookies.set("wt_session_7860", change(one.access.session()))  # type: ignore[attr-defined]
    assert one.get("/").status_code == 401


def test_sessions_end_and_another_password_ends_them_all() -> None:
    one = client()
    one.cookies.set("wt_session_7860", one.access.session(now=time.time() - 31 * 24 * 3600))  # type: ignore[attr-defined]
    assert one.get("/").status_code == 401
    other = client("another password")
    other.cookies.set("wt_session_7860", one.access.session())  # type: ignore[attr-defined]
    assert other.get("/").status_code == 401


def test_a_login_outlives_a_restart() -> None:
    one, restarted = client(), client()
    restarted.cookies.set("wt_session_7860", one.access.session())  # type: ignore[attr-defined]
    assert restarted.get("/").status_code == 200


def test_attempts_are_limited_and_the_wait_doubles() -> None:
    now = [0.0]
    one = client(tries=Tries(lambda: now[0]))
    for _ in range(FREE_TRIES):
        assert log_in(one, "wrong wrong") == 401
    answer = one.post("/login", data={"password": PASSWORD}, headers=BROWSER)
    assert (
        answer.status_code == 429
        and int(answer.headers["retry-after"]) >= 1
        and "set-cookie" not in answer.headers
    )
    now[0] += 1.5
    assert log_in(one, "wrong again") == 401 and log_in(one) == 429
    now[0] += 1.5
    assert log_in(one) == 429
    now[0] += 1
    assert log_in(one) == 200


def test_many_addresses_do_not_make_many_attempts() -> None:
    tries = Tries(lambda: 0.0)
    for number in range(60):
        tries.fail(f"10.0.0.{number}")
    assert tries.wait_s("10.9.9.9") > 0


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "192.168.0.7", "", "[::1", "0.0.0.0"],
)
def test_without_a_password_only_names_of_this_machine_are_answered(host: str) -> None:
    answer = client(None, base="http://127.0.0.1:7860").get("/api/runs", headers={"host": host})
    assert answer.status_code == 400 and "secret" not in answer.text


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost", "LOCALHOST:1", "[::1]:7860", "127.8.8.8"])
def test_names_of_this_machine_are_answered(host: str) -> None:
    assert client(None, base="http://127.0.0.1:7860").get("/", headers={"host": host}).status_code == 200


def test_another_sites_page_cannot_act_through_the_users_browser() -> None:
    one = client(None, base="http://127.0.0.1:7860")
    for headers in (
        {"origin": "http://evil.example"}, {"origin": "null"}, {"origin": "http://127.0.0.1:9999"},
        {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"},
    ):  # fmt: skip
        assert one.post("/api/start", headers=headers).status_code == 403
    for headers in (
        {},
        {"origin": "http://127.0.0.1:7860"},
        {"sec-fetch-site": "same-origin", "origin": "https://proxied"},
    ):
        assert one.post("/api/start", headers=headers).status_code == 200
    with (
        pytest.raises(WebSocketDenialResponse),
        one.websocket_connect("/ws", headers={"origin": "http://evil.example"}),
    ):
        pass


def test_bodies_are_bounded_also_when_they_do_not_say_how_long_they_are() -> None:
    one = client(None, base="http://127.0.0.1:7860")
    assert one.post("/api/start", content=b"x" * (SMALL_BODY + 1)).status_code == 413
    parts = (b"x" * 65536 for _ in range(SMALL_BODY // 65536 + 2))
    assert one.post("/api/start", content=parts).status_code == 413
    assert (
        one.post("/zh/gradio_api/upload", content=b"x" * (SMALL_BODY + 1)).text == f"secret {SMALL_BODY + 1}"
    )


def test_the_browser_is_told_to_talk_to_nobody_else() -> None:
    headers = client(None, base="http://127.0.0.1:7860").get("/").headers
    assert (
        headers["content-security-policy"].startswith("default-src 'self'")
        and "http" not in headers["content-security-policy"]
    )
    assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "SAMEORIGIN"


def test_where_a_password_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WHITETUNER_PASSWORD", raising=False)
    assert password_for("127.0.0.1", None) == (None, False)
    made, made_up = password_for("0.0.0.0", None)
    assert made_up and made is not None and len(made) >= 16 and made != password_for("0.0.0.0", None)[0]
    file = tmp_path / "password"
    file.write_text(" pass word\r\n", encoding="utf-8")
    assert password_for("0.0.0.0", file) == (" pass word", False)
    monkeypatch.setenv("WHITETUNER_PASSWORD", "from the environment")
    assert password_for("127.0.0.1", None) == ("from the environment", False)
    for text in ("", "short"):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UserError):
            password_for("0.0.0.0", file)
    with pytest.raises(UserError):
        password_for("0.0.0.0", tmp_path / "missing")


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("box", False),
    ],
)
def test_what_is_this_machine_alone(host: str, local: bool) -> None:
    assert is_loopback(host) is local


@pytest.mark.parametrize(
    ("cookies", "accepted", "language"),
    [
        ({}, "zh-CN,zh;q=0.9,en;q=0.8", "zh"), ({}, "zh", "zh"), ({}, "zh-TW", "zh"),
        ({}, "en-US,zh;q=0.5", "en"), ({}, "fr,zh", "zh"),
        ({}, "", "en"), ({}, "zhx", "en"), ({"wt_lang": "en"}, "zh-CN", "en"), ({"wt_lang": "xx"}, "zh-CN", "zh"),
    ],
)  # fmt: skip
def test_the_language_is_the_cookies_then_the_browsers(
    cookies: dict[str, str], accepted: str, language: str
) -> None:
    assert shell.language_of(cookies, accepted) == language


def test_every_word_of_the_run_views_is_there_in_both_languages() -> None:
    static = Path(shell.__file__).with_name("static")
    words = json.loads((static / "run_words.json").read_text(encoding="utf-8"))
    assert all(len(both) == 2 and all(both) for both in words.values())
    holes = re.compile(r"\{\w+\}")
    assert [
        name for name, (zh, en) in words.items() if sorted(holes.findall(zh)) != sorted(holes.findall(en))
    ] == []
    used = set()
    for name in ("view.js", "run.js", "run_view.js", "board.js", "chart.js"):
        used |= set(re.findall(r'\bw\("(\w+)"', (static / name).read_text(encoding="utf-8")))
    assert used - set(words) == set()
    assert not any(re.search("[\u4e00-\u9fff]", en) for name, (_, en) in words.items() if name != "language")
