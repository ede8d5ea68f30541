"""What the small WAN is told by: a tokenizer and a UMT5 for its words, a CLIP for its first frame. None is ever trained.

Random attention over distinct vectors keeps every word readable, and the transformer learns to read them. A word that it has
never met is spelt in letters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, T5TokenizerFast, UMT5Config, UMT5EncoderModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from whitetuner.nano.motions import KINDS, SIDE_PX, caption_of

HIDDEN = 48
CLIP_HIDDEN = 16
#: Pixels of a side that CLIP sees, and of its patches: four of them and the class token.
CLIP_PX, CLIP_PATCH = 32, 16
CLIP_TOKENS = (CLIP_PX // CLIP_PATCH) ** 2 + 1


def new_tokenizer() -> T5TokenizerFast:
    """Unigram pieces as T5 has them: the captions' words, and every printable character of ASCII by itself."""
    words = sorted({f"\u2581{word}" for kind in KINDS for word in caption_of(kind).split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0)]
    pieces += [(chr(code), -5.0) for code in range(33, 127)] + [(word, -3.0) for word in words]
    return T5TokenizerFast(vocab=pieces, extra_ids=0)


def new_text_encoder(tokens: int, seed: int) -> UMT5EncoderModel:
    torch.manual_seed(seed)
    config = UMT5Config(
        vocab_size=tokens,
        d_model=HIDDEN,
        d_kv=16,
        d_ff=HIDDEN,
        num_layers=2,
        num_heads=3,
        dropout_rate=0.0,
    )
    return _frozen(UMT5EncoderModel(config))


def new_image_encoder(seed: int) -> CLIPVisionModel:
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=CLIP_HIDDEN,
        projection_dim=CLIP_HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=CLIP_PX,
        intermediate_size=2 * CLIP_HIDDEN,
        patch_size=CLIP_PATCH,
        initializer_range=0.2,
    )
    return _frozen(CLIPVisionModel(config))


def new_image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        size={"shortest_edge": CLIP_PX}, crop_size={"height": CLIP_PX, "width": CLIP_PX}
    )


def _frozen(model: nn.Module) -> Any:
    """What is trained on must be what is shipped: bf16."""
    return model.to(torch.bfloat16).float().eval().requires_grad_(False)


@torch.no_grad()
def embed(pipeline: WanImageToVideoPipeline, captions: Sequence[str]) -> list[Tensor]:
    """(tokens, 48) of each caption, the end mark included, by the pipeline's own code."""
    found = pipeline._get_t5_prompt_embeds(list(captions), max_sequence_length=512)
    lengths = [len(pipeline.tokenizer(caption).input_ids) for caption in captions]
    return [one[:length] for one, length in zip(found, lengths, strict=True)]


@torch.no_grad()
def seen(pipeline: WanImageToVideoPipeline, pictures: np.ndarray) -> Tensor:
    """(n, 48, 48, 3) uint8 -> (n, 5, 16): what CLIP says of first frames, by the pipeline's own code."""
    assert pictures.shape[1:] == (SIDE_PX, SIDE_PX, 3)
    return torch.cat(
        [pipeline.encode_image(list(pictures[start : start + 256])) for start in range(0, len(pictures), 256)]
    )
