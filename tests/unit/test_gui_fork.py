"""A fork on the page: the curve and the previews of the run that it began from, beside its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from gui_page import client, made, place, preview, step
from PIL import Image

from whitetuner.runs.folder import RunFolder
from whitetuner.runs.jobs import Job

__all__ = ["place"]  # the fixture


def forked(place: Path) -> tuple[Job, Job]:
    """(a run with two previews, its fork at step 2 with one)."""
    runs = [place / "output" / name for name in ("cat", "cat-fork-2")]
    for run, shade in zip(runs, (50, 200)):
        (run / "samples").mkdir(parents=True)
        for number in (0, 2, 4):
            Image.new("RGB", (64, 64), (shade, number, 0)).save(run / "samples" / f"{number}.png")
    first = made(
        runs[0],
        *(step(number, 0.5) for number in range(1, 4)),
        *(preview(runs[0], number, f"samples/{number}.png") for number in (0, 2)),
    )
    second = made(runs[1], step(3, 0.4), step(4, 0.4), preview(runs[1], 4, "samples/4.png"))
    folder = RunFolder(runs[1])
    origin = {"run": "../cat", "step": 2, "run_id": RunFolder(runs[0]).document()["run_id"]}
    folder.run_file.write_text(json.dumps({**folder.document(), "forked_from": origin}), encoding="utf-8")
    return first, second


def test_a_fork_shows_the_curve_and_the_previews_of_where_it_began(place: Path) -> None:
    first, second = forked(place)
    page, address = client(), f"/api/runs/{second.id}"
    curve = page.get(f"{address}/curve").json()
    assert curve["step"] == [3, 4]
    assert curve["origin"] == {"name": "cat", "at": 2, "step": [1, 2, 3], "smooth": [0.5, 0.5, 0.5]}
    shown = page.get(address).json()
    assert [one["step"] for one in shown["previews"]] == [4]
    assert (shown["origin"]["name"], shown["origin"]["at"]) == ("cat", 2)
    assert [one["step"] for one in shown["origin"]["previews"]] == [0, 2]
    theirs = page.get(f"{address}/preview/2/0?origin")
    assert theirs.content == (Path(first.run) / "samples" / "2.png").read_bytes()
    assert page.get(f"{address}/preview/4/0").content == (Path(second.run) / "samples" / "4.png").read_bytes()
    assert page.get(f"{address}/preview/2/0").status_code == 404
    assert page.get(f"{address}/preview/4/0?origin").status_code == 404


def test_others_show_none_and_ask_for_none(place: Path) -> None:
    first, second = forked(place)
    page = client()
    assert page.get(f"/api/runs/{first.id}").json()["origin"] is None
    assert page.get(f"/api/runs/{first.id}/curve").json()["origin"] is None
    assert page.get(f"/api/runs/{first.id}/preview/2/0?origin").status_code == 404
    shutil.rmtree(first.run)
    assert page.get(f"/api/runs/{second.id}").json()["origin"] is None


def test_a_confined_page_tells_nothing_of_an_origin_outside(place: Path) -> None:
    second = forked(place)[1]
    page = client(server=True, roots=[second.run], password="long enough")
    page.post("/login", data={"password": "long enough"})
    assert page.get(f"/api/runs/{second.id}").json()["origin"] is None
    assert page.get(f"/api/runs/{second.id}/preview/2/0?origin").status_code == 404
