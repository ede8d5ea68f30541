"""A whole denoiser in the layout that ComfyUI's models/diffusion_models has: written, read by others, read back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from subjects import Subject

from whitetuner.checkpoint.original import from_original, known_names, to_original, write_original
from whitetuner.errors import UserError
from whitetuner.families import registry
from whitetuner.memory.relaid import Relaid, trace
from whitetuner.memory.skeleton import empty_module
from whitetuner.memory.weights import TensorFiles, read_header
from whitetuner.released import released


class Counted(Mapping[str, torch.Tensor]):
    """A state that is read from outside, as a swapped model's is: how often each tensor was asked for."""

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self.state, self.asked = state, dict.fromkeys(state, 0)
        with torch.device("meta"):
            shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
        self.entries = Relaid(shapes, trace({n: t.shape for n, t in shapes.items()}, dict)).entries

    def __getitem__(self, name: str) -> torch.Tensor:
        self.asked[name] += 1
        return self.state[name]

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def test_the_written_file_is_read_by_diffusers_and_comes_back_to_the_bit(
    subject: Subject, tmp_path: Path
) -> None:
    keymap = registry.keys(subject.name)
    for part in subject.spec.parts(subject.family.options):
        module: Any = subject.bench.modules[part.name]
        state, file = Counted(module.state_dict()), tmp_path / f"{part.name}.safetensors"
        done = write_original(file, state, keymap, dict(module.config), metadata={"who": "test"})
        assert set(state.asked.values()) == {1}, "tensor by tensor, each once"
        assert done.known == done.tensors == len(read_header(file)) and done.num_bytes == file.stat().st_size
        with TensorFiles([file]) as source:
            back = from_original(source, keymap)
            assert set(back) == set(state)
            assert all(torch.equal(back[name], tensor) for name, tensor in state.state.items())
            reader = registry.original_reader(subject.name)
            if reader is not None and reader.any_size:
                theirs = reader.convert(dict(source))
                theirs.pop("__index_timestep_zero__", None)
                assert set(theirs) == set(state)
                assert all(torch.equal(theirs[name], tensor) for name, tensor in state.state.items())
        if reader is not None and reader.any_size:
            model = type(module).from_single_file(
                str(file), config=str(subject.folder), subfolder=part.name, local_files_only=True
            )
            assert all(torch.equal(t, state.state[name]) for name, t in model.state_dict().items())


def test_numbers_are_rounded_once_and_what_stays_precise_stays(subject: Subject, tmp_path: Path) -> None:
    keymap = registry.keys(subject.name)
    part = subject.spec.parts(subject.family.options)[0].name
    module: Any = subject.bench.modules[part]
    state = module.state_dict()
    kept = next(name for name in state if "norm" in name)
    file = tmp_path / "a.safetensors"
    write_original(file, state, keymap, dict(module.config), dtype=torch.bfloat16, keep=[kept])
    with TensorFiles([file]) as source:
        back = from_original(source, keymap)
        for name, tensor in state.items():
            assert torch.equal(back[name], tensor if name == kept else tensor.to(torch.bfloat16)), name


#: The first size of each family in the quick part, the others in the slow one.
REAL = [
    pytest.param(family, variant, "transformer", marks=[pytest.mark.slow] if number else [])
    for family in registry.FAMILIES
    for number, variant in enumerate(registry.sketch(family).RELEASED)
]


@pytest.mark.parametrize(("family", "variant", "part"), REAL)
def test_real_sizes_have_the_keys_that_diffusers_converter_turns_into_its_own(
    family: str, variant: str, part: str, tmp_path: Path
) -> None:
    """Names and shapes of the released sizes, no weights. The other way round is diffusers' own code."""
    model, _ = released(family, variant, tmp_path)
    config = registry.sketch(family).RELEASED[variant][part]
    module = empty_module(_class(config), model.paths.component(part))
    state = module.state_dict()
    relaid = to_original(state, registry.keys(family), config)
    whole = {
        name: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        for name, entry in relaid.entries.items()
    }
    reader = registry.original_reader(family)
    read = dict(whole) if reader is None else reader.convert(dict(whole))
    theirs = {name: tuple(t.shape) for name, t in read.items() if 0 not in t.shape}
    assert theirs == {name: tuple(tensor.shape) for name, tensor in state.items()}
    back = from_original(whole, registry.keys(family))
    assert {name: tuple(e.shape) for name, e in back.entries.items()} == theirs


def _class(config: Mapping[str, Any]) -> type:
    import diffusers

    from whitetuner.families.zimage_v2.transformer import ZImageV2Transformer2DModel

    own = {"ZImageV2Transformer2DModel": ZImageV2Transformer2DModel}
    return own.get(config["_class_name"]) or getattr(diffusers, config["_class_name"])


def test_scaled_fp8_keeps_its_numbers_and_its_scale_goes_with_the_rows() -> None:
    keymap = registry.keys("zimage")
    codes = torch.randn(6, 2).to(torch.float8_e4m3fn)
    source = {
        "layers.0.attention.qkv.weight": codes,
        "layers.0.attention.qkv.scale_weight": torch.tensor(0.5),
    }
    table = trace({"layers.0.attention.qkv.weight": (6, 2)}, keymap.from_original)
    back = Relaid(source, table)
    assert torch.equal(back["layers.0.attention.to_k.weight"].float(), codes[2:4].float())
    assert back["layers.0.attention.to_k.scale_weight"].tolist() == [0.5, 0.5]
    source["layers.0.attention.qkv.scale_weight"] = torch.arange(6.0)
    assert Relaid(source, table)["layers.0.attention.to_v.scale_weight"].tolist() == [4.0, 5.0]


def test_a_missing_partner_and_a_foreign_tensor_are_told(tmp_path: Path) -> None:
    rows = {f"layers.0.attention.to_{one}.weight": torch.zeros(2, 2) for one in "qkv"}
    for lost in rows:
        with pytest.raises(UserError, match=r"missing|left over"):
            to_original({n: t for n, t in rows.items() if n != lost}, registry.keys("zimage"), {})
    with pytest.raises(UserError, match="differ in width"):
        narrow = {**rows, "layers.0.attention.to_q.weight": torch.zeros(2, 3)}
        to_original(narrow, registry.keys("zimage"), {})
    done = write_original(tmp_path / "a.safetensors", rows, registry.keys("zimage"), {})
    with pytest.raises(UserError, match="other tensors than the model"):
        known_names(done.path, registry.keys("zimage"), {*rows, "x_pad_token"})
