"""A fork in a real browser: the curve and the previews of the run it began from are beside its own."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from page_server import Server
from playwright.sync_api import expect

from whitetuner.runs import jobs
from whitetuner.runs.folder import RunFolder

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_a_forks_origin_is_overlaid(server: Server, watched: Any) -> None:
    runs = [server.folder / "output" / name for name in ("stem", "branch")]
    for run in runs:
        assert server.fake(run.name, 60, 0.005).wait(60) == 0
    branch = RunFolder(runs[1])
    origin = {"run": "../stem", "step": 2, "run_id": RunFolder(runs[0]).document()["run_id"]}
    branch.run_file.write_text(json.dumps({**branch.document(), "forked_from": origin}), encoding="utf-8")
    server.ready()
    page = watched("en-US").page
    page.goto(f"{server.url}/en/#tab=runs&run={jobs.id_of(runs[1].resolve())}")
    view = page.locator("wt-runs wt-run").first
    expect(view.locator("wt-chart")).to_have_attribute("data-origin", re.compile("[1-9]"))
    expect(view.locator("wt-chart")).to_contain_text("stem (forked at step 2)")
    heads = view.locator(".wr-grid thead th")
    expect(heads.nth(1)).to_contain_text("stem, step")
    expect(heads.last).to_have_text(re.compile(r"^step \d+"))
    assert heads.filter(has_text="stem").count() * 2 == heads.count() - 1
    view.locator(".wr-thumb").last.click()
    pictures = page.locator("dialog.wr-compare img")
    for number in (0, 1):
        assert pictures.nth(number).evaluate("image => image.decode().then(() => image.naturalWidth)") == 64
    left, right = (pictures.nth(number).get_attribute("src") for number in (0, 1))
    assert left is not None and left.endswith("?origin") and right is not None and "?" not in right
