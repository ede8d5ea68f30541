"""A ComfyUI workflow that draws with a trained file: in its API format, which the page of ComfyUI opens like any other.

Names of nodes and inputs are those of ComfyUI and of the templates that come with it (comfyui-workflow-templates); the files
beside the trained one are those that these templates name. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from whitetuner.records import Size

Link = list[Any]

#: Part -> file, by family; what single files a run was given wins over these.
FILES: Mapping[str, Mapping[str, str]] = {
    "flux2-klein": {
        "transformer": "flux-2-klein-base-4b.safetensors",
        "text_encoder": "qwen_3_4b.safetensors",
        "vae": "flux2-vae.safetensors",
    },
    "zimage": {
        "transformer": "z_image_bf16.safetensors",
        "text_encoder": "qwen_3_4b.safetensors",
        "vae": "ae.safetensors",
    },
    "qwen-image": {
        "transformer": "qwen_image_fp8_e4m3fn.safetensors",
        "text_encoder": "qwen_2.5_vl_7b_fp8_scaled.safetensors",
        "vae": "qwen_image_vae.safetensors",
    },
    "wan": {
        "transformer": "wan2.1_i2v_480p_14B_fp16.safetensors",
        "text_encoder": "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        "vae": "wan_2.1_vae.safetensors",
        "image_encoder": "clip_vision_h.safetensors",
    },
}
#: The same for variants that have others.
OF_VARIANT: Mapping[tuple[str, str], Mapping[str, str]] = {
    ("flux2-klein", "base-9b"): {
        "transformer": "flux-2-klein-base-9b-fp8.safetensors",
        "text_encoder": "qwen_3_8b_fp8mixed.safetensors",
    },
    ("flux2-klein", "distilled"): {"transformer": "flux-2-klein-4b.safetensors"},
    ("zimage", "turbo"): {"transformer": "z_image_turbo_bf16.safetensors"},
    ("qwen-image", "edit"): {"transformer": "qwen_image_edit_fp8_e4m3fn.safetensors"},
    ("qwen-image", "edit-2509"): {"transformer": "qwen_image_edit_2509_fp8_e4m3fn.safetensors"},
    ("qwen-image", "edit-2511"): {"transformer": "qwen_image_edit_2511_fp8mixed.safetensors"},
    ("wan", "t2v-2.1"): {"transformer": "wan2.1_t2v_1.3B_fp16.safetensors"},
    ("wan", "i2v-2.2"): {
        "transformer": "wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors",
        "transformer_2": "wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors",
    },
    ("wan", "t2v-2.2"): {
        "transformer": "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
        "transformer_2": "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors",
    },
    ("wan", "ti2v-5b"): {"transformer": "wan2.2_ti2v_5B_fp16.safetensors", "vae": "wan2.2_vae.safetensors"},
}


@dataclass(frozen=True)
class Wanted:
    """What is drawn, and with what.

    files:    part -> file name in ComfyUI's folders, where it is not the usual one
    trained:  denoiser ("transformer", "transformer_2") -> the run's file
    adapter:  whether these are adapters (models/loras) or whole models (models/diffusion_models)
    boundary: sigma at which the experts of WAN 2.2 change
    """

    family: str
    variant: str
    task: str
    trained: Mapping[str, str]
    adapter: bool
    prompt: str
    negative: str
    size: Size
    steps: int
    cfg: float
    seed: int
    shift: float
    fps: float = 16.0
    references: int = 0
    boundary: float = 0.9
    files: Mapping[str, str] = field(default_factory=dict)


def workflow(wanted: Wanted) -> dict[str, Any] | None:
    """The workflow, to be written as JSON; None for a family that ComfyUI does not know."""
    draw = {"flux2-klein": _klein, "zimage": _zimage, "qwen-image": _qwen, "wan": _wan}.get(wanted.family)
    if draw is None:
        return None
    graph = _Graph(wanted)
    draw(graph, wanted)
    return graph.nodes


class _Graph:
    def __init__(self, wanted: Wanted) -> None:
        self.wanted, self.nodes = wanted, dict[str, Any]()
        self.files = {
            **FILES[wanted.family],
            **OF_VARIANT.get((wanted.family, wanted.variant), {}),
            **wanted.files,
        }

    def add(self, kind: str, **inputs: Any) -> str:
        name = str(len(self.nodes) + 1)
        self.nodes[name] = {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}
        return name

    def one(self, kind: str, **inputs: Any) -> Link:
        """The node's first output."""
        return [self.add(kind, **inputs), 0]

    def model(self, part: str = "transformer") -> Link:
        """The denoiser with the trained file."""
        trained = self.wanted.trained.get(part)
        file = self.files[part] if trained is None or self.wanted.adapter else trained
        found = self.one("UNETLoader", unet_name=file, weight_dtype="default")
        if trained is not None and self.wanted.adapter:
            found = self.one("LoraLoaderModelOnly", model=found, lora_name=trained, strength_model=1.0)
        return found

    def words(self, kind: str) -> tuple[Link, Link, Link]:
        """(encoder, prompt, negative)."""
        clip = self.one("CLIPLoader", clip_name=self.files["text_encoder"], type=kind, device="default")
        prompt, negative = (
            self.one("CLIPTextEncode", text=text, clip=clip)
            for text in (self.wanted.prompt, self.wanted.negative)
        )
        return clip, prompt, negative

    def vae(self) -> Link:
        return self.one("VAELoader", vae_name=self.files["vae"])

    def pictures(self, most: int) -> Sequence[Link]:
        """The given pictures, as many as the nodes take; ComfyUI's own example stands in until one is chosen."""
        return [self.one("LoadImage", image="example.png") for _ in range(min(most, self.wanted.references))]

    def sampled(self, model: Link, prompt: Link, negative: Link, latent: Link, sampler: str) -> Link:
        return self.one(
            "KSampler",
            model=model,
            positive=prompt,
            negative=negative,
            latent_image=latent,
            seed=self.wanted.seed,
            steps=self.wanted.steps,
            cfg=self.wanted.cfg,
            sampler_name=sampler,
            scheduler="simple",
            denoise=1.0,
        )

    def saved(self, latent: Link, vae: Link) -> None:
        pictures = self.one("VAEDecode", samples=latent, vae=vae)
        if self.wanted.size.frames == 1:
            self.add("SaveImage", images=pictures, filename_prefix="white-tuner")
            return
        video = self.one("CreateVideo", images=pictures, fps=self.wanted.fps)
        self.add("SaveVideo", video=video, filename_prefix="video/white-tuner", format="auto", codec="auto")


def _klein(g: _Graph, wanted: Wanted) -> None:
    model = g.model()
    _, prompt, negative = g.words("flux2")
    vae, size = g.vae(), {"width": wanted.size.width, "height": wanted.size.height}
    for picture in g.pictures(4):
        latent = g.one("VAEEncode", pixels=picture, vae=vae)
        prompt = g.one("ReferenceLatent", conditioning=prompt, latent=latent)
        negative = g.one("ReferenceLatent", conditioning=negative, latent=latent)
    noise = g.one("RandomNoise", noise_seed=wanted.seed)
    guided = g.one("CFGGuider", model=model, positive=prompt, negative=negative, cfg=wanted.cfg)
    latent = g.one(
        "SamplerCustomAdvanced",
        noise=noise,
        guider=guided,
        sampler=g.one("KSamplerSelect", sampler_name="euler"),
        sigmas=g.one("Flux2Scheduler", steps=wanted.steps, **size),
        latent_image=g.one("EmptyFlux2LatentImage", batch_size=1, **size),
    )
    g.saved(latent, vae)


def _zimage(g: _Graph, wanted: Wanted) -> None:
    model = g.one("ModelSamplingAuraFlow", model=g.model(), shift=wanted.shift)
    _, prompt, negative = g.words("lumina2")
    g.saved(g.sampled(model, prompt, negative, _empty(g, wanted), "euler"), g.vae())


def _qwen(g: _Graph, wanted: Wanted) -> None:
    model, vae = g.one("ModelSamplingAuraFlow", model=g.model(), shift=wanted.shift), g.vae()
    if wanted.task == "t2i":
        _, prompt, negative = g.words("qwen_image")
    else:
        clip = g.one("CLIPLoader", clip_name=g.files["text_encoder"], type="qwen_image", device="default")
        pictures = g.pictures(1 if wanted.variant == "edit" else 3)
        if wanted.variant == "edit":
            given: dict[str, Link] = {"image": pictures[0]} if pictures else {}
            kind = "TextEncodeQwenImageEdit"
        else:
            given = {f"image{number}": one for number, one in enumerate(pictures, 1)}
            kind = "TextEncodeQwenImageEditPlus"
        prompt, negative = (
            g.one(kind, clip=clip, vae=vae, prompt=text, **given) for text in (wanted.prompt, wanted.negative)
        )
    g.saved(g.sampled(model, prompt, negative, _empty(g, wanted), "euler"), vae)


def _empty(g: _Graph, wanted: Wanted) -> Link:
    size = wanted.size
    return g.one("EmptySD3LatentImage", width=size.width, height=size.height, batch_size=1)


def _wan(g: _Graph, wanted: Wanted) -> None:
    parts = [part for part in ("transformer", "transformer_2") if part in g.files]
    models = [g.one("ModelSamplingSD3", model=g.model(part), shift=wanted.shift) for part in parts]
    _, prompt, negative = g.words("wan")
    vae, size = g.vae(), wanted.size
    shape = {"width": size.width, "height": size.height, "length": size.frames, "batch_size": 1}
    first = g.pictures(1)
    if wanted.variant == "ti2v-5b":
        given = {"start_image": first[0]} if first else {}
        latent = g.one("Wan22ImageToVideoLatent", vae=vae, **shape, **given)
    elif wanted.task == "i2v":
        given = {"start_image": first[0]} if first else {}
        if wanted.variant == "i2v-2.1" and first:
            looks = g.one("CLIPVisionLoader", clip_name=g.files["image_encoder"])
            given["clip_vision_output"] = g.one(
                "CLIPVisionEncode", clip_vision=looks, image=first[0], crop="none"
            )
        both = g.add("WanImageToVideo", positive=prompt, negative=negative, vae=vae, **shape, **given)
        prompt, negative, latent = [both, 0], [both, 1], [both, 2]
    else:
        latent = g.one("EmptyHunyuanLatentVideo", **shape)
    if len(models) == 1:
        latent = g.sampled(models[0], prompt, negative, latent, "uni_pc")
    else:
        # The step at which the shifted noise level falls to the boundary.
        at = wanted.boundary / (wanted.shift - (wanted.shift - 1) * wanted.boundary)
        change = max(1, min(wanted.steps - 1, round(wanted.steps * (1 - at))))
        for number, model in enumerate(models):
            latent = g.one(
                "KSamplerAdvanced",
                model=model,
                positive=prompt,
                negative=negative,
                latent_image=latent,
                add_noise="enable" if number == 0 else "disable",
                noise_seed=wanted.seed,
                steps=wanted.steps,
                cfg=wanted.cfg,
                sampler_name="euler",
                scheduler="simple",
                start_at_step=0 if number == 0 else change,
                end_at_step=change if number == 0 else 10000,
                return_with_leftover_noise="enable" if number == 0 else "disable",
            )
    g.saved(latent, vae)
