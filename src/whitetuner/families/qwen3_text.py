"""Captions through the first layers of a Qwen3 in a chat message, as FLUX.2 Klein and Z-Image take them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3Model

from whitetuner.errors import UserError
from whitetuner.families.files import files_of
from whitetuner.family import Layout, ModelPaths, Reads

#: Norms and the table of words stay precise.
KEEP_PRECISE = ("*norm*", "embed_tokens*")


class Qwen3Text:
    """What both encoders share: tokenizer, template, tokens. Which states are the text, and how it loads, is the family's own.

    title:    of the family, for messages;  thinking: whether the template leaves thinking on
    options:  with max_sequence_length
    """

    name = "text"
    fields: Mapping[str, Layout]
    reads: frozenset[Reads] = frozenset({"caption"})
    title: ClassVar[str]
    thinking: ClassVar[bool]

    def __init__(self, paths: ModelPaths, options: Any) -> None:
        self.paths, self.options = paths, options
        self._model: Qwen3Model | None = None
        self._tokenizer: Qwen2TokenizerFast | None = None

    def files(self) -> list[Path]:
        """What its fingerprint covers."""
        return files_of(self.paths.component("text_encoder")) + files_of(self.paths.component("tokenizer"))

    def text(self, caption: str) -> str:
        """What the tokenizer is given: the caption as a chat message."""
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": caption}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=self.thinking,
        )

    def tokens(self, caption: str) -> Any:
        """input_ids and attention_mask (1, max_sequence_length), padded and cut as the pipelines do: another length would give
        other last bits.
        """
        return self.tokenizer(
            self.text(caption),
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=self.options.max_sequence_length,
        )

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
                    "the tokenizer has no chat template, which {title} wraps its prompts in",
                    where=str(folder),
                    mend="download the whole tokenizer folder again (chat_template.jinja is part of it)",
                    title=self.title,
                )
            self._tokenizer = found
        return self._tokenizer


def first_layers(count: int, *, norm: bool) -> type[Qwen3Model]:
    """Qwen3 that builds and loads its first `count` layers only. norm: with the final norm, which is of the very last state."""
    others = [] if norm else [r"^(model\.)?norm\."]

    class Qwen3FirstLayers(Qwen3Model):
        # Both transformers' loader and ours leave out what matches: the other layers, the norm and the head.
        _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [
            r"lm_head\.",
            rf"layers\.(?!({'|'.join(map(str, range(count)))})\.)\d+\.",
            *others,
        ]

        def __init__(self, config: Qwen3Config) -> None:
            config = copy.deepcopy(config)
            config.num_hidden_layers = min(count, config.num_hidden_layers)
            config.layer_types = config.layer_types[: config.num_hidden_layers]
            super().__init__(config)
            if not norm:
                self.norm = nn.Identity()

    return Qwen3FirstLayers
