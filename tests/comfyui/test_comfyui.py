"""ComfyUI's own loaders on our files, where COMFYUI_DIR names a checkout of it (with its requirements installed).

Small models of the real classes, heads as wide as the released ones': ComfyUI takes that for granted. Every weight, the
forward and every weight patched by an adapter are compared; a single line about a name that was not found fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    Flux2Transformer2DModel,
    QwenImageTransformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from whitetuner.adapters.attach import attach, choose
from whitetuner.adapters.shapes import AdapterSettings
from whitetuner.checkpoint.export import export_adapter
from whitetuner.checkpoint.original import to_original, write_original
from whitetuner.families import registry
from whitetuner.families.comfy_workflows import Wanted, workflow
from whitetuner.memory.build import Build
from whitetuner.records import Size
from whitetuner.single_files import component_of

COMFYUI = os.environ.get("COMFYUI_DIR", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not COMFYUI, reason="set COMFYUI_DIR to a checkout of ComfyUI"),
]
FORMS = {
    "lokr full": AdapterSettings("lokr", factor=4, full_matrix=True),
    "lokr rank 2": AdapterSettings("lokr", rank=2, alpha=1.0, factor=8),
    "lora": AdapterSettings("lora", rank=3, alpha=6.0),
}


@dataclass
class Small:
    """words: of ComfyUI's forward besides tensors; numbers: what its detection takes for granted of released sizes."""

    family: str
    make: Callable[[], nn.Module]
    draw: Callable[[nn.Module], tuple[dict[str, Tensor], Tensor]]
    sign: int = 1
    words: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def klein(model: Any) -> tuple[dict[str, Tensor], Tensor]:
    x, context, t = noise(1, 128, 3, 4), noise(1, 5, 96), torch.tensor([0.6])
    said = model(
        hidden_states=x.flatten(2).mT,
        encoder_hidden_states=context,
        timestep=t,
        img_ids=torch.cartesian_prod(*(torch.arange(n) for n in (1, 3, 4, 1))).float()[None],
        txt_ids=torch.cartesian_prod(*(torch.arange(n) for n in (1, 1, 1, 5))).float()[None],
        guidance=None,
    ).sample
    return {"x": x, "timestep": t, "context": context}, said.mT.unflatten(2, (3, 4))


def zimage(model: Any) -> tuple[dict[str, Tensor], Tensor]:
    x, context, t = noise(1, 16, 4, 6), noise(1, 9, 64), torch.tensor([0.6])
    said = model(list(x.unsqueeze(2)), 1 - t, list(context), return_dict=False)[0]
    return {"x": x, "timestep": t, "context": context}, said[0].squeeze(1)[None]


def qwen(model: Any) -> tuple[dict[str, Tensor], Tensor]:
    x, context, t = noise(1, 16, 1, 4, 6), noise(1, 7, 96), torch.tensor([0.6])
    tokens = nn.functional.pixel_unshuffle(x[:, :, 0], 2).flatten(2).mT
    said = model(
        hidden_states=tokens,
        encoder_hidden_states=context,
        encoder_hidden_states_mask=None,
        timestep=t,
        img_shapes=[[(1, 2, 3)]],
        guidance=None,
        return_dict=False,
    )[0]
    return {"x": x, "timestep": t, "context": context}, nn.functional.pixel_shuffle(
        said.mT.unflatten(2, (2, 3)), 2
    )


def wan(model: Any) -> tuple[dict[str, Tensor], Tensor]:
    x, context, t = noise(1, model.config.in_channels, 2, 4, 6), noise(1, 512, 4096), torch.tensor([600.0])
    more, given = {}, {"x": x, "timestep": t, "context": context}
    if model.config.image_dim:
        more["encoder_hidden_states_image"] = given["clip_fea"] = noise(1, 257, 1280)
    said = model(hidden_states=x, timestep=t, encoder_hidden_states=context, return_dict=False, **more)[0]
    return given, said


def wan_model(**more: Any) -> Callable[[], nn.Module]:
    return lambda: WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, ffn_dim=320, num_layers=2, **more
    )


QWEN = {
    "in_channels": 64,
    "num_layers": 2,
    "attention_head_dim": 128,
    "num_attention_heads": 2,
    "joint_attention_dim": 96,
}
CASES = {
    "klein": Small(
        "flux2-klein",
        lambda: Flux2Transformer2DModel(
            in_channels=128,
            num_layers=2,
            num_single_layers=2,
            num_attention_heads=2,
            joint_attention_dim=96,
            guidance_embeds=False,
        ),
        klein,
        numbers={"num_heads": 2},  # versions of before Klein know one size of FLUX.2
    ),
    "zimage": Small(
        "zimage",
        lambda: ZImageTransformer2DModel(
            dim=1536, n_layers=1, n_refiner_layers=1, n_heads=12, n_kv_heads=12, cap_feat_dim=64
        ),
        zimage,
        sign=-1,
        words={"num_tokens": 9},
        numbers={
            "n_heads": 12,
            "n_kv_heads": 12,
            "n_refiner_layers": 1,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
            "rope_theta": 256.0,
            "ffn_dim_multiplier": 8 / 3,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        },
    ),
    "qwen": Small(
        "qwen-image",
        lambda: QwenImageTransformer2DModel(**QWEN),
        qwen,
        numbers={"num_attention_heads": 2, "joint_attention_dim": 96},
    ),
    "qwen 2511": Small(
        "qwen-image",
        lambda: QwenImageTransformer2DModel(**QWEN, zero_cond_t=True),
        qwen,
        numbers={"num_attention_heads": 2, "joint_attention_dim": 96},
    ),
    "wan t2v": Small("wan", wan_model(in_channels=16), wan),
    "wan i2v 2.1": Small("wan", wan_model(in_channels=36, image_dim=1280, added_kv_proj_dim=256), wan),
    "wan i2v 2.2": Small("wan", wan_model(in_channels=36), wan),
    "wan 5b": Small("wan", wan_model(in_channels=48, out_channels=48), wan),
}


def written(name: str, case: Small, folder: Path) -> dict[str, Any]:
    """The case's files, as in_comfyui.py reads them."""
    folder.mkdir()
    torch.manual_seed(0)
    model: Any = case.make().requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.05)
    keymap, spec = registry.keys(case.family), registry.spec(case.family)
    write_original(folder / "model.safetensors", model.state_dict(), keymap, dict(model.config))
    given, said = case.draw(model)
    tensors = {f"given.{key}": one.contiguous() for key, one in given.items()}
    save_file({**tensors, "output": said.contiguous()}, folder / "inputs.safetensors")
    adapters = {}
    for form, settings in FORMS.items():
        adapter = attach(model, choose(model, spec.adapter_targets), settings, seed=0)
        for parameter in adapter.parameters():
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        files = {key: folder / f"{form} {key}.safetensors" for key in ("file", "merged")}
        export_adapter(adapter.state_dict(), settings, keymap, path=files["file"], naming="comfyui")
        adapter.detach()
        whole = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        for path, delta in adapter.deltas.items():
            whole[f"{path}.weight"] += delta.weight()
        write_original(files["merged"], whole, keymap, dict(model.config))
        adapters[form] = {key: str(file) for key, file in files.items()} | {"layers": len(adapter.deltas)}
    return {
        "model": str(folder / "model.safetensors"),
        "inputs": str(folder / "inputs.safetensors"),
        "sign": case.sign,
        "words": case.words,
        "numbers": case.numbers,
        "adapters": adapters,
    }


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("comfyui")
    cases: dict[str, Any] = {name: written(name, case, folder / name) for name, case in CASES.items()}
    cases["workflows"] = {
        f"{name} {variant} {task}": workflow(
            Wanted(
                name,
                variant,
                task,
                {"transformer": "a"},
                True,
                "p",
                "n",
                Size(64, 64, frames),
                9,
                4.0,
                0,
                5.0,
                references=refs,
            )
        )
        for name, frames in (("flux2-klein", 1), ("zimage", 1), ("qwen-image", 1), ("wan", 5))
        for variant in registry.spec(name).variants
        for task in registry.spec(name).tasks_of(variant)
        for refs in [int(task in ("edit", "i2v"))]
    }
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    script = Path(__file__).with_name("in_comfyui.py")
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    done = subprocess.run(
        [python, str(script), COMFYUI, str(folder / "cases.json")],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    yield json.loads((folder / "answers.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CASES)
def test_comfyui_loads_the_model_and_computes_what_diffusers_computes(
    name: str, answers: dict[str, Any]
) -> None:
    answer = answers[name]
    assert answer["of_model"] == [], answer["of_model"]
    assert answer["weights_differ"] == [] and answer["not_in_file"] == []
    assert answer["forward"] < 1e-4  # float32 with another order of sums; 2e-5 seen


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_comfyui_patches_every_weight_as_our_merge_does(
    name: str, form: str, answers: dict[str, Any]
) -> None:
    answer = answers[name]["adapters"][form]
    assert answer["lines"] == [] and answer["not_patched"] == []
    assert answer["patches"] > 0 and answer["worst"] < 1e-5  # of the largest change; float32


def test_comfyui_has_every_node_and_input_of_our_workflows(answers: dict[str, Any]) -> None:
    assert answers["workflows"] == []


def test_the_vae_of_wans_5b_makes_of_a_clip_what_comfyuis_does(tmp_path: Path) -> None:
    """A file that ComfyUI's class wrote, read as one of the user's."""
    script = Path(__file__).with_name("vae_in_comfyui.py")
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    done = subprocess.run(
        [python, str(script), COMFYUI, str(tmp_path)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = load_file(tmp_path / "answers.safetensors")
    vae = Build()(
        AutoencoderKLWan,
        component_of(registry.spec("wan"), "vae", tmp_path / "vae.safetensors"),
        keep_precise=("*",),
    )
    with torch.no_grad():
        latent = vae.encode(answers["clip"]).latent_dist.mode()
        drawn = vae.decode(answers["latent"]).sample
    # float32; attention in another order of sums. ComfyUI cuts what is drawn outside of the class.
    for ours, theirs in ((latent, answers["latent"]), (drawn, answers["drawn"].clamp(-1, 1))):
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5  # 5e-7 seen


def test_every_original_layout_is_told_from_the_others() -> None:
    """So that a case above cannot pass with another family's code."""
    names = {}
    for name, case in CASES.items():
        with torch.device("meta"):
            model: Any = case.make()
        names[name] = set(to_original(model.state_dict(), registry.keys(case.family), dict(model.config)))
    assert len({frozenset(one) for one in names.values()}) >= 5
