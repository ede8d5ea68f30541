"""The verbs of Z-Image and of Z-Image V2, which differ in their denoiser alone.

Conventions from diffusers pipelines/z_image/pipeline_z_image.py, told again here in a few lines each, because training needs
them apart from sampling; families/contract.py holds every one of them against that pipeline. Positions, padding and pad
tokens are the model's own business: it is given lists, one latent and one caption each, of any size and length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline
from PIL import Image
from torch import Tensor, nn

from whitetuner.families import z_image_merge as merge
from whitetuner.families.drawing import AtHome, ending_when_told
from whitetuner.families.z_image_encoders import LatentEncoder, TextEncoder
from whitetuner.families.z_image_facts import ZImageOptions, is_turbo
from whitetuner.family import BuildFn, Encoder, FamilySpec, KeyMap, ModelPaths
from whitetuner.records import Batch, Size


class ZImageFamily:
    """A Family but for `spec`, `keys` and `load`. What a mutant may get wrong is a method of its own."""

    spec: ClassVar[FamilySpec]
    keys: KeyMap

    def __init__(self, options: ZImageOptions, paths: ModelPaths) -> None:
        self.options, self.paths = options, paths
        self._merged: dict[str, merge.Factors] | None = None

    def stride(self) -> int:
        return self.spec.stride(self.paths)

    def encoders(self, task: str) -> list[Encoder]:
        return [TextEncoder(self.paths, self.options), LatentEncoder(self.paths)]

    def load_decoder(self, build: BuildFn) -> nn.Module:
        return build(AutoencoderKL, self.paths.component("vae"), keep_precise=("*",))

    def merged(self) -> Mapping[str, merge.Factors]:
        """What model.options.merge_adapter adds to the frozen weights, by module path; empty without it.

        Raises UserError when the file cannot be used.
        """
        if self._merged is None:
            path = self.options.merge_adapter
            self._merged = {} if path is None else merge.read_lora(path, self.keys)
        return self._merged

    # -- one prediction -------------------------------------------------------------------------------------

    def predict(
        self, modules: Mapping[str, nn.Module], part: str, batch: Batch, x_t: Tensor, sigma: Tensor
    ) -> Tensor:
        """As in the contract. Needs the field `prompt_embeds`, one (L, width) tensor a sample."""
        transformer = modules[part]
        dtype = _anchor(transformer).dtype
        captions = batch["prompt_embeds"]
        assert isinstance(captions, list)
        said = transformer(
            self.pictures(x_t.to(dtype)),
            self.clock(sigma),
            [one.to(x_t.device, dtype) for one in captions],
            return_dict=False,
        )[0]
        return self.velocity(torch.stack(said).squeeze(2).float())

    def pictures(self, latent: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> B tensors of one frame, (C, 1, H, W)."""
        return list(latent.unsqueeze(2).unbind())

    def clock(self, sigma: Tensor) -> Tensor:
        """The model counts towards the picture: 0 = noise, 1 = clean. In the pipeline's own roundings, because it
        multiplies by 1000 and takes cosines of that."""
        return (1000 - 1000 * sigma) / 1000

    def velocity(self, said: Tensor) -> Tensor:
        """The model says picture - noise."""
        return -said

    # -- whole pictures -------------------------------------------------------------------------------------

    def pipeline(self, modules: Mapping[str, nn.Module], decoder: nn.Module) -> ZImagePipeline:
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
        """As in the contract. Turbo takes no guidance, whatever cfg says: it was distilled with it.

        What was merged for the training (model.options.merge_adapter) is left out: the result is for the untouched model.
        """
        transformer = modules["transformer"]
        compute = _anchor(transformer)
        guided = negative is not None and cfg > 1 and not is_turbo(self.options, self.paths)

        pipe = self.pipeline(modules, decoder)
        with merge.without(transformer, self.merged(), compute):
            latent = pipe(
                prompt_embeds=[prompt["prompt_embeds"].to(compute)],
                negative_prompt_embeds=[negative["prompt_embeds"].to(compute)] if guided and negative else [],
                width=size.width,
                height=size.height,
                num_inference_steps=steps,
                guidance_scale=cfg - 1 if guided else 0.0,  # the pipeline adds its guidance to the prompted 1
                generator=torch.Generator("cpu").manual_seed(seed),
                callback_on_step_end=ending_when_told(on_step),
                output_type="latent",
            ).images
        # Decoded here: the decoder may be of another dtype, or wait on another device, than the denoiser.
        assert isinstance(decoder, AutoencoderKL)
        latent = latent.to(decoder.device, decoder.dtype)
        latent = latent / decoder.config.scaling_factor + decoder.config.shift_factor
        return pipe.image_processor.postprocess(
            decoder.decode(latent, return_dict=False)[0], output_type="pil"
        )


class _Pipeline(AtHome, ZImagePipeline):
    pass


def _anchor(transformer: Any) -> Tensor:
    """A weight whose dtype and device are those the model computes in.

    A norm inside a block: never quantised, swapped out or given an adapter, as other layers may be.
    """
    return transformer.noise_refiner[0].attention.norm_q.weight
