"""docs/img/form_*.png and data_*.png: `python tests/browser/screenshots_forms.py` opens the forms and the data page and looks."""

from __future__ import annotations

import tempfile
from pathlib import Path

from page_server import Server
from PIL import Image
from playwright.sync_api import Page, sync_playwright
from screenshots import FLAGS, IMAGES, LANGUAGES, opened

TAB = "flux2-klein-t2i"


def faulty(folder: Path) -> None:
    """Some pictures with the usual faults among the sample data."""
    Image.effect_noise((48, 40), 60).convert("RGB").save(folder / "small.png")
    Image.effect_noise((1500, 300), 60).convert("RGB").save(folder / "wide.png")
    (folder / "wide.txt").write_text("a very wide picture", encoding="utf-8")
    whole = next(iter(sorted(folder.glob("*.jpg"))))
    (folder / "broken.jpg").write_bytes(whole.read_bytes()[:3000])
    (folder / "broken.txt").write_text("cut off", encoding="utf-8")
    (folder / "twin.jpg").write_bytes(whole.read_bytes())
    (folder / "twin.txt").write_text("the same once more", encoding="utf-8")


def take(page: Page, name: str, whole: bool = True) -> None:
    page.wait_for_timeout(1200)
    page.screenshot(path=IMAGES / f"{name}.png", full_page=whole)
    print(f"docs/img/{name}.png")


def main(folder: Path) -> None:
    server = Server(folder)
    try:
        server.ready()
        server.run_cli("testdata", "t2i", "pictures", "--count", "9")
        server.run_cli("testdata", "edit", "edits", "--count", "6")
        server.run_cli("testdata", "t2i", "mixed", "--count", "9")
        faulty(folder / "mixed")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
            for language in LANGUAGES:
                page = opened(browser, language)
                page.goto(f"{server.url}/{language}/#tab={TAB}")
                form = page.locator(f"#form-{TAB}")
                form.locator(".wt-basic input").first.wait_for()
                form.locator(".wt-buttons button").nth(3).click()
                form.locator('[data-key="data.images"] input').fill("pictures")
                form.locator('[data-key="data.trigger"] input').fill("sks")
                form.locator('[data-key="optimizer.lr"] input').fill("1e4")
                form.locator('[data-key="run.steps"] input').fill("2k")
                form.locator(".wt-error").first.wait_for()
                take(page, f"form_errors_{language}")
                form.locator('[data-key="optimizer.lr"] input').fill("2e-4")
                form.locator('[data-key="run.steps"] input').fill("2000")
                form.locator(".wt-error").first.wait_for(state="detached")
                form.locator(".wt-plan > summary").click()
                form.locator(".wt-choice").first.wait_for(timeout=180_000)
                form.locator(".wt-sizes button").nth(3).click()
                page.wait_for_timeout(300)
                form.locator(".wt-plans:not(.wt-stale) .wt-choice").first.wait_for(timeout=180_000)
                page.locator(".wt-toast").first.wait_for(state="detached", timeout=30_000)
                take(page, f"form_plan_{language}")
                form.locator(".wt-plan > summary").click()
                form.locator("[data-tier=expert]").click()
                take(page, f"form_expert_{language}")
                form.locator("[data-tier=basic]").click()
                page.goto(f"{server.url}/{language}/#tab=data")
                for name in ("mixed", "edits"):
                    page.locator("#data-folder").fill(name)
                    page.locator("#data-resolution").fill("512")
                    page.locator(".wt-data .wt-main").first.click()
                    page.locator(f'.wt-item[data-n="{7 if name == "mixed" else 5}"] img').first.wait_for()
                    take(page, f"data_{name}_{language}", whole=name == "mixed")
                page.context.close()
            page = opened(browser, "zh", 390, 844, dark=True)
            page.goto(f"{server.url}/zh/#tab={TAB}")
            page.locator(f"#form-{TAB} .wt-basic input").first.wait_for()
            take(page, "form_phone_dark_zh")
            browser.close()
    finally:
        server.kill()


if __name__ == "__main__":
    IMAGES.mkdir(parents=True, exist_ok=True)
    main(Path(tempfile.mkdtemp(prefix="whitetuner-forms-")))
