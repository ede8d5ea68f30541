"""WAN: 3D patches of a video VAE's latent, UMT5 text of 512 tokens, a clock of 1000 sigma, one or two experts.

Conventions from diffusers pipelines/wan/ (pipeline_wan.py, pipeline_wan_i2v.py), told again here in a few lines each, because
training needs them apart from sampling; families/contract.py holds every one of them against those pipelines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from PIL import Image
from torch import Tensor, nn

from whitetuner.errors import UserError
from whitetuner.families.wan.drawing import draw
from whitetuner.families.wan.encoders import FirstFrameEncoder, ImageEncoder, LatentEncoder, TextEncoder
from whitetuner.families.wan.keys import KEYS
from whitetuner.families.wan.spec import SPEC, TEXT_TOKENS, WanOptions, resolved
from whitetuner.family import BuildFn, Encoder, ModelPaths
from whitetuner.records import Batch, Size


class Model:
    """The Family of WAN. What a mutant may get wrong is a method of its own."""

    spec = SPEC
    keys = KEYS

    def __init__(self, options: WanOptions, paths: ModelPaths) -> None:
        self._given, self.paths = options, paths

    @cached_property
    def options(self) -> WanOptions:
        """Variant and boundary as they are in the files. Raises UserError when the files are another variant's."""
        return resolved(self._given, self.paths)

    def stride(self) -> int:
        return SPEC.stride(self.paths)

    def encoders(self, task: str) -> list[Encoder]:
        """Raises UserError when the model is one for another task."""
        variant = self.options.variant
        if task not in SPEC.tasks_of(variant):
            raise UserError(
                "this is WAN {variant}, which is for {tasks}, but the task is '{task}'",
                where="model.task",
                mend="give the folder of a WAN for {task}, or set model.task to what this one is for",
                variant=variant,
                tasks=" and ".join(SPEC.tasks_of(variant)),
                task=task,
            )
        found: list[Encoder] = [TextEncoder(self.paths)]
        if task == "i2v":
            found.append(FirstFrameEncoder(self.paths, whole=variant != "ti2v-5b"))
        if variant == "i2v-2.1":
            found.append(ImageEncoder(self.paths))
        return [*found, LatentEncoder(self.paths)]

    def load(self, build: BuildFn) -> dict[str, nn.Module]:
        return {
            part.name: build(
                WanTransformer3DModel, self.paths.component(part.name), keep_precise=SPEC.keep_precise
            )
            for part in SPEC.parts(self.options)
        }

    def load_decoder(self, build: BuildFn) -> nn.Module:
        return build(AutoencoderKLWan, self.paths.component("vae"), keep_precise=("*",))

    # -- one prediction -------------------------------------------------------------------------------------

    def predict(
        self, modules: Mapping[str, nn.Module], part: str, batch: Batch, x_t: Tensor, sigma: Tensor
    ) -> Tensor:
        """As in the contract. Needs the field `prompt_embeds`, in an i2v task `first_frame_latents` and (2.1)
        `image_embeds`.

        The 5B's first frame is known: the denoiser sees it clean, at noise level 0, and what is said of it is the velocity
        that leads from x_t to it, so that nothing is learned there.
        """
        denoiser: Any = self.denoiser(modules, part)
        compute = anchor(denoiser)
        texts, first = batch["prompt_embeds"], batch.fields.get("first_frame_latents")
        image = batch.fields.get("image_embeds")
        assert isinstance(texts, list) and not isinstance(first, list) and not isinstance(image, list)
        seen, clock = x_t, self.clock(sigma)
        clean = None
        if first is not None:
            first = first.to(x_t)
            if first.shape[1] + x_t.shape[1] > denoiser.config.in_channels:
                clean = first
                seen, clock = self.kept(x_t, clean), self.token_clock(clock, x_t)
            else:
                seen = self.beside(x_t, self.mask(first), first)
        said = denoiser(
            hidden_states=seen.to(compute.dtype),
            timestep=clock,
            encoder_hidden_states=self.text(texts).to(compute),
            encoder_hidden_states_image=None if image is None else image.to(compute),
            return_dict=False,
        )[0].float()
        return said if clean is None else self.to_clean(said, x_t, clean, sigma)

    def denoiser(self, modules: Mapping[str, nn.Module], part: str) -> nn.Module:
        return modules[part]

    def clock(self, sigma: Tensor) -> Tensor:
        """The model is told thousandths of the noise level."""
        return 1000 * sigma

    def text(self, texts: Sequence[Tensor]) -> Tensor:
        """(B, 512, width): zeros after the text, which take part in attention; no WAN has a mask there."""
        padding = nn.functional.pad
        return torch.stack([padding(one, (0, 0, 0, TEXT_TOKENS - len(one))) for one in texts])

    def mask(self, first: Tensor) -> Tensor:
        """(B, 4, T, H, W): 1 where the frame is known. Four channels: one for each frame that a latent frame stands for."""
        mask = first.new_zeros(len(first), 4, *first.shape[2:])
        mask[:, :, 0] = 1
        return mask

    def beside(self, x_t: Tensor, mask: Tensor, first: Tensor) -> Tensor:
        """Channels of the 2.1 and 2.2 I2V: the noisy clip, the mask, the condition."""
        return torch.cat([x_t, mask, first], dim=1)

    def kept(self, x_t: Tensor, clean: Tensor) -> Tensor:
        """The noisy clip with its first frame clean (5B)."""
        return torch.cat([clean, x_t[:, :, 1:]], dim=2)

    def token_clock(self, clock: Tensor, x_t: Tensor) -> Tensor:
        """(B, tokens): 0 at the tokens of the first frame (5B)."""
        frames, rows, columns = x_t.shape[2], x_t.shape[3] // 2, x_t.shape[4] // 2
        each = clock[:, None].repeat(1, frames)
        each[:, 0] = 0
        return each.repeat_interleave(rows * columns, dim=1)

    def to_clean(self, said: Tensor, x_t: Tensor, clean: Tensor, sigma: Tensor) -> Tensor:
        """noise - x0 of the first frame, which is known from x_t and x0."""
        known = (x_t[:, :, :1] - clean) / sigma.view(-1, 1, 1, 1, 1).clamp(min=1e-6)
        return torch.cat([known, said[:, :, 1:]], dim=2)

    # -- whole clips ----------------------------------------------------------------------------------------

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
        """As in the contract: size.frames pictures. Raises UserError where one of two experts is not there."""
        return draw(self, modules, decoder, prompt, negative, size, steps, cfg, seed, on_step)


def anchor(denoiser: Any) -> Tensor:
    """A weight whose dtype and device are those the model computes in.

    A norm inside a block: never quantised, swapped out or given an adapter, as other layers may be.
    """
    return denoiser.blocks[0].attn1.norm_q.weight
