"""The one schema of config file, command line and form: every option with its meaning, unit and bounds. No torch."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from whitetuner.errors import UserError
from whitetuner.family import Options


class Section(BaseModel):
    """A table of the config file; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _path(text: str) -> str:
    """Quotes that "copy as path" puts around are taken off; a path with a control character was written wrongly."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1]
    if not text:
        raise ValueError("a path is empty; leave the line out instead")
    if re.search(r"[\x00-\x1f]", text):
        raise ValueError(
            "in \"...\" a backslash begins an escape (\\n, \\t): write the path in single quotes, 'C:\\new'"
        )
    return text


#: Text that names a file or folder.
PathText = Annotated[str, AfterValidator(_path)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Run(Section):
    """[run]: which run this is and how long it goes on."""

    name: str = Field(
        "", description="folder of the run inside output_dir; empty: made from the family and the data folder"
    )
    output_dir: PathText = Field("output", description="folder where runs are kept")
    seed: Seed = Field(42, description="of noise, noise levels, order and the adapter's first values")
    steps: int | None = Field(
        2000,
        ge=1,
        le=10_000_000,
        description="optimizer steps; 1000 to 3000 suit 20 to 50 pictures (unset when epochs is given)",
    )
    epochs: int | None = Field(
        None, ge=1, le=1_000_000, description="passes over the data sets, instead of steps"
    )
    resume: PathText | None = Field(None, description='"latest" or a checkpoint folder: go on from there')

    @field_validator("name")
    @classmethod
    def _one_folder(cls, name: str) -> str:
        if (
            re.search(r'[<>:"/\\|?*\x00-\x1f]', name)
            or name != name.strip(" .")
            or len(name.encode("utf-8")) > 200
        ):
            raise ValueError(
                'must be usable as a folder name: none of / \\ : * ? " < > |, no dot or blank at its ends'
            )
        return name

    @model_validator(mode="before")
    @classmethod
    def _epochs_replace_the_default(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("epochs") is not None:
            if values.get("steps") is not None:
                raise ValueError("give run.steps or run.epochs, not both")
            return {**values, "steps": None}
        return values


class Model(Section):
    """[model]: what is trained."""

    family: str = Field(description="flux2-klein, ... (`whitetuner families` lists them)")
    task: Literal["t2i", "edit", "i2v", "t2v"] = Field(
        "t2i", description="text to image, edit, image to video or text to video"
    )
    path: PathText | None = Field(None, description='model folder in diffusers layout, or "builtin:nano"')
    transformer: PathText | None = Field(
        None, description="folder of the denoiser, instead of path/transformer"
    )
    transformer_2: PathText | None = Field(None, description="folder of the second denoiser (WAN 2.2)")
    vae: PathText | None = Field(None, description="folder of the VAE, instead of path/vae")
    text_encoder: PathText | None = Field(
        None, description="folder of the text encoder, instead of path/text_encoder"
    )
    image_encoder: PathText | None = Field(None, description="folder of the image encoder (WAN 2.1)")
    tokenizer: PathText | None = Field(None, description="folder of the tokenizer, instead of path/tokenizer")
    options: dict[str, Any] = Field(
        default_factory=dict, description="the family's own settings, listed below"
    )


def _sides(value: int | list[int]) -> int | list[int]:
    sides = value if isinstance(value, list) else [value]
    if not sides or any(not 32 <= side <= 8192 for side in sides):
        raise ValueError("every resolution lies between 32 and 8192 pixels")
    if len(set(sides)) < len(sides):
        raise ValueError("the same resolution stands there twice")
    return value


class SetFields(Section):
    """What one data set says; [data] gives it for all sets."""

    images: PathText | None = Field(
        None, description="folder of pictures, captions in files of the same name beside them"
    )
    target: PathText | None = Field(None, description="edit: folder of the wanted results")
    conditions: list[PathText] = Field(
        default_factory=list, description="edit: folders of the given pictures, same file names"
    )
    prompt: str | None = Field(None, description="one caption for the whole set, instead of caption files")
    videos: PathText | None = Field(None, description="folder of clips, captions beside them")
    caption_ext: str = Field(".txt", pattern=r"^\.[A-Za-z0-9]+$", description="ending of the caption files")
    default_caption: str | None = Field(
        None,
        description="caption of pictures that have no caption file; unset: a missing caption is an error",
    )
    caption_dropout: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of visits with an empty caption; 0.05 to 0.1 keeps guidance (cfg) working",
    )
    trigger: str | None = Field(None, description="word put before captions that do not hold it")
    resolution: Annotated[int | list[int], AfterValidator(_sides)] = Field(
        1024,
        description="side in pixels of a square of the wanted area; several: each picture is trained at the largest it fills",
    )
    condition_resolution: int | None = Field(
        None, ge=32, le=8192, description="edit: the same for the given pictures; unset: as resolution"
    )
    recursive: bool = Field(False, description="look into the folders inside, too")
    upscale: bool = Field(
        False, description="enlarge pictures that are smaller than the resolution, instead of a smaller size"
    )
    num_frames: int | None = Field(None, ge=1, le=10_000, description="videos: frames of a clip, 4 n + 1")
    fps: float | None = Field(
        None, gt=0, le=1000, description="videos: frames a second that clips are read at"
    )

    @property
    def source(self) -> str | None:
        """The folder that this set is named after."""
        return self.images or self.target or self.videos


class DataSet(SetFields):
    """[[data.sets]]: one of several sets."""

    repeats: int = Field(1, ge=1, le=100_000, description="visits of each picture in one epoch")
    weight: float | None = Field(
        None,
        gt=0,
        description="share of the samples, relative to the other sets' weights; all sets have one or none does",
    )


class Data(SetFields):
    """[data]: what is learned from; the same keys may stand in each of [[data.sets]]."""

    batch_size: int = Field(1, ge=1, le=1024, description="pictures of one shape in one pass")
    cache_dir: PathText | None = Field(
        None, description="folder of the encoded pictures; unset: cache/ in output_dir"
    )
    workers: Literal["auto"] | Annotated[int, Field(ge=1, le=64)] = Field(
        "auto",
        description="threads that decode pictures while others are encoded; auto: by the number of cores",
    )
    sets: list[DataSet] = Field(
        default_factory=list, description="several sets; [data] then holds what they share"
    )

    @model_validator(mode="after")
    def _sets_have_the_folders(self) -> Data:
        if self.sets and self.source is not None:
            raise ValueError(
                "the folder in [data] stands beside [[data.sets]]: move it into a [[data.sets]] of its own"
            )
        for one in (self, *self.sets):
            if sum(name is not None for name in (one.images, one.target, one.videos)) > 1:
                raise ValueError(
                    "images, target and videos are different kinds of sets: use [[data.sets]] for several"
                )
        if any(one.source is None for one in self.sets):
            raise ValueError("each of [[data.sets]] needs a folder: images, target or videos")
        weights = [one.weight is not None for one in self.sets]
        if any(weights) and not all(weights):
            raise ValueError("give weight in all of [[data.sets]] or in none")
        return self


class Method(Section):
    """[method]: what of the model learns."""

    kind: Literal["lokr", "lora", "full"] = Field("lokr", description="LoKr, LoRA, or the whole model")
    rank: int = Field(
        16, ge=1, le=8192, description="of LoRA; of LoKr's second factor when full_matrix is false"
    )
    alpha: float | None = Field(
        None, gt=0, description="what is learned is scaled by alpha / rank; unset: alpha = rank, scale 1"
    )
    factor: int = Field(
        8,
        ge=-1,
        le=8192,
        description="LoKr: side of the first factor; smaller: more is learned; -1: as square as possible",
    )
    full_matrix: bool = Field(
        True, description="LoKr: the second factor is a full matrix, and rank is not used"
    )
    targets: list[str] | None = Field(
        None,
        min_length=1,
        description="patterns (fnmatch) of the modules that learn; unset: the family's own",
    )
    init_from: PathText | None = Field(None, description="adapter file to begin from")

    @field_validator("factor")
    @classmethod
    def _factor(cls, value: int) -> int:
        if value == 0:
            raise ValueError("must be -1 or at least 1")
        return value


class Noise(Section):
    """[noise]: the noise levels that are learned (t = 1000 sigma; 1000 is pure noise)."""

    timesteps: Literal["linear", "sigmoid", "weighted", "shift", "lognorm_blend"] = Field(
        "sigmoid",
        description="density of the noise levels (uniform; logit-normal; uniform with a weight; shifted; blend)",
    )
    sigmoid_scale: float = Field(
        1.0, gt=0, le=10, description="sigmoid: deviation of the normal; larger: broader"
    )
    sigmoid_bias: float = Field(
        0.0, ge=-10, le=10, description="sigmoid: mean of the normal; above 0: more noise (composition)"
    )
    shift: Literal["auto"] | Annotated[float, Field(gt=0, le=100)] = Field(
        3.0,
        description='shift: s of s u / (1 + (s - 1) u); above 1: more noise; "auto": the model\'s own for the picture size',
    )
    lognorm_alpha: float = Field(
        0.75, ge=0, le=1, description="lognorm_blend: share of the log-normal, the rest is uniform"
    )
    min_timestep: float = Field(0.0, ge=0, le=1000, description="noise levels below are drawn again")
    max_timestep: float = Field(1000.0, ge=0, le=1000, description="noise levels above are drawn again")
    loss_weighting: Literal["none", "sigma_sqrt", "cosmap"] = Field(
        "none", description="weight of a noise level in the loss"
    )
    noise_offset: float = Field(
        0.0, ge=0, le=1, description="deviation of a constant added to each channel's noise; 0: none"
    )

    @model_validator(mode="after")
    def _range(self) -> Noise:
        if self.min_timestep >= self.max_timestep:
            raise ValueError("min_timestep must be below max_timestep")
        return self


Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Section):
    """[optimizer]: how a step is taken."""

    name: str = Field("adamw", description='adamw, adamw8bit, adafactor, prodigy, or "module:Class"')
    lr: float = Field(1e-4, gt=0, le=10, description="learning rate; prodigy: 1")
    weight_decay: float = Field(0.01, ge=0, le=10, description="decoupled weight decay; 0: none")
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.999), description="running means of gradient and square (adamw, adamw8bit, prodigy)"
    )
    eps: float = Field(
        1e-8, gt=0, le=1, description="added to the root of the square (adamw, adamw8bit, prodigy)"
    )
    warmup_steps: int = Field(0, ge=0, description="steps from 0 to the full learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="of the learning rate after the warm-up"
    )
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="linear, cosine: they end at this share of lr")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are scaled down to this norm; 0: never")
    gradient_accumulation: int = Field(1, ge=1, le=4096, description="passes whose gradients make one step")
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of the running average that is previewed and saved, e.g. 0.99; 0: none",
    )
    args: dict[str, Any] = Field(
        default_factory=dict, description='further arguments of a "module:Class" optimizer'
    )


class Memory(Section):
    """[memory]: how the model fits the card."""

    vram_gb: Literal["auto"] | Annotated[float, Field(gt=0, le=4096)] = Field(
        "auto", description="memory of the card that may be used, in GB; auto: what is free"
    )
    base: Literal["auto", "bf16", "fp8", "int8", "nf4", "qint8", "qfloat8"] = Field(
        "auto", description="number format of the frozen weights"
    )
    blocks_to_swap: Literal["auto"] | Annotated[int, Field(ge=0, le=1000)] = Field(
        "auto", description="blocks that wait in host memory; 0: none"
    )
    gradient_checkpointing: Literal["auto"] | bool = Field(
        "auto",
        description="compute activations again in the backward pass (less memory, slower); auto: on a GPU",
    )
    activation_offload: bool = Field(False, description="block inputs wait in host memory")
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of weights that are not quantised; auto: bf16 on a GPU, fp32 on a CPU"
    )
    device: Annotated[str, BeforeValidator(lambda given: str(given) if type(given) is int else given)] = (
        Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?|\d+)$", description="auto, cpu, or a GPU's number")
    )
    compile: bool = Field(False, description="torch.compile, block by block")
    attention: str = Field("auto", description="attention kernel")


class Save(Section):
    """[save]: checkpoints and final files."""

    every: int = Field(500, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: int = Field(5, ge=0, description="checkpoints that stay, the newest; 0: all")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="of the final files; bf16: half the size")


class Prompt(Section):
    """[[preview.prompts]]: one picture drawn during training."""

    text: str = Field(description="caption")
    negative: str = Field("", description="what guidance leads away from")
    size: Annotated[list[Annotated[int, Field(ge=32, le=8192)]], Field(min_length=2, max_length=2)] | None = (
        Field(None, description="[width, height] in pixels; unset: a square of the training resolution")
    )
    seed: Seed = Field(0, description="of its noise")
    steps: int | None = Field(None, ge=1, le=1000, description="denoising steps; unset: the family's own")
    cfg: float | None = Field(
        None, ge=0, le=100, description="guidance scale; 1: none; unset: the family's own"
    )
    images: list[PathText] = Field(default_factory=list, description="edit: given pictures")


class Preview(Section):
    """[preview]: pictures drawn during training, always with the same seeds."""

    every: int = Field(250, ge=0, description="steps between previews; 0: none")
    at_start: bool = Field(True, description="also before the first step, to compare with")
    max_seconds: float = Field(
        300, gt=0, description="no further picture of a preview is begun after so many seconds"
    )
    prompts: list[Prompt] = Field(default_factory=list, description="what to draw; none: no previews")


class Validation(Section):
    """[validation]: the loss at fixed noise and noise levels, so that only learning moves it."""

    every: int = Field(250, ge=0, description="steps between validations; 0: none")
    share: float = Field(
        0.0,
        ge=0,
        le=0.5,
        description="share of the pictures held out of training; 0: training pictures are used",
    )
    items: int = Field(8, ge=1, le=1000, description="at most so many pictures")
    sigmas: int = Field(4, ge=1, le=100, description="noise levels per picture")


class Log(Section):
    """[log]: what is shown while training."""

    tensorboard: bool = Field(True, description="write TensorBoard files")
    console_every: int = Field(
        1, ge=1, description="steps between console lines where there is no live display"
    )


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
        shared = {
            name: getattr(self.data, name)
            for name in SetFields.model_fields
            if name in self.data.model_fields_set
        }
        if self.data.sets:
            return tuple(
                DataSet(**{**shared, **{name: getattr(one, name) for name in one.model_fields_set}})
                for one in self.data.sets
            )
        if self.data.source is None:
            raise UserError(
                "there is nothing to learn from", where="[data]", mend="set data.images = 'FOLDER'"
            )
        return (DataSet(**shared),)
