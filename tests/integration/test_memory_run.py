"""E4, E5, E6 through a whole run: memory options change no bit of what is learned, and a smaller base still learns."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from whitetuner import plan_view, recipe
from whitetuner.config.load import dump_config, load_config
from whitetuner.data.samples import make_testdata
from whitetuner.errors import UserError
from whitetuner.evidence import checkpoint, digest, losses
from whitetuner.families import registry
from whitetuner.memory.machine import GIB, typical_machine
from whitetuner.memory.swap.engine import SwapEngine
from whitetuner.planning import Shape, Way, way_of
from whitetuner.records import Size
from whitetuner.resolve import resolve
from whitetuner.runs import events
from whitetuner.tiny import tiny_values

STEPS = 3
SETTINGS: dict[str, dict[str, Any]] = {
    "all blocks swapped": {"memory.blocks_to_swap": "all"},
    "two blocks swapped, recompute": {"memory.blocks_to_swap": 2, "memory.gradient_checkpointing": True},
    "recompute, inputs on the host": {
        "memory.gradient_checkpointing": True,
        "memory.activation_offload": True,
    },
    "planned for a card of 4 GB": {"memory.vram_gb": 4},
}


#: Videos are streamed in test_video_run.py and, every expert, in tests/numerics/test_swap_families.py.
FAMILIES = [name for name in registry.FAMILIES if "t2i" in registry.spec(name).tasks]


@pytest.fixture(scope="module", params=FAMILIES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Dotted config values of a run of three steps over a tiny model, previews and validation in between."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    variant, task = registry.spec(request.param).pairs()[0]
    registry.make_tiny(request.param, str(folder / "model"), variant)
    make_testdata(task, folder / "data", 4, 0)
    values = tiny_values(request.param, folder / "model", folder / "data", folder, task)
    return {
        **values,
        "run.steps": STEPS,
        "save.every": STEPS,
        "validation.every": 2,
        "preview.every": 2,
        "preview.prompts": [{"text": "a red circle", "steps": 1}],
    }


def train(place: Mapping[str, Any], name: str, **more: Any) -> recipe.Result:
    return recipe.run(load_config(None, base={**place, "run.name": name, **more}))


def state(result: recipe.Result) -> tuple[str, list[tuple[Any, ...]]]:
    return digest(checkpoint(result.folder, result.step)), losses(result.folder)


def said(folder: Path) -> list[str]:
    return [
        event.text for event in events.read(folder / "events.jsonl")[0] if isinstance(event, events.Message)
    ]


def blocks(place: Mapping[str, Any]) -> int:
    with pytest.raises(UserError, match="the model has") as told:
        train(place, "too-many", **{"memory.blocks_to_swap": 999})
    return int(told.value.values["count"])


def test_no_memory_option_changes_a_bit(place: dict[str, Any]) -> None:
    plain = train(place, "plain")
    count = blocks(place)
    for index, (title, options) in enumerate(SETTINGS.items()):
        more = {key: count if value == "all" else value for key, value in options.items()}
        other = train(place, f"other-{index}", **more)
        assert state(other) == state(plain), title
        folders = [one.folder / "samples" / "step-000002" / "00.png" for one in (plain, other)]
        assert folders[0].read_bytes() == folders[1].read_bytes(), title
        if "memory.blocks_to_swap" in more:
            told = f"{more['memory.blocks_to_swap']} blocks wait on the host"
            assert any(text.startswith(told) for text in said(other.folder)), title
        resolved = json.loads((other.folder / "run.json").read_text(encoding="utf-8"))["resolved"]
        assert (resolved["plan"] is not None) == ("memory.vram_gb" in more), title


def test_out_of_memory_within_a_step_changes_no_bit_and_is_told(
    place: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"memory.gradient_checkpointing": True, "memory.blocks_to_swap": 1}
    plain = train(place, "roomy", **more)
    attach = SwapEngine.attach
    failed: list[str] = []

    def attach_and_fail_once(engine: SwapEngine, *given: Any) -> SwapEngine:
        attach(engine, *given)
        block = engine.layouts[-1].block
        forward: Callable[..., Any] = block.forward

        def failing(*args: Any, **kwargs: Any) -> Any:
            if len(failed) < 1 and torch.is_grad_enabled():
                failed.append("once")
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return forward(*args, **kwargs)

        nn.Module.__setattr__(block, "forward", failing)
        return engine

    monkeypatch.setattr(SwapEngine, "attach", attach_and_fail_once)
    other = train(place, "tight", **more)
    assert failed and state(other) == state(plain)
    assert any("out of memory" in text and "run again" in text for text in said(other.folder))


@pytest.mark.parametrize("base", ["int8", "qfloat8", "bf16"])
def test_a_smaller_base_learns_nearly_the_same(place: dict[str, Any], base: str) -> None:
    precise, smaller = train(place, f"{base}-precise"), train(place, base, **{"memory.base": base})
    one, two = (torch.tensor([row[1] for row in losses(result.folder)]) for result in (precise, smaller))
    assert not torch.equal(one, two)  # or the option did nothing
    assert torch.allclose(one, two, rtol=0.05)
    resolved = json.loads((smaller.folder / "run.json").read_text(encoding="utf-8"))["resolved"]
    assert resolved["base"] == {"qfloat8": "fp8"}.get(base, base)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["flux2-klein"], indirect=True)  # a minute of compiling each
def test_compiled_blocks_learn_the_same_within_rounding(place: dict[str, Any]) -> None:
    torch._dynamo.reset()
    plain = train(place, "not-compiled")
    other = train(place, "compiled", **{"memory.compile": True, "memory.blocks_to_swap": 1})
    one, two = (torch.tensor([row[1] for row in losses(result.folder)]) for result in (plain, other))
    assert torch.allclose(one, two, rtol=1e-4)


def test_a_chosen_attention_learns_the_same_within_rounding(place: dict[str, Any]) -> None:
    plain = train(place, "own-attention")
    other = train(place, "math-attention", **{"memory.attention": "math"})
    one, two = (torch.tensor([row[1] for row in losses(result.folder)]) for result in (plain, other))
    assert torch.allclose(one, two, rtol=1e-4)


def test_an_auto_base_stays_what_it_was_on_resume(place: dict[str, Any]) -> None:
    first = train(place, "kept", **{"memory.base": "int8", "run.steps": 2, "save.every": 2})
    more = {**place, "run.name": "kept", "run.steps": 4, "memory.base": "auto"}
    again = recipe.run(load_config(None, base=more), resume="latest")
    assert again.folder == first.folder
    assert json.loads((again.folder / "run.json").read_text(encoding="utf-8"))["resolved"]["base"] == "int8"
    changed = {**more, "run.steps": 5, "memory.base": "bf16", "memory.dtype": "fp32"}
    with pytest.raises(UserError, match="dtype"):  # bf16 weights are another number format
        recipe.run(load_config(None, base={**changed, "memory.dtype": "auto"}), resume="latest")
    recipe.run(load_config(None, base=changed), resume="latest")
    assert json.loads((again.folder / "run.json").read_text(encoding="utf-8"))["resolved"]["base"] == "fp32"
    assert any(text.startswith("memory.base: auto -> bf16") for text in said(again.folder))


def test_what_cannot_fit_or_train_is_refused_before_anything_is_encoded(place: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="too little: at least"):
        train(
            place, "tiny-card", **{"memory.vram_gb": 0.3, "data.cache_dir": f"{place['run.output_dir']}/none"}
        )
    assert not list(Path(place["run.output_dir"], "none").rglob("*.safetensors"))
    with pytest.raises(UserError, match="full training changes the weights themselves"):
        train(place, "full-int8", **{"memory.base": "int8", "method.kind": "full"})
    with pytest.raises(UserError, match="cannot be trained with"):
        train(place, "sage", **{"memory.attention": "sage"})


def test_the_plan_of_a_config_says_what_the_run_will_do(place: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(dump_config(load_config(None, base={**place}).config), encoding="utf-8")
    found = plan_view.of_config(config, [], [typical_machine(8, 32)])
    (_, plan), *none = found["plans"]
    assert not none and not isinstance(plan, UserError) and plan.best.streamed == 0
    text = plan_view.as_text(found, True)
    assert "all blocks on the card" in text and "adapter and optimizer" in text and "3 steps: about" in text
    assert json.dumps(plan_view.as_json(found))


def test_a_kernel_that_cannot_be_had_is_told_before_a_folder_is_made(place: dict[str, Any]) -> None:
    for name in ("sage", "flash_3"):
        with pytest.raises(UserError, match="attention backend"):
            train(place, f"kernel-{name}", **{"memory.attention": name})
        assert not Path(place["run.output_dir"], f"kernel-{name}").exists()


def test_a_precise_base_chosen_by_auto_stays_on_a_smaller_card(tmp_path: Path) -> None:
    """Numbers may not change because the card did: of what `auto` may do on a resume only the swap is left."""
    registry.make_tiny("flux2-klein", str(tmp_path / "model"))
    values = tiny_values("flux2-klein", tmp_path / "model", tmp_path / "data", tmp_path)

    def way(peak_bytes: int, before: Mapping[str, Any]) -> Way:
        config = load_config(None, base={**values, "memory.vram_gb": peak_bytes / GIB}).config
        now = resolve(config)
        return way_of(config, now.family, now.device, now.dtype, [Shape(Size(64, 64), 2)], before)

    roomy = way(8 * GIB, {})
    assert roomy.plan is not None and roomy.base == "fp32"
    tight = roomy.plan.best.peak_bytes - 1
    assert way(tight, {}).base == "int8", "else this proves nothing"
    assert way(tight, {"base": "fp32"}).base == "fp32"
