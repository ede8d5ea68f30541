"""The other embedded models: one edits, one is a Z-Image, one a WAN. Small, bf16, and they do what they are told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import Flux2Transformer2DModel, ZImagePipeline
from safetensors import safe_open

from whitetuner.config.load import load_config
from whitetuner.drawing import sample
from whitetuner.errors import UserError
from whitetuner.models import folder_paths, model_folder, model_paths, wishes_of
from whitetuner.nano.builtin import MODELS, SHARED, builtin_path, shared_parts
from whitetuner.nano.draw import NEW_SHAPE, NEW_WORD
from whitetuner.nano.edits import NEW_KIND
from whitetuner.nano.pretrain_edit import scores
from whitetuner.nano.pretrain_zimage import draw_each
from whitetuner.nano.score import evaluation_prompts, load_pipeline, score

OTHERS = [name for name in MODELS if name != "builtin:nano"]
MOST_BYTES = 5_000_000


@pytest.mark.parametrize("name", OTHERS)
def test_each_is_small_in_bf16_and_shares_what_it_can(name: str) -> None:
    files = [path for path in builtin_path(name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST_BYTES
    for path in builtin_path(name).rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}, path  # noqa: SIM118
    paths = folder_paths(name)
    assert {paths.component(part).is_dir() for part in ("transformer", *SHARED)} == {True}
    assert {"text_encoder", "tokenizer"} <= set(shared_parts(name)) or name == "builtin:nano-wan"


def test_the_first_one_shares_nothing() -> None:
    assert shared_parts("builtin:nano") == {}


@pytest.mark.parametrize(
    ("name", "family", "task"),
    [("builtin:nano-edit", "flux2-klein", "edit"), ("builtin:nano-zimage", "zimage", "t2i")],
)
def test_a_config_names_it(name: str, family: str, task: str) -> None:
    values = {"model.family": family, "model.task": task, "model.path": name}
    config = load_config(
        None,
        base={
            **values,
            **wanted(task),
            "run.steps": 1,
        },
    ).config
    paths = model_paths(config)
    assert paths.component("text_encoder").parent == builtin_path()
    assert wishes_of(paths.folder).size is not None


def wanted(task: str) -> dict[str, object]:
    return {"data.target": "t", "data.conditions": ["c"]} if task == "edit" else {"data.images": "i"}


def test_a_name_that_is_not_there_is_told() -> None:
    with pytest.raises(UserError, match="no embedded model builtin:micro"):
        model_folder("builtin:micro")


def edit_pipeline():
    folder = folder_paths("builtin:nano-edit").component("transformer")
    return load_pipeline(
        transformer=Flux2Transformer2DModel.from_pretrained(folder, dtype=torch.float32).eval()
    )


def zimage_pipeline() -> ZImagePipeline:
    klein = load_pipeline()
    return ZImagePipeline.from_pretrained(
        builtin_path("builtin:nano-zimage"),
        text_encoder=klein.text_encoder,
        tokenizer=klein.tokenizer,
        torch_dtype=torch.float32,
    )


def test_it_edits_as_it_is_told_and_does_not_know_the_new_word() -> None:
    pipeline = edit_pipeline()
    assert scores(pipeline, 24, 511)["all"] >= 0.75
    assert scores(pipeline, 12, 512, (NEW_KIND,))[NEW_KIND] < 0.1


def test_the_z_image_draws_what_the_captions_say_and_does_not_know_the_new_word() -> None:
    pipeline = zimage_pipeline()
    captions, labels = evaluation_prompts(24, 501)
    images = draw_each(pipeline, captions, 501)
    assert score(images, labels).all >= 0.7
    assert score(images, [*labels[1:], labels[0]]).all <= 0.1
    captions, labels = evaluation_prompts(12, 502, (NEW_SHAPE,), NEW_WORD)
    assert score(draw_each(pipeline, captions, 502), labels).all < 0.1


def test_sample_draws_with_it_by_its_name(tmp_path: Path) -> None:
    out = sample("builtin:nano-zimage", prompt="a red circle on blue", out=tmp_path / "a.png", steps=2)
    assert out.is_file()
