"""UMT5 as a single file, in transformers' names (as ComfyUI has it) or in those of WAN's first release: told and renamed.

The first release's: github.com/Wan-Video/Wan2.1 wan/modules/t5.py, of which there are safetensors files (umt5-xxl-enc-bf16).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from whitetuner.families.files import renamed

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, Sequence[int]]

_RENAMED = (
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.block.\1.layer.0.SelfAttention."),
    (
        r"^blocks\.(\d+)\.pos_embedding\.embedding\.",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.",
    ),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
)


def is_umt5(shapes: Shapes) -> bool:
    """Every layer has a bias of its own for positions; T5 has one for all."""
    second = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    return second in shapes or "blocks.1.pos_embedding.embedding.weight" in shapes


def umt5_config(shapes: Shapes) -> dict[str, Any]:
    """config.json of transformers' UMT5EncoderModel; what shapes cannot tell is google/umt5-xxl's."""
    named = {renamed(name, _RENAMED): shape for name, shape in shapes.items()}
    lead = "encoder.block.0.layer.0.SelfAttention."
    buckets, heads = named[f"{lead}relative_attention_bias.weight"]
    tokens, width = named["shared.weight"]
    layers = [int(found[1]) for name in named if (found := re.match(r"encoder\.block\.(\d+)\.", name))]
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": int(tokens),
        "d_model": int(width),
        "d_kv": int(named[f"{lead}q.weight"][0]) // int(heads),
        "d_ff": int(named["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0]),
        "num_layers": 1 + max(layers),
        "num_heads": int(heads),
        "relative_attention_num_buckets": int(buckets),
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
    }


def umt5_converted(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names only: no tensor is taken apart."""
    return {renamed(name, _RENAMED): tensor for name, tensor in state.items()}
