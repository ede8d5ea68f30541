"""Edit runs over the tiny models of every family that edits: they learn, resume to the bit, draw; wrong ones are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from whitetuner import drawing, recipe
from whitetuner.cli import main
from whitetuner.config.load import dump_config, load_config
from whitetuner.data.scenery import paint, portrait_of, scenes
from whitetuner.errors import UserError, UserErrors
from whitetuner.evidence import checkpoint, digest, losses
from whitetuner.families import registry
from whitetuner.family import FamilySpec, ModelPaths, prompts_only
from whitetuner.memory.build import build_module
from whitetuner.prepared import encoded_twice
from whitetuner.records import Size
from whitetuner.resolve import resolve
from whitetuner.runs import events
from whitetuner.tiny import tiny_values

EDITORS = [
    (name, variant)
    for name in registry.FAMILIES
    for variant, task in registry.spec(name).pairs()
    if task == "edit"
]
#: Those whose folder tells for which task it is, with a variant that is for the other one.
APART = [
    (name, variant)
    for name, variant in EDITORS
    if ("t2i",) in registry.spec(name).variant_tasks.values()
    and registry.spec(name).variant_of is not FamilySpec.__dataclass_fields__["variant_of"].default
]
#: Those that take so many given pictures and no more.
LIMITED = [(name, variant) for name, variant in EDITORS if variant in registry.spec(name).most_references]
PROMPT = "put the thing of image 2 into image 1"


def edit_set(folder: Path) -> Path:
    """Six places with a thing in them: four beside the empty place and the thing, two beside two views of the thing."""
    for name in ("target", "condition_1", "condition_2"):
        (folder / name).mkdir(parents=True)
    for index, scene in enumerate(scenes(6, 3)):
        paint(scene, 96, 64).save(folder / "target" / f"{index}.png")
        paint(scene, 96, 64, thing=False).save(folder / "condition_1" / f"{index}.png")
        portrait_of(scene, 64).save(folder / "condition_2" / f"{index}{'' if index < 4 else '_1'}.png")
        if index >= 4:
            portrait_of(scene, 80, close=True).save(folder / "condition_2" / f"{index}_2.png")
    return folder


@pytest.fixture(scope="module", params=EDITORS, ids=lambda param: "-".join(param))
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Dotted config values of a short edit run over a tiny model."""
    name, variant = request.param
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(name)
    registry.make_tiny(name, str(folder / "model"), variant)
    data = edit_set(folder / "data")
    return {**tiny_values(name, folder / "model", data, folder, "edit", variant), "data.prompt": PROMPT}


def train(place: Mapping[str, Any], name: str, resume: str | None = None, **more: Any) -> recipe.Result:
    return recipe.run(load_config(None, base={**place, "run.name": name, **more}), resume=resume)


def happened(folder: Path) -> list[events.Event]:
    return events.read(folder / "events.jsonl")[0]


def given(place: Mapping[str, Any]) -> list[str]:
    return [f"{folder}/0.png" for folder in place["data.conditions"]]


def test_an_edit_run_learns_resumes_to_the_bit_and_draws(place: dict[str, Any]) -> None:
    """The validation loss is on fixed pictures, noise and levels; batches of two hold equal counts and sizes (E6, E8)."""
    more = {
        "run.steps": 60,
        "validation.every": 60,
        "save.every": 20,
        "preview.every": 60,
        "preview.prompts": [{"text": PROMPT, "images": given(place), "steps": 2}],
    }
    whole = train(place, "whole", **more)
    validation = {e.step: e.loss for e in happened(whole.folder) if isinstance(e, events.Validation)}
    assert list(validation) == [0, 60] and validation[60] < validation[0]
    document = json.loads((whole.folder / "run.json").read_text(encoding="utf-8"))
    assert document["resolved"]["batches_per_epoch"] == 3 and document["resolved"]["items"] == 6
    first, last = (
        np.asarray(Image.open(whole.folder / "samples" / f"step-{step:06d}" / "00.png")) for step in (0, 60)
    )
    assert first.shape == (48, 64, 3) or first.shape[0] < first.shape[1]  # as the first given picture
    assert not np.array_equal(first, last)

    train(place, "parts", **{**more, "run.steps": 20})
    parts = train(place, "parts", "latest", **{**more, "memory.gradient_checkpointing": True})
    assert digest(checkpoint(parts.folder, 60)) == digest(checkpoint(whole.folder, 60))
    assert losses(parts.folder) == losses(whole.folder)

    pictures = [Path(path) for path in given(place)]
    drawn = [
        np.asarray(
            Image.open(drawing.sample(str(whole.folder), prompt=PROMPT, images=images, out=out, steps=2))
        )
        for images, out in (
            (pictures, whole.folder / "a.png"),
            (pictures, whole.folder / "b.png"),
            (pictures[::-1], whole.folder / "c.png"),
        )
    ]
    assert np.array_equal(drawn[0], last)  # `sample` is the preview of the last step
    assert np.array_equal(drawn[0], drawn[1])
    if len(pictures) > 1:
        assert drawn[2].shape != drawn[0].shape or not np.array_equal(drawn[0], drawn[2])
    assert (
        main(["export", str(whole.final[1]), str(whole.folder / "x.safetensors"), "--to", "diffusers"]) == 0
    )
    assert digest(load_file(whole.folder / "x.safetensors")) == digest(load_file(whole.final[2]))
    with pytest.raises(UserError, match="--image"):
        drawing.sample(
            str(whole.folder), prompt=PROMPT, out=whole.folder / "d.png", size=Size(64, 64), steps=1
        )


def test_what_is_drawn_has_the_first_given_pictures_shape_at_the_targets_resolution(
    place: dict[str, Any], tmp_path: Path
) -> None:
    stride = resolve(load_config(None, base=place).config).family.stride()
    resolutions = {"data.resolution": 4 * stride, "data.condition_resolution": 2 * stride}
    values = {**place, "run.steps": 1, **resolutions}
    run = train(
        values,
        "small",
        **{"preview.every": 1, "preview.prompts": [{"text": "a", "images": given(place), "steps": 1}]},
    )
    preview = Image.open(run.folder / "samples" / "step-000001" / "00.png")
    drawn = drawing.sample(
        str(run.folder), images=[Path(one) for one in given(place)], out=tmp_path / "a.png", steps=1
    )
    wanted = {16: (64, 48), 32: (96, 64)}[
        stride
    ]  # of 96 x 64 at the area of 64 x 64; of 128 x 128: not enlarged
    assert preview.size == Image.open(drawn).size == wanted


def test_accumulating_two_singles_is_a_batch_of_two(place: dict[str, Any]) -> None:
    """E6: as far as the gradients, through the first step of plain descent; the order of samples is the same."""
    more = {
        "run.steps": 1,
        "optimizer.name": "torch.optim:SGD",
        "optimizer.lr": 1e-2,
        "optimizer.max_grad_norm": 0.0,
        "data.caption_dropout": 0.0,
        "data.conditions": place["data.conditions"][:1],
    }
    two = checkpoint(train(place, "two", **more, **{"data.batch_size": 6}).folder, 1)
    ones = checkpoint(
        train(place, "ones", **more, **{"data.batch_size": 1, "optimizer.gradient_accumulation": 6}).folder, 1
    )
    for name in two:
        if two[name].is_floating_point():
            assert torch.allclose(two[name], ones[name], rtol=1e-5, atol=1e-7), name


def test_memory_options_change_no_bit_beside_references_and_a_quantised_base_learns_nearly_the_same(
    place: dict[str, Any],
) -> None:
    """E5, and E4 through the whole recipe."""
    short = {"run.steps": 3, "validation.every": 3}
    plain = train(place, "plain", **short)
    swapped = train(
        place,
        "swapped",
        **short,
        **{
            "memory.blocks_to_swap": 1,
            "memory.gradient_checkpointing": True,
            "memory.activation_offload": True,
        },
    )
    assert losses(swapped.folder) == losses(plain.folder)
    assert digest(checkpoint(swapped.folder, 3)) == digest(checkpoint(plain.folder, 3))
    quantised = train(place, "int8", **short, **{"memory.base": "int8"})
    one, two = (torch.tensor([row[1] for row in losses(run.folder)]) for run in (plain, quantised))
    assert not torch.equal(one, two) and torch.allclose(one, two, rtol=0.05)


def test_cached_is_live_and_a_condition_file_invalidates_what_it_must(
    place: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """E9."""
    config = load_config(None, base={**place, "run.name": "cache"}).config
    resolved = resolve(config)
    build = partial(build_module, dtype=resolved.dtype, device=resolved.device)
    before, now = encoded_twice(config, resolved.family, build)
    assert before.keys() == now.keys() and all(torch.equal(before[key], now[key]) for key in now)

    entries = lambda: {path.name for path in Path(place["data.cache_dir"]).rglob("*.safetensors")}  # noqa: E731
    asked = [one for one in resolved.family.encoders("edit") if not prompts_only(one)]
    kept, readers = entries(), [one for one in asked if "conditions" in one.reads]
    picture = Path(given(place)[-1])
    content = picture.read_bytes()
    try:
        Image.new("RGB", Image.open(picture).size, "green").save(picture)
        after, _ = encoded_twice(config, resolved.family, build)
    finally:
        picture.write_bytes(content)
    changed = {key.partition("/")[0] for key in before if not torch.equal(before[key], after[key])}
    assert len(changed) == 1  # the one item whose condition it is
    # Of its entries those of the encoders that look at it; where they read the caption too, with and without one.
    assert len(entries() - kept) == sum(2 if "caption" in one.reads else 1 for one in readers)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data.conditions": None}, "targets, but no given pictures"),
        ({"model.task": "t2i"}, "for an edit task, but the task is t2i"),
        ({"data.target": None, "data.conditions": None, "data.images": "x"}, "this set has none"),
        ({"preview.prompts": [{"text": "a"}]}, "needs given pictures"),
        ({"preview.prompts": [{"text": "a", "images": ["nowhere.png"]}]}, "nowhere.png"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_go_together_is_refused_before_anything_loads(
    place: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    values = {key: value for key, value in {**place, **change}.items() if value is not None}
    with pytest.raises((UserError, UserErrors), match=words):
        train(values, "refused")
    assert not (Path(place["run.output_dir"]) / "refused").exists()


@pytest.mark.parametrize("place", APART, ids="-".join, indirect=True)
def test_a_model_for_the_other_task_is_told(place: dict[str, Any], tmp_path: Path) -> None:
    """Where variants of a family are for different tasks; where one model does both, both are trained."""
    spec = registry.spec(place["model.family"])
    others = [variant for variant, tasks in spec.variant_tasks.items() if tasks == ("t2i",)]
    unedited = {key: value for key, value in place.items() if key not in ("data.target", "data.conditions")}
    with pytest.raises(UserError, match="which is for edit, not for t2i"):
        train({**unedited, "model.task": "t2i", "data.images": place["data.target"]}, "as-t2i")
    registry.make_tiny(spec.name, str(tmp_path / "model"), others[0])
    with pytest.raises(UserError, match="which is for t2i, not for edit"):
        train({**place, "model.path": str(tmp_path / "model")}, "as-edit")
    with pytest.raises(UserError, match="takes no given pictures"):
        images = [Path(path) for path in given(place)]
        drawing.sample(str(tmp_path / "model"), images=images, out=tmp_path / "x.png", size=Size(64, 64))
    with pytest.raises(UserError, match="add --image"):
        drawing.sample(place["model.path"], out=tmp_path / "x.png", size=Size(64, 64))


@pytest.mark.parametrize("place", LIMITED, ids="-".join, indirect=True)
def test_more_given_pictures_than_the_model_takes_are_refused(place: dict[str, Any], tmp_path: Path) -> None:
    model = load_config(None, base=place).config
    spec = registry.spec(model.model.family)
    most = spec.references_at_most(model.model_options(), ModelPaths(Path(place["model.path"])))
    both = [str(Path(place["data.target"]).parent / f"condition_{number}") for number in (1, 2)]
    with pytest.raises(UserErrors, match=f"takes at most {most}"):
        train({**place, "data.conditions": both}, "many")
    pictures = [Path(path) for path in given({"data.conditions": both})]
    with pytest.raises(UserError, match=f"takes at most {most}"):
        drawing.sample(
            place["model.path"], images=pictures, out=tmp_path / "x.png", size=Size(64, 64), steps=1
        )
    with pytest.raises(UserError, match=f"takes at most {most}"):
        train(place, "many", **{"preview.prompts": [{"text": "a", "images": list(map(str, pictures))}]})


def test_the_command_line_checks_an_edit_config_and_a_bare_folder(
    place: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "edit.toml"
    config.write_text(dump_config(load_config(None, base=place).config), encoding="utf-8")
    assert main(["check", str(config)]) == 0
    out = capsys.readouterr().out
    assert ("6 with 1" if len(place["data.conditions"]) == 1 else "4 with 2, 2 with 3") in out
    assert "in the cache: at most" in out
    data = Path(place["data.target"]).parent
    assert main(["check", str(data)]) == 2  # no captions: the prompt stood in the config
    assert 'set prompt = "..."' in capsys.readouterr().out
    assert main(["check", str(config), "--set", f"data.conditions=['{data / 'target'}', '{tmp_path}']"]) == 2
    assert "no pictures in this condition folder" in capsys.readouterr().out
