"""The pairs the small edit model learns from, their judge, and its training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from whitetuner.nano import edits, pretrain_edit
from whitetuner.nano.builtin import MAX_SEQUENCE_LENGTH
from whitetuner.nano.check import look
from whitetuner.nano.draw import NEW_SHAPE, NEW_WORD
from whitetuner.nano.fit import Plan
from whitetuner.nano.score import load_pipeline

ALL = (*edits.KINDS, *edits.NEW_KINDS)


def test_the_same_seed_gives_the_same_edits() -> None:
    assert edits.edits(40, 3, ALL) == edits.edits(40, 3, ALL) != edits.edits(40, 4, ALL)


def test_an_edit_changes_what_it_says_and_nothing_else() -> None:
    changed = {"colour": "colour", "background": "background", "mirror": "x_px", edits.NEW_KIND: "shape"}
    for edit in edits.edits(80, 5, (*edits.KINDS, edits.NEW_KIND)):
        key = changed[edit.kind]
        assert edit.wanted == replace(edit.given, **{key: getattr(edit.wanted, key)}) != edit.given
        assert edit.wanted.colour != edit.wanted.background
    words = {edit.instruction for edit in edits.edits(400, 6)}
    assert words == set(edits.instructions())


def test_swapping_twice_gives_the_picture_back() -> None:
    for edit in edits.edits(8, 5, ("swap",)):
        assert (
            replace(edit.wanted, colour=edit.wanted.background, background=edit.wanted.colour) == edit.given
        )


def test_the_new_edits_are_not_in_the_pretraining() -> None:
    assert not any(new in words for words in edits.instructions() for new in (NEW_WORD, "swap"))
    assert all(edit.wanted.shape == NEW_SHAPE for edit in edits.edits(4, 1, (edits.NEW_KIND,)))


def test_mirrored_pictures_are_mirrored_to_the_pixel() -> None:
    asked = edits.edits(12, 2, ("mirror",))
    given = edits.pictures([edit.given for edit in asked])
    wanted = edits.pictures([edit.wanted for edit in asked])
    assert np.abs(given[:, :, ::-1].astype(int) - wanted).max() <= 1
    assert all(abs(edit.given.x_px - edit.wanted.x_px) > 13 for edit in asked)


@pytest.mark.parametrize("kind", ALL)
def test_the_judge_calls_the_wanted_picture_right_and_the_given_one_wrong(kind: str) -> None:
    asked = edits.edits(30, 9, (kind,))
    wanted, given = (edits.pictures([getattr(edit, key) for edit in asked]) for key in ("wanted", "given"))
    assert all(edits.right(picture, edit) for picture, edit in zip(wanted, asked, strict=True))
    assert not any(edits.right(picture, edit) for picture, edit in zip(given, asked, strict=True))


def test_what_stands_elsewhere_is_wrong() -> None:
    (edit,) = edits.edits(1, 9, ("colour",))
    moved = replace(edit.wanted, y_px=edit.wanted.y_px + 5)
    assert not edits.right(edits.pictures([moved])[0], edit)
    assert look(edits.pictures([moved])[0]).shape == edit.wanted.shape


def test_every_instruction_fits_the_text_that_the_model_reads() -> None:
    tokenizer = load_pipeline().tokenizer
    for words in (*edits.instructions(), f"{NEW_WORD} it", "swap it"):
        message = [{"role": "user", "content": words}]
        text = tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        assert len(tokenizer(text)["input_ids"]) <= MAX_SEQUENCE_LENGTH, words


def test_two_steps_leave_a_transformer_and_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrain_edit, "BATCH", 2)
    out = ["--out", str(tmp_path), "--threads", "1"]
    for steps, more in ((1, []), (2, ["--resume"])):
        options = pretrain_edit._options([*out, *more])
        pretrain_edit.pretrain(options, Plan(steps, 1, 0.5, 0.9), count=2, n=3)
    assert torch.load(tmp_path / "state" / "edit.pt")["step"] == 2
    assert (tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors").exists()
    assert "| mirror it | " in capsys.readouterr().out
    assert "2 of 2 steps" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert pretrain_edit.main(out) != 0
