"""What is Z-Image's alone: guidance counted from 0, Turbo, the merged de-distill adapter, names in other programs, shift."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers
from pydantic import ValidationError
from safetensors.torch import save_file
from subjects import CAPTIONS, Subject, plain_build

from whitetuner.adapters.attach import attach
from whitetuner.adapters.choose import choose
from whitetuner.adapters.shapes import AdapterSettings
from whitetuner.checkpoint.export import export_adapter
from whitetuner.errors import UserError
from whitetuner.families import registry
from whitetuner.families.contract import Bench, encoder_errors, euler_step_error, quiet
from whitetuner.families.z_image_facts import ZImageOptions
from whitetuner.families.zimage.keys import KEYS
from whitetuner.families.zimage.model import Model
from whitetuner.families.zimage.spec import SPEC
from whitetuner.family import ModelPaths
from whitetuner.memory.build import Build, rehearse_module
from whitetuner.memory.quantize import QuantLinear
from whitetuner.records import EncodeInput, Size


@pytest.fixture(scope="module")
def zimage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    folder = tmp_path_factory.mktemp("released") / "model"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with quiet():
        registry.make_tiny("zimage", str(folder))
        yield Subject("zimage", "t2i", folder)
    torch.set_num_threads(threads)


def family(folder: Path, **options: Any) -> Model:
    return Model(ZImageOptions(max_sequence_length=64, **options), ModelPaths(folder))


def test_in_float32_the_bits_are_the_pipelines(zimage: Subject) -> None:
    given = zimage.case("a cat, 一只猫", columns=6).inputs()[0]
    assert set(encoder_errors(zimage.bench, zimage.reference, given).values()) == {0.0}
    assert euler_step_error(zimage.bench, zimage.reference, zimage.case(*CAPTIONS[:2])) < 1e-6


def test_a_whole_picture_is_the_pipelines(zimage: Subject) -> None:
    """Noise from the seed, schedule, decoding, rounding to 8 bits; and cfg 3 is the pipeline's guidance 2."""
    size, given = Size(96, 64), zimage.case("a red circle", columns=6).inputs()[0]
    frames = zimage.family.generate(
        zimage.bench.modules,
        zimage.family.load_decoder(plain_build),
        zimage.bench.encode(given),
        zimage.bench.encode(EncodeInput("", given.target)),
        size=size,
        steps=4,
        cfg=3.0,
        seed=11,
    )
    theirs = zimage.reference.pipe(
        prompt=given.caption,
        width=96,
        height=64,
        num_inference_steps=4,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(11),
        **zimage.reference.text,
    ).images[0]
    assert np.array_equal(np.asarray(frames[0]), np.asarray(theirs))


def test_captions_in_a_batch_keep_their_own_lengths(zimage: Subject) -> None:
    batch = zimage.bench.batch(zimage.case(*CAPTIONS).inputs())
    lengths = [len(one) for one in batch["prompt_embeds"]]
    assert len(set(lengths)) == len(lengths) and max(lengths) == 64  # no padding but in the one that is cut


# -- which release ---------------------------------------------------------------------------------------------------


def test_without_any_name_no_release_is_told() -> None:
    assert SPEC.variant_of(ZImageOptions(), ModelPaths(None)) is None
    assert SPEC.variant_of(ZImageOptions(), ModelPaths(None, {"vae": Path("z-image-turbo/vae")})) is None
    assert (
        SPEC.variant_of(ZImageOptions(), ModelPaths(None, {"transformer": Path("z-image-turbo")})) == "turbo"
    )


@pytest.mark.parametrize(
    ("folder", "variant"),
    [
        ("Z-Image-Turbo", "turbo"),
        ("hub/models--Tongyi-MAI--Z-Image-Turbo/snapshots/0a1b", "turbo"),
        ("z_image_turbo_bf16", "turbo"),
        ("Z-Image-De-Turbo", "de-turbo"),
        ("Z-Image-DeTurbo", "de-turbo"),
        ("Z-Image", "base"),
        ("turbo/models/Z-Image", "base"),
        ("my-model", None),
    ],
)
def test_a_release_is_told_by_its_folders_name(folder: str, variant: str | None, tmp_path: Path) -> None:
    paths = ModelPaths(tmp_path / "a" / "b" / "c" / folder)
    assert SPEC.variant_of(ZImageOptions(), paths) == variant
    assert SPEC.variant_of(ZImageOptions(variant="de-turbo"), paths) == "de-turbo"
    assert bool(SPEC.advice(ZImageOptions(), paths)) == (variant == "turbo")
    assert SPEC.sampling(ZImageOptions(), paths) == ((8, 1.0) if variant == "turbo" else (50, 5.0))


@pytest.fixture(scope="module")
def turbo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distilled") / "model"
    registry.make_tiny("zimage", str(folder), "turbo")
    return folder


def test_turbo_takes_no_guidance_and_is_warned_about(zimage: Subject, turbo: Path) -> None:
    (word,) = SPEC.advice(ZImageOptions(), ModelPaths(turbo))
    assert "Turbo" in str(word) and "merge_adapter" in str(word)
    (word,) = SPEC.advice(ZImageOptions(merge_adapter="x.safetensors"), ModelPaths(zimage.folder))
    assert "not known to be Z-Image-Turbo" in str(word)
    assert SPEC.advice(ZImageOptions(merge_adapter="x.safetensors"), ModelPaths(turbo)) == ()
    distilled = family(turbo)
    prompt, negative = (
        zimage.bench.encode(EncodeInput(text, zimage.case().inputs()[0].target)) for text in ("a", "")
    )
    modules, decoder = distilled.load(plain_build), distilled.load_decoder(plain_build)
    one, two, base = (
        np.asarray(
            maker.generate(modules, decoder, prompt, negative, size=Size(64, 64), steps=1, cfg=cfg, seed=0)[0]
        )
        for maker, cfg in ((distilled, 1.0), (distilled, 7.0), (family(turbo, variant="base"), 7.0))
    )
    assert np.array_equal(one, two) and not np.array_equal(one, base)


# -- an adapter in the frozen weights --------------------------------------------------------------------------------


def lora(module: torch.nn.Module, scale: float = 1.0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random factors (down, up) for the default layers and one modulation."""
    paths = [*choose(module, SPEC.adapter_targets), "layers.1.adaLN_modulation.0"]
    numbers = torch.Generator().manual_seed(7)
    found = {}
    for path in paths:
        out_features, in_features = module.get_submodule(path).weight.shape
        down = torch.randn(2, in_features, generator=numbers) * 0.3
        found[path] = (down, torch.randn(out_features, 2, generator=numbers) * 0.3 * scale)
    return found


def written(file: Path, factors: dict, style: str) -> Path:
    names = {
        "ai-toolkit": lambda path: f"diffusion_model.{path}",
        "diffusers": lambda path: f"transformer.{path}",
        "kohya": lambda path: "lora_unet_" + path.replace(".", "_"),
    }[style]
    ends = (
        (".lora_down.weight", ".lora_up.weight") if style == "kohya" else (".lora_A.weight", ".lora_B.weight")
    )
    tensors = {}
    for path, (down, up) in factors.items():
        tensors |= {names(path) + ends[0]: down, names(path) + ends[1]: up}
        if style == "kohya":  # alpha 1 of rank 2: half of what the factors say
            tensors[names(path) + ".alpha"] = torch.tensor(1.0)
    save_file(tensors, file)
    return file


def test_a_merged_adapter_is_in_the_weights_before_they_are_quantised(
    zimage: Subject, tmp_path: Path
) -> None:
    factors = lora(zimage.bench.modules["transformer"])
    plain = zimage.bench.modules["transformer"].state_dict()
    for style, scale in (("ai-toolkit", 1.0), ("diffusers", 1.0), ("kohya", 0.5)):
        file = written(tmp_path / f"{style}.safetensors", factors, style)
        module = family(zimage.folder, merge_adapter=str(file)).load(Build())["transformer"]
        assert type(module).__name__ == "ZImageTransformer2DModel"
        for name, tensor in module.state_dict().items():
            path = name.removesuffix(".weight")
            expected = plain[name]
            if path in factors:
                expected = expected + scale * factors[path][1] @ factors[path][0]
            assert torch.allclose(tensor, expected, atol=1e-6), name
    merged = tmp_path / "merged"
    module.save_pretrained(merged)
    direct = Build(quantize="int8")(ZImageTransformer2DModel, merged, keep_precise=SPEC.keep_precise)
    ours = family(zimage.folder, merge_adapter=str(file)).load(Build(quantize="int8"))["transformer"]
    assert sum(isinstance(layer, QuantLinear) for layer in ours.modules()) > 20
    assert all(torch.equal(tensor, direct.state_dict()[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_pictures_are_drawn_without_the_merged_adapter(
    zimage: Subject, tmp_path: Path, quantize: Any
) -> None:
    """With an adapter of ours on top, as in a preview."""
    file = written(tmp_path / "adapter.safetensors", lora(zimage.bench.modules["transformer"]), "ai-toolkit")
    given = zimage.case().inputs()[0]
    prompt, batch = zimage.bench.encode(given), zimage.bench.batch([given])
    decoder, sigma = zimage.family.load_decoder(plain_build), torch.tensor([0.5])
    drawn, said = {}, {}
    for name, options in (("plain", {}), ("merged", {"merge_adapter": str(file)})):
        one = family(zimage.folder, **options)
        modules = one.load(Build(quantize=quantize if options else None))
        adapter = attach(
            modules["transformer"],
            choose(modules["transformer"], SPEC.adapter_targets),
            AdapterSettings("lora", rank=2),
            seed=0,
        )
        with torch.no_grad():
            for index, parameter in enumerate(adapter.parameters()):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(index))
            said[name] = one.predict(modules, "transformer", batch, batch["latent"], sigma)
        drawn[name] = np.asarray(
            one.generate(modules, decoder, prompt, None, size=Size(64, 64), steps=3, cfg=1.0, seed=0)[0]
        ).astype(int)
    assert float((said["merged"] - said["plain"]).norm() / said["plain"].norm()) > 0.05
    # float32: rounding; int8: the base's quantisation error stays
    assert np.abs(drawn["merged"] - drawn["plain"]).max() <= (1 if quantize is None else 12)


def broken(folder: Path, kind: str, factors: dict) -> Path:
    file = folder / "adapter.safetensors"
    down, up = factors["layers.0.attention.to_q"]
    if kind == "torn":
        written(file, factors, "ai-toolkit")
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "foreign":
        save_file(
            {"lora_unet_blocks_0_q.lora_down.weight": down, "lora_unet_blocks_0_q.lora_up.weight": up}, file
        )
    elif kind == "half":
        save_file({"diffusion_model.layers.0.attention.to_q.lora_A.weight": down}, file)
    elif kind == "wider":
        lead = "diffusion_model.layers.0.attention.to_q"
        save_file(
            {f"{lead}.lora_A.weight": torch.ones(2, 32), f"{lead}.lora_B.weight": torch.ones(32, 2)}, file
        )
    elif kind == "pickle":
        file = folder / "adapter.pt"
        torch.save({}, file)
    return file


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "there is no file"),
        ("pickle", "no safetensors file"),
        ("torn", "no whole safetensors"),
        ("foreign", "no LoRA of Z-Image"),
        ("half", "no LoRA of Z-Image"),
        ("wider", "32 wide, this one is 24"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_told_before_weights_are_read(
    zimage: Subject, tmp_path: Path, kind: str, message: str
) -> None:
    file = broken(tmp_path, kind, lora(zimage.bench.modules["transformer"]))
    with pytest.raises(UserError, match=message):
        family(zimage.folder, merge_adapter=str(file)).load(rehearse_module)


# -- text --------------------------------------------------------------------------------------------------------------


def test_the_last_layer_of_the_text_encoder_is_not_loaded(zimage: Subject) -> None:
    model = zimage.bench.encoders[0]._model
    assert len(model.layers) == 2 and model.config.num_hidden_layers == 2  # of 3
    assert not any(name.startswith("norm") for name in model.state_dict())


def test_a_caption_stands_in_the_chat_template(zimage: Subject) -> None:
    encoder = family(zimage.folder).encoders("t2i")[0]
    assert encoder.text("hi") == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_text_options_change_the_texts_fingerprint_alone(zimage: Subject) -> None:
    paths = ModelPaths(zimage.folder)
    one, two, three = (
        [encoder.fingerprint() for encoder in Model(options, paths).encoders("t2i")]
        for options in (
            ZImageOptions(),
            ZImageOptions(max_sequence_length=64),
            ZImageOptions(variant="turbo", merge_adapter="x"),
        )
    )
    assert one[0] != two[0] and one[1] == two[1] and one == three


@pytest.mark.parametrize("content", ["{", "{}", '{"num_hidden_layers": 1}', "[]"])
def test_a_broken_part_is_told(zimage: Subject, tmp_path: Path, content: str) -> None:
    folder = tmp_path / "part"
    folder.mkdir()
    (folder / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot be read|not one of a Qwen3"):
        Model(ZImageOptions(), ModelPaths(zimage.folder, {"text_encoder": folder})).encoders("t2i")[0].load(
            plain_build
        )
    with pytest.raises(UserError, match=r"cannot be read|block_out_channels"):
        SPEC.stride(ModelPaths(zimage.folder, {"vae": folder}))


def test_a_tokenizer_without_chat_template_is_told(zimage: Subject, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(zimage.folder / "tokenizer", folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="chat template"):
        Model(ZImageOptions(), ModelPaths(zimage.folder, {"tokenizer": folder})).encoders("t2i")[0].tokens(
            "a"
        )


@pytest.mark.parametrize("wrong", [{"max_sequence_length": 8}, {"variant": "lite"}, {"x": 1}])
def test_options_are_checked(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        ZImageOptions(**wrong)


# -- names -------------------------------------------------------------------------------------------------------------


def test_diffusers_reads_our_original_layout_to_the_bit(zimage: Subject, tmp_path: Path) -> None:
    state = zimage.bench.modules["transformer"].state_dict()
    original = KEYS.to_original(state)
    theirs = convert_z_image_transformer_checkpoint_to_diffusers(dict(original))
    assert set(theirs) == set(state) and all(torch.equal(theirs[name], state[name]) for name in state)
    file = tmp_path / "zimage.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in original.items()}, file)
    module = ZImageTransformer2DModel.from_single_file(
        str(file), config=str(zimage.folder), subfolder="transformer", local_files_only=True
    )
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    back = KEYS.from_original({f"model.diffusion_model.{name}": tensor for name, tensor in original.items()})
    assert set(back) == set(state) and all(torch.equal(back[name], state[name]) for name in state)


def test_the_original_fuses_and_shortens(zimage: Subject) -> None:
    state = zimage.bench.modules["transformer"].state_dict()
    original = KEYS.to_original(state)
    for blocks in ("layers", "noise_refiner", "context_refiner"):
        rows = [state[f"{blocks}.0.attention.to_{one}.weight"] for one in "qkv"]
        assert torch.equal(original[f"{blocks}.0.attention.qkv.weight"], torch.cat(rows))
    assert {
        "x_embedder.bias",
        "final_layer.adaLN_modulation.1.weight",
        "layers.2.attention.q_norm.weight",
    } <= set(original)
    assert {"x_pad_token", "cap_pad_token", "cap_embedder.0.weight", "t_embedder.mlp.2.bias"} <= set(original)


@pytest.mark.parametrize(
    "foreign",
    [
        "siglip_refiner.0.attention.qkv.weight",
        "layers.0.attention.qkv.scale_weight",
        "layers.0.attention.to_q.bias",
        "context_refiner.0.adaLN_modulation.0.weight",
        "double_stream_layers.0.attention.out.weight",
        "blocks.0.self_attn.q.weight",
    ],
)
def test_foreign_tensors_are_told_by_name(foreign: str) -> None:
    for convert in (KEYS.from_original, KEYS.to_original):
        with pytest.raises(UserError, match=r"no tensor of a Z-Image transformer"):
            convert({foreign: torch.zeros(6, 2)})


def test_names_in_adapter_files() -> None:
    prefix, path = KEYS.adapter_prefix, KEYS.module_path
    assert prefix("layers.3.attention.to_out.0", "comfyui") == "diffusion_model.layers.3.attention.to_out.0"
    assert prefix("layers.3.feed_forward.w1", "diffusers") == "transformer.layers.3.feed_forward.w1"
    assert prefix("noise_refiner.1.attention.to_q", "lycoris") == "lycoris_noise_refiner_1_attention_to_q"
    assert path("diffusion_model.layers.7.attention.out") == "layers.7.attention.to_out.0"
    assert path("diffusion_model.final_layer.linear") == "all_final_layer.2-1.linear"
    assert path("layers.1.attention.to_q") == "layers.1.attention.to_q"
    assert path("diffusion_model.layers.7.attention.qkv") is None  # no layer of ours has exactly this matrix


def test_the_pipeline_draws_with_the_file_for_comfyui(zimage: Subject, tmp_path: Path) -> None:
    """diffusers' own loader takes every layer of it, and computes what we do."""
    modules = zimage.family.load(plain_build)
    module = modules["transformer"]
    settings = AdapterSettings("lokr", factor=4, full_matrix=True)
    adapter = attach(module, choose(module, SPEC.adapter_targets), settings, seed=0)
    with torch.no_grad():
        for index, parameter in enumerate(adapter.parameters()):
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(index))
    file = tmp_path / "adapter.safetensors"
    export_adapter(adapter.state_dict(), settings, KEYS, path=file, naming="comfyui")
    batch = zimage.bench.batch(zimage.case().inputs())
    latent, sigma = batch["latent"], torch.tensor([0.5])
    ours = zimage.family.predict(modules, "transformer", batch, latent, sigma)
    with quiet():
        pipe = ZImagePipeline.from_pretrained(zimage.folder)
        pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
    theirs = zimage.family.predict({"transformer": pipe.transformer}, "transformer", batch, latent, sigma)
    plain = zimage.family.predict(zimage.bench.modules, "transformer", batch, latent, sigma)
    assert float(((theirs - ours).norm() / (ours - plain).norm()).detach()) < 1e-5


# -- the schedule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [64, 4096])
def test_the_automatic_shift_is_the_samplers(zimage: Subject, tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(zimage.folder / "scheduler")
    steps = 8
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    assert SPEC.auto_shift is not None
    shift, u = SPEC.auto_shift(tokens), torch.linspace(1, 1 / steps, steps)
    assert torch.allclose(scheduler.sigmas[:-1], shift * u / (1 + (shift - 1) * u), atol=1e-6)


def test_the_plan_is_told_the_released_model() -> None:
    sketch = registry.sketch("zimage")
    config = dict(sketch.RELEASED["turbo"]["transformer"])
    assert config.pop("_class_name") == SPEC.transformer_class
    with torch.device("meta"):
        module = ZImageTransformer2DModel(**config)
    assert sum(p.numel() for p in module.parameters()) == pytest.approx(6.155e9, rel=1e-3)
    fields = sketch.blank(module, ZImageOptions(), Size(1024, 768), 16)
    assert fields["latent"].shape == (16, 96, 128) and fields["prompt_embeds"].shape == (512, 2560)


def test_a_blank_sample_is_shaped_as_the_encoders_own(zimage: Subject) -> None:
    encoded = zimage.bench.encode(zimage.case(CAPTIONS[3], columns=6).inputs()[0])
    blank = registry.sketch("zimage").blank(
        zimage.bench.modules["transformer"], zimage.options, zimage.size(6, 4), zimage.family.stride()
    )
    assert {name: tensor.shape for name, tensor in blank.items()} == {n: t.shape for n, t in encoded.items()}


def test_config_of_the_tiny_model_is_readable(turbo: Path) -> None:
    config = json.loads((turbo / "transformer" / "config.json").read_text(encoding="utf-8"))
    assert config["_class_name"] == SPEC.transformer_class and config["_name_or_path"] == "Z-Image-turbo"


def test_a_bfloat16_denoiser_draws_with_a_float32_decoder(zimage: Subject) -> None:
    modules = zimage.family.load(Build(dtype=torch.bfloat16))
    prompt = zimage.bench.encode(zimage.case().inputs()[0])
    decoder = zimage.family.load_decoder(plain_build)
    drawn = [
        np.asarray(
            zimage.family.generate(
                chosen, decoder, prompt, None, size=Size(64, 64), steps=2, cfg=1.0, seed=0
            )[0]
        ).astype(int)
        for chosen in (modules, Bench(zimage.family, plain_build, "t2i").modules)
    ]
    assert np.abs(drawn[0] - drawn[1]).mean() < 8  # of 255: bfloat16 weights, the same picture
