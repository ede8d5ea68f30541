"""The small Z-Image's training: the autoencoder carried over, two steps, a folder that loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline
from PIL.Image import Image

from whitetuner.nano import pretrain_zimage, vae
from whitetuner.nano.draw import draw_set
from whitetuner.nano.fit import Plan
from whitetuner.nano.score import load_pipeline


def test_the_autoencoder_is_the_embedded_one() -> None:
    given = load_pipeline().vae
    plain = pretrain_zimage.plain_vae(given, 0)
    pictures = torch.stack([vae.as_tensor(one.image) for one in draw_set(4, 1)])
    torch.testing.assert_close(vae.reconstruct(plain, pictures), vae.reconstruct(given, pictures))
    latents = plain.encode(pictures).latent_dist.mode()
    scaled = (latents - plain.config.shift_factor) * plain.config.scaling_factor
    assert 0.6 < scaled.std().item() < 1.5


@pytest.mark.slow
def test_two_steps_leave_a_folder_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain_zimage.dit, "BATCH", 2)
    out = ["--out", str(tmp_path), "--threads", "1"]
    for steps, more in ((1, []), (2, ["--resume"])):
        options = pretrain_zimage._options([*out, *more])
        pretrain_zimage.pretrain(options, Plan(steps, 1, 0.5, 0.9), pictures=8, n=1)
    assert torch.load(tmp_path / "state" / "zimage.pt")["step"] == 2
    pipeline = ZImagePipeline.from_pretrained(tmp_path / "model")
    assert pipeline_image(pipeline).size == (64, 64)
    assert pretrain_zimage.main(out) != 0


def pipeline_image(pipeline: ZImagePipeline) -> Image:
    return pretrain_zimage.draw(pipeline, ["a red circle on blue"], 0)[0]
