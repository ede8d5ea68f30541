"""WAN's two video VAEs as single files (wan_2.1_vae, which Qwen-Image's is alike to, and wan2.2_vae of the 5B): told and renamed.

Of 2.2 the shapes tell everything but what its latents' channels are normalised by. Names in the file: github.com/Wan-Video
wan/modules/vae2_1.py, vae2_2.py; names in the class: diffusers models/autoencoders/autoencoder_kl_wan.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from whitetuner.families.files import renamed

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, Sequence[int]]

#: Of WAN 2.2's latents, a channel each (github.com/Wan-Video/Wan2.2 wan/modules/vae2_2.py, Wan2_2_VAE).
_MEAN_22 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
_DEVIATION_22 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip

#: Inside a residual block, whose layers the first release counts.
_LAYERS = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
#: First names -> the class's, of the 2.2: what is the same for encoder and decoder, and the two convolutions between them.
_RENAMED = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(\w+)\.conv1\.", r"\1.conv_in."),
    (r"^(\w+)\.head\.0\.", r"\1.norm_out."),
    (r"^(\w+)\.head\.2\.", r"\1.conv_out."),
    (r"^(\w+)\.middle\.0\.", r"\1.mid_block.resnets.0."),
    (r"^(\w+)\.middle\.1\.", r"\1.mid_block.attentions.0."),
    (r"^(\w+)\.middle\.2\.", r"\1.mid_block.resnets.1."),
    (r"^encoder\.downsamples\.(\d+)\.downsamples\.\d+\.(resample|time_conv)", r"encoder.down_blocks.\1.downsampler.\2"),
    (r"^decoder\.upsamples\.(\d+)\.upsamples\.\d+\.(resample|time_conv)", r"decoder.up_blocks.\1.upsampler.\2"),
    (r"^encoder\.downsamples\.(\d+)\.downsamples\.", r"encoder.down_blocks.\1.resnets."),
    (r"^decoder\.upsamples\.(\d+)\.upsamples\.", r"decoder.up_blocks.\1.resnets."),
)  # fmt: skip


def is_wan_21(shapes: Shapes) -> bool:
    """The VAE of WAN 2.1 (and 2.2 A14B) or of Qwen-Image: 16 channels."""
    return bool(_names(shapes)) and _latent(shapes) == 16


def is_wan_22(shapes: Shapes) -> bool:
    """The VAE of WAN 2.2's 5B: 48 channels, blocks within blocks, and three frames a kernel (a newer picture VAE has one)."""
    nested = "decoder.upsamples.0.upsamples.0.residual.2.weight" in shapes
    nested = nested or "encoder.down_blocks.0.resnets.0.norm1.gamma" in shapes
    head = shapes.get("decoder.head.2.weight", shapes.get("decoder.conv_out.weight", ()))
    return nested and bool(_names(shapes)) and _latent(shapes) == 48 and tuple(head[2:]) == (3, 3, 3)


def wan_21_config(class_name: str) -> Callable[[Shapes], dict[str, Any]]:
    """Means and deviations of the latents are the class's defaults, which are the release's."""

    def config(shapes: Shapes) -> dict[str, Any]:
        original = _names(shapes) == "original"
        first = shapes["encoder.conv1.weight" if original else "encoder.conv_in.weight"]
        return {"_class_name": class_name, "base_dim": int(first[0]), "z_dim": _latent(shapes)}

    return config


def wan_22_config(shapes: Shapes) -> dict[str, Any]:
    """From the shapes; means and deviations of the latents are the release's."""
    named = {_renamed(name): shape for name, shape in shapes.items()}
    first = named["encoder.conv_in.weight"]
    widths: list[int] = []
    times: list[bool] = []
    while f"encoder.down_blocks.{len(widths)}.resnets.0.conv1.weight" in named:
        block = f"encoder.down_blocks.{len(widths)}"
        widths.append(int(named[f"{block}.resnets.0.conv1.weight"][0]))
        times.append(f"{block}.downsampler.time_conv.weight" in named)
    depth = 0
    while f"encoder.down_blocks.0.resnets.{depth}.conv1.weight" in named:
        depth += 1
    patch = math.isqrt(int(first[1]) // 3)
    last = int(named[f"decoder.up_blocks.{len(widths) - 1}.resnets.0.conv1.weight"][0])
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": int(first[0]),
        "decoder_base_dim": last * int(first[0]) // widths[0],
        "z_dim": _latent(shapes),
        "dim_mult": [width // int(first[0]) for width in widths],
        "num_res_blocks": depth,
        "temperal_downsample": times[:-1],  # the class's spelling
        "is_residual": True,
        "in_channels": int(first[1]),
        "out_channels": int(named["decoder.conv_out.weight"][0]),
        "patch_size": patch,
        "scale_factor_temporal": 2 ** sum(times),
        "scale_factor_spatial": patch * 2 ** (len(widths) - 1),
        "latents_mean": list(_MEAN_22),
        "latents_std": list(_DEVIATION_22),
    }


def wan_21_converted(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """By diffusers' own converter, which knows the 2.1 only."""
    if _names(dict.fromkeys(state, ())) == "diffusers":
        return dict(state)
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    return dict(convert_wan_vae_to_diffusers(dict(state)))


def wan_22_converted(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names only: no tensor is taken apart."""
    return {_renamed(name): tensor for name, tensor in state.items()}


def _renamed(name: str) -> str:
    """The class's name of a tensor of the 2.2; a name of the class stays."""
    lead, _, rest = renamed(name, _RENAMED).partition(".resnets.")
    for first, ours in _LAYERS.items():
        rest = re.sub(rf"^(\d+)\.{re.escape(first)}\.", rf"\1.{ours}.", rest)
    return f"{lead}.resnets.{rest}" if rest else lead


def _names(shapes: Shapes) -> str:
    """ "original" or "diffusers", of either; "" for anything else."""
    if "decoder.middle.0.residual.0.gamma" in shapes:
        return "original"
    return "diffusers" if "decoder.mid_block.resnets.0.norm1.gamma" in shapes else ""


def _latent(shapes: Shapes) -> int:
    found = shapes.get("conv2.weight", shapes.get("post_quant_conv.weight", ()))
    return int(found[0]) if len(found) == 5 else 0
