"""Qwen-Image's encoders: caption (and pictures) -> last layer of Qwen2.5-VL; picture -> normalised mode of the VAE.

As in diffusers pipelines/qwenimage/pipeline_qwenimage.py, _edit.py and _edit_plus.py (`_get_qwen_prompt_embeds`,
`_encode_vae_image`), but for one thing: with transformers 5 the Edit pipelines of diffusers 0.42 forget to tell the language
model which tokens are pictures, so that these lose their rows and columns (huggingface/diffusers issue 14194). The models
were trained with them, and other programs give them, so they are given here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2TokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from whitetuner.errors import UserError
from whitetuner.families.files import files_of
from whitetuner.families.picture_latents import PictureLatents
from whitetuner.families.qwen_image.spec import QwenImageOptions
from whitetuner.family import BuildFn, Layout, ModelPaths, Reads, fingerprint_files
from whitetuner.records import EncodeInput

#: What stands before the user's words; so many tokens of it are dropped from the result.
SYSTEM = {
    "t2i": (
        "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
        "objects and background:",
        34,
    ),
    "edit": (
        "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain "
        "how the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
        "requirements while maintaining consistency with the original input where appropriate.",
        64,
    ),
}
_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
_IMAGE_TOKEN = "<|image_pad|>"
#: 2509 and 2511 show their references to the language model at this area; the VAE sees them larger.
SEEN_AREA_PX = 384 * 384


class TextEncoder:
    """Caption -> `prompt_embeds` (L, hidden), no padding: the last hidden states from the user's words on."""

    name = "text"
    fields: Mapping[str, Layout] = {"prompt_embeds": "ragged"}
    reads: frozenset[Reads] = frozenset({"caption"})
    system = "t2i"

    def __init__(self, paths: ModelPaths, options: QwenImageOptions) -> None:
        self.paths, self.options = paths, options
        self._model: Any = None
        self._tokenizer: Any = None

    def fingerprint(self) -> str:
        files = files_of(self.paths.component("text_encoder")) + files_of(self.paths.component("tokenizer"))
        return fingerprint_files(files, extra=f"qwen-image text 1: {self.options.max_sequence_length}")

    def load(self, build: BuildFn) -> None:
        """Without the head, which says words. The class is the whole one: transformers knows older files' names by it."""
        whole = build(
            Qwen2_5_VLForConditionalGeneration,
            self.paths.component("text_encoder"),
            keep_precise=("*norm*", "*embed_tokens*", "lm_head*", "model.visual.*"),
        )
        self._model = whole.model
        whole.lm_head = None

    def template(self, words: str) -> str:
        """What the tokenizer is given, by the official template."""
        system, _ = SYSTEM[self.system]
        return (
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{words}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )

    def dropped(self) -> int:
        """Tokens of the template before the user's words: a constant of the pipelines, counted once with Qwen's tokenizer."""
        return SYSTEM[self.system][1]

    def last_layer(self, states: Any) -> Tensor:
        """(1, tokens, hidden), after the final norm."""
        return states.last_hidden_state

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        """The caption is cut as by the pipeline: 1024 tokens after the system's, then max_sequence_length of the result."""
        assert self._model is not None, "encode before load"
        tokens = self.tokenizer(
            self.template(given.caption),
            return_tensors="pt",
            truncation=True,
            max_length=1024 + self.dropped(),
        )
        states = self._model(
            input_ids=tokens["input_ids"].to(self._model.device),
            attention_mask=tokens["attention_mask"].to(self._model.device),
            use_cache=False,
        )
        kept = self.last_layer(states)[0, self.dropped() :]
        return {"prompt_embeds": kept[: self.options.max_sequence_length].cpu()}

    def free(self) -> None:
        self._model = None

    @property
    def tokenizer(self) -> Any:
        """Read at first use. Raises UserError when it is not Qwen2.5-VL's."""
        if self._tokenizer is None:
            folder = self.paths.component("tokenizer")
            found = Qwen2TokenizerFast.from_pretrained(folder, local_files_only=True)
            if found.convert_tokens_to_ids("<|im_start|>") in (None, found.unk_token_id):
                raise UserError(
                    "the tokenizer does not know <|im_start|>, which Qwen-Image wraps its prompts in",
                    where=str(folder),
                    mend="download the whole tokenizer folder of the model again",
                )
            self._tokenizer = found
        return self._tokenizer


class EditTextEncoder(TextEncoder):
    """Caption and references -> `prompt_embeds` (L, hidden): the language model reads the words and sees the pictures."""

    reads: frozenset[Reads] = frozenset({"caption", "conditions"})
    system = "edit"

    def __init__(self, paths: ModelPaths, options: QwenImageOptions, variant: str) -> None:
        super().__init__(paths, options)
        self.variant = variant
        self._processor: Any = None

    def fingerprint(self) -> str:
        parts = ("text_encoder", "tokenizer", "processor")
        files = [file for part in parts for file in files_of(self.paths.component(part))]
        rule = "one picture" if self.variant == "edit" else "numbered pictures"
        return fingerprint_files(files, extra=f"qwen-image edit text 1: {rule}")

    def instruction(self, caption: str, pictures: int) -> str:
        """The user's words with a place for each picture before them."""
        if self.variant == "edit":
            return _PICTURE + caption
        return "".join(f"Picture {number}: {_PICTURE}" for number in range(1, pictures + 1)) + caption

    def seen(self, given: EncodeInput) -> list[Image.Image]:
        """The pictures that the language model looks at. Raises UserError when there is none, or too many.

        Qwen-Image-Edit: the one that the VAE encodes. 2509 and 2511: the uncut originals at 384 x 384 pixels' area.
        """
        if not given.conditions:
            raise UserError(
                "Qwen-Image-Edit changes given pictures, and none is given",
                where="data",
                mend="give the folder of conditions (data.sets[].conditions), or sample with --image",
            )
        if self.variant != "edit":
            return [at_area(one, SEEN_AREA_PX) for one in given.originals]
        if len(given.conditions) > 1:
            raise UserError(
                "Qwen-Image-Edit takes one reference picture; here are {count}",
                where="data",
                mend="give one folder of conditions, or use Qwen-Image-Edit-2509 or -2511, which take several",
                count=len(given.conditions),
            )
        return list(given.conditions)

    def picture_tokens(self, ids: Tensor) -> Tensor:
        """(1, tokens) int: 1 where a token is of a picture, by which the language model gives it a row and a column."""
        return (ids == self.tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN)).int()

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        """Nothing is cut: the Edit pipelines do not. Raises UserError for a caption with the mark of a picture."""
        assert self._model is not None, "encode before load"
        if _IMAGE_TOKEN in given.caption:
            raise UserError(
                "the caption has the word {word}, by which the model knows a picture",
                where=repr(given.caption[:200]),
                mend="take it out; the given pictures get theirs on their own",
                word=_IMAGE_TOKEN,
            )
        pictures = self.seen(given)
        looked = self.processor(images=pictures, return_tensors="pt")
        text = self.template(self.instruction(given.caption, len(pictures)))
        # One token for each square of merge_size x merge_size patches.
        before, *after = text.split(_IMAGE_TOKEN)
        for grid, rest in zip(looked["image_grid_thw"], after, strict=True):
            before += _IMAGE_TOKEN * int(grid.prod() // self.processor.merge_size**2) + rest
        tokens = self.tokenizer(before, return_tensors="pt")
        device = self._model.device
        states = self._model(
            input_ids=tokens["input_ids"].to(device),
            attention_mask=tokens["attention_mask"].to(device),
            pixel_values=looked["pixel_values"].to(device),
            image_grid_thw=looked["image_grid_thw"].to(device),
            mm_token_type_ids=self.picture_tokens(tokens["input_ids"]).to(device),
            use_cache=False,
        )
        return {"prompt_embeds": self.last_layer(states)[0, self.dropped() :].cpu()}

    @property
    def processor(self) -> Any:
        """Picture -> patches. Of Pillow and numpy: transformers' other one needs torchvision. Read at first use."""
        if self._processor is None:
            folder = self.paths.component("processor")
            self._processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
        return self._processor


class LatentEncoder(PictureLatents):
    """Target -> `latent` (C, H, W): mode of the VAE, normalised by its configured mean and deviation of each channel."""

    kind = AutoencoderKLQwenImage

    def fingerprint(self) -> str:
        return fingerprint_files(
            files_of(self.paths.component("vae")), extra=f"qwen-image {self.name} 1: {sorted(self.fields)}"
        )

    def latent(self, vae: Any, picture: Image.Image) -> Tensor:
        return super().latent(vae, picture)[:, 0]

    def pixels(self, picture: Image.Image) -> Tensor:
        """(1, 3, 1, height, width) in [-1, 1]: the VAE knows videos, and this is one of one frame."""
        return super().pixels(picture).unsqueeze(2)

    def normalise(self, vae: Any, latent: Tensor) -> Tensor:
        """latent: (1, C, 1, H, W)."""
        mean, deviation = moments_of(vae, latent)
        return (latent - mean) / deviation


class ReferenceEncoder(LatentEncoder):
    """References -> their latents as tokens, one picture after the other, and their sizes.

    reference_latents: (N, 4 C), 2x2 patches row by row;  reference_sizes: (n, 2) rows and columns of tokens of each
    """

    name = "references"
    fields: Mapping[str, Layout] = {"reference_latents": "stack", "reference_sizes": "stack"}
    reads: frozenset[Reads] = frozenset({"conditions"})

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        assert self._vae is not None, "encode before load"
        packed, sizes = [], []
        for picture in given.conditions:
            patches = torch.nn.functional.pixel_unshuffle(self.latent(self._vae, picture), 2)
            packed.append(patches.flatten(1).T.cpu())
            sizes.append(patches.shape[1:])
        return {"reference_latents": torch.cat(packed).contiguous(), "reference_sizes": torch.tensor(sizes)}


def moments_of(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, deviation) of the latents' channels as (1, C, 1, 1, 1), of the VAE's config."""
    mean, deviation = (
        torch.tensor(values).view(1, -1, 1, 1, 1).to(like)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, deviation


def at_area(picture: Image.Image, area_px: int) -> Image.Image:
    """The picture at about this area, own aspect, both sides multiples of 32 (diffusers `calculate_dimensions`)."""
    ratio = picture.width / picture.height
    width = math.sqrt(area_px * ratio)
    sides = (round(width / 32) * 32, round(width / ratio / 32) * 32)
    return picture.resize((max(32, sides[0]), max(32, sides[1])), Image.Resampling.LANCZOS)
