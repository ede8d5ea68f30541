"""The embedded model's text path: a tokenizer that knows the captions' words, and a small random Qwen3.

The pipeline's own text path is kept (chat template, layers 9, 18 and 27 side by side, padding to a fixed
length), hence 28 layers. The encoder is never trained: random attention over distinct word vectors keeps
every word readable at every tap, and the transformer learns to read them. A word it has never met is spelt in
bytes, so it arrives as four vectors it does not know.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from diffusers import Flux2KleinPipeline
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from whitetuner.nano.builtin import MAX_SEQUENCE_LENGTH
from whitetuner.nano.draw import COLOURS, SHAPES

HIDDEN = 48
LAYERS = 28
TAPS = (9, 18, 27)

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
#: What Qwen3's template comes to for one message with thinking switched off.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}"
    "{%- endif %}"
    "{%- endif %}"
)


def new_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE in which each word of the captions is one token; other words fall apart into shorter
    pieces.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = [*SHAPES, *COLOURS, "small", "big", "a", "on", "with", "background"]
    first_words = ["a", *COLOURS]
    bpe.train_from_iterator(
        ["user\n", "assistant\n", "\n\n", *(f" {word}" for word in words), *first_words], trainer
    )
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        extra_special_tokens=SPECIAL_TOKENS[1:],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def new_text_encoder(tokens: int, seed: int) -> Qwen3ForCausalLM:
    """Frozen. Word vectors of deviation 1 and layers of .06: each layer adds context without drowning the
    word itself.
    """
    torch.manual_seed(seed)
    encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=tokens,
            hidden_size=HIDDEN,
            intermediate_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=16,
            max_position_embeddings=512,
            initializer_range=0.06,
            tie_word_embeddings=True,
        )
    )
    torch.nn.init.normal_(encoder.model.embed_tokens.weight)
    # What is trained on must be what is shipped: bf16.
    return encoder.to(torch.bfloat16).float().eval().requires_grad_(False)


@torch.no_grad()
def embed(encoder: Qwen3ForCausalLM, tokenizer: Qwen2Tokenizer, captions: Sequence[str]) -> Tensor:
    """-> (n, 28, 144) float32, by the pipeline's own code."""
    parts = [
        Flux2KleinPipeline._get_qwen3_prompt_embeds(
            encoder,
            tokenizer,
            list(captions[start : start + 256]),
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            hidden_states_layers=TAPS,
        )
        for start in range(0, len(captions), 256)
    ]
    return torch.cat(parts)
