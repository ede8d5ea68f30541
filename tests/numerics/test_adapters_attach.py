"""Adapters on a model: which layers are chosen, that taking one off leaves nothing, that state travels to the
bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from whitetuner.adapters.attach import Adapter, attach, attach_state, base_state_dict, layer_sizes
from whitetuner.adapters.choose import choose
from whitetuner.adapters.deltas import Attached
from whitetuner.adapters.shapes import AdapterSettings, count_parameters, reading_limits
from whitetuner.errors import UserError, UserErrors

LOKR = AdapterSettings("lokr", rank=2, alpha=1.0, factor=2)
LORA = AdapterSettings("lora", rank=3, alpha=6.0)
FULL = AdapterSettings("lokr", factor=4, full_matrix=True)


class Quantised(nn.Module):
    """A leaf that looks like a linear layer, as the memory engine's do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("q", (linear.weight.detach() * 64).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.q.to(x.dtype).t() / 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.to_q, self.to_k = nn.Linear(16, 16), nn.Linear(16, 16)
        self.to_out = nn.ModuleList([nn.Linear(16, 16), nn.Identity()])
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        x = x + self.to_out[0](self.to_q(h) * self.to_k(h).sigmoid())
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(4, 16, 1)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.proj_out = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.proj_out(x)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().requires_grad_(False).eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))


def move(adapter: Adapter) -> None:
    """Away from zero, as training would."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


BLOCKS = ["blocks.*"]
ALL = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("to_q", "to_k", "to_out.0", "mlp.0", "mlp.2")]


def test_patterns_choose_linear_layers_in_the_order_of_the_model(model: Model) -> None:
    assert choose(model, BLOCKS) == ALL
    assert choose(model, ["*"]) == [*ALL, "proj_out"]
    assert choose(model, ["blocks.1.to_k", "blocks.*.to_q"]) == [
        "blocks.0.to_q",
        "blocks.1.to_q",
        "blocks.1.to_k",
    ]


def test_quantised_layers_are_chosen_and_trained_like_plain_ones(model: Model, x: torch.Tensor) -> None:
    for block in model.blocks:
        block.to_q = Quantised(block.to_q)
    assert choose(model, BLOCKS) == ALL
    before = model(x)
    adapter = attach(model, ALL, LOKR, seed=0)
    assert torch.equal(model(x), before)
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("blocks.*.to_qq", ["matches no layer", "blocks.*.to_q"]),
        ("transformer_blocks.*.to_k", ["matches no layer", "blocks.*.to_k"]),
        ("patch", ["convolution", "patch"]),
        ("blocks.0", ["group of layers", "'blocks.0.*'", "5 linear"]),
        ("blocks.*.norm", ["no linear layer", "LayerNorm"]),
    ],
)
def test_a_pattern_without_layers_is_refused_with_the_reason(
    model: Model, pattern: str, words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        choose(model, [pattern])
    assert all(word in str(caught.value) for word in ["method.targets", *words])


def test_every_wrong_pattern_is_told_at_once(model: Model) -> None:
    with pytest.raises(UserErrors) as caught:
        choose(model, ["patch", "blocks.*.to_q", "nothing.here"])
    assert len(caught.value.errors) == 2
    with pytest.raises(UserError, match="no layers are named"):
        choose(model, [])


@pytest.mark.parametrize("settings", [LOKR, LORA, FULL])
def test_attaching_changes_nothing_and_taking_off_leaves_nothing(
    model: Model, x: torch.Tensor, settings: AdapterSettings
) -> None:
    before, names, state = model(x), [name for name, _ in model.named_modules()], model.state_dict()
    adapter = attach(model, choose(model, BLOCKS), settings, seed=0)
    assert torch.equal(model(x), before)
    assert set(names) <= {name for name, _ in model.named_modules()}
    assert list(base_state_dict(model)) == list(state)
    assert all(torch.equal(base_state_dict(model)[name], tensor) for name, tensor in state.items())
    move(adapter)
    assert not torch.equal(model(x), before)
    with adapter.off():
        assert torch.equal(model(x), before)
    assert not torch.equal(model(x), before)
    adapter.detach()
    assert torch.equal(model(x), before)
    assert [name for name, _ in model.named_modules()] == names
    assert list(model.state_dict()) == list(state)


def test_off_keeps_what_was_off_before(model: Model, x: torch.Tensor) -> None:
    before = model(x)
    adapter = attach(model, ALL, LOKR, seed=0)
    move(adapter)
    adapter.enable(False)
    with adapter.off():
        pass
    assert torch.equal(model(x), before)
    adapter.enable()
    assert not torch.equal(model(x), before)


def test_only_the_deltas_are_trained_and_all_of_them(model: Model, x: torch.Tensor) -> None:
    model.requires_grad_(True)
    adapter = attach(model, choose(model, ["*"]), LOKR, seed=0)
    for part in (model.patch, *(block.norm for block in model.blocks)):
        part.requires_grad_(False)  # not the adapter's to freeze
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"{path}.delta.{name}" for path in adapter.deltas for name in ("lokr_w1", "lokr_w2_a", "lokr_w2_b")
    }
    move(adapter)
    model(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in adapter.parameters())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert count_parameters(layer_sizes(model, list(adapter.deltas)), LOKR) == sum(
        p.numel() for p in adapter.parameters()
    )


def test_an_attached_layer_shows_the_attributes_of_the_layer(model: Model) -> None:
    plain = model.blocks[0].mlp[0]
    attach(model, ["blocks.0.mlp.0"], LOKR, seed=0)
    layer = model.blocks[0].mlp[0]
    assert isinstance(layer, Attached)
    assert layer.weight is plain.weight and layer.bias is plain.bias
    assert (layer.in_features, layer.out_features) == (16, 32)
    assert choose(model, ["blocks.0.mlp.*"]) == ["blocks.0.mlp.0", "blocks.0.mlp.2"]


def test_the_start_depends_on_seed_and_path_alone() -> None:
    def start(paths: list[str], seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(len(paths))  # the global generator must not matter
        return attach(Model(), paths, LOKR, seed).state_dict()

    whole, part, other = start(ALL, 7), start(["blocks.1.to_k"], 7), start(ALL, 8)
    for name, tensor in part.items():
        assert torch.equal(tensor, whole[name])
    assert not torch.equal(whole["blocks.1.to_k.lokr_w1"], other["blocks.1.to_k.lokr_w1"])
    assert not torch.equal(whole["blocks.1.to_k.lokr_w1"], whole["blocks.0.to_k.lokr_w1"])


@pytest.mark.parametrize("settings", [LOKR, LORA, FULL])
def test_state_travels_to_the_bit(model: Model, x: torch.Tensor, settings: AdapterSettings) -> None:
    adapter = attach(model, ALL, settings, seed=0)
    move(adapter)
    state = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    expected = model(x)
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    adapter.detach()
    again = attach(model, ALL, settings, seed=1)
    again.load_state_dict(state)
    assert torch.equal(model(x), expected)
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


def test_state_names_are_those_of_files(model: Model) -> None:
    lokr = attach(model, ["blocks.0.to_q"], LOKR, seed=0)
    assert list(lokr.state_dict()) == [
        f"blocks.0.to_q.{n}" for n in ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha")
    ]
    assert float(lokr.state_dict()["blocks.0.to_q.alpha"]) == 1.0
    lora = attach(model, ["blocks.0.to_k"], AdapterSettings("lora", rank=3), seed=0)
    assert list(lora.state_dict()) == ["blocks.0.to_k.lora_A.weight", "blocks.0.to_k.lora_B.weight"]


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(model: Model) -> None:
    adapter = attach(model, ALL, LOKR, seed=0)
    state = adapter.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    name = "blocks.1.mlp.2.lokr_w1"
    wrong = {
        "are missing": {k: v for k, v in state.items() if k != name},
        "are too many": state | {"blocks.9.to_q.lokr_w1": torch.ones(4, 4)},
        "has the shape": state | {name: torch.ones(3, 3)},
        "alpha 2": state | {"blocks.1.mlp.2.alpha": torch.tensor(2.0)},
    }
    for words, given in wrong.items():
        with pytest.raises(UserError, match=words):
            adapter.load_state_dict({k: v + 1 if "lokr" in k else v for k, v in given.items()})
        assert all(torch.equal(tensor, before[k]) for k, tensor in adapter.state_dict().items())


@pytest.mark.parametrize("settings", [LOKR, LORA, FULL])
def test_merging_is_the_forward_with_the_adapter(
    model: Model, x: torch.Tensor, settings: AdapterSettings
) -> None:
    adapter = attach(model, ALL, settings, seed=0)
    move(adapter)
    expected = model(x)
    adapter.detach()
    adapter.merge_into(model)
    assert not any(isinstance(part, Attached) for part in model.modules())
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_merging_rounds_once(model: Model) -> None:
    torch.manual_seed(3)
    other = Model().to(torch.bfloat16)
    adapter = attach(model, ALL, LOKR, seed=0)
    move(adapter)
    weights = {path: other.get_submodule(path).weight.detach().clone() for path in ALL}
    adapter.merge_into(other)
    for path, weight in weights.items():
        expected = (weight.float() + adapter.deltas[path].weight()).to(torch.bfloat16)
        assert torch.equal(other.get_submodule(path).weight, expected)


def test_merging_into_a_quantised_layer_is_refused(model: Model) -> None:
    model.blocks[0].to_q = Quantised(model.blocks[0].to_q)
    adapter = attach(model, ALL, LOKR, seed=0)
    adapter.detach()
    with pytest.raises(UserError, match=r"blocks.0.to_q is quantised"):
        adapter.merge_into(model)


def test_strength_scales_the_delta_and_is_not_saved(model: Model) -> None:
    adapter = attach(model, ["blocks.0.to_q"], LOKR, seed=0)
    move(adapter)
    weight, state = adapter.deltas["blocks.0.to_q"].weight(), adapter.state_dict()
    adapter.strength = 0.5
    assert adapter.strength == 0.5
    torch.testing.assert_close(adapter.deltas["blocks.0.to_q"].weight(), weight * 0.5)
    assert all(torch.equal(tensor, state[name]) for name, tensor in adapter.state_dict().items())


def test_starting_from_a_file_takes_its_values_whatever_its_scale(model: Model, x: torch.Tensor) -> None:
    first = attach(model, ALL, LOKR, seed=0)
    move(first)
    expected, state = model(x), first.state_dict()
    first.detach()
    same = attach(model, ALL, LOKR, seed=1)
    same.start_from(state)
    assert torch.equal(model(x), expected)
    same.detach()
    other = attach(model, ALL, AdapterSettings("lokr", rank=2, alpha=4.0, factor=2), seed=1)
    other.start_from(state)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_starting_from_another_shape_names_the_settings_of_the_file(model: Model) -> None:
    state = attach(model, ALL, LOKR, seed=0).state_dict()
    other = Model()
    with pytest.raises(UserError, match="rank = 2, alpha = 1"):
        attach(other, ALL, FULL, seed=0).start_from(state)
    with pytest.raises(UserError, match="changes other layers: it lacks 1 of 11"):
        attach(Model(), [*ALL, "proj_out"], LOKR, seed=0).start_from(state)


def test_a_file_is_put_on_the_model_in_its_own_shapes(model: Model, x: torch.Tensor) -> None:
    first = attach(model, ALL, LOKR, seed=0)
    move(first)
    expected, state = model(x), first.state_dict()
    first.detach()
    attach_state(model, LOKR, state)
    assert torch.equal(model(x), expected)
    small = Model()
    small.blocks[1].to_q = nn.Linear(8, 8)
    with pytest.raises(UserError, match=r"blocks.1.to_q of 16x16, this model's is 8x8"):
        attach_state(small, LOKR, state)
    del small.blocks[1].to_k
    with pytest.raises(UserError, match="which this model does not have"):
        attach_state(Model().blocks[0], LOKR, state)


def test_a_plan_is_made_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Model()
    assert count_parameters(layer_sizes(model, choose(model, BLOCKS)), FULL) == 2 * (5 * 16 + 3 * 16 + 2 * 32)
    adapter = attach(model, ALL, LOKR, seed=0)
    assert {p.device.type for p in adapter.parameters()} == {"cpu"}


@pytest.mark.parametrize("factor", [-1, 2, 4, 5, 7, 8, 16, 32, 64])
@pytest.mark.parametrize(
    "layers",
    [{"a": (3072, 3072), "b": (12288, 3072)}, {"a": (3072, 3072), "x_embedder": (3072, 64)}, {"a": (96, 48)}],
)
def test_the_limits_told_are_those_of_diffusers(layers: dict[str, tuple[int, int]], factor: int) -> None:
    from diffusers.utils.peft_utils import _create_lokr_config

    from whitetuner.adapters.shapes import tensor_shapes

    def diffusers_reads(factor: int) -> bool:
        settings = AdapterSettings(factor=factor, full_matrix=True)
        state = {
            f"{path}.{name}": torch.empty(shape, device="meta")
            for path, (out, in_) in layers.items()
            for name, shape in tensor_shapes(settings, out, in_).items()
        }
        try:
            _create_lokr_config(state, None)
        except ValueError:
            return False
        return True

    told = reading_limits(layers, AdapterSettings(factor=factor, full_matrix=True))
    assert bool(told) != diffusers_reads(factor)
    for limit in told:
        assert diffusers_reads(int(limit.values["works"]))
    assert reading_limits(layers, AdapterSettings("lora")) == []


@pytest.mark.parametrize(
    "wrong", [{"kind": "loha"}, {"rank": 0}, {"factor": 0}, {"factor": -2}, {"alpha": 0.0}]
)
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"method.{next(iter(wrong))}"):
        AdapterSettings(**wrong)
