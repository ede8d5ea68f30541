"""A check tells everything at once, from headers and ends, and shows each crop as it will be cut."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from whitetuner.data.captions import convert_captions
from whitetuner.data.check import CheckReport, check_sets, suggested_steps, words
from whitetuner.data.check_page import SHOWN, write_check_html
from whitetuner.data.media import cut, read
from whitetuner.data.scan import SetOptions
from whitetuner.data.survey import caption_files
from whitetuner.errors import UserError
from whitetuner.records import Size


def draw(
    path: Path, caption: str | None = "a picture", size: tuple[int, int] = (96, 64), seed: int = 0
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.RandomState(seed).randint(0, 255, (size[1], size[0], 3), np.uint8)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def look(folder: Path, resolution: int = 64, **options: object) -> CheckReport:
    return check_sets([SetOptions(images=folder, resolution=resolution)], 16, **options)  # type: ignore[arg-type]


def kinds(report: CheckReport) -> dict[str, str]:
    return {f"{one.kind}: {one.path.name}": one.level for one in report.problems}


def test_a_sound_set_has_nothing_to_say(tmp_path: Path) -> None:
    for number in range(3):
        draw(tmp_path / f"{number}.png", seed=number)
    report = look(tmp_path)
    assert not report.problems and report.usable == 3 and report.as_json()["ok"] is True
    assert report.buckets == ((Size(80, 48), 3),)
    assert "3 of 3 pictures can be used; 0 errors, 0 warnings" in report.as_text()


def test_every_kind_of_finding_is_listed_for_its_file(tmp_path: Path) -> None:
    draw(tmp_path / "fine.png", seed=1)
    draw(tmp_path / "twin.png", seed=1)
    draw(tmp_path / "tall.png", size=(64, 640), seed=2)
    draw(tmp_path / "tiny.png", size=(20, 20), seed=3)
    draw(tmp_path / "bare.png", None, seed=4)
    draw(tmp_path / "long.png", "word " * 400, seed=5)
    draw(tmp_path / "mute.png", " ", seed=6)
    draw(tmp_path / "gbk.png", seed=7).with_suffix(".txt").write_bytes("黑猫".encode("gbk"))
    torn = draw(tmp_path / "torn.jpg", seed=8)
    torn.write_bytes(torn.read_bytes()[:-300])
    Image.new("RGBA", (96, 64), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    (tmp_path / "clear.txt").write_text("x", encoding="utf-8")
    frames = [Image.new("RGB", (96, 64), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "film.webp", save_all=True, append_images=frames[1:])
    (tmp_path / "film.txt").write_text("x", encoding="utf-8")
    (tmp_path / "old.gif").write_bytes(b"GIF89a")
    draw(tmp_path / "less.png", size=(50, 40), seed=9)
    (tmp_path / "lost.txt").write_text("nobody's", encoding="utf-8")
    report = look(tmp_path)
    assert kinds(report) == {
        "no caption: bare.png": "error",
        "encoding: gbk.txt": "error",
        "unreadable: torn.jpg": "error",
        "too small: tiny.png": "error",
        "duplicate: twin.png": "warning",
        "crop: tall.png": "warning",
        "empty caption: mute.txt": "warning",
        "animated: film.webp": "warning",
        "not read: old.gif": "warning",
        "long caption: long.png": "note",
        "transparent: clear.png": "note",
        "orphan caption: lost.txt": "note",
        "small: less.png": "note",
    }
    assert len(report.errors) == 4 and report.duplicates == ((tmp_path / "fine.png", tmp_path / "twin.png"),)
    told = json.loads(json.dumps(report.as_json()))
    assert told["ok"] is False and len(told["problems"]) == 13 and told["pictures"] == 12
    assert all(one["what"] and one["path"] for one in told["problems"])
    text = report.as_text()
    assert all(name.split(": ")[1] in text for name in kinds(report))


def test_only_deep_finds_damage_in_the_middle(tmp_path: Path) -> None:
    path = draw(tmp_path / "a.png")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 255
    path.write_bytes(raw)
    assert not look(tmp_path).problems
    assert kinds(look(tmp_path, deep=True)) == {"unreadable: a.png": "error"}


def test_tokens_are_counted_where_a_tokenizer_is_given(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", "one two three")
    report = look(tmp_path, tokens=lambda text: len(text), max_tokens=12)
    assert (
        "13 tokens, the model reads 12" in report.problems[0].error.what
        and report.problems[0].level == "warning"
    )
    assert not look(tmp_path, tokens=lambda text: len(text), max_tokens=13).problems
    assert words("a cat, 一只黑猫 and 犬") == 2 + 4 + 1 + 1


def test_a_resolution_off_the_stride_and_a_missing_folder_are_findings_too(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    draw(tmp_path / "b.png", seed=1)
    assert [one.kind for one in look(tmp_path, resolution=100).errors] == ["resolution"]
    assert [one.kind for one in look(tmp_path / "nowhere").errors] == ["folder"]
    empty = look(tmp_path / "nowhere")
    assert (
        empty.usable == 0
        and "no such folder" in empty.as_text()
        and write_check_html(empty, tmp_path / "r.html")
    )


def test_batches_that_do_not_fill_up_are_counted(tmp_path: Path) -> None:
    for number in range(5):
        draw(tmp_path / f"{number}.png", size=(96, 64) if number < 3 else (64, 96), seed=number)
    assert look(tmp_path, batch_size=2).small_batches == 1
    assert look(tmp_path, batch_size=1).small_batches == 0


def test_suggested_steps_grow_with_the_set_within_bounds() -> None:
    assert [suggested_steps(n, 1) for n in (1, 10, 20, 50, 1000)] == [500, 600, 1200, 3000, 6000]
    assert suggested_steps(50, 4) == 750 and suggested_steps(1, 64) == 50


def test_captions_of_a_whole_folder_are_converted(tmp_path: Path) -> None:
    draw(tmp_path / "a.png").with_suffix(".txt").write_bytes("一只黑猫".encode("gbk"))
    draw(tmp_path / "b.png", "schon gut", seed=1)
    (done,) = convert_captions(caption_files([SetOptions(images=tmp_path)]))
    assert done.text == "一只黑猫" and done.path.name == "a.txt" and not look(tmp_path).problems
    with pytest.raises(UserError, match="no such folder"):
        caption_files([SetOptions(images=tmp_path / "nowhere")])


def test_the_page_shows_the_crop_that_training_cuts(tmp_path: Path) -> None:
    path = draw(tmp_path / "a <b>.png", "a <caption> & more", size=(250, 100))
    report = look(tmp_path)
    page = write_check_html(report, tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    left, top, width, height = map(
        float,
        re.search(r"left: ([\d.]+)%; top: ([\d.]+)%; width: ([\d.]+)%; height: ([\d.]+)%", page).groups(),  # type: ignore[union-attr]
    )
    size = report.pictures[0].size
    assert size is not None and report.pictures[0].cropped > 0.05
    kept = read(path).crop((round(2.5 * left), round(top), round(2.5 * (left + width)), round(top + height)))
    wanted = np.asarray(cut(read(path), size)).astype(int)
    shown = np.asarray(kept.resize((size.width, size.height), Image.Resampling.LANCZOS))
    assert np.abs(shown - wanted).mean() < 3  # 2.2 for cutting at whole pixels, 12 for one pixel off
    assert width * height / 10_000 == pytest.approx(1 - report.pictures[0].cropped, abs=0.001)
    assert "a &lt;caption&gt; &amp; more" in page and "a &lt;b&gt;.png" in page and "<caption>" not in page
    assert "http" not in page  # opens offline
    assert page.count("<figure>") == 1


def test_the_page_stays_small_for_large_sets(tmp_path: Path) -> None:
    for number in range(SHOWN + 12):
        draw(tmp_path / f"{number:03}.jpg", size=(96, 64 + number % 5 * 16), seed=number)
    page = write_check_html(look(tmp_path), tmp_path / "report.html").read_text(encoding="utf-8")
    assert SHOWN // 2 < page.count("<figure>") <= SHOWN


def test_a_picture_that_only_decoding_finds_broken_does_not_break_the_page(tmp_path: Path) -> None:
    path = draw(tmp_path / "a.png")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 255
    path.write_bytes(raw)
    draw(tmp_path / "b.png", seed=2)
    page = write_check_html(look(tmp_path), tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == 1
