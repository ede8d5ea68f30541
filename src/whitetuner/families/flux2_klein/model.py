"""FLUX.2 Klein: Qwen3 hidden states as text, batch-normalised 2x2 patches as latents, sigma itself as the clock.

Conventions from diffusers pipelines/flux2/pipeline_flux2_klein.py; held by families/contract.py against that pipeline.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor
from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM

from whitetuner.errors import UserError
from whitetuner.families.flux2_klein.keys import KEYS
from whitetuner.families.flux2_klein.spec import SPEC, KleinOptions
from whitetuner.family import BuildFn, Encoder, Layout, ModelPaths, Reads, fingerprint_files
from whitetuner.records import Batch, EncodeInput, Size

pack = Flux2KleinPipeline._pack_latents


def patch_ids(height: int, width: int, t: int = 0) -> Tensor:
    """(height width, 4) positions (t, h, w, 0) of the patches of one picture."""
    return torch.cartesian_prod(torch.tensor([t]), torch.arange(height), torch.arange(width), torch.arange(1))


def text_ids(length: int) -> Tensor:
    """(length, 4) positions (0, 0, 0, l) of the text tokens."""
    zero = torch.arange(1)
    return torch.cartesian_prod(zero, zero, zero, torch.arange(length))


class TextEncoder:
    """Caption -> `prompt_embeds` (L, taps * hidden): hidden states of three layers side by side, padding included."""

    name = "text"
    fields: Mapping[str, Layout] = {"prompt_embeds": "stack"}
    reads: frozenset[Reads] = frozenset({"caption"})

    def __init__(self, paths: ModelPaths, options: KleinOptions) -> None:
        self.paths, self.options = paths, options
        self.model: Qwen3ForCausalLM | None = None

    def fingerprint(self) -> str:
        folders = self.paths.component("text_encoder"), self.paths.component("tokenizer")
        files = [path for folder in folders for path in folder.iterdir() if path.is_file()]
        extra = f"klein-text-1|{self.options.max_sequence_length}|{self.options.text_encoder_out_layers}"
        return fingerprint_files(files, extra=extra)

    def load(self, build: BuildFn) -> None:
        self.tokenizer = Qwen2TokenizerFast.from_pretrained(self.paths.component("tokenizer"), local_files_only=True)
        self.model = build(Qwen3ForCausalLM, self.paths.component("text_encoder"))

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        assert self.model is not None, "encode before load"
        found = Flux2KleinPipeline._get_qwen3_prompt_embeds(
            self.model,
            self.tokenizer,
            given.caption,
            max_sequence_length=self.options.max_sequence_length,
            hidden_states_layers=list(self.options.text_encoder_out_layers),
        )
        return {"prompt_embeds": found[0].cpu()}

    def count_tokens(self, caption: str) -> int:
        """Tokens of a caption in its template, to tell captions that will be cut. Needs `load`ed tokenizer only."""
        return len(self.tokenizer(_template(self.tokenizer, caption))["input_ids"])

    def free(self) -> None:
        self.model = None


def _template(tokenizer: Qwen2TokenizerFast, caption: str) -> str:
    messages = [{"role": "user", "content": caption}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)


class LatentEncoder:
    """Target picture -> `latent` (C, H, W): mode of the VAE, 2x2 patches as channels, normalised by its batch-norm buffers."""

    name = "vae"
    fields: Mapping[str, Layout] = {"latent": "stack"}
    reads: frozenset[Reads] = frozenset({"target"})

    def __init__(self, paths: ModelPaths) -> None:
        self.paths = paths
        self.vae: AutoencoderKLFlux2 | None = None
        # Its factor only matters for resizing, and pictures come cut to size: [0, 255] -> [-1, 1] is all that is used.
        self.processor = VaeImageProcessor(do_resize=False)

    def fingerprint(self) -> str:
        folder = self.paths.component("vae")
        return fingerprint_files([path for path in folder.iterdir() if path.is_file()], extra="klein-vae-1")

    def load(self, build: BuildFn) -> None:
        self.vae = build(AutoencoderKLFlux2, self.paths.component("vae"), keep_precise=("bn.*",))

    @torch.no_grad()
    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        assert self.vae is not None, "encode before load"
        return {"latent": encode_picture(self.vae, given.target[0], self.processor).cpu()}

    def free(self) -> None:
        self.vae = None


def encode_picture(vae: AutoencoderKLFlux2, picture: Image.Image, processor: VaeImageProcessor) -> Tensor:
    """(C, H, W) normalised latent of one RGB picture whose sides are multiples of the stride."""
    pixels = processor.preprocess(picture).to(vae.device, vae.dtype)
    latent = Flux2KleinPipeline._patchify_latents(vae.encode(pixels).latent_dist.mode())
    mean = vae.bn.running_mean.view(1, -1, 1, 1).to(latent)
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).to(latent)
    return ((latent - mean) / std)[0]


class Model:
    """The Family of FLUX.2 Klein."""

    spec = SPEC
    keys = KEYS

    def __init__(self, options: KleinOptions, paths: ModelPaths) -> None:
        self.options, self.paths = options, paths

    def stride(self) -> int:
        file = self.paths.component("vae") / "config.json"
        try:
            levels = len(json.loads(file.read_text(encoding="utf-8"))["block_out_channels"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                "the VAE's config.json cannot be read ({reason})",
                where=str(file),
                mend="download the vae folder again",
                reason=error,
            ) from error
        return 2**levels  # 2^(levels - 1) in the VAE, times 2 for the patches

    def encoders(self, task: str) -> list[Encoder]:
        return [TextEncoder(self.paths, self.options), LatentEncoder(self.paths)]

    def load(self, build: BuildFn) -> dict[str, torch.nn.Module]:
        folder = self.paths.component("transformer")
        return {"transformer": build(Flux2Transformer2DModel, folder, keep_precise=SPEC.keep_precise)}

    def load_decoder(self, build: BuildFn) -> torch.nn.Module:
        return build(AutoencoderKLFlux2, self.paths.component("vae"), keep_precise=("bn.*",))

    def predict(
        self, modules: Mapping[str, torch.nn.Module], part: str, batch: Batch, x_t: Tensor, sigma: Tensor
    ) -> Tensor:
        transformer = modules[part]
        text = batch["prompt_embeds"]
        assert isinstance(text, Tensor)
        dtype = transformer.dtype
        height, width = x_t.shape[-2:]
        said = transformer(
            hidden_states=pack(x_t).to(dtype),
            timestep=sigma.to(dtype),
            guidance=None,
            encoder_hidden_states=text.to(dtype),
            txt_ids=text_ids(text.shape[1]).to(x_t.device),
            img_ids=patch_ids(height, width).to(x_t.device),
            return_dict=False,
        )[0]
        return said.float().transpose(1, 2).reshape(x_t.shape)

    def pipeline(self, modules: Mapping[str, torch.nn.Module], decoder: torch.nn.Module) -> Flux2KleinPipeline:
        """The diffusers pipeline around our modules, without text encoder."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(self.paths.component("scheduler"), local_files_only=True)
        pipe = Flux2KleinPipeline(
            scheduler=scheduler,
            vae=decoder,
            text_encoder=None,
            tokenizer=None,
            transformer=modules["transformer"],
            is_distilled=self.options.variant == "distilled",
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def generate(
        self,
        modules: Mapping[str, torch.nn.Module],
        decoder: torch.nn.Module,
        prompt: Mapping[str, Tensor],
        negative: Mapping[str, Tensor] | None,
        *,
        size: Size,
        steps: int,
        cfg: float,
        seed: int,
        on_step: Callable[[int], bool] | None = None,
    ) -> list[Image.Image]:
        pipe = self.pipeline(modules, decoder)
        transformer = modules["transformer"]

        def told(pipe: Flux2KleinPipeline, index: int, timestep: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
            if on_step is not None and not on_step(index):
                pipe._interrupt = True
            return values

        embeds = prompt["prompt_embeds"][None].to(transformer.device, transformer.dtype)
        refused = None if negative is None else negative["prompt_embeds"][None].to(embeds)
        return pipe(
            prompt_embeds=embeds,
            negative_prompt_embeds=refused,
            width=size.width,
            height=size.height,
            num_inference_steps=steps,
            guidance_scale=cfg if negative is not None else 1.0,
            generator=torch.Generator("cpu").manual_seed(seed),
            callback_on_step_end=told,
        ).images
