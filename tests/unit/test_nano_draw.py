"""The captioned pictures the embedded model learns from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whitetuner.nano.draw import (
    COLOURS,
    NEW_SHAPE,
    NEW_WORD,
    PALETTE,
    SHAPES,
    all_captions,
    caption_of,
    coverage,
    draw_set,
    signed_distance,
    unseen,
)


def test_the_same_seed_draws_the_same_pictures():
    first, again, other = draw_set(40, 7), draw_set(40, 7), draw_set(40, 8)
    assert [d.caption for d in first] == [d.caption for d in again] != [d.caption for d in other]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, again, strict=True))
    assert {(d.image.shape, d.image.dtype) for d in first} == {((64, 64, 3), np.dtype(np.uint8))}


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), held_out=st.sampled_from([None, True, False]))
def test_a_caption_says_what_its_label_says(seed, held_out):
    for drawing in draw_set(8, seed, held_out=held_out):
        label, words = drawing.label, drawing.caption.split()
        assert label.colour != label.background
        assert {label.shape, label.colour, label.background} <= set(words)
        assert {word for word in words if word in ("small", "big")} == ({label.size} if label.size else set())
        assert held_out is None or unseen(label.shape, label.colour, label.background) is held_out


def test_every_caption_drawn_is_among_all_captions():
    known = list(all_captions())
    assert len(known) == len(set(known)) == 6 * 8 * 7 * 3 * 3
    assert {drawing.caption for drawing in draw_set(500, 1)} <= set(known)


def test_the_new_word_and_outline_stay_out_of_pretraining():
    assert not any(NEW_WORD in caption or NEW_SHAPE in caption for caption in all_captions())
    assert NEW_SHAPE not in SHAPES
    taught = draw_set(32, 0, (NEW_SHAPE,), NEW_WORD)
    assert all(NEW_WORD in drawing.caption and drawing.label.shape == NEW_SHAPE for drawing in taught)


def test_what_is_kept_out_still_shows_every_shape_and_colour():
    combinations = [(s, c, b) for s in SHAPES for c in COLOURS for b in COLOURS if b != c]
    kept_out = [combination for combination in combinations if unseen(*combination)]
    assert len(kept_out) == 30
    for place, names in enumerate((SHAPES, COLOURS, COLOURS)):
        for name in names:
            share = [unseen(*combination) for combination in combinations if combination[place] == name]
            assert 0 < sum(share) < len(share) / 5


def test_phrasings_and_sizes_are_said_as_written():
    assert caption_of("star", "red", "blue", "big ", 0) == "a big red star on a blue background"
    assert caption_of("star", "red", "blue", phrasing=1) == "a red star on blue"
    assert caption_of("zorp", "red", "blue", "small ", 2) == "blue background with a small red zorp"


@pytest.mark.parametrize("shape", [*SHAPES, NEW_SHAPE])
def test_coverage_is_the_area_inside_the_outline(shape):
    """Against the share of a fine grid of points inside: the anti-aliasing may round corners, no more."""
    radius, step = 20.0, 1 / 8
    fine = np.arange(0, 64, step) + step / 2
    x, y = np.meshgrid((fine - 32) / radius, (fine - 32) / radius)
    inside = signed_distance(shape, x[None], y[None])[0] < 0
    exact = inside.reshape(64, 8, 64, 8).mean(axis=(1, 3))
    middle = np.array([32.0])
    drawn = coverage(shape, middle, middle, np.array([radius]))[0]
    assert abs(drawn.sum() - exact.sum()) < 0.01 * exact.sum()
    assert np.abs(drawn - exact).max() < 0.35


def test_far_pixels_have_exactly_the_palette_colours():
    for drawing in draw_set(30, 3):
        assert tuple(drawing.image[0, 0]) == PALETTE[drawing.label.background]
        same = (drawing.image == np.array(PALETTE[drawing.label.colour])).all(axis=-1)
        assert same.sum() > 60
