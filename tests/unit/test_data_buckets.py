"""Buckets never stretch, never enlarge unasked, keep to the stride, and crop less than two strides' worth."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from whitetuner.data.buckets import LONGEST_SHAPE, bucketing, choose, covers, cropped, shapes
from whitetuner.errors import UserError
from whitetuner.records import Size

sides = st.integers(1, 9000)
strides = st.sampled_from([8, 16, 32])
resolutions = st.sampled_from([64, 256, 512, 768, 1024, 1536])


@given(sides, sides, strides, st.lists(resolutions, min_size=1, max_size=3), st.booleans())
def test_every_size_keeps_the_rules(
    width: int, height: int, stride: int, wanted: list[int], upscale: bool
) -> None:
    rules = bucketing(wanted, stride, upscale=upscale)
    source = Size(width, height)
    size = choose(source, rules)
    assert size == choose(source, rules)
    if size is None:
        assert not upscale and min(width, height) < rules.shortest_px
        return
    assert size.width % stride == 0 and size.height % stride == 0 and size.frames == 1
    assert size.width * size.height <= max(wanted) ** 2
    assert min(size.width, size.height) >= rules.shortest_px
    assert upscale or covers(source, size)


@given(sides, sides, strides, resolutions)
def test_turning_the_picture_turns_the_size(width: int, height: int, stride: int, resolution: int) -> None:
    rules = bucketing(resolution, stride)
    one, other = choose(Size(width, height), rules), choose(Size(height, width), rules)
    if one is None or other is None:
        assert one is other
    elif width != height:
        assert (one.width, one.height) == (other.height, other.width)


@given(st.integers(1, 400), st.integers(1, 400), strides, st.sampled_from([256, 512, 1024]))
def test_at_most_two_strides_of_the_short_side_are_cropped(
    across: int, down: int, stride: int, resolution: int
) -> None:
    shape = across / down
    assume(1 / LONGEST_SHAPE <= shape <= LONGEST_SHAPE)
    size = choose(Size(across * 3000, down * 3000), bucketing(resolution, stride))
    assert size is not None
    short_side = resolution * min(shape, 1 / shape) ** 0.5
    assert cropped(Size(across * 3000, down * 3000), size) <= 2 * stride / short_side
    assert size.width * size.height >= resolution**2 * (
        1 - 2 * stride / short_side
    )  # area about the resolution squared


@given(sides, sides, strides, resolutions)
def test_no_other_bucket_of_the_resolution_would_crop_less(
    width: int, height: int, stride: int, resolution: int
) -> None:
    rules = bucketing(resolution, stride, upscale=True)
    source = Size(width, height)
    size = choose(source, rules)
    assert size is not None
    least = min(cropped(source, one) for one in shapes(resolution, stride, rules.shortest_px))
    assert cropped(source, size) == pytest.approx(least, abs=1e-8)


def test_a_picture_goes_to_the_largest_resolution_it_fills() -> None:
    rules = bucketing([512, 768, 1024], 16)
    assert choose(Size(4000, 4000), rules) == Size(1024, 1024)
    assert choose(Size(1000, 1000), rules) == Size(768, 768)
    assert choose(Size(767, 767), rules) == Size(512, 512)
    assert choose(Size(300, 200), rules) == Size(288, 192)
    assert choose(Size(300, 200), bucketing([512, 768], 16, upscale=True)) == Size(624, 416)
    assert choose(Size(300, 40), rules) is None


def test_a_resolution_off_the_stride_is_refused_with_its_neighbours() -> None:
    with pytest.raises(UserError, match="use 992 or 1024"):
        bucketing(1000, 32)
    with pytest.raises(UserError, match="use 16 or 32"):
        bucketing([512, 17], 16)
    with pytest.raises(UserError, match=r"use 16$"):
        bucketing(8, 16)


def test_tiny_models_have_their_buckets() -> None:
    assert choose(Size(640, 480), bucketing(64, 16)) in (Size(64, 48), Size(80, 48), Size(64, 64))
    assert choose(Size(64, 64), bucketing(64, 16)) == Size(64, 64)
