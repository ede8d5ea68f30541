"""A module built tensor by tensor is the module that from_pretrained gives, and bad files are told in a
sentence.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model, T5Config, T5EncoderModel

from whitetuner.errors import UserError
from whitetuner.memory.build import Build, build_module, empty_module
from whitetuner.memory.quantize import QuantLinear

torch.set_num_threads(1)


def tiny_transformer(num_layers: int = 1, heads: int = 2) -> Flux2Transformer2DModel:
    torch.manual_seed(0)
    return Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=num_layers,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=48,
        timestep_guidance_channels=256,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )


def tiny_decoder() -> AutoencoderKLFlux2:
    torch.manual_seed(0)
    model = AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        sample_size=32,
    )
    model.bn.running_mean.normal_()
    return model


def tiny_encoder(tied: bool = False) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=40,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
        )
    )


def tiny_t5() -> T5EncoderModel:
    torch.manual_seed(0)
    return T5EncoderModel(T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2))


def tiny_wan() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


MAKERS = {
    "flux2": tiny_transformer,
    "decoder": tiny_decoder,
    "qwen3": tiny_encoder,
    "qwen3-tied": lambda: tiny_encoder(tied=True),
    "t5": tiny_t5,
    "wan": tiny_wan,
}


def assert_same_module(ours: nn.Module, theirs: nn.Module) -> None:
    mine = {**dict(ours.named_parameters(remove_duplicate=False)), **dict(ours.named_buffers())}
    other = {**dict(theirs.named_parameters(remove_duplicate=False)), **dict(theirs.named_buffers())}
    assert mine.keys() == other.keys()
    for name, tensor in other.items():
        assert mine[name].dtype == tensor.dtype, name
        assert torch.equal(mine[name], tensor), name
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MAKERS)
def test_every_tensor_equals_from_pretrained(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = MAKERS[kind]()
    model.save_pretrained(tmp_path)
    ours = build_module(type(model), tmp_path, dtype=dtype)
    assert_same_module(ours, type(model).from_pretrained(tmp_path, torch_dtype=dtype))
    assert not ours.training
    assert not any(p.requires_grad for p in ours.parameters())


def test_sharded_files_equal_one_file(tmp_path: Path) -> None:
    model = tiny_transformer()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert_same_module(
        build_module(type(model), tmp_path / "many"), build_module(type(model), tmp_path / "one")
    )


def test_tied_weights_are_one_tensor(tmp_path: Path) -> None:
    tiny_encoder(tied=True).save_pretrained(tmp_path)
    model = build_module(Qwen3ForCausalLM, tmp_path, quantize="int8")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)


def test_a_base_model_reads_the_checkpoint_of_the_whole(tmp_path: Path) -> None:
    whole = tiny_encoder()
    whole.save_pretrained(tmp_path)
    assert_same_module(build_module(Qwen3Model, tmp_path), Qwen3Model.from_pretrained(tmp_path))


def test_outputs_equal_from_pretrained(tmp_path: Path) -> None:
    model = tiny_encoder()
    model.save_pretrained(tmp_path)
    ids = torch.arange(12)[None]
    ours = build_module(Qwen3ForCausalLM, tmp_path)(ids, output_hidden_states=True)
    theirs = Qwen3ForCausalLM.from_pretrained(tmp_path)(ids, output_hidden_states=True)
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert torch.equal(a, b)


def test_weights_live_on_when_the_file_is_gone(tmp_path: Path) -> None:
    model = tiny_transformer()
    model.save_pretrained(tmp_path)
    ours = build_module(type(model), tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    assert torch.equal(ours.x_embedder.weight, model.x_embedder.weight)


def test_quantised_while_loading_leaves_what_is_to_stay_precise(tmp_path: Path) -> None:
    model = tiny_transformer()
    model.save_pretrained(tmp_path)
    build = Build(dtype=torch.bfloat16, quantize="int8")
    ours = build(Flux2Transformer2DModel, tmp_path, keep_precise=("x_embedder.*", "*_modulation*"))
    assert ours.x_embedder.weight.dtype == torch.bfloat16
    assert ours.single_stream_modulation.linear.weight.dtype == torch.bfloat16
    layer = ours.transformer_blocks[0].attn.to_q
    assert isinstance(layer, QuantLinear)
    twin = QuantLinear.of(model.transformer_blocks[0].attn.to_q)
    assert torch.equal(layer.weight, twin.weight) and torch.equal(layer.scale, twin.scale)
    assert not any(p.requires_grad for p in ours.parameters())


def test_float32_modules_of_the_class_are_never_quantised(tmp_path: Path) -> None:
    tiny_wan().save_pretrained(tmp_path)
    ours = build_module(WanTransformer3DModel, tmp_path, dtype=torch.bfloat16, quantize="fp8")
    assert ours.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert isinstance(ours.blocks[0].attn1.to_q, QuantLinear)


def test_ready_made_fp8_keeps_its_codes_and_scale(tmp_path: Path) -> None:
    model = tiny_transformer()
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    name = "single_transformer_blocks.0.attn.to_out"
    scale = state[f"{name}.weight"].abs().max() / 448
    codes = (state[f"{name}.weight"] / scale).to(torch.float8_e4m3fn)
    state[f"{name}.weight"], state[f"{name}.scale_weight"] = codes, scale
    state["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(state, file)
    want = codes.float() * scale
    layer = build_module(type(model), tmp_path, quantize="fp8").single_transformer_blocks[0].attn.to_out
    assert torch.equal(layer.weight.view(torch.float8_e4m3fn).float(), codes.float())
    assert torch.equal(layer.dequantized(), want)
    assert torch.equal(
        build_module(type(model), tmp_path).single_transformer_blocks[0].attn.to_out.weight, want
    )
    int8 = build_module(type(model), tmp_path, quantize="int8").single_transformer_blocks[0].attn.to_out
    assert torch.allclose(int8.dequantized(), want, atol=want.abs().max().item() / 120)


def test_a_single_file_is_read_with_the_config_of_a_folder(tmp_path: Path) -> None:
    model = tiny_transformer()
    model.save_pretrained(tmp_path / "folder")
    file = tmp_path / "single.safetensors"
    (tmp_path / "folder" / "diffusion_pytorch_model.safetensors").rename(file)
    assert_same_module(build_module(type(model), file, config=tmp_path / "folder"), model)


def test_overrides_cut_layers_when_their_tensors_are_left_out(tmp_path: Path) -> None:
    tiny_encoder().save_pretrained(tmp_path)
    cut = build_module(
        Qwen3ForCausalLM, tmp_path, overrides={"num_hidden_layers": 1}, ignore=("model.layers.1.*",)
    )
    assert len(cut.model.layers) == 1
    with pytest.raises(UserError, match=r"model\.layers\.1\."):
        build_module(Qwen3ForCausalLM, tmp_path, overrides={"num_hidden_layers": 1})


def test_full_training_asks_for_gradients(tmp_path: Path) -> None:
    model = tiny_transformer()
    model.save_pretrained(tmp_path)
    ours = build_module(type(model), tmp_path, freeze=False)
    assert all(p.requires_grad for p in ours.parameters())


def test_the_skeleton_holds_no_weights(tmp_path: Path) -> None:
    tiny_encoder().save_pretrained(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    empty = empty_module(Qwen3ForCausalLM, tmp_path)
    assert all(p.is_meta for p in empty.parameters())
    assert not empty.model.rotary_emb.inv_freq.is_meta


def saved(tmp_path: Path) -> Path:
    tiny_transformer().save_pretrained(tmp_path)
    return tmp_path / "diffusion_pytorch_model.safetensors"


def told(tmp_path: Path, cls: type = Flux2Transformer2DModel) -> str:
    with pytest.raises(UserError) as caught:
        build_module(cls, tmp_path)
    assert caught.value.mend
    return str(caught.value)


def test_a_missing_folder_or_config_is_told(tmp_path: Path) -> None:
    assert "config.json" in told(tmp_path / "nowhere")
    assert "config.json" in told(tmp_path)


def test_a_broken_config_is_told(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert "cannot be read" in told(tmp_path)


def test_another_class_is_told(tmp_path: Path) -> None:
    saved(tmp_path)
    text = told(tmp_path, AutoencoderKLFlux2)
    assert "Flux2Transformer2DModel" in text and "AutoencoderKLFlux2" in text


def test_a_folder_without_weights_is_told(tmp_path: Path) -> None:
    saved(tmp_path).unlink()
    assert "no weights" in told(tmp_path)


def test_missing_tensors_are_named_up_to_five(tmp_path: Path) -> None:
    file = saved(tmp_path)
    state = load_file(file)
    gone = sorted(k for k in state if k.startswith("transformer_blocks.0"))
    save_file({k: v for k, v in state.items() if k not in gone}, file)
    text = told(tmp_path)
    assert f"{len(gone)} of the {len(state)}" in text and f"and {len(gone) - 5} more" in text


def test_unexpected_tensors_are_named(tmp_path: Path) -> None:
    file = saved(tmp_path)
    save_file({**load_file(file), "transformer_blocks.7.attn.to_q.weight": torch.ones(2, 2)}, file)
    assert "transformer_blocks.7.attn.to_q.weight" in told(tmp_path)


def test_the_checkpoint_of_another_size_is_told_with_both_shapes(tmp_path: Path) -> None:
    saved(tmp_path)
    tiny_transformer(heads=4).save_pretrained(tmp_path / "large")
    (tmp_path / "config.json").write_text(
        (tmp_path / "large" / "config.json").read_text(encoding="utf-8"), encoding="utf-8"
    )
    text = told(tmp_path)
    assert "context_embedder.weight" in text and "[32, 48]" in text and "[64, 48]" in text


def test_a_truncated_file_is_told_with_both_sizes(tmp_path: Path) -> None:
    file = saved(tmp_path)
    whole = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-100])
    text = told(tmp_path)
    assert file.name in text and str(whole) in text and str(whole - 100) in text
    file.write_bytes(b"<!DOCTYPE html><html>")
    assert "not a whole safetensors" in told(tmp_path)


def test_pickles_are_refused_with_the_way_to_convert(tmp_path: Path) -> None:
    saved(tmp_path).unlink()
    torch.save({}, tmp_path / "diffusion_pytorch_model.bin")
    text = told(tmp_path)
    assert "pickle" in text and "save_file" in text and "weights_only=True" in text


def test_missing_shards_are_named(tmp_path: Path) -> None:
    tiny_transformer().save_pretrained(tmp_path, max_shard_size="40KB")
    gone = sorted(tmp_path.glob("*-00002-of-*.safetensors"))[0]
    gone.unlink()
    assert gone.name in told(tmp_path)


def test_weights_that_are_not_numbers_are_told_when_quantised(tmp_path: Path) -> None:
    file = saved(tmp_path)
    state = load_file(file)
    state["transformer_blocks.0.attn.to_q.weight"][3, 3] = torch.nan
    save_file(state, file)
    with pytest.raises(UserError, match=r"transformer_blocks\.0\.attn\.to_q\.weight.*not finite"):
        build_module(Flux2Transformer2DModel, tmp_path, quantize="int8")


def test_a_model_quantised_by_others_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "bitsandbytes" in told(tmp_path)
