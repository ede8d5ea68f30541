"""GLM-Image's latents: the target's and, in an edit, the given pictures'; the mode of the VAE, normalised by channel.

As in diffusers pipelines/glm_image/pipeline_glm_image.py (`__call__`, section 6).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from whitetuner.families.files import files_of
from whitetuner.families.glm_image.prior import references_of
from whitetuner.family import BuildFn, Layout, ModelPaths, Reads, fingerprint_files
from whitetuner.records import EncodeInput


class LatentEncoder:
    """Target -> `latent` (C, H, W), H and W an eighth of the picture's."""

    name = "vae"
    fields: Mapping[str, Layout] = {"latent": "stack"}
    reads: frozenset[Reads] = frozenset({"target"})

    def __init__(self, paths: ModelPaths) -> None:
        self.paths = paths
        self._vae: Any = None

    def fingerprint(self) -> str:
        files = files_of(self.paths.component("vae"))
        return fingerprint_files(files, extra=f"glm-image {self.name} 1: {sorted(self.fields)}")

    def load(self, build: BuildFn) -> None:
        self._vae = build(AutoencoderKL, self.paths.component("vae"), keep_precise=("*",))

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        assert self._vae is not None, "encode before load"
        return {"latent": self.latent(self._vae, given.target[0]).cpu()}

    def latent(self, vae: Any, picture: Image.Image) -> Tensor:
        """(C, H, W) of one RGB picture whose sides are multiples of the stride."""
        moments = vae.encode(self.pixels(picture).to(vae.device, vae.dtype)).latent_dist
        return self.normalise(vae, moments.mode())[0]

    def pixels(self, picture: Image.Image) -> Tensor:
        """(1, 3, height, width) in [-1, 1]."""
        # Batch first and then permuted, as diffusers does: other strides choose another convolution, and other last bits.
        values = torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32)[None])
        return 2.0 * (values / 255.0).permute(0, 3, 1, 2) - 1.0

    def normalise(self, vae: Any, latent: Tensor) -> Tensor:
        """latent: (1, C, H, W)."""
        mean, deviation = moments_of(vae, latent)
        return (latent - mean) / deviation

    def free(self) -> None:
        self._vae = None


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
