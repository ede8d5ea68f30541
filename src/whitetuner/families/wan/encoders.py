"""WAN's encoders: caption -> UMT5's last states; clip -> normalised mode of the VAE; first frame -> condition and CLIP features.

As in diffusers pipelines/wan/pipeline_wan_i2v.py (`_get_t5_prompt_embeds`, `encode_image`, `prepare_latents`).
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import ftfy
import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPVisionModel, PreTrainedTokenizerFast, UMT5EncoderModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from whitetuner.errors import UserError
from whitetuner.families.files import files_of
from whitetuner.families.wan.spec import FRAMES_STEP, TEXT_TOKENS
from whitetuner.family import BuildFn, Layout, ModelPaths, Reads, fingerprint_files
from whitetuner.records import EncodeInput


class TextEncoder:
    """Caption -> `prompt_embeds` (L, width), no padding: UMT5's last hidden states, the end mark included."""

    name = "text"
    fields: Mapping[str, Layout] = {"prompt_embeds": "ragged"}
    reads: frozenset[Reads] = frozenset({"caption"})

    def __init__(self, paths: ModelPaths) -> None:
        self.paths = paths
        self._model: Any = None
        self._tokenizer: Any = None

    def fingerprint(self) -> str:
        files = [
            *files_of(self.paths.component("text_encoder")),
            *files_of(self.paths.component("tokenizer")),
        ]
        return fingerprint_files(files, extra="wan text 2")

    def load(self, build: BuildFn) -> None:
        folder = self.paths.component("text_encoder")
        self._model = build(UMT5EncoderModel, folder, keep_precise=("*norm*", "shared.*", "*relative*"))

    def clean(self, caption: str) -> str:
        """Mended letters, no HTML entities, single blanks: what WAN was trained on."""
        text = html.unescape(html.unescape(ftfy.fix_text(caption))).strip()
        return re.sub(r"\s+", " ", text).strip()

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        """The text is filled up to 512 tokens, as the pipeline does, and the filling's states are dropped."""
        assert self._model is not None, "encode before load"
        tokens = self.tokenizer(
            [self.clean(given.caption)],
            padding="max_length",
            max_length=TEXT_TOKENS,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        device = self._model.device
        states = self._model(
            tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
        ).last_hidden_state
        return {"prompt_embeds": states[0, : self.kept(tokens["attention_mask"])].cpu()}

    def kept(self, mask: Tensor) -> int:
        """Tokens of the text. mask: (1, 512)."""
        return int(mask.gt(0).sum())

    def free(self) -> None:
        self._model = None

    @property
    def tokenizer(self) -> Any:
        """Read at first use.

        tokenizer.json as it is: transformers 5's T5Tokenizer makes one of its own from the words in it, whose unknown letters
        are always number 2, which is <s> in UMT5.
        """
        if self._tokenizer is None:
            folder = self.paths.component("tokenizer")
            whole = (folder / "tokenizer.json").is_file()
            kind = PreTrainedTokenizerFast if whole else AutoTokenizer
            self._tokenizer = kind.from_pretrained(folder, local_files_only=True)
        return self._tokenizer


class LatentEncoder:
    """Clip -> `latent` (C, T, H, W), T = (frames - 1) / 4 + 1: the VAE's mode, normalised channel by channel.

    Encoded in slices of four frames, as the VAE itself does it: no more of the clip is on the device at a time.
    """

    name = "vae"
    fields: Mapping[str, Layout] = {"latent": "stack"}
    reads: frozenset[Reads] = frozenset({"target"})

    def __init__(self, paths: ModelPaths) -> None:
        self.paths = paths
        self._vae: Any = None

    def fingerprint(self) -> str:
        files = files_of(self.paths.component("vae"))
        return fingerprint_files(files, extra=f"wan {self.name} 2: {sorted(self.fields)}")

    def load(self, build: BuildFn) -> None:
        self._vae = build(AutoencoderKLWan, self.paths.component("vae"), keep_precise=("*",))

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        assert self._vae is not None, "encode before load"
        return {"latent": self.latent(self._vae, map(self.pixels, sliced(given.target))).cpu()}

    def pixels(self, frames: Sequence[Image.Image]) -> Tensor:
        """(1, 3, n, height, width) in [-1, 1]."""
        values = np.stack([np.asarray(frame.convert("RGB"), dtype=np.float32) for frame in frames])
        return (2.0 * (torch.from_numpy(values) / 255.0).permute(3, 0, 1, 2) - 1.0).unsqueeze(0).contiguous()

    def latent(self, vae: Any, slices: Iterable[Tensor]) -> Tensor:
        """(C, T, H, W) of slices of pixels: one frame first, then four at a time."""
        return torch.cat([self.normalise(vae, one.mode()) for one in self.moments(vae, slices)], 2)[0]

    def moments(self, vae: Any, slices: Iterable[Tensor]) -> Iterator[DiagonalGaussianDistribution]:
        """AutoencoderKLWan._encode with its slices handed in one by one, and given back so (quant_conv is 1 x 1 x 1)."""
        vae.clear_cache()
        for pixels in slices:
            given = pixels.to(vae.device, vae.dtype)
            if vae.config.patch_size is not None:
                given = patchify(given, patch_size=vae.config.patch_size)
            vae._enc_conv_idx = [0]
            said = vae.encoder(given, feat_cache=vae._enc_feat_map, feat_idx=vae._enc_conv_idx)
            yield DiagonalGaussianDistribution(vae.quant_conv(said))
        vae.clear_cache()

    def normalise(self, vae: Any, latent: Tensor) -> Tensor:
        """latent: (1, C, T, H, W)."""
        mean, deviation = moments_of(vae, latent)
        return (latent - mean) * (1.0 / deviation)  # as the pipeline rounds

    def free(self) -> None:
        self._vae = None


class FirstFrameEncoder(LatentEncoder):
    """First frame -> `first_frame_latents`: what the denoiser knows of the clip.

    whole: (C, T, H, W), the frame followed by grey ones to the clip's length (2.1 and 2.2 I2V);
    else (C, 1, H, W), the frame alone (5B)
    """

    name = "first-frame"
    fields: Mapping[str, Layout] = {"first_frame_latents": "stack"}

    def __init__(self, paths: ModelPaths, whole: bool) -> None:
        super().__init__(paths)
        self.whole = whole
        self.reads: frozenset[Reads] = frozenset({"conditions", "frames"} if whole else {"conditions"})

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        assert self._vae is not None, "encode before load"
        frames = 1
        if self.whole:
            assert given.size is not None, "reads frames"
            frames = given.size.frames
        slices = self.filled(self.pixels([first_frame(given)]), frames)
        return {"first_frame_latents": self.latent(self._vae, slices).cpu()}

    def filled(self, first: Tensor, frames: int) -> Iterator[Tensor]:
        """The slices of a clip of this frame and grey ones."""
        yield first
        for _ in range((frames - 1) // FRAMES_STEP):
            yield self.unknown(first).repeat(1, 1, FRAMES_STEP, 1, 1)

    def unknown(self, first: Tensor) -> Tensor:
        """The pixels of a frame that is not known: the middle between black and white."""
        return torch.zeros_like(first)


class ImageEncoder:
    """First frame -> `image_embeds` (257, width): CLIP's states before its last layer (2.1 I2V)."""

    name = "clip"
    fields: Mapping[str, Layout] = {"image_embeds": "stack"}
    reads: frozenset[Reads] = frozenset({"conditions"})

    def __init__(self, paths: ModelPaths) -> None:
        self.paths = paths
        self._model: Any = None
        self._processor: Any = None

    def fingerprint(self) -> str:
        parts = ("image_encoder", "image_processor")
        files = [file for part in parts for file in files_of(self.paths.component(part))]
        return fingerprint_files(files, extra="wan clip 1")

    def load(self, build: BuildFn) -> None:
        self._model = build(CLIPVisionModel, self.paths.component("image_encoder"), keep_precise=("*",))

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        assert self._model is not None, "encode before load"
        pixels = self.processor(images=first_frame(given), return_tensors="pt")["pixel_values"]
        states = self._model(
            pixel_values=pixels.to(self._model.device, self._model.dtype), output_hidden_states=True
        ).hidden_states
        return {"image_embeds": self.layer(states)[0].cpu()}

    def layer(self, states: Sequence[Tensor]) -> Tensor:
        return states[-2]

    def free(self) -> None:
        self._model = None

    @property
    def processor(self) -> Any:
        """Picture -> CLIP's pixels. Of Pillow and numpy: transformers' other one needs torchvision. Read at first use."""
        if self._processor is None:
            folder = self.paths.component("image_processor")
            self._processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        return self._processor


def first_frame(given: EncodeInput) -> Image.Image:
    """Raises UserError when there is none."""
    if not given.conditions:
        raise UserError(
            "WAN I2V begins from a first frame, and none is given",
            where="data",
            mend="learn from videos (data.videos); give a preview images = [FILE], or sample with --image FILE",
        )
    return given.conditions[0]


def sliced(frames: Sequence[Image.Image]) -> Iterator[Sequence[Image.Image]]:
    """The first frame alone, then four at a time: as the VAE sees a clip."""
    assert len(frames) % FRAMES_STEP == 1, f"{len(frames)} frames are not 4 n + 1"
    shown = iter(frames)
    yield [next(shown)]
    while some := list(islice(shown, FRAMES_STEP)):
        yield some


def moments_of(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, deviation) of the latents' channels as (1, C, 1, 1, 1), of the VAE's config."""
    mean, deviation = (
        torch.tensor(values).view(1, -1, 1, 1, 1).to(like)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, deviation
