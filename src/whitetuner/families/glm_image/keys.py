"""Names of GLM-Image's modules. Only diffusers reads this model today, so all layouts use its names.

ComfyUI does not know GLM-Image yet. Its files get what its generic loader (comfy/lora.py, model_lora_keys_unet) reads of
every model: diffusion_model. before the path of the module; LyCORIS files get lycoris_ and underscores.
"""

from __future__ import annotations

from whitetuner.errors import UserError
from whitetuner.families.plain_keys import PlainKeys

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
_TENSORS = {
    "prior_token_embedding.weight",
    *(f"{path}.{kind}" for path in _LINEARS for kind in ("weight", "bias")),
}


def _foreign(name: str) -> UserError:
    return UserError(
        "'{name}' is no tensor of a GLM-Image transformer",
        mend="give the transformer of GLM-Image (its vision_language_encoder is another part)",
        name=name,
    )


class GlmImageKeys(PlainKeys):
    """KeyMap of GLM-Image."""

    #: ComfyUI has no GLM-Image (Comfy-Org/ComfyUI issue 13161).
    in_comfyui = False


KEYS = GlmImageKeys(_LINEARS, _TENSORS, comfyui="diffusion_model.", foreign=_foreign)
