"""The one schema of config file, command line and form: every option with its meaning, unit and bounds. No torch."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from whitetuner.config.data_section import Data, DataSet, SetFields
from whitetuner.config.learning_sections import Method, Noise, Optimizer
from whitetuner.config.section import Section, Seed
from whitetuner.errors import UserError
from whitetuner.family import Options
from whitetuner.paths import PathText


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
    resume: PathText | None = Field(
        None, description='"latest", "best" or a checkpoint folder: go on from there'
    )

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
    path: PathText | None = Field(
        None,
        description="model folder in diffusers layout, an embedded one (builtin:nano, builtin:nano-edit, "
        "builtin:nano-zimage, builtin:nano-wan), the denoiser as one safetensors file, or a name on a hub that is fetched "
        "when training begins: ORG/MODEL (Hugging Face), modelscope:ORG/MODEL",
    )
    transformer: PathText | None = Field(
        None,
        description="the denoiser, instead of path/transformer: a folder, or one safetensors file as ComfyUI has it",
    )
    transformer_2: PathText | None = Field(
        None, description="the second denoiser (WAN 2.2: low noise): a folder or a file"
    )
    vae: PathText | None = Field(None, description="the VAE, instead of path/vae: a folder or a file")
    text_encoder: PathText | None = Field(
        None, description="the text encoder, instead of path/text_encoder: a folder or a file"
    )
    image_encoder: PathText | None = Field(
        None, description="the image encoder (WAN 2.1): a folder or a file"
    )
    tokenizer: PathText | None = Field(
        None, description="folder of the tokenizer, instead of path/tokenizer; Qwen's come along"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="the family's own settings, listed below"
    )


class Memory(Section):
    """[memory]: how the model fits the card."""

    vram_gb: Literal["auto"] | Annotated[float, Field(gt=0, le=4096)] = Field(
        "auto", description="memory of the card that may be used, in GB; auto: what is free"
    )
    base: Literal["auto", "bf16", "fp8", "int8", "nf4", "qint8", "qfloat8"] = Field(
        "auto", description="number format of the frozen weights"
    )
    encoder_base: Literal["auto", "bf16", "int8", "fp8"] = Field(
        "auto",
        description="number format of text encoders and language models; auto: as released (bf16), but int8 for one that "
        "writes token by token (GLM-Image) and would not fit on the card so",
    )
    blocks_to_swap: Literal["auto"] | Annotated[int, Field(ge=0, le=1000)] = Field(
        "auto", description="blocks that wait in host memory; 0: none"
    )
    gradient_checkpointing: Literal["auto"] | bool = Field(
        "auto",
        description="compute activations again in the backward pass (less memory, slower); auto: on a GPU",
    )
    micro_batch: int = Field(
        0,
        ge=0,
        le=1000,
        description="samples of a batch that are inside a block at a time: a block is loaded and updated once for all of "
        "them, its activations exist for so many (with gradient_checkpointing); 0: the whole batch",
    )
    activation_offload: bool = Field(False, description="block inputs wait in host memory")
    experts_on_disk: Literal["auto"] | bool = Field(
        "auto",
        description="of two experts the one whose turn it is not waits in a file of the run's folder; "
        "auto: where the host has no room for both",
    )
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of weights that are not quantised; auto: bf16 on a GPU, fp32 on a CPU"
    )
    device: Annotated[str, BeforeValidator(lambda given: str(given) if type(given) is int else given)] = (
        Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?|\d+)$", description="auto, cpu, or a GPU's number")
    )
    shard: bool = Field(
        False,
        description="several GPUs: each holds a share of every block's weights (FSDP2), and in full training of gradients and "
        "the optimizer's state, for models that fit no card",
    )
    compile: bool = Field(False, description="torch.compile, block by block")
    attention: str = Field("auto", description="attention kernel")

    @property
    def limit_gb(self) -> float | None:
        """vram_gb as a number; None for "auto"."""
        return None if self.vram_gb == "auto" else float(self.vram_gb)


class Save(Section):
    """[save]: checkpoints and final files."""

    every: int = Field(500, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: int = Field(
        5, ge=0, description="checkpoints that stay, the newest, and beside them the best; 0: all"
    )
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
    images: list[PathText] = Field(
        default_factory=list,
        description="edit: given pictures; i2v: the first frame (a picture, or a video whose first frame it is)",
    )
    frames: int | None = Field(
        None, ge=1, le=1000, description="videos: how many; unset: as many as are trained on"
    )


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

    every: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        "auto",
        description="steps between validations; auto: as often as 3 % of the time allow, at saved steps (measured once, in the "
        "first steps); 0: none",
    )
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
    wandb: Literal["off", "offline", "online"] = Field(
        "off",
        description="curves for wandb: offline, in the run's folder (`wandb sync` sends them), or at once with WANDB_API_KEY",
    )
    swanlab: Literal["off", "offline", "online"] = Field(
        "off",
        description="curves for SwanLab: offline, in the run's folder (`swanlab sync`), or at once with SWANLAB_API_KEY",
    )
    project: str = Field(
        "whitetuner", description="of wandb and SwanLab: where runs are gathered; empty: theirs"
    )
    console_every: int = Field(
        1, ge=1, description="steps between console lines where there is no live display"
    )

    @property
    def elsewhere(self) -> dict[str, str]:
        """Library -> off, offline or online."""
        return {"wandb": self.wandb, "swanlab": self.swanlab}


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
                "there is nothing to learn from",
                where="[data]",
                mend="set data.images = 'FOLDER' (edit tasks: data.target and data.conditions)",
            )
        return (DataSet(**shared),)
