"""Real trainings of the embedded model through the page: from the form, killed, resumed, stopped, to the end."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from page_server import Server
from playwright.sync_api import Page, expect

from whitetuner.runs import jobs

pytestmark = pytest.mark.browser
LONG_MS = 120_000  # PyTorch takes its time to load on a busy machine


def fill(page: Page, key: str, value: str) -> None:
    field = page.locator(f'#form-flux2-klein-t2i [data-key="{key}"] input').first
    field.fill(value)
    field.blur()


def started(server: Server, page: Page, name: str, steps: int) -> Any:
    """Fills the form of the FLUX.2 Klein T2I tab for the embedded model and starts; the run's view."""
    assert server.run_cli("testdata", "t2i", "pictures", "--count", "8").returncode == 0
    page.goto(f"{server.url}/en/#tab=flux2-klein-t2i")
    form = page.locator("#form-flux2-klein-t2i")
    form.locator("select.wt-preset option", has_text="embedded").first.wait_for(state="attached")
    chosen = form.locator("select.wt-preset option", has_text="embedded").first.get_attribute("value")
    form.locator("select.wt-preset").select_option(chosen)
    expect(form.locator('[data-key="model.path"] input').first).to_have_value("builtin:nano")
    fill(page, "data.images", str(server.folder / "pictures"))
    fill(page, "run.name", name)
    fill(page, "run.steps", str(steps))
    page.locator("wt-train [data-wish=start] >> visible=true").click()
    return page.locator("wt-train wt-run >> visible=true")


@pytest.mark.slow
def test_from_the_form_to_a_killed_a_resumed_and_a_stopped_run(server: Server, watched: Any) -> None:
    server.ready()
    page = watched().page
    name = 'it\'s --set "x" $(touch bad) 猫'.replace('"', "'")
    view = started(server, page, name, 5000)
    step = view.locator("[data-tile=step] b")
    expect(step).to_have_text(re.compile(r"[1-9]\d*/5000"), timeout=LONG_MS)
    page.reload()
    expect(step).to_have_text(re.compile(r"[1-9]\d*/5000"))
    expect(view.locator(".wr-head")).to_contain_text("running")
    view.locator("[data-wish=save]").click()
    expect(view.locator(".wr-log")).to_contain_text("saved checkpoints/checkpoint-", timeout=LONG_MS)

    run = server.folder / "output" / name
    pid = int((run / "control" / "pid").read_text(encoding="utf-8"))
    words = psutil.Process(pid).cmdline()
    assert words[1:6] == ["-X", "utf8", "-m", "whitetuner", "train"] and not (server.folder / "bad").exists()
    os.kill(pid, signal.SIGKILL)
    expect(view.locator(".wr-head")).to_contain_text("crashed")
    expect(view.locator(".wr-why")).to_contain_text("signal 9")
    view.locator("[data-wish=resume]").click()
    expect(view.locator(".wr-log")).to_contain_text("goes on from step", timeout=LONG_MS)
    expect(view.locator(".wr-head")).to_contain_text("running")
    expect(view.locator("[data-wish=save]")).to_be_visible(timeout=LONG_MS)
    page.locator("wt-train [data-wish=stop] >> visible=true").click()
    expect(view.locator(".wr-head")).to_contain_text("stopped and saved", timeout=LONG_MS)
    listed = server.run_cli("jobs").stdout
    assert "stopped" in listed and name in listed

    page.locator(
        "wt-train [data-wish=start] >> visible=true"
    ).click()  # into the same folder: asked, not overwritten
    choice = page.locator("wt-train [data-part=exists] >> visible=true")
    expect(choice).to_contain_text("stopped and saved")
    expect(choice.locator("[data-existing=other]")).to_contain_text(f"{name}-2")


@pytest.mark.slow
def test_try_it_now_runs_to_its_end_and_its_result_goes_to_comfyui(tmp_path: Path, watched: Any) -> None:
    one = Server(tmp_path)
    try:
        one.ready()
        page = watched("zh-CN").page
        page.goto(f"{one.url}/zh/")
        page.locator("wt-home [data-wish=try]").click()
        view = page.locator("wt-runs wt-run >> visible=true")
        expect(view.locator(".wr-thumb").first).to_be_visible(timeout=LONG_MS)
        expect(view.locator(".wr-head")).to_contain_text("已完成", timeout=8 * LONG_MS)
        expect(view.locator(".wr-grid thead th")).to_have_count(
            14
        )  # a corner, the start, every 25 of 300 steps
        page.locator("#tab-results-button").click()
        result = page.locator("wt-runs wt-result >> visible=true")
        expect(result.locator(".wr-thumb").first).to_be_visible()
        counted = re.compile(r"final/try-1\.safetensors.* ([1-9]\d*) 个键中 \1 个为 ComfyUI 所知")
        expect(result.locator("li").filter(has_text="final/try-1.safetensors")).to_have_text(counted)
        (tmp_path / "ComfyUI" / "models" / "loras").mkdir(parents=True)
        result.locator("input[type=text]").fill(str(tmp_path / "ComfyUI"))
        result.locator("[data-wish=comfyui]").click()
        expect(result.locator(".wr-alert")).to_contain_text("try-1.safetensors")
        assert (tmp_path / "ComfyUI/models/loras/try-1.safetensors").is_file()
        result.locator("[data-wish=strengths]").click()
        expect(result.locator(".wr-strengths img")).to_have_count(6, timeout=2 * LONG_MS)
        ident = jobs.id_of((tmp_path / "output" / "try-1").resolve())
        report = one.get(f"/api/runs/{ident}/report")
        assert report.status_code == 200 and "default-src 'none'" in report.headers["content-security-policy"]
        file = one.get(f"/api/runs/{ident}/final/0")
        assert file.headers["content-disposition"].startswith("attachment")
    finally:
        one.close()


@pytest.mark.slow
def test_tensorboard_shows_a_curve_in_its_tab_and_at_its_own_port(server: Server, watched: Any) -> None:
    from whitetuner.runs import events
    from whitetuner.runs.board import Board

    child = server.fake("curves", 3, 0.0)
    child.wait(20)
    board = Board(server.folder / "output" / "curves" / "tensorboard", 3)
    for step in range(1, 30):
        board(events.StepDone(step=step, loss=1 / step, lr=1e-4, grad_norm=1.0, seconds=1.0, samples=1))
    board.close()
    server.ready()
    page = watched().page
    page.goto(f"{server.url}/en/#tab=tensorboard")
    inside = page.frame_locator("wt-board iframe")
    inside.get_by_role("combobox", name="Filter tags (regex)").fill(
        "train/loss"
    )  # with many curves only the first are drawn
    expect(inside.get_by_text("train/loss").first).to_be_visible(timeout=LONG_MS)
    expect(inside.locator("line-chart").first).to_be_visible(timeout=LONG_MS)
    own = page.locator("wt-board small").inner_text()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", own)
    page.goto(own)
    page.get_by_role("combobox", name="Filter tags (regex)").fill("train/loss")
    expect(page.get_by_text("train/loss").first).to_be_visible(timeout=LONG_MS)
