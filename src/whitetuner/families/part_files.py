"""VAEs, text encoders and image encoders as single files, told by their tensors: what each is, its config, its names.

As ComfyUI users have them (models/vae, text_encoders, clip_vision). Names inside are those of the first release or of
diffusers/transformers; file names mean nothing. Sizes come from the shapes; what shapes cannot tell is the release's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from whitetuner.families.umt5_files import is_umt5, umt5_config, umt5_converted
from whitetuner.families.wan_vaes import (
    is_wan_21,
    is_wan_22,
    wan_21_config,
    wan_21_converted,
    wan_22_config,
    wan_22_converted,
)

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class PartFile:
    """A kind of single file.

    part:      component of the diffusers layout that it is
    families:  registry names of those it belongs to
    known_by:  whether the tensors of these shapes are one
    config:    shapes -> config.json of the component
    convert:   (state, config.json) -> the names of the class that reads it
    unused:    regular expression of tensors that are left out
    flat:      regular expression of converted names that are 1x1 convolutions in the file and linear layers in the class
    pieces:    tensor that holds the tokenizer, as SentencePiece's file (whitetuner.families.sentence_pieces); "": none does
    """

    part: str
    title: str
    families: tuple[str, ...]
    known_by: Callable[[Shapes], bool]
    config: Callable[[Shapes], dict[str, Any]]
    convert: Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, Tensor]] = lambda state, config: (
        dict(state)
    )
    unused: str = r"$^"
    flat: str = r"$^"
    pieces: str = ""


def _count(shapes: Shapes, pattern: str) -> int:
    """Blocks by the number in their names: the first group of the pattern."""
    return 1 + max((int(found[1]) for name in shapes if (found := re.match(pattern, name))), default=-1)


#: Attention of image VAEs.
_FLAT = r".*\.attentions\.\d+\.to_.*weight"


# -- VAEs --------------------------------------------------------------------------------------------------------------


def _vae_names(shapes: Shapes) -> str:
    """ "original" or "diffusers", of an image VAE of Stable Diffusion's kind; "" for anything else."""
    if "encoder.down.0.block.0.conv1.weight" in shapes:
        return "original"
    return "diffusers" if "encoder.down_blocks.0.resnets.0.conv1.weight" in shapes else ""


def _picture_vae(class_name: str, latent: int, **fixed: Any) -> Callable[[Shapes], dict[str, Any]]:
    def config(shapes: Shapes) -> dict[str, Any]:
        more = dict(fixed)
        original = _vae_names(shapes) == "original"
        level = "encoder.down.{}.block.{}.conv2.weight" if original else ""
        level = level or "encoder.down_blocks.{}.resnets.{}.conv2.weight"
        widths: list[int] = []
        blocks = 0
        while level.format(len(widths), 0) in shapes:
            widths.append(int(shapes[level.format(len(widths), 0)][0]))
        while level.format(0, blocks) in shapes:
            blocks += 1
        upper = _decoder_widths(shapes, original, len(widths))
        if upper != widths:  # FLUX.2-small-decoder; only FLUX.2's class knows this
            more["decoder_block_out_channels"] = upper
        quantised = "quant_conv.weight" in shapes or "encoder.quant_conv.weight" in shapes
        return {
            "_class_name": class_name,
            "block_out_channels": widths,
            "down_block_types": ["DownEncoderBlock2D"] * len(widths),
            "up_block_types": ["UpDecoderBlock2D"] * len(widths),
            "layers_per_block": blocks,
            "latent_channels": latent,
            # of the releases; a model too narrow for them (a tiny one) has one group
            "norm_num_groups": 32 if all(width % 32 == 0 for width in widths) else 1,
            "sample_size": 1024,
            "use_quant_conv": quantised,
            "use_post_quant_conv": quantised,
            **more,
        }

    return config


def _decoder_widths(shapes: Shapes, original: bool, levels: int) -> list[int]:
    """From the narrowest on. diffusers counts the decoder's levels from the other end."""
    name = "decoder.up.{}.block.0.conv2.weight" if original else "decoder.up_blocks.{}.resnets.0.conv2.weight"
    found = [int(shapes[name.format(index)][0]) for index in range(levels) if name.format(index) in shapes]
    return found if original else found[::-1]


def _picture_vae_converted(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """By diffusers' own converter of such VAEs; what it does not know of (FLUX.2's batch norm) keeps its name."""
    if _vae_names(dict.fromkeys(state, ())) == "diffusers":
        return dict(state)
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    # FLUX.2's file keeps the two 1x1 convolutions inside encoder and decoder
    inside = {"encoder.quant_conv.": "quant_conv.", "decoder.post_quant_conv.": "post_quant_conv."}
    renamed = {}
    for name, tensor in state.items():
        lead = next((one for one in inside if name.startswith(one)), None)
        renamed[name if lead is None else inside[lead] + name.removeprefix(lead)] = tensor
    found = convert_ldm_vae_checkpoint(dict(renamed), dict(config))
    return {**found, **{name: tensor for name, tensor in renamed.items() if name.startswith("bn.")}}


def _latent_of(shapes: Shapes) -> int:
    """Channels of the latent, by what the decoder is given."""
    found = shapes.get("decoder.conv_in.weight", ())
    return int(found[1]) if len(found) == 4 else 0


# -- text and image encoders -------------------------------------------------------------------------------------------


def _qwen3_lead(shapes: Shapes) -> str | None:
    """What stands before the names: a whole model's, or nothing in the file of the model without its head."""
    for lead in ("model.", ""):
        if f"{lead}layers.0.self_attn.q_norm.weight" in shapes and f"{lead}embed_tokens.weight" in shapes:
            return lead
    return None


def _qwen3_config(shapes: Shapes) -> dict[str, Any]:
    lead = _qwen3_lead(shapes) or ""
    first = f"{lead}layers.0."
    head = int(shapes[f"{first}self_attn.q_norm.weight"][0])
    tokens, width = shapes[f"{lead}embed_tokens.weight"]
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": int(width),
        "intermediate_size": int(shapes[f"{first}mlp.gate_proj.weight"][0]),
        "num_hidden_layers": _count(shapes, rf"{re.escape(lead)}layers\.(\d+)\."),
        "num_attention_heads": int(shapes[f"{first}self_attn.q_proj.weight"][0]) // head,
        "num_key_value_heads": int(shapes[f"{first}self_attn.k_proj.weight"][0]) // head,
        "head_dim": head,
        "vocab_size": int(tokens),
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "tie_word_embeddings": "lm_head.weight" not in shapes,
    }


#: Width of Qwen2.5-VL's language model -> its heads, and those of keys and values (7B; shapes tell no width of a head).
_VL_HEADS = {3584: (28, 4)}


def _vl_config(shapes: Shapes) -> dict[str, Any]:
    """Of Qwen2.5-VL-7B-Instruct but for what the shapes tell (its config.json)."""
    tokens, width = shapes["model.embed_tokens.weight"]
    heads, pairs = _VL_HEADS[int(width)]
    text = {
        "hidden_size": int(width),
        "intermediate_size": int(shapes["model.layers.0.mlp.gate_proj.weight"][0]),
        "num_hidden_layers": _count(shapes, r"model\.layers\.(\d+)\."),
        "num_attention_heads": heads,
        "num_key_value_heads": pairs,
        "vocab_size": int(tokens),
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }
    looks = {
        "depth": _count(shapes, r"visual\.blocks\.(\d+)\."),
        "hidden_size": int(shapes["visual.blocks.0.norm1.weight"][0]),
        "intermediate_size": int(shapes["visual.blocks.0.mlp.gate_proj.weight"][0]),
        "num_heads": 16,
        "out_hidden_size": int(width),
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "in_chans": 3,
        "hidden_act": "silu",
    }
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **text,
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_config": {"model_type": "qwen2_5_vl", **looks},
    }


def _clip_config(shapes: Shapes) -> dict[str, Any]:
    """CLIP ViT-H/14 (laion), the only one that WAN reads."""
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": _count(shapes, r"vision_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "projection_dim": 1024,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    }


def _is_clip_h(shapes: Shapes) -> bool:
    return tuple(shapes.get("vision_model.embeddings.patch_embedding.weight", ())) == (1280, 3, 14, 14)


def _is_qwen3(shapes: Shapes) -> bool:
    return _qwen3_lead(shapes) is not None


def _is_vl(shapes: Shapes) -> bool:
    width = shapes.get("model.embed_tokens.weight", (0, 0))[1]
    return "visual.blocks.0.norm1.weight" in shapes and int(width) in _VL_HEADS


PART_FILES: tuple[PartFile, ...] = (
    PartFile(
        "vae",
        "the VAE of FLUX.2",
        ("flux2-klein",),
        lambda shapes: bool(_vae_names(shapes)) and "bn.running_mean" in shapes,
        lambda shapes: _picture_vae("AutoencoderKLFlux2", _latent_of(shapes))(shapes),
        _picture_vae_converted,
        flat=_FLAT,
    ),
    PartFile(
        "vae",
        "the VAE of FLUX.1 (ae.safetensors), which Z-Image uses",
        ("zimage", "zimage-v2"),
        lambda shapes: (
            bool(_vae_names(shapes)) and "bn.running_mean" not in shapes and _latent_of(shapes) == 16
        ),
        _picture_vae("AutoencoderKL", 16, scaling_factor=0.3611, shift_factor=0.1159, force_upcast=True),
        _picture_vae_converted,
        flat=_FLAT,
    ),
    *(
        PartFile(
            "vae",
            "the VAE of WAN 2.1 or of Qwen-Image (their tensors are alike)",
            (family,),
            is_wan_21,
            wan_21_config(class_name),
            wan_21_converted,
        )
        for family, class_name in (("wan", "AutoencoderKLWan"), ("qwen-image", "AutoencoderKLQwenImage"))
    ),
    PartFile(
        "vae",
        "the VAE of WAN 2.2 5B",
        ("wan",),
        is_wan_22,
        wan_22_config,
        wan_22_converted,
    ),
    PartFile(
        "text_encoder",
        "the text encoder Qwen3",
        ("flux2-klein", "zimage", "zimage-v2"),
        _is_qwen3,
        _qwen3_config,
    ),
    PartFile("text_encoder", "the text encoder Qwen2.5-VL", ("qwen-image",), _is_vl, _vl_config),
    PartFile(
        "text_encoder",
        "the text encoder UMT5",
        ("wan",),
        is_umt5,
        umt5_config,
        umt5_converted,
        unused=r"spiece_model$|decoder\.",
        pieces="spiece_model",
    ),
    PartFile(
        "image_encoder",
        "the picture encoder CLIP ViT-H",
        ("wan",),
        _is_clip_h,
        _clip_config,
        unused=r"visual_projection\.",
    ),
)
