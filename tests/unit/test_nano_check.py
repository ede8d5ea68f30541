"""The judge of the embedded model's pictures."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from whitetuner.nano.check import UNKNOWN, colour_name, judge, look
from whitetuner.nano.draw import NEW_SHAPE, NEW_WORD, PALETTE, SHAPES, draw_set


def _share_right(drawings, images):
    return np.mean([judge(image, drawing.label).all for drawing, image in zip(drawings, images, strict=True)])


@pytest.fixture(scope="module")
def drawings():
    return [*draw_set(160, 11), *draw_set(40, 12, (NEW_SHAPE,), NEW_WORD)]


def test_clean_drawings_are_all_right(drawings):
    verdicts = [judge(drawing.image, drawing.label) for drawing in drawings]
    assert all(verdict.all and verdict.size for verdict in verdicts)
    assert min(look(drawing.image).fit for drawing in drawings) > 0.95


def test_pixel_noise_changes_no_answer_until_it_is_heavy(drawings):
    noise = np.random.default_rng(0)
    for deviation, least in ((8, 1.0), (16, 1.0), (30, 0.95)):
        noisy = [np.clip(d.image + noise.normal(0, deviation, d.image.shape), 0, 255) for d in drawings]
        assert _share_right(drawings, noisy) >= least


def test_softness_changes_no_answer(drawings):
    soft = [Image.fromarray(drawing.image).filter(ImageFilter.GaussianBlur(1.2)) for drawing in drawings]
    assert _share_right(drawings, soft) >= 0.98


def test_the_captions_of_other_pictures_are_nearly_never_right(drawings):
    """By chance 1 in 6 * 8 * 7 = 336."""
    known = drawings[:160]
    shifted = [known[i - 1].image for i in range(len(known))]
    assert _share_right(known, shifted) <= 0.02


def test_the_new_outline_is_no_known_one_and_the_reverse(drawings):
    names = [look(drawing.image).shape for drawing in drawings]
    assert set(names[160:]) == {NEW_SHAPE}
    assert set(names[:160]) == set(SHAPES)


def test_what_is_no_drawing_gets_no_name():
    rng = np.random.default_rng(0)
    flat = look(np.full((64, 64, 3), PALETTE["red"]))
    assert (flat.shape, flat.colour, flat.background) == (UNKNOWN, UNKNOWN, "red")
    assert look(rng.integers(0, 256, (64, 64, 3))).shape == UNKNOWN
    assert colour_name(np.array([128, 128, 128])) == UNKNOWN
    bar = np.full((64, 64, 3), PALETTE["red"])
    bar[28:36, 4:60] = PALETTE["blue"]
    assert look(bar).shape == UNKNOWN
    assert (look(bar).colour, look(bar).background) == ("blue", "red")


def test_stray_specks_are_forgiven(drawings):
    rng = np.random.default_rng(0)
    specked = []
    for drawing in drawings:
        image = drawing.image.copy()
        for row, column in rng.integers(4, 60, (6, 2)):
            image[row, column] = PALETTE[drawing.label.colour]
        specked.append(image)
    assert _share_right(drawings, specked) >= 0.98


def test_edge_width_measures_blur_in_pixels(drawings):
    """A box blur of odd width w turns a hard edge into a ramp about w wide; a clean edge is about one."""
    circles = [drawing for drawing in drawings if drawing.label.shape == "circle"]

    def width(reach):
        images = [Image.fromarray(d.image) for d in circles]
        images = [image.filter(ImageFilter.BoxBlur(reach)) if reach else image for image in images]
        return np.mean([look(image).edge_px for image in images])

    widths = [width(reach) for reach in (0, 1, 2)]
    assert widths[0] == pytest.approx(1, abs=0.3)
    assert widths[1] == pytest.approx(3, rel=0.25)
    assert widths[2] == pytest.approx(5, rel=0.25)


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(ValueError, match="64 x 64"):
        look(np.zeros((32, 32, 3)))
