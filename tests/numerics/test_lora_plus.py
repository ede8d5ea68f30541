"""LoRA+: the factor behind the rank learns at its own multiple of the rate, through schedules, files and a resume."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tiny_runs import tiny_place
from whitetuner import recipe
from whitetuner.adapters.attach import attach
from whitetuner.adapters.shapes import AdapterSettings
from whitetuner.config.load import load_config
from whitetuner.errors import UserError
from whitetuner.evidence import checkpoint, digest, losses
from whitetuner.rehearsal import adapter_optimizer
from whitetuner.train.optim import lr_factor, make_optimizer, optimizer_tensors, restore_optimizer, set_lr

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
#: Optimizers that treat each tensor by itself.
NAMES = ["adamw", pytest.param("adamw8bit", marks=needs_bitsandbytes), "adafactor", "torch.optim:SGD"]
LORA = {"method.kind": "lora", "method.rank": 4}
STEPS, RATE = 6, 1e-2


def factors() -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(A, B) of two layers; above and below the 4096 numbers from which 8 bits are used."""
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=generator) * 0.1) for shape in ((8, 600), (4, 30))]
    return made, [nn.Parameter(torch.zeros(shape)) for shape in ((600, 8), (30, 4))]


def learn(optimizers: list[tuple[Any, float]], params: list[nn.Parameter], start: int, end: int) -> None:
    """Steps whose gradients follow from step and tensor; each optimizer at its rate times the schedule's factor."""
    for step in range(start, end):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = 0.1 * torch.randn(p.shape, generator=generator) + p.detach() - 1.0
        for optimizer, rate in optimizers:
            set_lr(optimizer, rate * lr_factor(step, STEPS, "cosine", 2))
            optimizer.step()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ratio", [0.5, 4.0, 16.0])  # powers of two: both products round alike
def test_each_factor_learns_as_it_would_alone_at_its_own_rate(name: str, ratio: float) -> None:
    """Together in two groups == two optimizers, the second at ratio times the rate, to the bit, warm-up and cosine included."""
    a, b = factors()
    together = make_optimizer(name, a, lr=RATE, faster=b, ratio=ratio)
    learn([(together, RATE)], [*a, *b], 0, STEPS)
    alone_a, alone_b = factors()
    first, second = make_optimizer(name, alone_a, lr=RATE), make_optimizer(name, alone_b, lr=RATE * ratio)
    learn([(first, RATE), (second, RATE * ratio)], [*alone_a, *alone_b], 0, STEPS)
    for ours, theirs in zip([*a, *b], [*alone_a, *alone_b], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_groups_keep_their_ratio_through_files(name: str) -> None:
    a, b = factors()
    whole = make_optimizer(name, a, lr=RATE, faster=b, ratio=16.0)
    learn([(whole, RATE)], [*a, *b], 0, STEPS)
    a1, b1 = factors()
    stopped = make_optimizer(name, a1, lr=RATE, faster=b1, ratio=16.0)
    learn([(stopped, RATE)], [*a1, *b1], 0, 3)
    resumed = make_optimizer(name, a1, lr=RATE, faster=b1, ratio=16.0)
    restore_optimizer(resumed, *optimizer_tensors(stopped))
    assert [group["lr"] for group in resumed.param_groups] == [
        RATE * lr_factor(2, STEPS, "cosine", 2) * ratio for ratio in (1.0, 16.0)
    ]
    learn([(resumed, RATE)], [*a1, *b1], 3, STEPS)
    for ours, theirs in zip([*a, *b], [*a1, *b1], strict=True):
        assert torch.equal(ours, theirs)


def values(**more: Any) -> dict[str, Any]:
    return {"model.family": "flux2-klein", "data.images": "x", **more}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (AdapterSettings("lora", 2), {"lora_B"}),
        (AdapterSettings("lokr", 2, factor=2), {"lokr_w2_a"}),
    ],
)
def test_the_factor_behind_the_rank_is_the_faster_one(settings: AdapterSettings, expected: set[str]) -> None:
    adapter = attach(nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16)), ["0", "1"], settings, 0)
    config = load_config(None, base=values(**{"optimizer.lora_plus": 16, "optimizer.lr": 1e-3})).config
    others, faster = adapter_optimizer(config, adapter).param_groups
    names = {id(p): name.removesuffix(".weight").rpartition(".")[2] for name, p in adapter.named_parameters()}
    assert {names[id(p)] for p in faster["params"]} == expected and faster["lr"] == 16 * others["lr"]
    assert expected.isdisjoint(names[id(p)] for p in others["params"])
    assert len(others["params"]) + len(faster["params"]) == len(adapter.parameters())


def test_one_is_the_optimizer_of_before() -> None:
    """One group of all factors in their order, and a saved state without a word of it."""
    adapter = attach(nn.Sequential(nn.Linear(8, 8)), ["0"], AdapterSettings("lora", 2), 0)
    config = load_config(None, base=values(**{"optimizer.lora_plus": 1.0})).config
    optimizer = adapter_optimizer(config, adapter)
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in adapter.parameters()]
    assert (
        optimizer_tensors(optimizer)[1]["groups"]
        == optimizer_tensors(make_optimizer("adamw", adapter.parameters(), lr=config.optimizer.lr))[1][
            "groups"
        ]
    )


# ---- whole runs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("lora_plus")
    return tiny_place(folder, 3, ".")


def train(place: Mapping[str, Any], name: str, resume: str | None = None, **more: Any) -> Path:
    return recipe.run(load_config(None, base={**place, "run.name": name, **more}), resume=resume).folder


def moved(folder: Path, step: int, name: str) -> float:
    found = [tensor for key, tensor in checkpoint(folder, step).items() if name in key]
    assert found
    return max(float(tensor.abs().max()) for tensor in found)


def test_in_a_run_the_faster_factor_goes_further(place: dict[str, Any]) -> None:
    """lora_B starts at zero and Adam's first step is lr: 16 times as far, to the rounding of the root (eps)."""
    more = {**LORA, "run.steps": 1, "save.every": 1, "optimizer.lr": 1e-4, "optimizer.weight_decay": 0.0}
    plain = moved(train(place, "one", **more), 1, "lora_B")
    fast = moved(train(place, "sixteen", **more, **{"optimizer.lora_plus": 16}), 1, "lora_B")
    assert plain == pytest.approx(1e-4, rel=1e-3) and fast == pytest.approx(16e-4, rel=1e-3)


@pytest.mark.parametrize("name", ["adamw", pytest.param("adamw8bit", marks=needs_bitsandbytes)])
def test_stopped_and_resumed_is_never_interrupted(place: dict[str, Any], name: str) -> None:
    more = {
        "method.full_matrix": False,
        "method.rank": 2,
        "run.steps": 6,
        "save.every": 3,
        "optimizer.name": name,
        "optimizer.lora_plus": 8,
        "optimizer.schedule": "cosine",
        "optimizer.warmup_steps": 2,
    }
    whole = train(place, f"whole-{name}", **more)
    train(place, f"parts-{name}", **{**more, "run.steps": 3, "optimizer.schedule": "constant"})
    # the course of the rate hangs on how many steps there are in all: the first three are the warm-up and the full rate
    constant = {**more, "optimizer.schedule": "constant"}
    parts = train(place, f"parts-{name}", "latest", **constant)
    again = train(place, f"again-{name}", **constant)
    assert digest(checkpoint(parts, 6)) == digest(checkpoint(again, 6)) != digest(checkpoint(whole, 6))
    assert losses(parts) == losses(again)


def test_another_ratio_is_refused_on_resume(place: dict[str, Any]) -> None:
    train(place, "kept", **LORA, **{"run.steps": 1, "save.every": 1})
    with pytest.raises(UserError, match=r"optimizer\.lora_plus"):
        train(place, "kept", "latest", **LORA, **{"run.steps": 2, "optimizer.lora_plus": 4})


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"method.kind": "full"}, "full training does not have"),
        ({"method.kind": "lokr", "method.full_matrix": True}, "full second factor"),
        ({**LORA, "optimizer.name": "prodigy", "optimizer.lr": 1}, "one step size"),
        ({**LORA, "optimizer.name": "prodigyopt:Prodigy", "optimizer.lr": 1}, "one step size"),
    ],
)
def test_a_ratio_that_makes_no_sense_is_refused_before_anything_is_made(
    place: dict[str, Any], more: dict[str, Any], words: str
) -> None:
    if "prodigy" in str(more) and find_spec("prodigyopt") is None:
        pytest.skip("prodigyopt is not installed")
    with pytest.raises(UserError, match=words) as caught:
        train(place, "refused", **more, **{"optimizer.lora_plus": 16})
    assert "optimizer.lora_plus" in str(caught.value)
    assert not (Path(place["run.output_dir"]) / "refused").exists()
