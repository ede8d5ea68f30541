"""Full training through whole runs: every family, its files, resuming in every precision, drawing with what was learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from whitetuner import drawing, plan_view, recipe
from whitetuner.checkpoint.original import from_original
from whitetuner.config.load import dump_config, load_config
from whitetuner.data.samples import make_testdata
from whitetuner.errors import UserError
from whitetuner.evidence import checkpoint, digest, losses
from whitetuner.families import registry
from whitetuner.final_files import write_diffusers
from whitetuner.memory.machine import typical_machine
from whitetuner.memory.weights import TensorFiles, weight_files
from whitetuner.records import Size
from whitetuner.runs import events
from whitetuner.tiny import tiny_values

#: (family, variant, task): what is trained; GLM-Image in both tasks, WAN with both experts and with one.
CASES = [
    ("flux2-klein", "", "edit"),
    ("qwen-image", "t2i", "t2i"),
    ("zimage", "", "t2i"),
    ("zimage-v2", "", "t2i"),
    ("glm-image", "t2i", "t2i"),
    ("glm-image", "edit", "edit"),
    ("wan", "i2v-2.2", "i2v"),
    ("wan", "t2v-2.1", "t2v"),
]


def values_of(folder: Path, family: str, variant: str, task: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    variant = variant or next(iter(registry.spec(family).variants))
    registry.make_tiny(family, str(folder / "model"), variant)
    kind = task if task in ("t2i", "edit") else "video"
    make_testdata(kind, folder / "data", 4, 0)  # type: ignore[arg-type]
    return {
        **tiny_values(family, folder / "model", folder / "data", folder, task, variant),
        "run.steps": 5,
        "save.every": 5,
        "validation.every": 5,
        "method.kind": "full",
        "optimizer.lr": 1e-3,
        "optimizer.max_grad_norm": 0.0,
        "log.tensorboard": False,
    }


def train(values: dict[str, Any], name: str, *, resume: str | None = None, **more: Any) -> recipe.Result:
    return recipe.run(load_config(None, base={**values, "run.name": name, **more}), resume=resume)


def state(result: recipe.Result) -> tuple[str, list[tuple[Any, ...]]]:
    return digest(checkpoint(result.folder, result.step)), losses(result.folder)


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return values_of(tmp_path_factory.mktemp("klein"), "flux2-klein", "", "t2i")


def test_a_run_changes_all_weights_and_its_files_load_in_diffusers(klein: dict[str, Any]) -> None:
    result = train(klein, "files", **{"memory.blocks_to_swap": 2, "optimizer.ema": 0.5})
    named, comfyui, folder, *_ = result.final
    assert folder == result.folder / "final" / "transformer" and named.samefile(comfyui)
    from diffusers import Flux2Transformer2DModel

    with TensorFiles(weight_files(Path(klein["model.path"]) / "transformer")) as source:
        before = {name: source[name].clone() for name in source}
    model = Flux2Transformer2DModel.from_pretrained(folder)
    after = model.state_dict()
    assert after.keys() == before.keys()
    still = [name for name, tensor in after.items() if torch.equal(tensor, before[name])]
    assert not still, "every weight of the model takes part"
    keys = registry.keys("flux2-klein")
    with TensorFiles([named]) as original:
        back = from_original(original, keys)
        assert set(back) == set(after) and all(torch.equal(back[name], after[name]) for name in back)
    # the checkpoint holds the weights as they are, the files their average
    saved = load_file(
        result.folder / "checkpoints/checkpoint-5/transformer/diffusion_pytorch_model.safetensors"
    )
    assert saved.keys() == after.keys() and not torch.equal(
        saved["proj_out.weight"], after["proj_out.weight"]
    )
    done = [e for e in events.read(result.folder / "events.jsonl")[0] if isinstance(e, events.StepDone)]
    assert done[-1].weight_change > 0 and done[-1].grad_norm > 0
    out = result.folder / "drawn.png"
    with_result = drawing.sample(
        str(result.folder), prompt="a red circle", out=out, size=Size(64, 64), steps=1
    )
    plain = drawing.sample(
        klein["model.path"], prompt="a red circle", out=out.with_name("plain.png"), size=Size(64, 64), steps=1
    )
    assert with_result.read_bytes() != plain.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16_stochastic", "kahan", "fp32_master"])
def test_stopped_and_resumed_is_never_interrupted_in_every_precision(
    klein: dict[str, Any], precision: str
) -> None:
    more = {
        "method.precision": precision,
        "optimizer.ema": 0.9,
        "optimizer.max_grad_norm": 0.5,
        "optimizer.gradient_accumulation": 2,
        "memory.blocks_to_swap": 1,
    }
    whole = train(klein, f"whole-{precision}", **more)
    train(klein, f"half-{precision}", **more, **{"run.steps": 3})
    again = train(klein, f"half-{precision}", resume="latest", **{**more, "memory.blocks_to_swap": 3})
    assert state(again) == state(whole)


@pytest.mark.slow
def test_z_image_v2_learns_for_500_steps_stopped_in_the_middle_or_not(tmp_path: Path) -> None:
    """Its original way of being trained: the whole dual-stream model, from Z-Image's weights on."""
    values = {
        **values_of(tmp_path, "zimage-v2", "", "t2i"),
        "save.every": 250,
        "validation.every": 250,
        "preview.every": 0,
    }
    whole = train(values, "whole", **{"run.steps": 500})
    train(values, "half", **{"run.steps": 250})
    again = train(values, "half", resume="latest", **{"run.steps": 500, "memory.blocks_to_swap": 1})
    assert again.step == 500 and state(again) == state(whole)
    told = [
        one for one in events.read(again.folder / "events.jsonl")[0] if isinstance(one, events.Validation)
    ]
    assert told[-1].loss < 0.8 * told[0].loss
    out = drawing.sample(
        str(again.folder), prompt="a red circle", out=tmp_path / "s.png", size=Size(64, 64), steps=1
    )
    assert out.stat().st_size > 100


@pytest.mark.slow
def test_swap_recompute_and_optimizers_change_no_bit(klein: dict[str, Any]) -> None:
    for name in ("adamw", "adafactor"):
        resident = state(train(klein, f"{name}-resident", **{"optimizer.name": name}))
        more = {"optimizer.name": name, "memory.blocks_to_swap": 3, "memory.gradient_checkpointing": True}
        assert state(train(klein, f"{name}-swapped", **more)) == resident


@pytest.mark.slow
def test_only_what_is_named_learns(klein: dict[str, Any]) -> None:
    result = train(klein, "part", **{"method.targets": ["single_transformer_blocks.1", "*.norm_q*"]})
    with TensorFiles(weight_files(Path(klein["model.path"]) / "transformer")) as source:
        before = {name: source[name].clone() for name in source}
    after = load_file(
        result.folder / "checkpoints/checkpoint-5/transformer/diffusion_pytorch_model.safetensors"
    )
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    wanted = {name for name in after if name.startswith("single_transformer_blocks.1.") or ".norm_q" in name}
    assert changed == wanted


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "quantised": ({"memory.base": "int8"}, "cannot hold such small changes"),
    "precision": ({"method.precision": "kahan", "memory.dtype": "fp32"}, "asked for as fp32"),
    "prodigy": ({"optimizer.name": "prodigy"}, "gradients of all weights at once"),
    "begin": ({"method.init_from": "x.safetensors"}, "not from an adapter"),
    "targets": ({"method.targets": ["transformer_blokcs.*"]}, "the nearest: transformer_blocks"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_go_together_is_refused_before_a_folder_is_made(
    klein: dict[str, Any], case: str
) -> None:
    more, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        train(klein, f"wrong-{case}", **more)
    assert not (Path(klein["run.output_dir"]) / f"wrong-{case}").exists()


def test_another_precision_on_resume_is_refused(klein: dict[str, Any]) -> None:
    result = train(klein, "switch", **{"run.steps": 1})
    before = {path: path.read_bytes() for path in result.folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="kahan"):
        train(klein, "switch", resume="latest", **{"run.steps": 2, "method.precision": "kahan"})
    assert {path: path.read_bytes() for path in result.folder.rglob("*") if path.is_file()} == before


def test_shards_and_their_index_are_read_by_diffusers(tmp_path: Path, klein: dict[str, Any]) -> None:
    from diffusers import Flux2Transformer2DModel

    source = Path(klein["model.path"]) / "transformer"
    model = Flux2Transformer2DModel.from_pretrained(source)
    described = json.loads((source / "config.json").read_text(encoding="utf-8"))
    write_diffusers(tmp_path / "t", model.state_dict(), described, {}, shard_bytes=100_000)
    assert len(list((tmp_path / "t").glob("*.safetensors"))) > 2
    again = Flux2Transformer2DModel.from_pretrained(tmp_path / "t").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    write_diffusers(tmp_path / "t", model.state_dict(), described, {})
    assert [path.name for path in (tmp_path / "t").glob("*.safetensors*")] == [
        "diffusion_pytorch_model.safetensors"
    ]


@pytest.mark.slow
def test_the_plan_of_full_training_knows_its_parts(tmp_path: Path, klein: dict[str, Any]) -> None:
    path = tmp_path / "config.toml"
    path.write_text(
        dump_config(load_config(None, base={**klein, "run.name": "plan"}).config), encoding="utf-8"
    )
    on = [typical_machine(8, 32)]
    plan = plan_view.of_config(path, (), on)["plans"][0][1]
    assert plan.best.parts["gradients of a block"] > 0 and plan.best.down_bytes == 0
    swapped = plan_view.of_config(path, ["memory.blocks_to_swap=3"], on)["plans"][0][1].best
    assert swapped.down_bytes > 0 and swapped.host_bytes > plan.best.host_bytes
    assert "full training" in plan.why


@pytest.mark.slow
@pytest.mark.parametrize(("family", "variant", "task"), CASES)
def test_every_family_trains_swapped_to_the_bit_and_draws(
    tmp_path: Path, family: str, variant: str, task: str
) -> None:
    values = values_of(tmp_path, family, variant, task)
    plain = train(values, "plain")
    more: dict[str, Any] = {"memory.blocks_to_swap": 2, "memory.gradient_checkpointing": True}
    if family == "wan":
        more = {"memory.blocks_to_swap": 2}
    assert state(train(values, "swapped", **more)) == state(plain)
    given = [tmp_path / "data/condition_1/01.jpg", tmp_path / "data/condition_2/01.png"]
    images = given[: len(values.get("data.conditions", []))] if task == "edit" else ()
    if task == "i2v":
        images = sorted((tmp_path / "data").glob("*.mp4"))[:1]
    out = tmp_path / "drawn.png"
    drawing.sample(
        str(plain.folder),
        prompt="a ball",
        images=images,
        out=out,
        size=Size(64, 64, 5 if family == "wan" else 1),
        steps=1,
    )
    assert out.is_file()
