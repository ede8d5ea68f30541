"""The words that a picture is to show: what stands in quotes in a caption, byte by byte through ByT5's encoder.

As in diffusers pipelines/glm_image/pipeline_glm_image.py (`get_glyph_texts`, `_get_glyph_embeds`). The rest of the caption
does not come this way: it reaches the picture through the prior tokens alone (see prior.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import ByT5Tokenizer, T5EncoderModel

from whitetuner.families.files import files_of
from whitetuner.families.glm_image.spec import GlmImageOptions, quote_fault
from whitetuner.family import BuildFn, Layout, ModelPaths, Reads, fingerprint_files
from whitetuner.records import EncodeInput

#: In this order, as the pipeline looks for them; a text in two kinds of quotes is found twice there, and here.
_QUOTED = (r"'([^']*)'", "\u201c([^\u201c\u201d]*)\u201d", r'"([^"]*)"', "\u300c([^\u300c\u300d]*)\u300d")


class GlyphEncoder:
    """Caption -> `glyph_embeds` (L, width), no padding between texts; `dropped` (): whether this is the unguided side.

    Without any quotes L is 1: the end mark of "".
    """

    name = "glyphs"
    fields: Mapping[str, Layout] = {"glyph_embeds": "ragged", "dropped": "stack"}
    reads: frozenset[Reads] = frozenset({"caption", "unconditional"})

    def __init__(self, paths: ModelPaths, options: GlmImageOptions) -> None:
        self.paths, self.options = paths, options
        self._model: Any = None
        self._tokenizer: Any = None

    def fingerprint(self) -> str:
        files = files_of(self.paths.component("text_encoder")) + files_of(self.paths.component("tokenizer"))
        return fingerprint_files(files, extra=f"glm-image glyphs 1: {self.options.max_sequence_length}")

    def load(self, build: BuildFn) -> None:
        folder = self.paths.component("text_encoder")
        self._model = build(T5EncoderModel, folder, keep_precise=("*norm*", "shared.*", "*relative*"))

    def texts(self, caption: str) -> list[str]:
        """What stands in quotes, quotes of one kind after the other; [""] when nothing does. Raises UserError."""
        fault = quote_fault(caption)
        if fault is not None:
            raise fault
        return [text for quoted in _QUOTED for text in re.findall(quoted, caption)] or [""]

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Bytes and an end mark of each text, cut at max_sequence_length; before each of an even number, a padding token."""
        found = self.tokenizer(
            list(texts), max_length=self.options.max_sequence_length, truncation=True
        ).input_ids
        # The pipeline counts texts where it may have meant bytes; pictures are drawn with it, so it is learned with it.
        padding = [self.tokenizer.pad_token_id] * ((len(found) + 1) % 2)
        return [padding + one for one in found]

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        assert self._model is not None, "encode before load"
        found = self.tokens(self.texts(given.caption))
        longest, pad = max(map(len, found)), self.tokenizer.pad_token_id
        device = self._model.device
        mask = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in found], device=device)
        ids = torch.tensor([one + [pad] * (longest - len(one)) for one in found], device=device)
        states = self._model(ids, attention_mask=mask).last_hidden_state
        return {
            "glyph_embeds": states[mask.bool()].cpu(),
            "dropped": torch.tensor(given.unconditional),
        }

    def free(self) -> None:
        self._model = None

    @property
    def tokenizer(self) -> Any:
        """Read at first use."""
        if self._tokenizer is None:
            folder = self.paths.component("tokenizer")
            self._tokenizer = ByT5Tokenizer.from_pretrained(folder, local_files_only=True)
        return self._tokenizer
