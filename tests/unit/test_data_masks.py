"""Masks are found by name, cut as their pictures are, and what is wrong with them is told by name early."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from whitetuner.config.kinds import refuse_wrong_data
from whitetuner.config.load import load_config
from whitetuner.data.check import CheckReport, check_sets
from whitetuner.data.check_page import write_check_html
from whitetuner.data.masks import CELL_PX, mask_cells
from whitetuner.data.media import crop_box, picture, read_mask
from whitetuner.data.scan import Scan, SetOptions, scan
from whitetuner.errors import UserError, UserErrors
from whitetuner.records import Size


def save(path: Path, pixels: np.ndarray, **more: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **more)
    return path


def noise(path: Path, width: int = 96, height: int = 64, seed: int = 0, **more: object) -> Path:
    return save(
        path, np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8), **more
    )


def look(folder: Path, **more: object) -> Scan:
    options = SetOptions(images=folder / "pictures", default_caption="", resolution=64, **more)  # type: ignore[arg-type]
    return scan([options], 16)


def refusal(folder: Path, **more: object) -> str:
    with pytest.raises(UserErrors) as told:
        look(folder, **more)
    return str(told.value)


def white(width: int, height: int) -> np.ndarray:
    return np.full((height, width), 255, dtype=np.uint8)


sides = st.integers(20, 300)


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.integers(2, 6), st.integers(2, 6), st.sampled_from(["L", "RGB", "1", "P", "RGBA"]))
def test_a_white_mask_is_white_in_every_cell_at_every_size(
    tmp_path_factory: pytest.TempPathFactory, width: int, height: int, columns: int, rows: int, mode: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "white.png"
    Image.fromarray(white(width, height)).convert("RGB").convert(mode).save(file)
    cells = np.array(mask_cells(file, False, Size(16 * columns, 16 * rows)))
    assert cells.shape == (16 * rows // CELL_PX, 16 * columns // CELL_PX) and (cells == 255).all()


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.integers(2, 6), st.integers(2, 6), st.integers(0, 10**6))
def test_a_mask_is_cut_where_its_picture_is(
    tmp_path_factory: pytest.TempPathFactory, width: int, height: int, columns: int, rows: int, seed: int
) -> None:
    """Of a picture that is its own mask every cell is the mean of the 64 pixels that are learned there."""
    size = Size(16 * columns, 16 * rows)
    grey = np.random.default_rng(seed).integers(0, 255, (height, width), dtype=np.uint8)
    file = save(tmp_path_factory.getbasetemp() / "own.png", grey)
    cells = np.array(mask_cells(file, False, size), dtype=float)
    seen = np.array(picture(file, size).convert("L"), dtype=float)
    means = seen.reshape(size.height // CELL_PX, CELL_PX, size.width // CELL_PX, CELL_PX).mean((1, 3))
    assert np.abs(cells - means).max() <= 0.51  # kept in whole greys


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_rotation_and_mirror_of_the_camera_is_followed(tmp_path: Path, turn: int) -> None:
    """The alpha channel of a picture whose EXIF turns or mirrors it lies where its opaque part is seen."""
    pixels = np.zeros((64, 96, 4), dtype=np.uint8)
    pixels[:24, :40] = (200, 40, 40, 255)
    exif = Image.Exif()
    exif[0x0112] = turn
    file = save(tmp_path / "turned.png", pixels, exif=exif)
    size = Size(96, 64) if turn < 5 else Size(64, 96)
    seen = np.array(picture(file, size))[..., 1] < 128  # transparent is white there
    opaque = np.array(read_mask(file, True)) > 128
    assert (seen == opaque).all() and opaque.sum() == 24 * 40
    cells = np.array(mask_cells(file, True, size))
    assert (
        cells == 255 * seen.reshape(size.height // 8, 8, size.width // 8, 8).all((1, 3))
    ).all() and cells.any()


def test_a_centre_crop_cuts_the_mask_as_the_picture(tmp_path: Path) -> None:
    """Of a wide picture the middle is learned: what is white beside it does not count."""
    mask = np.zeros((64, 192), dtype=np.uint8)
    mask[:, 64:96] = 255  # the left half of the middle
    mask[:, :64] = 255  # cut off
    file = save(tmp_path / "m.png", mask)
    assert crop_box(Size(192, 64), Size(64, 64)) == (64, 0, 128, 64)
    cells = np.array(mask_cells(file, False, Size(64, 64)))
    assert (cells[:, :4] == 255).all() and (cells[:, 4:] == 0).all()
    small = save(tmp_path / "small.png", np.array(Image.fromarray(mask).reduce(4)))
    enlarged = np.array(mask_cells(small, False, Size(64, 64)), dtype=int)
    assert np.abs(enlarged - cells).max() <= 16  # the edge of an enlarged mask is soft


def test_edges_are_means_and_what_is_transparent_in_a_mask_is_black(tmp_path: Path) -> None:
    half = np.zeros((64, 64), dtype=np.uint8)
    half[:, :4] = 255
    cells = np.array(mask_cells(save(tmp_path / "half.png", half), False, Size(64, 64)))
    assert (cells[:, 0] == 128).all() and (cells[:, 1:] == 0).all()
    painted = np.full((64, 64, 4), 255, dtype=np.uint8)
    painted[:, 32:, 3] = 0
    cells = np.array(mask_cells(save(tmp_path / "painted.png", painted), False, Size(64, 64)))
    assert (cells[:, :4] == 255).all() and (cells[:, 4:] == 0).all()


def test_masks_belong_to_pictures_by_name_in_sub_folders_and_kohyas_too(tmp_path: Path) -> None:
    for name in ("a.png", "10_cat/b.jpg"):
        noise(tmp_path / "pictures" / name, seed=len(name))
    save(tmp_path / "masks" / "A.PNG", white(96, 64))
    save(tmp_path / "masks" / "10_cat" / "b.webp", white(48, 32))
    items = look(tmp_path, mask_dir=tmp_path / "masks", mask_floor=0.25).items
    assert [(one.target.name, one.mask.path.name) for one in items if one.mask] == [
        ("a.png", "A.PNG"),
        ("b.jpg", "b.webp"),
    ]
    assert {one.mask.floor for one in items if one.mask} == {0.25} and not any(
        one.mask.alpha for one in items if one.mask
    )
    for name in ("a.png", "10_cat/b.png"):  # inside of the pictures: not learned from
        save(tmp_path / "pictures" / "masks" / name, white(96, 64))
    inside = look(tmp_path, mask_dir=tmp_path / "pictures" / "masks", recursive=True)
    assert "masks" not in {one.target.parent.name for one in inside.items}


def test_the_data_digest_changes_with_the_mask_and_not_with_its_name(tmp_path: Path) -> None:
    noise(tmp_path / "pictures" / "a.png")
    plain = look(tmp_path).digest()
    save(tmp_path / "masks" / "a.png", white(96, 64))
    masked = look(tmp_path, mask_dir=tmp_path / "masks").digest()
    (tmp_path / "masks").rename(tmp_path / "moved")
    assert look(tmp_path, mask_dir=tmp_path / "moved").digest() == masked != plain
    assert look(tmp_path, mask_dir=tmp_path / "moved", mask_floor=0.5).digest() != masked
    save(tmp_path / "moved" / "a.png", white(96, 64) // 2)
    assert look(tmp_path, mask_dir=tmp_path / "moved").digest() != masked


def test_the_check_says_how_many_have_a_mask(tmp_path: Path) -> None:
    noise(tmp_path / "pictures" / "a.png")
    save(tmp_path / "masks" / "a.png", white(96, 64))

    def seen(**more: object) -> CheckReport:
        options = SetOptions(images=tmp_path / "pictures", default_caption="", resolution=64, **more)  # type: ignore[arg-type]
        return check_sets([options], 16)

    masked = seen(mask_dir=tmp_path / "masks", mask_floor=0.25)
    assert "1 with a mask; the rest counts 0.25" in masked.as_text()
    assert [one["masked"] for one in masked.as_json()["sets"]] == [1]
    page = write_check_html(masked, tmp_path / "check.html").read_text(encoding="utf-8")
    assert "1 with a mask" in page
    plain = seen()
    assert "mask" not in plain.as_text() and plain.as_json()["sets"][0]["masked"] == 0


def test_a_missing_a_doubled_and_a_foreign_mask_are_told_by_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        noise(tmp_path / "pictures" / f"{name}.png", seed=ord(name))
    masks = tmp_path / "masks"
    save(masks / "a.png", white(96, 64))
    told = refusal(tmp_path, mask_dir=masks)
    assert "no mask of its name" in told and "b.png" in told and "a.png" not in told
    save(masks / "b.png", white(96, 64))
    save(masks / "b.bmp", white(96, 64))
    assert "same name up to the ending" in refusal(tmp_path, mask_dir=masks)
    (masks / "b.bmp").rename(masks / "c.bmp")
    found = look(tmp_path, mask_dir=masks)
    assert [one.kind for one in found.problems] == ["orphan mask"] and "c.bmp" in found.notes()[0]
    for file in masks.iterdir():
        file.rename(file.with_name(f"mask of {file.name}"))
    assert "none of its 3 masks" in refusal(tmp_path, mask_dir=masks)
    (tmp_path / "empty").mkdir()
    assert "no pictures in this folder of masks" in refusal(tmp_path, mask_dir=tmp_path / "empty")
    assert "there is no such folder" in refusal(tmp_path, mask_dir=tmp_path / "nowhere")


@pytest.mark.parametrize(("width", "height"), [(64, 96), (96, 96), (100, 60), (48, 30)])
def test_a_mask_of_another_shape_is_refused(tmp_path: Path, width: int, height: int) -> None:
    noise(tmp_path / "pictures" / "a.png")
    save(tmp_path / "masks" / "a.png", white(width, height))
    told = refusal(tmp_path, mask_dir=tmp_path / "masks")
    assert f"the mask has {width} x {height} pixels, its picture 96 x 64" in told


@pytest.mark.parametrize(("width", "height"), [(96, 64), (48, 32), (192, 128), (32, 21)])
def test_a_mask_of_the_same_shape_is_taken_at_any_size(tmp_path: Path, width: int, height: int) -> None:
    noise(tmp_path / "pictures" / "a.png")
    save(tmp_path / "masks" / "a.png", white(width, height))
    assert look(tmp_path, mask_dir=tmp_path / "masks").items[0].mask is not None


def test_a_picture_without_alpha_channel_is_told_and_one_with_it_is_its_own_mask(tmp_path: Path) -> None:
    noise(tmp_path / "pictures" / "a.jpg")
    opaque = np.full((64, 96, 4), 255, dtype=np.uint8)
    file = save(tmp_path / "pictures" / "b.png", opaque)
    told = refusal(tmp_path, mask_alpha=True)
    assert "no alpha channel" in told and "a.jpg" in told and "b.png" not in told
    (tmp_path / "pictures" / "a.jpg").unlink()
    (item,) = look(tmp_path, mask_alpha=True).items
    assert item.mask == (file, item.digest, True, 0.1)


def test_a_mask_without_white_is_told_by_the_deep_check_and_when_it_is_read(tmp_path: Path) -> None:
    noise(tmp_path / "pictures" / "a.png")
    file = save(tmp_path / "masks" / "a.png", np.zeros((64, 96), dtype=np.uint8))
    options = SetOptions(
        images=tmp_path / "pictures", default_caption="", resolution=64, mask_dir=tmp_path / "masks"
    )
    assert not check_sets([options], 16).errors
    assert [one.kind for one in check_sets([options], 16, deep=True).errors] == ["black mask"]
    with pytest.raises(UserError, match="nothing of the mask is white"):
        mask_cells(file, False, Size(64, 64))
    file.write_bytes(file.read_bytes()[:60])
    assert [one.kind for one in check_sets([options], 16).errors] == ["unreadable"]


def test_masks_of_videos_and_two_masks_for_one_picture_are_refused() -> None:
    base = {"model.family": "wan", "model.task": "t2v", "data.videos": "v"}
    for key, value in (("data.mask_dir", "m"), ("data.mask_alpha", True)):
        with pytest.raises(UserError, match="masks are for pictures") as told:
            refuse_wrong_data(load_config(None, base={**base, key: value}).config)
        assert told.value.where == key
    both = {"model.family": "wan", "model.task": "t2v", "data.images": "p", "data.mask_dir": "m"}
    refuse_wrong_data(load_config(None, base=both).config)
    with pytest.raises(UserError, match="two masks"):
        refuse_wrong_data(load_config(None, base={**both, "data.mask_alpha": True}).config)
