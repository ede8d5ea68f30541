"""E3: a factored delta computes what the dense one does, over any base, and starts at zero."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lycoris.functional import factorization as lycoris_factorization
from lycoris.modules.locon import LoConModule
from lycoris.modules.lokr import LokrModule
from peft import LoKrConfig, LoraConfig, get_peft_model
from torch import nn

from whitetuner.adapters.deltas import Attached, Delta, LokrDelta, delta_from, initial_delta
from whitetuner.adapters.shapes import AdapterSettings, count_parameters, factorization, tensor_shapes

FORMS = {
    "lokr full": AdapterSettings("lokr", factor=4, full_matrix=True),
    "lokr full, squarest": AdapterSettings("lokr", factor=-1, full_matrix=True),
    "lokr rank 3": AdapterSettings("lokr", rank=3, factor=4),
    "lokr rank 3, alpha 1.5": AdapterSettings("lokr", rank=3, alpha=1.5, factor=4),
    "lokr rank 1, both low": AdapterSettings("lokr", rank=1, alpha=0.5, factor=4, decompose_both=True),
    "lokr rank half the size of W2": AdapterSettings("lokr", rank=6, factor=4),
    "lokr rank too high for the layer": AdapterSettings("lokr", rank=64, alpha=1.0, factor=4),
    "lora rank 5": AdapterSettings("lora", rank=5),
    "lora rank 5, alpha 10": AdapterSettings("lora", rank=5, alpha=10),
}
SIZES = {"square": (48, 48), "widening": (96, 32), "narrowing": (32, 96), "prime": (37, 48)}


def random_delta(shape: AdapterSettings, out: int, in_: int, seed: int = 0) -> Delta:
    """A delta in float64 whose every tensor is away from zero."""
    generator = torch.Generator().manual_seed(seed)
    delta = initial_delta(shape, out, in_, generator).double()
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return delta


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def outputs_and_gradients(forward, x: torch.Tensor, delta: Delta) -> dict[str, torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    delta.zero_grad()
    y = forward(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape).sin())
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in delta.named_parameters()}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_output_and_gradients_equal_those_of_the_summed_weight(form: str, size: str) -> None:
    out, in_ = SIZES[size]
    torch.manual_seed(1)
    base = nn.Linear(in_, out).double().requires_grad_(False)
    delta = random_delta(FORMS[form], out, in_)
    x = torch.randn(2, 5, in_, dtype=torch.float64)
    ours = outputs_and_gradients(Attached(base, delta), x, delta)
    dense = outputs_and_gradients(lambda x: F.linear(x, base.weight + delta.weight(), base.bias), x, delta)
    assert ours.keys() == dense.keys()
    for name in dense:
        assert relative(ours[name], dense[name]) < 1e-12, name


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 80),
    in_=st.integers(1, 80),
    factor=st.sampled_from([-1, 1, 2, 3, 4, 8, 16]),
    rank=st.integers(1, 40),
    alpha=st.floats(0.25, 64),
    full=st.booleans(),
    both=st.booleans(),
)
def test_equality_holds_for_every_shape(out, in_, factor, rank, alpha, full, both) -> None:
    delta = random_delta(AdapterSettings("lokr", rank, alpha, factor, full, both), out, in_)
    x, y = torch.randn(3, in_, dtype=torch.float64), torch.randn(3, out, dtype=torch.float64)
    expected = y + F.linear(x, delta.weight())
    assert (delta(x, y) - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("form", FORMS)
def test_of_no_tokens_nothing_is_made(form: str) -> None:
    """A model may send an empty text through the layers that text and picture share."""
    delta = random_delta(FORMS[form], 32, 96)
    x = torch.zeros(2, 0, 96, dtype=torch.float64, requires_grad=True)
    y = Attached(nn.Linear(96, 32).double(), delta)(x)
    y.sum().backward()
    assert y.shape == (2, 0, 32) and x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_delta_is_that_of_lycoris(form: str, size: str) -> None:
    shape, (out, in_) = FORMS[form], SIZES[size]
    base = nn.Linear(in_, out, bias=False).requires_grad_(False)
    if shape.kind == "lora":
        theirs = LoConModule("lora", base, lora_dim=shape.rank, alpha=shape.alpha or shape.rank)
        names = {"lora_A": theirs.lora_down.weight, "lora_B": theirs.lora_up.weight}
    else:
        theirs = LokrModule(
            "lokr",
            base,
            lora_dim=shape.rank,
            alpha=shape.alpha or shape.rank,
            factor=shape.factor,
            full_matrix=shape.full_matrix,
            decompose_both=shape.decompose_both,
        )
        names = {name: parameter for name, parameter in theirs.named_parameters() if name.startswith("lokr")}
    delta = random_delta(shape, out, in_).float()
    assert {name: p.shape for name, p in names.items()} == {
        name: p.shape for name, p in delta.named_parameters()
    }
    with torch.no_grad():
        for name, parameter in names.items():
            parameter.copy_(delta.get_parameter(name))
    x = torch.randn(7, in_)
    layer = Attached(base, delta)
    expected = theirs(x)
    assert relative(layer(x) - base(x), expected - base(x)) < 1e-5  # float32: both round, in another order
    assert (
        relative(
            delta.weight(), theirs.get_weight(None) if shape.kind == "lokr" else theirs.get_diff_weight()[0]
        )
        < 1e-6
    )


@pytest.mark.parametrize("form", ["lokr rank 3", "lora rank 5, alpha 10"])
def test_delta_is_that_of_peft(form: str) -> None:
    shape = FORMS[form]
    model = nn.Sequential(nn.Linear(48, 96))
    base = model[0].weight.detach().clone()
    scale = {"r": shape.rank, "target_modules": ["0"]}
    if shape.kind == "lokr":
        config = LoKrConfig(alpha=shape.rank, decompose_factor=shape.factor, init_weights="lycoris", **scale)
    else:
        config = LoraConfig(lora_alpha=shape.alpha or shape.rank, **scale)
    layer = get_peft_model(model, config).base_model.model[0]
    delta = random_delta(shape, 96, 48).float()
    with torch.no_grad():
        for name, parameter in delta.named_parameters():
            target = getattr(layer, name)["default"]
            (target.weight if shape.kind == "lora" else target).copy_(parameter)
    assert relative(delta.weight(), layer.get_delta_weight("default")) < 1e-6
    x = torch.randn(4, 48)
    y = F.linear(x, base, layer.base_layer.bias)
    assert relative(delta(x, y) - y, layer(x) - y) < 1e-5


@settings(max_examples=200, deadline=None)
@given(dimension=st.integers(1, 20000), factor=st.integers(1, 64) | st.just(-1))
def test_split_of_a_size_is_that_of_lycoris(dimension: int, factor: int) -> None:
    assert factorization(dimension, factor) == lycoris_factorization(dimension, factor)


@pytest.mark.parametrize("form", FORMS)
def test_a_fresh_delta_is_zero_but_learns(form: str) -> None:
    delta = initial_delta(FORMS[form], 96, 48, torch.Generator().manual_seed(3))
    x, y = torch.randn(4, 48), torch.randn(4, 96)
    assert torch.equal(delta(x, y), y)
    assert not delta.weight().any()
    delta(x, y).square().sum().backward()
    assert any(p.grad.abs().max() > 0 for p in delta.parameters()), "no gradient leaves zero"
    count = count_parameters({"layer": (96, 48)}, FORMS[form])
    assert count == sum(p.numel() for p in delta.parameters())
    assert tensor_shapes(FORMS[form], 96, 48) == {
        name: tuple(p.shape) for name, p in delta.named_parameters()
    }


def test_the_start_has_the_spread_of_kaiming() -> None:
    settings = AdapterSettings(factor=-1, rank=8)
    delta = initial_delta(settings, 512, 2048, torch.Generator().manual_seed(0))
    for name, shape in {"lokr_w1": (16, 32), "lokr_w2_a": (32, 8)}.items():
        reference = torch.empty(4000, shape[1])
        nn.init.kaiming_uniform_(reference, a=5**0.5)
        found = delta.get_parameter(name).detach()
        assert found.shape == shape
        assert found.abs().max() <= reference.abs().max() * 1.001
        assert float(found.std()) == pytest.approx(float(reference.std()), rel=0.1)


@pytest.mark.parametrize("form", ["lokr full", "lokr rank 3, alpha 1.5", "lora rank 5"])
def test_over_a_bf16_base_masters_stay_float32_and_small_deltas_survive(form: str) -> None:
    torch.manual_seed(2)
    base = nn.Linear(64, 64).to(torch.bfloat16).requires_grad_(False)
    delta = initial_delta(FORMS[form], 64, 64, torch.Generator().manual_seed(0))
    zero = next(p for p in delta.parameters() if not p.any())
    with torch.no_grad():
        zero.normal_(std=1e-4)
    x = torch.randn(512, 64, dtype=torch.bfloat16)
    y = Attached(base, delta)(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in delta.parameters())
    # the delta itself, over a base of zeros: only its own rounding is left (merged into the weight, most of
    # it would be gone)
    alone = delta(x, torch.zeros_like(y))
    assert relative(alone, F.linear(x.double(), delta.weight().double())) < 8e-3


class RowwiseInt8(torch.autograd.Function):
    """A quantised linear as the memory engine has it: what is kept for the backward is the int8 weight."""

    @staticmethod
    def forward(ctx, x, q, scale):
        ctx.save_for_backward(q, scale)
        return F.linear(x, q.to(x.dtype)) * scale.to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        q, scale = ctx.saved_tensors
        return (gradient * scale.to(gradient.dtype)) @ q.to(gradient.dtype), None, None


class QuantisedLinear(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        scale = weight.abs().amax(1) / 127
        self.register_buffer("q", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return RowwiseInt8.apply(x, self.q, self.scale)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_passes_a_quantised_base_as_it_passes_the_dequantised_one(form: str) -> None:
    torch.manual_seed(4)
    base = QuantisedLinear(torch.randn(96, 48, dtype=torch.float64))
    delta = random_delta(FORMS[form], 96, 48)
    dequantised = base.q.double() * base.scale[:, None]
    x = torch.randn(3, 4, 48, dtype=torch.float64)
    ours = outputs_and_gradients(Attached(base, delta), x, delta)
    dense = outputs_and_gradients(lambda x: F.linear(x, dequantised + delta.weight()), x, delta)
    for name in dense:
        assert relative(ours[name], dense[name]) < 1e-12, name


def test_at_the_start_the_gradient_of_x_is_that_of_the_quantised_base_alone() -> None:
    torch.manual_seed(5)
    base = QuantisedLinear(torch.randn(32, 32, dtype=torch.float64))
    delta = initial_delta(FORMS["lokr rank 3"], 32, 32, torch.Generator().manual_seed(0)).double()
    x = torch.randn(6, 32, dtype=torch.float64)
    ours = outputs_and_gradients(Attached(base, delta), x, delta)
    alone = outputs_and_gradients(base, x, delta)
    assert torch.equal(ours["x"], alone["x"])


@pytest.mark.parametrize("form", FORMS)
def test_nothing_of_the_size_of_the_layer_is_made_or_kept(form: str) -> None:
    """The backward keeps x, the factors and something of the size of x or less: never an (out, in) matrix."""
    tokens, size = 8, 256
    base = nn.Linear(size, size).requires_grad_(False)
    delta = random_delta(FORMS[form], size, size).float()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        Attached(base, delta)(torch.randn(tokens, size, requires_grad=True))
    factors = max(p.numel() for p in delta.parameters())
    weight = size * size  # the frozen weight itself is kept for dL/dx; it is not a copy
    assert sorted(kept)[-1] == weight and sorted(kept)[-2] <= max(factors, tokens * size)


@pytest.mark.parametrize(("out", "in_"), [(512, 128), (128, 512)])
def test_w1_is_mixed_in_on_the_narrower_side(out: int, in_: int) -> None:
    """What is kept for the backward of a full W2 is of the size of the layer's smaller side."""
    tokens = 4096
    delta = initial_delta(AdapterSettings(factor=4, full_matrix=True), out, in_, torch.Generator())
    kept: list[int] = []
    x, y = torch.randn(tokens, in_, requires_grad=True), torch.zeros(tokens, out)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        delta(x, y)
    assert max(size for size in kept if size != x.numel() or in_ == 128) == tokens * 128


def test_files_of_lycoris_with_unbalanced_factors_compute_right() -> None:
    delta = LokrDelta({"lokr_w1": torch.randn(20, 8), "lokr_w2": torch.randn(3, 9)}, 1.0).double()
    x, y = torch.randn(5, 72, dtype=torch.float64), torch.randn(5, 60, dtype=torch.float64)
    assert relative(delta(x, y), y + F.linear(x, delta.weight())) < 1e-12


def test_kind_is_told_by_the_names() -> None:
    assert (
        type(delta_from({"lora_A": torch.ones(2, 4), "lora_B": torch.ones(6, 2)}, 1.0)).__name__
        == "LoraDelta"
    )
