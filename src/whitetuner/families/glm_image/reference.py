"""The diffusers pipeline of GLM-Image, whole, as its users call it: what families/contract.py compares us with.

Nothing of model.py or the encoders is used here; what it shares with them would not be tested. One thing is mended: with
transformers 5.23 the pipeline hands the picture tokenizer packed features where a list is expected (`bridge`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import GlmImagePipeline
from diffusers.pipelines.glm_image.pipeline_glm_image import retrieve_latents
from PIL import Image
from torch import Tensor

from whitetuner.families.contract import Walk, quiet
from whitetuner.families.glm_image.spec import GlmImageOptions
from whitetuner.records import EncodeInput


class Reference:
    """See contract.Reference. folder: a whole model folder, of any dtype; here float32 on the CPU."""

    def __init__(self, folder: Path, options: GlmImageOptions) -> None:
        with quiet():
            self.pipe: Any = GlmImagePipeline.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True
            )
        self.pipe.set_progress_bar_config(disable=True)
        bridge(self.pipe)
        self.length = options.max_sequence_length
        self._seen: dict[tuple[bytes, ...], tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        """Without `generated_tokens`, which items have only on demand (`plan`)."""
        glyphs, _ = self.pipe.encode_prompt(given.caption, False, max_sequence_length=self.length)
        found = {
            "glyph_embeds": glyphs[0],
            "dropped": torch.tensor(given.unconditional),
            "latent": self._latent(given.target[0]),
            "prior_tokens": self._codes(given.target[0]).int(),
        }
        if given.conditions:
            ids, grids = self._looked(given)
            latents = [self._latent(one) for one in given.conditions]
            codes = []
            for one, (_, high, wide) in zip(ids.split(grids.prod(-1).tolist()), grids.tolist()):
                codes.append(one.view(high, wide)[::2, ::2].flatten())
            found["reference_latents"] = torch.cat([one.permute(1, 2, 0).flatten(0, 1) for one in latents])
            found["reference_sizes"] = torch.tensor([one.shape[1:] for one in latents])
            found["reference_tokens"] = torch.cat(codes).int()
        return found

    @torch.no_grad()
    def plan(self, given: EncodeInput, seed: int) -> Tensor:
        """(rows, columns) that the pipeline would generate for the caption (and pictures) at the target's size."""
        assert given.size is not None
        with torch.random.fork_rng(devices=[]):
            ids, _, _ = self._plan(given, torch.Generator().manual_seed(seed))
        return ids.view(given.size.height // 16, given.size.width // 16)[::2, ::2]

    def walk(self, given: Sequence[EncodeInput], noise: Tensor, steps: int, cfg: float) -> Walk:
        """One item after the other: in a batch the pipeline fills shorter texts up with zeros that the model sees."""
        walks = [self._points(one, start[None], steps, cfg) for one, start in zip(given, noise)]
        return Walk(self.pipe.scheduler.sigmas.tolist(), [torch.cat(at) for at in zip(*walks)])

    def _points(self, one: EncodeInput, noise: Tensor, steps: int, cfg: float) -> list[Tensor]:
        assert one.size is not None
        points = [noise]

        def after_step(pipe: Any, index: int, timestep: Tensor, values: dict) -> dict:
            points.append(values["latents"])
            return values

        more: dict[str, Any] = {}
        if one.conditions:
            ids, grids = self._looked(one)
            more = {
                "image": list(one.conditions),
                "prior_token_image_ids": [ids],
                "source_image_grid_thw": [grids],
            }
        codes = self._codes(one.target[0])
        self.pipe(
            prompt=one.caption,
            prior_token_ids=self.pipe._upsample_token_ids(codes, *codes.shape),
            guidance_scale=cfg,
            latents=noise,
            width=one.size.width,
            height=one.size.height,
            num_inference_steps=steps,
            callback_on_step_end=after_step,
            output_type="latent",
            max_sequence_length=self.length,
            **more,
        )
        return points

    def _plan(self, given: EncodeInput, generator: torch.Generator | None = None) -> tuple[Any, Any, Any]:
        """(generated ids, ids of the given pictures, their grids); the two last None without any."""
        assert given.size is not None
        state = torch.get_rng_state()
        pictures = [list(given.conditions)] if given.conditions else None
        ids, seen, grids = self.pipe.generate_prior_tokens(
            given.caption, given.size.height, given.size.width, pictures, generator=generator
        )
        torch.set_rng_state(state)
        return ids[0], None if seen is None else seen[0], None if grids is None else grids[0]

    def _looked(self, given: EncodeInput) -> tuple[Tensor, Tensor]:
        """(ids of the given pictures, their grids); asked once, for the pipeline plans the whole result beside them."""
        key = tuple(one.tobytes() for one in given.conditions)
        if key not in self._seen:
            _, ids, grids = self._plan(given)
            self._seen[key] = (ids, grids)
        return self._seen[key]

    def _codes(self, picture: Image.Image) -> Tensor:
        """(rows, columns) of a picture, by the lines that the pipeline has for given pictures."""
        seen = self.pipe.processor.image_processor(images=picture, return_tensors="pt")
        grid = seen["image_grid_thw"]
        features = self.pipe.vision_language_encoder.get_image_features(seen["pixel_values"], grid)
        packed = torch.cat(features.pooler_output)
        ids = self.pipe.vision_language_encoder.get_image_tokens(packed, grid)
        return ids.view(int(grid[0, 1]), int(grid[0, 2]))

    def _latent(self, picture: Image.Image) -> Tensor:
        vae = self.pipe.vae
        mean, deviation = (
            torch.tensor(values).view(1, -1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        pixels = self.pipe.image_processor.preprocess(picture)
        return ((retrieve_latents(vae.encode(pixels), sample_mode="argmax") - mean) / deviation)[0]


def bridge(pipe: Any) -> None:
    """Packed features, as the pipeline has them, <-> a list of (C, rows, columns), as transformers 5.23 has them.

    For the pipeline's two calls alone, which name no argument; the language model's own pass as they are.
    """
    model = pipe.vision_language_encoder
    right_features, right_tokens = model.get_image_features, model.get_image_tokens

    def features(*args: Any, **given: Any) -> Any:
        said = right_features(*args, **given)
        if given or len(args) != 2:
            return said
        return SimpleNamespace(pooler_output=[one.flatten(1).T for one in said.pooler_output])

    def tokens(packed: Tensor, grids: Tensor) -> Tensor:
        parts = packed.split(grids.prod(-1).tolist())
        return right_tokens(
            [part.T.unflatten(1, (high, wide)) for part, (_, high, wide) in zip(parts, grids.tolist())]
        )

    model.get_image_features, model.get_image_tokens = features, tokens
