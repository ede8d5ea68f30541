"""Z-Image V2: Z-Image whose first layers are dual-stream, with norms, feed-forward and modulation for picture and text apart.

Attention stays shared: one set of projections over picture and text together, unlike FLUX's double blocks. After the
dual-stream layers the tokens are joined and the remaining layers are Z-Image's own. Text now has parameters of its own, and
its tokens evolve beside the picture's through all layers, as in V1.

Made from a V1 model by copying (`v2_names`), V2 computes what V1 computes: refiners, pad tokens, positions and padding are
V1's, and the text's copies begin equal to the picture's. Idea and name: whitetuner's original V2 trainer, whose conversion
lost the refiners' modulation and the pad tokens, so that its starting point was far from V1.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_z_image import (
    FeedForward,
    ZImageTransformerBlock,
)
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

#: diffusers loads a pipeline's part from a module that is not its own only if it finds the part's base class there too.
__all__ = ["DualStreamBlock", "ModelMixin", "ZImageV2Transformer2DModel", "v2_names"]

#: Modules of a V1 layer of which a dual-stream layer has two; the text's are called X_context.
TWICE = ("feed_forward", "adaLN_modulation", "attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
_LAYER = re.compile(r"layers\.(\d+)\.([^.]+)(\..+)")


def v2_names(name: str, double_layers: int) -> tuple[str, ...]:
    """Names in V2 that a tensor of V1 goes to: one, or two where picture and text begin with the same numbers."""
    found = _LAYER.fullmatch(name)
    if found is None:
        return (name,)
    layer, module, rest = int(found[1]), found[2], found[3]
    if layer >= double_layers:
        return (f"layers.{layer - double_layers}.{module}{rest}",)
    lead = f"double_stream_layers.{layer}.{module}"
    return (f"{lead}{rest}", f"{lead}_context{rest}") if module in TWICE else (f"{lead}{rest}",)


class DualStreamBlock(ZImageTransformerBlock):
    """A layer of V1 for the picture, with a second set of everything but attention for the text."""

    def __init__(
        self, layer_id: int, dim: int, n_heads: int, n_kv_heads: int, norm_eps: float, qk_norm: bool
    ) -> None:
        super().__init__(layer_id, dim, n_heads, n_kv_heads, norm_eps, qk_norm)
        modulation, hidden = self.adaLN_modulation[0], self.feed_forward.w1.out_features
        self.adaLN_modulation_context = nn.Sequential(
            nn.Linear(modulation.in_features, modulation.out_features)
        )
        self.feed_forward_context = FeedForward(dim=dim, hidden_dim=hidden)
        self.attention_norm1_context = RMSNorm(dim, eps=norm_eps)
        self.attention_norm2_context = RMSNorm(dim, eps=norm_eps)
        self.ffn_norm1_context = RMSNorm(dim, eps=norm_eps)
        self.ffn_norm2_context = RMSNorm(dim, eps=norm_eps)

    def forward(
        self, image: Tensor, text: Tensor, attn_mask: Tensor | None, freqs_cis: Tensor, adaln_input: Tensor
    ) -> tuple[Tensor, Tensor]:
        """image (B, I, dim), text (B, T, dim); attn_mask (B, I + T) bool, False for padding, or None; freqs_cis of both,
        one after the other; adaln_input (B, time width). Returns both streams."""
        scale, gate, scale_mlp, gate_mlp = _modulation(self.adaLN_modulation, adaln_input)
        scale_t, gate_t, scale_mlp_t, gate_mlp_t = _modulation(self.adaLN_modulation_context, adaln_input)
        joint = torch.cat(
            [self.attention_norm1(image) * scale, self.attention_norm1_context(text) * scale_t], dim=1
        )
        said = self.attention(joint, attention_mask=attn_mask, freqs_cis=freqs_cis)
        image_said, text_said = said.split([image.shape[1], text.shape[1]], dim=1)
        image = image + gate * self.attention_norm2(image_said)
        text = text + gate_t * self.attention_norm2_context(text_said)
        image = image + gate_mlp * self.ffn_norm2(self.feed_forward(self.ffn_norm1(image) * scale_mlp))
        text_said = self.feed_forward_context(self.ffn_norm1_context(text) * scale_mlp_t)
        return image, text + gate_mlp_t * self.ffn_norm2_context(text_said)


class ZImageV2Transformer2DModel(ZImageTransformer2DModel):
    """Takes and gives what ZImageTransformer2DModel does, so that ZImagePipeline runs it; from_pretrained, save_pretrained.

    n_layers:        all layers, dual-stream and single-stream
    n_double_layers: of them, how many are dual-stream; they come first, `layers` holds the others
    The arguments for several pictures and for SigLIP (Z-Image-Omni) are not there.
    """

    layers: nn.ModuleList
    _no_split_modules = ("ZImageTransformerBlock", "DualStreamBlock")
    _repeated_blocks = ("ZImageTransformerBlock", "DualStreamBlock")

    @register_to_config
    def __init__(
        self,
        all_patch_size: tuple[int, ...] = (2,),
        all_f_patch_size: tuple[int, ...] = (1,),
        in_channels: int = 16,
        dim: int = 3840,
        n_layers: int = 30,
        n_refiner_layers: int = 2,
        n_heads: int = 30,
        n_kv_heads: int = 30,
        norm_eps: float = 1e-5,
        qk_norm: bool = True,
        cap_feat_dim: int = 2560,
        siglip_feat_dim: None = None,
        rope_theta: float = 256.0,
        t_scale: float = 1000.0,
        axes_dims: tuple[int, ...] = (32, 48, 48),
        axes_lens: tuple[int, ...] = (1024, 512, 512),
        n_double_layers: int = 15,
    ) -> None:
        if not 1 <= n_double_layers < n_layers or siglip_feat_dim is not None:
            raise ValueError(
                f"{n_double_layers} of {n_layers} layers cannot be dual-stream: 1 to {n_layers - 1} can"
                if siglip_feat_dim is None
                else "Z-Image-Omni (siglip_feat_dim) has no V2"
            )
        super().__init__(
            all_patch_size=all_patch_size,
            all_f_patch_size=all_f_patch_size,
            in_channels=in_channels,
            dim=dim,
            n_layers=n_layers,
            n_refiner_layers=n_refiner_layers,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            norm_eps=norm_eps,
            qk_norm=qk_norm,
            cap_feat_dim=cap_feat_dim,
            rope_theta=rope_theta,
            t_scale=t_scale,
            axes_dims=axes_dims,
            axes_lens=axes_lens,
        )
        self.layers = self.layers[n_double_layers:]
        self.double_stream_layers = nn.ModuleList(
            DualStreamBlock(index, dim, n_heads, n_kv_heads, norm_eps, qk_norm)
            for index in range(n_double_layers)
        )

    @apply_lora_scale("joint_attention_kwargs")
    def forward(
        self,
        x: list[Tensor],
        t: Tensor,
        cap_feats: list[Tensor],
        return_dict: bool = True,
        patch_size: int = 2,
        f_patch_size: int = 1,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Transformer2DModelOutput | tuple[list[Tensor]]:
        """x: latents (C, 1, H, W); t: (B,) in [0, 1], 1 = clean; cap_feats: captions (L, width). Returns a list like x."""
        device, key = x[0].device, f"{patch_size}-{f_patch_size}"
        time = self.t_embedder(t * self.t_scale).type_as(x[0])
        images, texts, sizes, image_ids, text_ids, image_pad, text_pad = self.patchify_and_embed(
            x, cap_feats, patch_size, f_patch_size
        )
        embed = self.all_x_embedder[key]
        image, image_rope, image_mask, image_lengths = self._stream(
            embed, images, image_ids, image_pad, self.x_pad_token, device
        )
        for layer in self.noise_refiner:
            image = self._through(layer, image, image_mask, image_rope, time)
        text, text_rope, text_mask, text_lengths = self._stream(
            self.cap_embedder, texts, text_ids, text_pad, self.cap_pad_token, device
        )
        for layer in self.context_refiner:
            text = self._through(layer, text, text_mask, text_rope)
        mask = _joined(image, image_mask, text, text_mask)
        rope = torch.cat([image_rope, text_rope], dim=1)
        for layer in self.double_stream_layers:
            image, text = self._through(layer, image, text, mask, rope, time)
        alone: tuple[None, ...] = (None,) * 4  # what only several pictures have
        joint, rope, mask, _ = self._build_unified_sequence(
            image, image_rope, image_lengths, None, text, text_rope, text_lengths, None, *alone, False, device
        )
        for layer in self.layers:
            joint = self._through(layer, joint, mask, rope, time)
        joint = self.all_final_layer[key](joint, c=time)
        said = self.unpatchify(list(joint.unbind(dim=0)), sizes, patch_size, f_patch_size)
        return Transformer2DModelOutput(sample=said) if return_dict else (said,)

    def _stream(
        self,
        embed: nn.Module,
        pieces: list[Tensor],
        ids: list[Tensor],
        padding: list[Tensor],
        pad_token: Tensor,
        device: torch.device,
    ) -> tuple[Tensor, Tensor, Tensor | None, list[int]]:
        """Tokens (B, longest, dim), their rotations, which of them are there (None: all), and their numbers."""
        lengths = [len(one) for one in pieces]
        embedded = embed(torch.cat(pieces)).split(lengths)
        tokens, rope, mask, lengths, _ = self._prepare_sequence(
            list(embedded), ids, padding, pad_token, None, device
        )
        return tokens, rope, mask, lengths

    def _through(self, layer: nn.Module, *given: Any) -> Any:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(layer, *given)
        return layer(*given)


def _modulation(layers: nn.Module, time: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(scale, gate) of attention and (scale, gate) of the feed-forward, each (B, 1, dim)."""
    scale, gate, scale_mlp, gate_mlp = layers(time).unsqueeze(1).chunk(4, dim=2)
    return 1.0 + scale, gate.tanh(), 1.0 + scale_mlp, gate_mlp.tanh()


def _joined(
    image: Tensor, image_mask: Tensor | None, text: Tensor, text_mask: Tensor | None
) -> Tensor | None:
    """Mask of both streams, one after the other; None when there is no padding in either."""
    if image_mask is None and text_mask is None:
        return None
    masks = [
        torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask
        for tokens, mask in ((image, image_mask), (text, text_mask))
    ]
    return torch.cat(masks, dim=1)
