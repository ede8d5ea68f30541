"""How a run fits its card: from the config, the model's shapes and the sizes of the pictures to a plan, before anything loads.

On a card the plan is always made; `memory` in the config only narrows it. On a CPU weights stay as they are unless something
was asked for: there is no second memory to save (memory.vram_gb then stands for a card of that size, to try a plan out).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from whitetuner.adapters.attach import attach
from whitetuner.adapters.choose import choose
from whitetuner.companions import beside_of, turn_steps_of
from whitetuner.config.full import refuse_wrong_full
from whitetuner.config.schema import Config
from whitetuner.config.shard import refuse_wrong_shard
from whitetuner.encoding import Encoding, encoding_of
from whitetuner.errors import UserError
from whitetuner.families import registry
from whitetuner.family import Family, Part
from whitetuner.full_costs import remembered, sentence
from whitetuner.memory.blocks import blocks_of
from whitetuner.memory.build import Build
from whitetuner.memory.fit import Fitted, fit
from whitetuner.memory.machine import CONTEXT_BYTES, GIB, Machine, this_machine, typical_machine
from whitetuner.memory.measure import StepCost, measure_alike, measure_step
from whitetuner.memory.micro import micro_batches
from whitetuner.memory.plan import BASES, Plan, Wishes, make_plan
from whitetuner.memory.quantize import Kind, require_bitsandbytes
from whitetuner.memory.recompute import chunk_tokens
from whitetuner.memory.skeleton import sketch_module
from whitetuner.memory.swap.arena import Arena
from whitetuner.memory.swap.layout import spread_count
from whitetuner.memory.swap.shelf import Shelf
from whitetuner.memory.weigh import weigh
from whitetuner.records import Batch, Item, Size
from whitetuner.rehearsal import adapter_settings, trained_of

#: The seed's names of bases.
_OTHER_NAMES = {"qint8": "int8", "qfloat8": "fp8"}
_QUANTISED: dict[str, Kind] = {"int8": "int8", "fp8": "fp8", "nf4": "nf4"}
#: Bytes that an optimizer keeps for each trained number (docs of each; adafactor's factored moments are next to nothing).
_STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "adafactor": 1, "prodigy": 16}
_OTHER_STATE_BYTES = 8
#: Clips of more tokens go through Part.token_wise in pieces of so many, and what those save is saved of one piece.
#: Sums over tokens are rounded in another order.
LONG_TOKENS, PIECE_TOKENS = 16384, 4096
#: Of the memory that the first steps left free: later ones may need a little more.
_USED_OF_FREE = 0.9


@dataclass(frozen=True)
class Shape:
    """What a step is made of: so many samples of one size, each with conditions of these sizes."""

    size: Size
    batch: int = 1
    conditions: tuple[Size, ...] = ()

    def __str__(self) -> str:
        frames = f" x {self.size.frames} frames" if self.size.frames > 1 else ""
        whole = f"{self.size.width}x{self.size.height}{frames}, batch {self.batch}"
        return f"{whole} with {len(self.conditions)} given pictures" if self.conditions else whole


@dataclass(frozen=True)
class Way:
    """What a run does. quantize: of the frozen base;  residents: None: all;  plain: blocks not computed again;
    plan: where it comes from, None when nothing had to be planned;  pieces: tokens of one in Part.token_wise, 0: whole;
    on_disk: of several denoisers those whose turn it is not wait in files;  turn_steps: of such a turn, None: the
    usual;  encoding: how the encoders are held before it."""

    base: str
    quantize: Kind | None
    residents: frozenset[int] | None
    plain: frozenset[int]
    slots: int = 2
    plan: Plan | None = None
    pieces: int = 0
    on_disk: bool = False
    turn_steps: int | None = None
    encoding: Encoding = field(default_factory=Encoding)

    def facts(self) -> dict[str, Any]:
        """For run.json."""
        more = {"pieces": self.pieces} if self.pieces else {}
        more |= {"turn_steps": self.turn_steps} if self.turn_steps else {}
        plan = self.plan and self.plan.to_json()
        return {"base": self.base, **more, "plan": plan, **self.encoding.facts()}

    def words(self) -> list[str]:
        return [*([] if self.plan is None else self.plan.words()), *self.encoding.words()]


@dataclass(frozen=True)
class Sketched:
    """A part of a family, in shapes: from a model folder, or from what is known of the released model."""

    family: Family
    part: Part
    stride_px: int
    dtype: torch.dtype

    def module(self, config: Config, quantize: Kind | None) -> torch.nn.Module:
        """The denoiser without weights, with the config's adapter on it, or with what trains of it in full training."""
        module = self.family.load(partial(sketch_module, dtype=self.dtype, quantize=quantize))[self.part.name]
        if config.method.kind == "full":
            trained_of(config, module)
            return module
        paths = choose(module, config.method.targets or list(self.family.spec.adapter_targets))
        attach(module, paths, adapter_settings(config), seed=0, device="meta")
        return module

    def cost(self, config: Config, shape: Shape) -> StepCost:
        """Of one forward and backward of this shape."""
        family, module, part = self.family, self.module(config, None), self.part
        in_pieces(module, part, pieces_of(family, [shape], self.stride_px))
        blank = registry.sketch(family.spec.name).blank
        fields = blank(module, family.options, shape.size, self.stride_px, shape.conditions)
        task = config.model.task
        layouts = {name: kind for one in family.encoders(task) for name, kind in one.fields.items()}
        item = Item("plan-0", Path("plan"), "", "", shape.size, shape.size)
        batch = Batch(
            (item,) * shape.batch,
            tuple(range(shape.batch)),
            {
                name: torch.stack([one] * shape.batch) if layouts[name] == "stack" else [one] * shape.batch
                for name, one in fields.items()
            },
        )
        latent = batch["latent"]
        assert isinstance(latent, torch.Tensor)
        # At the part's own noise levels: a family may choose its expert by them.
        sigma = torch.full((shape.batch,), sum(part.sigma_range) / 2)

        def step() -> torch.Tensor:
            said = family.predict({part.name: module}, part.name, batch, latent.float(), sigma)
            return said.square().mean()

        micro = micro_batches(config.memory.micro_batch, part.per_sample, part.name)
        how: dict[str, Any] = {"drop_gradients": config.method.kind == "full", "micro": micro}
        if part.token_wise:  # a video's blocks are of one shape, and of thousands of operators each
            return measure_alike(module, part.block_lists[0], step, **how)
        return measure_step(module, part.block_lists, step, **how)


def way_of(
    config: Config,
    family: Family,
    device: torch.device,
    dtype: torch.dtype,
    shapes: Sequence[Shape],
    earlier: Mapping[str, Any] | None = None,
) -> Way:
    """What the run does, from the largest of the shapes. earlier: `resolved` of run.json, whose base an "auto" keeps.

    Raises UserError when it cannot fit, or when what is asked for does not go together.
    """
    memory = config.memory
    part = family.spec.parts(family.options)[0]
    pieces = pieces_of(family, shapes, family.stride())
    asked = asked_base(config)
    if asked is None and earlier and earlier.get("base") in BASES:
        asked = str(earlier["base"])  # a smaller card may swap more, but not learn other numbers unasked
    if asked == "nf4":
        require_bitsandbytes()
    if memory.shard or (device.type == "cpu" and memory.limit_gb is None):
        base = asked or name_of(dtype)
        count, again = _blocks(family, part, dtype), memory.gradient_checkpointing
        again = device.type != "cpu" if again == "auto" else again
        on_disk = memory.experts_on_disk is True and beside_of(config, family, dtype).on_disk is True
        waiting = (count if on_disk else 0) if memory.blocks_to_swap == "auto" else memory.blocks_to_swap
        _check_swap(waiting, count)
        return Way(
            base,
            _QUANTISED.get(base),
            spread_count(count, count - waiting) if waiting else None,
            frozenset() if again is True else frozenset(range(count)),
            pieces=pieces,
            on_disk=on_disk,
            turn_steps=earlier.get("turn_steps") if earlier else None,
            encoding=encoding_of(config, family, device, dtype, earlier),
        )
    if device.type == "cpu":
        assert memory.limit_gb is not None
        machine = typical_machine(memory.limit_gb)
    else:
        machine = this_machine(device, memory.limit_gb)
    sketched = Sketched(family, part, family.stride(), dtype)
    plan = Reckoning(config, sketched, largest(shapes, sketched), asked).plan(machine)
    turns = len(family.spec.parts(family.options)) > 1
    return replace(
        _way(plan),
        pieces=pieces,
        # Whose turn a step is must not change on resume.
        turn_steps=earlier.get("turn_steps") if earlier else turn_steps_of(plan, config) if turns else None,
        encoding=encoding_of(config, family, device, dtype, earlier),
    )


def pieces_of(family: Family, shapes: Sequence[Shape], stride_px: int) -> int:
    """Tokens of a piece, where a clip is long; else 0."""
    long = any(family.spec.tokens(shape.size, stride_px) > LONG_TOKENS for shape in shapes)
    return PIECE_TOKENS if long else 0


def in_pieces(module: torch.nn.Module, part: Part, pieces: int) -> None:
    """Puts them on a denoiser. pieces: tokens; 0: nothing is done."""
    if pieces and part.token_wise:
        blocks = [block for _, block in blocks_of(module, part.block_lists)]
        chunk_tokens([block.get_submodule(name) for block in blocks for name in part.token_wise], pieces)


def _way(plan: Plan) -> Way:
    choice = plan.best
    residents = frozenset(choice.residents)
    return Way(
        choice.base,
        _QUANTISED.get(choice.base),
        None if len(residents) == choice.blocks else residents,
        frozenset(choice.plain),
        choice.slots,
        plan,
        on_disk=choice.disk_bytes > 0,
    )


class Reckoning:
    """Weights and costs of one model, config and shape: enough for a plan on any machine.

    asked: the base; None: the plan's choice between the precise one and int8
    """

    def __init__(self, config: Config, sketched: Sketched, shape: Shape, asked: str | None = None) -> None:
        memory, lists = config.memory, sketched.part.block_lists
        kept = remembered(config, name_of(sketched.dtype)) if config.method.kind == "full" else None
        bases = [asked] if asked else [name_of(sketched.dtype), *(["int8"] if kept is None else [])]
        self.shape = shape
        self.weights = {
            base: weigh(sketched.module(config, _QUANTISED.get(base)), lists, kept=kept) for base in bases
        }
        self.cost = sketched.cost(config, shape)
        self.learns = None if kept is None else sentence(config, name_of(sketched.dtype))
        self.wishes = Wishes(
            base=asked,
            blocks_to_swap=None if memory.blocks_to_swap == "auto" else memory.blocks_to_swap,
            recompute=None if memory.gradient_checkpointing == "auto" else memory.gradient_checkpointing,
            state_bytes=_STATE_BYTES.get(config.optimizer.name, _OTHER_STATE_BYTES)
            + (8 if config.optimizer.ema else 0),  # the average, and the weights kept while it is shown
            inputs_on_host=memory.activation_offload,
            beside=beside_of(config, sketched.family, sketched.dtype),
        )

    def plan(self, machine: Machine) -> Plan:
        """Raises UserError when nothing fits, with the least that would."""
        try:
            plan = make_plan(self.weights, self.cost, machine, self.wishes)
            return plan if self.learns is None else replace(plan, why=self.learns)
        except UserError:
            beside = self.wishes.beside
            if not beside.drawing_bytes:
                raise
            wishes = replace(self.wishes, beside=replace(beside, drawing_bytes=0))
            return replace(make_plan(self.weights, self.cost, machine, wishes), previews=False)


def largest(shapes: Sequence[Shape], sketched: Sketched) -> Shape:
    """The shape with the most tokens: what has to fit."""
    tokens = sketched.family.spec.tokens

    def weight(shape: Shape) -> int:
        seen = [shape.size, *shape.conditions]
        return shape.batch * sum(tokens(size, sketched.stride_px) for size in seen)

    return max(shapes, key=weight)


def asked_base(config: Config) -> str | None:
    """The base that the config fixes, by its own name here; None for "auto". Raises UserError where it cannot be quantised."""
    refuse_wrong_full(config)
    refuse_wrong_shard(config)
    given = config.memory.base
    if given == "auto":
        return None
    base = _OTHER_NAMES.get(given, given)
    if base == "bf16" and config.memory.dtype == "fp32":
        return "fp32"
    return base


def name_of(dtype: torch.dtype) -> str:
    """A dtype as memory.dtype calls it."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def cap_memory(config: Config, device: torch.device) -> None:
    """Holds this process to memory.vram_gb on a card: what it promises to leave to others is left."""
    limit = config.memory.limit_gb
    if device.type == "cuda" and limit is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        # The driver's context is outside of what the allocator counts.
        share = (limit * GIB - CONTEXT_BYTES) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.01, share)), device)


def denoiser_build(
    way: Way,
    device: torch.device,
    dtype: torch.dtype,
    lists: Sequence[str],
    turns: bool = False,
    absent: bool = False,
) -> Build:
    """Blocks that will wait on the host are never all on the card, nor, where several models take turns, all models.

    absent: another rank of this machine reads them
    """
    host = () if way.residents is None and not turns else tuple(f"{name}.*" for name in lists)
    return Build(dtype=dtype, device=device, quantize=way.quantize, host=host, host_absent=absent)


def fit_denoiser(
    config: Config,
    way: Way,
    module: torch.nn.Module,
    part: Part,
    device: torch.device,
    tell: Callable[[str], None],
    turns: bool = False,
    arena: Arena | None = None,
) -> Fitted:
    """Puts the way on a denoiser with its adapter, or with its own weights training.

    turns: another one has the device in between; tell: hears what waits on the host, now and later; arena: shared by ranks
    """
    folder = shelf_folder(config, way)
    memory = config.memory
    in_pieces(module, part, way.pieces)
    fitted = fit(
        module,
        part.block_lists,
        device,
        residents=way.residents,
        plain=way.plain,
        inputs_on_host=memory.activation_offload,
        micro=micro_batches(memory.micro_batch, part.per_sample, part.name),
        compiled=memory.compile,
        attention=memory.attention,
        slots=way.slots,
        movable=turns and device.type != "cpu",
        trained=config.method.kind == "full",
        tell=tell,
        shelf=None if folder is None or arena is not None else Shelf(folder),  # ranks share what waits
        arena=arena,
    )
    if fitted.engine is not None:
        streamed = len(fitted.engine.layouts) - len(fitted.engine.residents)
        shared = "" if arena is None else f"; {arena.sentence()}"
        tell(f"{streamed} blocks wait on the host; {fitted.engine.pinned}{shared}")
    return fitted


def shelf_folder(config: Config, way: Way) -> Path | None:
    """Where experts wait for their turn: the run's folder, or None, in host memory."""
    return Path(config.run.output_dir) / config.run.name if way.on_disk else None


def correct_plan(way: Way, fitted: Fitted | None, device: torch.device) -> dict[str, int]:
    """The first steps have shown what the plan could only reckon: more or fewer blocks stay on the card from now on.

    Returns what was seen, for run.json; nothing where there is no card or no plan.
    """
    if way.plan is None or fitted is None or device.type != "cuda":
        return {}
    seen = torch.cuda.max_memory_reserved(device) + CONTEXT_BYTES
    free = way.plan.machine.vram_bytes - seen
    fitted.correct(int(free * _USED_OF_FREE) if free > 0 else free)
    return {"peak_bytes": seen, "planned_bytes": way.plan.best.peak_bytes}


def _blocks(family: Family, part: Part, dtype: torch.dtype) -> int:
    module = family.load(partial(sketch_module, dtype=dtype))[part.name]
    return len(blocks_of(module, part.block_lists))


def _check_swap(waiting: int, count: int) -> None:
    if waiting > count:
        raise UserError(
            "{asked} blocks are to wait on the host, but the model has {count}",
            where="memory.blocks_to_swap",
            mend='give at most {count}, or "auto"',
            asked=waiting,
            count=count,
        )
