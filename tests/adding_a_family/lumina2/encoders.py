"""Lumina-Image 2.0's text: system prompt and caption -> the last but one hidden state of Gemma 2.

As in diffusers pipelines/lumina2/pipeline_lumina2.py (`encode_prompt`, `_get_gemma_prompt_embeds`). Its VAE is that of FLUX.1,
as Z-Image's is, and so is its encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, Gemma2Model

from whitetuner.families.files import files_of
from whitetuner.families.lumina2.spec import START, Lumina2Options
from whitetuner.family import BuildFn, Layout, ModelPaths, Reads, fingerprint_files
from whitetuner.records import EncodeInput


class TextEncoder:
    """Caption -> `prompt_embeds` (L, width): one row for each token, no padding."""

    name = "text"
    fields: Mapping[str, Layout] = {"prompt_embeds": "ragged"}
    reads: frozenset[Reads] = frozenset({"caption", "unconditional"})

    def __init__(self, paths: ModelPaths, options: Lumina2Options) -> None:
        self.paths, self.options = paths, options
        self._model: Any = None
        self._tokenizer: Any = None

    def fingerprint(self) -> str:
        folders = (self.paths.component(name) for name in ("text_encoder", "tokenizer"))
        files = [file for folder in folders for file in files_of(folder)]
        return fingerprint_files(files, extra=f"lumina2 text 1: {self.options.model_dump_json()}")

    def load(self, build: BuildFn) -> None:
        folder = self.paths.component("text_encoder")
        self._model = build(Gemma2Model, folder, keep_precise=("*norm*", "embed_tokens*"))

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        """The text is filled up to the greatest length, as the pipeline does, and the filling's rows are dropped."""
        assert self._model is not None, "encode before load"
        tokens = self.tokenizer(
            [self.text(given)],
            padding="max_length",
            max_length=self.options.max_sequence_length,
            truncation=True,
            return_tensors="pt",
        )
        device, mask = self._model.embed_tokens.weight.device, tokens["attention_mask"]
        said = self._model(
            tokens["input_ids"].to(device), attention_mask=mask.to(device), output_hidden_states=True
        )
        return {"prompt_embeds": self.chosen(said.hidden_states)[0].cpu()[mask[0].bool()]}

    def text(self, given: EncodeInput) -> str:
        """What guidance leads away from stands alone."""
        return given.caption if given.unconditional else self.options.system_prompt + START + given.caption

    def chosen(self, states: tuple[Tensor, ...]) -> Tensor:
        return states[-2]

    def free(self) -> None:
        self._model = None

    @property
    def tokenizer(self) -> Any:
        """Read at first use. Gemma's own fills up on the left; the pipeline has it on the right, and so positions start at 0."""
        if self._tokenizer is None:
            folder = self.paths.component("tokenizer")
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._tokenizer.padding_side = "right"
        return self._tokenizer
