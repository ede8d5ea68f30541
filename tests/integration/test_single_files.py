"""Parts as ComfyUI users have them, one safetensors file each, give the modules that the diffusers folder gives."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from whitetuner.adapters.files import load_adapter
from whitetuner.checkpoint.original import write_original
from whitetuner.config.load import load_config
from whitetuner.errors import UserError
from whitetuner.families import registry
from whitetuner.families.contract import quiet
from whitetuner.families.part_files import PART_FILES
from whitetuner.family import ModelPaths
from whitetuner.file_words import told_of
from whitetuner.memory.build import Build
from whitetuner.memory.quantize import QuantLinear
from whitetuner.memory.weights import TensorFiles, weight_files
from whitetuner.models import model_paths
from whitetuner.single_files import component_of

FAMILIES = ("flux2-klein", "zimage", "zimage-v2", "qwen-image", "wan")
#: Parts whose shapes tell less than their config: read in released sizes only, and the tiny ones are none of them.
FOLDERS = {"qwen-image": ("vae", "text_encoder"), "wan": ("vae",)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    folder = tmp_path_factory.mktemp("models")
    with quiet():
        for name in FAMILIES:
            registry.make_tiny(name, str(folder / name), {"wan": "t2v-2.2"}.get(name))
        yield {name: folder / name for name in FAMILIES}


def whole(component: Path) -> dict[str, Tensor]:
    with TensorFiles(weight_files(component)) as source:
        return {name: source[name].clone() for name in source}


def image_vae_originals(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The names of Stable Diffusion's VAE, as ae.safetensors and flux2-vae.safetensors have them."""
    found = {}
    for name, tensor in state.items():
        new = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", new)
        new = re.sub(
            r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", new
        )
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = new.replace("mid_block.attentions.0.", "mid.attn_1.").replace("conv_shortcut", "nin_shortcut")
        new = new.replace("conv_norm_out", "norm_out")
        if ".attn_1." in new:
            for ours, theirs in (("group_norm", "norm"), ("to_out.0", "proj_out"), ("to_", "")):
                new = new.replace(f"attn_1.{ours}", f"attn_1.{theirs}")
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        found[new] = tensor.contiguous()
    return found


def singles(name: str, model: Path, folder: Path) -> dict[str, str]:
    """Every part of the model as one file in the layout ComfyUI has; the tokenizer, of which there is no file, as it is."""
    folder.mkdir(parents=True)
    given = {"tokenizer": str(model / "tokenizer")}
    keymap = registry.keys(name)
    for part in ("transformer", "transformer_2"):
        if (model / part).is_dir():
            given[part] = str(folder / f"a {part}.safetensors")
            write_original(Path(given[part]), whole(model / part), keymap, {})
    given["vae"], given["text_encoder"] = str(folder / "b.safetensors"), str(folder / "c.safetensors")
    save_file(image_vae_originals(whole(model / "vae"), 4), given["vae"])
    extra = {"spiece_model": torch.zeros(9, dtype=torch.uint8)} if name == "wan" else {}
    save_file({**whole(model / "text_encoder"), **extra}, given["text_encoder"])
    return given | {part: str(model / part) for part in FOLDERS.get(name, ())}


def config_of(name: str, given: Mapping[str, str], **more: Any) -> Any:
    task = registry.spec(name).tasks_of({"wan": "t2v-2.2"}.get(name, ""))[0]
    values = {"run.name": "x", "model.family": name, "model.task": task, "data.images": "."}
    return load_config(
        None, base={**values, **{f"model.{part}": path for part, path in given.items()}, **more}
    ).config


@pytest.mark.parametrize("name", FAMILIES)
def test_single_files_give_the_same_modules_as_the_folder(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    spec, given = registry.spec(name), singles(name, models[name], tmp_path / "files")
    paths = model_paths(config_of(name, given))
    options = spec.options(**spec.tiny_options)
    ours, folder = registry.load(name, options, paths), registry.load(name, options, ModelPaths(models[name]))
    build, task = Build(), "t2v" if name == "wan" else "t2i"
    mine, theirs = ours.load(build), folder.load(build)
    assert set(mine) == set(theirs)
    for part in theirs:
        assert dict(mine[part].config)["_class_name"] == dict(theirs[part].config)["_class_name"]
        same(mine[part], theirs[part])
    if name in (
        "flux2-klein",
        "zimage",
        "zimage-v2",
    ):  # of WAN's tiny VAEs the shapes tell less than a release's
        same(ours.load_decoder(build), folder.load_decoder(build))
    for a, b in zip(ours.encoders(task), folder.encoders(task)):
        if a.name == "text":
            a.load(build), b.load(build)
            same(a._model, b._model)  # type: ignore[attr-defined]
    assert paths.component("scheduler").joinpath("scheduler_config.json").is_file()


def same(mine: torch.nn.Module, theirs: torch.nn.Module) -> None:
    state = theirs.state_dict()
    assert set(mine.state_dict()) == set(state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in mine.state_dict().items())


#: A tensor of the 5B's VAE in the class's names -> in those of its release (github.com/Wan-Video/Wan2.2 wan/modules/vae2_2.py).
WAN_22 = (
    (r"^quant_conv", "conv1"),
    (r"^post_quant_conv", "conv2"),
    (r"conv_in", "conv1"),
    (r"norm_out", "head.0"),
    (r"conv_out", "head.2"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"middle.{2 * int(m[1])}"),
    (r"mid_block\.attentions\.0", "middle.1"),
    (r"down_blocks\.(\d)\.resnets", r"downsamples.\1.downsamples"),
    (r"up_blocks\.(\d)\.resnets", r"upsamples.\1.upsamples"),
    (r"norm1", "residual.0"),
    (r"(?<=\d\.)conv1", "residual.2"),
    (r"norm2", "residual.3"),
    (r"(?<=\d\.)conv2", "residual.6"),
    (r"conv_shortcut", "shortcut"),
)


def wan_22_originals(state: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """depth: residual blocks of a level of the encoder; the decoder's have one more, and the resampling comes last."""
    found = {}
    for name, tensor in state.items():
        new = re.sub(r"down_blocks\.(\d)\.downsampler", rf"downsamples.\1.downsamples.{depth}", name)
        new = re.sub(r"up_blocks\.(\d)\.upsampler", rf"upsamples.\1.upsamples.{depth + 1}", new)
        for pattern, other in WAN_22:
            new = re.sub(pattern, other, new)
        found[new] = tensor
    return found


def test_the_vae_of_the_5b_is_read_from_one_file(tmp_path: Path) -> None:
    """Everything but what its latents are normalised by is told from the shapes; that is the release's."""
    model = tmp_path / "model"
    with quiet():
        registry.make_tiny("wan", str(model), "ti2v-5b")
    state = whole(model / "vae")
    save_file(wan_22_originals(state, 1), tmp_path / "a.safetensors")
    save_file(state, tmp_path / "b.safetensors")
    spec = registry.spec("wan")
    given = {part: str(model / part) for part in ("transformer", "text_encoder", "tokenizer")}
    for file in ("a.safetensors", "b.safetensors"):
        vae = {"vae": str(tmp_path / file)}
        paths = model_paths(config_of("wan", given | vae, **{"model.options.variant": "ti2v-5b"}))
        assert spec.stride_of(paths) == 32
        options = spec.options(variant="ti2v-5b")
        ours, folder = registry.load("wan", options, paths), registry.load("wan", options, ModelPaths(model))
        mine, theirs = ours.load_decoder(Build()), folder.load_decoder(Build())
        same(mine, theirs)
        told, known = ({k: v for k, v in dict(one.config).items() if k[0] != "_"} for one in (mine, theirs))
        differ = {key for key in known if told[key] != known[key]}
        assert differ == {"latents_mean", "latents_std"} and len(told["latents_mean"]) == 48
    assert told_of(tmp_path / "a.safetensors")["is"] == "the VAE of WAN 2.2 5B"
    with pytest.raises(UserError, match=r"the VAE of WAN 2.2 5B, not vae of Qwen-Image"):
        component_of(registry.spec("qwen-image"), "vae", tmp_path / "a.safetensors")


def test_the_vae_of_another_wan_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    with quiet():
        registry.make_tiny("wan", str(tmp_path / "5b"), "ti2v-5b")
    for model, other, said in (
        (models["wan"], tmp_path / "5b", "48 channels.*reads 16.*wan_2.1_vae"),
        (tmp_path / "5b", models["wan"], "16 channels.*reads 48.*wan2.2_vae"),
    ):
        with pytest.raises(UserError, match=f"(?s){said}"):
            model_paths(config_of("wan", {"path": str(model), "vae": str(other / "vae")}))


#: Of the 5B's VAE as it was released: names and shapes that the class's do not show.
RELEASED_22 = {
    "conv1.weight": (96, 96, 1, 1, 1),
    "encoder.conv1.weight": (160, 12, 3, 3, 3),
    "encoder.downsamples.0.downsamples.2.resample.1.weight": (160, 160, 3, 3),
    "encoder.downsamples.1.downsamples.0.shortcut.weight": (320, 160, 1, 1, 1),
    "encoder.downsamples.1.downsamples.2.time_conv.weight": (320, 320, 3, 1, 1),
    "encoder.downsamples.3.downsamples.1.residual.6.weight": (640, 640, 3, 3, 3),
    "encoder.middle.1.to_qkv.weight": (1920, 640, 1, 1),
    "encoder.head.2.weight": (96, 640, 3, 3, 3),
    "decoder.conv1.weight": (1024, 48, 3, 3, 3),
    "decoder.upsamples.0.upsamples.3.time_conv.weight": (2048, 1024, 3, 1, 1),
    "decoder.upsamples.2.upsamples.3.resample.1.bias": (512,),
    "decoder.upsamples.3.upsamples.2.residual.3.gamma": (256, 1, 1, 1),
    "decoder.head.2.weight": (12, 256, 3, 3, 3),
}


def test_the_config_of_the_5bs_released_vae_is_told_from_its_shapes() -> None:
    from diffusers import AutoencoderKLWan

    from whitetuner.memory.relaid import trace

    config = {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
              "temperal_downsample": [False, True, True], "is_residual": True, "in_channels": 12, "out_channels": 12,
              "patch_size": 2, "scale_factor_temporal": 4, "scale_factor_spatial": 16}  # fmt: skip
    with torch.device("meta"):
        module = AutoencoderKLWan(**config)
    ours = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    shapes = wan_22_originals(ours, 2)
    assert len(shapes) == len(ours) == 196 and shapes.items() >= RELEASED_22.items()
    (kind,) = [one for one in PART_FILES if one.known_by(shapes)]
    told = kind.config(shapes)
    assert {key: told[key] for key in config} == config
    assert len(told["latents_mean"]) == len(told["latents_std"]) == 48
    table = trace(shapes, lambda rows: kind.convert(rows, told))
    assert {name: place.shape for name, place in table.items()} == ours
    picture = shapes | {"decoder.head.2.weight": (12, 256, 1, 3, 3)}
    assert not any(one.known_by(picture) for one in PART_FILES)  # a picture VAE of the same names


def fp8_of(state: Mapping[str, Tensor], scale_name: str) -> dict[str, Tensor]:
    """As ComfyUI's scaled files: linear weights in fp8 with one scale each, the rest in bf16, and a mark."""
    found: dict[str, Tensor] = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in state.items():
        if tensor.ndim == 2 and name.endswith(".weight") and "norm" not in name:
            scale = tensor.abs().max() / 448
            found[name] = (tensor / scale).to(torch.float8_e4m3fn)
            found[name.removesuffix("weight") + scale_name] = scale
        else:
            found[name] = tensor.to(torch.bfloat16)
    return found


@pytest.mark.parametrize("scale_name", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("name", ["zimage", "flux2-klein"])
def test_a_scaled_fp8_file_is_read_with_its_own_numbers(
    name: str, scale_name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """Fused rows are taken apart with their scale; an fp8 base keeps the very numbers of the file."""
    given = singles(name, models[name], tmp_path / "files")
    original = fp8_of(load_file(given["transformer"]), scale_name)
    if name == "zimage":
        original["norm_final.weight"] = torch.zeros(2)  # in the released file, of no use
    save_file(original, given["transformer"])
    keymap, spec = registry.keys(name), registry.spec(name)
    paths = model_paths(config_of(name, given))
    family = registry.load(name, spec.options(**spec.tiny_options), paths)
    wanted = {}
    for key, tensor in original.items():
        scale = original.get(key.removesuffix("weight") + scale_name)
        if not key.endswith(scale_name) and key not in ("scaled_fp8", "norm_final.weight"):
            wanted[key] = tensor.float() * (1 if scale is None else scale)
    back = keymap.from_original(wanted)
    plain = family.load(Build())["transformer"].state_dict()
    assert set(plain) == set(back) and all(torch.equal(plain[key], back[key]) for key in back)
    quantised = family.load(Build(quantize="fp8"))["transformer"]
    layers = {path: one for path, one in quantised.named_modules() if isinstance(one, QuantLinear)}
    assert layers
    for path, layer in layers.items():
        codes = layer.weight.view(torch.float8_e4m3fn).float() * layer.scale.float()[:, None]
        assert torch.equal(codes, back[f"{path}.weight"])


def test_what_is_wrong_with_a_file_is_told(models: dict[str, Path], tmp_path: Path) -> None:
    given = singles("zimage", models["zimage"], tmp_path / "files")
    klein = singles("flux2-klein", models["flux2-klein"], tmp_path / "klein")

    def refused(match: str, **parts: Any) -> None:
        with pytest.raises(UserError, match=match):
            model_paths(config_of("zimage", {k: v for k, v in {**given, **parts}.items() if v}))

    refused("denoiser of FLUX.2 Klein, not of Z-Image", transformer=klein["transformer"])
    refused("the VAE of FLUX.2, not vae of Z-Image", vae=klein["vae"])
    refused("denoiser of Z-Image, not vae", vae=given["transformer"])
    refused("the text encoder Qwen3, not transformer", transformer=given["text_encoder"])
    refused(r"(?s)'vae' of Z-Image is not given.*ae.safetensors", vae=None)
    refused("there is nothing at", vae=str(tmp_path / "none.safetensors"))
    refused("a tokenizer is a folder", tokenizer=given["vae"])
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(Path(given["transformer"]).read_bytes()[:-10])
    refused("cut off", transformer=str(torn))
    torn.write_bytes(Path(given["transformer"]).read_bytes()[:5])
    refused("not a whole safetensors file", transformer=str(torn))
    torn.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    refused("not a whole safetensors file", transformer=str(torn))
    pickled = tmp_path / "model.ckpt"
    torch.save({"a": torch.zeros(1)}, pickled)
    refused("pickle file", transformer=str(pickled))
    shutil.copy(pickled, tmp_path / "model.safetensors")
    refused("pickle file", transformer=str(tmp_path / "model.safetensors"))
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(64))
    refused("GGUF", transformer=str(tmp_path / "m.gguf"))
    state = load_file(given["transformer"])
    lost = {name: tensor for name, tensor in state.items() if "cap_embedder" not in name}
    save_file(lost, tmp_path / "lost.safetensors")
    refused("lacks tensors", transformer=str(tmp_path / "lost.safetensors"))
    packed = {**state, "layers.0.feed_forward.w1.weight": torch.zeros(4, 4, dtype=torch.int8)}
    save_file(packed, tmp_path / "packed.safetensors")
    refused("packed by another program", transformer=str(tmp_path / "packed.safetensors"))
    both = {**state, **{f"model.diffusion_model.{name}": tensor.clone() for name, tensor in state.items()}}
    save_file(both, tmp_path / "both.safetensors")
    refused("two names", transformer=str(tmp_path / "both.safetensors"))


def test_a_changed_file_is_looked_at_anew(models: dict[str, Path], tmp_path: Path) -> None:
    given = singles("zimage", models["zimage"], tmp_path / "files")
    before = model_paths(config_of("zimage", given)).component("transformer")
    assert model_paths(config_of("zimage", given)).component("transformer") == before
    state = load_file(given["transformer"])
    save_file({**state, "x_pad_token": state["x_pad_token"] + 1}, given["transformer"])
    spec = registry.spec("zimage")
    old = registry.load("zimage", spec.options(), ModelPaths(None, {"transformer": before}))
    with pytest.raises(UserError, match="has changed"):
        old.load(Build())
    assert model_paths(config_of("zimage", given)).component("transformer") != before


def test_the_tokenizer_of_qwen_comes_along() -> None:
    """Ids as of Qwen/Qwen3-4B's tokenizer.json."""
    from transformers import Qwen2TokenizerFast

    from whitetuner.single_files import settings_of

    folder = settings_of(registry.spec("zimage"), "tokenizer")
    tokenizer = Qwen2TokenizerFast.from_pretrained(folder, local_files_only=True)
    assert tokenizer("a photo of a cat, 两只猫 4K 🐱")["input_ids"] == IDS
    words = [{"role": "user", "content": "p"}]
    said = tokenizer.apply_chat_template(
        words, tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    assert said == "<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n"
    assert len(tokenizer) == 151669


IDS = [64, 6548, 315, 264, 8251, 11, 220, 110397, 100472, 220, 19, 42, 11162, 238, 109]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            "Qwen3",
            {"vocab_size": 151936, "hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32},
        ),
        (
            "Qwen3",
            {"vocab_size": 151936, "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32},
        ),
        ("Qwen2.5-VL", {}),
        ("UMT5", {"vocab_size": 256384, "d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64}),
        ("CLIP", {}),
    ],
)
def test_the_config_of_a_released_encoder_is_told_from_its_shapes(kind: str, words: dict[str, int]) -> None:
    """The classes of transformers, empty, built from what their shapes say, have those shapes again."""
    import transformers as t

    vl = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    looks = {
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "depth": 32,
        "num_heads": 16,
        "out_hidden_size": 3584,
    }
    made: dict[str, Any] = {
        "Qwen3": lambda: t.Qwen3ForCausalLM(
            t.Qwen3Config(**words, num_key_value_heads=8, head_dim=128, intermediate_size=9728)
        ),
        "Qwen2.5-VL": lambda: t.Qwen2_5_VLForConditionalGeneration(
            t.Qwen2_5_VLConfig(
                text_config={**vl, "num_key_value_heads": 4, "vocab_size": 152064}, vision_config=looks
            )
        ),
        "UMT5": lambda: t.UMT5EncoderModel(t.UMT5Config(**words, d_kv=64, feed_forward_proj="gated-gelu")),
        "CLIP": lambda: t.CLIPVisionModel(
            t.CLIPVisionConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                               num_attention_heads=16, patch_size=14)
        ),
    }  # fmt: skip
    with torch.device("meta"):
        module = made[kind]()
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    old = {name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): shape
           for name, shape in shapes.items()}  # fmt: skip
    if kind == "CLIP":
        old = {f"vision_model.{name.removeprefix('vision_model.')}": shape for name, shape in old.items()}
    found = [one for one in PART_FILES if one.known_by(old)]
    assert len({one.title for one in found}) == 1 and kind in found[0].title
    config = found[0].config(old)
    again = type(module.config)(
        **{k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    )
    with torch.device("meta"):
        back = type(module)(again)
    assert {name: tuple(tensor.shape) for name, tensor in back.state_dict().items()} == shapes


DAMAGE: list[Any] = [
    ("shape", [-1, 4]), ("shape", [2**62, 2**62]), ("shape", ["a"]), ("shape", None), ("shape", [1.5]), ("shape", [True]),
    ("data_offsets", [5, 1]), ("data_offsets", [-4, 0]), ("data_offsets", [0, 2**70]), ("data_offsets", ["x", 1]),
    ("data_offsets", [0]), ("data_offsets", None), ("dtype", "F4"), ("dtype", None), ("dtype", ["F32"]), ("dtype", "I8"),
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_every_damaged_header_is_told(damage: tuple[str, Any], tmp_path: Path) -> None:
    """By every reader of files, for any of its entries; 500 random ones were tried besides."""
    given = {"layers.0.attention.qkv.weight": torch.zeros(36, 12), "x_embedder.weight": torch.zeros(12, 16)}
    adapter = {f"diffusion_model.layers.0.attention.to_q.lokr_w{n}": torch.zeros(n, n) for n in (1, 2)}
    for tensors in (given, adapter):
        save_file(tensors, tmp_path / "a.safetensors")
        raw = (tmp_path / "a.safetensors").read_bytes()
        length = int.from_bytes(raw[:8], "little")
        for name in tensors:
            header = json.loads(raw[8 : 8 + length])
            header[name][damage[0]] = damage[1]
            text = json.dumps(header).encode()
            file = tmp_path / "b.safetensors"
            file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
            for read in (
                lambda path: component_of(registry.spec("zimage"), "transformer", path),
                lambda path: component_of(registry.spec("zimage"), "vae", path),
                lambda path: load_adapter(path, registry.keys("zimage")),
                told_of,
            ):
                with pytest.raises(UserError):
                    read(file)
