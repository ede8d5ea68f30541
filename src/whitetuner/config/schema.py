"""The one schema of config file, command line and form: every option with its meaning, unit and bounds. No torch."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from whitetuner.errors import UserError
from whitetuner.family import Options


class Section(BaseModel):
    """A table of the config file; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Run(Section):
    """[run]: which run this is and how long it goes on."""

    name: str = Field("", description="folder of the run inside output_dir; empty: made from the family and the data folder")
    output_dir: str = Field("output", description="where runs are kept")
    seed: int = Field(42, ge=0, lt=2**63, description="of noise, noise levels, order and the adapter's start")
    steps: int | None = Field(None, ge=1, description="optimizer steps; 2000 when neither steps nor epochs is given")
    epochs: int | None = Field(None, ge=1, description="passes over the data set, instead of steps")
    resume: str | None = Field(None, description='"latest" or a checkpoint folder: go on from there')

    @field_validator("name")
    @classmethod
    def _one_folder(cls, name: str) -> str:
        if re.search(r'[<>:"/\\|?*\x00-\x1f]', name) or name in (".", "..") or name != name.strip() or name.endswith("."):
            raise ValueError('must be usable as a folder name: no / \\ : * ? " < > | and no dot or blank at its ends')
        return name

    @model_validator(mode="after")
    def _one_length(self) -> Run:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self


class Model(Section):
    """[model]: what is trained."""

    family: str = Field(description="flux2-klein, ... (`whitetuner families` lists them)")
    task: Literal["t2i", "edit", "i2v", "t2v"] = Field("t2i", description="text to image, edit, image to video, text to video")
    path: str | None = Field(None, description='model folder in diffusers layout, or "builtin:nano"')
    transformer: str | None = Field(None, description="folder of the denoiser, instead of path/transformer")
    transformer_2: str | None = Field(None, description="folder of the second denoiser (WAN 2.2)")
    vae: str | None = Field(None, description="folder of the VAE, instead of path/vae")
    text_encoder: str | None = Field(None, description="folder of the text encoder, instead of path/text_encoder")
    image_encoder: str | None = Field(None, description="folder of the image encoder (WAN 2.1)")
    tokenizer: str | None = Field(None, description="folder of the tokenizer, instead of path/tokenizer")
    options: dict[str, Any] = Field(default_factory=dict, description="the family's own settings")


class SetFields(Section):
    """What one data set says; [data] gives it for all sets."""

    images: str | None = Field(None, description="folder of pictures with captions of the same name beside them")
    target: str | None = Field(None, description="edit: folder of the wanted results")
    conditions: list[str] = Field(default_factory=list, description="edit: folders of the given pictures")
    prompt: str | None = Field(None, description="one caption for the whole set")
    videos: str | None = Field(None, description="folder of clips")
    caption_ext: str = Field(".txt", pattern=r"^\.[A-Za-z0-9]+$", description="ending of the caption files")
    default_caption: str | None = Field(None, description="for pictures without a caption file; unset: that is an error")
    caption_dropout: float = Field(0.0, ge=0, le=1, description="share of visits with an empty caption (for guidance)")
    trigger: str | None = Field(None, description="word put before captions that do not hold it")
    resolution: int | list[int] = Field(1024, description="side of a square of the wanted area, in pixels; several: each picture gets the largest it fills")
    condition_resolution: int | None = Field(None, description="edit: the same for the given pictures")
    recursive: bool = Field(False, description="look into folders inside")
    upscale: bool = Field(False, description="enlarge pictures that are smaller than the resolution")
    num_frames: int | None = Field(None, ge=1, description="videos: frames of a clip, 4k + 1")
    fps: float | None = Field(None, gt=0, description="videos: frames a second")

    @field_validator("resolution")
    @classmethod
    def _sane_resolution(cls, value: int | list[int]) -> int | list[int]:
        sides = value if isinstance(value, list) else [value]
        if not sides or any(not 32 <= side <= 8192 for side in sides):
            raise ValueError("every resolution lies between 32 and 8192 pixels")
        return value


class DataSet(SetFields):
    """[[data.sets]]: one of several sets."""

    repeats: int = Field(1, ge=1, description="visits of each picture in one epoch")
    weight: float | None = Field(None, gt=0, description="share of the samples, relative to the other sets' weights")


class Data(SetFields):
    """[data]: what is learned from."""

    batch_size: int = Field(1, ge=1, le=1024, description="pictures of one shape in one pass")
    cache_dir: str | None = Field(None, description="where encoded pictures are kept; unset: output_dir/cache")
    workers: Literal["auto"] | int = Field("auto", description="threads that decode pictures while others are encoded")
    sets: list[DataSet] = Field(default_factory=list, description="several sets; [data] then holds what they share")


class Method(Section):
    """[method]: what of the model learns."""

    kind: Literal["lokr", "lora", "full"] = Field("lokr", description="LoKr, LoRA, or the whole model")
    rank: int = Field(16, ge=1, le=8192, description="of LoRA, and of LoKr's second factor unless full_matrix")
    alpha: float | None = Field(None, gt=0, description="scale is alpha / rank; unset: equal to rank")
    factor: int = Field(8, ge=-1, description="LoKr: size of the first factor; -1: as square as possible")
    full_matrix: bool = Field(True, description="LoKr: the second factor is a full matrix, rank is not used")
    targets: list[str] | None = Field(None, description="patterns of module paths; unset: the family's own")
    init_from: str | None = Field(None, description="adapter file to begin from")

    @field_validator("factor")
    @classmethod
    def _factor(cls, value: int) -> int:
        if value == 0:
            raise ValueError("must be -1 or at least 1")
        return value


class Noise(Section):
    """[noise]: at which noise levels is learned (t = 1000 sigma, 1000 = pure noise)."""

    timesteps: Literal["linear", "sigmoid", "weighted", "shift", "lognorm_blend"] = Field("sigmoid", description="density of the noise levels")
    sigmoid_scale: float = Field(1.0, gt=0, le=10, description="sigmoid: deviation of the normal; larger: broader")
    sigmoid_bias: float = Field(0.0, ge=-10, le=10, description="sigmoid: mean of the normal; above 0: more noise")
    shift: Literal["auto"] | float = Field(3.0, description='shift: s of s u / (1 + (s - 1) u); "auto": the model\'s own for the size')
    lognorm_alpha: float = Field(0.75, ge=0, le=1, description="lognorm_blend: share of the log-normal")
    min_timestep: float = Field(0.0, ge=0, le=1000, description="noise levels below are redrawn")
    max_timestep: float = Field(1000.0, ge=0, le=1000, description="noise levels above are redrawn")
    loss_weighting: Literal["none", "sigma_sqrt", "cosmap"] = Field("none", description="weight of a noise level in the loss")
    noise_offset: float = Field(0.0, ge=0, le=1, description="deviation of a constant added to each channel's noise")

    @model_validator(mode="after")
    def _range(self) -> Noise:
        if self.min_timestep >= self.max_timestep:
            raise ValueError("min_timestep must be below max_timestep")
        if self.shift != "auto" and not 0 < self.shift <= 100:
            raise ValueError("shift lies between 0 and 100")
        return self


class Optimizer(Section):
    """[optimizer]: how a step is taken."""

    name: str = Field("adamw", description='adamw, adamw8bit, adafactor, prodigy, or "module:Class"')
    lr: float = Field(1e-4, gt=0, le=10, description="learning rate")
    weight_decay: float = Field(0.01, ge=0, le=10, description="decoupled weight decay")
    betas: tuple[float, float] = Field((0.9, 0.999), description="of the Adam family")
    eps: float = Field(1e-8, gt=0, description="of the Adam family")
    warmup_steps: int = Field(0, ge=0, description="steps from 0 to the full learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="of the learning rate after the warm-up")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="the schedule ends at this share of lr")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are scaled down to this norm; 0: never")
    gradient_accumulation: int = Field(1, ge=1, le=4096, description="passes whose gradients make one step")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the running average that is previewed and saved; 0: none")
    args: dict[str, Any] = Field(default_factory=dict, description='further arguments of a "module:Class" optimizer')

    @field_validator("betas")
    @classmethod
    def _betas(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("both betas lie in [0, 1)")
        return value


class Memory(Section):
    """[memory]: how the model fits the card."""

    vram_gb: Literal["auto"] | float = Field("auto", description="memory of the card that may be used, in GB")
    base: Literal["auto", "bf16", "fp8", "int8", "nf4", "qint8", "qfloat8"] = Field("auto", description="number format of the frozen weights")
    blocks_to_swap: Literal["auto"] | int = Field("auto", description="blocks that wait in host memory")
    gradient_checkpointing: Literal["auto"] | bool = Field("auto", description="compute activations again in the backward pass; auto: on a GPU")
    activation_offload: bool = Field(False, description="block inputs wait in host memory")
    dtype: Literal["auto", "fp32", "bf16"] = Field("auto", description="of weights that are not quantised; auto: bf16 on a GPU, fp32 on a CPU")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?|\d+)$", description="auto, cpu, or a GPU's number")
    compile: bool = Field(False, description="torch.compile block by block")
    attention: str = Field("auto", description="attention kernel")


class Save(Section):
    """[save]: checkpoints and final files."""

    every: int = Field(500, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: int = Field(5, ge=0, description="checkpoints that stay; 0: all")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="of the final files")


class Prompt(Section):
    """[[preview.prompts]]: one picture drawn during training."""

    text: str = Field(description="caption")
    negative: str = Field("", description="what guidance leads away from")
    size: tuple[int, int] | None = Field(None, description="width and height in pixels; unset: the training resolution")
    seed: int = Field(0, ge=0, lt=2**63, description="of its noise")
    steps: int | None = Field(None, ge=1, le=1000, description="denoising steps; unset: the family's own")
    cfg: float | None = Field(None, ge=0, le=100, description="guidance scale; 1: none; unset: the family's own")
    images: list[str] = Field(default_factory=list, description="edit: given pictures")


class Preview(Section):
    """[preview]: pictures drawn during training."""

    every: int = Field(250, ge=0, description="steps between previews; 0: none")
    at_start: bool = Field(True, description="also before the first step")
    max_seconds: float = Field(300, gt=0, description="no further picture is begun after this many seconds")
    prompts: list[Prompt] = Field(default_factory=list, description="what to draw")


class Validation(Section):
    """[validation]: the loss at fixed noise, on pictures held out or (share = 0) on some of the training pictures."""

    every: int = Field(250, ge=0, description="steps between validations; 0: none")
    share: float = Field(0.0, ge=0, le=0.5, description="share of the pictures held out of training; 0: none, training pictures are used")
    items: int = Field(8, ge=1, le=1000, description="at most so many pictures")
    sigmas: int = Field(4, ge=1, le=100, description="noise levels per picture")


class Log(Section):
    """[log]: what is written while training."""

    tensorboard: bool = Field(True, description="write TensorBoard files")
    console_every: int = Field(1, ge=1, description="steps between console lines where there is no live display")


class Config(Section):
    """A whole run."""

    run: Run = Run()
    model: Model
    data: Data = Data()
    method: Method = Method()
    noise: Noise = Noise()
    optimizer: Optimizer = Optimizer()
    memory: Memory = Memory()
    save: Save = Save()
    preview: Preview = Preview()
    validation: Validation = Validation()
    log: Log = Log()

    def model_options(self) -> Options:
        """[model.options] as the family's own object (checked when the config was loaded)."""
        from whitetuner.config.options import options_of

        return options_of(self.model.family, self.model.options)

    def data_sets(self) -> tuple[DataSet, ...]:
        """The sets with what [data] says for all of them filled in. Raises UserError when there is none."""
        shared = {name: getattr(self.data, name) for name in SetFields.model_fields if name in self.data.model_fields_set}
        if self.data.sets:
            return tuple(
                DataSet(**{**shared, **{name: getattr(one, name) for name in one.model_fields_set}}) for one in self.data.sets
            )
        if not (self.data.images or self.data.target or self.data.videos):
            raise UserError("there is nothing to learn from", where="[data]", mend='set data.images = "FOLDER"')
        return (DataSet(**shared),)
