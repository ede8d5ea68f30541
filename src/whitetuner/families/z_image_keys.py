"""Names of Z-Image's modules in diffusers <-> in the original layout, which ComfyUI's full checkpoints have.

The original fuses q, k and v (rows one after the other) and has shorter names for a few layers. Rules as in diffusers
loaders/single_file_utils.py `convert_z_image_transformer_checkpoint_to_diffusers`, which the tests run as the inverse.
Adapters keep the diffusers paths everywhere: ComfyUI knows them, and finds q, k and v as rows of its fused matrix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from whitetuner.errors import UserError
from whitetuner.family import Naming

_ATTENTION = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
_FEED_FORWARD = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
_NORMS = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
_QK_NORMS = ("attention.norm_q", "attention.norm_k")
_MODULATION = "adaLN_modulation.0"
#: Linear layers of a block with modulation, without it, and with a second stream for the text.
MODULATED = (*_ATTENTION, *_FEED_FORWARD, _MODULATION)
PLAIN = (*_ATTENTION, *_FEED_FORWARD)
TWO_STREAMS = (
    *MODULATED,
    *(name.replace("feed_forward", "feed_forward_context") for name in _FEED_FORWARD),
    "adaLN_modulation_context.0",
)
#: Diffusers -> original; what is not here has one name.
_RENAMED = {
    "all_x_embedder.2-1": "x_embedder",
    "all_final_layer.2-1.linear": "final_layer.linear",
    "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
}
_RENAMED_INSIDE = {
    "attention.to_out.0": "attention.out",
    "attention.norm_q": "attention.q_norm",
    "attention.norm_k": "attention.k_norm",
}
_FUSED = "attention.qkv"
_TOP = (*_RENAMED, "cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2")
_BARE = ("x_pad_token", "cap_pad_token", "cap_embedder.0.weight")
_BLOCK = re.compile(r"([a-z_]+)\.(\d+)\.(.+)")


class ZImageKeys:
    """KeyMap over the lists of blocks that a denoiser has.

    lists: attribute -> the linear layers in each of its blocks
    original: whether there is an original layout; else full states keep their names
    """

    #: In the released file, of no use: the last norm has no weight (diffusers leaves it out too).
    unused = ("norm_final.weight",)

    def __init__(
        self,
        title: str,
        lists: Mapping[str, tuple[str, ...]],
        *,
        original: bool = True,
        class_name: str = "ZImageTransformer2DModel",
    ) -> None:
        self.title, self.lists, self.original, self.class_name = title, lists, original, class_name
        self.in_comfyui = original  # V2 is known to no other program
        self._flat = {
            path.replace(".", "_"): path
            for path in (*_TOP, *(f"{name}.#.{layer}" for name in lists for layer in lists[name]))
        }

    def adapter_prefix(self, module_path: str, naming: Naming) -> str:
        """comfyui: the diffusers path behind diffusion_model., which diffusers' Z-Image loader reads too."""
        if naming == "diffusers":
            return f"transformer.{module_path}"
        if naming == "lycoris":
            return "lycoris_" + module_path.replace(".", "_")
        return f"diffusion_model.{module_path}"

    def module_path(self, prefix: str) -> str | None:
        """Also of bare paths and of the original's names. None for the fused attention.qkv: no layer of ours is that."""
        if prefix.startswith("lycoris_"):
            flat = prefix.removeprefix("lycoris_")
            names = "|".join(self.lists)
            block = re.fullmatch(rf"({names})_(\d+)_(.+)", flat)
            path = self._flat.get(flat if block is None else f"{block[1]}_#_{block[3]}")
            return path and (path if block is None else path.replace("#", block[2]))
        path = prefix.removeprefix("transformer.").removeprefix("diffusion_model.")
        if self.original:
            path = next((ours for ours, theirs in _RENAMED.items() if theirs == path), path)
        found = _BLOCK.fullmatch(path)
        if found is None or found[1] not in self.lists:
            return path if path in _TOP else None
        rest = found[3]
        if self.original:
            rest = next((ours for ours, theirs in _RENAMED_INSIDE.items() if theirs == rest), rest)
        return f"{found[1]}.{found[2]}.{rest}" if rest in self.lists[found[1]] else None

    def to_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Full state of the transformer -> bare original keys. Raises UserError for a name that is not its own."""
        found: dict[str, Tensor] = {}
        for name, tensor in state.items():
            if not self._knows(name):
                raise self._foreign(name)
            block = _BLOCK.fullmatch(name)
            if not self.original or (block and block[3].startswith(("attention.to_k.", "attention.to_v."))):
                if not self.original:
                    found[name] = tensor
                continue  # k and v went with q
            if block is not None and block[3].startswith("attention.to_q."):
                lead = f"{block[1]}.{block[2]}.attention"
                rows = [state[f"{lead}.to_{one}.weight"] for one in "qkv"]
                found[f"{lead}.qkv.weight"] = torch.cat(rows)
            else:
                found[_replaced(name, _RENAMED_INSIDE if block else _RENAMED)] = tensor
        return found

    def from_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inverse of `to_original`, to the bit. `model.diffusion_model.` before the names is understood too.

        Raises UserError for a name that is not its own.
        """
        found: dict[str, Tensor] = {}
        for given, tensor in state.items():
            name = given.removeprefix("model.").removeprefix("diffusion_model.")
            block = _BLOCK.fullmatch(name)
            if self.original and block is not None and block[3] == f"{_FUSED}.weight":
                for one, rows in zip("qkv", tensor.chunk(3)):
                    path = f"{block[1]}.{block[2]}.attention.to_{one}.weight"
                    if not self._knows(path):
                        raise self._foreign(given)
                    found[path] = rows.contiguous()
                continue
            if self.original:
                table = _RENAMED_INSIDE if block is not None and block[1] in self.lists else _RENAMED
                if _replaced(name, table) != name:  # ours where theirs belongs
                    raise self._foreign(given)
                name = _replaced(name, {theirs: ours for ours, theirs in table.items()})
            if not self._knows(name):
                raise self._foreign(given)
            found[name] = tensor
        return found

    def config(self, shapes: Mapping[str, Sequence[int]], names: Iterable[str] = ()) -> dict[str, Any]:
        """config.json of a denoiser whose tensors, by diffusers name, have these shapes."""
        width, patches = (int(n) for n in shapes["all_x_embedder.2-1.weight"])
        head = int(shapes["layers.0.attention.norm_q.weight"][0])
        found = [_BLOCK.fullmatch(name) for name in shapes]
        depth = {
            name: 1 + max((int(b[2]) for b in found if b and b[1] == name), default=-1) for name in self.lists
        }
        axes = [head // 4, head * 3 // 8, head * 3 // 8] if head % 16 == 0 else [head // 3] * 3
        double = depth.get("double_stream_layers", 0)  # none: a file of V1, which V2 reads too
        more = {"n_double_layers": double} if double else {}
        return {
            "_class_name": self.class_name if double else "ZImageTransformer2DModel",
            "in_channels": patches // 4,
            "dim": width,
            "n_layers": depth["layers"] + double,
            "n_refiner_layers": depth["noise_refiner"],
            "n_heads": width // head,
            "n_kv_heads": width // head,
            "cap_feat_dim": int(shapes["cap_embedder.1.weight"][1]),
            "axes_dims": axes,
            **more,
        }

    def _knows(self, name: str) -> bool:
        """Whether this is the name of a tensor of the denoiser in diffusers."""
        if name in _BARE:
            return True
        module, _, parameter = name.rpartition(".")
        block = _BLOCK.fullmatch(module)
        if block is None or block[1] not in self.lists:
            return module in _TOP and parameter in ("weight", "bias")
        linears, rest = self.lists[block[1]], block[3]
        norms = (
            *_NORMS,
            *_QK_NORMS,
            *(f"{one}_context" for one in _NORMS if "feed_forward_context.w1" in linears),
        )
        with_bias = rest in linears and rest.startswith("adaLN")
        return (rest in linears or rest in norms) and parameter in ("weight", *(["bias"] * with_bias))

    def _foreign(self, name: str) -> UserError:
        return UserError(
            "'{name}' is no tensor of a {title} transformer",
            mend="give the bf16 transformer of {title} (siglip names: that is Z-Image-Omni; scale_weight: an fp8 file)",
            name=name,
            title=self.title,
        )


def _replaced(name: str, table: Mapping[str, str]) -> str:
    """The tensor's name with its module's name exchanged, inside a block or at the top."""
    module, _, parameter = name.rpartition(".")
    block = _BLOCK.fullmatch(module)
    if block is not None and block[3] in table:
        return f"{block[1]}.{block[2]}.{table[block[3]]}.{parameter}"
    return f"{table[module]}.{parameter}" if module in table else name


#: V1's own; V2 reads adapters of V1 by it.
V1_KEYS = ZImageKeys("Z-Image", {"noise_refiner": MODULATED, "context_refiner": PLAIN, "layers": MODULATED})
