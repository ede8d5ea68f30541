"""A plan put on a model: everything together changes no bit, and comes off again."""

from __future__ import annotations

import pytest
import torch
from swap_standins import LISTS, Net, Setup, build, inputs
from test_memory_recompute import LISTS as FLUX_LISTS
from test_memory_recompute import loss_of, model

from whitetuner.errors import UserError
from whitetuner.memory.fit import Fitted, backend_for, fit
from whitetuner.memory.kernels import ATTENTION, compile_blocks, set_attention
from whitetuner.memory.swap.backend import CpuBackend

torch.set_num_threads(1)


def gradients(net: Net, fitted: Fitted | None = None) -> list[torch.Tensor]:
    for step in range(3):

        def run(step: int = step) -> None:
            net(*inputs(step)).square().mean().backward()

        run() if fitted is None else fitted.run(run, net.zero_grad)
    return [p.grad for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("inputs_on_host", [False, True])
@pytest.mark.parametrize("plain", [(), (0, 4), range(6)])
@pytest.mark.parametrize("residents", [None, (), (1, 3), range(6)])
def test_everything_together_changes_no_bit(
    residents: tuple[int, ...] | None, plain: tuple[int, ...], inputs_on_host: bool
) -> None:
    wanted = gradients(build(Setup()))
    net = build(Setup())
    fitted = fit(
        net,
        LISTS,
        "cpu",
        residents=residents,
        plain=plain,
        inputs_on_host=inputs_on_host,
        backend=CpuBackend(3),
    )
    assert (fitted.engine is None) == (residents is None or len(residents) == 6)
    assert all(torch.equal(a, b) for a, b in zip(gradients(net, fitted), wanted, strict=True))
    assert fitted.recompute.runs == [3 if i in plain else 6 for i in range(6)]
    assert fitted.step_end().copies_back == 0
    fitted.remove()
    assert all("forward" not in m.__dict__ for m in net.modules())
    net.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(gradients(net), wanted, strict=True))


def test_a_model_that_takes_turns_can_leave_though_all_of_it_stays_while_it_runs() -> None:
    wanted = gradients(build(Setup()))
    net = build(Setup())
    fitted = fit(net, LISTS, "cpu", plain=range(6), movable=True, backend=CpuBackend(3))
    assert fitted.engine is not None and len(fitted.engine.residents) == 6
    fitted.make_room()
    assert all(torch.equal(a, b) for a, b in zip(gradients(net, fitted), wanted, strict=True))
    fitted.make_room()
    fitted.remove()


@pytest.mark.parametrize("free_blocks", [-9, -2, 0, 2, 9])
def test_correcting_the_plan_between_steps_changes_no_bit(free_blocks: int) -> None:
    wanted = gradients(build(Setup()))
    net, told = build(Setup()), []
    fitted = fit(net, LISTS, "cpu", residents=(1, 3, 4), backend=CpuBackend(3), tell=told.append)
    assert fitted.engine is not None
    sizes = [layout.num_bytes for layout in fitted.engine.layouts]
    for step in range(3):
        fitted.run(lambda step=step: net(*inputs(step)).square().mean().backward(), net.zero_grad)
        if step == 0:
            fitted.correct(free_blocks * max(sizes))
    found = [p.grad for p in net.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    held = sum(sizes[i] for i in fitted.engine.residents)
    assert held <= max(0, sum(sizes[i] for i in (1, 3, 4)) + free_blocks * max(sizes))
    assert bool(told) == (free_blocks != 0)
    fitted.remove()


def test_a_resident_model_begins_to_swap_when_memory_runs_out() -> None:
    wanted = gradients(build(Setup()))
    net, told, broken = build(Setup()), [], []
    fitted = fit(net, LISTS, "cpu", backend=CpuBackend(3), tell=told.append)
    assert fitted.engine is None
    for step in range(3):

        def run(step: int = step) -> None:
            net(*inputs(step)).square().mean().backward()
            if step == 1 and not broken:
                broken.append(step)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

        before = [None if p.grad is None else p.grad.clone() for p in net.parameters()]

        def forget(before: list[torch.Tensor | None] = before) -> None:
            for parameter, gradient in zip(net.parameters(), before, strict=True):
                parameter.grad = gradient

        fitted.run(run, forget)
    assert fitted.engine is not None and len(fitted.engine.residents) < 6 and "run again" in told[0]
    found = [p.grad for p in net.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    fitted.remove()


def test_compiled_blocks_are_fitted_too() -> None:
    torch._dynamo.reset()
    net, wanted = build(Setup(pairs=0, singles=4)), build(Setup(pairs=0, singles=4))
    compile_blocks(wanted, LISTS[1:], backend="aot_eager")
    compiled = compile_blocks(net, LISTS[1:], backend="aot_eager")
    fitted = fit(net, LISTS[1:], "cpu", residents=(1,), plain=(0,), backend=CpuBackend(0))
    assert all(torch.equal(a, b) for a, b in zip(gradients(net, fitted), gradients(wanted), strict=True))
    fitted.remove()
    compiled.remove()
    assert all("forward" not in m.__dict__ for m in net.modules())


@pytest.mark.parametrize("name", ["native", "math", "native_flash"])
def test_attention_backends_that_train_give_gradients(name: str) -> None:
    plain, other = model(), model()
    set_attention(other, name)
    loss_of(plain).backward()
    loss_of(other).backward()
    for (key, a), b in zip(plain.named_parameters(), other.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), key
        if a.grad is not None:
            assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-7), key


def test_an_attention_backend_is_of_its_model_alone() -> None:
    untouched, chosen = model(), model()
    before = loss_of(untouched)
    set_attention(chosen, "math")
    assert torch.equal(loss_of(untouched), before) and torch.equal(loss_of(model()), before)


def test_attention_that_cannot_train_or_run_is_refused() -> None:
    for name in ("sage", "sage_hub", "nonsense"):
        with pytest.raises(UserError, match=r"memory\.attention"):
            set_attention(model(), name)
    with pytest.raises(UserError, match="does not run here"):
        set_attention(model(), "flash_3")
    set_attention(model(), "auto")
    from diffusers.models.attention_dispatch import AttentionBackendName

    assert set(ATTENTION.values()) <= {member.value for member in AttentionBackendName}


def test_shared_memory_is_not_swapped(caplog: pytest.LogCaptureFixture) -> None:
    assert backend_for(torch.device("mps")) is None
    assert "free nothing" in caplog.messages[0]
    assert isinstance(backend_for(torch.device("cpu")), CpuBackend)
    assert fit(model(), FLUX_LISTS, "cpu").engine is None
