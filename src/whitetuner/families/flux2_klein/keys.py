"""Names of FLUX.2's modules in diffusers <-> in the original layout, which ComfyUI's full checkpoints have.

The original fuses q, k and v (rows one after the other) and keeps shift before scale in the last modulation,
diffusers scale before shift. Rules as in diffusers loaders/single_file_utils.py
`convert_flux2_transformer_checkpoint_to_diffusers`, which the tests run as the inverse.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from whitetuner.errors import UserError
from whitetuner.family import Naming

_TOP = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
}
#: Its halves change places, so an adapter for it has no original name that is right without changing tensors.
_SWAPPED = "norm_out.linear"
#: What ComfyUI knows by its original name alone (its table of diffusers names stops before these).
_ORIGINAL_ONLY = tuple(
    name for name in _TOP if "modulation" in name or name.startswith("time_guidance_embed")
)
_DOUBLE = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
_FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_SINGLE = {
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
_DOUBLE_LINEARS = (
    *(name for name in _DOUBLE if "norm" not in name),
    *_FUSED["img_attn.qkv"],
    *_FUSED["txt_attn.qkv"],
)
_SINGLE_LINEARS = ("attn.to_qkv_mlp_proj", "attn.to_out")
#: Module path with underscores and # for the block's number -> the path.
_FLAT = {
    path.replace(".", "_"): path
    for path in (
        *_TOP,
        *(f"transformer_blocks.#.{name}" for name in _DOUBLE_LINEARS),
        *(f"single_transformer_blocks.#.{name}" for name in _SINGLE_LINEARS),
    )
}
_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)")
_ORIGINAL_BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")


class KleinKeys:
    """KeyMap of FLUX.2 Klein. Adapters know linear layers only; full states know every tensor."""

    def adapter_prefix(self, module_path: str, naming: Naming) -> str:
        """comfyui: lycoris_ names (for the blocks they load in diffusers and lycoris-lora too), and the
        original name for the modulations and the time embedding, which ComfyUI has no other name for."""
        if naming == "diffusers":
            return f"transformer.{module_path}"
        if naming == "comfyui" and module_path in _ORIGINAL_ONLY:
            return f"diffusion_model.{_TOP[module_path]}"
        return "lycoris_" + module_path.replace(".", "_")

    def module_path(self, prefix: str) -> str | None:
        """Also of bare paths. None for fused layers (img_attn.qkv): no single module of ours is that
        layer.
        """
        if prefix.startswith("lycoris_"):
            flat = prefix.removeprefix("lycoris_")
            block = re.fullmatch(r"((?:single_)?transformer_blocks_)(\d+)(_.+)", flat)
            if block is None:
                return _FLAT.get(flat)
            path = _FLAT.get(f"{block[1]}#{block[3]}")
            return path and path.replace("#", block[2])
        if prefix.startswith("diffusion_model."):
            return _from_original_layer(prefix.removeprefix("diffusion_model."))
        path = prefix.removeprefix("transformer.")
        number = _BLOCK.fullmatch(path)
        general = path if number is None else f"{number[1] or ''}transformer_blocks.#.{number[3]}"
        return path if general in _FLAT.values() else None

    def to_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Full state of the transformer -> bare original keys. Raises UserError for a name that is not
        Klein's.
        """
        found: dict[str, Tensor] = {}
        for name, tensor in state.items():
            module, _, parameter = name.rpartition(".")
            block = _BLOCK.fullmatch(module)
            if parameter != "weight":
                raise _foreign(name)
            if block is None:
                if module not in _TOP:
                    raise _foreign(name)
                found[f"{_TOP[module]}.weight"] = _swap_halves(tensor) if module == _SWAPPED else tensor
                continue
            single, number, rest = block.groups()
            kind, table = ("single", _SINGLE) if single else ("double", _DOUBLE)
            fused = next((theirs for theirs, ours in _FUSED.items() if not single and rest in ours), None)
            if fused is not None:
                rows = [state[f"transformer_blocks.{number}.{one}.weight"] for one in _FUSED[fused]]
                found[f"double_blocks.{number}.{fused}.weight"] = torch.cat(rows)
            elif rest in table:
                last = "scale" if "norm" in rest else "weight"  # BFL's own word; older ComfyUI knows no other
                found[f"{kind}_blocks.{number}.{table[rest]}.{last}"] = tensor
            else:
                raise _foreign(name)
        return found

    def from_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inverse of `to_original`, to the bit. `model.diffusion_model.` before the names and `.weight` for
        the norms' `.scale` are understood too. Raises UserError for a name that is not Klein's."""
        top = {theirs: ours for ours, theirs in _TOP.items()}
        double, single = ({theirs: ours for ours, theirs in table.items()} for table in (_DOUBLE, _SINGLE))
        found: dict[str, Tensor] = {}
        for given, tensor in state.items():
            name = given.removeprefix("model.").removeprefix("diffusion_model.")
            module, _, parameter = name.rpartition(".")
            block = _ORIGINAL_BLOCK.fullmatch(module)
            if parameter not in ("weight", "scale"):
                raise _foreign(given)
            if block is None:
                if module not in top:
                    raise _foreign(given)
                ours = top[module]
                found[f"{ours}.weight"] = _swap_halves(tensor) if ours == _SWAPPED else tensor
                continue
            kind, number, rest = block.groups()
            if kind == "double" and rest in _FUSED:
                for ours, rows in zip(_FUSED[rest], tensor.chunk(3)):
                    found[f"transformer_blocks.{number}.{ours}.weight"] = rows.contiguous()
                continue
            table, lead = (double, "") if kind == "double" else (single, "single_")
            if rest not in table:
                raise _foreign(given)
            found[f"{lead}transformer_blocks.{number}.{table[rest]}.weight"] = tensor
        return found

    def config(self, shapes: Mapping[str, Sequence[int]], names: Iterable[str] = ()) -> dict[str, Any]:
        """config.json of a transformer whose tensors, by diffusers name, have these shapes."""
        width, channels = (int(n) for n in shapes["x_embedder.weight"])
        head = int(shapes["transformer_blocks.0.attn.norm_q.weight"][0])
        return {
            "_class_name": "Flux2Transformer2DModel",
            "in_channels": channels,
            "num_layers": _blocks(shapes, ""),
            "num_single_layers": _blocks(shapes, "single_"),
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "joint_attention_dim": int(shapes["context_embedder.weight"][1]),
            "timestep_guidance_channels": int(
                shapes["time_guidance_embed.timestep_embedder.linear_1.weight"][1]
            ),
            "mlp_ratio": shapes["transformer_blocks.0.ff.linear_out.weight"][1] / width,
            "axes_dims_rope": [head // 4] * 4,
            "guidance_embeds": False,
        }


def _blocks(shapes: Mapping[str, Sequence[int]], lead: str) -> int:
    found = (_BLOCK.match(name) for name in shapes if name.startswith(f"{lead}transformer_blocks."))
    return 1 + max((int(one[2]) for one in found if one), default=-1)


def _from_original_layer(name: str) -> str | None:
    """Path of the linear layer that is exactly this original one."""
    block = _ORIGINAL_BLOCK.fullmatch(name)
    if block is None:
        return next((ours for ours, theirs in _TOP.items() if theirs == name and ours != _SWAPPED), None)
    kind, number, rest = block.groups()
    table, lead = (_DOUBLE, "") if kind == "double" else (_SINGLE, "single_")
    ours = next((ours for ours, theirs in table.items() if theirs == rest and "norm" not in ours), None)
    return ours and f"{lead}transformer_blocks.{number}.{ours}"


def _swap_halves(tensor: Tensor) -> Tensor:
    return torch.cat(tuple(reversed(tensor.chunk(2))))


def _foreign(name: str) -> UserError:
    return UserError(
        "'{name}' is no tensor of a FLUX.2 Klein transformer",
        mend="give the bf16 transformer of FLUX.2 Klein (guidance_in: that is FLUX.2 dev; scale_weight: an fp8 file)",
        name=name,
    )


KEYS = KleinKeys()
