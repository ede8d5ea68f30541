"""Our loss is that of diffusers' own training examples, given the same picture, prompt, noise and noise level.

The formula of each (examples/dreambooth/train_dreambooth_lora_flux2_klein.py, ..._qwen_image.py, ..._z_image.py of
huggingface/diffusers, commit 58eb52c) is written down here once more, over diffusers' own classes: vae.encode, its
normalisation, x_t = (1 - sigma) x + sigma noise, the model called as the example calls it, mean square of
prediction - (noise - x), no weighting.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline, QwenImagePipeline, ZImagePipeline
from subjects import Subject
from torch import Tensor

from whitetuner.diffusion.sigmas import SigmaSettings
from whitetuner.families import registry
from whitetuner.families.contract import quiet
from whitetuner.family import EncodeInput
from whitetuner.train.step import StepSettings, loss_at

Script = Callable[[Any, EncodeInput, Tensor, float], float]


def pixels(given: EncodeInput) -> Tensor:
    """(1, 3, H, W) in [-1, 1]."""
    array = np.asarray(given.target[0], dtype=np.float32).transpose(2, 0, 1)
    return torch.from_numpy(array)[None] / 127.5 - 1


def mean_square(prediction: Tensor, noise: Tensor, x: Tensor) -> float:
    return float((prediction.float() - (noise - x).float()).square().reshape(len(x), -1).mean(1).mean())


def flux2_klein(pipe: Any, given: EncodeInput, noise: Tensor, sigma: float) -> float:
    embeds, text_ids = pipe.encode_prompt(prompt=given.caption, max_sequence_length=64)
    x = pipe._patchify_latents(pipe.vae.encode(pixels(given)).latent_dist.mode())
    mean = pipe.vae.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(pipe.vae.bn.running_var.view(1, -1, 1, 1) + pipe.vae.config.batch_norm_eps)
    x = (x - mean) / std
    ids = pipe._prepare_latent_ids(x)
    packed = pipe._pack_latents((1 - sigma) * x + sigma * noise)
    said = pipe.transformer(
        hidden_states=packed,
        timestep=torch.tensor([1000 * sigma]) / 1000,
        guidance=None,
        encoder_hidden_states=embeds,
        txt_ids=text_ids,
        img_ids=ids,
        return_dict=False,
    )[0]
    return mean_square(pipe._unpack_latents_with_ids(said[:, : packed.shape[1]], ids), noise, x)


def qwen_image(pipe: Any, given: EncodeInput, noise: Tensor, sigma: float) -> float:
    embeds, mask = pipe.encode_prompt(prompt=given.caption, max_sequence_length=1024)
    config = pipe.vae.config
    x = pipe.vae.encode(
        pixels(given)[:, :, None]
    ).latent_dist.mode()  # the example draws a sample; ours is the mode
    mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
    x = (x - mean) / torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)
    noise = noise[:, :, None]
    _, channels, _, height, width = x.shape
    x_t = ((1 - sigma) * x + sigma * noise).permute(0, 2, 1, 3, 4)
    said = pipe.transformer(
        hidden_states=pipe._pack_latents(x_t, 1, channels, height, width),
        encoder_hidden_states=embeds,
        encoder_hidden_states_mask=mask,
        timestep=torch.tensor([1000 * sigma]) / 1000,
        img_shapes=[(1, height // 2, width // 2)],
        return_dict=False,
    )[0]
    factor = pipe.vae_scale_factor
    return mean_square(pipe._unpack_latents(said, height * factor, width * factor, factor), noise, x)


def zimage(pipe: Any, given: EncodeInput, noise: Tensor, sigma: float) -> float:
    embeds, _ = pipe.encode_prompt(prompt=given.caption, max_sequence_length=512)
    config = pipe.vae.config
    x = (pipe.vae.encode(pixels(given)).latent_dist.mode() - config.shift_factor) * config.scaling_factor
    x_t = ((1 - sigma) * x + sigma * noise).unsqueeze(2)
    clock = (1000 - torch.tensor([1000 * sigma])) / 1000
    said = torch.stack(pipe.transformer(list(x_t.unbind(0)), clock, embeds, return_dict=False)[0])
    return mean_square(-said.squeeze(2), noise, x)


SCRIPTS: dict[str, tuple[Any, Script]] = {
    "flux2-klein": (Flux2KleinPipeline, flux2_klein),
    "qwen-image": (QwenImagePipeline, qwen_image),
    "zimage": (ZImagePipeline, zimage),
}


@pytest.mark.parametrize("name", SCRIPTS)
@torch.no_grad()
def test_the_loss_is_the_example_scripts(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    pipeline, script = SCRIPTS[name]
    with quiet():
        registry.make_tiny(name, str(tmp_path / "model"))
        pipe = pipeline.from_pretrained(tmp_path / "model")
    subject = Subject(name, "t2i", tmp_path / "model")
    given = subject.case("a cat on a wall", "两只 dogs, running", columns=6).inputs()
    batch = subject.bench.batch(given)
    latent = batch["latent"]
    assert isinstance(latent, Tensor)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(5))
    sigmas = torch.tensor([0.83, 0.21])
    settings = StepSettings(0, SigmaSettings())
    part = subject.spec.parts(subject.options)[0].name

    def ours(at: Tensor) -> list[float]:
        modules = subject.bench.modules
        found = loss_at(subject.family, modules, part, batch, at, noise, settings, torch.device("cpu"))
        return [float(one) for one in found.plain]

    theirs = [
        script(pipe, one, noise[i : i + 1], float(sigma)) for i, (one, sigma) in enumerate(zip(given, sigmas))
    ]
    assert ours(sigmas) == pytest.approx(theirs, rel=3e-6)
    # A wrong clock is far outside of that.
    assert ours(1 - sigmas) != pytest.approx(theirs, rel=1e-2)
