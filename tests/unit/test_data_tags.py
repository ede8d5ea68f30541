"""Captions of tags in other orders: what is a tag, which orders there are, and that they follow from the caption alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from whitetuner.data.inputs import Inputs
from whitetuner.data.loader import chosen_order
from whitetuner.data.scan import Scan, SetOptions, scan
from whitetuner.data.tags import orders_of, tags

a_tag = st.text(st.characters(exclude_characters=",，\"'“”‘’「」『』", exclude_categories=["Cs"]), min_size=1)
captions = st.lists(a_tag.map(str.strip).filter(bool), max_size=8).map(", ".join)


@settings(max_examples=200, deadline=None)
@given(captions, st.integers(0, 12), st.integers(0, 9))
def test_orders_hold_the_same_tags_the_first_in_place_each_once_and_never_the_written_one(
    caption: str, count: int, keep: int
) -> None:
    written, found = tags(caption), orders_of(caption, count, keep)
    assert found == orders_of(caption, count, keep) and len(found) <= count
    assert len(set(found)) == len(found) and caption not in found
    for order in found:
        assert sorted(tags(order)) == sorted(written) and tags(order)[:keep] == written[:keep]
        assert tags(order) != written
    assert (
        orders_of(caption, max(0, count - 1), keep) == found[: max(0, count - 1)]
    )  # more are added, none change


def test_all_orders_there_are_are_found_and_equal_tags_make_no_more() -> None:
    assert len(orders_of("a, b, c, d", 64, 0)) == 23 and len(orders_of("a, b, c, d", 64, 1)) == 5
    assert len(orders_of("a, b, b, b", 64, 0)) == 3
    assert orders_of("a, b", 9, 0) == ("b, a",)
    assert orders_of('x", x", y, x"', 64, 0)  # two orders of these read alike: fewer, and an end
    assert (
        orders_of("a, b", 9, 1)
        == orders_of("a", 9, 0)
        == orders_of("", 9, 0)
        == orders_of("a, a", 9, 0)
        == ()
    )


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ('a sign, "hello, world", blue', ["a sign", '"hello, world"', "blue"]),
        ("a sign 'one, two', it's late, o'clock", ["a sign 'one, two'", "it's late", "o'clock"]),
        ("猫，沙发，“你好，世界”，「甲，乙」", ["猫", "沙发", "“你好，世界”", "「甲，乙」"]),
        ('a, ,, b, "open', ["a", "b", '"open']),
        (" a\nb , c ", ["a\nb", "c"]),
    ],
)
def test_commas_in_quotes_do_not_separate_and_chinese_ones_do(caption: str, found: list[str]) -> None:
    assert tags(caption) == found


def test_chinese_captions_keep_their_commas() -> None:
    assert set(orders_of("猫，沙发，窗", 9, 1)) == {"猫，窗，沙发"}


def look(folder: Path, **more: object) -> Scan:
    return scan([SetOptions(images=folder, resolution=64, **more)], 16)  # type: ignore[arg-type]


def test_items_carry_their_orders_behind_the_trigger_and_the_digest_tells_them(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("sofa, window, evening", encoding="utf-8")
    plain, shuffled = look(tmp_path), look(tmp_path, caption_shuffles=4, trigger="mika")
    (item,) = shuffled.items
    assert plain.items[0].orders == () and len(item.orders) == 4
    assert all(order.startswith("mika, ") for order in item.orders)
    told = [look(tmp_path, trigger="mika", caption_shuffles=count).digest() for count in (0, 3, 4)]
    assert len({*told, plain.digest()}) == 4
    assert look(tmp_path, trigger="mika", caption_shuffles=4, caption_keep=2).digest() not in told
    texts = [Inputs.of(item, order=order).caption for order in range(5)]
    assert texts == ["mika, sofa, window, evening", *item.orders]
    assert Inputs.of(item, uncond=True, order=2).caption == ""


def test_visits_take_every_order_equally_often_by_seed_item_and_visit(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a, b, c, d", encoding="utf-8")
    (item,) = look(tmp_path, caption_shuffles=3).items
    drawn = [chosen_order(7, item, visit) for visit in range(4000)]
    assert drawn == [chosen_order(7, item, visit) for visit in range(4000)]
    assert drawn != [chosen_order(8, item, visit) for visit in range(4000)]
    counts = np.bincount(drawn, minlength=4)
    assert len(counts) == 4 and abs(counts - 1000).max() < 137  # five deviations of 27.4
    (plain,) = look(tmp_path).items
    assert {chosen_order(7, plain, visit) for visit in range(9)} == {0}
