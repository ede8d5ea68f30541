"""Z-Image's encoders: caption -> the last but one hidden state of Qwen3; picture -> the VAE's mode, shifted and scaled.

As in diffusers pipelines/z_image/pipeline_z_image.py (`_encode_prompt`) and pipeline_z_image_img2img.py (`prepare_latents`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from whitetuner.errors import UserError
from whitetuner.families.files import files_of, read_config
from whitetuner.families.picture_latents import PictureLatents
from whitetuner.families.qwen3_text import KEEP_PRECISE, Qwen3Text, first_layers
from whitetuner.family import BuildFn, Layout, fingerprint_files
from whitetuner.records import EncodeInput


class TextEncoder(Qwen3Text):
    """Caption -> `prompt_embeds` (L, hidden): one row for each token of caption and template, no padding."""

    fields: Mapping[str, Layout] = {"prompt_embeds": "ragged"}
    title = "Z-Image"
    thinking = True  # which adds nothing to the text

    def fingerprint(self) -> str:
        return fingerprint_files(self.files(), extra=f"z-image text 1: {self.options.max_sequence_length}")

    def load(self, build: BuildFn) -> None:
        """Raises UserError when the folder is not one of a Qwen3."""
        folder = self.paths.component("text_encoder")
        layers = read_config(folder / "config.json").get("num_hidden_layers")
        if not isinstance(layers, int) or layers < 2:
            raise UserError(
                "config.json is not one of a Qwen3 text encoder (num_hidden_layers is {layers})",
                where=str(folder),
                mend="download the text_encoder folder of the model again",
                layers=layers,
            )
        kind = first_layers(self.layers_read(layers), norm=False)
        self._model = build(kind, folder, keep_precise=KEEP_PRECISE)

    def layers_read(self, layers: int) -> int:
        """The state before the last layer is the text."""
        return layers - 1

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        assert self._model is not None, "encode before load"
        device = self._model.embed_tokens.weight.device
        tokens = self.tokens(given.caption)
        mask = tokens["attention_mask"].bool()
        states = self._model(
            input_ids=tokens["input_ids"].to(device), attention_mask=mask.to(device), use_cache=False
        ).last_hidden_state.cpu()
        return {"prompt_embeds": self.kept(states[0], mask[0])}

    def kept(self, states: Tensor, mask: Tensor) -> Tensor:
        """The rows of real tokens."""
        return states[mask]


class LatentEncoder(PictureLatents):
    """Target -> `latent` (C, H, W): mode of the VAE, shifted and scaled by the numbers of its config."""

    kind = AutoencoderKL

    def fingerprint(self) -> str:
        return fingerprint_files(files_of(self.paths.component("vae")), extra="z-image vae 1")

    def normalise(self, vae: AutoencoderKL, latent: Tensor) -> Tensor:
        return (latent - vae.config.shift_factor) * vae.config.scaling_factor
