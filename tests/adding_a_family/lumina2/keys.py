"""Names of Lumina-Image 2.0's modules in diffusers <-> in the original layout.

The original fuses q, k and v, of which k and v are narrower. Rules as in diffusers loaders/single_file_utils.py
`convert_lumina2_to_diffusers`, which the tests run as the inverse. ComfyUI loads the model but no adapter of its q, k and v:
comfy/utils.py `z_image_to_diffusers` takes them for thirds of the fused matrix, and here they are 3/5, 1/5 and 1/5 of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from whitetuner.errors import UserError
from whitetuner.family import Naming

#: Diffusers -> original, outside the blocks and inside them. A name that stands in neither is the same in both.
_TOP = {
    "x_embedder": "x_embedder",
    "time_caption_embed.caption_embedder.0": "cap_embedder.0",
    "time_caption_embed.caption_embedder.1": "cap_embedder.1",
    "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "norm_out.linear_1": "final_layer.adaLN_modulation.1",
    "norm_out.linear_2": "final_layer.linear",
}
_INSIDE = {
    "attn.to_out.0": "attention.out",
    "attn.norm_q": "attention.q_norm",
    "attn.norm_k": "attention.k_norm",
    **{f"feed_forward.linear_{n}": f"feed_forward.w{n}" for n in (1, 2, 3)},
    "norm2": "attention_norm2",
    "ffn_norm1": "ffn_norm1",
    "ffn_norm2": "ffn_norm2",
}
#: Blocks that know the time have a modulation around their first norm.
_MODULATED = {**_INSIDE, "norm1.linear": "adaLN_modulation.1", "norm1.norm": "attention_norm1"}
_BLOCKS = {
    "noise_refiner": _MODULATED,
    "context_refiner": {**_INSIDE, "norm1": "attention_norm1"},
    "layers": _MODULATED,
}
_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_LINEAR = re.compile(r"attn\.to_.*|feed_forward\..*|norm1\.linear")
_NOT_LINEAR = "time_caption_embed.caption_embedder.0"
_BLOCK = re.compile(r"(noise_refiner|context_refiner|layers)([._])(\d+)[._](.+)")
_LEADS = re.compile(r"(model\.)?diffusion_model\.")


class Lumina2Keys:
    """KeyMap of Lumina-Image 2.0."""

    in_comfyui = False
    #: In the released file, of no use: the last norm has no weight.
    unused = ("norm_final.weight",)

    def adapter_prefix(self, module_path: str, naming: Naming) -> str:
        lead = {"diffusers": "transformer.", "comfyui": "diffusion_model.", "lycoris": "lycoris_"}[naming]
        return lead + (module_path.replace(".", "_") if naming == "lycoris" else module_path)

    def module_path(self, prefix: str) -> str | None:
        flat = prefix.startswith("lycoris_")
        path = re.sub(r"^(lycoris_|transformer\.|diffusion_model\.)", "", prefix)
        block = _BLOCK.fullmatch(path)
        if block is None:
            known = [name for name in _TOP if name != _NOT_LINEAR]
            return next((one for one in known if path == (one.replace(".", "_") if flat else one)), None)
        layers = [name for name in (*_QKV, *_BLOCKS[block[1]]) if _LINEAR.fullmatch(name)]
        found = next((n for n in layers if block[4] == (n.replace(".", "_") if flat else n)), None)
        return None if found is None or (block[2] == "_") != flat else f"{block[1]}.{block[3]}.{found}"

    def to_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Full state of the transformer -> bare original keys. Raises UserError for a name that is not its own."""
        found: dict[str, Tensor] = {}
        for name, tensor in state.items():
            module, _, parameter = name.rpartition(".")
            block = _BLOCK.fullmatch(module)
            if block is not None and block[4] == _QKV[0]:
                lead = f"{block[1]}.{block[3]}"
                rows = [state[f"{lead}.{one}.weight"] for one in _QKV]
                found[f"{lead}.attention.qkv.weight"] = torch.cat(rows)
            elif block is None or block[4] not in _QKV:  # k and v went with q
                found[f"{_exchanged(module, _TOP, _BLOCKS, name)}.{parameter}"] = tensor
        return found

    def from_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inverse of `to_original`, to the bit. Raises UserError for a name that is not its own."""
        top, inside = _turned(_TOP), {name: _turned(table) for name, table in _BLOCKS.items()}
        found: dict[str, Tensor] = {}
        for given, tensor in state.items():
            name = _LEADS.sub("", given, count=1)
            module, _, parameter = name.rpartition(".")
            block = _BLOCK.fullmatch(module)
            if block is not None and block[4] == "attention.qkv":
                # Told by the number of rows alone: 24 heads of q to 8 of k and of v.
                part = len(tensor) // 5
                for one, rows in zip(_QKV, tensor.split([3 * part, part, part])):
                    found[f"{block[1]}.{block[3]}.{one}.{parameter}"] = rows.contiguous()
            else:
                found[f"{_exchanged(module, top, inside, given)}.{parameter}"] = tensor
        return found


def _turned(table: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in table.items()}


def _exchanged(
    module: str, top: Mapping[str, str], inside: Mapping[str, Mapping[str, str]], name: str
) -> str:
    block = _BLOCK.fullmatch(module)
    if block is None and module in top:
        return top[module]
    if block is not None and block[2] == "." and block[4] in inside[block[1]]:
        return f"{block[1]}.{block[3]}.{inside[block[1]][block[4]]}"
    raise UserError(
        "'{name}' is no tensor of a Lumina-Image 2.0 transformer",
        mend="give the transformer of Lumina-Image 2.0",
        name=name,
    )


KEYS = Lumina2Keys()
