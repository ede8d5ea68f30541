"""The verbs of Lumina-Image 2.0; conventions from diffusers pipelines/lumina2/pipeline_lumina2.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
)
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from whitetuner.families.drawing import AtHome
from whitetuner.families.lumina2.encoders import TextEncoder
from whitetuner.families.lumina2.keys import KEYS
from whitetuner.families.lumina2.spec import SPEC, Lumina2Options
from whitetuner.families.z_image_encoders import LatentEncoder
from whitetuner.family import BuildFn, Encoder, ModelPaths
from whitetuner.records import Batch, Size


class Model:
    """The Family. What a mutant may get wrong is a method of its own."""

    spec, keys = SPEC, KEYS

    def __init__(self, options: Lumina2Options, paths: ModelPaths) -> None:
        self.options, self.paths = options, paths

    def stride(self) -> int:
        return SPEC.stride(self.paths)

    def encoders(self, task: str) -> list[Encoder]:
        return [TextEncoder(self.paths, self.options), LatentEncoder(self.paths)]

    def load(self, build: BuildFn) -> dict[str, nn.Module]:
        folder = self.paths.component("transformer")
        return {"transformer": build(Lumina2Transformer2DModel, folder, keep_precise=SPEC.keep_precise)}

    def load_decoder(self, build: BuildFn) -> nn.Module:
        return build(AutoencoderKL, self.paths.component("vae"), keep_precise=("*",))

    # -- one prediction -------------------------------------------------------------------------------------

    def predict(
        self, modules: Mapping[str, nn.Module], part: str, batch: Batch, x_t: Tensor, sigma: Tensor
    ) -> Tensor:
        """As in the contract. Needs the field `prompt_embeds`, one (L, width) tensor a sample."""
        transformer = modules[part]
        captions = batch["prompt_embeds"]
        assert isinstance(captions, list)
        dtype = _anchor(transformer).dtype
        text, mask = self.padded([one.to(x_t.device, dtype) for one in captions])
        said = transformer(x_t.to(dtype), self.clock(sigma), text, mask, return_dict=False)[0]
        return self.velocity(said.float())

    def padded(self, captions: list[Tensor]) -> tuple[Tensor, Tensor]:
        """B texts (L, width) -> (B, longest, width), and which rows are text: (B, longest) of 0 and 1."""
        lengths = torch.tensor([len(one) for one in captions])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return pad_sequence(captions, batch_first=True), mask.long().to(captions[0].device)

    def clock(self, sigma: Tensor) -> Tensor:
        """The model counts towards the picture: 0 = noise, 1 = clean."""
        return 1 - sigma

    def velocity(self, said: Tensor) -> Tensor:
        """The model says picture - noise."""
        return -said

    # -- whole pictures -------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        modules: Mapping[str, nn.Module],
        decoder: nn.Module,
        prompt: Mapping[str, Tensor],
        negative: Mapping[str, Tensor] | None,
        *,
        size: Size,
        steps: int,
        cfg: float,
        seed: int,
        on_step: Callable[[int], bool] | None = None,
    ) -> list[Image.Image]:
        """As in the contract."""
        compute = _anchor(modules["transformer"])
        guided = negative is not None and cfg > 1
        sides = [prompt, negative] if negative is not None and guided else [prompt]
        text, mask = self.padded([one["prompt_embeds"].to(compute) for one in sides])

        pipe = self.pipeline(modules, decoder)
        try:
            latent = pipe(
                prompt_embeds=text[:1],
                prompt_attention_mask=mask[:1],
                negative_prompt_embeds=text[1:] if guided else None,
                negative_prompt_attention_mask=mask[1:] if guided else None,
                width=size.width,
                height=size.height,
                num_inference_steps=steps,
                guidance_scale=cfg if guided else 1.0,
                generator=torch.Generator("cpu").manual_seed(seed),
                callback_on_step_end=_ending(on_step),
                output_type="latent",
            ).images
        except _Ended as end:
            latent = end.latent
        # Decoded here: the decoder may be of another dtype, or wait on another device, than the denoiser.
        assert isinstance(decoder, AutoencoderKL)
        latent = latent.to(decoder.device, decoder.dtype)
        latent = latent / decoder.config.scaling_factor + decoder.config.shift_factor
        return pipe.image_processor.postprocess(
            decoder.decode(latent, return_dict=False)[0], output_type="pil"
        )

    def pipeline(self, modules: Mapping[str, nn.Module], decoder: nn.Module) -> Lumina2Pipeline:
        """The diffusers pipeline around our modules, without text encoder; nothing is moved."""
        folder = self.paths.component("scheduler")
        pipe = _Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder, local_files_only=True),
            vae=decoder,
            text_encoder=None,
            tokenizer=None,
            transformer=modules["transformer"],
        )
        pipe.home = _anchor(modules["transformer"]).device
        pipe.set_progress_bar_config(disable=True)
        return pipe


class _Pipeline(AtHome, Lumina2Pipeline):
    pass


class _Ended(Exception):
    """This pipeline has no `interrupt`, which drawing.ending_when_told asks of one: it is left with what there is."""

    def __init__(self, latent: Tensor) -> None:
        super().__init__()
        self.latent = latent


def _ending(on_step: Callable[[int], bool] | None) -> Callable[..., dict[str, Tensor]]:
    def after_step(pipe: Any, index: int, timestep: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        if on_step is not None and not on_step(index):
            raise _Ended(values["latents"])
        return values

    return after_step


def _anchor(transformer: Any) -> Tensor:
    """A weight whose dtype and device are those the model computes in: a norm inside a block, which is never quantised,
    swapped out or given an adapter.
    """
    return transformer.noise_refiner[0].attn.norm_q.weight
