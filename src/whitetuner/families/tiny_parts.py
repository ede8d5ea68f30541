"""What the random tiny models are made of that is not one family's own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import Qwen2TokenizerFast

from whitetuner.families.contract import quiet

QWEN3_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
#: What Qwen3's template comes to for plain messages, thinking switched on or off.
QWEN3_CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}{%- endif %}"
)
_WORDS = (
    "a photo of a red circle on a white background",
    "user assistant the quick brown fox jumps over 0123456789",
)

M = TypeVar("M", bound=nn.Module)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Numbers are drawn from this seed inside, without progress bars; outside they go on as they were."""
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        yield


def byte_level_bpe(
    words: Iterable[str], special_tokens: Sequence[str], size: int = 400, pre_tokenizer: Any = None
) -> Tokenizer:
    """Trained on these words; byte-level, so that every caption in every script has tokens.

    size: of the vocabulary at most; pre_tokenizer: of the tokenizers library, None: its plain byte level
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special_tokens),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator(tuple(words) * 4, trainer)
    return bpe


def qwen2_tokenizer(bpe: Tokenizer, special_tokens: Sequence[str]) -> Qwen2TokenizerFast:
    """Of what was learned; the first special token ends texts, as Qwen's does."""
    learned = json.loads(bpe.to_str())["model"]
    return Qwen2TokenizerFast(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        extra_special_tokens=list(special_tokens[1:]),
    )


def qwen3_tokenizer() -> Qwen2TokenizerFast:
    """With Qwen3's special tokens and chat template."""
    tokenizer = qwen2_tokenizer(byte_level_bpe(_WORDS, QWEN3_SPECIAL_TOKENS), QWEN3_SPECIAL_TOKENS)
    tokenizer.chat_template = QWEN3_CHAT_TEMPLATE
    return tokenizer


def uneven(model: M) -> M:
    """Draws the weights of norms: all ones would hide norms that were exchanged."""
    for name, weight in model.named_parameters():
        if "norm" in name and weight.dim() == 1 and name.endswith("weight"):
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model.eval()
