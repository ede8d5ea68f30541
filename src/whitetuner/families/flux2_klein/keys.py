"""Names of FLUX.2's modules in diffusers <-> in the original layout that ComfyUI reads.

The original fuses q, k, v (rows one after the other) and swaps the halves of the last modulation (shift and scale). Rules as
in diffusers loaders/single_file_utils.py `convert_flux2_transformer_checkpoint_to_diffusers`, which the tests run as inverse.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from whitetuner.family import Naming

_TOP = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
}
_DOUBLE = {
    "attn.to_out.0.weight": "img_attn.proj.weight",
    "attn.to_add_out.weight": "txt_attn.proj.weight",
    "ff.linear_in.weight": "img_mlp.0.weight",
    "ff.linear_out.weight": "img_mlp.2.weight",
    "ff_context.linear_in.weight": "txt_mlp.0.weight",
    "ff_context.linear_out.weight": "txt_mlp.2.weight",
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
}
_FUSED = {
    "img_attn.qkv.weight": ("attn.to_q.weight", "attn.to_k.weight", "attn.to_v.weight"),
    "txt_attn.qkv.weight": ("attn.add_q_proj.weight", "attn.add_k_proj.weight", "attn.add_v_proj.weight"),
}
_SINGLE = {
    "attn.to_qkv_mlp_proj.weight": "linear1.weight",
    "attn.to_out.weight": "linear2.weight",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
}
_SWAPPED = "norm_out.linear"
_DOUBLE_LINEARS = sorted(
    {name.removesuffix(".weight") for name in (*_DOUBLE, *sum(_FUSED.values(), ())) if "norm" not in name}
)
_SINGLE_LINEARS = ("attn.to_qkv_mlp_proj", "attn.to_out")
_LYCORIS = {
    **{f"transformer_blocks_#_{name.replace('.', '_')}": f"transformer_blocks.#.{name}" for name in _DOUBLE_LINEARS},
    **{f"single_transformer_blocks_#_{n.replace('.', '_')}": f"single_transformer_blocks.#.{n}" for n in _SINGLE_LINEARS},
    **{name.replace(".", "_"): name for name in _TOP},
}


def _swap(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2, dim=0)
    return torch.cat([second, first], dim=0)


class KleinKeys:
    """KeyMap of FLUX.2 Klein."""

    def adapter_prefix(self, module_path: str, naming: Naming) -> str:
        if naming == "diffusers":
            return f"transformer.{module_path}"
        if naming == "comfyui" and module_path in _TOP and ("modulation" in module_path or "time_guid" in module_path):
            return f"diffusion_model.{_TOP[module_path]}"  # ComfyUI's diffusers names do not cover these
        return "lycoris_" + module_path.replace(".", "_")

    def module_path(self, prefix: str) -> str | None:
        for lead in ("base_model.model.", "transformer."):
            prefix = prefix.removeprefix(lead)
        for lead in ("lycoris_", "lora_transformer_"):
            if prefix.startswith(lead):
                flat = prefix.removeprefix(lead)
                number = re.search(r"(?<=transformer_blocks_)\d+", flat)
                key = flat if number is None else flat[: number.start()] + "#" + flat[number.end() :]
                found = _LYCORIS.get(key)
                return found.replace("#", number[0]) if found and number else found
        if prefix.startswith("diffusion_model."):
            original = prefix.removeprefix("diffusion_model.")
            return next((ours for ours, theirs in _TOP.items() if theirs == original), None)
        block = re.fullmatch(r"(single_)?transformer_blocks\.\d+\.(.+)", prefix)
        if block:
            return prefix if block[2] in (_SINGLE_LINEARS if block[1] else _DOUBLE_LINEARS) else None
        return prefix if prefix in _TOP else None

    def to_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """diffusers state dict -> original layout, bare keys. Raises KeyError for a name that is not FLUX.2's."""
        found: dict[str, Tensor] = {}
        for name, tensor in state.items():
            block = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", name)
            if block is None:
                module = name.removesuffix(".weight")
                found[f"{_TOP[module]}.weight"] = _swap(tensor) if module == _SWAPPED else tensor
                continue
            single, number, rest = block.groups()
            if single:
                found[f"single_blocks.{number}.{_SINGLE[rest]}"] = tensor
                continue
            fused = next((theirs for theirs, ours in _FUSED.items() if rest in ours), None)
            if fused is None:
                found[f"double_blocks.{number}.{_DOUBLE[rest]}"] = tensor
            elif rest == _FUSED[fused][0]:
                rows = [state[f"transformer_blocks.{number}.{one}"] for one in _FUSED[fused]]
                found[f"double_blocks.{number}.{fused}"] = torch.cat(rows, dim=0)
        return found

    def from_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inverse of `to_original`; norms may also end in `.weight`. Raises KeyError for a name that is not FLUX.2's."""
        top = {theirs: ours for ours, theirs in _TOP.items()}
        double, single = ({theirs: ours for ours, theirs in table.items()} for table in (_DOUBLE, _SINGLE))
        found: dict[str, Tensor] = {}
        for name, tensor in state.items():
            block = re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)", name)
            if block is None:
                module = top[name.removesuffix(".weight")]
                found[f"{module}.weight"] = _swap(tensor) if module == _SWAPPED else tensor
                continue
            kind, number, rest = block.groups()
            rest = re.sub(r"(query|key)_norm\.weight$", r"\1_norm.scale", rest)
            if kind == "single":
                found[f"single_transformer_blocks.{number}.{single[rest]}"] = tensor
            elif rest in _FUSED:
                for ours, rows in zip(_FUSED[rest], tensor.chunk(3, dim=0)):
                    found[f"transformer_blocks.{number}.{ours}"] = rows.contiguous()
            else:
                found[f"transformer_blocks.{number}.{double[rest]}"] = tensor
        return found


KEYS = KleinKeys()
