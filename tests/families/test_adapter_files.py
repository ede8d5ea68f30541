"""E10 for every family and kind: an adapter's file means the same change of every weight to whoever reads it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from lycoris.wrapper import create_lycoris_from_weights
from safetensors.torch import load_file, save_file
from subjects import Subject
from torch import Tensor

from whitetuner.adapters.attach import Adapter, attach, attach_state, choose, merged
from whitetuner.adapters.files import load_adapter
from whitetuner.adapters.names import NAMINGS
from whitetuner.adapters.shapes import AdapterSettings
from whitetuner.checkpoint.export import export_adapter
from whitetuner.checkpoint.original import from_original, to_original
from whitetuner.denoisers import open_denoiser
from whitetuner.families import registry
from whitetuner.file_words import extract, merge, resize
from whitetuner.memory.weights import TensorFiles

FORMS = {
    "lokr, both full": AdapterSettings("lokr", factor=2, full_matrix=True),
    "lokr, rank 2, alpha 1": AdapterSettings("lokr", rank=2, alpha=1.0, factor=2),
    "lora, rank 3, alpha 6": AdapterSettings("lora", rank=3, alpha=6.0),
}
#: The quick part has the one whose scale and factors are all at work.
QUICK = "lokr, rank 2, alpha 1"
EVERY = [pytest.param(one, marks=() if one == QUICK else pytest.mark.slow) for one in FORMS]
#: Pipelines whose load_lora_weights reads files of diffusers naming; LoKr: the first two alone (docs/files.md).
PIPELINES = {
    "flux2-klein": "Flux2KleinPipeline",
    "zimage": "ZImagePipeline",
    "qwen-image": "QwenImagePipeline",
    "wan": "WanPipeline",
}
READ_LOKR = ("flux2-klein", "zimage")


def module_of(subject: Subject) -> tuple[str, Any]:
    part = subject.spec.parts(subject.family.options)[0].name
    return part, subject.bench.modules[part]


@contextmanager
def trained(subject: Subject, form: str) -> Iterator[tuple[Adapter, dict[str, Tensor]]]:
    """(an adapter as training might leave it, its whole deltas by weight's name); taken off again."""
    _, module = module_of(subject)
    adapter = attach(module, choose(module, subject.spec.adapter_targets), FORMS[form], seed=0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    deltas = {f"{path}.weight": delta.weight().detach() for path, delta in adapter.deltas.items()}
    adapter.detach()
    yield adapter, deltas


def close(found: Tensor, wanted: Tensor, what: str) -> None:
    """1e-6 of the layer's largest change: float32, factors multiplied in another order."""
    assert wanted.abs().max() > 1e-3, "a delta without effect proves nothing"
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-6, what


@pytest.mark.parametrize("form", EVERY)
def test_every_naming_comes_back_as_the_same_change(subject: Subject, form: str, tmp_path: Path) -> None:
    keymap = registry.keys(subject.name)
    with trained(subject, form) as (adapter, deltas):
        for naming in NAMINGS:
            file = tmp_path / f"{naming}.safetensors"
            done = export_adapter(adapter.state_dict(), adapter.settings, keymap, path=file, naming=naming)
            assert done.known == done.modules == len(deltas)
            settings, state = load_adapter(file, keymap)
            model = copy.deepcopy(module_of(subject)[1])
            again = attach_state(model, settings, state)
            assert {f"{path}.weight" for path in again.deltas} == set(deltas)
            for path, delta in again.deltas.items():
                close(delta.weight().detach(), deltas[f"{path}.weight"], f"{naming} {path}")


@pytest.mark.parametrize("form", EVERY)
def test_diffusers_and_peft_compute_the_same_change(subject: Subject, form: str, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    _, module = module_of(subject)
    with trained(subject, form) as (adapter, deltas):
        keymap = registry.keys(subject.name)
        export_adapter(adapter.state_dict(), adapter.settings, keymap, path=file, naming="diffusers")
        theirs = copy.deepcopy(module)
        theirs.load_lora_adapter(load_file(file), prefix="transformer")
        compare_peft(theirs, deltas)
        if subject.name in PIPELINES and ("lora" in form or subject.name in READ_LOKR):
            pipeline = getattr(diffusers, PIPELINES[subject.name])
            found = pipeline.lora_state_dict(str(file))
            state = found[0] if isinstance(found, tuple) else found
            theirs = copy.deepcopy(module)
            pipeline.load_lora_into_transformer(state, transformer=theirs)
            compare_peft(theirs, deltas)


def compare_peft(model: Any, deltas: dict[str, Tensor]) -> None:
    seen = 0
    for path, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight") and f"{path}.weight" in deltas:
            close(layer.get_delta_weight(layer.active_adapters[0]).detach(), deltas[f"{path}.weight"], path)
            seen += 1
    assert seen == len(deltas)


@pytest.mark.parametrize("form", EVERY)
def test_lycoris_merges_the_same_change(subject: Subject, form: str, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    _, module = module_of(subject)
    with trained(subject, form) as (adapter, deltas):
        keymap = registry.keys(subject.name)
        export_adapter(adapter.state_dict(), adapter.settings, keymap, path=file, naming="lycoris")
        theirs = copy.deepcopy(module)
        network, _ = create_lycoris_from_weights(1.0, str(file), theirs)
        assert len(network.loras) == len(deltas)
        network.merge_to(1.0)
        state = theirs.state_dict()
        for name, delta in deltas.items():
            wanted = merged(module.get_parameter(name), delta)
            torch.testing.assert_close(state[name], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", EVERY[1:])
def test_the_merged_file_is_the_model_with_its_adapter(subject: Subject, form: str, tmp_path: Path) -> None:
    """Into a folder and into one file of the original layout; and the forward is that of base and adapter."""
    part, module = module_of(subject)
    keymap = registry.keys(subject.name)
    adapter_file = tmp_path / "a.safetensors"
    with trained(subject, form) as (adapter, deltas):
        export_adapter(adapter.state_dict(), adapter.settings, keymap, path=adapter_file, naming="comfyui")
        wanted = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        for name, delta in deltas.items():
            wanted[name] = merged(wanted[name], delta)
        merge(subject.folder, adapter_file, tmp_path / "folder", 1.0, None, part)
        with open_denoiser(tmp_path / "folder") as found:
            same(dict(found.state), wanted)
        merge(subject.folder, adapter_file, tmp_path / "one.safetensors", 1.0, None, part)
        with TensorFiles([tmp_path / "one.safetensors"]) as source:
            same(dict(from_original(source, keymap)), wanted)
        case = subject.case()
        batch = subject.bench.batch(case.inputs())
        x_t = torch.randn(batch["latent"].shape, generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr]
        sigma = torch.full((1,), 0.95)
        again = attach_state(module, adapter.settings, adapter.state_dict())
        with torch.no_grad():
            ours = subject.family.predict(subject.bench.modules, part, batch, x_t, sigma)
            again.detach()
            plain = subject.family.predict(subject.bench.modules, part, batch, x_t, sigma)
            model = copy.deepcopy(module)
            model.load_state_dict(wanted)
            theirs = subject.family.predict({**subject.bench.modules, part: model}, part, batch, x_t, sigma)
        assert (ours - plain).norm() / plain.norm() > 1e-3
        assert float((ours - theirs).norm() / ours.norm()) < 1e-5  # float32, some layers deep


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """To rounding: a scale of 1 is folded in the file, and W1 kron W2 is summed the same way."""
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("form", list(FORMS)[1:])
def test_what_was_merged_is_extracted_again(subject: Subject, form: str, tmp_path: Path) -> None:
    """Exactly, where the kind and rank are those that made the difference; a smaller rank tells its error."""
    part, module = module_of(subject)
    keymap, file = registry.keys(subject.name), tmp_path / "a.safetensors"
    with trained(subject, form) as (adapter, deltas):
        export_adapter(adapter.state_dict(), adapter.settings, keymap, path=file, naming="comfyui")
        merge(subject.folder, file, tmp_path / "tuned", 1.0, None, part)
        settings = adapter.settings
        out = tmp_path / "b.safetensors"
        base = subject.folder / part
        done, error = extract(tmp_path / "tuned", base, out, settings, "comfyui", lambda text: None)
        assert (
            done.modules == len(deltas) and error < 1e-3
        )  # the sum rounds what is added to weights of another size
        _, state = load_adapter(out, keymap)
        again = attach_state(copy.deepcopy(module), settings, state)
        for path, delta in again.deltas.items():
            wanted = deltas[f"{path}.weight"]
            assert float((delta.weight() - wanted).norm() / wanted.norm()) < 1e-3
        small, error = resize(out, tmp_path / "c.safetensors", {"rank": 1}, subject.name)
        assert small.modules == len(deltas) and 0 < error < 1
        _, error = resize(out, tmp_path / "d.safetensors", {"rank": settings.rank + 1}, subject.name)
        assert error < 1e-5


#: Who writes LoRA files how: module's name from the original one, names of the two factors.
TRAINERS = {
    "musubi-tuner, kohya": (lambda name: "lora_unet_" + name.replace(".", "_"), "lora_down", "lora_up"),
    "ai-toolkit": (lambda name: f"diffusion_model.{name}", "lora_A", "lora_B"),
}


@pytest.mark.parametrize("trainer", [*list(TRAINERS)[:1], pytest.param("ai-toolkit", marks=pytest.mark.slow)])
def test_training_goes_on_from_the_files_of_other_trainers(
    subject: Subject, trainer: str, tmp_path: Path
) -> None:
    """In names of the first release, where query, key and value may be one layer; alpha other than the rank."""
    name_of, down, up = TRAINERS[trainer]
    keymap, (_, module) = registry.keys(subject.name), module_of(subject)
    layers = {f"{path}.weight" for path in choose(module, subject.spec.adapter_targets)}
    state = module.state_dict()
    table = to_original(state, keymap, {}).table
    generator, file = torch.Generator().manual_seed(3), tmp_path / "theirs.safetensors"
    tensors, dense = {}, {}
    for name, place in table.items():
        if not place.pieces or not all(piece.source in layers for piece in place.pieces):
            continue
        a = torch.randn(2, place.shape[1], generator=generator)
        b = torch.randn(place.shape[0], 2, generator=generator)
        prefix = name_of(name.removesuffix(".weight"))
        tensors |= {
            f"{prefix}.{down}.weight": a,
            f"{prefix}.{up}.weight": b,
            f"{prefix}.alpha": torch.tensor(1.0),
        }
        dense[name] = b @ a * 0.5
    save_file(tensors, file)
    wanted = keymap.from_original(dense)
    settings, found = load_adapter(file, keymap)
    assert (settings.kind, settings.rank, settings.alpha) == ("lora", 2, 1.0)
    model = copy.deepcopy(module)
    adapter = attach(model, choose(model, subject.spec.adapter_targets), settings, seed=1)
    adapter.start_from(found)
    assert {f"{path}.weight" for path in adapter.deltas} == set(wanted) == layers
    for path, delta in adapter.deltas.items():
        close(delta.weight().detach(), wanted[f"{path}.weight"], path)
