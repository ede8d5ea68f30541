"""The contract of a model family: everything the trainer wants to know of a model, and nothing about memory or method.

A family is a folder under families/ and one line in families/registry.py; docs/adding-a-family.md walks through its files.

Conventions that hold for every family, whatever its own are (they hide inside `predict`, `generate` and the encoders):
    x_t = (1 - sigma) x0 + sigma noise,   velocity = noise - x0,   sigma in [0, 1], 1 = pure noise.

Edit tasks. An encoder that looks at the given pictures ("conditions" in its `reads`) gets them twice: as
EncodeInput.conditions, each cut to its Item.condition_sizes (own aspect kept, multiples of the stride), and as
EncodeInput.originals, uncut, for encoders that bring them to a size of their own. What it returns lies in the batch for
`predict` and in `prompt` of `generate` (in `negative` too: those are the fields of the negative text beside the same
pictures), so `generate` takes its references from there. A shape key holds the sizes of all conditions: a batch has
equal counts and sizes of references, and "stack" suits their latents. An encoder may read the caption and the conditions
together (a vision-language model does); it is then asked again for every prompt and its pictures.

Videos. The target is a clip of Size.frames pictures. In an i2v task the one condition is its first frame, cut as the clip is;
an encoder whose result hangs on the clip's length and size, too, has "frames" in its `reads` and finds them in EncodeInput.size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from whitetuner.errors import UserError
from whitetuner.records import Batch, EncodeInput, Size

if TYPE_CHECKING:
    import torch
    from PIL import Image

#: File in a model folder that says how the model wants to be asked: {"options": {..}, "size": [width, height, frames]}.
WISHES = "whitetuner.json"

Layout = Literal["stack", "ragged"]
Naming = Literal["comfyui", "diffusers", "lycoris"]
Reads = Literal["caption", "target", "conditions", "frames", "unconditional", "mask"]


class Options(BaseModel):
    """Base of a family's own settings ([model.options])."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Setting:
    """A default that a family proposes for a config key, and where it comes from."""

    value: Any
    source: str


@dataclass(frozen=True)
class Part:
    """One denoiser of a family (WAN 2.2 has two; most have one).

    name:        component folder and key of `Family.load`'s result
    block_lists: attributes holding the blocks, in the order they run
    sigma_range: [low, high) of the sigmas it is trained and used at
    token_wise:  modules inside a block that treat every token of their first argument alike (long videos: in pieces)
    per_sample:  arguments of the blocks that hold the batch in dim 0 (memory.micro_batch); all others serve every sample
    suffix:      of its files where a model has several ("high_noise": NAME_high_noise.safetensors)
    """

    name: str
    block_lists: tuple[str, ...]
    sigma_range: tuple[float, float] = (0.0, 1.0)
    suffix: str = ""
    token_wise: tuple[str, ...] = ()
    per_sample: tuple[str, ...] = ()

    def file(self, name: str, more: str = "") -> str:
        """ "lokr" -> "lokr.safetensors", "lokr_high_noise_diffusers.safetensors"; more: what stands last ("diffusers")."""
        return "_".join(one for one in (name, self.suffix, more) if one) + ".safetensors"


@dataclass(frozen=True)
class FamilySpec:
    """The facts of a family; read without torch by the command line, the page and the plan.

    tasks:      of "t2i", "edit", "i2v", "t2v"
    variants:   name -> one line of what it is; the first is the default
    variant_tasks: variant -> the tasks it is for, where variants differ in that; empty: every variant does every task
    most_references: variant -> the given pictures that it takes at most, where the model limits that
    variant_of: which variant a model folder holds, told from names and config files; None: cannot be told
    stride_px:  width and height of a training picture are multiples of this for the released models
    stride_of:  the same for the model at hand, told from its config files; `stride` asks it
    variant_strides: variant -> `stride_px` of its released model, where that is another
    frames:     0: pictures only; n: videos of n k + 1 frames
    fps_of:     frames a second that the model draws (videos)
    components: folders of the diffusers layout a model must have -> where to get them when missing
    needed:     which of the components the model at hand is made of; None: all of them
    keep_precise: fnmatch patterns of parameter names that are never quantised
    adapter_targets: fnmatch patterns of module paths that adapters attach to by default
    transformer_class: `_class_name` in the denoiser's config.json, by which a model folder is recognised
    converts:   `_class_name`s of other denoisers that can be given too; they are converted while they load
    unlearned:  options -> options whose parts are those that draw too but do not learn; None: all of them learn
    whole:      options -> options whose parts are all that draw, those that learn and those that do not
    settings:   config key ("optimizer.lr") -> proposed default with its source
    advice:     what to warn about before this model is trained (a distilled one, a variant that the folder is not);
                reads names and config files only
    tokens:     (size, stride in pixels) -> tokens of the target that the denoiser sees
    auto_shift: tokens of the target -> the shift s of the model's own sampling schedule; None: it has none
    caption_fault: what is wrong with a caption for this model, or None; reads the text only
    template_tokens: tokens that the prompt template adds to a caption, of options.max_sequence_length
    sample_steps, sample_cfg: what pictures are drawn with when nothing is said; cfg 1 is no guidance
    sampling_of: (steps, cfg) for the model at hand where that is drawn otherwise (a distilled one); `sampling` asks it
    licence:    variant -> of its weights, as its publisher says, or that this was not verified; `families` shows it
    comfyui_loads: whether ComfyUI loads this model, and so its adapters
    tiny_options: options that suit the random tiny model (short texts)
    """

    name: str
    title: str
    title_zh: str
    tasks: tuple[str, ...]
    variants: Mapping[str, str]
    options: type[Options]
    parts: Callable[[Options], tuple[Part, ...]]
    stride_px: int
    components: Mapping[str, str]
    keep_precise: tuple[str, ...]
    adapter_targets: tuple[str, ...]
    settings: Mapping[str, Setting]
    default_size: Size
    transformer_class: str = ""
    converts: tuple[str, ...] = ()
    variant_tasks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    most_references: Mapping[str, int] = field(default_factory=dict)
    unlearned: Callable[[Any], Any | None] = lambda options: None
    whole: Callable[[Any], Any] = lambda options: options
    variant_of: Callable[[Any, ModelPaths], str | None] = lambda options, paths: None
    variant_strides: Mapping[str, int] = field(default_factory=dict)
    frames: int = 0
    fps_of: Callable[[Any, ModelPaths], float] = lambda options, paths: 16.0
    needed: Callable[[Any, ModelPaths], tuple[str, ...]] | None = None
    min_size_px: int = 64
    tokens: Callable[[Size, int], int] = lambda size, stride: (size.width // stride) * (size.height // stride)
    auto_shift: Callable[[int], float] | None = None
    stride_of: Callable[[ModelPaths], int] | None = None
    advice: Callable[[Any, ModelPaths], tuple[UserError, ...]] = lambda options, paths: ()
    caption_fault: Callable[[str], UserError | None] = lambda caption: None
    comfyui_loads: bool = True
    tiny_options: Mapping[str, Any] = field(default_factory=dict)
    template_tokens: int = 0
    sample_steps: int = 28
    sample_cfg: float = 4.0
    sampling_of: Callable[[Any, ModelPaths], tuple[int, float] | None] = lambda options, paths: None
    licence: Mapping[str, str] = field(default_factory=dict)
    sources: tuple[str, ...] = ()

    def stride(self, paths: ModelPaths) -> int:
        """Pixels that width and height of a picture are multiples of, for this model. Imports no torch.

        Raises UserError when the config file that tells it cannot be read.
        """
        return self.stride_px if self.stride_of is None else self.stride_of(paths)

    def sampling(self, options: Options, paths: ModelPaths) -> tuple[int, float]:
        """(steps, cfg) that this model is drawn with when nothing is said. Imports no torch."""
        return self.sampling_of(options, paths) or (self.sample_steps, self.sample_cfg)

    def components_of(self, options: Any, paths: ModelPaths) -> tuple[str, ...]:
        """The components that the model at hand must have. Raises UserError when its config files cannot be read."""
        return tuple(self.components) if self.needed is None else self.needed(options, paths)

    def tasks_of(self, variant: str) -> tuple[str, ...]:
        """The tasks that a variant is for."""
        return self.variant_tasks.get(variant, self.tasks)

    def references_at_most(self, options: Any, paths: ModelPaths) -> int | None:
        """Given pictures that the model in the folder takes; None: any number."""
        return self.most_references.get(self.variant_of(options, paths) or "")

    def pairs(self) -> list[tuple[str, str]]:
        """(variant, task) pairs that the contract suite proves, one random tiny model each.

        All of variant_tasks; where variants are of one architecture (variant_tasks is empty), each task on the first.
        """
        if self.variant_tasks:
            return [(variant, task) for variant, tasks in self.variant_tasks.items() for task in tasks]
        return [(next(iter(self.variants)), task) for task in self.tasks]


@dataclass(frozen=True)
class ModelPaths:
    """Where the parts of a model lie: one diffusers folder, single parts beside it winning over it."""

    folder: Path | None
    single: Mapping[str, Path] = field(default_factory=dict)

    def component(self, name: str) -> Path:
        """Folder (or file) of a component. Raises UserError, naming what is there, when it is missing."""
        if name in self.single:
            return self.single[name]
        if self.folder is None:
            raise UserError(
                "no path is given for the part '{part}'",
                where="[model]",
                mend='set model.path to the model folder, or model.{part} = "..."',
                part=name,
            )
        path = self.folder / name
        if not path.exists():
            have = ", ".join(sorted(p.name for p in self.folder.iterdir() if p.is_dir())) or "no folders"
            raise UserError(
                "the model folder has no part '{part}' (it has: {have})",
                where=str(self.folder),
                mend="download the whole model folder again, or point model.{part} at this part",
                part=name,
                have=have,
            )
        return path


@dataclass(frozen=True)
class Recast:
    """How a folder becomes a model that is not quite the folder's; class attribute `recast` of what is built.

    A family that needs it hands its BuildFn a subclass with this attribute. Tensors are still read one at a time: a model
    that is converted or merged into while it loads is never held twice.

    reads:     `_class_name`s of config.json that are understood beside the class's own
    config:    values that replace those of config.json
    targets:   name of a tensor in the files -> its names in the module; each gets the tensor
    additions: name in the module -> what is added to this tensor (float32, its shape, CPU), made when its turn comes; before
               it is cast or quantised
    """

    reads: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    targets: Callable[[str], tuple[str, ...]] = lambda name: (name,)
    additions: Mapping[str, Callable[[], torch.Tensor]] = field(default_factory=dict)


class BuildFn(Protocol):
    """Makes a module from a component folder: meta device, filled from safetensors, quantised and placed on the way.

    The recipe hands it in, so that a family knows nothing about memory. Result: eval mode, requires_grad False.
    A class with an attribute `recast` is built as that says.
    """

    def __call__(self, cls: type, folder: Path, *, keep_precise: Sequence[str] = ()) -> Any: ...


class Encoder(Protocol):
    """Turns part of an item into tensors that training needs; run once, cached, then freed.

    fields: name -> layout, of everything `encode` returns. "stack": equal shapes within a shape key; "ragged": not so
    reads:  what of the item the result depends on (the cache key holds only that); "frames": size and length of the clip, of
            a prompt too; "unconditional": whether this is the side that guidance leads away from
    A method `passes(size)`: how often its weights are gone through for one picture of this size, where that is not once (a
    language model that writes; see `passes_of`).
    An attribute `prompts_only` that is true: asked about prompts without target alone (see `prompts_only`).
    """

    name: str
    fields: Mapping[str, Layout]
    reads: frozenset[Reads]

    def fingerprint(self) -> str:
        """Changes when the encoder would say something else: its files, options and code version. No weights loaded."""
        ...

    def load(self, build: BuildFn) -> None: ...

    def encode(self, given: EncodeInput) -> dict[str, torch.Tensor]:
        """One item at a time, no batch dimension, deterministic (`mode()` of a VAE), on the CPU."""
        ...

    def free(self) -> None: ...


def prompts_only(encoder: Encoder) -> bool:
    """Whether the encoder makes up for a prompt what is otherwise told from a target, and so is not asked about items."""
    return bool(getattr(encoder, "prompts_only", False))


def passes_of(encoder: Encoder, size: Size) -> int:
    """How often the encoder goes through its weights for one caption or picture of this size."""
    passes = getattr(encoder, "passes", None)
    return 1 if passes is None else int(passes(size))


class KeyMap(Protocol):
    """Module paths of diffusers <-> names in files of other programs (ComfyUI / original layout / LyCORIS).

    The two of full states rename, cut and join rows (the first dimension) and no more: they are asked with row numbers in place
    of weights (memory/relaid.py), so only the number of rows tells anything.
    """

    def adapter_prefix(self, module_path: str, naming: Naming) -> str:
        """What stands before ".lokr_w1" or ".lora_A.weight" in an adapter file."""
        ...

    def module_path(self, prefix: str) -> str | None:
        """Inverse over all namings; None for a name that is not of this family."""
        ...

    def to_original(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]: ...
    def from_original(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]: ...


class Sketch(Protocol):
    """A family's `sketch.py`: what the plan needs of a model whose files are not there.

    RELEASED: variant -> part -> config.json of the released denoiser (`_class_name` included)
    An attribute ENCODERS: name of an encoder -> part -> config.json, for encoders that take long enough to be planned for.
    """

    RELEASED: Mapping[str, Mapping[str, Mapping[str, Any]]]

    def blank(
        self,
        module: torch.nn.Module,
        options: Any,
        size: Size,
        stride_px: int,
        conditions: tuple[Size, ...] = (),
    ) -> dict[str, torch.Tensor]:
        """The fields of one sample of this size, shaped as the encoders' own, in zeros, without a batch dimension.

        module: the denoiser, whose config tells channels and widths; ragged fields have their greatest length
        """
        ...


class Family(Protocol):
    """A family's model with its options and paths: encoders, denoisers, decoder, prediction, generation."""

    spec: FamilySpec
    options: Options
    paths: ModelPaths
    keys: KeyMap

    def stride(self) -> int:
        """`spec.stride(paths)`."""
        ...

    def encoders(self, task: str) -> list[Encoder]: ...

    def load(self, build: BuildFn) -> dict[str, torch.nn.Module]:
        """{part name: denoiser}."""
        ...

    def load_decoder(self, build: BuildFn) -> torch.nn.Module: ...

    def predict(
        self,
        modules: Mapping[str, torch.nn.Module],
        part: str,
        batch: Batch,
        x_t: torch.Tensor,
        sigma: torch.Tensor,
    ) -> torch.Tensor:
        """Velocity like x_t, float32. x_t: (B, C, [T,] H, W) float32; sigma: (B,) float32 in [0, 1], 1 = noise."""
        ...

    def generate(
        self,
        modules: Mapping[str, torch.nn.Module],
        decoder: torch.nn.Module,
        prompt: Mapping[str, torch.Tensor],
        negative: Mapping[str, torch.Tensor] | None,
        *,
        size: Size,
        steps: int,
        cfg: float,
        seed: int,
        on_step: Callable[[int], bool] | None = None,
    ) -> list[Image.Image]:
        """Frames drawn by the diffusers pipeline around our modules.

        prompt, negative: the encoders' fields for the text and, in an edit task, for the given pictures (see above)
        on_step(i) is called after each denoising step; returning False ends the drawing early with what is there.
        """
        ...


def fingerprint_files(paths: Sequence[Path], *, extra: str = "") -> str:
    """Hex digest that changes when one of the files does: name, size, mtime, first, last and a few middle bytes.

    Hashing 10 GB takes minutes; header, size, mtime and samples tell every change that really happens.
    """
    digest = hashlib.blake2b(extra.encode("utf-8"), digest_size=16)
    for path in sorted(paths):
        stat = path.stat()
        digest.update(f"{path.name}|{stat.st_size}|{stat.st_mtime_ns}".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            digest.update(file.read(65536))
            for part in range(1, 9):
                file.seek(max(0, stat.st_size * part // 8 - 4096))
                digest.update(file.read(4096))
    return digest.hexdigest()
