"""The diffusers pipelines of Qwen-Image, whole, as their users call them: what families/contract.py compares us with.

Nothing of model.py or encoders.py is used here; what it shares with them would not be tested. Three things are mended:
    the processor    is made without its half for videos, which needs torchvision;
    its picture marks reach the language model, which diffusers 0.42 forgets with transformers 5 (diffusers issue 14194);
    references       keep the size they are given in, where the Edit pipelines bring each to 1024 x 1024 pixels' area.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImagePipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from whitetuner.families.contract import OriginalReader, Walk, quiet
from whitetuner.families.qwen_image.spec import QwenImageOptions
from whitetuner.records import EncodeInput

READS_ORIGINAL = OriginalReader(dict)  # its names are diffusers' own
_EDIT, _PLUS = pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus


class PictureProcessor(Qwen2VLProcessor):
    """Qwen2VLProcessor without its video half. (transformers reads the parts' names from this signature.)"""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **more: Any
    ) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        super(Qwen2VLProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)


class Reference:
    """See contract.Reference. folder: a whole model folder, of any dtype; here float32 on the CPU."""

    def __init__(self, folder: Path, options: QwenImageOptions) -> None:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        self.kind: Any = {
            one.__name__: one for one in (QwenImagePipeline, QwenImageEditPipeline, QwenImageEditPlusPipeline)
        }[index["_class_name"]]
        more: dict[str, Any] = {}
        with quiet():
            text_encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                folder / "text_encoder", dtype=torch.float32, local_files_only=True
            )
            if self.kind is not QwenImagePipeline:
                more["processor"] = PictureProcessor(
                    Qwen2VLImageProcessorPil.from_pretrained(folder / "processor", local_files_only=True),
                    Qwen2Tokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
                )
                _mark_pictures(text_encoder)
            self.pipe: Any = self.kind.from_pretrained(
                folder, text_encoder=text_encoder, local_files_only=True, **more
            )
        self.pipe.set_progress_bar_config(disable=True)
        self.length = options.max_sequence_length

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        pixels = self.pipe.image_processor.preprocess(given.target[0]).unsqueeze(2)
        self.pipe.latent_channels = (
            self.pipe.vae.config.z_dim
        )  # the text-to-image pipeline has no encoding of its own
        found = {"latent": QwenImageEditPipeline._encode_vae_image(self.pipe, pixels, None)[0, :, 0]}
        if self.kind is QwenImagePipeline:
            embeds, _ = self.pipe.encode_prompt(given.caption, max_sequence_length=self.length)
            return {**found, "prompt_embeds": embeds[0]}
        seen, encoded = self._looks(given)
        embeds, _ = self.pipe.encode_prompt(given.caption, image=seen)
        latents = [self.pipe._encode_vae_image(one, None) for one in encoded]
        packed = [self.pipe._pack_latents(one, 1, one.shape[1], *one.shape[3:]) for one in latents]
        sizes = torch.tensor([[one.shape[3] // 2, one.shape[4] // 2] for one in latents])
        references = {"reference_latents": torch.cat(packed, 1)[0], "reference_sizes": sizes}
        return {**found, **references, "prompt_embeds": embeds[0]}

    def _looks(self, given: EncodeInput) -> tuple[Any, list[Tensor]]:
        """(what the language model sees, what the VAE sees), by the lines of the pipelines' `__call__`."""
        resize, preprocess = self.pipe.image_processor.resize, self.pipe.image_processor.preprocess
        encoded = [preprocess(one, one.height, one.width).unsqueeze(2) for one in given.conditions]
        if self.kind is QwenImageEditPipeline:
            return resize(given.conditions[0], given.conditions[0].height, given.conditions[0].width), encoded
        seen = []
        for one in given.originals:
            width, height = _PLUS.calculate_dimensions(_PLUS.CONDITION_IMAGE_SIZE, one.width / one.height)
            seen.append(resize(one, height, width))
        return seen, encoded

    def walk(self, given: Sequence[EncodeInput], noise: Tensor, steps: int, cfg: float) -> Walk:
        """An edit's items one after the other: 2509's pipeline takes no batch, and each has pictures of its own."""
        if self.kind is QwenImagePipeline:
            points = self._points([one.caption for one in given], noise, given[0], steps, cfg)
        else:
            walks = []
            for one, start in zip(given, noise):
                with at_own_size(one):
                    walks.append(
                        self._points(one.caption, start[None], one, steps, cfg, image=self._given(one))
                    )
            points = [torch.cat(at) for at in zip(*walks)]
        return Walk(self.pipe.scheduler.sigmas.tolist(), points)

    def guide(self, velocity: Tensor, unguided: Tensor, cfg: float) -> Tensor:
        """True CFG: the guided token at the length of the token that follows the prompt (one token: a 2x2 patch)."""
        combined = unguided + cfg * (velocity - unguided)
        sizes = (len(velocity), *velocity.shape[1:])
        follow, far = (self.pipe._pack_latents(one, *sizes) for one in (velocity, combined))
        scaled = far * (follow.norm(dim=-1, keepdim=True) / far.norm(dim=-1, keepdim=True))
        return self._unpacked(scaled, velocity)

    def _given(self, one: EncodeInput) -> Any:
        return one.conditions[0] if self.kind is QwenImageEditPipeline else list(one.originals)

    def _points(
        self, captions: Any, noise: Tensor, first: EncodeInput, steps: int, cfg: float, **more: Any
    ) -> list[Tensor]:
        assert first.size is not None
        negative = "" if isinstance(captions, str) else [""] * len(captions)
        points = [noise]

        def after_step(pipe: Any, index: int, timestep: Tensor, values: dict) -> dict:
            points.append(self._unpacked(values["latents"], noise))
            return values

        self.pipe(
            prompt=captions,
            negative_prompt=negative if cfg > 1 else None,
            true_cfg_scale=cfg,
            latents=self.pipe._pack_latents(noise, *noise.shape),
            width=first.size.width,
            height=first.size.height,
            num_inference_steps=steps,
            callback_on_step_end=after_step,
            output_type="latent",
            max_sequence_length=self.length,
            **more,
        )
        return points

    def _unpacked(self, tokens: Tensor, like: Tensor) -> Tensor:
        scale = self.pipe.vae_scale_factor
        height, width = like.shape[-2:]
        return self.pipe._unpack_latents(tokens, height * scale, width * scale, scale)[:, :, 0]


def _mark_pictures(text_encoder: Any) -> None:
    """The language model is told which tokens are pictures, as the processor says (mm_token_type_ids)."""
    forward = text_encoder.forward

    def marked(*args: Any, **given: Any) -> Any:
        if given.get("pixel_values") is not None:
            marks = given["input_ids"] == text_encoder.config.image_token_id
            given["mm_token_type_ids"] = marks.int()
        return forward(*args, **given)

    text_encoder.forward = marked


@contextmanager
def at_own_size(given: EncodeInput) -> Iterator[None]:
    """The VAE's pictures keep the sizes of `given.conditions`, which the pipelines would scale to a megapixel."""
    right = _PLUS.calculate_dimensions
    sizes = iter([(one.width, one.height) for one in given.conditions])
    first = given.conditions[0].size

    def plus(area: float, ratio: float) -> tuple[int, int]:
        # Asked once for the size of the result, which is given, and then for each picture: as seen, as encoded.
        if area == _PLUS.CONDITION_IMAGE_SIZE:
            return right(area, ratio)
        return next(sizes)

    def skip_first(area: float, ratio: float) -> tuple[int, int]:
        _PLUS.calculate_dimensions = plus
        return right(area, ratio)

    edit = _EDIT.calculate_dimensions
    _PLUS.calculate_dimensions = skip_first
    _EDIT.calculate_dimensions = lambda area, ratio: (*first, None)
    try:
        yield
    finally:
        _PLUS.calculate_dimensions, _EDIT.calculate_dimensions = right, edit
