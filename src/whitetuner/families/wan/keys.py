"""Names of WAN's modules: diffusers and the original layout, which ComfyUI uses for models and adapters alike.

ComfyUI's table (comfy/lora.py) knows diffusion_model.ORIGINAL and lora_unet_ORIGINAL with underscores, and no diffusers names.
Rules as in diffusers loaders/single_file_utils.py `convert_wan_transformer_to_diffusers`, which the tests run as the inverse.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from whitetuner.errors import UserError
from whitetuner.family import Naming

#: Linear layers: diffusers -> original. "#" is the number of a block.
_LINEARS = {
    **{
        f"blocks.#.attn{number}.to_{ours}": f"blocks.#.{theirs}_attn.{short}"
        for number, theirs in ((1, "self"), (2, "cross"))
        for ours, short in (("q", "q"), ("k", "k"), ("v", "v"), ("out.0", "o"))
    },
    "blocks.#.attn2.add_k_proj": "blocks.#.cross_attn.k_img",
    "blocks.#.attn2.add_v_proj": "blocks.#.cross_attn.v_img",
    "blocks.#.ffn.net.0.proj": "blocks.#.ffn.0",
    "blocks.#.ffn.net.2": "blocks.#.ffn.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "proj_out": "head.head",
}
#: Other modules with weights.
_MODULES = {
    **{
        f"blocks.#.attn{number}.norm_{one}": f"blocks.#.{theirs}_attn.norm_{one}"
        for number, theirs in ((1, "self"), (2, "cross"))
        for one in "qk"
    },
    "blocks.#.attn2.norm_added_k": "blocks.#.cross_attn.norm_k_img",
    "blocks.#.norm2": "blocks.#.norm3",  # the original counts them in another order
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "patch_embedding": "patch_embedding",
}
#: Bare parameters.
_PARAMETERS = {
    "blocks.#.scale_shift_table": "blocks.#.modulation",
    "scale_shift_table": "head.modulation",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
}
_TO_ORIGINAL = {**_LINEARS, **_MODULES, **_PARAMETERS}
_FROM_ORIGINAL = {theirs: ours for ours, theirs in _TO_ORIGINAL.items()}
_LINEAR_OF = {theirs: ours for ours, theirs in _LINEARS.items()}
#: With underscores for dots, as in lycoris_ (diffusers names) and lora_unet_ (original names).
_FLAT = {ours.replace(".", "_"): ours for ours in _LINEARS}
_FLAT_ORIGINAL = {theirs.replace(".", "_"): ours for ours, theirs in _LINEARS.items()}
_BLOCK, _FLAT_BLOCK = re.compile(r"^blocks\.(\d+)\."), re.compile(r"^blocks_(\d+)_")


class WanKeys:
    """KeyMap of WAN. The two experts of 2.2 have the same names, in files of their own."""

    def adapter_prefix(self, module_path: str, naming: Naming) -> str:
        """comfyui: diffusion_model. before the original name."""
        if naming == "diffusers":
            return f"transformer.{module_path}"
        if naming == "lycoris":
            return "lycoris_" + module_path.replace(".", "_")
        found = _renamed(module_path, _LINEARS)
        return f"diffusion_model.{found or module_path}"

    def module_path(self, prefix: str) -> str | None:
        """Of any naming, either expert's, bare names of both layouts too."""
        if prefix.startswith("lycoris_"):
            return _unflattened(prefix.removeprefix("lycoris_"), _FLAT)
        if prefix.startswith("lora_unet_"):
            return _unflattened(prefix.removeprefix("lora_unet_"), _FLAT_ORIGINAL)
        for lead in ("transformer.", "transformer_2.", "diffusion_model."):
            prefix = prefix.removeprefix(lead)
        if _numbered(prefix)[0] in _LINEARS:
            return prefix
        return _renamed(prefix, _LINEAR_OF)

    def to_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Full state of a denoiser -> bare original keys. Raises UserError for a name that is not its own."""
        return _all_renamed(state, _TO_ORIGINAL)

    def from_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inverse of `to_original`, to the bit. `model.diffusion_model.` before the names is understood too."""
        bare = {name.removeprefix("model.").removeprefix("diffusion_model."): t for name, t in state.items()}
        return _all_renamed(bare, _FROM_ORIGINAL)

    def config(self, shapes: Mapping[str, Sequence[int]], names: Iterable[str] = ()) -> dict[str, Any]:
        """config.json of a denoiser whose tensors, by diffusers name, have these shapes."""
        width, channels, *patch = (int(n) for n in shapes["patch_embedding.weight"])
        looks = shapes.get("condition_embedder.image_embedder.ff.net.0.proj.weight")
        added = shapes.get("blocks.0.attn2.add_k_proj.weight")
        places = shapes.get("condition_embedder.image_embedder.pos_embed")
        numbers = (_BLOCK.match(name) for name in shapes)
        # The width of a head is in no shape: 128 in all releases; a model too narrow for that has two heads.
        heads = width // 128 if width % 128 == 0 else 2
        out = int(shapes["proj_out.weight"][0]) // (patch[0] * patch[1] * patch[2])
        return {
            "_class_name": "WanTransformer3DModel",
            "patch_size": patch,
            "num_attention_heads": heads,
            "attention_head_dim": width // heads,
            "in_channels": channels,
            "out_channels": out,
            "text_dim": int(shapes["condition_embedder.text_embedder.linear_1.weight"][1]),
            "freq_dim": int(shapes["condition_embedder.time_embedder.linear_1.weight"][1]),
            "ffn_dim": int(shapes["blocks.0.ffn.net.0.proj.weight"][0]),
            "num_layers": 1 + max(int(one[1]) for one in numbers if one),
            "image_dim": None if looks is None else int(looks[1]),
            "added_kv_proj_dim": None if added is None else int(added[1]),
            "pos_embed_seq_len": None if places is None else int(places[1]),
        }


def _numbered(name: str) -> tuple[str, str]:
    """blocks.7.x -> (blocks.#.x, "7")"""
    found = _BLOCK.match(name)
    return (name, "") if found is None else (_BLOCK.sub("blocks.#.", name), found[1])


def _renamed(name: str, table: Mapping[str, str]) -> str | None:
    pattern, number = _numbered(name)
    found = table.get(pattern)
    return None if found is None else found.replace("#", number)


def _unflattened(flat: str, table: Mapping[str, str]) -> str | None:
    found = _FLAT_BLOCK.match(flat)
    path = table.get(flat if found is None else _FLAT_BLOCK.sub("blocks_#_", flat))
    return None if path is None else path.replace("#", found[1] if found else "")


def _all_renamed(state: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in state.items():
        module, dot, kind = name.rpartition(".")
        whole = _renamed(name, table)
        part = _renamed(module, table) if kind in ("weight", "bias") else None
        if whole is None and part is None:
            raise UserError(
                "{name} is no tensor of a WAN transformer",
                where="the full model",
                mend="give the file of WAN 2.1 or 2.2 (fp8 and GGUF files are not read here)",
                name=name,
            )
        found[whole if whole is not None else f"{part}{dot}{kind}"] = tensor
    return found


KEYS = WanKeys()
