"""E8 for optimizers: saved, restored into a fresh one and run on equals never interrupted, to the bit."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from whitetuner.errors import UserError
from whitetuner.train.ema import Ema
from whitetuner.train.optim import (
    clip_grad_norm,
    lr_factor,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
)

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw8bit": {},
    "adafactor": {},
    "prodigy": {"lr": 1.0},
    "torch.optim:SGD": {"lr": 1e-2, "args": {"momentum": 0.9}},
    "torch.optim:RMSprop": {"args": {"centered": True}},
    "torch.optim:Adafactor": {},
    "torch.optim:NAdam": {},
}
NEEDS = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}


def those(names: Iterable[str]) -> list[Any]:
    """Skipped where the optional package is missing (bitsandbytes has no wheel for macOS)."""
    return [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                name in NEEDS and find_spec(NEEDS[name]) is None, reason=f"{NEEDS.get(name)} is not installed"
            ),
        )
        for name in names
    ]


needs_bitsandbytes, needs_prodigy = (those([name])[0].marks[0] for name in NEEDS)
REGISTERED = those(["adamw", "adamw8bit", "adafactor", "prodigy"])
SHAPES = [
    (96, 64),
    (8, 8),
    (70, 100),
    (64,),
]  # two above and two below the 4096 numbers from which 8 bits are used
STEPS, SAVED_AT = 8, 3


def parameters() -> list[nn.Parameter]:
    """One of them zero, as an adapter's second factor is at the start."""
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=generator) * 0.1) for shape in SHAPES]
    nn.init.zeros_(made[2])
    return made


def optimizer_for(name: str, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return make_optimizer(name, params, **{"lr": 1e-3, **OPTIMIZERS[name]})


def run(
    optimizer: torch.optim.Optimizer, params: list[nn.Parameter], start: int, end: int, base_lr: float = 1e-3
) -> None:
    """Steps like the loop's: gradients are a function of step and parameters, the rate of the step."""
    for step in range(start, end):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = 0.1 * torch.randn(p.shape, generator=generator) + p.detach() - 1.0
        clip_grad_norm(params, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = base_lr * lr_factor(step, STEPS, "cosine", 2)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def through_files(
    folder: Path, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors, document = optimizer_tensors(optimizer)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "optimizer.safetensors"
    )
    (folder / "optimizer.json").write_text(json.dumps(document), encoding="utf-8")
    return load_file(folder / "optimizer.safetensors"), json.loads(
        (folder / "optimizer.json").read_text("utf-8")
    )


@pytest.mark.parametrize("name", those(OPTIMIZERS))
def test_resumed_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    lr = OPTIMIZERS[name].get("lr", 1e-3)
    whole = parameters()
    start = [p.detach().clone() for p in whole]
    uninterrupted = optimizer_for(name, whole)
    run(uninterrupted, whole, 0, STEPS, lr)

    first = parameters()
    stopped = optimizer_for(name, first)
    run(stopped, first, 0, SAVED_AT, lr)
    tensors, document = through_files(tmp_path, stopped)

    second = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = optimizer_for(name, second)
    restore_optimizer(resumed, tensors, document)
    run(resumed, second, SAVED_AT, STEPS, lr)

    for one, other, begun in zip(whole, second, start, strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, begun), "a step without effect proves nothing"
    (expected, numbers), (found, others) = optimizer_tensors(uninterrupted), optimizer_tensors(resumed)
    assert numbers == others
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert tensor.dtype == found[key].dtype and torch.equal(tensor, found[key]), key


@pytest.mark.parametrize("name", those(OPTIMIZERS))
def test_forgetting_the_state_would_be_seen(name: str) -> None:
    lr = OPTIMIZERS[name].get("lr", 1e-3)
    whole, second = parameters(), parameters()
    run(optimizer_for(name, whole), whole, 0, STEPS, lr)
    run(optimizer_for(name, second), second, 0, SAVED_AT, lr)
    run(optimizer_for(name, second), second, SAVED_AT, STEPS, lr)
    assert any(not torch.equal(one, other) for one, other in zip(whole, second, strict=True))


@pytest.mark.parametrize("name", REGISTERED)
def test_two_runs_are_the_same_to_the_bit(name: str) -> None:
    ends = []
    for _ in range(2):
        params = parameters()
        run(optimizer_for(name, params), params, 0, 4, OPTIMIZERS[name].get("lr", 1e-3))
        ends.append(params)
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


@pytest.mark.parametrize("name", REGISTERED)
def test_a_factor_that_starts_at_zero_moves_as_far_as_the_others(name: str) -> None:
    params = parameters()
    begun = [p.detach().clone() for p in params]
    run(optimizer_for(name, params), params, 0, 4, OPTIMIZERS[name].get("lr", 1e-3))
    moved = [float((p - b).detach().square().mean().sqrt()) for p, b in zip(params, begun, strict=True)]
    assert moved[2] > 0.2 * moved[0] > 0


@pytest.mark.parametrize("name", REGISTERED)
def test_each_optimizer_goes_downhill(name: str) -> None:
    torch.manual_seed(1)
    target, layer = torch.randn(80, 80), nn.Linear(80, 80, bias=False)
    lr = 1.0 if name == "prodigy" else 5e-3
    optimizer = make_optimizer(name, list(layer.parameters()), lr=lr, weight_decay=0.0)
    losses = []
    for _ in range(60):
        loss = (layer.weight - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0] or (name == "prodigy" and losses[-1] < losses[0])


@needs_bitsandbytes
def test_eight_bit_states_are_eight_bits_and_code_books_are_kept_once() -> None:
    params = parameters()
    optimizer = optimizer_for("adamw8bit", params)
    run(optimizer, params, 0, 1)
    tensors, _ = optimizer_tensors(optimizer)
    assert tensors["0.state1"].dtype == torch.uint8 and tensors["1.state1"].dtype == torch.float32
    assert sum(name.endswith("qmap1") for name in tensors) == 1


def test_adafactor_is_factored() -> None:
    params = parameters()
    optimizer = optimizer_for("adafactor", params)
    run(optimizer, params, 0, 1)
    assert optimizer_tensors(optimizer)[0]["0.exp_avg_sq_row"].shape == (96,)


@needs_prodigy
def test_settings_come_from_the_config_and_what_the_run_found_from_the_checkpoint() -> None:
    params = parameters()
    optimizer = optimizer_for("prodigy", params)
    run(optimizer, params, 0, 5, 1.0)
    tensors, document = optimizer_tensors(optimizer)
    other = make_optimizer("prodigy", parameters(), lr=1.0, weight_decay=0.5)
    restore_optimizer(other, tensors, document)
    assert other.param_groups[0]["weight_decay"] == 0.5
    assert other.param_groups[0]["d"] == optimizer.param_groups[0]["d"] > 1e-6
    assert other.param_groups[0]["k"] == 5


def test_state_of_another_optimizer_or_of_other_parameters_is_refused() -> None:
    params = parameters()
    optimizer = optimizer_for("adamw", params)
    run(optimizer, params, 0, 1)
    tensors, document = optimizer_tensors(optimizer)
    with pytest.raises(UserError, match=r"AdamW, this run uses .*Adafactor"):
        restore_optimizer(optimizer_for("adafactor", params), tensors, document)
    with pytest.raises(UserError, match="other parameters"):
        restore_optimizer(make_optimizer("adamw", params[:2], lr=1.0), tensors, document)


def test_a_state_that_only_pickle_could_keep_is_refused() -> None:
    params = parameters()
    optimizer = optimizer_for("adamw", params)
    run(optimizer, params, 0, 1)
    optimizer.state[params[0]]["hook"] = print
    with pytest.raises(UserError, match=r"keeps a builtin_function_or_method \(0.hook\)"):
        optimizer_tensors(optimizer)
    del optimizer.state[params[0]]["hook"]
    optimizer.state["global"] = {"k": 1}
    with pytest.raises(UserError, match="'global'"):
        optimizer_tensors(optimizer)


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("adamw8bits", {}, ["'adamw8bits' is no optimizer", "did you mean 'adamw8bit'"]),
        ("no.such.package:Thing", {}, ["'no.such.package' cannot be imported"]),
        ("torch.optim:Adamm", {}, ["no torch.optim.Optimizer", "Adam"]),
        ("torch.nn:Linear", {}, ["'Linear' of torch.nn is no torch.optim.Optimizer", "no optimizers"]),
        ("torch.optim:SGD", {"momentumm": 0.9}, ["no argument 'momentumm'", "did you mean 'momentum'"]),
        ("adamw", {"amsgradd": True}, ["no argument 'amsgradd'"]),
        ("torch.optim:SGD", {"momentum": -1}, ["refuses its settings", "Invalid momentum"]),
    ],
)
def test_a_wrong_choice_is_told_in_plain_words(name: str, args: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make_optimizer(name, parameters(), lr=1e-3, args=args)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_missing_package_names_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for package, name, extra in (
        ("bitsandbytes", "adamw8bit", "quant"),
        ("prodigyopt", "prodigy", "prodigy"),
    ):
        monkeypatch.setitem(
            sys.modules, package, None
        )  # what Python does for a package that cannot be imported
        with pytest.raises(UserError, match=rf"pip install whitetuner\[{extra}\]") as caught:
            make_optimizer(name, parameters(), lr=1.0)
        assert caught.value.code == 3


def test_further_arguments_reach_the_optimizer() -> None:
    assert make_optimizer("adamw", parameters(), lr=1.0, args={"amsgrad": True}).param_groups[0]["amsgrad"]
    sgd = make_optimizer("torch.optim:SGD", parameters(), lr=0.5, weight_decay=0.25)
    assert sgd.param_groups[0]["lr"] == 0.5 and sgd.param_groups[0]["weight_decay"] == 0.25


def test_the_learning_rate_warms_up_and_comes_down() -> None:
    course = [lr_factor(step, 20, "linear", 4, 0.1) for step in range(20)]
    assert course[:4] == [0.25, 0.5, 0.75, 1.0]
    assert course[4] == 1.0 and course == sorted(course[:4]) + sorted(course[4:], reverse=True)
    assert course[-1] == pytest.approx(0.1 + 0.9 / 16)
    cosine = [lr_factor(step, 20, "cosine") for step in range(20)]
    assert cosine[0] == 1.0 and cosine[10] == pytest.approx(0.5) and 0 < cosine[-1] < 0.01
    assert [lr_factor(step, 20) for step in (0, 19)] == [1.0, 1.0]
    assert [lr_factor(step, 20, "constant", 2) for step in (0, 1, 2, 19)] == [0.5, 1.0, 1.0, 1.0]
    assert all(0 < lr_factor(step, 3, "cosine", 10) <= 1 for step in range(3))
    with pytest.raises(UserError, match="no schedule"):
        lr_factor(1, 2, "cosin")


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 100.0])
def test_clipping_is_that_of_torch_and_tells_the_norm_before(max_norm: float) -> None:
    ours, theirs = parameters(), parameters()
    for p, q in zip(ours, theirs, strict=True):
        p.grad = torch.randn(p.shape)
        q.grad = p.grad.clone()
    expected = float(nn.utils.clip_grad_norm_(theirs, max_norm or float("inf")))
    assert clip_grad_norm(ours, max_norm) == pytest.approx(expected, rel=1e-6)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_clipping_leaves_the_guilty_gradient_to_be_found(bad: float) -> None:
    params = parameters()
    for p in params:
        p.grad = torch.ones_like(p)
    params[1].grad[0, 0] = bad
    before = [p.grad.clone() for p in params]
    norm = clip_grad_norm(params, 1.0)
    assert norm != norm or norm == float("inf")
    for p, was in zip(params, before, strict=True):
        torch.testing.assert_close(p.grad, was, equal_nan=True)
    assert clip_grad_norm([nn.Parameter(torch.ones(1))], 1.0) == 0.0


def test_the_average_follows_its_formula_and_swapping_leaves_no_trace() -> None:
    params = parameters()
    expected = [p.detach().clone().double() for p in params]
    ema = Ema(params, 0.5)
    for step in range(12):
        with torch.no_grad():
            for p in params:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(step)))
        ema.update()
        d = min(0.5, (1 + step) / (10 + step))
        expected = [d * e + (1 - d) * p.detach().double() for e, p in zip(expected, params, strict=True)]
    live = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError), ema.swapped_in():
        for p, e in zip(params, expected, strict=True):
            torch.testing.assert_close(p.detach(), e.float())
        raise RuntimeError
    assert all(torch.equal(p, was) for p, was in zip(params, live, strict=True))


def test_an_average_goes_on_to_the_bit() -> None:
    def steps(params: list[nn.Parameter], ema: Ema, start: int, end: int) -> None:
        for step in range(start, end):
            with torch.no_grad():
                for p in params:
                    p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(step)))
            ema.update()

    whole, first = parameters(), parameters()
    one, two = Ema(whole, 0.9), Ema(first, 0.9)
    steps(whole, one, 0, 8)
    steps(first, two, 0, 3)
    saved, updates = {k: v.clone() for k, v in two.state_tensors().items()}, two.updates
    resumed = Ema(first, 0.9)
    resumed.load_state_tensors(saved, updates)
    steps(first, resumed, 3, 8)
    for name, tensor in one.state_tensors().items():
        assert torch.equal(tensor, resumed.state_tensors()[name])
    with pytest.raises(UserError, match="other parameters"):
        Ema(first[:1], 0.9).load_state_tensors(saved, 3)
    with pytest.raises(UserError, match=r"optimizer\.ema"):
        Ema(first, 1.0)
