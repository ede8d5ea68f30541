"""Folders become items: captions found and made final, names stable, every problem told at once."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from whitetuner.data import digests as digests_module
from whitetuner.data.captions import convert_captions, guess_encoding, with_trigger
from whitetuner.data.digests import digests, file_digest
from whitetuner.data.folders import CACHE_TAG
from whitetuner.data.scan import Scan, SetOptions, scan
from whitetuner.data.survey import survey
from whitetuner.errors import UserError, UserErrors
from whitetuner.records import Size


def draw(
    path: Path, caption: str | bytes | None = "a picture", size: tuple[int, int] = (96, 64), seed: int = 0
) -> Path:
    """A noise picture, different for every seed, with its caption beside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.RandomState(seed).randint(0, 255, (size[1], size[0], 3), np.uint8)).save(path)
    if isinstance(caption, bytes):
        path.with_suffix(".txt").write_bytes(caption)
    elif caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def look(folder: Path | list[SetOptions], **options: object) -> Scan:
    sections = folder if isinstance(folder, list) else [SetOptions(images=folder, resolution=64, **options)]  # type: ignore[arg-type]
    return scan(sections, 16)


def test_pictures_become_items_with_captions_sizes_and_names(tmp_path: Path) -> None:
    draw(tmp_path / "b.png", "  two\r\nlines \n", seed=1)
    draw(tmp_path / "a.jpg", "\ufeffwith a mark", seed=2)
    first, second = look(tmp_path).items
    assert (first.target.name, second.target.name) == ("a.jpg", "b.png")
    assert (first.caption, second.caption) == ("with a mark", "two\nlines")
    assert first.source == Size(96, 64) and first.size == Size(80, 48)
    assert first.id == f"{file_digest(tmp_path / 'a.jpg')}-0"


def test_ids_follow_the_content_not_the_name_and_count_duplicates(tmp_path: Path) -> None:
    original = draw(tmp_path / "m.png", "one", seed=3)
    before = look(tmp_path).items[0].id
    shutil.copy(original, draw(tmp_path / "z.png", "two"))
    items = look(tmp_path).items
    assert [item.id for item in items] == [before, before.replace("-0", "-1")]
    (tmp_path / "m.png").rename(tmp_path / "q.png")
    (tmp_path / "m.txt").rename(tmp_path / "q.txt")
    assert [item.id for item in look(tmp_path).items] == [item.id for item in items]


def test_the_data_digest_changes_with_what_is_learned_and_not_with_names(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", "one", seed=1)
    draw(tmp_path / "b.png", "two", seed=2)
    digest = look(tmp_path).digest()
    (tmp_path / "a.png").rename(tmp_path / "c.png")
    (tmp_path / "a.txt").rename(tmp_path / "c.txt")
    assert look(tmp_path).digest() == digest
    assert look(tmp_path, repeats=2).digest() != digest
    assert look(tmp_path, loss_weight=0.5).digest() != digest == look(tmp_path, loss_weight=1.0).digest()
    assert {item.loss_weight for item in look(tmp_path, loss_weight=0.5).items} == {0.5}
    assert look(tmp_path, trigger="sks").digest() != digest
    draw(tmp_path / "b.png", "three", seed=2)
    assert look(tmp_path).digest() != digest


@pytest.mark.parametrize(
    ("caption", "trigger", "result"),
    [
        ("a dog", "sks", "sks, a dog"),
        ("a sks dog", "sks", "a sks dog"),
        ("SKS dog", "sks", "SKS dog"),
        ("a category", "cat", "cat, a category"),
        ("一只小白在跑", "小白", "一只小白在跑"),
        ("一只狗", "小白", "小白, 一只狗"),
        ("", "sks", "sks"),
        ("a dog", "", "a dog"),
        ("a (dog)", "(dog)", "a (dog)"),
    ],
)
def test_the_trigger_is_prepended_unless_it_is_there(caption: str, trigger: str, result: str) -> None:
    assert with_trigger(caption, trigger) == result


def test_missing_captions_are_counted_and_the_first_five_named(tmp_path: Path) -> None:
    for number in range(8):
        draw(tmp_path / f"p{number}.png", None, seed=number)
    with pytest.raises(UserErrors) as caught:
        look(tmp_path)
    text = str(caught.value)
    assert "8 x: p0.png, p1.png, p2.png, p3.png, p4.png (+3)" in text and "default_caption" in text
    assert len(caught.value.errors) == 1
    assert {item.caption for item in look(tmp_path, default_caption="a thing").items} == {"a thing"}
    assert {item.caption for item in look(tmp_path, default_caption="", trigger="sks").items} == {"sks"}


def test_captions_of_another_ending_are_pointed_at(tmp_path: Path) -> None:
    draw(tmp_path / "a.png").with_suffix(".txt").rename(tmp_path / "a.caption")
    with pytest.raises(UserErrors, match=r'caption_ext = "\.caption"'):
        look(tmp_path)
    assert look(tmp_path, caption_ext=".caption").items[0].caption == "a picture"


def test_one_prompt_serves_the_whole_set(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", b"\xff\xfe\xfd")
    draw(tmp_path / "b.png", None)
    assert {item.caption for item in look(tmp_path, prompt="make it night").items} == {"make it night"}


def test_an_empty_caption_is_told_and_takes_the_default(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", "\ufeff \n")
    result = look(tmp_path)
    assert result.items[0].caption == ""
    assert [(one.kind, one.level) for one in result.problems] == [("empty caption", "warning")]
    filled = look(tmp_path, default_caption="a thing")
    assert filled.items[0].caption == "a thing" and not filled.problems


@pytest.mark.parametrize(
    ("text", "encoding", "guess"),
    [
        ("一只黑猫坐在窗台上", "gbk", "gb18030"),
        ("a sks 狗 dog", "gbk", "gb18030"),
        ("一隻黑貓坐在窗臺上", "big5", "big5"),
        ("黒い猫が窓辺に座っている", "shift_jis", "shift_jis"),
        ("un café près de la forêt", "cp1252", "cp1252"),
        ("一只黑猫", "utf-16", "utf-16"),
    ],
)
def test_other_encodings_are_named_and_converted_with_the_original_kept(
    tmp_path: Path, text: str, encoding: str, guess: str
) -> None:
    path = draw(tmp_path / "a.png", text.encode(encoding)).with_suffix(".txt")
    assert guess_encoding(path.read_bytes()) == guess
    with pytest.raises(UserErrors) as caught:
        look(tmp_path)
    assert (
        guess in str(caught.value)
        and "--convert-captions" in str(caught.value)
        and "a.txt" in str(caught.value)
    )
    (done,) = convert_captions([path])
    assert done.text == text and done.kept.read_bytes() == text.encode(encoding)
    assert look(tmp_path).items[0].caption == text
    assert convert_captions([path]) == []


def test_a_conversion_never_overwrites_what_it_kept_and_names_what_it_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("黑猫".encode("gbk"))
    convert_captions([path])
    path.write_bytes("白狗".encode("gbk"))
    (again,) = convert_captions([path], "gbk")
    assert (tmp_path / "a.txt.bak").read_bytes() == "黑猫".encode("gbk")
    assert again.kept.read_bytes() == "白狗".encode("gbk")
    path.write_bytes(b"\x81\x20\xff")
    with pytest.raises(UserError, match="cannot be read as shift_jis"):
        convert_captions([path], "shift_jis")
    assert path.read_bytes() == b"\x81\x20\xff"


def test_the_same_stem_twice_is_refused_when_one_caption_serves_both(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", "one", seed=1)
    draw(tmp_path / "a.jpg", None, seed=2)
    with pytest.raises(UserErrors, match=r"share the caption a\.txt"):
        look(tmp_path)


def test_capitals_and_taken_apart_accents_do_not_hide_a_caption(tmp_path: Path) -> None:
    draw(tmp_path / "Foto.PNG", None, seed=1)
    (tmp_path / "foto.TXT").write_text("found", encoding="utf-8")
    draw(tmp_path / "cafe\u0301.png", None, seed=2)
    (tmp_path / "caf\u00e9.txt").write_text("accent", encoding="utf-8")
    assert [item.caption for item in look(tmp_path).items] == ["accent", "found"]


def test_paths_with_spaces_chinese_and_emoji_work(tmp_path: Path) -> None:
    folder = tmp_path / "我的 图片 🐱 (1)"
    draw(folder / "第一张 🎨.png", "一只猫 🐈")
    (item,) = look(folder).items
    assert item.caption == "一只猫 🐈" and item.target.parent == folder


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps file names as bytes")
def test_names_that_are_no_text_are_told_as_they_are_meant(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", seed=1)
    draw(tmp_path / "b.png", seed=2).rename(
        os.fsdecode(os.fsencode(tmp_path) + b"/" + "黑猫.png".encode("gbk"))
    )
    with pytest.raises(UserErrors) as caught:
        look(tmp_path)
    assert "黑猫.png" in str(caught.value) and "code page" in str(caught.value)
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/" + "白狗".encode("gbk"))
    draw(Path(folder) / "c.png", seed=3)
    with pytest.raises(UserErrors, match=r"白狗.c\.png"):
        look(tmp_path, recursive=True)
    str(caught.value).encode("utf-8")


def test_a_link_back_up_is_not_followed_for_ever(tmp_path: Path) -> None:
    draw(tmp_path / "in" / "a.png", seed=1)
    try:
        (tmp_path / "in" / "up").symlink_to(tmp_path, target_is_directory=True)
    except OSError:
        pytest.skip("may not make links here")
    assert [item.target.name for item in look(tmp_path, recursive=True).items] == ["a.png"]


def test_hidden_files_caches_and_runs_are_passed_over(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    draw(tmp_path / ".hidden.png")
    draw(tmp_path / "._a.png")
    draw(tmp_path / ".cache" / "x.png")
    draw(tmp_path / "cache" / "x.png")
    (tmp_path / "cache" / CACHE_TAG).write_text(
        "Signature: 8a477f597d28d172789f06886806bc55", encoding="utf-8"
    )
    draw(tmp_path / "run" / "samples" / "x.png")
    (tmp_path / "run" / "events.jsonl").write_text("", encoding="utf-8")
    draw(tmp_path / "deep" / "er" / "b.png", seed=1)
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    assert [item.target.name for item in look(tmp_path).items] == ["a.png"]
    assert [item.target.name for item in look(tmp_path, recursive=True).items] == ["a.png", "b.png"]


def test_kohya_folders_carry_their_repeats_and_words(tmp_path: Path) -> None:
    draw(tmp_path / "10_sks dog" / "a.png", None, seed=1)
    draw(tmp_path / "2_dog" / "b.png", "a dog", seed=2)
    draw(tmp_path / "notes" / "c.png", seed=3)
    result = look(tmp_path, repeats=3)
    assert [(one.name, one.repeats) for one in result.sets] == [("10_sks dog", 30), ("2_dog", 6)]
    assert [(item.caption, item.set_index) for item in result.items] == [("sks dog", 0), ("a dog", 1)]
    draw(tmp_path / "top.png", "plain", seed=4)
    mixed = look(tmp_path, recursive=True)
    assert sorted(item.target.name for item in mixed.items) == ["a.png", "b.png", "c.png", "top.png"]


def test_the_folders_of_one_set_share_its_weight(tmp_path: Path) -> None:
    draw(tmp_path / "k" / "3_one" / "a.png", seed=1)
    draw(tmp_path / "k" / "1_two" / "b.png", seed=2)
    draw(tmp_path / "plain" / "c.png", seed=3)
    kohya, plain = (SetOptions(images=tmp_path / name, resolution=64) for name in ("k", "plain"))
    assert [one.weight for one in look([kohya, plain]).sets] == [None, None, None]
    heavy = look([replace(kohya, weight=8.0), plain]).sets
    assert [(one.name, one.weight) for one in heavy] == [("1_two", 2.0), ("3_one", 6.0), ("plain", 1.0)]
    assert [one.weight for one in look([kohya, replace(plain, weight=3.0)]).sets] == [0.25, 0.75, 3.0]


def test_several_sets_count_their_items(tmp_path: Path) -> None:
    draw(tmp_path / "one" / "a.png", seed=1)
    draw(tmp_path / "two" / "b.png", seed=2, size=(640, 640))
    section = SimpleNamespace(
        images=str(tmp_path / "two"), resolution=[64, 128], weight=2.0, trigger=None, conditions=[]
    )
    result = look([SetOptions(images=tmp_path / "one", resolution=64), section])  # type: ignore[list-item]
    assert [item.set_index for item in result.items] == [0, 1]
    assert result.items[1].size == Size(128, 128) and result.sets[1].weight == 2.0


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    draw(tmp_path / "ok.png", seed=1)
    draw(tmp_path / "small.png", size=(30, 20), seed=2)
    draw(tmp_path / "gbk.png", "黑猫".encode("gbk"), seed=3)
    draw(tmp_path / "none.png", None, seed=4)
    (tmp_path / "zero.jpg").write_bytes(b"")
    (tmp_path / "zero.txt").write_text("x", encoding="utf-8")
    cut = draw(tmp_path / "cut.png", seed=5)
    cut.write_bytes(cut.read_bytes()[:300])
    (tmp_path / "film.gif").write_bytes(b"GIF89a")
    missing = SetOptions(images=tmp_path / "nowhere")
    with pytest.raises(UserErrors) as caught:
        look([SetOptions(images=tmp_path, resolution=64), missing])
    text = str(caught.value)
    for words in (
        "small.png",
        "30 x 20",
        "gbk.txt",
        "none.png",
        "zero.jpg",
        "0 bytes",
        "cut.png",
        "cut off",
        "no such folder",
    ):
        assert words in text, words
    assert all(error.where and error.mend for error in caught.value.errors)
    assert "ok.png" not in text
    kinds = {one.kind: one.level for one in survey([SetOptions(images=tmp_path, resolution=64)]).problems}
    assert kinds["not read"] == "warning"


def test_too_small_pictures_are_refused_skipped_or_enlarged_by_choice(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", size=(30, 20), seed=1)
    draw(tmp_path / "b.png", seed=2)
    with pytest.raises(UserErrors, match="upscale = true"):
        look(tmp_path)
    skipped = look(tmp_path, too_small="skip")
    assert [item.target.name for item in skipped.items] == ["b.png"]
    assert [(one.kind, one.level) for one in skipped.problems] == [("too small", "warning")]
    assert look(tmp_path, upscale=True).items[0].size == Size(80, 48)


def test_an_empty_folder_says_what_is_there_instead(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"")
    (tmp_path / "note.txt").write_text("x", encoding="utf-8")
    with pytest.raises(UserErrors, match=r"no pictures \(it holds: 1 \.mp4, 1 \.txt\)"):
        look(tmp_path)
    draw(tmp_path / "inside" / "a.png")
    with pytest.raises(UserErrors, match="recursive = true"):
        look(tmp_path)
    with pytest.raises(UserErrors, match="not a folder"):
        look(tmp_path / "note.txt")
    with pytest.raises(UserErrors, match="no folder of pictures is named"):
        scan([SetOptions()], 16)


def test_hashes_are_remembered_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests_module, "SETTLED_S", -60.0)  # files of this very second may be remembered
    paths = [draw(tmp_path / f"{number}.png", seed=number) for number in range(4)]
    hashed: list[tuple[int, int]] = []
    index = tmp_path / "index"
    first = digests(paths, index, progress=lambda done, total: hashed.append((done, total)))
    assert hashed == [(1, 4), (2, 4), (3, 4), (4, 4)] and len(set(first)) == 4
    hashed.clear()
    assert (
        digests(paths, index, progress=lambda done, total: hashed.append((done, total))) == first
        and not hashed
    )
    draw(paths[2], seed=77)
    again = digests(paths, index, progress=lambda done, total: hashed.append((done, total)))
    assert hashed == [(1, 1)] and again[2] == file_digest(paths[2]) != first[2]
    for file in index.glob("*.json"):
        file.write_text("{torn", encoding="utf-8")
    assert digests(paths, index) == again


def test_a_file_that_may_have_changed_within_the_clocks_grain_is_not_remembered(tmp_path: Path) -> None:
    path = draw(tmp_path / "a.png", seed=1)
    index = tmp_path / "index"
    digests([path], index)
    assert not list(index.glob("*.json")) if index.exists() else True
