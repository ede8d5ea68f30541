"""WAN's diffusers pipelines, loaded and called as their users do: what our code is held against (families/contract.py).

Sampled with FlowMatchEuler at the released shift instead of UniPC, whose second step is no Euler step any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanPipeline
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from whitetuner.families.contract import OriginalReader, Walk, quiet
from whitetuner.families.wan.encoders import moments_of
from whitetuner.families.wan.spec import FRAMES_STEP, TEXT_TOKENS, WanOptions, variant_of
from whitetuner.family import ModelPaths
from whitetuner.records import EncodeInput

READS_ORIGINAL = OriginalReader(convert_wan_transformer_to_diffusers)


class Reference:
    """See contract.Reference. folder: a whole model folder, of any dtype; here float32 on the CPU."""

    def __init__(self, folder: Path, options: WanOptions) -> None:
        self.variant = variant_of(options, ModelPaths(folder))
        more: dict[str, Any] = {}
        if self.variant == "i2v-2.1":
            more["image_processor"] = CLIPImageProcessorPil.from_pretrained(
                folder / "image_processor", local_files_only=True
            )
        with quiet():
            scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
            kind: Any = WanPipeline if str(self.variant).startswith("t2v") else WanImageToVideoPipeline
            if self.variant == "ti2v-5b" or self.variant == "i2v-2.2":
                more |= {"image_encoder": None, "image_processor": None}
            self.pipe: Any = kind.from_pretrained(folder, scheduler=scheduler, local_files_only=True, **more)
            self.pipe.set_progress_bar_config(disable=True)
            self.from_text: Any = self.pipe
            if self.variant == "ti2v-5b":
                names = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
                parts = {name: getattr(self.pipe, name) for name in names}
                self.from_text = WanPipeline(**parts, expand_timesteps=True)
                self.from_text.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        pipe = self.pipe
        embeds = pipe._get_t5_prompt_embeds(given.caption, max_sequence_length=TEXT_TOKENS)[0]
        # Filling is zeros; a token's states never are.
        found = {"prompt_embeds": embeds[: int(embeds.abs().sum(1).gt(0).sum())]}
        clip = pipe.video_processor.preprocess_video(list(given.target))
        found["latent"] = self._normalised(pipe.vae.encode(clip).latent_dist.mode())[0]
        if given.conditions:
            image = pipe.video_processor.preprocess(given.conditions[0])
            assert given.size is not None
            prepared = pipe.prepare_latents(
                image, 1, 16, given.size.height, given.size.width, given.size.frames, torch.float32, "cpu"
            )
            found["first_frame_latents"] = (
                prepared[1][0] if self.variant == "ti2v-5b" else prepared[1][0, FRAMES_STEP:]
            )
            if self.variant == "i2v-2.1":
                found["image_embeds"] = pipe.encode_image(given.conditions[0])[0]
        return found

    def walk(self, given: Sequence[EncodeInput], noise: Tensor, steps: int, cfg: float) -> Walk:
        """One clip after the other: a call takes one picture."""
        walks = [self._points(one, start[None], steps, cfg) for one, start in zip(given, noise)]
        return Walk(self._scheduler.sigmas.tolist(), [torch.cat(at) for at in zip(*walks)])

    @property
    def _scheduler(self) -> Any:
        return self.pipe.scheduler

    def _points(self, one: EncodeInput, noise: Tensor, steps: int, cfg: float) -> list[Tensor]:
        assert one.size is not None
        points = [noise]

        def after_step(pipe: Any, index: int, timestep: Tensor, values: dict) -> dict:
            points.append(values["latents"])
            return values

        more: dict[str, Any] = {"image": one.conditions[0]} if one.conditions else {}
        (self.pipe if one.conditions else self.from_text)(
            prompt=one.caption,
            negative_prompt="",
            guidance_scale=cfg,
            latents=noise,
            width=one.size.width,
            height=one.size.height,
            num_frames=one.size.frames,
            num_inference_steps=steps,
            callback_on_step_end=after_step,
            output_type="latent",
            max_sequence_length=TEXT_TOKENS,
            **more,
        )
        return self._first_kept(one, points) if self.variant == "ti2v-5b" and one.conditions else points

    def _first_kept(self, one: EncodeInput, points: list[Tensor]) -> list[Tensor]:
        """The 5B's first frame is replaced before every step and after the last; what lies there in between counts for
        nothing. Here it is what a clip on its way to that frame would show.
        """
        clean = self.encode(one)["first_frame_latents"][None]
        noise = points[0][:, :, :1].clone()
        kept = []
        for sigma, point in zip(self._scheduler.sigmas.tolist(), points):
            kept.append(torch.cat([(1 - sigma) * clean + sigma * noise, point[:, :, 1:]], dim=2))
        return kept

    def _normalised(self, latent: Tensor) -> Tensor:
        mean, deviation = moments_of(self.pipe.vae, latent)
        return (latent - mean) * (1.0 / deviation)
