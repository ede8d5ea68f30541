"""FLUX.2 Klein's encoders: caption -> three layers of Qwen3; target and given pictures -> normalised 2x2 patches of the
VAE's mode.

As in diffusers pipelines/flux2/pipeline_flux2_klein.py (`_get_qwen3_prompt_embeds`, `_encode_vae_image`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from diffusers import AutoencoderKLFlux2
from PIL import Image
from torch import Tensor

from whitetuner.errors import UserError
from whitetuner.families.files import files_of
from whitetuner.families.picture_latents import PictureLatents
from whitetuner.families.qwen3_text import KEEP_PRECISE, Qwen3Text, first_layers
from whitetuner.family import BuildFn, Layout, Reads, fingerprint_files
from whitetuner.records import EncodeInput


class TextEncoder(Qwen3Text):
    """Caption -> `prompt_embeds` (L, layers * hidden), padding included: the model attends to it, without a
    mask.
    """

    fields: Mapping[str, Layout] = {"prompt_embeds": "stack"}
    title = "FLUX.2 Klein"
    thinking = False

    def fingerprint(self) -> str:
        options = f"{self.options.max_sequence_length} {self.options.text_encoder_out_layers}"
        return fingerprint_files(self.files(), extra=f"klein text 1: {options}")

    def load(self, build: BuildFn) -> None:
        """Raises UserError when the options ask for a layer that the encoder does not have.

        One layer more than the last one read is built, because the hidden state of the very last is given out after the final
        norm.
        """
        folder, last = self.paths.component("text_encoder"), max(self.options.text_encoder_out_layers)
        try:
            layers = int(
                json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                "config.json is not one of a Qwen3 text encoder ({reason})",
                where=str(folder),
                mend="download the text_encoder folder of the model again",
                reason=f"it has no {error}" if isinstance(error, KeyError) else error,
            ) from error
        if last > layers or min(self.options.text_encoder_out_layers) < 0:
            raise UserError(
                "layer {last} of the text encoder is asked for, but it has {layers}",
                where="model.options.text_encoder_out_layers",
                mend="leave the option out: FLUX.2 Klein reads layers 9, 18 and 27",
                last=last,
                layers=layers,
            )
        self._model = build(first_layers(last + 1, norm=True), folder, keep_precise=KEEP_PRECISE)

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        assert self._model is not None, "encode before load"
        device = self._model.embed_tokens.weight.device
        tokens = self.tokens(given.caption)
        states = self._model(
            input_ids=tokens["input_ids"].to(device),
            attention_mask=tokens["attention_mask"].to(device),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        return {
            "prompt_embeds": torch.cat([states[k][0] for k in self.options.text_encoder_out_layers], -1).cpu()
        }


class LatentEncoder(PictureLatents):
    """Target -> `latent` (C, H, W): mode of the VAE, 2x2 patches as channels, normalised by its batch-norm
    buffers.
    """

    kind = AutoencoderKLFlux2

    def fingerprint(self) -> str:
        return fingerprint_files(files_of(self.paths.component("vae")), extra="klein vae 1")

    def latent(self, vae: AutoencoderKLFlux2, picture: Image.Image) -> Tensor:
        moments = vae.encode(self.pixels(picture).to(vae.device, vae.dtype)).latent_dist
        # pixel_unshuffle orders channels as (channel, row, column) of the patch, as the model wants them.
        return self.normalise(vae, torch.nn.functional.pixel_unshuffle(moments.mode(), 2))[0]

    def normalise(self, vae: AutoencoderKLFlux2, latent: Tensor) -> Tensor:
        """By the running statistics of the VAE's `bn`, never those of the batch."""
        mean = vae.bn.running_mean.view(1, -1, 1, 1).to(latent)
        deviation = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).to(latent)
        return (latent - mean) / deviation


class ReferenceEncoder(LatentEncoder):
    """Given pictures -> `reference_latents` (N, C), the tokens of all of them one after the other, and `reference_sizes`
    (n, 2), latent height and width of each. A picture becomes a latent as a target does.
    """

    name = "references"
    fields: Mapping[str, Layout] = {"reference_latents": "stack", "reference_sizes": "stack"}
    reads: frozenset[Reads] = frozenset({"conditions"})

    def fingerprint(self) -> str:
        return fingerprint_files(files_of(self.paths.component("vae")), extra="klein references 1")

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        assert self._vae is not None, "encode before load"
        vae = self._vae
        latents = [self.latent(vae, picture).cpu() for picture in self.in_order(given.conditions)]
        return {
            "reference_latents": torch.cat([one.flatten(1).T for one in latents]),
            "reference_sizes": torch.tensor([list(one.shape[-2:]) for one in latents]),
        }

    def in_order(self, pictures: tuple[Image.Image, ...]) -> tuple[Image.Image, ...]:
        """As they were given: the first is "image 1" of the prompt."""
        return pictures
