"""GLM-Image's tab in a real browser: its own options, both tasks, a training from nothing, and what its result says."""

from __future__ import annotations

import re
from typing import Any

import pytest
from page_server import Server
from playwright.sync_api import Locator, Page, expect

from whitetuner.config.load import load_config

pytestmark = [pytest.mark.browser, pytest.mark.slow]
TAB = "glm-image-t2i"
LONG_MS = 180_000


def opened(server: Server, page: Page, language: str) -> Locator:
    server.ready()
    page.goto(f"{server.url}/{language}/#tab={TAB}")
    form = page.locator(f"#form-{TAB}")
    expect(form.locator(".wt-basic input").first).to_be_visible()
    return form


def shown(form: Locator, key: str) -> Locator:
    """An option within its section, which is opened for it: drawn anew, sections are closed."""
    field = form.locator(f'[data-key="{key}"]')
    expect(field).to_be_attached()
    if not field.is_visible():
        field.locator("xpath=ancestor::details[1]/summary").click()
    return field


@pytest.mark.parametrize(
    ("language", "task", "own"),
    [("en", "edit", "language model made of the caption"), ("zh", "编辑", "语言模型")],
)
def test_its_options_and_both_tasks_are_told_in_both_languages(
    server: Server, watched: Any, language: str, task: str, own: str
) -> None:
    page = watched().page
    form = opened(server, page, language)
    form.locator("[data-tier=expert]").click()
    share = shown(form, "model.options.generated_prior")
    expect(share).to_contain_text(own)
    share.locator("input").fill("1.5")
    expect(share.locator(".wt-error")).to_be_visible()
    share.locator("input").fill("0.3")
    expect(share.locator(".wt-error")).to_have_count(0)
    expect(form.locator(".wt-tasks")).to_contain_text(task)
    form.locator('.wt-tasks input[value="edit"]').check()
    expect(form.locator('.wt-basic [data-key="data.conditions"]')).to_be_visible()
    expect(shown(form, "model.options.reference_gradients")).to_be_visible()


def test_an_edit_is_trained_from_nothing_and_its_result_is_not_for_comfyui(
    server: Server, watched: Any
) -> None:
    page = watched("zh-CN").page
    form = opened(server, page, "zh")
    form.locator("[data-tier=basic]").click()
    form.locator('.wt-tasks input[value="edit"]').check()
    expect(form.locator('.wt-basic [data-key="data.conditions"]')).to_be_visible()
    for key, label in (("data.target", "生成示例数据"), ("model.path", "生成微型模型")):
        form.locator(f'[data-key="{key}"]').get_by_text(label).click()
        expect(form.locator(f'[data-key="{key}"] input').first).to_have_value(
            re.compile("glm|edit"), timeout=LONG_MS
        )
    form.locator('[data-key="run.steps"] input').fill("3")
    form.locator('[data-key="run.name"] input').fill("plan")
    expect(form.locator(".wt-problems")).not_to_contain_text("修改")
    page.locator("wt-train [data-wish=start] >> visible=true").click()
    view = page.locator("wt-train wt-run >> visible=true")
    expect(view.locator(".wr-head")).to_contain_text("已完成", timeout=LONG_MS)
    config = load_config(server.folder / "output" / "plan" / "config.toml").config
    assert (config.model.family, config.model.task) == ("glm-image", "edit") and config.run.steps == 3
    page.locator("#tab-results-button").click()
    page.locator("wt-runs >> visible=true").get_by_text("plan", exact=True).click()
    result = page.locator("wt-runs wt-result >> visible=true")
    expect(result).to_contain_text("ComfyUI 尚不能加载该模型")
    expect(result.locator("[data-wish=comfyui]")).to_be_hidden()
    expect(result).to_contain_text("final/plan.safetensors")
