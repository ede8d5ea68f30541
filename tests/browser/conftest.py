"""A real Chromium against a real server: a request to another host or an error in the console fails the test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from page_server import Server, Watched
from playwright.sync_api import Browser, BrowserContext, expect, sync_playwright

expect.set_options(timeout=30_000)  # a busy machine is no defect of the page
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--no-zygote",  # fewer processes
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
]


@pytest.fixture(scope="module")  # gone before the other tests, whose time they would take
def browser() -> Iterator[Browser]:
    program = next(
        (
            found
            for name in ("chromium", "chromium-browser", "google-chrome")
            if (found := shutil.which(name))
        ),
        None,
    )
    assert program is not None, "needs Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield found
        found.close()


@pytest.fixture
def watched(browser: Browser) -> Iterator[Any]:
    """A function that opens pages: (language, width, height) -> Watched. All are held to their manners at the end."""
    contexts: list[BrowserContext] = []
    pages: list[Watched] = []

    def opened(language: str = "en-US", width: int = 1400, height: int = 1000, **more: Any) -> Watched:
        context = browser.new_context(locale=language, viewport={"width": width, "height": height}, **more)
        contexts.append(context)
        pages.append(Watched(context))
        return pages[-1]

    yield opened
    found = [(one.outside, one.errors) for one in pages]
    for context in contexts:
        context.close()
    assert found == [([], []) for _ in found]


@pytest.fixture(scope="module")  # gone before the other tests, whose time they would take
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    one = Server(tmp_path_factory.mktemp("page"))
    yield one
    one.close()
