"""docs/img/page_*.png: `python tests/browser/screenshots.py [--folder DIR]` opens the page, trains the embedded model and looks.

--folder: where it works; one that was used before is taken up, so that the training need not run again.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from page_server import Server
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from whitetuner.runs import jobs

IMAGES = Path(__file__).parents[2] / "docs" / "img"
LANGUAGES = {"zh": "zh-CN", "en": "en-US"}
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def tried(server: Server) -> str:
    """The id of a finished trial run, made now unless there is one."""
    ident = jobs.id_of((server.folder / "output" / "try-1").resolve())
    if server.get(f"/api/runs/{ident}").status_code != 200:
        server.post("/api/try")
    while (state := server.get(f"/api/runs/{ident}").json()["state"]) in ("waiting", "starting", "running"):
        time.sleep(2)
    assert state == "finished", state
    return ident


def opened(browser: Browser, language: str, width: int = 1360, height: int = 900, dark: bool = False) -> Page:
    context = browser.new_context(
        locale=LANGUAGES[language],
        viewport={"width": width, "height": height},
        color_scheme="dark" if dark else "light",
    )
    return context.new_page()


def go(page: Page, address: str) -> None:
    page.goto("about:blank")  # else only what is behind the # changes, and messages of the page before stay
    page.goto(address)


def take(page: Page, name: str, whole: bool = False) -> None:
    page.wait_for_timeout(1500)
    path = IMAGES / f"page_{name}.png"
    page.screenshot(path=path, full_page=whole)
    with Image.open(path) as image:  # a third of the bytes
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    print(f"docs/img/page_{name}.png")


def main(folder: Path) -> None:
    server = Server(folder)
    try:
        server.ready()
        server.run_cli("testdata", "t2i", "pictures", "--count", "12")
        ident = tried(server)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
            for language in LANGUAGES:
                page = opened(browser, language)
                go(page, f"{server.url}/{language}/#tab=home")
                page.locator("wt-home .wr-card").first.wait_for()
                take(page, f"home_{language}")
                go(page, f"{server.url}/{language}/#tab=flux2-klein-t2i")
                form = page.locator("#form-flux2-klein-t2i")
                form.locator("select.wt-preset option", has_text="embedded").first.wait_for(state="attached")
                chosen = form.locator("select.wt-preset option", has_text="embedded").first.get_attribute(
                    "value"
                )
                form.locator("select.wt-preset").select_option(chosen)
                images = form.locator('[data-key="data.images"] input').first
                images.fill("pictures")
                images.blur()
                page.locator("wt-train wt-run wt-chart[data-points] >> visible=true").wait_for()
                take(page, f"train_{language}")
                go(page, f"{server.url}/{language}/#tab=runs&run={ident}")
                page.locator("wt-runs wt-run .wr-thumb >> visible=true").first.wait_for()
                take(page, f"run_{language}", whole=True)
                page.locator("wt-runs wt-run .wr-thumb >> visible=true").nth(4).click()
                page.locator("dialog.wr-compare img").first.wait_for()
                take(page, f"compare_{language}")
                go(page, f"{server.url}/{language}/#tab=results&run={ident}")
                page.locator("wt-runs wt-result .wr-thumb >> visible=true").first.wait_for()
                take(page, f"results_{language}")
                page.context.close()
            page = opened(browser, "en")
            go(page, f"{server.url}/en/#tab=tensorboard")
            page.frame_locator("wt-board iframe").locator("line-chart").first.wait_for(timeout=120_000)
            take(page, "tensorboard")
            page = opened(browser, "zh", 390, 844, dark=True)
            go(page, f"{server.url}/zh/#tab=runs&run={ident}")
            page.locator("wt-runs wt-run .wr-thumb >> visible=true").first.wait_for()
            page.locator("wt-runs wt-run >> visible=true").scroll_into_view_if_needed()
            take(page, "phone_dark_zh")
            browser.close()
    finally:
        server.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    IMAGES.mkdir(parents=True, exist_ok=True)
    main(given.folder or Path(tempfile.mkdtemp(prefix="whitetuner-page-")))
