"""The diffusers pipeline for drawing with cached embeddings: nothing is encoded, given pictures are recalled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import GlmImagePipeline
from torch import Tensor

from whitetuner.families.drawing import AtHome


class DrawingPipeline(AtHome, GlmImagePipeline):
    """unwanted: (1, L, D) embedded texts of the unguided side, of any length; None: no guidance"""

    unwanted: Tensor | None = None

    def encode_prompt(self, *args: Any, prompt_embeds: Tensor, **given: Any) -> tuple[Tensor, Tensor | None]:
        """Encoded already. (As arguments of a call the two would have to be of one length.)"""
        return prompt_embeds, self.unwanted


class Guided:
    """The denoiser with given pictures in its memory, which the unguided side knows nothing of."""

    def __init__(self, transformer: Any, memories: Sequence[Any] | None) -> None:
        self.transformer, self.memories = transformer, memories
        self.config, self.dtype = transformer.config, transformer.prior_token_embedding.weight.dtype

    def __call__(self, prior_token_drop: Tensor, kv_caches: Any, **given: Any) -> tuple[Tensor]:
        memories = None if bool(prior_token_drop.all()) else self.memories
        said: tuple[Tensor] = self.transformer(prior_token_drop=prior_token_drop, kv_caches=memories, **given)
        return said
