"""Qwen-Image: the last hidden states of Qwen2.5-VL as text, 2x2 patches of a video VAE's latent, sigma itself as the clock.

Conventions from diffusers pipelines/qwenimage/ (pipeline_qwenimage.py, _edit.py, _edit_plus.py), told again here in a few
lines each, because training needs them apart from sampling; families/contract.py holds every one of them against those
pipelines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from PIL import Image
from torch import Tensor, nn

from whitetuner.errors import UserError
from whitetuner.families.drawing import AtHome, ending_when_told
from whitetuner.families.qwen_image.encoders import (
    EditTextEncoder,
    LatentEncoder,
    ReferenceEncoder,
    TextEncoder,
    moments_of,
)
from whitetuner.families.qwen_image.keys import KEYS
from whitetuner.families.qwen_image.spec import SPEC, QwenImageOptions, variant_for
from whitetuner.family import BuildFn, Encoder, ModelPaths
from whitetuner.records import Batch, Size

#: Attention kernels without masks, by diffusers models/attention_dispatch.py.
_MASKLESS = ("flash", "_flash_3", "_native_flash")
#: (frames, rows, columns) of each picture in tokens: the target, then the references.
Shapes = list[tuple[int, int, int]]


class Model:
    """The Family of Qwen-Image. What a mutant may get wrong is a method of its own."""

    spec = SPEC
    keys = KEYS

    def __init__(self, options: QwenImageOptions, paths: ModelPaths) -> None:
        self.options, self.paths = options, paths

    def stride(self) -> int:
        return SPEC.stride(self.paths)

    def encoders(self, task: str) -> list[Encoder]:
        """Raises UserError when the model is one for another task."""
        variant = variant_for(task, self.options, self.paths)
        if variant == "t2i":
            return [TextEncoder(self.paths, self.options), LatentEncoder(self.paths)]
        return [
            EditTextEncoder(self.paths, self.options, variant),
            ReferenceEncoder(self.paths),
            LatentEncoder(self.paths),
        ]

    def load(self, build: BuildFn) -> dict[str, nn.Module]:
        folder = self.paths.component("transformer")
        return {"transformer": build(QwenImageTransformer2DModel, folder, keep_precise=SPEC.keep_precise)}

    def load_decoder(self, build: BuildFn) -> nn.Module:
        return build(AutoencoderKLQwenImage, self.paths.component("vae"), keep_precise=("*",))

    # -- one prediction -------------------------------------------------------------------------------------

    def predict(
        self, modules: Mapping[str, nn.Module], part: str, batch: Batch, x_t: Tensor, sigma: Tensor
    ) -> Tensor:
        """As in the contract. Needs the field `prompt_embeds`; takes references along where the batch has
        `reference_latents` and `reference_sizes` (see encoders.ReferenceEncoder), sizes equal within the batch.
        """
        compute = _anchor(modules[part])
        texts = batch["prompt_embeds"]
        assert isinstance(texts, list)
        embeds, mask = self.text(texts)
        if mask is not None:
            _refuse_maskless(modules[part])
        references, sizes = batch.fields.get("reference_latents"), batch.fields.get("reference_sizes")
        assert not isinstance(references, list) and not isinstance(sizes, list)
        rows, columns = x_t.shape[-2] // 2, x_t.shape[-1] // 2
        said = self.denoise(
            modules[part],
            self.pack(x_t).to(compute.dtype),
            references,
            self.shapes(rows, columns, [] if sizes is None else sizes[0].tolist()),
            timestep=self.clock(sigma).to(compute.dtype),
            encoder_hidden_states=embeds.to(compute),
            encoder_hidden_states_mask=None if mask is None else mask.to(compute.device),
        )
        return self.unpack(said.float(), rows, columns)

    def denoise(
        self, transformer: Any, tokens: Tensor, references: Tensor | None, shapes: Shapes, **given: Any
    ) -> Tensor:
        """What the denoiser says of the target's tokens, (B, n, 4 C) both; the references' stand after them, as they are."""
        beside = tokens if references is None else torch.cat([tokens, references.to(tokens)], dim=1)
        said = transformer(
            hidden_states=beside,
            img_shapes=[shapes] * len(tokens),
            guidance=None,  # no released Qwen-Image has a guidance embedding
            return_dict=False,
            **given,
        )[0]
        return said[:, : tokens.shape[1]]

    def clock(self, sigma: Tensor) -> Tensor:
        """The model is told sigma and multiplies by 1000 itself."""
        return sigma

    def pack(self, latent: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H W / 4, 4 C): 2x2 patches row by row, their channels ordered (channel, row, column)."""
        return nn.functional.pixel_unshuffle(latent, 2).flatten(2).transpose(1, 2)

    def unpack(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """Inverse of `pack`."""
        return nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (rows, columns)), 2)

    def shapes(self, rows: int, columns: int, references: Sequence[Sequence[int]]) -> Shapes:
        """The place in this list is a picture's position on the time axis: the target 0, references 1, 2, .."""
        return [(1, rows, columns), *((1, int(one[0]), int(one[1])) for one in references)]

    def text(self, texts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """((B, L, D) filled up with zeros on the right, (B, L) bool mask of the real tokens; None where all are)."""
        embeds = nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
        lengths = torch.tensor([len(one) for one in texts])
        mask = torch.arange(embeds.shape[1]) < lengths[:, None]
        return embeds, None if bool(mask.all()) else mask

    # -- whole pictures -------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        modules: Mapping[str, nn.Module],
        decoder: nn.Module,
        prompt: Mapping[str, Tensor],
        negative: Mapping[str, Tensor] | None,
        *,
        size: Size,
        steps: int,
        cfg: float,
        seed: int,
        on_step: Callable[[int], bool] | None = None,
    ) -> list[Image.Image]:
        """As in the contract; guided as the pipeline guides, at the length of the guided token (true CFG).

        The Edits' pipelines are this pipeline with reference tokens beside the target's; here `denoise` brings them, at
        the size they were given in, where those pipelines would bring every reference to 1024 x 1024 pixels' area first.
        Raises UserError for one step: the model's schedule ends at sigma 0.02, and one step has no end apart from its start.
        """
        pipe = self.pipeline(modules, decoder, prompt)
        if steps < 2 and pipe.scheduler.config.shift_terminal:
            raise UserError(
                "Qwen-Image's schedule cannot be walked in one step",
                where="steps",
                mend="draw in 2 steps or more (50 is the model's own number)",
            )

        compute = _anchor(modules["transformer"])
        texts = {"": prompt} if negative is None or cfg <= 1 else {"": prompt, "negative_": negative}
        embeds = {
            f"{which}prompt_embeds": fields["prompt_embeds"][None].to(compute)
            for which, fields in texts.items()
        }
        masks = {
            f"{name}_mask": torch.ones(one.shape[:2]) for name, one in embeds.items()
        }  # nothing is padding
        tokens = pipe(
            **embeds,
            **masks,
            true_cfg_scale=cfg if len(texts) == 2 else 1.0,
            width=size.width,
            height=size.height,
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(seed),
            callback_on_step_end=ending_when_told(on_step),
            output_type="latent",
        ).images
        # Decoded here: the decoder may be of another dtype, or wait on another device, than the denoiser.
        assert isinstance(decoder, AutoencoderKLQwenImage)
        stride = self.stride()
        latent = self.unpack(tokens, size.height // stride, size.width // stride).unsqueeze(2)
        latent = latent.to(decoder.device, decoder.dtype)
        mean, deviation = moments_of(decoder, latent)
        pixels = decoder.decode(latent * deviation + mean, return_dict=False)[0][:, :, 0]
        return pipe.image_processor.postprocess(pixels, output_type="pil")

    def pipeline(
        self, modules: Mapping[str, nn.Module], decoder: nn.Module, prompt: Mapping[str, Tensor]
    ) -> QwenImagePipeline:
        """The diffusers pipeline around our modules, without text encoder; nothing is moved."""
        folder = self.paths.component("scheduler")
        transformer = modules["transformer"]
        pipe = _Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder, local_files_only=True),
            vae=decoder,
            text_encoder=None,
            tokenizer=None,
            transformer=transformer,
        )
        pipe.home = _anchor(transformer).device
        if "reference_latents" in prompt:
            pipe.transformer = _BesideReferences(self, transformer, prompt, pipe.home)
        pipe.set_progress_bar_config(disable=True)
        return pipe


class _BesideReferences:
    """The denoiser as the text-to-image pipeline knows one, with the references' tokens beside those it is given."""

    def __init__(
        self, model: Model, transformer: Any, prompt: Mapping[str, Tensor], home: torch.device
    ) -> None:
        self.model, self.transformer = model, transformer
        self.config, self.cache_context = transformer.config, transformer.cache_context
        self.references = prompt["reference_latents"][None].to(home)
        self.sizes = prompt["reference_sizes"].tolist()

    def __call__(self, hidden_states: Tensor, img_shapes: list[Shapes], **given: Any) -> tuple[Tensor]:
        (_, rows, columns) = img_shapes[0][0]
        given = {name: value for name, value in given.items() if name not in ("guidance", "return_dict")}
        shapes = self.model.shapes(rows, columns, self.sizes)
        return (self.model.denoise(self.transformer, hidden_states, self.references, shapes, **given),)


class _Pipeline(AtHome, QwenImagePipeline):
    def encode_prompt(self, *args: Any, prompt_embeds: Tensor, **given: Any) -> tuple[Tensor, None]:
        """Encoded already, and whole: an edit's text holds its pictures and may be longer than the 1024 tokens of text."""
        return prompt_embeds, None


def _refuse_maskless(transformer: Any) -> None:
    """Raises UserError for an attention kernel that takes no mask, which texts of different lengths need."""
    chosen = transformer.transformer_blocks[0].attn.processor._attention_backend
    if chosen is not None and chosen.value in _MASKLESS:
        raise UserError(
            "captions of different lengths in one batch need a mask, and '{name}' attention takes none",
            where="memory.attention",
            mend='use "auto", "efficient" or "flash_varlen", or data.batch_size = 1',
            name=chosen.value,
        )


def _anchor(transformer: Any) -> Tensor:
    """A weight whose dtype and device are those the model computes in.

    A norm inside a block: never quantised, swapped out or given an adapter, as other layers may be.
    """
    return transformer.transformer_blocks[0].attn.norm_q.weight
