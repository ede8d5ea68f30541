"""What is WAN's alone: which variant is which, experts, first frames, slices of the VAE, names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from subjects import Subject, plain_build

from whitetuner.diffusion.sigmas import SigmaSettings, cumulative, draw_sigma, generator_for
from whitetuner.errors import UserError
from whitetuner.families import registry
from whitetuner.families.contract import euler_step_error, picture, quiet, told
from whitetuner.families.wan import mutants
from whitetuner.families.wan.encoders import LatentEncoder, TextEncoder
from whitetuner.families.wan.keys import KEYS
from whitetuner.families.wan.reference import Reference
from whitetuner.families.wan.spec import SPEC, WanOptions, held_variant
from whitetuner.family import ModelPaths
from whitetuner.records import EncodeInput, Size

VARIANTS = ("i2v-2.1", "i2v-2.2", "t2v-2.1", "t2v-2.2", "ti2v-5b")


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Subject]]:
    folder = tmp_path_factory.mktemp("wan")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with quiet():
        found = {}
        for variant in VARIANTS:
            registry.make_tiny("wan", str(folder / variant), variant)
            found[variant] = Subject("wan", SPEC.tasks_of(variant)[0], folder / variant, variant)
        yield found
    torch.set_num_threads(threads)


# -- which is which ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_told_from_its_folder_and_held_against_the_option(
    subjects: dict[str, Subject], variant: str
) -> None:
    paths = ModelPaths(subjects[variant].folder)
    assert held_variant(paths) == variant
    for other in VARIANTS:
        family = registry.load("wan", WanOptions(variant=other), paths)
        if other == variant:
            assert family.options.variant == variant
            continue
        with pytest.raises(UserError, match=f"says {other}, but the folder holds WAN {variant}"):
            _ = family.options


def test_a_model_for_the_other_task_is_told(subjects: dict[str, Subject]) -> None:
    for variant, task in (("t2v-2.1", "i2v"), ("i2v-2.1", "t2v"), ("i2v-2.2", "t2v")):
        with pytest.raises(UserError, match=f"this is WAN {variant}"):
            subjects[variant].family.encoders(task)
    assert {one.name for one in subjects["ti2v-5b"].family.encoders("t2v")} == {"text", "vae"}


@pytest.mark.parametrize(
    ("change", "message"),
    [({"pos_embed_seq_len": 514}, "FLF2V"), ({"in_channels": 100}, "100 input channels")],
)
def test_kinds_that_are_not_trained_here_are_told(
    subjects: dict[str, Subject], tmp_path: Path, change: dict, message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(subjects["i2v-2.1"].folder, folder)
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **change}), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        held_variant(ModelPaths(folder))


def test_what_each_variant_is_made_of(subjects: dict[str, Subject]) -> None:
    made = {
        name: set(SPEC.components_of(WanOptions(), ModelPaths(one.folder))) for name, one in subjects.items()
    }
    assert made["i2v-2.1"] - made["t2v-2.1"] == {"image_encoder", "image_processor"}
    assert made["i2v-2.2"] - made["t2v-2.1"] == made["t2v-2.2"] - made["t2v-2.1"] == {"transformer_2"}
    assert made["ti2v-5b"] == made["t2v-2.1"]


def test_rates_strides_and_tokens(subjects: dict[str, Subject]) -> None:
    rates = {name: SPEC.fps_of(WanOptions(), ModelPaths(one.folder)) for name, one in subjects.items()}
    assert rates == dict.fromkeys(VARIANTS, 16.0) | {"ti2v-5b": 24.0}
    assert subjects["ti2v-5b"].family.stride() == 32 and subjects["i2v-2.2"].family.stride() == 16
    assert SPEC.tokens(Size(832, 480, 81), 16) == 21 * 52 * 30 == 32760


# -- experts -------------------------------------------------------------------------------------------------------


def test_experts_are_parts_with_the_models_own_boundary(subjects: dict[str, Subject], tmp_path: Path) -> None:
    for variant, boundary in (("i2v-2.2", 0.9), ("t2v-2.2", 0.875)):
        for expert, names in (("both", 2), ("high", 1), ("low", 1)):
            family = registry.load("wan", WanOptions(expert=expert), ModelPaths(subjects[variant].folder))
            parts = SPEC.parts(family.options)
            assert len(parts) == names and set(family.load(plain_build)) == {part.name for part in parts}
            ranges = {part.name: (part.sigma_range, part.suffix) for part in parts}
            if expert != "low":
                assert ranges["transformer"] == ((boundary, 1.0), "high_noise")
            if expert != "high":
                assert ranges["transformer_2"] == ((0.0, boundary), "low_noise")
    folder = tmp_path / "model"
    shutil.copytree(subjects["i2v-2.2"].folder, folder)
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text("utf-8")), "boundary_ratio": 0.7}), "utf-8")
    assert registry.load("wan", WanOptions(), ModelPaths(folder)).options.boundary == 0.7
    assert registry.load("wan", WanOptions(boundary=0.6), ModelPaths(folder)).options.boundary == 0.6
    with pytest.raises(UserError, match="no expert to choose"):
        _ = registry.load("wan", WanOptions(expert="high"), ModelPaths(subjects["i2v-2.1"].folder)).options


@pytest.mark.parametrize("timesteps", ["linear", "sigmoid", "shift"])
def test_ten_thousand_timesteps_of_each_expert_lie_in_its_range(timesteps: str) -> None:
    """And are as dense there as the chosen way of drawing is, restricted to the range (Kolmogorov-Smirnov)."""
    for part in SPEC.parts(WanOptions(variant="i2v-2.2")):
        low, high = part.sigma_range
        settings = SigmaSettings(timesteps=timesteps, shift=5.0, part_range=part.sigma_range)
        drawn = sorted(
            draw_sigma(settings, generator_for(7, f"item-{index}", 0, "sigma")) for index in range(10_000)
        )
        assert low <= drawn[0] and (drawn[-1] < high or high == 1.0)
        free = SigmaSettings(timesteps=timesteps, shift=5.0)
        share = cumulative(free, high) - cumulative(free, low)
        wanted = np.array([(cumulative(free, sigma) - cumulative(free, low)) / share for sigma in drawn])
        gap = np.abs(wanted - np.arange(1, 10_001) / 10_000).max()
        assert gap < 1.95 / 100  # 0.1 % of honest samples are further off


@pytest.mark.slow
def test_conventions_of_one_kind_are_told(subjects: dict[str, Subject]) -> None:
    for variant, own, steps in (
        ("i2v-2.1", mutants.OF_2_1, 1),
        ("i2v-2.2", mutants.OF_2_2, 2),
        ("ti2v-5b", mutants.OF_5B, 2),
    ):
        subject = subjects[variant]
        case = subject.case(columns=6, steps=steps)
        missed = [
            name
            for name, mutant in own.items()
            if not told(mutant, subject.family, plain_build, subject.reference, case, "i2v")
        ]
        assert not missed, variant


def test_both_experts_draw_and_one_alone_is_refused(subjects: dict[str, Subject]) -> None:
    subject = subjects["i2v-2.2"]
    prompt = subject.bench.encode(subject.case().inputs()[0])
    decoder = subject.family.load_decoder(plain_build)
    settings = {"size": subject.size(), "steps": 3, "cfg": 1.0, "seed": 0}
    seen = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
        for name, module in subject.bench.modules.items()
    ]
    frames = subject.family.generate(subject.bench.modules, decoder, prompt, None, **settings)
    for handle in handles:
        handle.remove()
    assert len(frames) == 9 and seen[0] == "transformer" and seen[-1] == "transformer_2"
    assert seen == sorted(seen), "from much noise to little: the experts change once"
    one = registry.load("wan", WanOptions(expert="low"), ModelPaths(subject.folder))
    with pytest.raises(UserError, match="both experts"):
        one.generate(one.load(plain_build), decoder, prompt, None, **settings)


# -- first frames --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["i2v-2.1", "i2v-2.2"])
def test_mask_and_condition_are_the_pipelines(subjects: dict[str, Subject], variant: str) -> None:
    subject = subjects[variant]
    given = subject.case(columns=5, rows=7).inputs()[0]
    pipe = subject.reference.pipe
    image = pipe.video_processor.preprocess(given.conditions[0])
    width, height, frames = given.size
    _, condition = pipe.prepare_latents(image, 1, 16, height, width, frames, torch.float32, "cpu")
    first = subject.bench.encode(given)["first_frame_latents"][None]
    ours = torch.cat([subject.family.mask(first), first], 1)
    assert torch.equal(ours[:, :4], condition[:, :4])
    assert torch.allclose(ours, condition, atol=1e-6, rtol=0)


def test_nothing_is_learned_of_the_5bs_first_frame(subjects: dict[str, Subject]) -> None:
    subject = subjects["ti2v-5b"]
    given = subject.case().inputs()[0]
    batch = subject.bench.batch([replace(given, conditions=given.target[:1])])
    x0 = batch["latent"]
    assert torch.equal(x0[:, :, :1], batch["first_frame_latents"]), "the frame alone is the clip's first"
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.4])
    said = subject.family.predict(subject.bench.modules, "transformer", batch, 0.6 * x0 + 0.4 * noise, sigma)
    assert torch.allclose(said[:, :, :1], (noise - x0)[:, :, :1], atol=1e-5)
    assert not torch.allclose(said[:, :, 1:], (noise - x0)[:, :, 1:], atol=1e-1)


def test_a_clip_of_another_length_is_another_condition(subjects: dict[str, Subject]) -> None:
    encoder = subjects["i2v-2.1"].bench.encoders[1]
    given = subjects["i2v-2.1"].case().inputs()[0]
    longer = replace(given, size=given.size._replace(frames=13))
    one, other = (encoder.encode(each)["first_frame_latents"] for each in (given, longer))
    assert other.shape[1] == one.shape[1] + 1 and torch.equal(other[:, : one.shape[1]], one)


@pytest.mark.parametrize("variant", ["i2v-2.1", "ti2v-5b"])
def test_slices_of_four_frames_are_the_vaes_own(subjects: dict[str, Subject], variant: str) -> None:
    """Encoded one after the other, as the whole clip at once is; no more than four frames are pixels at a time."""
    subject = subjects[variant]
    size = subject.size()._replace(frames=17)
    clip = tuple(picture(size, frame) for frame in range(17))
    encoder = LatentEncoder(ModelPaths(subject.folder))
    encoder.load(plain_build)
    seen: list[int] = []
    right = encoder.pixels
    encoder.pixels = lambda frames: (seen.append(len(frames)), right(frames))[1]  # type: ignore[method-assign]
    ours = encoder.encode(EncodeInput("", clip, size=size))["latent"]
    assert seen == [1, 4, 4, 4, 4]
    with torch.no_grad():
        whole = encoder._vae.encode(right(clip)).latent_dist.mode()
    assert torch.allclose(ours, encoder.normalise(encoder._vae, whole)[0], atol=1e-6)
    assert ours.shape[1] == 5


# -- text ----------------------------------------------------------------------------------------------------------


def test_captions_are_cleaned_as_the_pipeline_cleans(subjects: dict[str, Subject]) -> None:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    encoder = TextEncoder(ModelPaths(subjects["t2v-2.1"].folder))
    for text in ("  a  cat\n\ton&amp;amp; off ", "donâ€™t", "&lt;b&gt; 两只猫", ""):
        assert encoder.clean(text) == prompt_clean(text)


# -- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["i2v-2.1", "i2v-2.2", "ti2v-5b"])
def test_diffusers_reads_our_original_layout(
    subjects: dict[str, Subject], tmp_path: Path, variant: str
) -> None:
    """Its own converter is the inverse of ours."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    state = subjects[variant].bench.modules["transformer"].state_dict()
    original = KEYS.to_original(state)
    file = tmp_path / "wan.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in original.items()}, file)
    back = convert_wan_transformer_to_diffusers(dict(original))
    assert set(back) == set(state) and all(torch.equal(back[name], state[name]) for name in state)
    assert "head.modulation" in original and "blocks.1.cross_attn.k.weight" in original
    module = WanTransformer3DModel.from_config(subjects[variant].bench.modules["transformer"].config)
    module.load_state_dict(KEYS.from_original({f"model.diffusion_model.{k}": v for k, v in original.items()}))


def test_names_in_adapter_files() -> None:
    path, original = "blocks.37.attn2.add_k_proj", "blocks.37.cross_attn.k_img"
    assert KEYS.adapter_prefix(path, "comfyui") == f"diffusion_model.{original}"
    assert KEYS.adapter_prefix(path, "diffusers") == f"transformer.{path}"
    for name in (
        f"diffusion_model.{original}",
        "lora_unet_" + original.replace(".", "_"),
        f"transformer.{path}",
        f"transformer_2.{path}",
        "lycoris_" + path.replace(".", "_"),
        path,
        original,
    ):
        assert KEYS.module_path(name) == path
    for name in (
        "blocks.1.norm2",
        "patch_embedding",
        "lora_unet__blocks_0_ffn_0",
        "lycoris_blocks_x_ffn_net_2",
    ):
        assert KEYS.module_path(name) is None
    with pytest.raises(UserError, match="no tensor of a WAN"):
        KEYS.to_original({"double_blocks.0.x.weight": torch.zeros(1)})


def test_two_steps_go_through_both_experts_as_in_the_pipeline(subjects: dict[str, Subject]) -> None:
    subject = subjects["t2v-2.2"]
    assert isinstance(subject.reference, Reference)
    assert euler_step_error(subject.bench, subject.reference, subject.case(steps=4)) < 1e-5
