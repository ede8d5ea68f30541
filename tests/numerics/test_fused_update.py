"""Full training block by block: the bits of plain training, the memory of one block, no copy more than needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from swap_standins import LISTS, Net, inputs
from torch import Tensor, nn

from whitetuner.errors import UserError
from whitetuner.family import Part
from whitetuner.memory.fit import fit
from whitetuner.memory.swap.backend import CpuBackend
from whitetuner.memory.swap.state import StateRing
from whitetuner.train.block_optimizer import decaying
from whitetuner.train.optim import make_optimizer
from whitetuner.train.precision import (
    Precision,
    beside,
    joined,
    key_of,
    precise,
    put,
    random16,
    round_stochastic,
    split,
)
from whitetuner.train.whole import WholeLearner, WholeSettings

CPU = torch.device("cpu")
PART = Part("transformer", LISTS)
STEPS = 5


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net(pairs=2, singles=4).requires_grad_(True).to(dtype)


def make(name: str, parameters: Any, decay: bool = True) -> torch.optim.Optimizer:
    return make_optimizer(name, parameters, lr=1e-2, weight_decay=0.1 if decay else 0.0)


def loss_of(model: nn.Module, step: int) -> Tensor:
    dtype = next(model.parameters()).dtype
    return model(*(one.to(dtype) for one in inputs(step))).float().square().mean()


def learner(
    residents: int | None,
    *,
    name: str = "adamw",
    precision: Precision = "fp32",
    recompute: bool = False,
    seed: int | None = 1,
    clip: Any = "previous",
    ema: float = 0.0,
) -> WholeLearner:
    model = net(torch.float32 if precision == "fp32" else torch.bfloat16)
    model.to_json_string = lambda: "{}"  # type: ignore[assignment]  # as diffusers' models have it
    kept = None if residents is None else range(1, 1 + residents)
    plain = () if recompute else range(6)
    backend = CpuBackend(seed)
    fitted = fit(
        model, LISTS, CPU, residents=kept, plain=plain, trained=True, backend=backend, tell=lambda _: None
    )
    trained = dict(model.named_parameters())
    found = WholeLearner(
        PART, model, trained, partial(make, name), WholeSettings(7, precision, clip), fitted, CPU, ema
    )
    found.states.smallest_bytes = 64  # these blocks are tiny
    return found


def passes(one: WholeLearner, step: int, count: int = 1) -> float:
    total = 0.0
    for number in range(count):
        loss = loss_of(one.module, step * 10 + number) / count
        one.pass_begins(number == count - 1)
        loss.backward()
        one.pass_ends()
        total += loss.item()
    return total


def learn(one: WholeLearner, steps: int = STEPS, *, count: int = 1, limit: float = 0.0) -> list[float]:
    seen = []
    for _ in range(steps):
        seen.append(one.run(lambda: passes(one, one.steps, count), 1e-2, limit))
        one.apply(1e-2)
    return seen


def weights(one: WholeLearner) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in one.weights().items()}


def plain(name: str = "adamw", count: int = 1) -> tuple[list[float], dict[str, Tensor]]:
    """The loop of every tutorial, over the same classes."""
    model = net()
    decays = decaying(model, dict(model.named_parameters()))
    groups = [[p for n, p in model.named_parameters() if (n in decays) == wanted] for wanted in (True, False)]
    optimizers = [make(name, group, decay) for group, decay in zip(groups, (True, False))]
    seen = []
    for step in range(STEPS):
        total = 0.0
        for number in range(count):
            loss = loss_of(model, step * 10 + number) / count
            loss.backward()
            total += loss.item()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seen.append(total)
    return seen, model.state_dict()


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


@pytest.mark.parametrize(
    ("residents", "recompute", "count"),
    [
        (None, False, 1),
        (None, True, 3),
        (0, False, 3),
        (0, True, 1),
        (2, False, 1),
        (2, True, 3),
        (5, True, 1),
    ],
)
def test_updated_block_by_block_is_plain_training_to_the_bit(
    residents: int | None, recompute: bool, count: int
) -> None:
    losses, wanted = plain(count=count)
    one = learner(residents, recompute=recompute)
    assert learn(one, count=count) == losses
    assert same(weights(one), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "adafactor", "adamw8bit"])
def test_every_optimizer_does_what_it_does_over_everything(name: str) -> None:
    losses, wanted = plain(name)
    for residents in (None, 1):
        one = learner(residents, name=name)
        assert learn(one) == losses and same(weights(one), wanted)


@pytest.mark.parametrize(
    "precision",
    ["bf16_stochastic", "fp32_master", *(pytest.param(p, marks=pytest.mark.slow) for p in ("kahan", "bf16"))],
)
def test_no_residency_changes_a_bit_of_any_precision(precision: Precision) -> None:
    first = learner(None, precision=precision)
    wanted = learn(first), weights(first)
    for residents, seed in ((0, None), (3, 4)):
        one = learner(residents, precision=precision, seed=seed)
        assert learn(one) == wanted[0] and same(weights(one), wanted[1])


@pytest.mark.parametrize("precision", ["fp32", "bf16_stochastic", "kahan", "fp32_master"])
@pytest.mark.parametrize("name", ["adamw", pytest.param("adafactor", marks=pytest.mark.slow)])
def test_saved_and_loaded_goes_on_to_the_bit_with_other_residents(precision: Precision, name: str) -> None:
    whole = learner(2, precision=precision, name=name, ema=0.9)
    losses = learn(whole, limit=0.5)
    half = learner(None, precision=precision, name=name, ema=0.9)
    learn(half, 2, limit=0.5)
    tensors, documents = half.save()
    copied = {file: {k: t.clone() for k, t in group.items()} for file, group in tensors.items()}
    again = learner(1, precision=precision, name=name, ema=0.9)
    again.load(copied, documents)
    assert learn(again, 3, limit=0.5) == losses[2:]
    one, two = whole.save(), again.save()
    assert one[1] == two[1] and all(same(one[0][file], two[0][file]) for file in one[0])


def test_other_precision_or_targets_are_refused_on_load() -> None:
    one = learner(None, precision="kahan")
    learn(one, 1)
    tensors, documents = one.save()
    with pytest.raises(UserError, match=r"other method\.precision"):
        learner(None, precision="fp32_master").load(tensors, documents)


@pytest.mark.parametrize(("residents", "recompute"), [(k, bool(k % 2)) for k in range(7)])
def test_one_blocks_gradients_live_and_no_copy_is_made_twice(residents: int, recompute: bool) -> None:
    one = learner(residents if residents < 6 else None, recompute=recompute)
    learn(one, 2)
    counted = []
    engine = one.fitted.engine

    def step_end() -> Any:
        done = engine.step_end()  # type: ignore[union-attr]
        counted.append(done)
        return done

    one.fitted.step_end = step_end  # type: ignore[method-assign]
    if engine is not None:
        learn(one, 2)
    blocks = [unit for unit in one.updates.units if unit.index is not None]
    largest = max(sum(p.nbytes for p in unit.parameters.values()) for unit in blocks)
    assert 0 < one.updates.peak_gradient_bytes <= largest
    if engine is None:
        return
    streamed = [i for i in range(6) if i not in engine.residents]
    for done in counted:
        assert done.copies_back == len(streamed), (
            "each streamed block is written back once a step, residents never"
        )
        assert done.loads <= 2 * (len(streamed) - len(engine.placement.buffers)) + 1
    state = max(
        (
            sum(t.nbytes for t in one.optimizers[u.name].tensors()) + 256 * 40
            for u in blocks
            if u.index in streamed
        ),
        default=0,
    )
    assert one.states.device_bytes <= 2 * state
    slots = len(engine.placement.buffers) * max((engine.layouts[i].num_bytes for i in streamed), default=0)
    kept = sum(engine.layouts[i].num_bytes for i in engine.residents)
    assert engine.placement.device_bytes <= kept + slots * 1.05


def test_a_resident_is_written_back_when_it_is_asked_for() -> None:
    one = learner(3)
    learn(one, 2)
    engine = one.fitted.engine
    assert engine is not None
    before = weights(one)
    engine.evict()
    assert same(weights(one), before)
    found = dict(one.module.named_parameters())
    assert all(torch.equal(found[name].data, tensor) for name, tensor in before.items() if name in found)


@pytest.mark.parametrize("clip", ["previous", "block"])
def test_clipping_does_what_it_says(clip: str) -> None:
    limit = 0.05
    one = learner(None, clip=clip)
    seen: list[float] = []
    update = one.optimizers["pairs.0"].step

    def watched(gradients: dict[str, Tensor], lr: float, scale: float, key: Callable[[str], int]) -> None:
        own = float(torch.stack([g.norm() for g in gradients.values()]).norm())
        against = own if clip == "block" else one.norm
        assert scale == pytest.approx(min(1.0, limit / against) if against else 1.0)
        seen.append(scale)
        update(gradients, lr, scale, key)

    one.optimizers["pairs.0"].step = watched  # type: ignore[method-assign]
    learn(one, 3, limit=limit)
    assert min(seen) < 1 and (seen[0] == 1.0) == (clip == "previous")


def test_the_shared_gradients_are_those_that_are_used() -> None:
    order: list[str] = []

    def halve(unit: str, gradients: Mapping[str, Tensor]) -> None:
        order.append(unit)
        for gradient in gradients.values():
            gradient.mul_(0.5)

    one, two = learner(2), learner(2)
    one.updates.share = halve
    learn(one, 1)
    two.run(lambda: _half(two), 1e-2, 0.0)
    two.apply(1e-2)
    assert same(weights(one), weights(two))
    assert order == [f"singles.{i}" for i in (3, 2, 1, 0)] + ["pairs.1", "pairs.0", "rest"]


def _half(one: WholeLearner) -> None:
    one.pass_begins(True)
    (loss_of(one.module, 0) * 0.5).backward()
    one.pass_ends()


def test_an_average_is_shown_and_taken_off_to_the_bit() -> None:
    one = learner(2, ema=0.5)
    learn(one, 3)
    before = weights(one)
    with one.averaged():
        inside = weights(one)
        assert one.ema is not None
        assert all(torch.equal(inside[name], average) for name, average in one.ema.average.items())
        assert not same(inside, before)
    assert same(weights(one), before)


def test_out_of_memory_before_an_update_changes_no_bit_and_after_it_is_told() -> None:
    wanted = learner(4)
    losses = learn(wanted)
    one, broken = learner(4), []

    def attempt() -> float:
        if one.steps == 1 and not broken:
            broken.append(1)
            loss_of(one.module, 10)
            raise torch.OutOfMemoryError("forward")
        return passes(one, one.steps)

    seen = []
    for _ in range(STEPS):
        seen.append(one.run(attempt, 1e-2, 0.0))
        one.apply(1e-2)
    assert seen == losses and same(weights(one), weights(wanted)) and broken

    def late() -> float:
        passes(one, one.steps)
        raise torch.OutOfMemoryError("after the updates")

    with pytest.raises(UserError, match="in the middle of an update"):
        one.run(late, 1e-2, 0.0)


def test_a_bad_gradient_is_not_applied_to_its_block() -> None:
    one = learner(2)
    learn(one, 1)
    with pytest.raises(UserError, match="not finite in step 2") as told:
        one.run(lambda: _poisoned(one), 1e-2, 0.0)
    assert "pairs.1" in str(told.value) or "singles" in str(told.value)
    assert all(torch.isfinite(tensor).all() for tensor in weights(one).values())


def _poisoned(one: WholeLearner) -> None:
    one.pass_begins(True)
    loss = loss_of(one.module, 1)
    handle = one.module.singles[1].up.weight.register_hook(lambda g: g * float("nan"))  # type: ignore[union-attr, index]
    try:
        loss.backward()
    finally:
        handle.remove()


# ---- precision


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_a_float32_weight_comes_back_from_its_halves_to_the_bit(numbers: list[float]) -> None:
    value = torch.tensor(numbers, dtype=torch.float32)
    high, low = split(value)
    assert torch.equal(joined(high, low).view(torch.int32), value.view(torch.int32))
    near = (high.double() - value.double()).abs() <= (
        value.to(torch.bfloat16).double() - value.double()
    ).abs()
    assert bool((near | ~torch.isfinite(high)).all()), "the high half is a nearest bf16 number"


@pytest.mark.parametrize("base", [1.0, -3.7e-3, 2.5e-30])
def test_random_rounding_is_right_on_average_and_goes_to_a_neighbour(base: float) -> None:
    value = torch.full((1 << 18,), base) * torch.linspace(1, 1.01, 1 << 18)
    target = torch.empty_like(value, dtype=torch.bfloat16)
    total = torch.zeros_like(value, dtype=torch.float64)
    for step in range(32):
        round_stochastic(target, value.clone(), key_of(1, step, "w"))
        assert bool(((target.float() - value).abs() < value.abs() * 2**-7).all())
        total += target.double()
    error = (total / 32 - value.double()) / value.double().abs()
    # deviation of one rounding below 2^-8 / sqrt(12) relative; the mean of 2^23 of them lies within 5 / 2896 of that
    assert abs(float(error.mean())) < 2**-8 / 12**0.5 * 5 / 2896
    exact = value.to(torch.bfloat16)
    round_stochastic(target, exact.float(), 5)
    assert torch.equal(target, exact), "what bf16 holds stays"


def test_random_numbers_are_even_independent_of_chunks_and_of_each_other() -> None:
    found = random16(0, 1 << 20, key_of(3, 1, "w"), CPU)
    assert torch.equal(found[4096:8192], random16(4096, 4096, key_of(3, 1, "w"), CPU))
    counts = torch.bincount(found >> 8, minlength=256).double()
    chi = float(((counts - 4096) ** 2 / 4096).sum())
    assert 150 < chi < 380  # 255 degrees of freedom: within five deviations
    unit = found.double() / 32768 - 1
    others = [random16(0, 1 << 20, key_of(*key), CPU) for key in ((3, 2, "w"), (4, 1, "w"), (3, 1, "v"))]
    for other in [*(one.double() / 32768 - 1 for one in others), unit.roll(1), unit.roll(2)]:
        assert abs(float((unit * other).mean())) < 5 / 3 / 1024


def test_what_is_not_finite_stays_so() -> None:
    value = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0])
    target = torch.empty(5, dtype=torch.bfloat16)
    round_stochastic(target, value.clone(), 9)
    assert torch.equal(target.float().nan_to_num(7), value.nan_to_num(7))


@pytest.mark.parametrize("precision", ["bf16_stochastic", "kahan", "fp32_master", "bf16"])
def test_a_thousand_small_steps_arrive(precision: Precision) -> None:
    """measure.md 3: a bf16 weight of 1 loses every step of 1e-4; only rounding to the nearest does."""
    weight = torch.ones(4096, dtype=torch.bfloat16)
    kept = beside(weight, precision)
    for step in range(1000):
        put(weight, kept, precise(weight, kept).sub_(1e-4), precision, key_of(0, step, "w"))
    arrived = 1 - float(precise(weight, kept).mean())
    assert arrived == 0 if precision == "bf16" else arrived == pytest.approx(0.1, rel=0.02)


def test_norms_biases_and_tables_do_not_decay() -> None:
    model = net()
    model.token = nn.Parameter(torch.zeros(1, 4))  # type: ignore[assignment]
    found = decaying(model, dict(model.named_parameters()))
    assert "pairs.0.image.up.weight" in found and "embed.weight" in found
    assert not any(name.endswith("bias") or ".norm." in name or name == "token" for name in found)


def test_a_state_without_engine_stays_where_it_is() -> None:
    ring = StateRing()
    with ring.present(None, 3, lambda: []):
        pass
    assert ring.device_bytes == ring.host_bytes == 0


@pytest.mark.parametrize("shared", [True, False])
def test_a_shared_master_holds_every_earlier_block_when_the_ranks_speak(shared: bool) -> None:
    """A rank's copy back that is still on its way then could later write over what a faster rank has learned since."""
    one = learner(0, seed=None)  # copies back are as late as they may be
    engine = one.engine
    assert engine is not None
    engine.shared = shared
    before = [engine.master(index).clone() for index in range(len(engine.layouts))]
    updated: list[int] = []
    late: list[int] = []

    def speak(name: str, gradients: dict[str, Tensor]) -> None:
        late.extend(index for index in updated if torch.equal(engine.master(index), before[index]))
        updated.extend(i for i, layout in enumerate(engine.layouts) if layout.path == name)

    one.updates.share = speak
    learn(one, 1)
    assert len(updated) == 6 and bool(late) != shared
