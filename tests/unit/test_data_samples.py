"""Test data: the formats that users have, the same pictures for a seed, nothing overwritten; testdataset/ is made of it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from whitetuner.data.check import check_sets
from whitetuner.data.media import read
from whitetuner.data.probe import probe
from whitetuner.data.samples import make_testdata
from whitetuner.data.scan import SetOptions, scan
from whitetuner.errors import UserError

TESTDATASET = Path(__file__).parents[2] / "testdataset"


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_t2i_data_is_a_sound_set_of_mixed_shapes_and_formats(tmp_path: Path) -> None:
    files = make_testdata("t2i", tmp_path, 8)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in files) == names(tmp_path)
    report = check_sets([SetOptions(images=tmp_path, resolution=256)], 16)
    assert not report.problems and report.usable == 8 and len(report.buckets) >= 4
    assert {path.suffix for path in files} == {".jpg", ".png", ".webp", ".bmp", ".txt"}
    turned = next(path for path in files if path.name.startswith("02") and path.suffix != ".txt")
    assert "rotated" in probe(turned).traits and read(turned).size == (480, 640)
    items = scan([SetOptions(images=tmp_path, resolution=64)], 16).items
    assert len({item.caption for item in items}) == 8 and all(item.caption.startswith("a ") for item in items)


def test_edit_data_has_conditions_by_name_and_one_item_with_two_suffixed(tmp_path: Path) -> None:
    make_testdata("edit", tmp_path, 3)
    assert names(tmp_path) == [
        "condition_1/01.jpg",
        "condition_1/02.jpg",
        "condition_1/03.jpg",
        "condition_2/01.png",
        "condition_2/02.png",
        "condition_2/03_1.png",
        "condition_2/03_2.png",
        "target/01.jpg",
        "target/01.txt",
        "target/02.jpg",
        "target/02.txt",
        "target/03.jpg",
        "target/03.txt",
    ]
    before, after = read(tmp_path / "condition_1" / "01.jpg"), read(tmp_path / "target" / "01.jpg")
    changed = np.abs(np.asarray(before).astype(int) - np.asarray(after)).max(-1) > 40
    assert 0.005 < changed.mean() < 0.2  # the same place, with a thing in it


def test_a_seed_gives_the_same_files_and_another_others(tmp_path: Path) -> None:
    one = {path.name: path.read_bytes() for path in make_testdata("t2i", tmp_path / "one", 3)}
    assert one == {path.name: path.read_bytes() for path in make_testdata("t2i", tmp_path / "two", 3)}
    other = {path.read_bytes() for path in make_testdata("t2i", tmp_path / "other", 3, seed=1)}
    assert not other & set(one.values())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    make_testdata("t2i", tmp_path, 2)
    make_testdata("t2i", tmp_path, 2)
    mine = next(tmp_path.glob("01*.txt"))
    mine.write_text("my own words", encoding="utf-8")
    with pytest.raises(UserError, match="there already"):
        make_testdata("t2i", tmp_path, 4)
    assert mine.read_text(encoding="utf-8") == "my own words" and len(names(tmp_path)) == 4


def test_wrong_words_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one"):
        make_testdata("t2i", tmp_path, 0)
    with pytest.raises(UserError, match="t2i, edit, video"):
        make_testdata("audio", tmp_path)  # type: ignore[arg-type]


def test_videos_need_pyav_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"whitetuner\[video\]"):
        make_testdata("video", tmp_path, 1)
    assert not names(tmp_path)


def test_videos_play_at_their_rate_and_move(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="PyAV (extra `video`) is not installed")
    files = make_testdata("video", tmp_path, 2)
    assert [path.suffix for path in files] == [".mp4", ".txt"] * 2
    for path, (size, rate, count) in zip(
        files[::2], (((320, 192), 16, 33), ((192, 320), 24, 61)), strict=True
    ):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = [frame.to_image() for frame in container.decode(stream)]
            assert (frames[0].size, stream.average_rate, len(frames)) == (size, rate, count)
        assert np.abs(np.asarray(frames[0]).astype(int) - np.asarray(frames[-1])).max() > 80


def test_the_shipped_set_is_small_sound_and_made_by_this_program(tmp_path: Path) -> None:
    assert sum(path.stat().st_size for path in TESTDATASET.rglob("*") if path.is_file()) < 2_000_000
    for kind, count in (("t2i", 6), ("edit", 4)):
        make_testdata(kind, tmp_path / kind, count)  # type: ignore[arg-type]
        assert names(TESTDATASET / kind) == names(tmp_path / kind)
        for name in names(tmp_path / kind):
            shipped, made = TESTDATASET / kind / name, tmp_path / kind / name
            if name.endswith(".txt"):
                assert shipped.read_text(encoding="utf-8") == made.read_text(encoding="utf-8")
            else:  # encoders of other Pillow versions may write other bytes for the same picture
                difference = np.abs(np.asarray(read(shipped)).astype(int) - np.asarray(read(made)))
                assert difference.mean() < 1
    report = check_sets([SetOptions(images=TESTDATASET / "t2i", resolution=64)], 16)
    assert not report.problems and report.usable == 6
    edit = TESTDATASET / "edit"
    conditions = (edit / "condition_1", edit / "condition_2")
    report = check_sets([SetOptions(target=edit / "target", conditions=conditions, resolution=64)], 16)
    assert not report.problems and report.given == [(2, 3), (3, 1)]
