"""What is Qwen-Image's alone: ragged text, references, which variant is which, templates, the schedule, names."""

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
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions
from lycoris import create_lycoris_from_weights
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from subjects import CAPTIONS, Subject, plain_build

from whitetuner.adapters.attach import attach
from whitetuner.adapters.choose import choose
from whitetuner.adapters.shapes import AdapterSettings, Kind
from whitetuner.checkpoint.export import export_adapter
from whitetuner.errors import UserError
from whitetuner.families import registry
from whitetuner.families.contract import (
    E1_TOLERANCE,
    Bench,
    Case,
    batch_error,
    encoder_errors,
    euler_step_error,
    picture,
    quiet,
    with_method,
)
from whitetuner.families.qwen_image.encoders import at_area
from whitetuner.families.qwen_image.keys import KEYS, REFERENCES_AT_ZERO
from whitetuner.families.qwen_image.reference import Reference, at_own_size
from whitetuner.families.qwen_image.spec import SPEC, QwenImageOptions, held_variant
from whitetuner.family import ModelPaths, Naming
from whitetuner.memory.build import Build
from whitetuner.memory.kernels import set_attention
from whitetuner.records import EncodeInput, Size

EDITS = ("edit", "edit-2509", "edit-2511")


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Subject]]:
    folder = tmp_path_factory.mktemp("qwen")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with quiet():
        found = {}
        for variant, task in SPEC.pairs():
            registry.make_tiny("qwen-image", str(folder / variant), variant)
            found[variant] = Subject("qwen-image", task, folder / variant, variant)
        yield found
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def t2i(subjects: dict[str, Subject]) -> Subject:
    return subjects["t2i"]


def released_schedule(subject: Subject, tmp_path: Path) -> tuple[Subject, Path]:
    """The same model with the released scheduler's last step, to sigma 0.02."""
    folder = tmp_path / "model"
    shutil.copytree(subject.folder, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "shift_terminal": 0.02}), encoding="utf-8")
    return Subject(subject.name, subject.task, folder, subject.variant), folder


# -- against the pipelines -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", SPEC.variants)
def test_in_float32_the_bits_are_the_pipelines(subjects: dict[str, Subject], variant: str) -> None:
    subject = subjects[variant]
    case = subject.case("a cat, 一只猫", columns=6)
    assert set(encoder_errors(subject.bench, subject.reference, case.inputs()[0]).values()) == {0.0}
    assert euler_step_error(subject.bench, subject.reference, case) < 1e-7


@pytest.mark.parametrize("variant", SPEC.variants)
def test_a_whole_picture_is_the_pipelines(subjects: dict[str, Subject], variant: str, tmp_path: Path) -> None:
    """Noise from the seed, the released schedule, true CFG, decoding and rounding to 8 bits included."""
    subject, _ = released_schedule(subjects[variant], tmp_path)
    (given,) = subject.case("make it a red circle", columns=6).inputs()
    frames = subject.family.generate(
        subject.bench.modules,
        subject.family.load_decoder(plain_build),
        subject.bench.encode(given),
        subject.bench.encode(replace(given, caption=" ")),
        size=Size(96, 64),
        steps=4,
        cfg=3.0,
        seed=11,
    )
    settings = {
        "prompt": given.caption,
        "negative_prompt": " ",
        "true_cfg_scale": 3.0,
        "width": 96,
        "height": 64,
        "num_inference_steps": 4,
        "generator": torch.Generator().manual_seed(11),
    }
    pipe = subject.reference.pipe
    if variant == "t2i":
        theirs = pipe(**settings).images[0]
    else:
        image = given.conditions[0] if variant == "edit" else list(given.originals)
        with at_own_size(given):
            theirs = pipe(image=image, **settings).images[0]
    assert np.array_equal(np.asarray(frames[0]), np.asarray(theirs))


@pytest.mark.parametrize("variant", ["t2i", "edit-2511"])
def test_the_released_schedule_is_walked_too(
    subjects: dict[str, Subject], variant: str, tmp_path: Path
) -> None:
    subject, _ = released_schedule(subjects[variant], tmp_path)
    for steps in (2, 5):
        assert euler_step_error(subject.bench, subject.reference, subject.case(steps=steps)) < E1_TOLERANCE


def test_one_step_of_the_released_schedule_is_refused_in_words(t2i: Subject, tmp_path: Path) -> None:
    subject, _ = released_schedule(t2i, tmp_path)
    prompt = t2i.bench.encode(t2i.case().inputs()[0])
    with pytest.raises(UserError, match="2 steps or more"):
        subject.family.generate(
            t2i.bench.modules,
            t2i.family.load_decoder(plain_build),
            prompt,
            None,
            size=Size(64, 64),
            steps=1,
            cfg=1.0,
            seed=0,
        )


def test_guidance_without_the_norm_is_another_step(t2i: Subject) -> None:
    """That the pipeline scales the guided token is no detail: plain guidance is far off."""
    reference = with_method(t2i.reference, "guide", lambda right: lambda v, u, cfg: u + cfg * (v - u))
    assert euler_step_error(t2i.bench, reference, t2i.case()) > 100 * E1_TOLERANCE


def test_text_without_its_mask_is_told(t2i: Subject) -> None:
    family = with_method(t2i.family, "text", lambda right: lambda texts: (right(texts)[0], None))
    bench = Bench(family, plain_build, "t2i")
    assert batch_error(bench, t2i.case(*CAPTIONS[:3])) > 100 * E1_TOLERANCE
    assert batch_error(t2i.bench, t2i.case(*CAPTIONS[:3])) < E1_TOLERANCE


def test_attention_without_masks_is_refused_where_texts_differ_and_taken_where_not(t2i: Subject) -> None:
    modules = t2i.family.load(plain_build)
    set_attention(modules["transformer"], "native_flash")

    def velocity(modules: dict, *captions: str) -> torch.Tensor:
        batch = t2i.bench.batch(t2i.case(*captions).inputs())
        sigma = torch.full((len(captions),), 0.5)
        return t2i.family.predict(modules, "transformer", batch, batch["latent"], sigma)

    with pytest.raises(UserError, match=r"need a mask, and '_native_flash'"):
        velocity(modules, *CAPTIONS[:2])
    for captions in (CAPTIONS[:1], (CAPTIONS[0], CAPTIONS[0])):
        torch.testing.assert_close(velocity(modules, *captions), velocity(t2i.bench.modules, *captions))


# -- references ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["edit-2509", "edit-2511"])
@pytest.mark.parametrize("sizes", [(Size(64, 64),), (Size(80, 64), Size(64, 96), Size(64, 64))])
def test_any_number_of_references_of_any_sizes(
    subjects: dict[str, Subject], variant: str, sizes: tuple[Size, ...]
) -> None:
    subject = subjects[variant]
    case = Case(("combine them",), Size(96, 64), condition_sizes=sizes)
    assert euler_step_error(subject.bench, subject.reference, case) < E1_TOLERANCE
    fields = subject.bench.encode(case.inputs()[0])
    assert fields["reference_sizes"].tolist() == [[size.height // 16, size.width // 16] for size in sizes]
    assert len(fields["reference_latents"]) == sum(size.height * size.width // 256 for size in sizes)


def test_the_order_of_references_matters(subjects: dict[str, Subject]) -> None:
    subject = subjects["edit-2509"]
    (given,) = Case(("a",), Size(64, 64), condition_sizes=(Size(64, 64),) * 2).inputs()
    turned = replace(given, conditions=given.conditions[::-1], originals=given.originals[::-1])
    one, other = subject.bench.encode(given), subject.bench.encode(turned)
    half = len(one["reference_latents"]) // 2
    assert torch.equal(one["reference_latents"][:half], other["reference_latents"][half:])
    x_t, sigma = torch.zeros(1, 4, 8, 8), torch.tensor([0.5])
    said = [
        subject.family.predict(subject.bench.modules, "transformer", batch, x_t, sigma)
        for batch in (subject.bench.batch([given]), subject.bench.batch([turned]))
    ]
    assert not torch.allclose(*said, atol=1e-4)


def test_2511_sees_its_references_free_of_noise(subjects: dict[str, Subject]) -> None:
    """zero_cond_t is in the model's config and nowhere else; without it the same weights say something else."""
    subject = subjects["edit-2511"]
    module = subject.bench.modules["transformer"]
    assert module.zero_cond_t and not subjects["edit-2509"].bench.modules["transformer"].zero_cond_t
    blind = QwenImageTransformer2DModel.from_config({**module.config, "zero_cond_t": False}).eval()
    blind.load_state_dict(module.state_dict())
    bench = Bench(subject.family, plain_build, "edit")
    bench.modules = {"transformer": blind}
    assert euler_step_error(bench, subject.reference, subject.case()) > 10 * E1_TOLERANCE


def test_what_the_edits_look_at(subjects: dict[str, Subject]) -> None:
    """Edit: the picture the VAE sees. 2509 and 2511: the uncut original, at the area the pipeline gives it."""
    cut, uncut = picture(Size(64, 48), 1), picture(Size(200, 151), 2)
    given = EncodeInput("a", (), (cut,), (uncut,), Size(64, 64))
    (seen,) = subjects["edit"].bench.encoders[0].seen(given)
    assert np.array_equal(np.asarray(seen), np.asarray(cut))
    (seen,) = subjects["edit-2509"].bench.encoders[0].seen(given)
    assert seen.size == calculate_dimensions(384 * 384, 200 / 151)


@pytest.mark.parametrize("sides", [(64, 64), (1920, 1080), (333, 1000), (5000, 120), (31, 7)])
def test_pictures_are_seen_at_the_pipelines_sizes(sides: tuple[int, int]) -> None:
    for area in (384 * 384, 1024 * 1024):
        assert at_area(picture(Size(*sides), 0), area).size == calculate_dimensions(area, sides[0] / sides[1])


def test_edit_without_a_picture_and_with_too_many_is_told(subjects: dict[str, Subject]) -> None:
    given = Case(("a",), Size(64, 64), condition_sizes=(Size(64, 64),) * 2).inputs()[0]
    for variant in EDITS:
        with pytest.raises(UserError, match="none is given"):
            subjects[variant].bench.encoders[0].encode(EncodeInput("a", given.target))
    with pytest.raises(UserError, match="takes one reference"):
        subjects["edit"].bench.encoders[0].encode(given)


def test_a_caption_with_the_mark_of_a_picture_is_told(subjects: dict[str, Subject]) -> None:
    (given,) = subjects["edit"].case("a <|image_pad|> b").inputs()
    with pytest.raises(UserError, match=r"has the word <\|image_pad\|>"):
        subjects["edit"].bench.encoders[0].encode(given)


def test_folders_as_released_say_the_same(subjects: dict[str, Subject], tmp_path: Path) -> None:
    """Of transformers 4: a flat config, vocab.json and merges.txt, preprocessor_config.json of another image processor."""
    subject, folder = subjects["edit-2511"], tmp_path / "model"
    shutil.copytree(subject.folder, folder)

    def read(file: str) -> dict:
        return json.loads((subject.folder / file).read_text(encoding="utf-8"))

    def write(file: str, document: object) -> None:
        (folder / file).write_text(json.dumps(document), encoding="utf-8")

    for name in ("processor", "tokenizer"):
        shutil.rmtree(folder / name)
        (folder / name).mkdir()
    looks = {
        **read("processor/processor_config.json")["image_processor"],
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen2_5_VLProcessor",
        "max_pixels": 84 * 84,
        "min_pixels": 28 * 28,
    }
    write("processor/preprocessor_config.json", looks)
    whole = read("tokenizer/tokenizer.json")
    added = {one["content"]: one["id"] for one in whole["added_tokens"]}
    write("tokenizer/vocab.json", whole["model"]["vocab"])
    write("tokenizer/added_tokens.json", added)
    write(
        "tokenizer/tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "additional_special_tokens": list(added)[1:],
            "unk_token": None,
        },
    )
    merges = [" ".join(pair) for pair in whole["model"]["merges"]]
    (folder / "tokenizer" / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8"
    )
    config = read("text_encoder/config.json")
    text = config.pop("text_config")
    text = {key: value for key, value in text.items() if key not in ("rope_parameters", "layer_types")}
    rope = {"rope_scaling": {"mrope_section": [1, 1, 2], "type": "mrope"}, "rope_theta": 1e6}
    write("text_encoder/config.json", {**text, **config, **rope})
    encoder = registry.load("qwen-image", subject.options, ModelPaths(folder)).encoders("edit")[0]
    encoder.load(Build())
    (given,) = subject.case("make it red, 红色").inputs()
    ours = encoder.encode(given)["prompt_embeds"]
    assert torch.equal(ours, subject.bench.encoders[0].encode(given)["prompt_embeds"])


# -- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", SPEC.variants)
def test_what_is_dropped_ends_where_the_users_words_begin(subjects: dict[str, Subject], variant: str) -> None:
    """The tiny tokenizer has each word of the templates as one token, as Qwen's own has: 34 and 64 of them."""
    encoder = subjects[variant].bench.encoders[0]
    assert encoder.dropped() == (34 if variant == "t2i" else 64)
    ids = encoder.tokenizer(encoder.template("XYZ"))["input_ids"]
    assert encoder.tokenizer.decode(ids[encoder.dropped() :]) == "XYZ<|im_end|>\n<|im_start|>assistant\n", (
        variant
    )
    assert len(encoder.tokenizer("<|im_end|>\n<|im_start|>assistant\n")["input_ids"]) == SPEC.template_tokens


@pytest.mark.parametrize("variant", SPEC.variants)
def test_the_template_is_the_pipelines(subjects: dict[str, Subject], variant: str) -> None:
    encoder, pipe = subjects[variant].bench.encoders[0], subjects[variant].reference.pipe
    place = "<|vision_start|><|image_pad|><|vision_end|>" if variant == "edit" else ""
    assert pipe.prompt_template_encode.format("a {b}") == encoder.template(place + "a {b}")
    assert pipe.prompt_template_encode_start_idx == encoder.dropped()


def test_picture_marks_are_the_processors_own(subjects: dict[str, Subject]) -> None:
    """What diffusers 0.42 forgets to pass on with transformers 5."""
    subject = subjects["edit-2509"]
    encoder, processor = subject.bench.encoders[0], subject.reference.pipe.processor
    pictures = [picture(Size(64, 64), 0), picture(Size(96, 64), 1)]
    text = encoder.template(encoder.instruction("join them", 2))
    made = processor(text=[text], images=pictures, return_tensors="pt", return_mm_token_type_ids=True)
    assert torch.equal(encoder.picture_tokens(made["input_ids"]), made["mm_token_type_ids"].int())
    assert made["mm_token_type_ids"].sum() == made["image_grid_thw"].prod(-1).sum() // 4


def test_a_text_is_cut_as_the_pipeline_cuts_and_an_edits_is_not(subjects: dict[str, Subject]) -> None:
    for variant in ("t2i", "edit"):
        options = QwenImageOptions(max_sequence_length=16)
        folder = subjects[variant].folder
        family = registry.load("qwen-image", options, ModelPaths(folder))
        bench = Bench(family, plain_build, subjects[variant].task)
        given = subjects[variant].case("a very long walk " * 500).inputs()[0]
        assert encoder_errors(bench, Reference(folder, options), given)["prompt_embeds"] == 0.0
        length = len(bench.encode(given)["prompt_embeds"])
        assert length == 16 if variant == "t2i" else length > 1024


def test_a_negative_prompt_of_an_edit_sees_the_pictures_too(subjects: dict[str, Subject]) -> None:
    encoder = subjects["edit-2511"].bench.encoders[0]
    one, other = (
        Case(("",), Size(64, 64), seed=s, condition_sizes=(Size(64, 64),)).inputs()[0] for s in (0, 1)
    )
    assert not torch.equal(encoder.encode(one)["prompt_embeds"], encoder.encode(other)["prompt_embeds"])


def test_the_option_changes_the_texts_fingerprint_alone(t2i: Subject) -> None:
    one, two = (
        [
            e.fingerprint()
            for e in registry.load("qwen-image", options, ModelPaths(t2i.folder)).encoders("t2i")
        ]
        for options in (QwenImageOptions(), QwenImageOptions(max_sequence_length=64))
    )
    assert one[0] != two[0] and one[1:] == two[1:]


def test_a_foreign_tokenizer_is_told(t2i: Subject, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(t2i.folder / "tokenizer", folder)
    for file in folder.glob("*.json"):
        file.write_text(
            file.read_text(encoding="utf-8").replace("<|im_start|>", "<|other|>"), encoding="utf-8"
        )
    encoder = registry.load(
        "qwen-image", t2i.options, ModelPaths(t2i.folder, {"tokenizer": folder})
    ).encoders("t2i")[0]
    with pytest.raises(UserError, match="im_start"):
        _ = encoder.tokenizer


# -- which is which --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", SPEC.variants)
def test_a_variant_is_told_from_its_folder(subjects: dict[str, Subject], variant: str) -> None:
    paths = ModelPaths(subjects[variant].folder)
    assert held_variant(paths) == SPEC.variant_of(QwenImageOptions(), paths) == variant
    assert SPEC.advice(QwenImageOptions(), paths) == ()
    assert SPEC.advice(QwenImageOptions(variant=variant), paths) == ()
    for other in SPEC.variants:
        if other != variant:
            (word,) = SPEC.advice(QwenImageOptions(variant=other), paths)
            assert f"says {other}, but the folder holds {variant}" in str(word)


def test_a_model_given_to_the_other_task_is_told(subjects: dict[str, Subject]) -> None:
    with pytest.raises(UserError, match="for text to image, but the task is 'edit'"):
        subjects["t2i"].family.encoders("edit")
    for variant in EDITS:
        with pytest.raises(UserError, match=rf"Qwen-Image-Edit \({variant}\)"):
            subjects[variant].family.encoders("t2i")


def test_parts_without_an_index_are_text_to_image_or_asked_about(
    subjects: dict[str, Subject], tmp_path: Path
) -> None:
    folders = {}
    for variant in ("edit", "edit-2511"):
        folders[variant] = tmp_path / variant
        shutil.copytree(subjects[variant].folder, folders[variant])
        (folders[variant] / "model_index.json").unlink()
    family = registry.load("qwen-image", QwenImageOptions(), ModelPaths(folders["edit"]))
    assert [one.name for one in family.encoders("t2i")] == ["text", "vae"]
    with pytest.raises(UserError, match="cannot be told"):
        family.encoders("edit")
    named = registry.load("qwen-image", QwenImageOptions(variant="edit-2509"), ModelPaths(folders["edit"]))
    assert named.encoders("edit")[0].variant == "edit-2509"
    assert held_variant(ModelPaths(folders["edit-2511"])) == "edit-2511", "zero_cond_t tells"


def test_the_layered_model_is_refused(t2i: Subject, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(t2i.folder, folder)
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "use_additional_t_cond": True}), encoding="utf-8")
    with pytest.raises(UserError, match="Layered"):
        registry.load("qwen-image", t2i.options, ModelPaths(folder)).encoders("t2i")


def test_an_edit_folder_without_its_processor_is_told(subjects: dict[str, Subject], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(subjects["edit"].folder, folder)
    shutil.rmtree(folder / "processor")
    with pytest.raises(UserError, match="no part 'processor'"):
        registry.load("qwen-image", QwenImageOptions(), ModelPaths(folder)).encoders("edit")[0].fingerprint()


def test_the_stride_of_a_broken_vae_folder_is_told(t2i: Subject, tmp_path: Path) -> None:
    vae = tmp_path / "vae"
    vae.mkdir()
    for text, message in (
        ("{", "cannot be read"),
        ("{}", "temperal_downsample"),
        ("[]", "temperal_downsample"),
    ):
        (vae / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            SPEC.stride(ModelPaths(t2i.folder, {"vae": vae}))


@pytest.mark.parametrize("wrong", [{"max_sequence_length": 8}, {"variant": "layered"}, {"x": 1}])
def test_options_are_checked(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        QwenImageOptions(**wrong)


# -- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["t2i", "edit-2511"])
def test_a_bfloat16_denoiser_draws_with_a_float32_decoder(subjects: dict[str, Subject], variant: str) -> None:
    subject = subjects[variant]
    modules = subject.family.load(Build(dtype=torch.bfloat16))
    prompt = subject.bench.encode(subject.case().inputs()[0])
    decoder = subject.family.load_decoder(plain_build)
    drawn = [
        np.asarray(
            subject.family.generate(
                chosen, decoder, prompt, None, size=Size(64, 64), steps=2, cfg=1.0, seed=0
            )[0]
        ).astype(int)
        for chosen in (modules, subject.bench.modules)
    ]
    assert np.abs(drawn[0] - drawn[1]).mean() < 8  # of 255: bfloat16 latents, the same picture


def test_the_last_blocks_text_half_learns_nothing_and_all_else_does(t2i: Subject) -> None:
    """The default targets include it: which block is the last is no pattern's matter, and a zero does no harm."""
    module = t2i.bench.modules["transformer"]
    weights = {name: weight.requires_grad_(True) for name, weight in module.named_parameters()}
    batch = t2i.bench.batch(t2i.case().inputs())
    said = t2i.family.predict(t2i.bench.modules, "transformer", batch, batch["latent"], torch.tensor([0.5]))
    found = torch.autograd.grad(said.square().mean(), list(weights.values()), allow_unused=True)
    dead = {name for name, gradient in zip(weights, found) if gradient is None}
    module.requires_grad_(False)
    layers = ("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    assert dead == {f"transformer_blocks.1.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


@pytest.mark.parametrize("tokens", [64, 1024, 4096, 8192])
def test_the_automatic_shift_is_the_samplers(t2i: Subject, tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(t2i.folder / "scheduler")
    config = scheduler.config
    mu = calculate_shift(
        tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 50, 50), mu=mu)
    assert SPEC.auto_shift is not None
    shift, u = SPEC.auto_shift(tokens), torch.linspace(1, 1 / 50, 50)
    assert torch.allclose(scheduler.sigmas[:-1], shift * u / (1 + (shift - 1) * u), atol=1e-6)


def test_tokens_are_strides() -> None:
    assert SPEC.tokens(Size(1024, 1024), 16) == 4096
    assert math.isclose(SPEC.auto_shift(4096), 2.0, abs_tol=0.01)
    assert math.isclose(SPEC.auto_shift(83 * 83), 2.3, abs_tol=0.01)


# -- names -----------------------------------------------------------------------------------------------------------


def test_diffusers_and_comfyui_read_the_full_state_as_it_is(t2i: Subject, tmp_path: Path) -> None:
    state = t2i.bench.modules["transformer"].state_dict()
    original = KEYS.to_original(state)
    assert set(original) == set(state)
    file = tmp_path / "qwen.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in original.items()}, file)
    module = QwenImageTransformer2DModel.from_single_file(
        str(file), config=str(t2i.folder), subfolder="transformer", local_files_only=True
    )
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("lead", ["", "diffusion_model.", "model.diffusion_model."])
def test_full_states_of_comfyui_are_read(t2i: Subject, lead: str) -> None:
    state = t2i.bench.modules["transformer"].state_dict()
    comfy = {lead + name: tensor for name, tensor in state.items()}
    back = KEYS.from_original({**comfy, f"{lead}{REFERENCES_AT_ZERO}": torch.empty(0)})
    assert set(back) == set(state) and all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "foreign",
    [
        "transformer_blocks.0.attn.to_qkv.weight",
        "transformer_blocks.0.attn.to_q.scale_weight",
        "time_text_embed.addition_t_embedding.weight",
        "transformer_blocks.0.img_mlp.net.1.weight",
        "double_blocks.0.img_attn.proj.weight",
    ],
)
def test_foreign_tensors_are_told_by_name(foreign: str) -> None:
    for convert in (KEYS.from_original, KEYS.to_original):
        with pytest.raises(UserError, match="no tensor of a Qwen-Image"):
            convert({foreign: torch.zeros(6, 2)})


def test_names_in_adapter_files() -> None:
    path = "transformer_blocks.37.img_mlp.net.0.proj"
    flat = "transformer_blocks_37_img_mlp_net_0_proj"
    assert KEYS.adapter_prefix(path, "comfyui") == KEYS.adapter_prefix(path, "lycoris") == f"lycoris_{flat}"
    assert KEYS.adapter_prefix(path, "diffusers") == f"transformer.{path}"
    for name in (
        f"lycoris_{flat}",
        f"lora_unet_{flat}",
        f"diffusion_model.{path}",
        f"transformer.{path}",
        path,
    ):
        assert KEYS.module_path(name) == path
    for name in (
        "transformer_blocks.37.img_norm1",
        "lycoris_transformer_blocks_x_attn_to_q",
        "transformer_blocks.#.img_mod.1",
    ):
        assert KEYS.module_path(name) is None


# -- adapters in other programs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "naming", "reader"),
    [
        ("lokr", "diffusers", "denoiser"),
        ("lora", "diffusers", "denoiser"),
        ("lora", "diffusers", "pipeline"),
        ("lokr", "lycoris", "lycoris"),
        ("lora", "comfyui", "lycoris"),
    ],
)
def test_other_programs_read_our_adapters_and_draw_the_same(
    t2i: Subject, kind: Kind, naming: Naming, reader: str, tmp_path: Path
) -> None:
    """The default targets. (diffusers' pipeline refuses every LoKr of Qwen-Image, whoever wrote it: formats differ.)"""
    batch = t2i.bench.batch(t2i.case().inputs())

    def velocity(module: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return t2i.family.predict(
                {"transformer": module}, "transformer", batch, batch["latent"], torch.tensor([0.5])
            )

    ours, theirs = (t2i.family.load(plain_build)["transformer"] for _ in range(2))
    before = velocity(ours)
    settings = AdapterSettings(kind=kind, rank=2, alpha=2, factor=4)
    adapter = attach(ours, choose(ours, SPEC.adapter_targets), settings, seed=1)
    with torch.no_grad():
        for number, parameter in enumerate(adapter.parameters()):
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(number))
    file = tmp_path / "adapter.safetensors"
    export_adapter(adapter.state_dict(), adapter.settings, KEYS, path=file, naming=naming)
    if reader == "denoiser":
        theirs.load_lora_adapter(load_file(file), prefix="transformer")
    elif reader == "pipeline":
        pipe = t2i.family.pipeline({"transformer": theirs}, t2i.family.load_decoder(plain_build), {})
        pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
    else:
        network, _ = create_lycoris_from_weights(1.0, str(file), theirs)
        assert len(network.loras) == len(adapter.deltas)
        network.merge_to(1.0)
    assert (velocity(ours) - before).abs().max() > 0.01
    torch.testing.assert_close(velocity(theirs), velocity(ours), rtol=2e-5, atol=2e-5)
