"""Names of GLM-Image's modules. Only diffusers reads this model today, so all layouts use its names.

ComfyUI does not know GLM-Image yet. Its files get what its generic loader (comfy/lora.py, model_lora_keys_unet) reads of
every model: diffusion_model. before the path of the module; LyCORIS files get lycoris_ and underscores.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from whitetuner.errors import UserError
from whitetuner.family import Naming

_BLOCK_LINEARS = (
    "norm1.linear",
    *(f"attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    "ff.net.2",
)
#: Path of each linear layer, # for the block's number.
_LINEARS = (
    "image_projector.proj",
    *(f"{name}_projector.net.{layer}" for name in ("glyph", "prior") for layer in ("0.proj", "2")),
    *(
        f"time_condition_embed.{name}_embedder.linear_{number}"
        for name in ("timestep", "condition")
        for number in (1, 2)
    ),
    "norm_out.linear",
    "proj_out",
    *(f"transformer_blocks.#.{name}" for name in _BLOCK_LINEARS),
)
_FLAT = {path.replace(".", "_"): path for path in _LINEARS}
_TENSORS = {
    "prior_token_embedding.weight",
    *(f"{path}.{kind}" for path in _LINEARS for kind in ("weight", "bias")),
}
_PREFIXES = ("diffusion_model.", "transformer.", "")


class GlmImageKeys:
    """KeyMap of GLM-Image. Adapters know linear layers only; full states know every tensor."""

    def adapter_prefix(self, module_path: str, naming: Naming) -> str:
        """diffusers: transformer.X; comfyui: diffusion_model.X; lycoris: lycoris_X with underscores."""
        if naming == "lycoris":
            return "lycoris_" + module_path.replace(".", "_")
        return ("transformer." if naming == "diffusers" else "diffusion_model.") + module_path

    def module_path(self, prefix: str) -> str | None:
        """Also of bare paths and of lora_unet_ names with underscores."""
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

    def to_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same names. Raises UserError for one that is not GLM-Image's."""
        for name in state:
            if _general(name, ".")[0] not in _TENSORS:
                raise _foreign(name)
        return dict(state)

    def from_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inverse of `to_original`; `diffusion_model.` or `model.diffusion_model.` before the names is understood too.

        Raises UserError for a name that is not GLM-Image's.
        """
        found = {}
        for given, tensor in state.items():
            name = given.removeprefix("model.").removeprefix("diffusion_model.")
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
        "'{name}' is no tensor of a GLM-Image transformer",
        mend="give the transformer of GLM-Image (its vision_language_encoder is another part)",
        name=name,
    )


KEYS = GlmImageKeys()
