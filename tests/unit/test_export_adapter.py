"""E10: an adapter file loads where it is meant to load, computes there what it computed here, and comes back the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux2_lora_to_diffusers,
    _convert_non_diffusers_flux2_lora_to_diffusers,
)
from lycoris.wrapper import create_lycoris_from_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from whitetuner.adapters.attach import Adapter, attach, attach_state, choose
from whitetuner.adapters.files import load_adapter
from whitetuner.adapters.names import NAMINGS
from whitetuner.adapters.shapes import AdapterSettings
from whitetuner.checkpoint.export import check_names, export_adapter
from whitetuner.checkpoint.inspect import inspect_file
from whitetuner.checkpoint.tensorfile import write_tensors
from whitetuner.errors import UserError
from whitetuner.families.flux2_klein.keys import KEYS

FORMS = {
    "lokr, both full": AdapterSettings("lokr", factor=4, full_matrix=True),
    "lokr, rank 2": AdapterSettings("lokr", rank=2, factor=4),
    "lokr, rank 2, alpha 1": AdapterSettings("lokr", rank=2, alpha=1.0, factor=4),
    "lora, rank 3": AdapterSettings("lora", rank=3),
    "lora, rank 3, alpha 6": AdapterSettings("lora", rank=3, alpha=6.0),
}
SCALED = [name for name in FORMS if "alpha" in name]
BLOCKS = ["transformer_blocks.*", "single_transformer_blocks.*"]
TOP = ["x_embedder", "proj_out", "time_guidance_embed.*", "single_stream_modulation.linear"]


def tiny() -> Flux2Transformer2DModel:
    """The real class with all numbers random, so that no layer is without effect."""
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    return model.requires_grad_(False).eval()


def output(model: Flux2Transformer2DModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 9, 16, generator=generator),
            encoder_hidden_states=torch.randn(1, 5, 48, generator=generator),
            timestep=torch.tensor([0.6]),
            img_ids=torch.cartesian_prod(*(torch.arange(n) for n in (1, 3, 3, 1))).float()[None],
            txt_ids=torch.cartesian_prod(*(torch.arange(n) for n in (1, 1, 1, 5))).float()[None],
            guidance=None,
        ).sample


def trained(
    model: Flux2Transformer2DModel, settings: AdapterSettings, patterns: list[str] = BLOCKS
) -> Adapter:
    """An adapter that changes the output as much as training might, and then some."""
    adapter = attach(model, choose(model, patterns), settings, seed=0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return adapter


@pytest.fixture(scope="module")
def plain() -> torch.Tensor:
    return output(tiny())


def close(ours: torch.Tensor, theirs: torch.Tensor, plain: torch.Tensor) -> None:
    """Their change of the output is ours. float32 and another order of sums: 1e-6 of the output, some layers deep."""
    assert (ours - plain).abs().max() > 0.1, "an adapter without effect proves nothing"
    torch.testing.assert_close(theirs, ours, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_exported_comes_back(form: str, naming: str, tmp_path: Path) -> None:
    model = tiny()
    adapter = trained(model, FORMS[form], [*BLOCKS, *TOP] if naming != "lycoris" else BLOCKS)
    state, expected = adapter.state_dict(), output(model)
    done = export_adapter(state, adapter.settings, KEYS, path=tmp_path / "a.safetensors", naming=naming)
    assert done.modules == len(adapter.deltas)
    settings, again = load_adapter(done.path, KEYS)
    if form in SCALED:  # the scale went into a factor
        assert not any(name.endswith("alpha") for name in again)
    else:
        assert again.keys() == state.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    adapter.detach()
    fresh = attach_state(model, settings, again)
    for path, delta in fresh.deltas.items():
        torch.testing.assert_close(delta.weight(), adapter.deltas[path].weight(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(output(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_training_goes_on_from_the_file(form: str, tmp_path: Path) -> None:
    model = tiny()
    adapter = trained(model, FORMS[form])
    expected = output(model)
    export_adapter(
        adapter.state_dict(), adapter.settings, KEYS, path=tmp_path / "a.safetensors", naming="comfyui"
    )
    adapter.detach()
    again = attach(model, choose(model, BLOCKS), FORMS[form], seed=5)
    again.load_file(tmp_path / "a.safetensors", KEYS)
    torch.testing.assert_close(output(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_diffusers_loads_its_file_and_computes_the_same(
    form: str, tmp_path: Path, plain: torch.Tensor
) -> None:
    model = tiny()
    adapter = trained(model, FORMS[form], [*BLOCKS, *TOP])
    ours = output(model)
    export_adapter(
        adapter.state_dict(), adapter.settings, KEYS, path=tmp_path / "a.safetensors", naming="diffusers"
    )
    theirs = tiny()
    theirs.load_lora_adapter(load_file(tmp_path / "a.safetensors"), prefix="transformer")
    close(ours, output(theirs), plain)


@pytest.mark.parametrize(
    ("form", "naming"),
    [(form, naming) for form in FORMS for naming in NAMINGS if "lokr" in form or naming == "diffusers"],
)
def test_the_pipeline_of_diffusers_loads_the_file(
    form: str, naming: str, tmp_path: Path, plain: torch.Tensor
) -> None:
    """LoKr in any naming; LoRA in its own only (diffusers knows lycoris_ names of LoKr alone)."""
    model = tiny()
    adapter = trained(model, FORMS[form])
    ours = output(model)
    export_adapter(
        adapter.state_dict(), adapter.settings, KEYS, path=tmp_path / "a.safetensors", naming=naming
    )
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=tiny(),
    )
    pipeline.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    close(ours, output(pipeline.transformer), plain)


@pytest.mark.parametrize("naming", ["comfyui", "lycoris"])
@pytest.mark.parametrize("form", FORMS)
def test_lycoris_loads_the_file_and_merges_the_same(
    form: str, naming: str, tmp_path: Path, plain: torch.Tensor
) -> None:
    model = tiny()
    adapter = trained(model, FORMS[form])
    ours = output(model)
    file = tmp_path / "a.safetensors"
    export_adapter(adapter.state_dict(), adapter.settings, KEYS, path=file, naming=naming)
    theirs = tiny()
    network, _ = create_lycoris_from_weights(1.0, str(file), theirs)
    assert len(network.loras) == len(adapter.deltas)
    network.apply_to()
    close(ours, output(theirs), plain)
    network.restore()
    network.merge_to(1.0)
    close(ours, output(theirs), plain)


def test_alpha_stands_for_a_scale_of_one_where_programs_look_for_it(tmp_path: Path) -> None:
    for form, settings in FORMS.items():
        model = tiny()
        adapter = trained(model, settings)
        for naming in NAMINGS:
            path = tmp_path / f"{naming}.safetensors"
            export_adapter(adapter.state_dict(), settings, KEYS, path=path, naming=naming)
            tensors = load_file(path)
            alphas = {float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")}
            wanted = set() if naming == "diffusers" else {1.0 if "full" in form else float(settings.rank)}
            assert alphas == wanted
            assert all(tensor.ndim == 0 for name, tensor in tensors.items() if name.endswith(".alpha"))


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    adapter = trained(tiny(), FORMS["lokr, rank 2"])
    state = adapter.state_dict()
    metadata = {"title": "x", "whitetuner.config": '{"a": 1}'}
    one = export_adapter(
        state, adapter.settings, KEYS, path=tmp_path / "one.safetensors", naming="comfyui", metadata=metadata
    )
    two = export_adapter(
        dict(reversed(state.items())),
        adapter.settings,
        KEYS,
        path=tmp_path / "two.safetensors",
        naming="comfyui",
        metadata=dict(reversed(metadata.items())),
    )
    assert one.path.read_bytes() == two.path.read_bytes()
    assert one.sha256 == hashlib.sha256(one.path.read_bytes()).hexdigest()
    with safe_open(one.path, framework="pt") as file:
        told = file.metadata()
    assert told["title"] == "x" and told["ss_network_module"] == "lycoris.kohya"
    assert json.loads(told["whitetuner.adapter"])["rank"] == 2
    assert not any("date" in key or "time" in key for key in told)


def test_the_file_is_one_that_the_library_reads_whatever_is_in_it(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(3, dtype=torch.uint8),
        "half": torch.randn(3, 5, dtype=torch.bfloat16),
        "a 名": torch.randn(4, 2).t(),
        "none": torch.empty(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "eight": torch.randn(4).to(torch.float8_e4m3fn),
    }
    write_tensors(tmp_path / "deep" / "a.safetensors", tensors, {"k": "值"})
    found = load_file(tmp_path / "deep" / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].float(), tensor.float())
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.safetensors"]
    raw = (tmp_path / "deep" / "a.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    for (
        name,
        tensor,
    ) in tensors.items():  # what maps the file into memory needs each at a multiple of its size
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0
    assert int.from_bytes(raw[:8], "little") % 8 == 0


def test_a_file_that_cannot_be_written_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.ones(1)}, {})

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left") as caught:
        write_tensors(path, {"a": torch.zeros(1 << 20)}, {})
    assert caught.value.code == 1 and "5 MB" in caught.value.mend
    assert torch.equal(load_file(path)["a"], torch.ones(1))
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    monkeypatch.undo()
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="could not be written"):
        write_tensors(tmp_path / "file" / "a.safetensors", {"a": torch.ones(1)}, {})


def test_bf16_files_lose_what_rounding_takes_and_no_more(tmp_path: Path) -> None:
    adapter = trained(tiny(), FORMS["lokr, rank 2, alpha 1"])
    state = adapter.state_dict()
    path = tmp_path / "a.safetensors"
    export_adapter(state, adapter.settings, KEYS, path=path, naming="comfyui", dtype=torch.bfloat16)
    _, again = load_adapter(path, KEYS)
    name = "transformer_blocks.0.attn.to_q"
    assert torch.equal(again[f"{name}.lokr_w1"], (state[f"{name}.lokr_w1"] * 0.5).bfloat16().float())
    state[f"{name}.lokr_w2_a"] = state[f"{name}.lokr_w2_a"] + 1e5
    with pytest.raises(UserError, match="not finite in float16"):
        export_adapter(state, adapter.settings, KEYS, path=path, naming="comfyui", dtype=torch.float16)


def test_layers_without_a_name_are_told(tmp_path: Path) -> None:
    for naming in NAMINGS:
        check_names(choose(tiny(), [*BLOCKS, *TOP]), KEYS, naming)
        with pytest.raises(
            UserError, match=rf"1 of 2 layers have no name in {naming} files \(such as .*to_z\)"
        ):
            check_names(["transformer_blocks.0.attn.to_z", "x_embedder"], KEYS, naming)
    state = {"transformer_blocks.0.attn.to_z.lora_A.weight": torch.ones(1, 4)}
    state["transformer_blocks.0.attn.to_z.lora_B.weight"] = torch.ones(4, 1)
    with pytest.raises(UserError, match="1 of 1 layers have no name in comfyui files"):
        export_adapter(state, FORMS["lora, rank 3"], KEYS, path=tmp_path / "a.safetensors", naming="comfyui")
    assert not list(tmp_path.iterdir())


# -- files of other programs -------------------------------------------------------------------------------------------


def original_lora(join: str, lead: str, down: str, up: str) -> dict[str, torch.Tensor]:
    """A LoRA in the names of the model's first release, as ai-toolkit (dotted) and musubi-tuner (joined by _) write it."""
    sizes = {
        "double_blocks.0.img_attn.qkv": (96, 32),
        "double_blocks.0.txt_attn.qkv": (96, 32),
        "double_blocks.0.img_attn.proj": (32, 32),
        "double_blocks.0.txt_mlp.0": (192, 32),
        "single_blocks.1.linear1": (288, 32),
        "single_blocks.0.linear2": (32, 128),
    }
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for name, (out, in_) in sizes.items():
        prefix = lead + name.replace(".", join)
        tensors[f"{prefix}.{down}.weight"] = torch.randn(4, in_, generator=generator)
        tensors[f"{prefix}.{up}.weight"] = torch.randn(out, 4, generator=generator)
    return tensors


def test_a_lora_in_original_names_is_read_as_diffusers_reads_it(tmp_path: Path) -> None:
    tensors = original_lora(".", "diffusion_model.", "lora_A", "lora_B")
    save_file(tensors, tmp_path / "a.safetensors")
    settings, state = load_adapter(tmp_path / "a.safetensors", KEYS)
    theirs = _convert_non_diffusers_flux2_lora_to_diffusers(dict(tensors))
    assert settings == AdapterSettings("lora", 4, None) or settings.alpha == 4
    assert {f"transformer.{name}" for name in state} == theirs.keys()
    assert all(torch.equal(tensor, theirs[f"transformer.{name}"]) for name, tensor in state.items())
    attach_state(tiny(), settings, state)


def test_a_lora_of_kohyas_kind_is_read_as_diffusers_reads_it(tmp_path: Path) -> None:
    tensors = original_lora("_", "lora_unet_", "lora_down", "lora_up")
    tensors |= {
        f"{name.rpartition('.lora_down')[0]}.alpha": torch.tensor(2.0) for name in tensors if "down" in name
    }
    save_file(tensors, tmp_path / "a.safetensors")
    settings, state = load_adapter(tmp_path / "a.safetensors", KEYS)
    assert (settings.rank, settings.alpha) == (4, 2.0)
    theirs = _convert_kohya_flux2_lora_to_diffusers(dict(tensors))
    paths = {name.rpartition(".lora_")[0] for name in state if "lora_A" in name}
    assert {f"transformer.{path}" for path in paths} == {name.rpartition(".lora_")[0] for name in theirs}
    for path in paths:
        ours = state[f"{path}.lora_B.weight"] @ state[f"{path}.lora_A.weight"] * 0.5
        expected = theirs[f"transformer.{path}.lora_B.weight"] @ theirs[f"transformer.{path}.lora_A.weight"]
        torch.testing.assert_close(ours, expected)


def test_rows_that_another_layout_swaps_come_back_in_order(tmp_path: Path) -> None:
    """norm_out: shift and scale stand the other way round in the original layout."""
    up = torch.randn(64, 2)
    prefix = "diffusion_model.final_layer.adaLN_modulation.1"
    weight = KEYS.from_original({"final_layer.adaLN_modulation.1.weight": up})["norm_out.linear.weight"]
    assert not torch.equal(weight, up)
    save_file(
        {f"{prefix}.lora_A.weight": torch.ones(2, 32), f"{prefix}.lora_B.weight": up},
        tmp_path / "a.safetensors",
    )

    # the key map's own comfyui name of norm_out is the diffusers one, so this spelling is the original layout
    class Original:
        adapter_prefix, from_original = KEYS.adapter_prefix, KEYS.from_original

        def module_path(self, prefix: str) -> str | None:
            return None

    _, state = load_adapter(tmp_path / "a.safetensors", Original())
    assert torch.equal(state["norm_out.linear.lora_B.weight"], weight)


def test_one_lokr_over_query_key_and_value_cannot_be_taken_apart(tmp_path: Path) -> None:
    prefix = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = {f"{prefix}.lokr_w1": torch.ones(4, 4), f"{prefix}.lokr_w2": torch.ones(24, 8)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"keeps apart .*cannot be taken apart"):
        load_adapter(tmp_path / "a.safetensors", KEYS)


@pytest.mark.parametrize("lead", ["", "base_model.model.", "transformer."])
def test_dotted_module_paths_of_peft_and_diffusers_are_read(lead: str, tmp_path: Path) -> None:
    name = f"{lead}single_transformer_blocks.1.attn.to_out"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(4, 2)},
        tmp_path / "a.safetensors",
    )
    assert set(load_adapter(tmp_path / "a.safetensors", KEYS)[1]) == {
        f"single_transformer_blocks.1.attn.to_out.lora_{x}.weight" for x in "AB"
    }


def test_a_lokr_of_lycoris_with_both_factors_low_rank_is_read(tmp_path: Path) -> None:
    name = "lycoris_transformer_blocks_0_attn_to_q"
    shapes = {"lokr_w1_a": (8, 1), "lokr_w1_b": (1, 8), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 4)}
    tensors = {f"{name}.{part}": torch.randn(shape) for part, shape in shapes.items()}
    save_file({**tensors, f"{name}.alpha": torch.tensor(0.5)}, tmp_path / "a.safetensors")
    settings, state = load_adapter(tmp_path / "a.safetensors", KEYS)
    assert settings == AdapterSettings("lokr", 1, 0.5, 8, False, True)
    adapter = attach_state(tiny(), settings, state)
    dense = torch.kron(
        tensors[f"{name}.lokr_w1_a"] @ tensors[f"{name}.lokr_w1_b"],
        tensors[f"{name}.lokr_w2_a"] @ tensors[f"{name}.lokr_w2_b"],
    )
    torch.testing.assert_close(adapter.deltas["transformer_blocks.0.attn.to_q"].weight(), dense * 0.5)


def module(name: str, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """module("q", lora_A__weight=(2, 8)) -> {"q.lora_A.weight": ones}."""
    return {f"{name}.{part.replace('__', '.')}": torch.ones(shape) for part, shape in shapes.items()}


Q, K = "lycoris_transformer_blocks_0_attn_to_q", "lycoris_transformer_blocks_0_attn_to_k"
DOTTED = "transformer.transformer_blocks.0.attn"
LOKR = {"lokr_w1": (4, 4), "lokr_w2": (8, 8)}
LORA = {"lora_A__weight": (2, 8), "lora_B__weight": (8, 2)}
GOOD = module(Q, **LOKR)
BAD = {
    "names of another family": (
        module("lycoris_layers_0_to_q", **LOKR),
        "1 of 1 names are not of this model family",
    ),
    "two namings": (GOOD | module(f"{DOTTED}.to_k", **LOKR), "mixed in one file"),
    "one layer twice": (GOOD | module(f"{DOTTED}.to_q", **LOKR), "mixed in one file"),
    "half a module": (module(Q, lokr_w1=(4, 4)), "is incomplete: it has only lokr_w1"),
    "ranks that differ": (
        module(Q, lora_A__weight=(2, 8), lora_B__weight=(8, 3)),
        "lora_B and lora_A differ in rank",
    ),
    "a convolution": (
        module(Q, lora_down__weight=(2, 8, 3, 3), lora_up__weight=(8, 2)),
        "only linear layers",
    ),
    "not finite": (GOOD | {f"{Q}.lokr_w1": torch.full((4, 4), float("nan"))}, "not finite"),
    "DoRA": (GOOD | module(Q, dora_scale=(32, 1)), "holds DoRA"),
    "LoHa": (module(Q, hada_w1_a=(4, 4)), "holds LoHa"),
    "LoKr and LoRA": (GOOD | module(K, **LORA), "mixes LoKr and LoRA"),
    "a model": ({"x_embedder.weight": torch.ones(4, 4)}, "no LoKr or LoRA file: 1 of its 1 tensors"),
    "nothing": ({}, "no LoKr or LoRA file"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_not_right_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    tensors, words = BAD[case]
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    with pytest.raises(UserError) as caught:
        load_adapter(path, KEYS)
    assert words in str(caught.value) and str(path) in str(caught.value) and caught.value.mend


def test_files_that_are_none_are_refused_with_what_to_do(tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    save_file(GOOD, good)
    cases = {
        "missing.safetensors": (None, "no such file"),
        "torn.safetensors": (good.read_bytes()[:-40], "no whole safetensors file"),
        "short.safetensors": (good.read_bytes()[:5], "no whole safetensors file"),
        "empty.safetensors": (b"", "no whole safetensors file"),
        "page.safetensors": (b"<!DOCTYPE html><html>", "no whole safetensors file"),
        "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        "old.ckpt": (b"whatever", "pickle file"),
    }
    torch.save(GOOD, tmp_path / "renamed.safetensors")
    for name, (content, words) in {
        **cases,
        "renamed.safetensors": (None, "pickle file"),
        ".": (None, "a folder"),
    }.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        for read in (lambda p: load_adapter(p, KEYS), lambda p: inspect_file(p, {"flux2-klein": KEYS})):
            with pytest.raises(UserError, match=words):
                read(tmp_path / name)


# -- what is this file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("naming", "style"), [("comfyui", "LyCORIS"), ("diffusers", "diffusers"), ("lycoris", "LyCORIS")]
)
def test_inspect_tells_what_an_adapter_is(naming: str, style: str, tmp_path: Path) -> None:
    adapter = trained(tiny(), FORMS["lokr, rank 2"])
    path = tmp_path / "a.safetensors"
    export_adapter(
        adapter.state_dict(), adapter.settings, KEYS, path=path, naming=naming, metadata={"note": "n"}
    )
    found = inspect_file(path, {"flux2-klein": KEYS})
    assert (found["what"], found["kind"], found["family"], found["naming"]) == (
        "adapter",
        "lokr",
        "flux2-klein",
        style,
    )
    assert (found["rank"], found["factor"], found["scale"], found["modules"]) == (
        2,
        4,
        1.0,
        len(adapter.deltas),
    )
    assert found["metadata"]["note"] == "n" and "White Tuner" in found["read_by"]
    json.dumps(found)


def test_inspect_tells_what_a_model_is_and_says_so_when_it_does_not_know(tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "m.safetensors"
    save_file(model.state_dict(), path)
    assert inspect_file(path, {"flux2-klein": KEYS})["naming"] == "diffusers"
    original = {
        f"model.diffusion_model.{k}": v.contiguous() for k, v in KEYS.to_original(model.state_dict()).items()
    }
    save_file(original, path)
    found = inspect_file(path, {"flux2-klein": KEYS})
    assert (found["what"], found["family"], found["naming"]) == ("model", "flux2-klein", "original")
    save_file({"conv.weight": torch.ones(2, 2)}, path)
    assert inspect_file(path, {"flux2-klein": KEYS})["what"] == "unknown"
    save_file(GOOD | {f"{Q}.dora_scale": torch.ones(1)}, path)
    assert "DoRA" in inspect_file(path, {"flux2-klein": KEYS})["cannot_be_read"]
    save_file({f"layers_9.{part}": torch.ones(4, 4) for part in ("lokr_w1", "lokr_w2")}, path)
    assert inspect_file(path, {"flux2-klein": KEYS})["family"] is None
