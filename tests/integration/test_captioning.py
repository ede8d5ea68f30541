"""Captions from a vision-language model: missing ones are written, none is lost, and it goes on where it stopped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from whitetuner import cli
from whitetuner.captioning import caption_folder, open_reader
from whitetuner.data.samples import make_testdata
from whitetuner.errors import UserError
from whitetuner.families import registry

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen-Image-Edit folder: its text encoder is a Qwen2.5-VL."""
    folder = tmp_path_factory.mktemp("reader") / "model"
    registry.make_tiny("qwen-image", str(folder), "edit")
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    make_testdata("t2i", tmp_path / "pictures", 4, 0)
    found = sorted((tmp_path / "pictures").glob("*.txt"))
    for caption in found[1:]:
        caption.unlink()
    return tmp_path / "pictures"


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt*"))}


def test_missing_captions_are_written_and_those_that_are_there_stay(model: Path, pictures: Path) -> None:
    before = texts(pictures)
    found = caption_folder(pictures, model, trigger="zorp", max_tokens=4)
    assert len(found.written) == 3 and found.kept == 1 and not found.replaced and not found.failed
    after = texts(pictures)
    assert before.items() <= after.items() and len(after) == 4
    assert all(after[path.name].startswith("zorp") for path in found.written)
    again = caption_folder(pictures, model, max_tokens=4)
    assert not again.written and again.kept == 4 and texts(pictures) == after


def test_it_goes_on_where_it_stopped_and_writes_what_it_would_have(model: Path, pictures: Path) -> None:
    other = shutil.copytree(pictures, pictures.with_name("other"))
    whole = caption_folder(pictures, model, max_tokens=4)

    class Stop(Exception):
        pass

    def stop(done: int, total: int, picture: Path, text: str) -> None:
        raise Stop

    with pytest.raises(Stop):
        caption_folder(other, model, max_tokens=4, progress=stop)
    assert len(texts(other)) == 2
    rest = caption_folder(other, model, max_tokens=4)
    assert len(rest.written) == len(whole.written) - 1 and texts(other) == texts(pictures)


def test_overwriting_keeps_what_it_replaced(model: Path, pictures: Path) -> None:
    (before,) = texts(pictures).values()
    found = caption_folder(pictures, model, overwrite=True, trigger="zorp", max_tokens=3)
    assert len(found.written) == 4 and len(found.replaced) == 1
    assert found.replaced[0].read_text(encoding="utf-8") == before


def test_the_reader_sees_the_picture_as_the_class_itself_does(model: Path) -> None:
    """Another picture gives other scores for the next word, and a batch made by hand gives the same."""
    reader = open_reader(model, print)
    red, blue = (Image.new("RGB", (90, 64), colour) for colour in ("red", "blue"))
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        model / "text_encoder", dtype=torch.float32
    ).eval()
    scores = []
    for picture in (red, blue):
        given = reader.inputs(picture, "What is it?")
        count = int((given["input_ids"] == plain.config.image_token_id).sum())
        assert count == int(given["image_grid_thw"].prod()) // 4
        with torch.no_grad():
            ours, theirs = reader.model(**given).logits, plain(**given).logits
        assert torch.equal(ours, theirs)
        scores.append(ours[0, -1])
    assert not torch.allclose(scores[0], scores[1])
    reader.close()


def test_wrong_folders_are_told_before_anything_is_written(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    before = texts(pictures)
    for wrong, match in (
        (tmp_path / "none", "no folder"),
        (pictures, "config.json cannot be read"),
        (model / "vae", "no model that looks at pictures"),
    ):
        with pytest.raises(UserError, match=match):
            caption_folder(pictures, wrong)
    with pytest.raises(UserError):
        caption_folder(model / "vae", model)
    assert texts(pictures) == before


def test_the_word_itself(model: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pictures / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    words = ["caption", str(pictures), "--model", str(model), "--max-tokens", "2"]
    assert cli.main([*words, "--most", "1"]) in (0, 1)
    assert cli.main(words) == 1  # the broken one is named, the others are written
    printed = capsys.readouterr()
    assert "broken.png" in printed.err and "captions written" in printed.out
    assert cli.main([*words, "--max-tokens", "0"]) == 2


@pytest.mark.parametrize("ending", [".png", "png", ".JPG", ".", "", "..", "/../x", ".a/b", ".gif"])
def test_no_ending_writes_over_a_picture_or_elsewhere(ending: str, model: Path, pictures: Path) -> None:
    before = {path: path.read_bytes() for path in pictures.iterdir()}
    words = ["caption", str(pictures), "--model", str(model), "--overwrite", "--ext", ending]
    assert cli.main(words) == 2
    assert {path: path.read_bytes() for path in pictures.iterdir()} == before


def test_pictures_that_would_share_a_caption_are_told_and_left(model: Path, pictures: Path) -> None:
    one = next(
        path for path in pictures.iterdir() if path.suffix != ".txt" and not _caption_of(path).exists()
    )
    Image.new("RGB", (64, 64)).save(one.with_suffix(".bmp"))
    found = caption_folder(pictures, model, max_tokens=2)
    assert len(found.failed) == 2 and not found.replaced and not _caption_of(one).exists()


def test_pictures_of_any_shape_are_described(model: Path, tmp_path: Path) -> None:
    for name, size in (("dot", (1, 1)), ("wide", (3000, 2)), ("high", (2, 3000))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    assert len(caption_folder(tmp_path, model, max_tokens=2).written) == 3


@pytest.mark.parametrize(
    "words", [{"instruction": "<|image_pad|> what?"}, {"trigger": "a\udc80"}, {"instruction": "\udc80"}]
)
def test_words_that_would_break_the_prompt_are_refused(
    words: dict[str, str], model: Path, pictures: Path
) -> None:
    before = sorted(pictures.iterdir())
    with pytest.raises(UserError):
        caption_folder(pictures, model, max_tokens=2, **words)
    assert sorted(pictures.iterdir()) == before


def test_a_model_without_its_tokenizer_is_told(model: Path, pictures: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(model, tmp_path / name))

    shutil.rmtree(copy("none") / "tokenizer")
    for file in (copy("torn") / "tokenizer").glob("*.json"):
        file.write_text("{", encoding="utf-8")
    for file in (copy("eyes") / "processor").glob("*.json"):
        file.write_text("{", encoding="utf-8")
    for folder in (tmp_path / "none", tmp_path / "torn", tmp_path / "eyes", model / "text_encoder"):
        with pytest.raises(UserError, match="tokenizer or image processor cannot be read"):
            caption_folder(pictures, folder, max_tokens=2)


def _caption_of(picture: Path) -> Path:
    return picture.with_suffix(".txt")
