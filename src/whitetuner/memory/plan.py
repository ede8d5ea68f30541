"""How a model fits a card: which base, which blocks stay, which are computed again, from real shapes and one number.

    seconds = max(T_f, E_f + V_f / link) + max(T_b, E_b + V_b / link)
with T the computing time of a pass, V the bytes of the blocks that it has to load, and E the time in which the link must
rest: at a turn the slots are full of what is needed next, until the outermost streamed block is done with. All bytes come
from the model's own shapes (`weigh`, measure.measure_step); the speeds from machine.py, corrected by the first steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from typing import Any

from whitetuner.errors import EXIT_ENVIRONMENT, UserError
from whitetuner.memory.beside import ALONE, Beside, has_room
from whitetuner.memory.machine import CONTEXT_BYTES, GIB, Machine
from whitetuner.memory.measure import StepCost
from whitetuner.memory.swap.host import PIN_SHARE
from whitetuner.memory.swap.layout import slot_bytes, spread, units
from whitetuner.memory.weigh import Weights

#: Bases from the most precise to the smallest, with the time of a step relative to bf16 (the dequantising of a weight costs
#: as much as 1/N of its products with N tokens; measured 1.03 for int8 at N = 2048).
BASES = {"fp32": 1.0, "bf16": 1.0, "int8": 1.03, "fp8": 1.04, "nf4": 1.08}
#: A more precise base is taken when it is at most this much slower than the fastest.
_WORTH = 1.05
#: Slots where there is a choice. Three rather than two and one more resident block, which take the same memory and load the
#: same bytes: with two the link rests whenever the next blocks are residents (on the simulated link at worst 1.12 x the bound
#: with two, 1.06 with three).
SLOTS = 3
#: Share of the link's speed in each direction while both are used (reported for OneTrainer: 1.5 times in all).
_DUPLEX = 0.75
#: Unusable remainders between tensors in the caching allocator, as a share of what is not weights.
_FRAGMENTS = 0.05


def in_seconds(seconds: float) -> str:
    """ "0.52 s", "280 s": two digits, whole seconds from 100 on."""
    return f"{seconds:.0f} s" if seconds >= 100 else f"{seconds:.2g} s"


@dataclass(frozen=True)
class Choice:
    """One way to fit. residents: blocks that stay;  plain: blocks that are not computed again;  disk_bytes: of models that
    wait for their turn in files;  up_bytes, down_bytes: over the link in a step.
    """

    base: str
    residents: tuple[int, ...]
    plain: tuple[int, ...]
    slots: int
    blocks: int
    peak_bytes: int
    host_bytes: int
    computing_s: float
    seconds: float
    parts: Mapping[str, int] = field(compare=False)
    disk_bytes: int = 0
    up_bytes: int = 0
    down_bytes: int = 0

    @property
    def streamed(self) -> int:
        return self.blocks - len(self.residents)

    def sentence(self) -> str:
        """'int8 weights, 11 of 25 blocks streamed, 20 computed again: 10.9 GB, about 1.9 s a step.'"""
        blocks = "all blocks on the card"
        if self.streamed:
            blocks = f"{self.streamed} of {self.blocks} blocks streamed from host memory"
        again = self.blocks - len(self.plain)
        kept = "no activations computed again"
        if again:
            kept = "activations computed again" if again == self.blocks else f"{again} blocks computed again"
        lost = self.seconds / self.computing_s - 1
        speed = "full speed" if lost < 0.01 else f"{lost:.0%} of it added by waiting for weights"
        waits = f"{self.disk_bytes / GIB:.0f} GB on disk for experts that wait, " if self.disk_bytes else ""
        if self.down_bytes:
            waits += f"{self.up_bytes / GIB:.0f} GB up and {self.down_bytes / GIB:.0f} GB down in a step, "
        return (
            f"{self.base} weights, {blocks}, {kept}: {self.peak_bytes / GIB:.1f} GB on the card, "
            f"{self.host_bytes / GIB:.0f} GB on the host, {waits}about {in_seconds(self.seconds)} a step ({speed})"
        )


@dataclass(frozen=True)
class Plan:
    """Up to three choices, the recommended one first, and what two more GB would change.

    previews: False: the host has no room for the expert that they need besides
    """

    machine: Machine
    choices: tuple[Choice, ...]
    why: str
    seconds_with_2gb_more: float
    previews: bool = True

    @property
    def best(self) -> Choice:
        return self.choices[0]

    def words(self) -> list[str]:
        """The plan in sentences."""
        speeds = "measured" if self.machine.measured else "assumed"
        lines = [
            f"{self.machine.vram_bytes / GIB:.1f} GB on {self.machine.name} "
            f"({self.machine.flops_per_s / 1e12:.0f} TFLOP/s, link {self.machine.link_bytes_per_s / 1e9:.0f} GB/s, {speeds})",
            f"chosen: {self.best.sentence()}",
            self.why,
        ]
        lines += [f"or: {choice.sentence()}" for choice in self.choices[1:]]
        gain = 1 - self.seconds_with_2gb_more / self.best.seconds
        if not self.previews:
            lines.append("no previews: the host has no room for the other expert, with which they are drawn")
        lines.append(
            f"2 GB more would save {gain:.0%} of the time"
            if gain > 0.005
            else "2 GB more would not make it faster"
        )
        return lines

    def to_json(self) -> dict[str, Any]:
        return {
            "machine": asdict(self.machine),
            "why": self.why,
            "seconds_with_2gb_more": self.seconds_with_2gb_more,
            "previews": self.previews,
            "choices": [{**asdict(choice), "sentence": choice.sentence()} for choice in self.choices],
        }


@dataclass(frozen=True)
class Wishes:
    """What the config fixes; None is left to the plan.

    blocks_to_swap: how many blocks wait on the host;  recompute: all blocks (True) or none (False)
    slots:          for the streamed blocks; at least 2;  beside: models that take turns with this one
    state_bytes:    of the optimizer for each trained weight, beside the weight and its gradient (4 bytes each)
    """

    base: str | None = None
    blocks_to_swap: int | None = None
    recompute: bool | None = None
    slots: int | None = None
    state_bytes: int = 8
    inputs_on_host: bool = False
    beside: Beside = ALONE


def make_plan(
    weights: Mapping[str, Weights], cost: StepCost, machine: Machine, wishes: Wishes = Wishes()
) -> Plan:
    """weights: base -> bytes in it, of the bases that may be chosen; cost: of one step at the training resolution.

    Raises UserError when nothing fits: the least that is needed, what drives it, and the nearest that does fit.
    """
    if wishes.base is not None:
        weights = {wishes.base: weights[wishes.base]}
    count = len(cost.blocks)
    if wishes.blocks_to_swap is not None and wishes.blocks_to_swap > count:
        raise UserError(
            "{asked} blocks are to wait on the host, but the model has {count}",
            where="memory.blocks_to_swap",
            mend='give at most {count}, or "auto"',
            asked=wishes.blocks_to_swap,
            count=count,
        )
    every = [choice for base in weights for choice in _choices(base, weights[base], cost, machine, wishes)]
    fitting = [c for c in every if c.peak_bytes <= machine.vram_bytes]
    if not fitting:
        raise _too_small(every, machine)
    affordable = [c for c in fitting if has_room(c.host_bytes, machine)]
    if not affordable:
        least = min(fitting, key=lambda c: c.host_bytes)
        raise UserError(
            "the host has {have:.0f} GB of memory, of which {share:.0%} can be pinned: too little for any way to fit the card",
            where="memory.vram_gb",
            mend="the nearest that fits needs {need:.0f} GB: {way}",
            code=EXIT_ENVIRONMENT,
            have=machine.host_bytes / GIB,
            share=PIN_SHARE,
            need=least.host_bytes / GIB,
            way=least.sentence(),
        )
    chosen, why = _recommend(affordable)
    others = [
        min(affordable, key=lambda c: (_rank(c), c.seconds, c.streamed)),
        min(affordable, key=lambda c: (c.seconds, c.streamed)),
        min(affordable, key=lambda c: (c.peak_bytes, c.seconds)),
    ]
    choices = list(dict.fromkeys([chosen, *others]))[:3]
    larger = replace(machine, vram_bytes=machine.vram_bytes + 2 * GIB)
    more = [c for base in weights for c in _choices(base, weights[base], cost, larger, wishes)]
    seconds = [
        c.seconds for c in more if c.peak_bytes <= larger.vram_bytes and has_room(c.host_bytes, machine)
    ]
    return Plan(machine, tuple(choices), why, min([*seconds, chosen.seconds]))


def _rank(choice: Choice) -> int:
    return list(BASES).index(choice.base)


def _recommend(choices: Sequence[Choice]) -> tuple[Choice, str]:
    fastest = min(choices, key=lambda c: (c.seconds, _rank(c), c.peak_bytes))
    near = [c for c in choices if c.seconds <= fastest.seconds * _WORTH]
    chosen = min(near, key=lambda c: (_rank(c), c.seconds, c.streamed, c.peak_bytes))
    bases = {c.base for c in choices}
    if len(bases) == 1:
        return chosen, f"{chosen.base} was asked for or is the only base that fits"
    better = [base for base in BASES if base in bases and list(BASES).index(base) < _rank(chosen)]
    if not better:
        return chosen, f"{chosen.base} is taken because it fits at (nearly) full speed"
    slower = min(c.seconds for c in choices if c.base == better[-1]) / chosen.seconds - 1
    return (
        chosen,
        f"{chosen.base} rather than {better[-1]}, which would be {slower:.0%} slower in this memory",
    )


def _too_small(every: Sequence[Choice], machine: Machine) -> UserError:
    least = min(every, key=lambda c: c.peak_bytes)
    parts = sorted(least.parts.items(), key=lambda item: -item[1])
    return UserError(
        "{have:.1f} GB are too little: at least {need:.1f} GB are needed ({parts})",
        where="memory.vram_gb",
        mend="the least that works: {way}. A lower data.resolution, batch size or number of frames needs less still",
        code=EXIT_ENVIRONMENT,
        have=machine.vram_bytes / GIB,
        need=least.peak_bytes / GIB,
        parts=", ".join(f"{name} {size / GIB:.2f}" for name, size in parts if size > 0.005 * GIB),
        way=least.sentence(),
    )


def _choices(base: str, weights: Weights, cost: StepCost, machine: Machine, wishes: Wishes) -> list[Choice]:
    """Every number of residents with as many blocks not computed again as fit beside them."""
    sizes = weights.blocks
    count, total = len(sizes), sum(weights.blocks)
    if wishes.blocks_to_swap is not None:
        budgets = [_bytes_of(sizes, count - wishes.blocks_to_swap)]
    else:
        budgets = [total * k // count for k in range(count)] + [total]
    found = sorted({spread(sizes, budget) for budget in budgets}, key=lambda k: (len(k), sorted(k)))
    asked = wishes.slots
    ways = [(kept, asked or SLOTS) for kept in found]
    if asked is None:
        ways += [(kept, 2) for kept in found if not kept or wishes.blocks_to_swap is not None]
    return [_choice(base, weights, cost, machine, wishes, kept, slots) for kept, slots in ways]


def _bytes_of(sizes: Sequence[int], residents: int) -> int:
    """The bytes with which `spread` keeps this many blocks, or as many as it can below."""
    low, high = 0, sum(sizes)
    while low < high:
        middle = (low + high + 1) // 2
        if len(spread(sizes, middle)) <= residents:
            low = middle
        else:
            high = middle - 1
    return low


def _choice(
    base: str,
    weights: Weights,
    cost: StepCost,
    machine: Machine,
    wishes: Wishes,
    residents: frozenset[int],
    slots: int,
) -> Choice:
    sizes = weights.blocks
    streamed = [i for i in range(len(sizes)) if i not in residents]
    groups = units(sizes, streamed)
    fixed = {
        "context": CONTEXT_BYTES,
        "resident blocks": sum(sizes[i] for i in residents),
        "slots": min(slots, len(groups)) * slot_bytes([sizes[i] for i in streamed]),
        "other weights": weights.rest,
        "adapter and optimizer": weights.trained * (8 + wishes.state_bytes),
    }
    whole = weights.whole
    if whole is not None:
        fixed |= whole.on_device(streamed)
    plain = _plain(cost, machine, wishes, sum(fixed.values()))
    activations = _activations(cost, wishes, plain)
    sent = _sent(cost, wishes, plain)
    parts = {**fixed, "activations": activations}
    slower = BASES[base]
    forward = cost.flops_forward * slower / machine.flops_per_s
    backward = (cost.flops_backward + cost.flops_again(plain)) * slower / machine.flops_per_s
    moved = sum(sizes[i] for i in streamed)
    first = sum(sizes[i] for group in groups[:slots] for i in group)
    last = sum(sizes[i] for group in groups[-slots:] for i in group)
    resting = 0.0
    if len(groups) > slots:
        flops = [block.flops for block in cost.blocks]
        outer = sum(flops[: streamed[0] + 1]) + sum(flops[streamed[-1] :])
        resting = outer / cost.flops_forward if cost.flops_forward else 0.0
    seconds = max(forward, forward * resting + (cost.forwards * moved - first) / machine.link_bytes_per_s)
    loaded = cost.backwards * moved - last + sent
    small = weights.rest + weights.trained * (4 + wishes.state_bytes)
    down, link, more = sent, machine.link_bytes_per_s, 0
    if whole is not None:
        state = whole.state_moved(streamed)
        loaded, down = loaded + state, down + whole.written_back(streamed) + state
        backward += whole.update_s(machine.flops_per_s)
        link *= _DUPLEX if streamed else 1
        more = whole.on_host(streamed) + wishes.beside.learners * whole.on_host(range(len(sizes)))
        small += ceil(whole.rest_numbers * whole.kept.state)
    seconds += max(backward, backward * resting + max(loaded, down if whole else 0) / link)
    host = wishes.beside.held(sum(sizes), small, bool(streamed), sent + more, machine)
    return Choice(
        base,
        tuple(sorted(residents)),
        tuple(sorted(plain)),
        slots,
        len(sizes),
        sum(parts.values()),
        host.host_bytes,
        forward + backward,
        seconds,
        parts,
        host.disk_bytes,
        cost.forwards * moved - first + loaded if streamed else sent,
        down,
    )


def _sent(cost: StepCost, wishes: Wishes, plain: Sequence[int]) -> int:
    """Bytes of inputs that wait on the host."""
    kept = frozenset(plain)
    return (
        sum(b.input_bytes for i, b in enumerate(cost.blocks) if i not in kept) if wishes.inputs_on_host else 0
    )


def _activations(cost: StepCost, wishes: Wishes, plain: Sequence[int]) -> int:
    peak = cost.peak_with(plain)
    sent = _sent(cost, wishes, plain)
    if sent:  # two are on the device: the one in use and the one that comes
        peak -= max(0, sent - 2 * max(block.input_bytes for block in cost.blocks))
    return int(peak * (1 + _FRAGMENTS))


def _plain(cost: StepCost, machine: Machine, wishes: Wishes, fixed: int) -> list[int]:
    """Blocks not to compute again, those that save the most time for their bytes first, as many as fit."""
    if wishes.recompute is not None:
        return [] if wishes.recompute else list(range(len(cost.blocks)))
    order = sorted(
        range(len(cost.blocks)),
        key=lambda i: -cost.blocks[i].flops / max(1, cost.blocks[i].saved_bytes - cost.blocks[i].input_bytes),
    )
    low, high = 0, len(order)
    while low < high:  # the peak grows with the number, so the largest that fits is found by halving
        middle = (low + high + 1) // 2
        if fixed + _activations(cost, wishes, order[:middle]) <= machine.vram_bytes:
            low = middle
        else:
            high = middle - 1
    return order[:low]
