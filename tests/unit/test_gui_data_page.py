"""The data page over its routes: findings at their pictures, captions with a way back, files added, nothing lost."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.applications import Starlette
from starlette.testclient import TestClient

from whitetuner.data.scan import Films, SetOptions, scan
from whitetuner.data.video import frames_of
from whitetuner.data.video_clips import spans
from whitetuner.gui import data_page
from whitetuner.gui.pickers import Roots
from whitetuner.runs.film import contact_sheet


def picture(path: Path, size: tuple[int, int] = (128, 128), seed: int = 0) -> None:
    image = Image.effect_noise(size, 50 + seed).convert("RGB")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures with each of the usual faults, and two good ones."""
    data = tmp_path / "data"
    for index, name in enumerate(("a", "b", "nocap", "broken", "empty", "gbk")):
        picture(data / f"{name}.png", seed=index)
        (data / f"{name}.txt").write_text(f"the caption of {name}\n", encoding="utf-8")
    (data / "nocap.txt").unlink()
    (data / "broken.png").write_bytes((data / "broken.png").read_bytes()[:2000])
    (data / "empty.txt").write_text("", encoding="utf-8")
    (data / "gbk.txt").write_bytes("一只红色的猫在花园里".encode("gbk"))
    picture(data / "tiny.png", (20, 20))
    (data / "tiny.txt").write_text("tiny", encoding="utf-8")
    (data / "twin.png").write_bytes((data / "a.png").read_bytes())
    (data / "twin.txt").write_text("twin", encoding="utf-8")
    (data / "long.txt").write_text("word " * 600, encoding="utf-8")
    picture(data / "long.png", seed=9)
    return data


class Page:
    """A client of the routes, confined to one folder."""

    def __init__(self, root: Path, state: Path) -> None:
        self.client = TestClient(Starlette(routes=data_page.routes(Roots.of([root]), state)))

    def post(self, name: str, **body: Any) -> dict[str, Any]:
        answer = self.client.post(f"/api/data/{name}", json={"language": "en", **body})
        found: dict[str, Any] = answer.json()
        assert answer.status_code == 200 and "refused" not in found, found
        return found

    def refused(self, name: str, **body: Any) -> str:
        answer = self.client.post(f"/api/data/{name}", json={"language": "en", **body})
        assert answer.status_code == 200 and answer.json().keys() == {"refused"}, answer.text
        return str(answer.json()["refused"][0][1])

    def look(self, folder: Path, **more: Any) -> dict[str, Any]:
        return self.post("look", folder=str(folder), resolution="64", **more)

    def rows(self, look: dict[str, Any], kind: str = "", language: str = "en") -> dict[str, dict[str, Any]]:
        answer = self.client.get(
            "/api/data/items", params={"look": look["look"], "kind": kind, "language": language}
        )
        return {row["name"]: row for row in answer.json()["rows"]}


@pytest.fixture
def page(tmp_path: Path) -> Page:
    return Page(tmp_path, tmp_path / "state")


def kinds(row: dict[str, Any]) -> set[str]:
    return {finding[0] for finding in row["findings"]}


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {one.name: (one.read_bytes(), one.stat().st_mtime_ns) for one in sorted(folder.iterdir())}


def test_every_finding_stands_at_its_picture(page: Page, folder: Path) -> None:
    rows = page.rows(page.look(folder))
    assert kinds(rows["nocap.png"]) == {"no caption"}
    assert kinds(rows["broken.png"]) == {"unreadable"}
    assert kinds(rows["tiny.png"]) == {"too small"}
    assert kinds(rows["twin.png"]) == {"duplicate"}
    assert kinds(rows["long.png"]) == {"long caption"}
    assert kinds(rows["empty.png"]) == {"empty caption"}
    assert kinds(rows["gbk.png"]) == {"encoding"} and rows["gbk.png"]["caption"] == "一只红色的猫在花园里"
    assert kinds(rows["a.png"]) == set() and rows["a.png"]["size"] == [64, 64]
    chinese = page.rows(page.look(folder), language="zh")
    assert chinese["nocap.png"]["findings"][0][2] == "旁边没有同名的 .txt 描述文件"


def test_the_filters_and_counts_agree(page: Page, folder: Path) -> None:
    look = page.look(folder)
    assert look["pictures"] == 9 and sum(count for _, count in look["buckets"]) == 7
    for kind, count, _ in look["kinds"]:
        assert len(page.rows(look, kind)) == count


def test_looking_changes_nothing(page: Page, folder: Path) -> None:
    before = snapshot(folder)
    look = page.look(folder, deep=True)
    for row in page.rows(look).values():
        page.client.get("/api/data/thumb", params={"look": look["look"], "n": row["n"]})
    assert snapshot(folder) == before


def test_a_caption_is_written_and_every_step_is_taken_back(page: Page, folder: Path) -> None:
    look = page.look(folder)
    before = snapshot(folder)
    row = page.rows(look)["gbk.png"]
    text = row["caption"]
    for new in ("one", "两只猫"):
        changed = page.post("caption", look=look["look"], n=row["n"], text=new, before=text)
        assert changed["caption"] == new and kinds(changed) == set() and changed["undo"]
        text = new
    assert (folder / "gbk.txt").read_text(encoding="utf-8") == "两只猫\n"
    for old in ("one", "一只红色的猫在花园里"):
        assert page.post("undo", look=look["look"], n=row["n"])["caption"] == old
    assert {name: data for name, (data, _) in snapshot(folder).items()} == {
        name: data for name, (data, _) in before.items()
    }
    page.refused("undo", look=look["look"], n=row["n"])


def test_a_caption_that_was_missing_is_made_and_unmade(page: Page, folder: Path) -> None:
    look = page.look(folder)
    row = page.rows(look)["nocap.png"]
    made = page.post("caption", look=look["look"], n=row["n"], text="found", before=None)
    assert kinds(made) == set() and (folder / "nocap.txt").is_file()
    unmade = page.post("undo", look=look["look"], n=row["n"])
    assert kinds(unmade) == {"no caption"} and not (folder / "nocap.txt").exists()


def test_a_caption_that_somebody_else_changed_is_not_overwritten(page: Page, folder: Path) -> None:
    look = page.look(folder)
    row = page.rows(look)["a.png"]
    (folder / "a.txt").write_text("by an editor", encoding="utf-8")
    page.refused("caption", look=look["look"], n=row["n"], text="mine", before=row["caption"])
    assert (folder / "a.txt").read_text(encoding="utf-8") == "by an editor"


def test_edit_pairs_come_together_as_training_joins_them(page: Page, tmp_path: Path) -> None:
    edit = tmp_path / "edit"
    for name in ("one", "two"):
        picture(edit / f"target/{name}.png")
        (edit / f"target/{name}.txt").write_text("make it so", encoding="utf-8")
    picture(edit / "condition_1/one_1.png", (64, 64))
    picture(edit / "condition_1/one_2.png", (64, 64))
    look = page.look(edit)
    rows = page.rows(look)
    assert rows["one.png"]["conditions"] == ["one_1.png", "one_2.png"]
    assert "no condition" in kinds(rows["two.png"])
    sizes = [
        Image.open(
            io.BytesIO(
                page.client.get("/api/data/thumb", params={"look": look["look"], "n": 0, "c": which}).content
            )
        ).size
        for which in (0, 1, 2)
    ]
    assert sizes == [(128, 128), (64, 64), (64, 64)]


def test_pictures_are_shown_small_and_as_pictures_only(page: Page, folder: Path, tmp_path: Path) -> None:
    picture(folder / "large.png", (900, 300))
    (folder / "large.txt").write_text("x", encoding="utf-8")
    look = page.look(folder)
    number = page.rows(look)["large.png"]["n"]
    answer = page.client.get("/api/data/thumb", params={"look": look["look"], "n": number})
    assert (
        answer.headers["content-type"] == "image/webp"
        and answer.headers["x-content-type-options"] == "nosniff"
    )
    assert Image.open(io.BytesIO(answer.content)).size == (256, 85)
    broken = page.rows(look)["broken.png"]["n"]
    assert page.client.get("/api/data/thumb", params={"look": look["look"], "n": broken}).status_code == 204
    assert any((tmp_path / "state/thumbs").rglob("*.webp"))


def test_files_are_added_but_never_replaced(page: Page, folder: Path) -> None:
    look = page.look(folder)["look"]
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(stream, "PNG")

    def send(name: str, data: bytes, **more: Any) -> bool:
        query = {"look": look, "name": name, **more}
        return "refused" not in page.client.post("/api/data/upload", params=query, content=data).json()

    before = snapshot(folder)
    assert send("new.png", stream.getvalue())
    assert send("new.txt", "红".encode())
    for name, data in [
        ("a.png", stream.getvalue()),
        ("page.html", b"<script>"),
        ("fake.png", b"<html>not a picture"),
        (".hidden.png", stream.getvalue()),
        ("nul\0.png", stream.getvalue()),
        ("", stream.getvalue()),
    ]:
        assert not send(name, data), name
    assert send("../../escape.png", stream.getvalue()) and not (folder.parents[1] / "escape.png").exists()
    assert not send("x.png", stream.getvalue(), into=7)
    after = snapshot(folder)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"new.png", "new.txt", "escape.png"}


def test_too_large_a_file_is_refused(page: Page, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_page, "LARGEST_FILE", 1000)
    look = page.look(folder)["look"]
    answer = page.client.post("/api/data/upload", params={"look": look, "name": "n.png"}, content=b"x" * 2000)
    assert "refused" in answer.json() and not (folder / "n.png").exists()


@pytest.mark.skipif(os.name == "nt", reason="links need a right of their own there")
def test_nothing_outside_of_the_roots_is_shown(tmp_path: Path, folder: Path) -> None:
    inside = tmp_path / "inside"
    picture(inside / "own.png")
    (inside / "own.txt").write_text("own", encoding="utf-8")
    (inside / "link.png").symlink_to(folder / "a.png")
    (inside / "link.txt").write_text("a link", encoding="utf-8")
    page = Page(inside, tmp_path / "state")
    assert set(page.rows(page.post("look", folder=str(inside), resolution="64"))) == {"own.png"}
    page.refused("look", folder=str(folder), resolution="64")
    page.refused("look", folder=str(inside / ".."), resolution="64")
    page.refused("look", folder=str(inside), conditions=str(folder), resolution="64")


def test_an_unknown_look_is_told(page: Page) -> None:
    assert page.client.get("/api/data/items", params={"look": "none"}).json()["refused"]
    page.refused("caption", look="none", n=0, text="x", before=None)
    assert page.client.post("/api/data/look", content=b"{}").status_code == 415


def test_five_thousand_pictures_are_looked_at_in_seconds_and_paged(page: Page, tmp_path: Path) -> None:
    many = tmp_path / "many"
    many.mkdir()
    stream = io.BytesIO()
    Image.new("RGB", (64, 64)).save(stream, "JPEG")
    for number in range(5000):
        (many / f"p{number:05}.jpg").write_bytes(stream.getvalue() + b"%d" % number)
    began = time.perf_counter()
    look = page.look(many)
    assert time.perf_counter() - began < 20
    answer = page.client.get("/api/data/items", params={"look": look["look"], "start": 4950, "count": 500})
    assert answer.json()["total"] == 5000 and len(answer.json()["rows"]) == 50
    assert len(page.rows(look)) == data_page.PAGE_ROWS


def test_captions_are_written_by_a_child_whose_words_are_shown(page: Page, folder: Path) -> None:
    """No model is there: what the child says of it reaches the page; nothing typed becomes an option or a command."""
    before = snapshot(folder)
    model = folder.parent / "--no model; rm -rf"
    model.mkdir()
    look = page.look(folder)["look"]
    page.post("write", look=look, model=str(model), instruction="--help\n`x`", trigger="$(y)", most=3)
    for _ in range(600):
        state = page.post("writing")
        if not state["running"]:
            break
        time.sleep(0.1)
    assert state["code"] not in (0, None) and any("--no model; rm -rf" in line for line in state["lines"])
    assert snapshot(folder) == before
    assert "outside" in page.refused("write", look=look, model="/etc")


def test_videos_show_the_frames_that_will_be_learned(page: Page, tmp_path: Path) -> None:
    pytest.importorskip("av")
    from whitetuner.data.samples import make_testdata

    make_testdata("video", tmp_path / "clips", 2, 0)
    text = f"[model]\nfamily = 'wan'\ntask = 'i2v'\n[data]\nvideos = '{tmp_path / 'clips'}'\nnum_frames = 17\nresolution = 128\n"
    look = page.post("look", tab="wan-i2v", text=f"{text}[run]\noutput_dir = '{tmp_path / 'output'}'\n")
    rows = page.rows(look)
    assert len(rows) == 2 and look["buckets"] and look["resolution"] == "128"
    for row in rows.values():
        assert "fps" in row["film"] and "1 clips" in row["film"] and row["caption"]
        query = {"look": look["look"], "n": row["n"], "side": 1024}
        sheet = Image.open(io.BytesIO(page.client.get("/api/data/thumb", params=query).content))
        assert sheet.width > 400, "several frames side by side"
    assert page.rows(page.look(tmp_path / "clips")).keys() == rows.keys(), (
        "a bare folder of videos is one, too"
    )


def test_the_clips_on_a_form_are_the_frames_of_the_scan_cut_as_they_are_learned(
    page: Page, tmp_path: Path
) -> None:
    data = tmp_path / "clips"
    for number in range(20):
        picture(data / "walk" / f"{number:03d}.png", (160, 96), number)
    (data / "walk.txt").write_text("a walk", encoding="utf-8")
    text = f"""[model]
family = "wan"
task = "i2v"
[data]
videos = {str(data)!r}
num_frames = 5
resolution = 64
clips = "chunks"
[run]
output_dir = {str(tmp_path / "output")!r}
"""
    look = page.post("look", tab="wan-i2v", text=text)
    assert look["clips"] == 4 and look["buckets"] == [["80x48x5", 4]]
    (row,) = page.rows(look).values()
    section = SetOptions(videos=data, num_frames=5, resolution=64, clips="chunks")
    items = scan([section], 16, films=Films(4, 16.0, 81, True)).items
    assert row["clips"] == ["0-4", "5-9", "10-14", "15-19"] == [spans(item.clips[0]) for item in items]
    for number, item in enumerate(items):
        query = {"look": look["look"], "n": 0, "k": number, "side": 1024}
        shown = Image.open(io.BytesIO(page.client.get("/api/data/thumb", params=query).content))
        wanted = contact_sheet(frames_of(item.target, item.clips[0], item.size), item.clips[0])
        off = np.abs(np.asarray(shown.convert("RGB"), dtype=int) - np.asarray(wanted, dtype=int))
        assert shown.size == wanted.size and off.mean() < 6, "WebP at quality 80"
    assert page.client.get("/api/data/thumb", params={**query, "k": 4}).status_code == 204
