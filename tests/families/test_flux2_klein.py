"""What is FLUX.2 Klein's alone: references, other VAEs, text layers, names in other programs, the schedule, warnings."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from pydantic import ValidationError
from safetensors.torch import save_file
from subjects import Subject, plain_build

from whitetuner.errors import UserError
from whitetuner.families import registry
from whitetuner.families.contract import (
    E1_TOLERANCE,
    Bench,
    Case,
    encoder_errors,
    euler_step_error,
    quiet,
)
from whitetuner.families.flux2_klein.keys import KEYS
from whitetuner.families.flux2_klein.reference import Reference
from whitetuner.families.flux2_klein.spec import SPEC, KleinOptions
from whitetuner.family import ModelPaths
from whitetuner.memory.build import Build
from whitetuner.records import EncodeInput, Size


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    folder = tmp_path_factory.mktemp("klein") / "model"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with quiet():
        registry.make_tiny("flux2-klein", str(folder))
        yield Subject("flux2-klein", "t2i", folder)
    torch.set_num_threads(threads)


def test_in_float32_the_bits_are_the_pipelines(klein: Subject) -> None:
    given = klein.case("a cat, 一只猫", columns=6).inputs()[0]
    assert set(encoder_errors(klein.bench, klein.reference, given).values()) == {0.0}
    assert euler_step_error(klein.bench, klein.reference, klein.case()) < 1e-7


def test_a_whole_picture_is_the_pipelines(klein: Subject) -> None:
    """Noise from the seed, schedule, guidance, decoding and rounding to 8 bits included."""
    size, given = Size(96, 64), klein.case("a red circle", columns=6).inputs()[0]
    frames = klein.family.generate(
        klein.bench.modules,
        klein.family.load_decoder(plain_build),
        klein.bench.encode(given),
        klein.bench.encode(EncodeInput("", given.target)),
        size=size,
        steps=4,
        cfg=3.0,
        seed=11,
    )
    theirs = klein.reference.pipe(
        prompt=given.caption,
        width=96,
        height=64,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(11),
        **klein.reference.text,
    ).images[0]
    assert np.array_equal(np.asarray(frames[0]), np.asarray(theirs))


# -- references ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def edit(klein: Subject) -> Subject:
    return Subject("flux2-klein", "edit", klein.folder)


@pytest.mark.parametrize("sizes", [(Size(64, 64),), (Size(80, 64), Size(64, 96), Size(64, 64))])
def test_one_step_beside_any_number_of_references_is_the_pipelines(
    edit: Subject, sizes: tuple[Size, ...]
) -> None:
    case = Case(("combine them",), Size(96, 64), condition_sizes=sizes)
    assert euler_step_error(edit.bench, edit.reference, case) < 1e-7
    assert set(encoder_errors(edit.bench, edit.reference, case.inputs()[0]).values()) == {0.0}


def test_a_whole_edited_picture_is_the_pipelines(edit: Subject) -> None:
    """From latents that were encoded before, as ours are, and from pictures, as the pipeline's users give them."""
    case = Case(("put it there",), Size(96, 64), condition_sizes=(Size(80, 64), Size(64, 96)))
    (given,) = case.inputs()
    frames = edit.family.generate(
        edit.bench.modules,
        edit.family.load_decoder(plain_build),
        edit.bench.encode(given),
        edit.bench.encode(replace(given, caption="")),
        size=case.size,
        steps=3,
        cfg=3.0,
        seed=11,
    )
    theirs = edit.reference.pipe(
        image=list(given.originals),
        prompt=given.caption,
        width=96,
        height=64,
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(11),
        **edit.reference.text,
    ).images[0]
    assert np.array_equal(np.asarray(frames[0]), np.asarray(theirs))


def test_the_target_does_not_know_the_tokens_of_another_items_references(edit: Subject) -> None:
    """Two items with pictures of their own in one batch, each as it is alone."""
    case = edit.case("one", "two")
    one, two = case.inputs()
    assert not np.array_equal(np.asarray(one.conditions[0]), np.asarray(two.conditions[0]))
    latent = edit.bench.batch([one, two])["latent"]
    sigma = torch.tensor([0.7, 0.7])
    predict = lambda given: edit.family.predict(  # noqa: E731 - the line would drown in arguments
        edit.bench.modules, "transformer", edit.bench.batch(given), latent, sigma
    )
    assert torch.allclose(predict([one, two])[0], predict([one, one])[0], atol=1e-5)
    assert not torch.allclose(predict([one, two])[1], predict([one, one])[1], atol=1e-3)


def test_the_folder_tells_which_klein_it_holds(klein: Subject, tmp_path: Path) -> None:
    registry.make_tiny("flux2-klein", str(tmp_path / "distilled"), "distilled")
    assert SPEC.variant_of(klein.options, ModelPaths(tmp_path / "distilled")) == "distilled"
    assert SPEC.variant_of(klein.options, ModelPaths(klein.folder)) is None  # tiny: of no released size
    assert SPEC.pairs() == [("base-4b", "t2i"), ("base-4b", "edit")]
    assert SPEC.tasks_of("distilled") == ("t2i", "edit")


# -- other models of the same classes --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shallow(klein: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a VAE of three levels, as the embedded one has: a token is 8 pixels wide."""
    folder = tmp_path_factory.mktemp("shallow") / "model"
    shutil.copytree(klein.folder, folder)
    torch.manual_seed(0)
    AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        mid_block_add_attention=False,
    ).save_pretrained(folder / "vae")
    return folder


def test_any_vae_scale_and_text_length_work(shallow: Path) -> None:
    options = KleinOptions(max_sequence_length=28)
    family = registry.load("flux2-klein", options, ModelPaths(shallow))
    assert family.stride() == SPEC.stride(ModelPaths(shallow)) == 8
    bench, reference = Bench(family, plain_build, "t2i"), Reference(shallow, options)
    case = Case(("a red circle",), Size(72, 64), cfg=2.0)
    assert bench.encode(case.inputs()[0])["latent"].shape == (16, 8, 9)
    assert euler_step_error(bench, reference, case) < E1_TOLERANCE
    assert set(encoder_errors(bench, reference, case.inputs()[0]).values()) == {0.0}
    prompt = bench.encode(case.inputs()[0])
    decoder = family.load_decoder(plain_build)
    frames = family.generate(
        bench.modules, decoder, prompt, None, size=Size(72, 64), steps=1, cfg=1.0, seed=0
    )
    assert frames[0].size == (72, 64)


def test_the_stride_of_a_broken_vae_folder_is_told(klein: Subject, tmp_path: Path) -> None:
    vae = tmp_path / "vae"
    vae.mkdir()
    for text, message in (
        ("{", "cannot be read"),
        ("{}", "block_out_channels"),
        ("[]", "block_out_channels"),
    ):
        (vae / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            SPEC.stride(ModelPaths(klein.folder, {"vae": vae}))


def test_a_bfloat16_denoiser_draws_with_a_float32_decoder(klein: Subject) -> None:
    modules = klein.family.load(Build(dtype=torch.bfloat16))
    prompt = klein.bench.encode(klein.case().inputs()[0])
    decoder = klein.family.load_decoder(plain_build)
    drawn = [
        np.asarray(
            klein.family.generate(chosen, decoder, prompt, None, size=Size(64, 64), steps=2, cfg=1.0, seed=0)[
                0
            ]
        ).astype(int)
        for chosen in (modules, klein.bench.modules)
    ]
    assert np.abs(drawn[0] - drawn[1]).mean() < 8  # of 255: bfloat16 latents, the same picture


def test_a_distilled_model_takes_no_guidance_and_is_warned_about(klein: Subject, tmp_path: Path) -> None:
    registry.make_tiny("flux2-klein", str(tmp_path / "distilled"), "distilled")
    paths = ModelPaths(tmp_path / "distilled")
    assert any("distilled" in str(word) for word in SPEC.advice(klein.options, paths))
    assert SPEC.advice(klein.options, ModelPaths(klein.folder)) == ()
    assert SPEC.advice(KleinOptions(variant="distilled"), ModelPaths(klein.folder))
    family = registry.load("flux2-klein", klein.options, paths)
    prompt, negative = (
        klein.bench.encode(EncodeInput(text, klein.case().inputs()[0].target)) for text in ("a", "")
    )
    modules, decoder = family.load(plain_build), family.load_decoder(plain_build)
    one, two = (
        family.generate(modules, decoder, prompt, negative, size=Size(64, 64), steps=1, cfg=cfg, seed=0)[0]
        for cfg in (1.0, 7.0)
    )
    assert np.array_equal(np.asarray(one), np.asarray(two))


def test_a_variant_that_the_folder_is_not_is_warned_about(klein: Subject, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(klein.folder, folder)
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "num_attention_heads": 32}), encoding="utf-8")
    assert SPEC.advice(KleinOptions(variant="base-9b"), ModelPaths(folder)) == ()
    (word,) = SPEC.advice(KleinOptions(variant="base-4b"), ModelPaths(folder))
    assert "base-9b" in str(word)


# -- text --------------------------------------------------------------------------------------------------------------


def test_only_the_layers_that_are_read_are_loaded(klein: Subject) -> None:
    encoder = klein.bench.encoders[0]
    assert (
        len(encoder._model.layers) == 28
    )  # of 30: the last one read is 27, and the one after it keeps it un-normed
    assert not hasattr(encoder._model, "lm_head")


def test_the_very_last_layer_can_be_read_too(klein: Subject) -> None:
    """It is given out after the final norm, by us as by the pipeline."""
    options = KleinOptions(max_sequence_length=64, text_encoder_out_layers=(9, 29, 30))
    family = registry.load("flux2-klein", options, ModelPaths(klein.folder))
    bench, reference = Bench(family, plain_build, "t2i"), Reference(klein.folder, options)
    assert encoder_errors(bench, reference, klein.case().inputs()[0])["prompt_embeds"] == 0.0


def test_a_layer_that_is_not_there_is_told(klein: Subject) -> None:
    options = KleinOptions(text_encoder_out_layers=(9, 18, 36))
    family = registry.load("flux2-klein", options, ModelPaths(klein.folder))
    with pytest.raises(UserError, match=r"layer 36 .* has 30"):
        family.encoders("t2i")[0].load(plain_build)


def test_text_options_change_the_texts_fingerprint_alone(klein: Subject) -> None:
    one, two, three = (
        [
            e.fingerprint()
            for e in registry.load("flux2-klein", options, ModelPaths(klein.folder)).encoders("t2i")
        ]
        for options in (
            KleinOptions(),
            KleinOptions(max_sequence_length=64),
            KleinOptions(text_encoder_out_layers=(9, 18, 26)),
        )
    )
    assert len({one[0], two[0], three[0]}) == 3 and one[1] == two[1] == three[1]


def test_a_tokenizer_without_chat_template_is_told(klein: Subject, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(klein.folder / "tokenizer", folder)
    (folder / "chat_template.jinja").unlink()
    paths = ModelPaths(klein.folder, {"tokenizer": folder})
    with pytest.raises(UserError, match="chat template"):
        registry.load("flux2-klein", klein.options, paths).encoders("t2i")[0].tokens("a")


@pytest.mark.parametrize(
    "wrong", [{"max_sequence_length": 8}, {"variant": "4b"}, {"text_encoder_out_layers": []}, {"x": 1}]
)
def test_options_are_checked(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        KleinOptions(**wrong)


# -- names -------------------------------------------------------------------------------------------------------------


def test_diffusers_reads_our_original_layout_to_the_bit(klein: Subject, tmp_path: Path) -> None:
    state = klein.bench.modules["transformer"].state_dict()
    original = KEYS.to_original(state)
    theirs = convert_flux2_transformer_checkpoint_to_diffusers(dict(original))
    assert set(theirs) == set(state) and all(torch.equal(theirs[name], state[name]) for name in state)
    file = tmp_path / "klein.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in original.items()}, file)
    module = Flux2Transformer2DModel.from_single_file(
        str(file), config=str(klein.folder), subfolder="transformer", local_files_only=True
    )
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


def test_original_names_of_other_programs_are_read(klein: Subject) -> None:
    state = klein.bench.modules["transformer"].state_dict()
    comfy = {
        "model.diffusion_model." + name.replace("_norm.scale", "_norm.weight"): tensor
        for name, tensor in KEYS.to_original(state).items()
    }
    back = KEYS.from_original(comfy)
    assert set(back) == set(state) and all(torch.equal(back[name], state[name]) for name in state)


def test_the_original_fuses_and_swaps(klein: Subject) -> None:
    state = klein.bench.modules["transformer"].state_dict()
    original = KEYS.to_original(state)
    rows = [state[f"transformer_blocks.0.attn.{name}.weight"] for name in ("to_q", "to_k", "to_v")]
    assert torch.equal(original["double_blocks.0.img_attn.qkv.weight"], torch.cat(rows))
    scale, shift = state["norm_out.linear.weight"].chunk(2)
    assert torch.equal(original["final_layer.adaLN_modulation.1.weight"], torch.cat([shift, scale]))
    assert "double_blocks.0.img_attn.norm.query_norm.scale" in original


@pytest.mark.parametrize(
    "foreign",
    [
        "guidance_in.in_layer.weight",
        "double_blocks.0.img_attn.qkv.scale_weight",
        "double_blocks.0.img_attn.proj.bias",
        "single_blocks.0.linear3.weight",
        "blocks.0.self_attn.q.weight",
    ],
)
def test_foreign_tensors_are_told_by_name(foreign: str) -> None:
    with pytest.raises(UserError, match=r"no tensor of a FLUX\.2 Klein"):
        KEYS.from_original({foreign: torch.zeros(6, 2)})
    with pytest.raises(UserError, match=r"no tensor of a FLUX\.2 Klein"):
        KEYS.to_original({foreign: torch.zeros(6, 2)})


def test_names_in_adapter_files() -> None:
    name = KEYS.adapter_prefix
    assert (
        name("transformer_blocks.3.attn.to_out.0", "comfyui") == "lycoris_transformer_blocks_3_attn_to_out_0"
    )
    assert (
        name("single_transformer_blocks.12.attn.to_out", "comfyui")
        == "lycoris_single_transformer_blocks_12_attn_to_out"
    )
    assert (
        name("time_guidance_embed.timestep_embedder.linear_1", "comfyui")
        == "diffusion_model.time_in.in_layer"
    )
    assert (
        name("single_stream_modulation.linear", "comfyui") == "diffusion_model.single_stream_modulation.lin"
    )
    assert name("proj_out", "comfyui") == "lycoris_proj_out"
    assert (
        name("transformer_blocks.3.ff.linear_in", "diffusers")
        == "transformer.transformer_blocks.3.ff.linear_in"
    )
    path = KEYS.module_path
    assert (
        path("diffusion_model.single_blocks.7.linear1") == "single_transformer_blocks.7.attn.to_qkv_mlp_proj"
    )
    assert path("diffusion_model.double_blocks.7.txt_mlp.2") == "transformer_blocks.7.ff_context.linear_out"
    assert path("transformer_blocks.1.attn.add_q_proj") == "transformer_blocks.1.attn.add_q_proj"
    # Fused, or with halves swapped: no layer of ours has exactly this matrix.
    assert path("diffusion_model.double_blocks.7.img_attn.qkv") is None
    assert path("diffusion_model.final_layer.adaLN_modulation.1") is None


def test_diffusers_reads_the_names_we_write_for_comfyui(klein: Subject) -> None:
    """Of the default targets; its own decoder, which raises on a name that it does not know."""
    linears = [
        p for p, m in klein.bench.modules["transformer"].named_modules() if isinstance(m, torch.nn.Linear)
    ]
    blocks = [path for path in linears if "transformer_blocks." in path]
    state = {}
    for path in blocks:
        lead = KEYS.adapter_prefix(path, "comfyui")
        state |= {f"{lead}.lokr_w1": torch.ones(2, 2), f"{lead}.lokr_w2": torch.ones(2, 2)}
        state[f"{lead}.alpha"] = torch.tensor(1.0)
    read = Flux2KleinPipeline.lora_state_dict(state)
    assert {name.removeprefix("transformer.").rpartition(".lokr_")[0] for name in read} == set(blocks)


# -- the schedule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [64, 1024, 4096, 9216])
def test_the_automatic_shift_is_the_samplers(klein: Subject, tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(klein.folder / "scheduler")
    steps = 50
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=compute_empirical_mu(tokens, steps))
    assert SPEC.auto_shift is not None
    shift, u = SPEC.auto_shift(tokens), torch.linspace(1, 1 / steps, steps)
    assert torch.allclose(scheduler.sigmas[:-1], shift * u / (1 + (shift - 1) * u), atol=1e-6)


def test_tokens_are_strides() -> None:
    assert SPEC.tokens(Size(1024, 1024), 16) == 4096 and SPEC.tokens(Size(72, 64), 8) == 72
    assert math.isclose(SPEC.auto_shift(4096), 7.56, abs_tol=0.01)
