"""FLUX.2 Klein's encoders: caption -> three layers of Qwen3; target and given pictures -> normalised 2x2 patches of the
VAE's mode.

As in diffusers pipelines/flux2/pipeline_flux2_klein.py (`_get_qwen3_prompt_embeds`, `_encode_vae_image`).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2
from PIL import Image
from torch import Tensor
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3Model

from whitetuner.errors import UserError
from whitetuner.families.flux2_klein.spec import KleinOptions
from whitetuner.family import BuildFn, Layout, ModelPaths, Reads, fingerprint_files
from whitetuner.records import EncodeInput


class TextEncoder:
    """Caption -> `prompt_embeds` (L, layers * hidden), padding included: the model attends to it, without a
    mask.
    """

    name = "text"
    fields: Mapping[str, Layout] = {"prompt_embeds": "stack"}
    reads: frozenset[Reads] = frozenset({"caption"})

    def __init__(self, paths: ModelPaths, options: KleinOptions) -> None:
        self.paths, self.options = paths, options
        self._model: Qwen3Model | None = None
        self._tokenizer: Qwen2TokenizerFast | None = None

    def fingerprint(self) -> str:
        files = _files(self.paths.component("text_encoder")) + _files(self.paths.component("tokenizer"))
        options = f"{self.options.max_sequence_length} {self.options.text_encoder_out_layers}"
        return fingerprint_files(files, extra=f"klein text 1: {options}")

    def load(self, build: BuildFn) -> None:
        """Raises UserError when the options ask for a layer that the encoder does not have."""
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
        self._model = build(first_layers(last + 1), folder, keep_precise=("*norm*", "embed_tokens*"))

    def text(self, caption: str) -> str:
        """What the tokenizer is given: the caption as a chat message, thinking switched off."""
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": caption}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )

    def count_tokens(self, caption: str) -> int:
        """Tokens of a caption with its template; what exceeds max_sequence_length is cut. Needs no `load`."""
        return len(self.tokenizer(self.text(caption))["input_ids"])

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        assert self._model is not None, "encode before load"
        device = self._model.embed_tokens.weight.device
        tokens = self.tokenizer(
            self.text(given.caption),
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=self.options.max_sequence_length,
        )
        states = self._model(
            input_ids=tokens["input_ids"].to(device),
            attention_mask=tokens["attention_mask"].to(device),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        return {
            "prompt_embeds": torch.cat([states[k][0] for k in self.options.text_encoder_out_layers], -1).cpu()
        }

    def free(self) -> None:
        self._model = None

    @property
    def tokenizer(self) -> Qwen2TokenizerFast:
        """Read at first use. Raises UserError when it lacks the chat template."""
        if self._tokenizer is None:
            folder = self.paths.component("tokenizer")
            found = Qwen2TokenizerFast.from_pretrained(folder, local_files_only=True)
            if found.chat_template is None:
                raise UserError(
                    "the tokenizer has no chat template, which FLUX.2 Klein wraps its prompts in",
                    where=str(folder),
                    mend="download the whole tokenizer folder again (chat_template.jinja is part of it)",
                )
            self._tokenizer = found
        return self._tokenizer


def first_layers(count: int) -> type[Qwen3Model]:
    """Qwen3 that builds and loads its first `count` layers only: of 36, FLUX.2 Klein reads 27.

    One more than the last layer read, because the hidden state of the very last is given out after the final
    norm.
    """

    class Qwen3FirstLayers(Qwen3Model):
        # Both transformers' loader and ours leave out what matches: the other layers and the head.
        _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [
            r"lm_head\.",
            rf"layers\.(?!({'|'.join(map(str, range(count)))})\.)\d+\.",
        ]

        def __init__(self, config: Qwen3Config) -> None:
            config = copy.deepcopy(config)
            config.num_hidden_layers = min(count, config.num_hidden_layers)
            config.layer_types = config.layer_types[: config.num_hidden_layers]
            super().__init__(config)

    return Qwen3FirstLayers


class LatentEncoder:
    """Target -> `latent` (C, H, W): mode of the VAE, 2x2 patches as channels, normalised by its batch-norm
    buffers.
    """

    name = "vae"
    fields: Mapping[str, Layout] = {"latent": "stack"}
    reads: frozenset[Reads] = frozenset({"target"})

    def __init__(self, paths: ModelPaths) -> None:
        self.paths = paths
        self._vae: AutoencoderKLFlux2 | None = None

    def fingerprint(self) -> str:
        return fingerprint_files(_files(self.paths.component("vae")), extra="klein vae 1")

    def load(self, build: BuildFn) -> None:
        self._vae = build(AutoencoderKLFlux2, self.paths.component("vae"), keep_precise=("*",))

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        assert self._vae is not None, "encode before load"
        return {"latent": self.latent(self._vae, given.target[0]).cpu()}

    def latent(self, vae: AutoencoderKLFlux2, picture: Image.Image) -> Tensor:
        """(C, H, W) of one RGB picture whose sides are multiples of the stride."""
        moments = vae.encode(self.pixels(picture).to(vae.device, vae.dtype)).latent_dist
        # pixel_unshuffle orders channels as (channel, row, column) of the patch, as the model wants them.
        return self.normalise(vae, torch.nn.functional.pixel_unshuffle(moments.mode(), 2))[0]

    def pixels(self, picture: Image.Image) -> Tensor:
        """(1, 3, height, width) in [-1, 1]."""
        # Batch first and then permuted, as diffusers does: other strides choose another convolution, and
        # other last bits.
        values = torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32)[None])
        return 2.0 * (values / 255.0).permute(0, 3, 1, 2) - 1.0

    def normalise(self, vae: AutoencoderKLFlux2, latent: Tensor) -> Tensor:
        """By the running statistics of the VAE's `bn`, never those of the batch."""
        mean = vae.bn.running_mean.view(1, -1, 1, 1).to(latent)
        deviation = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).to(latent)
        return (latent - mean) / deviation

    def free(self) -> None:
        self._vae = None


class ReferenceEncoder(LatentEncoder):
    """Given pictures -> `reference_latents` (N, C), the tokens of all of them one after the other, and `reference_sizes`
    (n, 2), latent height and width of each. A picture becomes a latent as a target does.
    """

    name = "references"
    fields: Mapping[str, Layout] = {"reference_latents": "stack", "reference_sizes": "stack"}
    reads: frozenset[Reads] = frozenset({"conditions"})

    def fingerprint(self) -> str:
        return fingerprint_files(_files(self.paths.component("vae")), extra="klein references 1")

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


def _files(component: Path) -> list[Path]:
    """The files that a component is; one, when it is a single file."""
    return [component] if component.is_file() else [path for path in component.iterdir() if path.is_file()]
