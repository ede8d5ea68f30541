"""The diffusers pipeline of FLUX.2 Klein, whole, as its users call it: what families/contract.py compares us
with.

Nothing of model.py or encoders.py is used here; what it shares with them would not be tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from torch import Tensor
from transformers import Qwen3ForCausalLM

from whitetuner.families.contract import OriginalReader, Walk, quiet
from whitetuner.families.flux2_klein.spec import KleinOptions
from whitetuner.records import EncodeInput

READS_ORIGINAL = OriginalReader(convert_flux2_transformer_checkpoint_to_diffusers)


class Reference:
    """See contract.Reference. folder: a whole model folder, of any dtype; here float32 on the CPU."""

    def __init__(self, folder: Path, options: KleinOptions) -> None:
        with quiet():
            text_encoder = Qwen3ForCausalLM.from_pretrained(
                folder / "text_encoder", dtype=torch.float32, local_files_only=True
            )
            self.pipe = Flux2KleinPipeline.from_pretrained(
                folder, text_encoder=text_encoder, local_files_only=True
            )
        self.pipe.set_progress_bar_config(disable=True)
        self.text: dict[str, Any] = {
            "max_sequence_length": options.max_sequence_length,
            "text_encoder_out_layers": options.text_encoder_out_layers,
        }

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        embeds, _ = self.pipe.encode_prompt(prompt=given.caption, **self.text)
        pixels = self.pipe.image_processor.preprocess(given.target[0])
        latent = self.pipe._encode_vae_image(pixels, generator=None)
        found = {"prompt_embeds": embeds[0], "latent": latent[0]}
        if given.conditions:
            pictures = [self.pipe.image_processor.preprocess(one) for one in given.conditions]
            packed, ids = self.pipe.prepare_image_latents(pictures, 1, None, "cpu", torch.float32)
            times = ids[0, :, 0].unique()
            last = [
                ids[0][ids[0, :, 0] == time].amax(0) for time in times
            ]  # of each picture: its last row and column
            found["reference_latents"] = packed[0]
            found["reference_sizes"] = torch.stack(last)[:, 1:3] + 1
        return found

    def walk(self, given: Sequence[EncodeInput], noise: Tensor, steps: int, cfg: float) -> Walk:
        """Each item beside its own reference pictures: the pipeline knows one list of them for a whole batch."""
        if not given[0].conditions:
            return self._walk(given, noise, steps, cfg)
        alone = [self._walk([one], noise[i : i + 1], steps, cfg) for i, one in enumerate(given)]
        return Walk(alone[0].sigmas, [torch.cat(points) for points in zip(*(walk.points for walk in alone))])

    def _walk(self, given: Sequence[EncodeInput], noise: Tensor, steps: int, cfg: float) -> Walk:
        size = given[0].size
        assert size is not None
        ids = self.pipe._prepare_latent_ids(noise)
        points = [noise]

        def after_step(pipe: Flux2KleinPipeline, index: int, timestep: Tensor, values: dict) -> dict:
            points.append(pipe._unpack_latents_with_ids(values["latents"], ids, *noise.shape[-2:]))
            return values

        self.pipe(
            prompt=[one.caption for one in given],
            image=list(given[0].conditions) or None,
            latents=noise,
            width=size.width,
            height=size.height,
            num_inference_steps=steps,
            guidance_scale=cfg,
            callback_on_step_end=after_step,
            output_type="latent",
            **self.text,
        )
        return Walk(self.pipe.scheduler.sigmas.tolist(), points)
