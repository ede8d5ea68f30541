"""GLM-Image: quoted words and prior tokens as condition, an unshifted clock, given pictures as keys and values at t = 0.

Conventions from diffusers pipelines/glm_image/pipeline_glm_image.py and models/transformers/transformer_glm_image.py, told
again here in a few lines each, because training needs them apart from sampling; families/contract.py holds every one of them
against that pipeline. The model's own attention_mask is never used (it takes a 0/1 mask as additive): samples whose texts are
of different lengths go through the model one length after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, GlmImageTransformer2DModel
from PIL import Image
from torch import Tensor, nn

from whitetuner.diffusion.sigmas import generator_for
from whitetuner.errors import UserError
from whitetuner.families.drawing import ending_when_told
from whitetuner.families.glm_image.drawing import DrawingPipeline, Guided
from whitetuner.families.glm_image.encoders import LatentEncoder, ReferenceEncoder, moments_of
from whitetuner.families.glm_image.glyphs import GlyphEncoder
from whitetuner.families.glm_image.keys import KEYS
from whitetuner.families.glm_image.memory import Kept, Recalled
from whitetuner.families.glm_image.prior import PlanGenerator, ReferenceTokens, TargetTokens
from whitetuner.families.glm_image.spec import SPEC, GlmImageOptions, auto_shift
from whitetuner.family import BuildFn, Encoder, ModelPaths
from whitetuner.records import Batch, Size


class Model:
    """The Family of GLM-Image. What a mutant may get wrong is a method of its own."""

    spec = SPEC
    keys = KEYS

    def __init__(self, options: GlmImageOptions, paths: ModelPaths) -> None:
        self.options, self.paths = options, paths

    def stride(self) -> int:
        return SPEC.stride(self.paths)

    @cached_property
    def latent_px(self) -> int:
        """Pixels of a side that one number of the latent stands for; the plan of the released model knows no VAE."""
        told = self.paths.folder is not None or "vae" in self.paths.single
        return (self.stride() if told else SPEC.stride_px) // 4

    def encoders(self, task: str) -> list[Encoder]:
        """The language model comes last: it is the largest, and what is wrong with the rest is told before it runs."""
        found: list[Encoder] = [GlyphEncoder(self.paths, self.options), LatentEncoder(self.paths)]
        if task == "edit":
            found += [ReferenceEncoder(self.paths), ReferenceTokens(self.paths)]
        return [*found, TargetTokens(self.paths), PlanGenerator(self.paths, self.options, task == "edit")]

    def load(self, build: BuildFn) -> dict[str, nn.Module]:
        folder = self.paths.component("transformer")
        return {"transformer": build(GlmImageTransformer2DModel, folder, keep_precise=SPEC.keep_precise)}

    def load_decoder(self, build: BuildFn) -> nn.Module:
        return build(AutoencoderKL, self.paths.component("vae"), keep_precise=("*",))

    # -- one prediction -------------------------------------------------------------------------------------

    def predict(
        self, modules: Mapping[str, nn.Module], part: str, batch: Batch, x_t: Tensor, sigma: Tensor
    ) -> Tensor:
        """As in the contract. Needs the fields of the encoders; given pictures where the batch has `reference_latents`."""
        glyphs = batch["glyph_embeds"]
        assert isinstance(glyphs, list)
        prior, clock = self.prior(batch), self.clock(sigma, self.shift(x_t))
        said: list[Tensor] = []
        order: list[int] = []
        for dropped, rows in self.groups(glyphs, batch["dropped"]):
            order += rows
            said.append(
                self.denoise(
                    modules[part],
                    x_t[rows],
                    torch.stack([glyphs[row] for row in rows]),
                    prior[rows],
                    clock[rows],
                    dropped,
                    None if dropped else self.remember(modules[part], batch, rows),
                )
            )
        back = sorted(range(len(order)), key=lambda place: order[place])
        return torch.cat(said)[back] if back != order or len(said) > 1 else said[0]

    def groups(self, glyphs: Sequence[Tensor], dropped: Any) -> list[tuple[bool, list[int]]]:
        """(unguided, rows) that go through the model together: of one length of text and one side of guidance."""
        found: dict[tuple[bool, int], list[int]] = {}
        for row, (text, unguided) in enumerate(zip(glyphs, dropped.tolist())):
            found.setdefault((unguided, len(text)), []).append(row)
        return [(unguided, rows) for (unguided, _), rows in found.items()]

    def denoise(
        self,
        transformer: Any,
        x: Tensor,
        glyphs: Tensor,
        prior: Tensor,
        timestep: Tensor,
        dropped: bool,
        memories: Sequence[Any] | None,
    ) -> Tensor:
        """(B, C, H, W) float32. glyphs: (B, L, D); prior: (B, rows, columns); memories: one for each block."""
        compute = _anchor(transformer)
        said = transformer(
            hidden_states=x.to(compute.dtype),
            encoder_hidden_states=glyphs.to(compute),
            prior_token_id=self.spread(prior),
            # Numbers of the samples without prior, in place of a mask: the model indexes with it, and this has a shape.
            prior_token_drop=torch.arange(len(x) if dropped else 0, device=x.device),
            timestep=timestep,
            target_size=self.size_of(x),
            crop_coords=torch.zeros(len(x), 2, device=x.device),
            kv_caches=memories,
            image_rotary_emb=tuple(one.to(x.device) for one in transformer.rope(x)),
            return_dict=False,
        )[0]
        return said.float()

    def prior(self, batch: Batch) -> Tensor:
        """(B, rows, columns): the picture's own tokens, or, for a share of the visits, those made of its caption."""
        own = batch["prior_tokens"]
        made = batch.fields.get("generated_tokens")
        assert isinstance(own, Tensor) and not isinstance(made, list)
        if made is None or self.options.generated_prior == 0:
            return own
        chosen = [self.imagined(one.id, visit) for one, visit in zip(batch.items, batch.visits)]
        return torch.where(torch.tensor(chosen, device=own.device)[:, None, None], made, own)

    def imagined(self, item_id: str, visit: int) -> bool:
        """Whether this visit learns beside generated tokens."""
        # Its seed is a number of 63 bits as good as drawn, and no tensor: the plan runs `predict` on tensors without content.
        lot = generator_for(0, item_id, visit, "generated_prior").initial_seed() / 2**63
        return lot < self.options.generated_prior

    def spread(self, prior: Tensor) -> Tensor:
        """(B, rows, columns) of 32 px -> (B, 4 rows columns) of 16 px, row by row: each stands for 2x2 of the model's tokens."""
        return prior.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1).long()

    def size_of(self, x: Tensor) -> Tensor:
        """(B, 2): height and width in pixels."""
        size = torch.tensor(x.shape[-2:], dtype=torch.float32, device=x.device) * self.latent_px
        return size.expand(len(x), 2)

    def shift(self, x: Tensor) -> float:
        """mu of the model's schedule, by the target's tokens (2x2 of the latent)."""
        return auto_shift(x.shape[-2] * x.shape[-1] // 4)

    def clock(self, sigma: Tensor, shift: float) -> Tensor:
        """The model is told the time before the shift, sigma = mu u / (1 + (mu - 1) u), in thousandths and one earlier."""
        sigma = sigma.double()
        u = sigma / (sigma + shift * (1 - sigma))
        return (1000 * u - 1).clamp(min=0).float()

    # -- given pictures -------------------------------------------------------------------------------------

    def remember(
        self, transformer: Any, batch: Batch | Mapping[str, Any], rows: Sequence[int]
    ) -> list[Recalled] | None:
        """Keys and values of the given pictures in every block, by the present weights; None without given pictures."""
        fields: Mapping[str, Any] = batch.fields if isinstance(batch, Batch) else batch
        if "reference_latents" not in fields:
            return None
        latents = fields["reference_latents"][rows]
        tokens = fields["reference_tokens"][rows]
        kept: list[list[Kept]] = []
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.options.reference_gradients):
            for high, wide in fields["reference_sizes"][0].tolist():
                latent, latents = latents[:, : high * wide], latents[:, high * wide :]
                code, tokens = tokens[:, : high * wide // 16], tokens[:, high * wide // 16 :]
                kept.append([Kept() for _ in transformer.transformer_blocks])
                self.look(
                    transformer,
                    latent.transpose(1, 2).unflatten(2, (high, wide)),
                    code.unflatten(1, (high // 4, wide // 4)),
                    kept[-1],
                )
        return [Recalled(of_block) for of_block in zip(*kept)]

    def look(self, transformer: Any, picture: Tensor, prior: Tensor, kept: Sequence[Kept]) -> None:
        """One given picture through the model: free of noise, beside its own tokens, without text. (B, C, H, W)."""
        width = transformer.config.text_embed_dim
        nothing = torch.zeros(len(picture), 0, width, device=picture.device)
        start = torch.zeros(len(picture), device=picture.device)
        self.denoise(transformer, picture, nothing, prior, start, False, kept)

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
        """As in the contract. Drawn from generated tokens, or, where a target was encoded and none were, from its own.

        The unguided side has no prior tokens and no given pictures, whatever the negative text is; its quotes count.
        Raises UserError when the tokens were made for another size.
        """
        prior = prompt["generated_tokens" if "generated_tokens" in prompt else "prior_tokens"]
        stride = self.stride()
        if tuple(prior.shape) != (size.height // stride, size.width // stride):
            raise UserError(
                "the picture was planned at {columns}x{rows} tokens, and {width}x{height} pixels need another plan",
                where="size",
                mend="encode the prompt again for this size",
                columns=prior.shape[1],
                rows=prior.shape[0],
                width=size.width,
                height=size.height,
            )
        transformer = modules["transformer"]
        compute = _anchor(transformer)
        pipe = self.pipeline(modules, decoder)
        given = {name: one[None].to(compute.device) for name, one in prompt.items() if "reference" in name}
        pipe.transformer = Guided(transformer, self.remember(transformer, given, [0]))
        pipe.home = compute.device
        pipe.unwanted = None if negative is None else negative["glyph_embeds"][None].to(compute)

        latent = pipe(
            prompt_embeds=prompt["glyph_embeds"][None].to(compute),
            prior_token_ids=self.spread(prior[None]).to(compute.device),
            guidance_scale=cfg if negative is not None else 1.0,
            width=size.width,
            height=size.height,
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(seed),
            callback_on_step_end=ending_when_told(on_step),
            output_type="latent",
        ).images
        # Decoded here: the decoder may be of another dtype, or wait on another device, than the denoiser.
        assert isinstance(decoder, AutoencoderKL)
        latent = latent.to(decoder.device, decoder.dtype)
        mean, deviation = moments_of(decoder, latent)
        pixels = decoder.decode(latent * deviation + mean, return_dict=False)[0]
        return pipe.image_processor.postprocess(pixels, output_type="pil")

    def pipeline(self, modules: Mapping[str, nn.Module], decoder: nn.Module) -> DrawingPipeline:
        """The diffusers pipeline around our modules, without text encoder and language model; nothing is moved."""
        folder = self.paths.component("scheduler")
        pipe = DrawingPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder, local_files_only=True),
            vae=decoder,
            transformer=modules["transformer"],
            **dict.fromkeys(("tokenizer", "processor", "text_encoder", "vision_language_encoder")),
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe


def _anchor(transformer: Any) -> Tensor:
    """A weight whose dtype and device are those the model computes in: an embedding is never quantised or swapped out."""
    return transformer.prior_token_embedding.weight
