"""Edit sets: conditions found by name, in order, at their own shapes; everything that does not match is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from whitetuner.data.buckets import fit
from whitetuner.data.check import check_sets
from whitetuner.data.check_page import write_check_html
from whitetuner.data.media import crop_box
from whitetuner.data.pairs import edit_layout
from whitetuner.data.samples import make_testdata
from whitetuner.data.scan import Scan, SetOptions, scan
from whitetuner.errors import UserErrors
from whitetuner.records import Item, Size


class EditSet:
    """A set on disk, written picture by picture."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, 0

    def put(self, *names: str, size: tuple[int, int] = (96, 64)) -> None:
        """target/a.png, condition_1/a.png, ...; each of noise of its own."""
        for name in names:
            self.made += 1
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.RandomState(self.made).randint(0, 255, (size[1], size[0], 3), np.uint8)
            Image.fromarray(noise).save(path)

    def options(self, *conditions: str, **more: object) -> SetOptions:
        more = {"prompt": "make it blue", "resolution": 64, **more}
        folders = tuple(self.folder / name for name in conditions or ("condition_1",))
        return SetOptions(target=self.folder / "target", conditions=folders, **more)  # type: ignore[arg-type]

    def scan(self, *conditions: str, **more: object) -> Scan:
        return scan([self.options(*conditions, **more)], 16)

    def given(self, *conditions: str, **more: object) -> dict[str, list[str]]:
        """Target -> its conditions, folder and name."""
        return {item.target.name: names_of(item) for item in self.scan(*conditions, **more).items}

    def problems(self, *conditions: str, **more: object) -> dict[str, str]:
        report = check_sets([self.options(*conditions, **more)], 16)
        return {f"{one.kind}: {one.path.name}": one.level for one in report.problems}


def names_of(item: Item) -> list[str]:
    return [f"{path.parent.name}/{path.name}" for path in item.conditions]


@pytest.fixture
def edit(tmp_path: Path) -> EditSet:
    return EditSet(tmp_path)


def test_conditions_come_by_folder_and_then_by_number(edit: EditSet) -> None:
    edit.put("target/a.png", "target/b.png", "condition_1/a.jpg", "condition_1/b.png")
    edit.put("condition_2/a_10.png", "condition_2/a_2.png", "condition_2/a_1.png", "condition_2/b.png")
    assert edit.given("condition_1", "condition_2") == {
        "a.png": ["condition_1/a.jpg", "condition_2/a_1.png", "condition_2/a_2.png", "condition_2/a_10.png"],
        "b.png": ["condition_1/b.png", "condition_2/b.png"],
    }
    assert edit.given("condition_2", "condition_1")["b.png"] == ["condition_2/b.png", "condition_1/b.png"]


def test_a_target_really_named_so_wins_over_the_number(edit: EditSet) -> None:
    edit.put("target/a.png", "target/a_1.png")
    edit.put("condition_1/a.png", "condition_1/a_1.png", "condition_1/a_2.png", "condition_1/a_1_7.png")
    assert edit.given() == {
        "a.png": ["condition_1/a.png", "condition_1/a_2.png"],
        "a_1.png": ["condition_1/a_1.png", "condition_1/a_1_7.png"],
    }


def test_names_match_whatever_their_capitals_and_accents(edit: EditSet) -> None:
    edit.put("target/Caf\u00e9.PNG", "target/图.png", "condition_1/cafe\u0301_2.jpg", "condition_1/图_1.png")
    assert edit.given() == {
        "Caf\u00e9.PNG": ["condition_1/cafe\u0301_2.jpg"],
        "图.png": ["condition_1/图_1.png"],
    }


def test_sub_folders_are_matched_too_when_asked(edit: EditSet) -> None:
    edit.put("target/x/a.png", "target/y/a.png", "condition_1/x/a.png", "condition_1/y/a_1.png")
    edit.put("condition_1/y/a_2.png")
    found = {item.target.parent.name: names_of(item) for item in edit.scan(recursive=True).items}
    assert found == {"x": ["x/a.png"], "y": ["y/a_1.png", "y/a_2.png"]}


def test_captions_stand_beside_the_targets_or_one_prompt_is_for_all(edit: EditSet) -> None:
    edit.put("target/a.png", "condition_1/a.png")
    assert edit.scan().items[0].caption == "make it blue"
    with pytest.raises(UserErrors, match='set prompt = "'):
        edit.scan(prompt=None)
    (edit.folder / "target" / "a.txt").write_text("make it red", encoding="utf-8")
    assert edit.scan(prompt=None, trigger="sks").items[0].caption == "sks, make it red"


def test_captions_that_a_prompt_hides_are_noted(edit: EditSet) -> None:
    edit.put("target/a.png", "condition_1/a.png")
    assert edit.problems() == {}
    (edit.folder / "target" / "a.txt").write_text("make it red", encoding="utf-8")
    assert edit.problems() == {"unused captions: target": "note"}


def test_a_condition_that_is_too_small_tells_what_becomes_of_its_target(edit: EditSet) -> None:
    edit.put("target/a.png", "target/b.png", "condition_1/b.png")
    edit.put("condition_1/a.png", size=(3000, 16))
    with pytest.raises(UserErrors, match='too_small = "skip"'):
        edit.scan()
    rest = edit.scan(too_small="skip")
    assert [item.target.name for item in rest.items] == ["b.png"]
    assert any("its target is left out" in note for note in rest.notes())


def test_each_condition_keeps_its_own_shape(edit: EditSet) -> None:
    edit.put("target/a.png", size=(640, 640))
    edit.put("condition_1/a_1.png", size=(1200, 400))
    edit.put("condition_1/a_2.png", size=(50, 90))
    (item,) = edit.scan(resolution=128).items
    assert item.size == Size(128, 128)
    assert item.condition_sizes == (Size(208, 64), Size(48, 80))  # an area of 128 x 128; not enlarged
    assert edit.scan(resolution=128, upscale=True).items[0].condition_sizes[1] == Size(80, 160)
    assert edit.scan(resolution=128, condition_resolution=64).items[0].condition_sizes == (
        Size(96, 32),
        Size(32, 80),
    )
    assert edit.scan(resolution=[64, 128]).items[0].condition_sizes == item.condition_sizes


SIDES = st.integers(16, 5000)


@given(SIDES, SIDES, st.sampled_from([64, 512, 1024]), st.sampled_from([8, 16, 32]), st.booleans())
def test_less_than_a_stride_is_cut_off_and_nothing_enlarged_unasked(
    width: int, height: int, resolution: int, stride: int, upscale: bool
) -> None:
    source = Size(width, height)
    size = fit(source, resolution, stride, upscale)
    scale = resolution / (width * height) ** 0.5
    scale = scale if upscale else min(1.0, scale)
    if size is None:
        assert min(width, height) * scale < stride + 1e-3
        return
    assert size.width % stride == 0 and size.height % stride == 0
    assert size.width * size.height <= resolution * resolution
    assert upscale or (size.width <= width and size.height <= height)
    left, top, right, bottom = crop_box(source, size)
    assert (width - (right - left)) * scale < stride + 1e-3
    assert (height - (bottom - top)) * scale < stride + 1e-3


def test_everything_that_does_not_match_is_listed(edit: EditSet) -> None:
    edit.put("target/a.png", "target/b.png", "target/c.png")
    edit.put("condition_1/a.png", "condition_1/c.png", "condition_1/stray.png", "condition_1/b_x.png")
    edit.put("condition_2/a.png")
    assert edit.problems("condition_1", "condition_2") == {
        "no condition: b.png": "error",
        "orphan condition: stray.png": "warning",
        "orphan condition: b_x.png": "warning",
        "fewer conditions: c.png": "warning",
    }
    with pytest.raises(UserErrors, match=r"b\.png.*no given picture"):
        edit.scan("condition_1", "condition_2")


def test_mismatched_names_list_the_first_five(edit: EditSet) -> None:
    for number in range(7):
        edit.put(f"target/{number}.png", f"condition_1/in{number}.png", f"condition_2/{number}.png")
    with pytest.raises(UserErrors) as told:
        edit.scan("condition_2", "condition_1")
    assert "in0, in1, in2, in3, in4 here, 0, 1, 2, 3, 4 in the target folder" in str(told.value)
    (edit.folder / "condition_1" / "in0.png").rename(edit.folder / "condition_1" / "0.png")
    with pytest.raises(UserErrors) as told:
        edit.scan()
    assert "1.png, 2.png, 3.png, 4.png, 5.png (+1)" in str(told.value)


def test_files_that_cannot_be_told_apart_or_read_are_errors(edit: EditSet) -> None:
    edit.put("target/a.png", "target/b.png", "target/b.jpg", "target/c.png", "target/d.png")
    edit.put("condition_1/a.png", "condition_1/a.jpg", "condition_1/b.png", "condition_1/c.png")
    edit.put("condition_1/d.png", size=(900, 10))
    torn = edit.folder / "condition_1" / "c.png"
    torn.write_bytes(torn.read_bytes()[:-200])
    (edit.folder / "condition_1" / "c_1.gif").write_bytes(b"GIF89a")
    assert edit.problems() == {
        "same stem: b.png": "error",
        "same stem: b.jpg": "error",
        "same stem: a.png": "error",
        "same stem: a.jpg": "error",
        "unreadable: c.png": "error",
        "too small: d.png": "error",
        "not read: c_1.gif": "warning",
    }
    assert edit.problems(too_small="skip")["too small: d.png"] == "warning"


def test_a_folder_named_twice_is_an_error(edit: EditSet) -> None:
    edit.put("target/a.png", "condition_1/a.png")
    assert edit.problems("condition_1", "target") == {"same folder: target": "error"}
    assert edit.problems("condition_1", "condition_1") == {"same folder: condition_1": "error"}


def test_missing_and_empty_condition_folders_are_told(edit: EditSet) -> None:
    edit.put("target/a.png", "condition_1/a.png")
    (edit.folder / "empty").mkdir()
    for name, words in (("nowhere", "no such folder"), ("empty", "no pictures in this condition folder")):
        with pytest.raises(UserErrors, match=words):
            edit.scan("condition_1", name)


def test_conditions_are_part_of_what_is_learned_and_names_are_not(edit: EditSet) -> None:
    edit.put("target/a.png", "target/b.png", "condition_1/a.png", "condition_1/b.png")
    before = edit.scan()
    for name in ("target", "condition_1"):
        (edit.folder / name / "a.png").rename(edit.folder / name / "z.png")
    assert edit.scan().digest() == before.digest()
    assert edit.scan(condition_resolution=32).digest() != before.digest()
    edit.put("condition_1/b.png")
    after = edit.scan()
    assert after.digest() != before.digest()
    assert {item.id for item in after.items} == {item.id for item in before.items}


def test_equal_targets_of_other_conditions_are_no_duplicates(edit: EditSet) -> None:
    edit.put("target/a.png", "condition_1/a.png", "condition_1/b.png")
    (edit.folder / "target" / "b.png").write_bytes((edit.folder / "target" / "a.png").read_bytes())
    assert edit.problems() == {}
    (edit.folder / "condition_1" / "b.png").write_bytes((edit.folder / "condition_1" / "a.png").read_bytes())
    assert edit.problems() == {"duplicate: b.png": "warning"}


def test_a_bare_folder_is_recognised_by_its_sub_folders(edit: EditSet) -> None:
    edit.put("Target/a.png", "condition_2/a.png", "condition_10/a.png", "other/a.png")
    found = edit_layout(edit.folder)
    assert found is not None and found[0].name == "Target"
    assert [path.name for path in found[1]] == ["condition_2", "condition_10"]
    assert edit_layout(edit.folder / "other") is None
    edit.put("target_2/a.png")
    assert edit_layout(edit.folder) is None


def test_the_check_of_the_test_data_is_clean_and_shows_the_given_pictures(tmp_path: Path) -> None:
    make_testdata("edit", tmp_path / "data", 4)
    layout = edit_layout(tmp_path / "data")
    assert layout is not None
    report = check_sets([SetOptions(target=layout[0], conditions=layout[1], resolution=256)], 16)
    assert not report.problems and report.usable == 4 and report.given == [(2, 3), (3, 1)]
    assert report.as_json()["conditions"] == {"2": 3, "3": 1}
    assert "given pictures (conditions) of the targets: 3 with 2, 1 with 3" in report.as_text()
    page = write_check_html(report, tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") == 4 + 3 * 2 + 3
