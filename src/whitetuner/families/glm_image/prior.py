"""Prior tokens: the coarse plan of a picture, one code of a codebook for each 32x32 pixels, that the denoiser draws from.

Of a picture itself they are told by the tokenizer inside the language model (ViT and quantiser, 1.3 B of its 10 B
parameters); of a caption the language model makes them up, token by token. As in transformers models/glm_image and diffusers
pipelines/glm_image/pipeline_glm_image.py (`generate_prior_tokens`), whose way to the tokenizer is broken with transformers
5.23 (it packs what is expected as a list): here it is gone directly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import GlmImageConfig, GlmImageForConditionalGeneration, GlmImageProcessor
from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil
from transformers.models.glm_image.modeling_glm_image import (
    GlmImagePreTrainedModel,
    GlmImageVisionModel,
    GlmImageVQVAE,
)

from whitetuner.errors import UserError
from whitetuner.families.files import files_of
from whitetuner.families.glm_image.spec import GlmImageOptions, language_model
from whitetuner.family import BuildFn, Layout, ModelPaths, Reads, fingerprint_files
from whitetuner.records import EncodeInput, Size

#: The language model draws lots; always the same ones, so that a caption has one plan for each size.
SEED = 0
#: Wider or taller pictures are unknown to the tokenizer's picture processor.
LARGEST_RATIO = 4
#: Tokens of the small plan, about: 16x16 of a square, as many of any other shape (processing_glm_image.py).
_SMALL_PLAN = 256
_PRECISE = ("*norm*", "*embed*", "*vqmodel*", "lm_head*")


class _Eyes(nn.Module):
    """The two parts of the language model that look at pictures, under its own names."""

    def __init__(self, config: GlmImageConfig) -> None:
        super().__init__()
        self.visual = GlmImageVisionModel._from_config(config.vision_config)
        self.vqmodel = GlmImageVQVAE._from_config(config.vq_config)


class PictureTokenizer(GlmImagePreTrainedModel):
    """Picture -> codes; built from the language model's folder without the rest of it."""

    _keys_to_ignore_on_load_unexpected: ClassVar = [r"^model\.language_model\.", r"^lm_head\."]

    def __init__(self, config: GlmImageConfig) -> None:
        super().__init__(config)
        self.model = _Eyes(config)
        self.post_init()

    def codes(self, pixel_values: Tensor, grid: Tensor) -> Tensor:
        """(rows, columns) int64 of one picture. pixel_values: (rows columns, patch) of its processor; grid: (1, 3)."""
        visual = self.model.visual
        values = pixel_values.to(visual.device, visual.dtype)
        seen = visual(values, grid_thw=grid.to(visual.device), return_dict=True).pooler_output
        rows, columns = int(grid[0, 1]), int(grid[0, 2])
        features = seen.view(1, rows, columns, -1).permute(0, 3, 1, 2).contiguous()
        return self.model.vqmodel.encode(features).image_tokens.view(rows, columns)


class TargetTokens:
    """Target -> `prior_tokens` (rows, columns) int32, one for each 32x32 pixels: what a perfect plan of it would be."""

    name = "prior"
    fields: Mapping[str, Layout] = {"prior_tokens": "stack"}
    reads: frozenset[Reads] = frozenset({"target"})

    def __init__(self, paths: ModelPaths) -> None:
        self.paths = paths
        self._model: Any = None
        self._processor: Any = None

    def fingerprint(self) -> str:
        return fingerprint_files(_files(self.paths), extra=f"glm-image {self.name} 1: {sorted(self.fields)}")

    def load(self, build: BuildFn) -> None:
        self._model = build(PictureTokenizer, language_model(self.paths), keep_precise=("*",))

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        return {"prior_tokens": self.tokens(given.target[0]).to("cpu", torch.int32)}

    def tokens(self, picture: Image.Image) -> Tensor:
        """Codes of an RGB picture whose sides are multiples of 32. Raises UserError for one of an extreme shape."""
        assert self._model is not None, "encode before load"
        if max(picture.size) > LARGEST_RATIO * min(picture.size):
            raise UserError(
                "{width}x{height} is too far from a square: GLM-Image knows shapes up to {ratio}:1",
                where="data",
                mend="cut the picture, or take it out",
                width=picture.width,
                height=picture.height,
                ratio=LARGEST_RATIO,
            )
        looked = self.processor(images=picture, size=self.area(), return_tensors="pt")
        return self._model.codes(looked["pixel_values"], looked["image_grid_thw"])

    def area(self) -> dict[str, int]:
        """Bounds of the picture's pixels: none, for its codes have to lie on the latent's grid."""
        return {"shortest_edge": 1, "longest_edge": 2**32}

    def free(self) -> None:
        self._model = None

    @property
    def processor(self) -> Any:
        """Picture -> patches. Of Pillow and numpy: transformers' other one needs torchvision. Read at first use."""
        if self._processor is None:
            folder = self.paths.component("processor")
            self._processor = GlmImageImageProcessorPil.from_pretrained(folder, local_files_only=True)
        return self._processor


class ReferenceTokens(TargetTokens):
    """Given pictures -> `reference_tokens` (N,) int32: the codes of each, row by row, one picture after the other."""

    name = "reference-prior"
    fields: Mapping[str, Layout] = {"reference_tokens": "stack"}
    reads: frozenset[Reads] = frozenset({"conditions"})

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        found = [self.tokens(one).flatten() for one in references_of(given)]
        return {"reference_tokens": torch.cat(found).to("cpu", torch.int32)}


class PlanGenerator:
    """Caption (and given pictures) -> `generated_tokens` (rows, columns) int32 of the size to draw, by the language model.

    Prompts have no picture whose tokens could be taken; items have, and are asked about only if options.generated_prior > 0.
    """

    name = "plan"
    fields: Mapping[str, Layout] = {"generated_tokens": "stack"}

    def __init__(self, paths: ModelPaths, options: GlmImageOptions, edit: bool) -> None:
        self.paths, self.edit = paths, edit
        self.prompts_only = options.generated_prior == 0
        reads: set[Reads] = {"caption", "frames", "unconditional"}
        self.reads: frozenset[Reads] = frozenset(reads | {"conditions"} if edit else reads)
        self._model: Any = None
        self._processor: Any = None

    def fingerprint(self) -> str:
        return fingerprint_files(_files(self.paths), extra=f"glm-image plan 1: {self.edit}, {SEED}")

    def load(self, build: BuildFn) -> None:
        folder = language_model(self.paths)
        self._model = build(GlmImageForConditionalGeneration, folder, keep_precise=_PRECISE)

    def passes(self, size: Size) -> int:
        """One for each token: of the picture, and, without given ones, of the small plan that comes first."""
        rows, columns = size.height // 32, size.width // 32
        return rows * columns + (0 if self.edit else _SMALL_PLAN)

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        """The unguided side has no plan: zeros, which `predict` and `generate` leave aside."""
        assert self._model is not None and given.size is not None, "encode before load"
        rows, columns = given.size.height // 32, given.size.width // 32
        if given.unconditional:
            return {"generated_tokens": torch.zeros(rows, columns, dtype=torch.int32)}
        inputs = self.inputs(given, given.size).to(self._model.device)
        grids = inputs["image_grid_thw"]
        # Text to image: a small plan of about 256 tokens comes first, then the one of the size asked for (the first grid).
        before = 0 if self.edit else int(grids[1:].prod(-1).sum())
        count = rows * columns
        devices = [self._model.device] if self._model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(SEED)
            said = self._model.generate(**inputs, max_new_tokens=before + count + 1, do_sample=True)
        start = inputs["input_ids"].shape[1] + before
        return {"generated_tokens": said[0, start : start + count].view(rows, columns).to("cpu", torch.int32)}

    def inputs(self, given: EncodeInput, size: Size) -> Any:
        """What the language model is asked, by its own chat template: pictures, then words, then the grids to fill."""
        content: list[dict[str, Any]] = [{"type": "text", "text": given.caption}]
        if self.edit:
            content = [{"type": "image", "image": one} for one in references_of(given)] + content
        return self.processor.apply_chat_template(
            [[{"role": "user", "content": content}]],
            tokenize=True,
            return_dict=True,
            processor_kwargs={
                "padding": False,
                "target_h": size.height,
                "target_w": size.width,
                "return_tensors": "pt",
            },
        )

    def free(self) -> None:
        self._model = None

    @property
    def processor(self) -> Any:
        """Read at first use; its half for pictures is the one without torchvision."""
        if self._processor is None:
            folder = self.paths.component("processor")
            self._processor = GlmImageProcessor.from_pretrained(folder, local_files_only=True)
            pictures = GlmImageImageProcessorPil.from_pretrained(folder, local_files_only=True)
            self._processor.image_processor = pictures
        return self._processor


def references_of(given: EncodeInput) -> Sequence[Image.Image]:
    """The given pictures. Raises UserError when there is none."""
    if not given.conditions:
        raise UserError(
            "an edit changes given pictures, and none is given",
            where="data",
            mend="give the folder of conditions (data.conditions), or sample with --image; without pictures: "
            'model.task = "t2i"',
        )
    return given.conditions


def _files(paths: ModelPaths) -> list[Any]:
    return files_of(language_model(paths)) + files_of(paths.component("processor"))
