"""The login as a person meets it, on an address that others can reach."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from page_server import Server
from playwright.sync_api import expect

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_a_page_that_others_reach_asks_for_the_password_that_its_link_carries(
    tmp_path: Path, watched: Any
) -> None:
    one = Server(tmp_path, "--listen=0.0.0.0")
    try:
        assert one.link.startswith(f"{one.url}/login?once=")
        for path in (
            "/",
            "/zh/",
            "/en/config",
            "/api/runs",
            "/api/ready",
            "/tb/",
            "/static/run.js",
            "/en/gradio_api/info",
        ):
            assert httpx.get(one.url + path, trust_env=False).status_code == 401
            assert (
                httpx.get(one.url + path, trust_env=False, headers={"host": "box.example"}).status_code == 401
            )
        owner = watched("zh-CN")
        by_link = owner.page
        by_link.goto(one.link)
        by_link.locator("#tabs [role=tab]").first.wait_for()
        assert by_link.url.rstrip("/") == f"{one.url}/zh"
        by_link.goto(f"{one.url}/logout")
        expect(by_link.get_by_label("密码")).to_be_visible()
        stranger = watched("en-US")
        stranger.page.goto(one.link)  # it worked once
        password = re.search(r"the password: (\S+)", one.said)
        assert password is not None
        field = stranger.page.get_by_label("Password")
        field.fill("wrong password")
        field.press("Enter")
        expect(stranger.page.get_by_role("alert")).to_contain_text("not the password")
        field.fill(password[1])
        field.press("Enter")
        stranger.page.locator("#tabs [role=tab]").first.wait_for()
        for page in (owner, stranger):  # the login page has that status
            page.errors[:] = [error for error in page.errors if "401" not in error]
    finally:
        one.close()
