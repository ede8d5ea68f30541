"""Picture -> latent: what the encoders of picture models share. Which VAE it is, and how latents are normalised, is theirs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from whitetuner.family import BuildFn, Layout, ModelPaths, Reads
from whitetuner.records import EncodeInput


class PictureLatents(ABC):
    """Target -> `latent` (C, H, W): the mode of the VAE, normalised. An Encoder but for `fingerprint` and `normalise`.

    kind: class of the VAE
    """

    name = "vae"
    fields: Mapping[str, Layout] = {"latent": "stack"}
    reads: frozenset[Reads] = frozenset({"target"})
    kind: ClassVar[type]

    def __init__(self, paths: ModelPaths) -> None:
        self.paths = paths
        self._vae: Any = None

    def load(self, build: BuildFn) -> None:
        """See family.Encoder. The VAE is never quantised."""
        self._vae = build(self.kind, self.paths.component("vae"), keep_precise=("*",))

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        """See family.Encoder."""
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

    @abstractmethod
    def normalise(self, vae: Any, latent: Tensor) -> Tensor:
        """(1, C, H, W), as the denoiser sees it."""

    def free(self) -> None:
        """See family.Encoder."""
        self._vae = None
