"""Z-Image's encoders: caption -> the last but one hidden state of Qwen3; picture -> the VAE's mode, shifted and scaled.

As in diffusers pipelines/z_image/pipeline_z_image.py (`_encode_prompt`) and pipeline_z_image_img2img.py (`prepare_latents`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3Model

from whitetuner.errors import UserError
from whitetuner.families.z_image_facts import ZImageOptions, read_config
from whitetuner.family import BuildFn, Layout, ModelPaths, Reads, fingerprint_files
from whitetuner.records import EncodeInput


class TextEncoder:
    """Caption -> `prompt_embeds` (L, hidden): one row for each token of caption and template, no padding."""

    name = "text"
    fields: Mapping[str, Layout] = {"prompt_embeds": "ragged"}
    reads: frozenset[Reads] = frozenset({"caption"})

    def __init__(self, paths: ModelPaths, options: ZImageOptions) -> None:
        self.paths, self.options = paths, options
        self._model: Qwen3Model | None = None
        self._tokenizer: Qwen2TokenizerFast | None = None

    def fingerprint(self) -> str:
        files = _files(self.paths.component("text_encoder")) + _files(self.paths.component("tokenizer"))
        return fingerprint_files(files, extra=f"z-image text 1: {self.options.max_sequence_length}")

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
        kind = first_layers(self.layers_read(layers), layers)
        self._model = build(kind, folder, keep_precise=("*norm*", "embed_tokens*"))

    def layers_read(self, layers: int) -> int:
        """The state before the last layer is the text."""
        return layers - 1

    def text(self, caption: str) -> str:
        """What the tokenizer is given: the caption as a chat message, thinking left on (which adds nothing)."""
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": caption}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,
        )

    def count_tokens(self, caption: str) -> int:
        """Tokens of a caption with its template; what exceeds max_sequence_length is cut. Needs no `load`."""
        return len(self.tokenizer(self.text(caption))["input_ids"])

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        assert self._model is not None, "encode before load"
        device = self._model.embed_tokens.weight.device
        # Padded and cut as the pipeline does, padding taken off after: another length would give other last bits.
        tokens = self.tokenizer(
            self.text(given.caption),
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=self.options.max_sequence_length,
        )
        mask = tokens["attention_mask"].bool()
        states = self._model(
            input_ids=tokens["input_ids"].to(device), attention_mask=mask.to(device), use_cache=False
        ).last_hidden_state.cpu()
        return {"prompt_embeds": self.kept(states[0], mask[0])}

    def kept(self, states: Tensor, mask: Tensor) -> Tensor:
        """The rows of real tokens."""
        return states[mask]

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
                    "the tokenizer has no chat template, which Z-Image wraps its prompts in",
                    where=str(folder),
                    mend="download the whole tokenizer folder again (chat_template.jinja is part of it)",
                )
            self._tokenizer = found
        return self._tokenizer


def first_layers(count: int, layers: int) -> type[Qwen3Model]:
    """Qwen3 that builds and loads the first `count` of its `layers` layers, without the final norm: the state after them."""
    left_out = "|".join(str(index) for index in range(count, layers))

    class Qwen3FirstLayers(Qwen3Model):
        # Both transformers' loader and ours leave out what matches: the other layers, the norm and the head.
        _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [
            r"lm_head\.",
            r"^(model\.)?norm\.",
            rf"layers\.({left_out})\." if left_out else r"^$",
        ]

        def __init__(self, config: Qwen3Config) -> None:
            config = copy.deepcopy(config)
            config.num_hidden_layers = count
            config.layer_types = config.layer_types[:count]
            super().__init__(config)
            self.norm = nn.Identity()

    return Qwen3FirstLayers


class LatentEncoder:
    """Target -> `latent` (C, H, W): mode of the VAE, shifted and scaled by the numbers of its config."""

    name = "vae"
    fields: Mapping[str, Layout] = {"latent": "stack"}
    reads: frozenset[Reads] = frozenset({"target"})

    def __init__(self, paths: ModelPaths) -> None:
        self.paths = paths
        self._vae: AutoencoderKL | None = None

    def fingerprint(self) -> str:
        return fingerprint_files(_files(self.paths.component("vae")), extra="z-image vae 1")

    def load(self, build: BuildFn) -> None:
        self._vae = build(AutoencoderKL, self.paths.component("vae"), keep_precise=("*",))

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        assert self._vae is not None, "encode before load"
        return {"latent": self.latent(self._vae, given.target[0]).cpu()}

    def latent(self, vae: AutoencoderKL, picture: Image.Image) -> Tensor:
        """(C, H, W) of one RGB picture whose sides are multiples of the stride."""
        moments = vae.encode(self.pixels(picture).to(vae.device, vae.dtype)).latent_dist
        return self.normalise(vae, moments.mode())[0]

    def pixels(self, picture: Image.Image) -> Tensor:
        """(1, 3, height, width) in [-1, 1]."""
        # Batch first and then permuted, as diffusers does: other strides choose another convolution, and other last bits.
        values = torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32)[None])
        return 2.0 * (values / 255.0).permute(0, 3, 1, 2) - 1.0

    def normalise(self, vae: AutoencoderKL, latent: Tensor) -> Tensor:
        return (latent - vae.config.shift_factor) * vae.config.scaling_factor

    def free(self) -> None:
        self._vae = None


def _files(component: Path) -> list[Path]:
    """The files that a component is; one, when it is a single file."""
    return [component] if component.is_file() else [path for path in component.iterdir() if path.is_file()]
