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
from whitetuner.family import Naming

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
_FLAT = {path.replace(".", "_"): path for path in _LINEARS}
_TENSORS = {
    *(f"{path}.{kind}" for path in _LINEARS for kind in ("weight", "bias")),
    *(f"{path}.weight" for path in _NORMS),
}
_PREFIXES = ("diffusion_model.", "transformer.", "")


class QwenImageKeys:
    """KeyMap of Qwen-Image. Adapters know linear layers only; full states know every tensor."""

    def adapter_prefix(self, module_path: str, naming: Naming) -> str:
        """diffusers: transformer.X; comfyui and lycoris: lycoris_X, which both programs read."""
        if naming == "diffusers":
            return f"transformer.{module_path}"
        return "lycoris_" + module_path.replace(".", "_")

    def module_path(self, prefix: str) -> str | None:
        """Also of bare paths and of musubi-tuner's lora_unet_ names."""
        for lead in ("lycoris_", "lora_unet_"):
            if prefix.startswith(lead):
                flat, number = _general(prefix.removeprefix(lead), "_")
                return _FLAT[flat].replace("#", number) if flat in _FLAT else None
        for lead in _PREFIXES:
            if prefix.startswith(lead):
                general, _ = _general(prefix.removeprefix(lead), ".")
                if general in _LINEARS:
                    return prefix.removeprefix(lead)
        return None

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

    def to_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same names. Raises UserError for one that is not Qwen-Image's."""
        for name in state:
            if _general(name, ".")[0] not in _TENSORS:
                raise _foreign(name)
        return dict(state)

    def from_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inverse of `to_original`; the mark is left out. `model.diffusion_model.` before the names is understood too.

        Raises UserError for a name that is not Qwen-Image's.
        """
        found = {}
        for given, tensor in state.items():
            name = given.removeprefix("model.").removeprefix("diffusion_model.")
            if name == REFERENCES_AT_ZERO:
                continue
            if _general(name, ".")[0] not in _TENSORS:
                raise _foreign(given)
            found[name] = tensor
        return found


def _general(path: str, between: str) -> tuple[str, str]:
    """(path with # for the block's number, that number). A path with a # of its own is none of ours."""
    if "#" in path:
        return "", ""
    lead = f"transformer_blocks{between}"
    block = re.fullmatch(rf"{re.escape(lead)}(\d+)({re.escape(between)}.+)", path)
    return (path, "") if block is None else (f"{lead}#{block[2]}", block[1])


def _foreign(name: str) -> UserError:
    return UserError(
        "'{name}' is no tensor of a Qwen-Image transformer",
        mend="give the bf16 transformer of Qwen-Image or one of its Edits (scale_weight: an fp8 file; addition_t_embedding: "
        "the layered model)",
        name=name,
    )


KEYS = QwenImageKeys()
