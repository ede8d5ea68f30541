"""Facts of WAN 2.1 and 2.2: image to video, text to video, the 5B that does both. No torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from whitetuner.errors import UserError
from whitetuner.families.files import read_config
from whitetuner.family import FamilySpec, ModelPaths, Options, Part, Setting
from whitetuner.records import Size

_HUB = "huggingface.co/Wan-AI (the folders that end in -Diffusers)"
#: Where the experts of 2.2 change when model_index.json does not say: boundary_ratio of the released folders.
BOUNDARIES = {"i2v-2.2": 0.9, "t2v-2.2": 0.875}
#: Frames that the VAE makes one of, after the first.
FRAMES_STEP = 4
#: Text tokens that every WAN is given, filled up with zeros; the 2.1 I2V's attention tells pictures from text by it.
TEXT_TOKENS = 512
#: Feed-forward, and attention to the text: a token of the clip knows nothing of the others there.
_PER_SAMPLE = ("hidden_states", "encoder_hidden_states", "temb")
_TOKEN_WISE = ("ffn", "attn2")

Variant = Literal["auto", "i2v-2.1", "i2v-2.2", "t2v-2.1", "t2v-2.2", "ti2v-5b"]


class WanOptions(Options):
    """[model.options] of WAN."""

    variant: Variant = Field(
        "auto", description="auto: told from the model folder; anything else is held against it"
    )
    expert: Literal["both", "high", "low"] = Field(
        "both",
        description="2.2 with two experts: which of them learns, the one for much noise, for little, or both in turns",
    )
    boundary: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="noise level (sigma, after the shift) where the experts change; unset: the model's own",
    )


def held_variant(paths: ModelPaths) -> str | None:
    """Which variant the files are, by the denoiser's channels and parts; None when its config.json is not there.

    36 channels in: image to video, 2.1 where the denoiser reads CLIP features; 48: the 5B; two denoisers: 2.2.
    Raises UserError for a config.json that cannot be read and for kinds that are not trained here.
    """
    config = _config(paths, "transformer")
    if not config:
        return None
    channels = config.get("in_channels", 16)
    if config.get("pos_embed_seq_len"):
        raise _not_here("WAN that draws between a first and a last frame (FLF2V)", paths)
    if channels == 48:
        return "ti2v-5b"
    if channels not in (16, 36):
        raise _not_here(f"a WAN with {channels} input channels (Fun, VACE or another)", paths)
    experts = _has(paths, "transformer_2")
    if channels == 16:
        return "t2v-2.2" if experts else "t2v-2.1"
    return "i2v-2.1" if config.get("image_dim") else "i2v-2.2"


def variant_of(options: WanOptions, paths: ModelPaths) -> str | None:
    """The option, or else what the files say; None: cannot be told."""
    return options.variant if options.variant != "auto" else held_variant(paths)


def resolved(options: WanOptions, paths: ModelPaths) -> WanOptions:
    """The options with what `auto` and unset mean for these files.

    Raises UserError for an expert asked of a model that has none, and for a variant that the files are not.
    """
    held = held_variant(paths)
    variant = options.variant if options.variant != "auto" else held or "i2v-2.1"
    if held is not None and held != variant:
        raise UserError(
            "model.options.variant says {said}, but the folder holds WAN {held}",
            where=str(paths.folder or paths.component("transformer")),
            mend="leave variant out (it is told from the folder), or give the folder of {said}",
            said=variant,
            held=held,
        )
    if variant not in BOUNDARIES:
        if options.expert != "both":
            raise UserError(
                "WAN {variant} has one denoiser, and no expert to choose",
                where="model.options.expert",
                mend="leave expert out; 2.2 I2V-A14B and T2V-A14B have two",
                variant=variant,
            )
        return options.model_copy(update={"variant": variant})
    boundary = options.boundary or _index(paths).get("boundary_ratio") or BOUNDARIES[variant]
    return options.model_copy(update={"variant": variant, "boundary": float(boundary)})


def parts(options: Any) -> tuple[Part, ...]:
    """The denoisers that learn: one, or 2.2's expert(s), each in its range of the shifted noise levels."""
    if options.variant not in BOUNDARIES:
        return (Part("transformer", ("blocks",), token_wise=_TOKEN_WISE, per_sample=_PER_SAMPLE),)
    boundary = options.boundary or BOUNDARIES[options.variant]
    high = Part("transformer", ("blocks",), (boundary, 1.0), "high_noise", _TOKEN_WISE, _PER_SAMPLE)
    low = Part("transformer_2", ("blocks",), (0.0, boundary), "low_noise", _TOKEN_WISE, _PER_SAMPLE)
    return {"both": (high, low), "high": (high,), "low": (low,)}[options.expert]


def unlearned(options: WanOptions) -> WanOptions | None:
    """The options of the expert that does not learn."""
    if options.variant not in BOUNDARIES or options.expert == "both":
        return None
    return options.model_copy(update={"expert": "low" if options.expert == "high" else "high"})


def whole(options: WanOptions) -> WanOptions:
    """The options of both experts: whichever learned, the other draws as it was released."""
    return options.model_copy(update={"expert": "both"})


def fps_of(options: WanOptions, paths: ModelPaths) -> float:
    """Frames a second that the model draws: 24 for the 5B, 16 for the others (configs of github.com/Wan-Video).

    paths: an empty one where the model is not looked at.
    """
    variant: str = options.variant
    if variant == "auto" and (paths.folder is not None or paths.single):
        variant = held_variant(paths) or "auto"
    return 24.0 if variant == "ti2v-5b" else 16.0


def needed(options: WanOptions, paths: ModelPaths) -> tuple[str, ...]:
    """Components that this variant is made of."""
    variant = resolved(options, paths).variant
    _check_vae(variant, paths)
    common = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    if variant == "i2v-2.1":
        return (*common, "image_encoder", "image_processor")
    if variant not in BOUNDARIES or (options.expert == "high" and not _has(paths, "transformer_2")):
        return common
    return (*common, "transformer_2")


def _stride(paths: ModelPaths) -> int:
    """The VAE's pixels a side for one of its own, and 2x2 of those make one token."""
    vae = paths.component("vae")
    if vae.is_file():
        return 16  # a file that was not looked at yet (whitetuner.single_files makes a folder of it)
    config = read_config(vae / "config.json")
    if not isinstance(config.get("temperal_downsample", []), list):
        raise UserError(
            "this config.json is not one of a WAN VAE",
            where=str(vae / "config.json"),
            mend="give the vae folder of {hub}",
            hub=_HUB,
        )
    return 2 * int(config.get("scale_factor_spatial", 8))


def _check_vae(variant: str, paths: ModelPaths) -> None:
    """Raises UserError when the VAE is that of the other models: 48 channels are the 5B's, 16 all others'."""
    config = _config(paths, "vae") if _has(paths, "vae") else {}
    channels, wanted = config.get("z_dim", 16), 48 if variant == "ti2v-5b" else 16
    if config and channels != wanted:
        raise UserError(
            "the VAE has {channels} channels, and WAN {variant} reads {wanted}",
            where="model.vae",
            mend="give {file}, or the vae folder of this model",
            channels=channels,
            variant=variant,
            wanted=wanted,
            file="wan2.2_vae.safetensors" if wanted == 48 else "wan_2.1_vae.safetensors",
        )


def _config(paths: ModelPaths, part: str) -> dict[str, Any]:
    folder = paths.component(part)
    return {} if folder.is_file() else read_config(folder / "config.json")


def _has(paths: ModelPaths, part: str) -> bool:
    return part in paths.single or (paths.folder is not None and (paths.folder / part).is_dir())


def _index(paths: ModelPaths) -> dict[str, Any]:
    file = None if paths.folder is None else paths.folder / "model_index.json"
    return read_config(file) if file is not None and file.is_file() else {}


def _not_here(kind: str, paths: ModelPaths) -> UserError:
    return UserError(
        "this is {kind}, which is not trained here",
        where=str(paths.component("transformer")),
        mend="give the folder of WAN 2.1 I2V or T2V, 2.2 I2V-A14B or T2V-A14B, or 2.2 TI2V-5B",
        kind=kind,
    )


def _tokens(size: Size, stride: int) -> int:
    frames = (size.frames - 1) // FRAMES_STEP + 1
    return frames * (size.width // stride) * (size.height // stride)


SPEC = FamilySpec(
    name="wan",
    title="WAN",
    title_zh="万相 WAN",
    tasks=("i2v", "t2v"),
    variants={
        "i2v-2.1": "WAN 2.1 I2V 14B: a picture and a text to a video",
        "i2v-2.2": "WAN 2.2 I2V-A14B: the same with two experts, for much and for little noise",
        "t2v-2.1": "WAN 2.1 T2V (14B, 1.3B): text to video",
        "t2v-2.2": "WAN 2.2 T2V-A14B: text to video with two experts",
        "ti2v-5b": "WAN 2.2 TI2V-5B: both tasks, 24 frames a second, a VAE of its own",
    },
    variant_tasks={
        "i2v-2.1": ("i2v",),
        "i2v-2.2": ("i2v",),
        "t2v-2.1": ("t2v",),
        "t2v-2.2": ("t2v",),
        "ti2v-5b": ("i2v", "t2v"),
    },
    variant_of=variant_of,
    variant_strides={"ti2v-5b": 32},
    most_references={"i2v-2.1": 1, "i2v-2.2": 1, "ti2v-5b": 1},
    options=WanOptions,
    parts=parts,
    unlearned=unlearned,
    whole=whole,
    stride_px=16,
    stride_of=_stride,
    frames=FRAMES_STEP,
    fps_of=fps_of,
    components=dict.fromkeys(
        (
            "transformer",
            "transformer_2",
            "vae",
            "text_encoder",
            "tokenizer",
            "scheduler",
            "image_encoder",
            "image_processor",
        ),
        _HUB,
    ),
    needed=needed,
    transformer_class="WanTransformer3DModel",
    # Outside the blocks every layer is used by every block or every token: under 2 % of the bytes, an error everywhere.
    keep_precise=("*norm*", "patch_embedding.*", "condition_embedder.*", "proj_out.*", "*scale_shift_table"),
    # Attention and feed-forward of every block: musubi-tuner's scope (networks/lora_wan.py, target WanAttentionBlock, whose
    # modulation is no layer). patch_embedding is a Conv3d, which ComfyUI reads wrongly in a LoKr file.
    adapter_targets=(
        "blocks.*.attn[12].[ta]*_[qkv]*",  # to_q, to_k, to_v; add_k_proj, add_v_proj of the 2.1 I2V
        "blocks.*.attn[12].to_out.0",
        "blocks.*.ffn.net.0.proj",
        "blocks.*.ffn.net.2",
    ),
    settings={
        "method.factor": Setting(
            8,
            "ai-toolkit README, LoKr example (lokr_factor: 8); every width of the blocks is a multiple of 512",
        ),
        "method.rank": Setting(
            32, "musubi-tuner docs/wan.md (--network_dim 32); DiffSynth-Studio wanvideo too"
        ),
        "method.full_matrix": Setting(
            False,
            "a full W2 and its optimizer are 3.8 GB of a card that a clip fills; musubi-tuner trains rank 32",
        ),
        "memory.activation_offload": Setting(
            True,
            "inputs of 40 blocks at 81 frames are 13 GB; their copies take a second of a step of minutes",
        ),
        "optimizer.lr": Setting(1e-4, "DiffSynth-Studio examples/wanvideo (learning_rate 1e-4)"),
        "optimizer.max_grad_norm": Setting(1.0, "musubi-tuner and ai-toolkit defaults"),
        "noise.timesteps": Setting("shift", "DiffSynth-Studio FlowMatchScheduler: uniform, then shifted"),
        "noise.shift": Setting(
            5.0,
            "github.com/Wan-Video sample_shift 5.0 (I2V at 480p: 3.0); DiffSynth-Studio trains at shift 5",
        ),
        "data.num_frames": Setting(81, "what the 14B models draw: five seconds at 16 frames a second"),
        "data.resolution": Setting(640, "the area of 832 x 480, the smaller of the two released sizes"),
    },
    default_size=Size(832, 480, 81),
    tokens=_tokens,
    auto_shift=lambda tokens: 5.0,  # of the released sampler; it does not hang on the size
    sample_steps=50,  # WanImageToVideoPipeline.__call__ defaults
    sample_cfg=5.0,
    licence=dict.fromkeys(("i2v-2.1", "i2v-2.2", "t2v-2.1", "t2v-2.2", "ti2v-5b"), "Apache-2.0"),
    template_tokens=1,  # the end of the text
    sources=(
        "diffusers pipelines/wan/pipeline_wan.py, pipeline_wan_i2v.py",
        "diffusers models/transformers/transformer_wan.py",
        "diffusers models/autoencoders/autoencoder_kl_wan.py",
        "Wan Team 2025, Wan: Open and Advanced Large-Scale Video Generative Models, arXiv 2503.20314",
    ),
)
