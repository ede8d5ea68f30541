"""What is Z-Image V2's alone: it begins as V1 (E11), its streams are apart, its layers add up, its folder loads back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from pydantic import ValidationError
from safetensors.torch import save_file
from subjects import CAPTIONS, Subject, plain_build

from whitetuner import drawing, recipe
from whitetuner.cli import main
from whitetuner.config.load import dump_config, load_config
from whitetuner.data.samples import make_testdata
from whitetuner.errors import UserError
from whitetuner.evidence import begins_as
from whitetuner.families import registry
from whitetuner.families.contract import E1_TOLERANCE, quiet
from whitetuner.families.zimage_v2 import model as model_module
from whitetuner.families.zimage_v2.keys import KEYS
from whitetuner.families.zimage_v2.model import Model
from whitetuner.families.zimage_v2.spec import SPEC, ZImageV2Options
from whitetuner.families.zimage_v2.transformer import TWICE, ZImageV2Transformer2DModel, v2_names
from whitetuner.family import ModelPaths
from whitetuner.memory.build import Build, rehearse_module
from whitetuner.models import check_model, family_of
from whitetuner.records import EncodeInput, Size
from whitetuner.runs import events
from whitetuner.tiny import tiny_values

SIZES = {
    "in_channels": 16,
    "dim": 24,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 16,
    "axes_dims": [4, 4, 4],
    "axes_lens": [256, 32, 32],
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def v1(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    folder = tmp_path_factory.mktemp("v1") / "model"
    with quiet():
        registry.make_tiny("zimage", str(folder))
        yield Subject("zimage", "t2i", folder)


@pytest.fixture(scope="module")
def v2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    folder = tmp_path_factory.mktemp("v2") / "model"
    with quiet():
        registry.make_tiny("zimage-v2", str(folder))
        yield Subject("zimage-v2", "t2i", folder)


def converted(folder: Path, **options: Any) -> Model:
    return Model(ZImageV2Options(max_sequence_length=64, **options), ModelPaths(folder))


def batch_of(subject: Subject) -> Any:
    """Three captions of three lengths."""
    return subject.bench.batch(subject.case(*CAPTIONS[:2], CAPTIONS[3], columns=6).inputs())


def distance(ours: Any, theirs: Any, batch: Any) -> float:
    """Between two families' velocities, relative to them."""
    sigma = torch.tensor([0.9, 0.5, 0.1])
    one, two = (
        family.predict(family.load(Build()), "transformer", batch, batch["latent"], sigma)
        for family in (ours, theirs)
    )
    return float((one - two).norm() / two.norm())


# -- E11 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [1, 2])
def test_v2_begins_as_v1(v1: Subject, double: int) -> None:
    ours = converted(v1.folder, double_layers=double)
    error, tensors, seen = begins_as(ours, Build(), v1.family, batch_of(v1), tolerance=E1_TOLERANCE)
    assert error < E1_TOLERANCE and seen == tensors > 75


@pytest.mark.parametrize("build", [Build(dtype=torch.bfloat16), Build(quantize="int8")])
def test_rounded_alike_v2_begins_as_v1_to_the_bit(v1: Subject, build: Build) -> None:
    batch, sigma = batch_of(v1), torch.tensor([0.9, 0.5, 0.1])
    one, two = (
        family.predict(family.load(build), "transformer", batch, batch["latent"], sigma)
        for family in (v1.family, converted(v1.folder, double_layers=2))
    )
    assert torch.equal(one, two)


def shifted(name: str, double: int) -> tuple[str, ...]:
    """Dual-stream layers from V1's last, not its first."""
    moved = (
        name.replace("layers.0.", "layers.#.")
        .replace("layers.2.", "layers.0.")
        .replace("layers.#.", "layers.2.")
    )
    return v2_names(moved, double)


def exchanged(name: str, double: int) -> tuple[str, ...]:
    """The text's norms before and behind the feed-forward in each other's place."""
    swap = {"ffn_norm1_context": "ffn_norm2_context", "ffn_norm2_context": "ffn_norm1_context"}
    return tuple(
        ".".join(swap.get(word, word) for word in target.split(".")) for target in v2_names(name, double)
    )


def unpadded(name: str, double: int) -> tuple[str, ...]:
    """The pad tokens of picture and text in each other's place."""
    return {"x_pad_token": ("cap_pad_token",), "cap_pad_token": ("x_pad_token",)}.get(
        name, v2_names(name, double)
    )


@pytest.mark.parametrize("wrong", [shifted, exchanged, unpadded])
def test_a_wrong_conversion_does_not_begin_as_v1(
    v1: Subject, wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "v2_names", wrong)
    ours = converted(v1.folder, double_layers=2)
    assert distance(ours, v1.family, batch_of(v1)) > 100 * E1_TOLERANCE


def test_every_tensor_of_v1_has_its_place_and_the_texts_copies_their_own(v1: Subject) -> None:
    state = v1.bench.modules["transformer"].state_dict()
    module = converted(v1.folder, double_layers=2).load(Build())["transformer"]
    ours = dict(module.named_parameters())
    places = [(name, target) for name in state for target in v2_names(name, 2)]
    assert sorted(target for _, target in places) == sorted(ours)
    assert all(torch.equal(ours[target], state[name]) for name, target in places)
    assert len({tensor.data_ptr() for tensor in ours.values()}) == len(ours)


# -- a V1 folder given as V2 -----------------------------------------------------------------------------------------


def test_a_v1_folder_is_taken_told_and_left_alone(v1: Subject) -> None:
    paths = ModelPaths(v1.folder)
    before = {p: p.read_bytes() for p in v1.folder.rglob("*") if p.is_file()}
    check_model(SPEC, paths)
    assert family_of(v1.folder) == "zimage"  # when nobody says which family it is
    (word,) = SPEC.advice(ZImageV2Options(), paths)
    assert "holds Z-Image V1" in str(word) and "1 dual-stream and 2 single-stream" in str(word)
    for build in (rehearse_module, Build()):
        module = converted(v1.folder).load(build)["transformer"]
        assert type(module).__name__ == "ZImageV2Transformer2DModel"
        assert (len(module.double_stream_layers), len(module.layers)) == (1, 2)
    assert before == {p: p.read_bytes() for p in v1.folder.rglob("*") if p.is_file()}


def test_a_v2_folder_is_not_converted_again_and_no_folder_of_v1(v2: Subject) -> None:
    assert SPEC.advice(ZImageV2Options(), ModelPaths(v2.folder)) == ()
    assert family_of(v2.folder) == "zimage-v2"
    with pytest.raises(UserError, match="this is a ZImageV2Transformer2DModel, but Z-Image is a ZImage"):
        check_model(registry.spec("zimage"), ModelPaths(v2.folder))


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, (1, 2)),
        ({"double_layers": 2}, (2, 1)),
        ({"single_layers": 1}, (2, 1)),
        ({"double_layers": 1, "single_layers": 2}, (1, 2)),
    ],
)
def test_the_layers_are_divided_as_asked(
    v1: Subject, options: dict[str, int], layers: tuple[int, int]
) -> None:
    module = converted(v1.folder, **options).load(rehearse_module)["transformer"]
    assert (len(module.double_stream_layers), len(module.layers)) == layers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"double_layers": 2, "single_layers": 2},
            r"2 dual-stream and 2 single-stream layers are 4, but .* has 3",
        ),
        ({"double_layers": 1, "single_layers": 1}, r"are 2, but the model has 3"),
        ({"double_layers": 3}, r"3 dual-stream and 0 single-stream"),
        ({"single_layers": 5}, r"-2 dual-stream"),
    ],
)
def test_layers_that_do_not_add_up_are_told(v1: Subject, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        converted(v1.folder, **options).load(rehearse_module)


def test_check_says_what_happens_to_the_folder(
    v1: Subject, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_testdata("t2i", tmp_path / "data", 3, 0)
    for layers, code, said in (
        (2, 0, "holds Z-Image V1: it is converted"),
        (3, 2, "3 dual-stream and 0 single"),
    ):
        values = tiny_values("zimage-v2", v1.folder, tmp_path / "data", tmp_path / "out")
        config = tmp_path / f"{layers}.toml"
        loaded = load_config(None, base={**values, "model.options.double_layers": layers})
        config.write_text(dump_config(loaded.config), encoding="utf-8")
        assert main(["check", str(config)]) == code
        assert said in capsys.readouterr().out


def test_a_run_from_a_v1_folder_is_drawn_with(v1: Subject, tmp_path: Path) -> None:
    make_testdata("t2i", tmp_path / "data", 3, 0)
    values = tiny_values("zimage-v2", v1.folder, tmp_path / "data", tmp_path)
    result = recipe.run(load_config(None, base={**values, "run.steps": 4, "run.name": "run"}))
    told = [event.text for event in events.read(result.folder / "events.jsonl")[0] if event.kind == "message"]
    assert any("holds Z-Image V1" in text for text in told)
    pictures = []
    for strength in (1.0, 0.0):
        drawn = drawing.sample(
            str(result.folder),
            strength=strength,
            prompt="a red circle",
            out=tmp_path / f"{strength}.png",
            size=Size(64, 64),
            steps=2,
        )
        pictures.append(drawn.read_bytes())
    assert pictures[0] != pictures[1]


def test_a_v2_folder_has_its_layers_already(v2: Subject) -> None:
    assert len(converted(v2.folder, double_layers=2).load(rehearse_module)["transformer"].layers) == 1
    with pytest.raises(UserError, match="has 2 dual-stream layers already, not 1"):
        converted(v2.folder, double_layers=1).load(rehearse_module)


@pytest.mark.parametrize("wrong", [{"double_layers": 0}, {"single_layers": -1}, {"n_double_layers": 15}])
def test_options_are_checked(wrong: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        ZImageV2Options(**wrong)


def test_an_adapter_of_v1_is_merged_into_both_streams(v1: Subject, tmp_path: Path) -> None:
    numbers = torch.Generator().manual_seed(1)
    lead, file = "diffusion_model.layers.0.feed_forward.w1", tmp_path / "adapter.safetensors"
    down, up = torch.randn(2, 24, generator=numbers), torch.randn(64, 2, generator=numbers)
    save_file({f"{lead}.lora_A.weight": down, f"{lead}.lora_B.weight": up}, file)
    options = v1.options.model_copy(update={"merge_adapter": str(file)})
    merged = registry.load("zimage", options, ModelPaths(v1.folder))
    ours = converted(v1.folder, merge_adapter=str(file))
    assert distance(ours, merged, batch_of(v1)) < E1_TOLERANCE
    first = ours.load(Build())["transformer"].double_stream_layers[0]
    assert torch.equal(first.feed_forward.w1.weight, first.feed_forward_context.w1.weight)
    plain = v1.bench.modules["transformer"].layers[0].feed_forward.w1.weight
    assert torch.allclose(first.feed_forward.w1.weight, plain + up @ down, atol=1e-6)


# -- the model -------------------------------------------------------------------------------------------------------


def sample(seed: int, height: int, width: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    return torch.randn(16, 1, height, width, generator=numbers), torch.randn(tokens, 16, generator=numbers)


def test_pictures_of_any_size_beside_captions_of_any_length(v2: Subject) -> None:
    """As in V1: a list is what its members are alone."""
    module = v2.bench.modules["transformer"]
    given = [sample(0, 8, 8, 5), sample(1, 12, 16, 40), sample(2, 8, 20, 32)]
    times = torch.tensor([0.1, 0.5, 0.9])
    with torch.no_grad():
        together = module([x for x, _ in given], times, [text for _, text in given], return_dict=False)[0]
        for i, (x, text) in enumerate(given):
            alone = module([x], times[i : i + 1], [text]).sample[0]
            assert together[i].shape == x.shape
            assert float((together[i] - alone).norm() / alone.norm()) < E1_TOLERANCE


def test_both_streams_learn_and_the_text_on_its_own(v2: Subject) -> None:
    module = v2.family.load(Build())["transformer"].requires_grad_(True)
    x, text = sample(0, 8, 8, 20)
    module([x], torch.tensor([0.5]), [text]).sample[0].square().mean().backward()
    missing = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []
    block = module.double_stream_layers[0]
    for name in TWICE:
        pairs = zip(
            getattr(block, name).parameters(), getattr(block, f"{name}_context").parameters(), strict=True
        )
        assert all(not torch.equal(picture.grad, text.grad) for picture, text in pairs)


def test_the_models_own_gradient_checkpointing_changes_no_bit(v2: Subject) -> None:
    found = []
    for checkpointing in (False, True):
        module = v2.family.load(Build())["transformer"].requires_grad_(True).train()
        if checkpointing:
            module.enable_gradient_checkpointing()
        x, text = sample(3, 8, 12, 20)
        module([x], torch.tensor([0.4]), [text]).sample[0].square().mean().backward()
        found.append({name: p.grad for name, p in module.named_parameters()})
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize(
    "wrong", [{"n_double_layers": 0}, {"n_double_layers": 3}, {"n_double_layers": 1, "siglip_feat_dim": 8}]
)
def test_a_model_that_cannot_be_is_told(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"cannot be dual-stream|has no V2"):
        ZImageV2Transformer2DModel(n_layers=3, **SIZES, **wrong)


def test_attention_is_shared_and_nothing_else(v2: Subject) -> None:
    v1_names = set(ZImageTransformer2DModel(n_layers=1, **SIZES).layers[0].state_dict())
    names = set(v2.bench.modules["transformer"].double_stream_layers[0].state_dict())
    assert names - v1_names == {
        name.replace(word, f"{word}_context") for name in v1_names for word in TWICE if name.startswith(word)
    }
    assert {name.split(".")[0] for name in v1_names} - set(TWICE) == {"attention"}


# -- its folder ------------------------------------------------------------------------------------------------------


def test_the_saved_folder_loads_back_with_one_call(v1: Subject, tmp_path: Path) -> None:
    module = converted(v1.folder, double_layers=2).load(Build())["transformer"]
    module.save_pretrained(tmp_path / "transformer")
    config = json.loads((tmp_path / "transformer" / "config.json").read_text(encoding="utf-8"))
    assert config["_class_name"] == SPEC.transformer_class
    assert (config["n_layers"], config["n_double_layers"]) == (3, 2)
    back = ZImageV2Transformer2DModel.from_pretrained(tmp_path / "transformer")
    again = Build()(ZImageV2Transformer2DModel, tmp_path / "transformer")
    for name, tensor in module.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor) and torch.equal(again.state_dict()[name], tensor)


def test_a_whole_folder_is_a_pipeline_of_diffusers(v2: Subject) -> None:
    """And draws what we draw: V2 inside Z-Image's own pipeline."""
    with quiet():
        pipe = ZImagePipeline.from_pretrained(v2.folder)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.transformer) is ZImageV2Transformer2DModel
    given = v2.case("a red circle").inputs()[0]
    theirs = pipe(
        prompt="a red circle",
        width=64,
        height=64,
        num_inference_steps=3,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(4),
        max_sequence_length=64,
    ).images[0]
    ours = v2.family.generate(
        v2.bench.modules,
        v2.family.load_decoder(plain_build),
        v2.bench.encode(given),
        v2.bench.encode(EncodeInput("", given.target)),
        size=Size(64, 64),
        steps=3,
        cfg=3.0,
        seed=4,
    )[0]
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_a_damaged_v2_folder_is_told(v2: Subject, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(v2.folder, folder)
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "n_double_layers": 1}), encoding="utf-8")
    with pytest.raises(UserError, match="tensors of ZImageV2Transformer2DModel"):
        converted(folder).load(rehearse_module)


def test_names_in_files(v2: Subject) -> None:
    state = v2.bench.modules["transformer"].state_dict()
    assert set(KEYS.to_original(state)) == set(state)  # no other program knows V2: names stay
    path = "double_stream_layers.0.feed_forward_context.w1"
    assert KEYS.adapter_prefix(path, "comfyui") == f"diffusion_model.{path}"
    assert KEYS.module_path(f"lycoris_{path.replace('.', '_')}") == path
    for foreign in (
        "layers.0.attention.qkv.weight",
        "x_embedder.weight",
        "layers.0.feed_forward_context.w1.weight",
    ):
        with pytest.raises(UserError, match="no tensor of a Z-Image V2"):
            KEYS.from_original({foreign: torch.zeros(2, 2)})


def test_the_plan_is_told_the_converted_release() -> None:
    """1.83 billion numbers more than Z-Image's 6.155: 121.9 million for each of the 15 dual-stream layers."""
    config = dict(registry.sketch("zimage-v2").RELEASED["base"]["transformer"])
    assert config.pop("_class_name") == SPEC.transformer_class
    with torch.device("meta"):
        module = ZImageV2Transformer2DModel(**config)
    count = sum(p.numel() for p in module.parameters())
    assert count == pytest.approx(6.155e9 + 15 * 121.9e6, rel=1e-3)
