"""GLM-Image's latents: the target's and, in an edit, the given pictures'; the mode of the VAE, normalised by channel.

As in diffusers pipelines/glm_image/pipeline_glm_image.py (`__call__`, section 6).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from whitetuner.families.files import files_of
from whitetuner.families.glm_image.prior import references_of
from whitetuner.families.picture_latents import PictureLatents
from whitetuner.family import Layout, Reads, fingerprint_files
from whitetuner.records import EncodeInput


class LatentEncoder(PictureLatents):
    """Target -> `latent` (C, H, W), H and W an eighth of the picture's."""

    kind = AutoencoderKL

    def fingerprint(self) -> str:
        files = files_of(self.paths.component("vae"))
        return fingerprint_files(files, extra=f"glm-image {self.name} 1: {sorted(self.fields)}")

    def normalise(self, vae: Any, latent: Tensor) -> Tensor:
        mean, deviation = moments_of(vae, latent)
        return (latent - mean) / deviation


class ReferenceEncoder(LatentEncoder):
    """Given pictures -> their latents, flat, one picture after the other, and their sizes.

    reference_latents: (N, C), row by row;  reference_sizes: (n, 2) rows and columns of each latent
    """

    name = "references"
    fields: Mapping[str, Layout] = {"reference_latents": "stack", "reference_sizes": "stack"}
    reads: frozenset[Reads] = frozenset({"conditions"})

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        assert self._vae is not None, "encode before load"
        found = [self.latent(self._vae, one).cpu() for one in references_of(given)]
        return {
            "reference_latents": torch.cat([one.flatten(1).T for one in found]).contiguous(),
            "reference_sizes": torch.tensor([one.shape[1:] for one in found]),
        }


def moments_of(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, deviation) of the latents' channels as (1, C, 1, 1), of the VAE's config."""
    mean, deviation = (
        torch.tensor(values).view(1, -1, 1, 1).to(like)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, deviation
