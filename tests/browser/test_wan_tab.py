"""The WAN tab in a real browser: the frames that will be learned, variant and expert, previews that play; in both languages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import av
import pytest
from page_server import Server
from PIL import Image
from playwright.sync_api import Locator, expect
from test_forms import draft, field, open_form, start_over
from test_run_page import wait_for_run

from whitetuner.runs.film import write_film

pytestmark = [pytest.mark.browser, pytest.mark.slow]
TAB = "wan-i2v"
SAID = {
    "en": (
        "2 videos, 1 can be used: 1 clips are learned",
        "Clip 1: frames 0, 1, 3, 4, ... 6 (5 of them)",
        "too short",
    ),
    "zh": ("2 个视频，1 个可用：共学习 1 个片段", "片段 1：帧 0, 1, 3, 4, ... 6", "太短"),
}


@pytest.fixture(scope="module")
def clips(server: Server) -> Path:
    """A clip of 24 frames a second and one of three frames."""
    folder = server.folder / "clips"
    folder.mkdir()
    for name, rate, count in (("fast", 24, 40), ("short", 16, 3)):
        with av.open(str(folder / f"{name}.mp4"), "w") as container:
            track = container.add_stream("libx264", rate=rate)
            track.width, track.height, track.pix_fmt = 128, 64, "yuv420p"
            for number in range(count):
                picture = Image.new("RGB", (128, 64), (6 * number, 90, 200 - 4 * number))
                container.mux(track.encode(av.VideoFrame.from_image(picture)))
            container.mux(track.encode(None))
        (folder / f"{name}.txt").write_text(f"a {name} clip", encoding="utf-8")
    return folder


def choose(form: Locator, key: str, value: str) -> None:
    field(form, key).locator("select").select_option(value)


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_clips_that_are_learned_are_seen_and_an_expert_is_chosen(
    server: Server, watched: Any, clips: Path, language: str
) -> None:
    form = open_form(server, watched().page, language, TAB)
    start_over(form)
    card = form.locator(".wt-clips")
    card.locator("summary").click()
    expect(card).to_contain_text({"en": "Choose the video folder", "zh": "先选择视频文件夹"}[language])
    field(form, "data.videos").locator("input").fill(str(clips))
    field(form, "data.num_frames").locator("textarea, input").fill("5")
    form.locator("[data-tier=advanced]").click()
    summary, told, short = SAID[language]
    expect(card).to_contain_text(summary)
    expect(card.locator(".wt-film")).to_have_count(2)
    expect(card.locator("figcaption")).to_contain_text(told)
    expect(card).to_contain_text(short)
    sheet = card.locator(".wt-film img")
    expect(sheet).to_have_count(1)
    sheet.scroll_into_view_if_needed()
    sheet.evaluate("one => one.decode()")
    assert sheet.evaluate("one => one.naturalWidth") > 400, "five frames side by side"
    choose(form, "model.options.variant", "i2v-2.2")
    choose(form, "model.options.expert", "low")
    both = {"en": "both", "zh": "两个都训练"}[language]
    expect(field(form, "model.options.expert")).to_contain_text(both)
    expect(form.locator(".wt-toml")).to_have_value(re.compile('expert = "low"'))
    text = draft(server, TAB).read_text(encoding="utf-8")
    assert 'variant = "i2v-2.2"' in text and 'expert = "low"' in text and "num_frames = 5" in text


def test_clips_of_a_run_play(server: Server, watched: Any) -> None:
    server.fake("film", 10, 0.01).wait(60)
    run = wait_for_run(server, "film", "finished")
    samples = server.folder / "output" / "film" / "samples"
    for number, step in enumerate(("step-000000", "step-000010")):
        frames = [Image.new("RGB", (64, 64), (8 * at, 60 + 90 * number, 120)) for at in range(24)]
        write_film(frames, samples / step / "00.mp4", 12)
    page = watched(width=1400).page
    page.goto(f"{server.url}/en/#tab=runs&run={run}")
    view = page.locator("wt-runs wt-run").first
    expect(view.locator(".wr-thumb video")).to_have_count(2)
    expect(view.locator(".wr-thumb img")).to_have_count(2)  # the second prompt has no film
    clip = view.locator(".wr-thumb video").last
    clip.scroll_into_view_if_needed()
    page.wait_for_function("one => one.currentTime > 0.1 && !one.paused", arg=clip.element_handle())
    clip.click()
    pair = page.locator(".wr-compare video")
    expect(pair).to_have_count(2)
    for one in pair.all():
        page.wait_for_function("one => one.currentTime > 0.1", arg=one.element_handle())
    assert [one.evaluate("one => one.videoHeight") for one in pair.all()] == [64, 64]
