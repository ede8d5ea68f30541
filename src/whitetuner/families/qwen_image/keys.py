"""Names of Qwen-Image's modules: diffusers, ComfyUI and the original layout use the same ones, nothing is fused.

ComfyUI's table (comfy/lora.py, QwenImage) knows bare paths, transformer.X, diffusion_model.X and lycoris_X with underscores.
A full state of Edit-2511 has one empty tensor more there, by which ComfyUI knows that references are free of noise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from whitetuner.errors import UserError
from whitetuner.families.plain_keys import PlainKeys

#: ComfyUI's mark of a model whose references are modulated as at sigma 0 (comfy/model_detection.py); shape [0].
REFERENCES_AT_ZERO = "__index_timestep_zero__"
_TOP = (
    "img_in",
    "txt_in",
    "proj_out",
    "norm_out.linear",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
)
_BLOCK_LINEARS = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")),
    *(f"attn.add_{name}_proj" for name in "qkv"),
    *(f"{stream}_mlp.net.{layer}" for stream in ("img", "txt") for layer in ("0.proj", "2")),
    "img_mod.1",
    "txt_mod.1",
)
_NORMS = (
    "txt_norm",
    *(f"transformer_blocks.#.attn.norm_{name}" for name in ("q", "k", "added_q", "added_k")),
)
#: Path of each linear layer, # for the block's number.
_LINEARS = (*_TOP, *(f"transformer_blocks.#.{name}" for name in _BLOCK_LINEARS))
_TENSORS = {
    *(f"{path}.{kind}" for path in _LINEARS for kind in ("weight", "bias")),
    *(f"{path}.weight" for path in _NORMS),
}


class QwenImageKeys(PlainKeys):
    """KeyMap of Qwen-Image; ComfyUI and lycoris-lora both read lycoris_ names."""

    def marks(self, config: Mapping[str, Any]) -> dict[str, Tensor]:
        """What a full file has besides: Edit-2511's mark, by its transformer's config.json (`zero_cond_t`)."""
        return {REFERENCES_AT_ZERO: torch.empty(0)} if config.get("zero_cond_t") else {}

    def config(self, shapes: Mapping[str, Sequence[int]], names: Iterable[str] = ()) -> dict[str, Any]:
        """config.json of a transformer whose tensors, by diffusers name, have these shapes. names: in the file, marks too"""
        width, channels = (int(n) for n in shapes["img_in.weight"])
        head = int(shapes["transformer_blocks.0.attn.norm_q.weight"][0])
        numbers = (re.match(r"transformer_blocks\.(\d+)\.", name) for name in shapes)
        sides = 2 * ((head * 7 // 16) // 2)  # 56 of the released 128; the rest is the frames'
        return {
            "_class_name": "QwenImageTransformer2DModel",
            "in_channels": channels,
            "out_channels": int(shapes["proj_out.weight"][0]) // 4,
            "num_layers": 1 + max(int(one[1]) for one in numbers if one),
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "joint_attention_dim": int(shapes["txt_in.weight"][1]),
            "axes_dims_rope": [head - 2 * sides, sides, sides],
            "zero_cond_t": any(name.endswith(REFERENCES_AT_ZERO) for name in names),
        }


def _foreign(name: str) -> UserError:
    return UserError(
        "'{name}' is no tensor of a Qwen-Image transformer",
        mend="give the bf16 transformer of Qwen-Image or one of its Edits (scale_weight: an fp8 file; addition_t_embedding: "
        "the layered model)",
        name=name,
    )


KEYS = QwenImageKeys(_LINEARS, _TENSORS, comfyui="lycoris_", foreign=_foreign, left_out=(REFERENCES_AT_ZERO,))
