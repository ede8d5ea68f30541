"""FLUX.2 Klein: Qwen3 hidden states as text, batch-normalised 2x2 patches as latents, sigma itself as the
clock.

Conventions from diffusers pipelines/flux2/pipeline_flux2_klein.py, told again here in a few lines each,
because training needs them apart from sampling; families/contract.py holds every one of them against that
pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from PIL import Image
from torch import Tensor, nn

from whitetuner.families.drawing import AtHome, ending_when_told
from whitetuner.families.flux2_klein.encoders import LatentEncoder, ReferenceEncoder, TextEncoder
from whitetuner.families.flux2_klein.keys import KEYS
from whitetuner.families.flux2_klein.spec import SPEC, KleinOptions, is_distilled
from whitetuner.family import BuildFn, Encoder, ModelPaths
from whitetuner.records import Batch, Size


class Model:
    """The Family of FLUX.2 Klein. What a mutant may get wrong is a method of its own."""

    spec = SPEC
    keys = KEYS

    def __init__(self, options: KleinOptions, paths: ModelPaths) -> None:
        self.options, self.paths = options, paths

    def stride(self) -> int:
        return SPEC.stride(self.paths)

    def encoders(self, task: str) -> list[Encoder]:
        found: list[Encoder] = [TextEncoder(self.paths, self.options), LatentEncoder(self.paths)]
        return [*found, ReferenceEncoder(self.paths)] if task == "edit" else found

    def load(self, build: BuildFn) -> dict[str, nn.Module]:
        folder = self.paths.component("transformer")
        return {"transformer": build(Flux2Transformer2DModel, folder, keep_precise=SPEC.keep_precise)}

    def load_decoder(self, build: BuildFn) -> nn.Module:
        return build(AutoencoderKLFlux2, self.paths.component("vae"), keep_precise=("*",))

    # -- one prediction -------------------------------------------------------------------------------------

    def predict(
        self, modules: Mapping[str, nn.Module], part: str, batch: Batch, x_t: Tensor, sigma: Tensor
    ) -> Tensor:
        """As in the contract. Needs the field `prompt_embeds`; takes references along where the batch has
        them:

        reference_latents: (B, N, C) tokens of all references, one after the other, packed as `pack` does
        reference_sizes:   (B, n, 2) latent height and width of each reference, equal within the batch
        """
        transformer = modules[part]
        compute = _anchor(transformer)
        height, width = x_t.shape[-2:]
        text = batch["prompt_embeds"]
        assert isinstance(text, Tensor)
        tokens, ids = self.pack(x_t), self.image_ids(height, width)
        if "reference_latents" in batch.fields:
            references, sizes = batch["reference_latents"], batch["reference_sizes"]
            assert isinstance(references, Tensor) and isinstance(sizes, Tensor)
            tokens = self.join(tokens, references.to(tokens))
            ids = self.join(ids[None], self.reference_ids(sizes[0])[None])[0]
        said = transformer(
            hidden_states=tokens.to(compute.dtype),
            timestep=self.clock(sigma).to(compute.dtype),
            guidance=None,  # Klein has no guidance embedding
            encoder_hidden_states=text.to(compute.dtype),
            txt_ids=self.text_ids(text.shape[1]).to(x_t.device),
            img_ids=ids.to(x_t.device),
            return_dict=False,
        )[0]
        # What the model says about the references is not asked for.
        return said[:, : height * width].float().transpose(1, 2).reshape(x_t.shape)

    def clock(self, sigma: Tensor) -> Tensor:
        """The model is told sigma and multiplies by 1000 itself."""
        return sigma

    def pack(self, latent: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H W, C), row by row."""
        return latent.flatten(2).transpose(1, 2)

    def image_ids(self, height: int, width: int, time: int = 0) -> Tensor:
        """(H W, 4) rotary positions (time, row, column, 0). The target is at time 0."""
        rows, columns = torch.arange(height), torch.arange(width)
        return torch.cartesian_prod(torch.tensor([time]), rows, columns, torch.tensor([0]))

    def text_ids(self, length: int) -> Tensor:
        """(length, 4) rotary positions (0, 0, 0, token)."""
        return nn.functional.pad(torch.arange(length)[:, None], (3, 0))

    def join(self, target: Tensor, references: Tensor) -> Tensor:
        """(B, H W, ...) and (B, N, ...) -> (B, H W + N, ...): the target's tokens come first."""
        return torch.cat([target, references], dim=1)

    def reference_ids(self, sizes: Tensor) -> Tensor:
        """(N, 4) positions of all references' tokens; sizes: (n, 2) latent heights and widths. Each counts from 0 again."""
        return torch.cat(
            [
                self.image_ids(rows, columns, self.reference_time(index))
                for index, (rows, columns) in enumerate(sizes.tolist())
            ]
        )

    def reference_time(self, index: int) -> int:
        """References stand 10 apart on the time axis, the first at 10."""
        return 10 * (index + 1)

    # -- whole pictures -------------------------------------------------------------------------------------

    def pipeline(self, modules: Mapping[str, nn.Module], decoder: nn.Module) -> _Pipeline:
        """The diffusers pipeline around our modules, without text encoder; nothing is moved."""
        folder = self.paths.component("scheduler")
        pipe = _Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder, local_files_only=True),
            vae=decoder,
            text_encoder=None,
            tokenizer=None,
            transformer=modules["transformer"],
            is_distilled=is_distilled(self.options, self.paths),
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
        """As in the contract; references are taken from the prompt's fields. A distilled model takes no guidance, whatever
        cfg says: the pipeline's own rule.
        """
        compute = _anchor(modules["transformer"])

        pipe = self.pipeline(modules, decoder)
        if "reference_latents" in prompt:
            pipe.references = (prompt["reference_latents"], self.reference_ids(prompt["reference_sizes"]))
        latent = pipe(
            image=None if pipe.references is None else _PLACEHOLDER,
            prompt_embeds=prompt["prompt_embeds"][None].to(compute),
            negative_prompt_embeds=None if negative is None else negative["prompt_embeds"][None].to(compute),
            width=size.width,
            height=size.height,
            num_inference_steps=steps,
            guidance_scale=1.0 if negative is None else cfg,
            generator=torch.Generator("cpu").manual_seed(seed),
            callback_on_step_end=ending_when_told(on_step),
            output_type="latent",
        ).images
        # Decoded here: the decoder may be of another dtype, or wait on another device, than the denoiser.
        assert isinstance(decoder, AutoencoderKLFlux2)
        pixels = decoder.decode(latent.to(decoder.device, decoder.dtype), return_dict=False)[0]
        return pipe.image_processor.postprocess(pixels, output_type="pil")


#: Makes the pipeline ask for reference latents; nothing of it is looked at but its size, which must be at least 64.
_PLACEHOLDER = Image.new("RGB", (64, 64))


class _Pipeline(AtHome, Flux2KleinPipeline):
    """references: tokens (N, C) and positions (N, 4), encoded before; they stand in for what it would make of pictures"""

    references: tuple[Tensor, Tensor] | None = None

    def prepare_image_latents(
        self, images: Any, batch_size: int, generator: Any, device: Any, dtype: Any
    ) -> tuple[Tensor, Tensor]:
        assert self.references is not None, "a picture without latents"
        latents, ids = (one.to(device).expand(batch_size, -1, -1) for one in self.references)
        return latents, ids


def _anchor(transformer: Any) -> Tensor:
    """A weight whose dtype and device are those the model computes in.

    A norm inside a block: never quantised, swapped out or given an adapter, as other layers may be.
    """
    return transformer.transformer_blocks[0].attn.norm_q.weight
