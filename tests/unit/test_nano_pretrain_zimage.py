"""The small Z-Image's training: the autoencoder carried over, two steps, a folder that loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline
from PIL.Image import Image

from whitetuner.nano import pretrain_zimage, vae, zimage_forward
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


def test_the_forward_without_lists_says_what_the_class_says() -> None:
    """Both in float32: the order of sums differs, no more."""
    model = pretrain_zimage.new_transformer(0)
    generator = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(model.all_final_layer["2-1"].linear.weight, std=0.1, generator=generator)
    latents = torch.randn(4, 8, 16, 16, generator=generator)
    said = [torch.randn(length, 48, generator=generator) for length in (12, 17, 20, 32)]
    clock = torch.tensor([0.0, 0.2, 0.7, 0.98])
    with torch.no_grad():
        wanted = model(list(latents.unsqueeze(2)), clock, said, return_dict=False)[0]
        tokens = zimage_forward.tokens_of(latents)
        drawn = zimage_forward.velocity(
            model, tokens, clock, *zimage_forward.padded(said), zimage_forward.turns(model, 8)
        )
    torch.testing.assert_close(drawn, zimage_forward.tokens_of(torch.stack(wanted).squeeze(2)))
    assert drawn.std() > 0.1


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
    return pretrain_zimage.draw_each(pipeline, ["a red circle on blue"], 0)[0]
