"""Masked training: an all-white mask is none to the bit, cached is live, and all that E6, E7 and E8 say holds with masks."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked_ranks
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from whitetuner import recipe
from whitetuner.config.load import load_config
from whitetuner.data.inputs import Facts, Inputs
from whitetuner.data.mask_fields import MaskEncoder, all_counts, counting
from whitetuner.data.scan import SetOptions, scan
from whitetuner.errors import UserError, UserErrors
from whitetuner.evidence import checkpoint, digest, losses
from whitetuner.families import registry
from whitetuner.family import ModelPaths
from whitetuner.memory.build import Build
from whitetuner.prepared import encoded_twice
from whitetuner.records import Size
from whitetuner.runs import events
from whitetuner.tiny import tiny_values
from whitetuner.train.distributed import Ranks

STEPS = 4


@given(
    st.sampled_from([1, 2, 4]), st.integers(1, 6), st.integers(1, 6), st.floats(0, 1), st.integers(0, 10**6)
)
def test_a_latents_mask_is_the_mean_of_its_cells_and_white_is_one_exactly(
    cell: int, height: int, width: int, floor: float, seed: int
) -> None:
    latent = torch.zeros(3, height, width)
    assert torch.equal(counting(torch.ones(height * cell, width * cell), floor, latent), all_counts(latent))
    cells = torch.rand(height * cell, width * cell, generator=torch.Generator().manual_seed(seed))
    found = counting(cells, floor, latent)
    for y in range(height):
        for x in range(width):
            mean = cells[y * cell : (y + 1) * cell, x * cell : (x + 1) * cell].mean()
            assert float(found[y, x]) == pytest.approx(floor + (1 - floor) * float(mean), abs=1e-5)
    assert torch.equal(
        counting(torch.zeros(height * cell, width * cell), 0.0, latent), torch.zeros_like(found)
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Dotted values of a run over five pictures of two shapes; folders of white and of painted masks beside them."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("masks")
    registry.make_tiny("zimage", str(folder / "model"))
    for name in ("data", "white", "painted", "alpha"):
        (folder / name).mkdir()
    for index in range(5):
        random, width = np.random.default_rng(index), 96 if index % 2 else 128
        pixels = random.integers(0, 255, (96, width, 3), dtype=np.uint8)
        painted = np.zeros((96, width), dtype=np.uint8)
        painted[24:64, 16 + 8 * index : 72] = 255
        Image.fromarray(pixels).save(folder / "data" / f"{index}.png")
        Image.fromarray(np.full_like(painted, 255)).save(folder / "white" / f"{index}.png")
        Image.fromarray(painted).save(folder / "painted" / f"{index}.png")
        Image.fromarray(np.dstack([pixels, painted])).save(folder / "alpha" / f"{index}.png")
        for one in ("data", "alpha"):
            (folder / one / f"{index}.txt").write_text(f"picture {index}", encoding="utf-8")
    return {
        **tiny_values("zimage", folder / "model", folder / "data", folder),
        "run.output_dir": str(folder / "runs"),
        "run.steps": STEPS,
        "save.every": 2,
        "data.batch_size": 2,
        "preview.every": 0,
        "validation.every": 2,
        "log.tensorboard": False,
    }


def config_of(place: dict[str, Any], name: str, masks: str = "", **more: Any) -> Any:
    told = {"data.mask_dir": str(Path(place["run.output_dir"]).parent / masks)} if masks else {}
    values = {key.replace("__", "."): value for key, value in more.items()}
    return load_config(None, base={**place, **told, **values, "run.name": name})


def trained(place: dict[str, Any], name: str, masks: str = "", **more: Any) -> Path:
    return recipe.run(config_of(place, name, masks, **more)).folder


def same(one: Path, two: Path) -> bool:
    return digest(checkpoint(one, STEPS)) == digest(checkpoint(two, STEPS)) and losses(one) == losses(two)


def validation(folder: Path) -> list[float]:
    return [one.loss for one in events.read(folder / "events.jsonl")[0] if isinstance(one, events.Validation)]


def test_white_masks_are_no_masks_to_the_bit(place: dict[str, Any]) -> None:
    """Order, batches, losses, weights and the validation; whatever the floor. Painted ones are learned otherwise."""
    without = trained(place, "without")
    for floor in (0.0, 0.1):
        white = trained(place, f"white-{floor}", "white", data__mask_floor=floor)
        assert same(white, without) and validation(white) == validation(without)
    painted = trained(place, "painted", "painted")
    assert not same(painted, without) and validation(painted)[0] != validation(without)[0]
    other = trained(place, "floor", "painted", data__mask_floor=0.6)
    assert not same(other, painted)
    all_floor = trained(place, "all-floor", "painted", data__mask_floor=1.0)
    assert same(all_floor, without)


@pytest.mark.parametrize(("name", "task"), [("flux2-klein", "edit"), ("wan", "t2v")])
def test_masks_are_the_targets_in_an_edit_task_and_lie_on_the_latents_of_clips_of_one_frame(
    tmp_path: Path, name: str, task: str
) -> None:
    torch.set_num_threads(1)
    variant = ("t2v-2.1",) if name == "wan" else ()
    registry.make_tiny(name, str(tmp_path / "model"), *variant)
    folders = ("target", "condition_1") if task == "edit" else ("data",)
    for folder in (*folders, "white", "painted"):
        (tmp_path / "set" / folder).mkdir(parents=True)
    for index, size in enumerate([(64, 96), (96, 64)]):
        for folder in folders:  # given pictures of another shape than the target, and so than its mask
            shape = (*(size if folder != "condition_1" else (64, 64)), 3)
            pixels = np.random.default_rng(index).integers(0, 255, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / folder / f"{index}.png")
        (tmp_path / "set" / folders[0] / f"{index}.txt").write_text("a cat", encoding="utf-8")
        for folder, grey in (("white", 255), ("painted", 0)):
            pixels = np.full(size, grey, dtype=np.uint8)
            pixels[:32, :32] = 255
            Image.fromarray(pixels).save(tmp_path / "set" / folder / f"{index}.png")
    data = tmp_path / "set" if task == "edit" else tmp_path / "set" / "data"
    values = {
        **tiny_values(name, tmp_path / "model", data, tmp_path / "runs", task, *variant),
        "run.steps": 2,
        "preview.every": 0,
        "validation.every": 0,
        "log.tensorboard": False,
    }
    if name == "wan":
        values["data.images"] = values.pop("data.videos")
    else:
        values["data.conditions"] = [str(tmp_path / "set" / "condition_1")]
    found = []
    for masks in ("", "white", "painted"):
        told = {"data.mask_dir": str(tmp_path / "set" / masks)} if masks else {}
        folder = recipe.run(load_config(None, base={**values, **told, "run.name": f"r{masks}"})).folder
        found.append((losses(folder), digest(checkpoint(folder, 2))))
    assert found[0] == found[1] and found[2][1] != found[0][1] and found[2][0] != found[0][0]


def test_a_set_without_masks_beside_one_with_them_counts_as_a_whole(place: dict[str, Any]) -> None:
    """In one batch, too: white masks for half of the pictures change nothing."""
    folder = Path(place["run.output_dir"]).parent
    for index in range(5):
        half = folder / f"half-{index % 2}"
        half.mkdir(exist_ok=True)
        for ending in ("png", "txt"):
            (half / f"{index}.{ending}").write_bytes((folder / "data" / f"{index}.{ending}").read_bytes())
    (folder / "half-masks").mkdir()
    for index in (0, 2, 4):
        (folder / "half-masks" / f"{index}.png").write_bytes((folder / "white" / f"{index}.png").read_bytes())
    base = {key: value for key, value in place.items() if key != "data.images"}
    plain = [{"images": str(folder / "half-0")}, {"images": str(folder / "half-1")}]
    masked = [{**plain[0], "mask_dir": str(folder / "half-masks")}, plain[1]]
    runs = [
        trained({**base, "data.sets": sets, "data.batch_size": 3}, f"halves-{number}")
        for number, sets in enumerate((plain, masked))
    ]
    assert same(*runs)


def test_the_cache_keeps_latents_and_masks_apart(place: dict[str, Any]) -> None:
    """Cached is live; another mask is encoded alone, another floor not at all; latents stay those without masks."""
    folder = Path(place["run.output_dir"]).parent
    config = config_of(place, "apart", "painted", data__cache_dir=str(folder / "apart"))
    family = registry.load("zimage", config.config.model_options(), ModelPaths(folder / "model"))

    def twice(of: Any) -> dict[str, torch.Tensor]:
        before, now = encoded_twice(of.config, family, Build(torch.float32, torch.device("cpu")))
        assert digest(before) == digest(now)
        return before

    def entries(encoder: str) -> set[str]:
        return {one.name for one in (folder / "apart" / encoder).rglob("*.safetensors")}

    first = twice(config)
    masks, latents = entries("mask"), entries("vae")
    assert (len(masks), len(latents)) == (5, 5)
    floored = twice(
        config_of(place, "apart", "painted", data__cache_dir=str(folder / "apart"), data__mask_floor=0)
    )
    assert entries("mask") == masks and digest(floored) != digest(first)
    twice(
        config_of(place, "apart", "white", data__cache_dir=str(folder / "apart"))
    )  # equal files of two sizes
    assert len(entries("mask")) == 5 + 2 and entries("vae") == latents
    for name, tensor in first.items():
        if name.endswith("/mask"):
            assert tensor.shape == first[name.replace("mask", "latent")].shape[-2:]
            assert pytest.approx(float(tensor.min())) == 0.1 and float(tensor.max()) == 1


def test_a_mask_changed_after_the_scan_and_a_black_one_stop_the_run_by_name(place: dict[str, Any]) -> None:
    folder = Path(place["run.output_dir"]).parent
    with pytest.raises(UserErrors, match=r"black.*nothing of the mask is white"):
        (folder / "black").mkdir()
        for index in range(5):
            pixels = np.array(Image.open(folder / "painted" / f"{index}.png")) * (index != 3)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "black" / f"{index}.png")
        trained(place, "black", "black")
    options = SetOptions(images=folder / "data", resolution=64, mask_dir=folder / "black")
    item = scan([options], 16).items[0]
    (folder / "black" / "0.png").write_bytes((folder / "white" / "0.png").read_bytes())
    with pytest.raises(UserError, match="changed after"):
        Facts.of(MaskEncoder(), "fp32").give(Inputs.of(item))


def test_keys_hang_on_the_mask_its_channel_and_the_size(place: dict[str, Any]) -> None:
    folder = Path(place["run.output_dir"]).parent
    options = SetOptions(images=folder / "data", resolution=64, mask_dir=folder / "painted")
    item = scan([options], 16).items[0]
    facts = Facts.of(MaskEncoder(), "fp32")
    assert item.mask is not None
    key = facts.key(Inputs.of(item))
    assert facts.key(Inputs.of(replace(item, mask=item.mask._replace(floor=0.9)))) == key
    others = [
        replace(item, mask=item.mask._replace(digest="other")),
        replace(item, mask=item.mask._replace(alpha=True)),
        replace(item, size=Size(32, 32)),
    ]
    assert len({key, *(facts.key(Inputs.of(one)) for one in others)}) == 4
    assert not facts.applies(Inputs.of(replace(item, mask=None)))


def test_stopped_and_resumed_with_masks_is_never_interrupted_wherever_the_masks_lie(
    place: dict[str, Any],
) -> None:
    whole = trained(place, "whole", "painted")
    trained(place, "halves", "painted", run__steps=2)
    folder = Path(place["run.output_dir"]).parent
    (folder / "moved").mkdir()
    for file in (folder / "painted").iterdir():
        (folder / "moved" / file.name).write_bytes(file.read_bytes())
    halves = recipe.run(config_of(place, "halves", "moved"), resume="latest").folder
    assert same(whole, halves)
    with pytest.raises(UserError, match="not those this run began with"):
        recipe.run(config_of(place, "halves", "white", run__steps=6), resume="latest")
    with pytest.raises(UserError, match="mask_floor"):
        recipe.run(config_of(place, "halves", "moved", run__steps=6, data__mask_floor=0.3), resume="latest")


def test_the_alpha_channel_is_the_same_mask(place: dict[str, Any]) -> None:
    """Of pictures that are white where they are transparent anyway, beside the same pictures without alpha."""
    folder = Path(place["run.output_dir"]).parent
    (folder / "composed").mkdir()
    for file in (folder / "alpha").glob("*.png"):
        image = Image.open(file)
        composed = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        composed.save(folder / "composed" / file.name)
    options = {"resolution": 64, "default_caption": ""}
    facts = Facts.of(MaskEncoder(), "fp32")
    by_alpha = scan([SetOptions(images=folder / "alpha", mask_alpha=True, **options)], 16).items  # type: ignore[arg-type]
    by_folder = scan(
        [SetOptions(images=folder / "composed", mask_dir=folder / "painted", **options)],  # type: ignore[arg-type]
        16,
    ).items
    for one, two in zip(by_alpha, by_folder, strict=True):
        masks = [MaskEncoder().encode(facts.give(Inputs.of(item)))["mask"] for item in (one, two)]
        assert torch.equal(*masks)
    assert losses(trained(place, "by-alpha", data__images=str(folder / "alpha"), data__mask_alpha=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked from a process that has torch loaded")
def test_two_ranks_learn_what_two_accumulated_masked_batches_teach_to_the_bit(
    place: dict[str, Any], tmp_path: Path
) -> None:
    def on_rank(ranks: Ranks) -> None:
        with recipe.Session.open(config_of(place, "two", "painted"), ranks=ranks) as session:
            session.run()

    forked_ranks.together(2, on_rank, tmp_path)
    one = trained(place, "accumulated", "painted", optimizer__gradient_accumulation=2)
    assert same(Path(place["run.output_dir"]) / "two", one)
