"""A clip drawn by the diffusers pipeline around our denoisers: everything encoded before, nothing moved, decoded beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline
from PIL import Image
from torch import Tensor, nn

from whitetuner.errors import UserError
from whitetuner.families.drawing import AtHome, ending_when_told
from whitetuner.families.wan.encoders import moments_of
from whitetuner.families.wan.spec import BOUNDARIES
from whitetuner.records import Size

if TYPE_CHECKING:
    from whitetuner.families.wan.model import Model


def draw(
    model: Model,
    modules: Mapping[str, nn.Module],
    decoder: nn.Module,
    prompt: Mapping[str, Tensor],
    negative: Mapping[str, Tensor] | None,
    size: Size,
    steps: int,
    cfg: float,
    seed: int,
    on_step: Callable[[int], bool] | None,
) -> list[Image.Image]:
    """See Model.generate."""
    first = prompt.get("first_frame_latents")
    if first is None and model.options.variant.startswith("i2v"):
        raise UserError(
            "WAN I2V begins from a first frame, and none is given",
            where="--image",
            mend="add --image FILE (a picture, or a clip whose first frame is taken)",
        )
    pipe = pipeline(model, modules, decoder, prompt)
    compute = _anchor(next(iter(modules.values())))

    texts = {"": prompt} if negative is None or cfg <= 1 else {"": prompt, "negative_": negative}
    embeds = {
        f"{name}prompt_embeds": model.text([fields["prompt_embeds"]]).to(compute)
        for name, fields in texts.items()
    }
    more: dict[str, Any] = {}
    if first is not None:
        # The pipeline would encode a picture; its latents are in `prompt`, and `prepare_latents` below gives them.
        more["image"] = torch.zeros(1, 3, size.height, size.width)
        if "image_embeds" in prompt:
            more["image_embeds"] = prompt["image_embeds"][None].to(compute)
    latent = pipe(
        **embeds,
        **more,
        guidance_scale=cfg if len(texts) == 2 else 1.0,
        width=size.width,
        height=size.height,
        num_frames=size.frames,
        num_inference_steps=steps,
        generator=torch.Generator("cpu").manual_seed(seed),
        callback_on_step_end=ending_when_told(on_step),
        output_type="latent",
    ).frames
    return decoded(decoder, latent, pipe)


def decoded(decoder: Any, latent: Tensor, pipe: Any) -> list[Image.Image]:
    """Frames of a clip's latent (1, C, T, H, W). The decoder may be of another dtype, or on another device, than the denoiser."""
    assert isinstance(decoder, AutoencoderKLWan)
    latent = latent.to(decoder.device, decoder.dtype)
    mean, deviation = moments_of(decoder, latent)
    video = decoder.decode(latent * deviation + mean, return_dict=False)[0]
    frames: list[Image.Image] = pipe.video_processor.postprocess_video(video.float(), output_type="pil")[0]
    return frames


def pipeline(
    model: Model, modules: Mapping[str, nn.Module], decoder: nn.Module, prompt: Mapping[str, Tensor]
) -> Any:
    """The diffusers pipeline around our modules, without text encoder; nothing is moved.

    Raises UserError for an expert that is missing: half a model draws blur.
    """
    options = model.options
    missing = (
        {"transformer", "transformer_2"} - modules.keys() if options.variant in BOUNDARIES else frozenset()
    )
    if missing:
        raise UserError(
            "WAN 2.2 draws with both experts, and {part} is not loaded",
            where="model.options.expert",
            mend='set expert = "both", or do without previews while one expert learns (preview.every = 0)',
            part=", ".join(sorted(missing)),
        )
    parts = {
        "scheduler": _scheduler(model),
        "vae": decoder,
        "text_encoder": None,
        "tokenizer": None,
        "transformer": modules["transformer"],
        "transformer_2": modules.get("transformer_2"),
        "boundary_ratio": options.boundary,
    }
    first = prompt.get("first_frame_latents")
    if first is None:
        pipe: Any = _FromText(**parts)
    else:
        pipe = _FromPicture(
            **parts, image_encoder=None, image_processor=None, expand_timesteps=options.variant == "ti2v-5b"
        )
        pipe.first = first[None]
        pipe.mask = None if options.variant == "ti2v-5b" else model.mask(pipe.first)
    pipe.home = _anchor(modules["transformer"]).device
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _scheduler(model: Model) -> Any:
    """The model folder's own, of the class that it names (UniPC in the released ones)."""
    import diffusers

    folder = model.paths.component("scheduler")
    name = UniPCMultistepScheduler.load_config(folder, local_files_only=True)["_class_name"]
    return getattr(diffusers, name).from_pretrained(folder, local_files_only=True)


class _Encoded(AtHome):
    def encode_prompt(
        self, *args: Any, prompt_embeds: Tensor, negative_prompt_embeds: Tensor | None, **given: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Encoded already."""
        return prompt_embeds, negative_prompt_embeds


class _FromText(_Encoded, WanPipeline):
    pass


class _FromPicture(_Encoded, WanImageToVideoPipeline):
    """first: (1, C, T or 1, H, W) latents of the first frame;  mask: (1, 4, T, H, W), None for the 5B."""

    first: Tensor
    mask: Tensor | None

    def check_inputs(self, *args: Any, **given: Any) -> None:
        """Sizes are checked before; the pipeline would refuse a picture beside its CLIP features."""

    def prepare_latents(
        self,
        image: Tensor,
        batch_size: int,
        channels: int,
        height: int,
        width: int,
        frames: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator,
        *rest: Any,
    ) -> tuple[Tensor, ...]:
        """Noise of the seed, and the condition as it was encoded."""
        rows, columns = self.first.shape[-2:]
        count = (frames - 1) // self.vae_scale_factor_temporal + 1
        noise = torch.randn((1, channels, count, rows, columns), generator=generator).to(device)
        first = self.first.to(device, torch.float32)
        if self.mask is not None:
            return noise, torch.cat([self.mask.to(first), first], dim=1)
        unknown = torch.ones(1, 1, count, rows, columns, device=device)
        unknown[:, :, 0] = 0
        return noise, first, unknown


def _anchor(denoiser: Any) -> Tensor:
    return denoiser.blocks[0].attn1.norm_q.weight
