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
from torch import Tensor
from transformers import Qwen3ForCausalLM

from whitetuner.families.contract import Walk, quiet
from whitetuner.families.flux2_klein.spec import KleinOptions
from whitetuner.records import EncodeInput


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
        return {"prompt_embeds": embeds[0], "latent": latent[0]}

    def walk(self, given: Sequence[EncodeInput], noise: Tensor, steps: int, cfg: float) -> Walk:
        """All items share the reference pictures of the first: the pipeline knows one list for the batch."""
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
