"""The diffusers pipeline of Z-Image, as its users call it, and ways to get its conventions wrong.

What families/contract.py compares both families with. Nothing of z_image_family.py or z_image_encoders.py is used in the
reference; what it shared with them would not be tested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImagePipeline
from diffusers.pipelines.z_image.pipeline_z_image_img2img import retrieve_latents
from torch import Tensor, nn

from whitetuner.families.contract import Mutant, Mutate, Walk, encoder_method, method, quiet
from whitetuner.families.z_image_facts import ZImageOptions
from whitetuner.records import EncodeInput


class ZImageReference:
    """See contract.Reference. folder: a whole model folder, of any dtype; here float32 on the CPU."""

    def __init__(self, folder: Path, options: ZImageOptions) -> None:
        with quiet():
            self.pipe = ZImagePipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        self.pipe.set_progress_bar_config(disable=True)
        self.text = {"max_sequence_length": options.max_sequence_length}

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        embeds, _ = self.pipe.encode_prompt(given.caption, do_classifier_free_guidance=False, **self.text)
        pixels = self.pipe.image_processor.preprocess(given.target[0])
        latent = retrieve_latents(self.pipe.vae.encode(pixels), sample_mode="argmax")
        config = self.pipe.vae.config
        return {
            "prompt_embeds": embeds[0],
            "latent": ((latent - config.shift_factor) * config.scaling_factor)[0],
        }

    def walk(self, given: Sequence[EncodeInput], noise: Tensor, steps: int, cfg: float) -> Walk:
        size = given[0].size
        assert size is not None
        points = [noise]

        def after_step(pipe: ZImagePipeline, index: int, timestep: Tensor, values: dict) -> dict:
            points.append(values["latents"])
            return values

        self.pipe(
            prompt=[one.caption for one in given],
            latents=noise,
            width=size.width,
            height=size.height,
            num_inference_steps=steps,
            guidance_scale=cfg - 1,  # pos + g (pos - neg) = neg + (g + 1) (pos - neg)
            callback_on_step_end=after_step,
            output_type="latent",
            **self.text,
        )
        return Walk(self.pipe.scheduler.sigmas.tolist(), points)


def _without_thinking(right: Callable[..., str]) -> Callable[..., str]:
    return lambda caption: right(caption) + "<think>\n\n</think>\n\n"


def _changed(change: Callable[[Any], None]) -> Mutate:
    """The family whose denoiser is changed after loading."""

    def load(right: Callable[..., dict[str, nn.Module]]) -> Callable[..., dict[str, nn.Module]]:
        def changed(build: Any) -> dict[str, nn.Module]:
            modules = right(build)
            change(modules["transformer"])
            return modules

        return changed

    return method("load", load)


def _zero_padding(transformer: Any) -> None:
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        token.data.zero_()


def _placed(image: Callable[[int], int], text: Callable[[int], int]) -> Callable[[Any], None]:
    """Positions on the first axis exchanged: of the picture (which stands behind the text) and of the text (from 1)."""

    def change(transformer: Any) -> None:
        right = transformer._pad_with_ids

        def wrong(feat: Tensor, size: tuple, start: tuple, *more: Any) -> Any:
            first = image(start[0]) if start[0] > 1 else text(start[0])
            return right(feat, size, (first, *start[1:]), *more)

        transformer._pad_with_ids = wrong

    return change


def _sampled(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def latent(vae: Any, picture: Any) -> Tensor:
        encoder = right.__self__  # type: ignore[attr-defined]
        drawn = vae.encode(encoder.pixels(picture)).latent_dist.sample(torch.Generator().manual_seed(0))
        return encoder.normalise(vae, drawn)[0]

    return latent


def _latent(change: Callable[[Any, Tensor], Tensor]) -> Mutate:
    return encoder_method("vae", "normalise", lambda right: lambda vae, latent: change(vae.config, latent))


MUTANTS: dict[str, Mutant] = {
    "what the model says taken as it is": Mutant("E1", method("velocity", lambda right: lambda said: said)),
    "told sigma instead of 1 - sigma": Mutant("E1", method("clock", lambda right: lambda sigma: sigma)),
    "pictures in each other's place": Mutant(
        "E1", method("pictures", lambda right: lambda latent: right(latent.flip(1)))
    ),
    "pad tokens left out": Mutant("E1", _changed(_zero_padding)),
    "picture at the origin": Mutant("E1", _changed(_placed(lambda first: 0, lambda first: first))),
    "text counted from 0": Mutant("E1", _changed(_placed(lambda first: first, lambda first: 0))),
    "text behind the picture": Mutant("E1", _changed(_placed(lambda first: 1, lambda first: 512))),
    "caption without its chat template": Mutant(
        "E1", encoder_method("text", "text", lambda right: lambda caption: f"{caption} ")
    ),
    "template with thinking switched off": Mutant("E1", encoder_method("text", "text", _without_thinking)),
    "padding kept in the text": Mutant(
        "E1", encoder_method("text", "kept", lambda right: lambda states, mask: states)
    ),
    "text one token shorter": Mutant(
        "E2", encoder_method("text", "kept", lambda right: lambda states, mask: right(states, mask)[:-1])
    ),
    "text from the last layer": Mutant(
        "E2", encoder_method("text", "layers_read", lambda right: lambda layers: layers)
    ),
    "text from one layer before": Mutant(
        "E2", encoder_method("text", "layers_read", lambda right: lambda layers: layers - 2)
    ),
    "latent not shifted": Mutant("E2", _latent(lambda config, z: z * config.scaling_factor)),
    "latent not scaled": Mutant("E2", _latent(lambda config, z: z - config.shift_factor)),
    "latent scaled before it is shifted": Mutant(
        "E2", _latent(lambda config, z: z * config.scaling_factor - config.shift_factor)
    ),
    "latent drawn instead of the mode": Mutant("E2", encoder_method("vae", "latent", _sampled)),
    "pixels in [0, 1]": Mutant(
        "E2", encoder_method("vae", "pixels", lambda right: lambda picture: (right(picture) + 1) / 2)
    ),
    "blue before red": Mutant(
        "E2", encoder_method("vae", "pixels", lambda right: lambda p: right(p).flip(1))
    ),
}
