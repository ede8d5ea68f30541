"""The diffusers pipeline of Lumina-Image 2.0, whole, as its users call it: what families/contract.py compares us with.

Nothing of model.py or encoders.py is used here; what it shared with them would not be tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import Lumina2Pipeline
from diffusers.loaders.single_file_utils import convert_lumina2_to_diffusers
from torch import Tensor

from whitetuner.families.contract import OriginalReader, Walk, guide, quiet
from whitetuner.families.lumina2.spec import Lumina2Options
from whitetuner.records import EncodeInput

#: The released widths of q, k and v are written into it.
READS_ORIGINAL = OriginalReader(convert_lumina2_to_diffusers, any_size=False)


class Reference:
    """See contract.Reference. folder: a whole model folder, of any dtype; here float32 on the CPU."""

    def __init__(self, folder: Path, options: Lumina2Options) -> None:
        with quiet():
            self.pipe = Lumina2Pipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        self.pipe.set_progress_bar_config(disable=True)
        self.text = {
            "max_sequence_length": options.max_sequence_length,
            "system_prompt": options.system_prompt,
        }

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        embeds, mask, _, _ = self.pipe.encode_prompt(
            given.caption, do_classifier_free_guidance=False, **self.text
        )
        pixels = self.pipe.image_processor.preprocess(given.target[0])
        latent = self.pipe.vae.encode(pixels).latent_dist.mode()
        config = self.pipe.vae.config  # the inverse of what the pipeline does before it decodes
        return {
            "prompt_embeds": embeds[0][mask[0].bool()],
            "latent": ((latent - config.shift_factor) * config.scaling_factor)[0],
        }

    def walk(self, given: Sequence[EncodeInput], noise: Tensor, steps: int, cfg: float) -> Walk:
        size = given[0].size
        assert size is not None
        points = [noise]

        def after_step(pipe: Any, index: int, timestep: Tensor, values: dict[str, Any]) -> dict[str, Any]:
            points.append(values["latents"])
            return values

        self.pipe(
            prompt=[one.caption for one in given],
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

    def guide(self, velocity: Tensor, unguided: Tensor, cfg: float) -> Tensor:
        """Guidance whose rows are as long as the prompted ones (the pipeline's cfg_normalization)."""
        guided = guide(velocity, unguided, cfg)
        return guided * (velocity.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
