"""The small WAN: what judges its clips, its words, its training that goes on to the bit, and runs on it from the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from safetensors.torch import load_file

from whitetuner.cli import main
from whitetuner.config.load import dump_config, load_config
from whitetuner.models import model_paths
from whitetuner.nano import pretrain_wan, wan_dit, wan_parts, wan_vae
from whitetuner.nano.builtin import builtin_path, shared_parts
from whitetuner.nano.fit import Plan
from whitetuner.nano.motions import (
    FRAMES,
    KINDS,
    NEW_KIND,
    SIDE_PX,
    caption_of,
    clips,
    frames,
    moved,
    right_clip,
)
from whitetuner.nano.score import generators

NAME = "builtin:nano-wan"


@pytest.fixture(scope="module")
def pipeline() -> WanImageToVideoPipeline:
    found = WanImageToVideoPipeline.from_pretrained(builtin_path(NAME), torch_dtype=torch.float32)
    found.set_progress_bar_config(disable=True)
    return found


def test_the_checker_calls_clean_clips_right_and_those_of_others_wrong() -> None:
    asked = [*clips(7, 3), *clips(2, 4, (NEW_KIND,))]
    drawn = frames(asked)
    assert all(right_clip(film, clip) for film, clip in zip(drawn, asked, strict=True))
    assert not any(right_clip(film, clip) for film, clip in zip(drawn, [*asked[1:], asked[0]], strict=True))


def test_the_checker_tells_motions_of_one_shape_apart() -> None:
    scene = clips(1, 5)[0].scenes[0]
    wanted = [moved(scene, kind) for kind in ("up", "stay", NEW_KIND)]
    drawn = frames(wanted)
    for i, clip in enumerate(wanted):
        assert [j for j, film in enumerate(drawn) if right_clip(film, clip)] == [i]


def test_a_clip_begins_with_what_is_given_and_stays_in_the_picture() -> None:
    for clip in [*clips(70, 6), *clips(10, 6, (NEW_KIND,))]:
        assert len(clip.scenes) == FRAMES
        for scene in clip.scenes:
            assert all(scene.radius_px <= place <= 64 - scene.radius_px for place in (scene.x_px, scene.y_px))


def test_every_word_is_spelt_in_pieces_that_are_known() -> None:
    tokenizer = wan_parts.new_tokenizer()
    for kind in (*KINDS, NEW_KIND):
        ids = tokenizer(caption_of(kind)).input_ids
        assert tokenizer.unk_token_id not in ids
        assert len(ids) < wan_dit.SHORT
    assert len(tokenizer(caption_of("left")).input_ids) == 4


def test_the_autoencoder_learns_from_pixels_and_passes_what_goes_beyond_them() -> None:
    model = wan_vae.new_vae(0)
    given = wan_vae.training_clips(torch.Generator().manual_seed(1))
    assert given.shape == (wan_vae.BATCH, 3, FRAMES, SIDE_PX, SIDE_PX) and given.abs().max() <= 1
    with torch.no_grad():
        latents = model.encode(given[:1]).latent_dist.mode()
        told = wan_vae.decoded(model, latents)
        torch.testing.assert_close(told.clamp(-1, 1), model.decode(latents).sample)


def test_it_is_whole_by_itself_and_a_config_names_it() -> None:
    assert shared_parts(NAME) == {}
    values = {"model.family": "wan", "model.task": "i2v", "model.path": NAME, "data.videos": "v"}
    config = load_config(None, base={**values, "run.steps": 1}).config
    assert model_paths(config).folder == builtin_path(NAME)


def test_clips_drawn_side_by_side_are_those_of_the_pipeline(pipeline: WanImageToVideoPipeline) -> None:
    asked = clips(2, 7)
    drawn = pretrain_wan.animate(pipeline, asked, 3, steps=2)[0]
    whole = pipeline(
        image=Image.fromarray(frames(asked)[0, 0]),
        prompt=asked[0].caption,
        height=SIDE_PX,
        width=SIDE_PX,
        num_frames=FRAMES,
        num_inference_steps=2,
        guidance_scale=1.0,
        generator=generators(3, [0]),
        output_type="pil",
    ).frames[0]
    for one, other in zip(drawn, whole, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


def test_it_moves_things_as_it_is_told_and_does_not_know_the_new_word(
    pipeline: WanImageToVideoPipeline,
) -> None:
    assert pretrain_wan.scores(pipeline, 14, 511)["all"] >= 0.75
    assert pretrain_wan.scores(pipeline, 3, 512, (NEW_KIND,))[NEW_KIND] < 0.2


@pytest.mark.slow
def test_a_training_that_was_cut_goes_on_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wan_vae, "BATCH", 4)
    monkeypatch.setattr(wan_vae, "MEASURED", 1)
    monkeypatch.setattr(wan_dit, "BATCH", 2)
    first, plan = Plan(2, 1, 0.5, 0.9), Plan(2, 1, 0.5, 0.9)

    def train(folder: Path, *more: str) -> None:
        options = pretrain_wan._options(["--out", str(folder), "--threads", "1", *more])
        pretrain_wan.pretrain(options, first, plan, count=14, n=7)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole)
    left = iter([True, False, True, False])
    steps = pretrain_wan.Fit._step

    def dying(self: pretrain_wan.Fit, loss: torch.Tensor) -> float:
        """The second step of each stage is never done; what is on disk is the first."""
        if not next(left):
            self.save()
            raise KeyboardInterrupt
        return steps(self, loss)

    monkeypatch.setattr(pretrain_wan.Fit, "_step", dying)
    with pytest.raises(KeyboardInterrupt):
        train(cut)
    monkeypatch.setattr(pretrain_wan.Fit, "_step", steps)
    train(cut, "--stage", "vae", "--resume")
    monkeypatch.setattr(pretrain_wan.Fit, "_step", dying)
    with pytest.raises(KeyboardInterrupt):
        train(cut, "--resume")
    monkeypatch.setattr(pretrain_wan.Fit, "_step", steps)
    train(cut, "--resume")
    for part in ("vae", "transformer"):
        one, other = (
            load_file(folder / "model" / part / "diffusion_pytorch_model.safetensors")
            for folder in (whole, cut)
        )
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert pretrain_wan.main(["--out", str(cut)]) != 0


@pytest.mark.slow
def test_a_run_and_a_sample_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.learning.small_wan import save_clip

    (tmp_path / "clips").mkdir()
    for number, clip in enumerate(clips(4, 8)):
        save_clip(clip, tmp_path / "clips" / f"{number}.mkv")
    Image.fromarray(frames(clips(1, 9))[0, 0]).save(tmp_path / "first.png")
    values = {
        "run.name": "run",
        "run.output_dir": str(tmp_path / "out"),
        "run.steps": 2,
        "model.family": "wan",
        "model.task": "i2v",
        "model.path": NAME,
        "data.videos": str(tmp_path / "clips"),
        "data.num_frames": FRAMES,
        "data.resolution": SIDE_PX,
        "data.batch_size": 2,
        "memory.device": "cpu",
        "log.tensorboard": False,
    }
    file = tmp_path / "c.toml"
    file.write_text(dump_config(load_config(None, base=values).config), encoding="utf-8")
    for words in (["check", str(file)], ["plan", str(file)], ["train", str(file)]):
        assert main(words) == 0, capsys.readouterr()
    run = next(path.parent for path in (tmp_path / "out").rglob("config.toml"))
    for model in (NAME, str(run)):
        out = tmp_path / "sheet.png"
        out.unlink(missing_ok=True)
        words = [
            "--prompt",
            "it moves left",
            "--image",
            str(tmp_path / "first.png"),
            "--steps",
            "2",
            "--cfg",
            "1",
        ]
        assert main(["sample", model, *words, "--out", str(out)]) == 0, capsys.readouterr()
        assert out.is_file()
