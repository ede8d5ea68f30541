"""Ways out of a run's folder and of the roots: links, paths that are read in two ways, requests that are none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from gui_page import client, made, place, preview, step
from PIL import Image

from whitetuner.runs.report import write_report

__all__ = ["place"]  # the fixture

LINKS = pytest.mark.skipif(os.name == "nt", reason="links need a right of their own there")


@LINKS
def test_links_out_of_a_run_are_neither_sent_nor_listed_nor_read(place: Path) -> None:
    run = place / "output" / "cat"
    secret = place / "secret.safetensors"
    secret.write_bytes(b"nobody's business")
    picture = place / "outside.png"
    Image.new("RGB", (64, 64), (255, 0, 0)).save(picture)
    inside = run / "samples" / "own.png"
    job = made(run, step(1), preview(run, 1, "samples/own.png", "samples/link.png", "../../outside.png"))
    inside.parent.mkdir()
    Image.new("RGB", (64, 64), (0, 255, 0)).save(inside)
    (run / "samples" / "link.png").symlink_to(picture)
    (run / "final").mkdir()
    (run / "final" / "cat.safetensors").symlink_to(secret)
    (run / "final" / "gone.safetensors").symlink_to(place / "gone")
    (run / "logs").mkdir()
    (run / "logs" / "x.log").symlink_to(secret)
    job = job.with_(log=str(run / "logs" / "x.log"), exit=1)
    job.write()
    page = client()
    shown = page.get(f"/api/runs/{job.id}").json()
    assert shown["finals"] == [] and "nobody" not in shown["reason"]["text"]
    assert page.get(f"/api/runs/{job.id}/final/0").status_code == 404
    assert "nobody" not in page.get(f"/api/runs/{job.id}/log").text
    assert "refused" in page.post(f"/api/runs/{job.id}/comfyui", json={"folder": str(place)}).json()
    text = write_report(run).read_text(encoding="utf-8")
    assert text.count("data:image/jpeg") == 1 and "cat.safetensors" not in text
    (run / "final" / "cat.safetensors").unlink()
    (run / "final" / "cat.safetensors").write_bytes(b"own")
    answer = page.get(f"/api/runs/{job.id}/final/0")
    assert answer.content == b"own" and 'filename="cat.safetensors"' in answer.headers["content-disposition"]


@LINKS
def test_nothing_is_copied_through_a_link_out_of_the_roots(place: Path) -> None:
    run, away = place / "in" / "cat", place / "away"
    job = made(run)
    (run / "final").mkdir()
    (run / "final" / "cat.safetensors").write_bytes(b"new")
    (away / "loras").mkdir(parents=True)
    for name, link, target in (("a", "models", away), ("b", "models/loras", away / "loras")):
        at = place / "in" / name / link
        at.parent.mkdir(parents=True)
        at.symlink_to(target)
        page = client(server=True, roots=(place / "in",))
        answer = page.post(f"/api/runs/{job.id}/comfyui", json={"folder": str(place / "in" / name)})
        assert "refused" in answer.json() and list((away / "loras").iterdir()) == []
    left = place / "in" / "c" / "models" / "loras"
    left.mkdir(parents=True)
    (left / ".cat.safetensors.writing").symlink_to(away / "written.safetensors")
    assert "path" in page.post(f"/api/runs/{job.id}/comfyui", json={"folder": str(place / "in/c")}).json()
    assert not (away / "written.safetensors").exists() and (left / "cat.safetensors").read_bytes() == b"new"


def test_a_confined_page_does_not_tell_where_comfyui_is_elsewhere(place: Path) -> None:
    job = made(place / "in" / "cat")
    (place / "state").mkdir(exist_ok=True)
    (place / "state" / "comfyui.txt").write_text(str(place / "ComfyUI"), encoding="utf-8")
    address = f"/api/runs/{job.id}"
    assert client().get(address).json()["comfyui"] == str(place / "ComfyUI")
    assert client(server=True, roots=(place / "in",)).get(address).json()["comfyui"] == ""
    assert client(server=True, roots=(place,)).get(address).json()["comfyui"] == str(place / "ComfyUI")
