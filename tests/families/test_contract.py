"""What every family owes, asked of each family in the registry. A new family adds itself there and nothing here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from subjects import CAPTIONS, Subject, plain_build

from whitetuner.families import registry
from whitetuner.families.contract import (
    E1_TOLERANCE,
    E2_TOLERANCE,
    Bench,
    batch_error,
    encoder_errors,
    euler_step_error,
    method,
    picture,
    told,
)
from whitetuner.family import Encoder, ModelPaths, prompts_only
from whitetuner.memory.build import Build
from whitetuner.records import Batch

# -- E1, E2, E6: against the pipeline ------------------------------------------------------------------------------

STEPS = {
    "guided": {"cfg": 4.0},
    "unguided": {"cfg": 1.0, "columns": 6},
    "a batch of two": {"captions": CAPTIONS[:2], "columns": 6, "seed": 1},
    "tall, strongly guided, four steps": {"captions": CAPTIONS[3:], "rows": 8, "cfg": 7.5, "steps": 4},
    "odd size, empty prompt, one step": {"captions": CAPTIONS[2:3], "columns": 5, "rows": 7, "steps": 1},
}


@pytest.mark.parametrize("step", STEPS)
def test_one_euler_step_is_the_pipelines(subject: Subject, step: str) -> None:
    settings = dict(STEPS[step])
    case = subject.case(*settings.pop("captions", ()), **settings)
    assert euler_step_error(subject.bench, subject.reference, case) < E1_TOLERANCE


@pytest.mark.parametrize("caption", CAPTIONS, ids=["plain", "two scripts", "empty", "too long"])
@pytest.mark.parametrize(("columns", "rows"), [(4, 4), (7, 5)])
def test_the_encoders_say_what_the_pipelines_say(
    subject: Subject, caption: str, columns: int, rows: int
) -> None:
    given = subject.case(caption, columns=columns, rows=rows, seed=columns).inputs()[0]
    errors = encoder_errors(subject.bench, subject.reference, given)
    assert set(errors) == {name for encoder in asked(subject) for name in encoder.fields}
    assert max(errors.values()) <= E2_TOLERANCE, errors


def test_both_hold_with_the_memory_engines_loading(subject: Subject) -> None:
    bench = Bench(subject.family, Build(), subject.task)
    case = subject.case()
    assert euler_step_error(bench, subject.reference, case) < E1_TOLERANCE
    assert max(encoder_errors(bench, subject.reference, case.inputs()[0]).values()) <= E2_TOLERANCE


def test_a_sample_does_not_know_its_batch(subject: Subject) -> None:
    assert batch_error(subject.bench, subject.case(*CAPTIONS[:3], columns=6)) < E1_TOLERANCE


def test_every_wrong_convention_is_told(subject: Subject) -> None:
    case = subject.case(columns=6, steps=1)
    build = cache(plain_build)  # a mutant changes what is done with a model, not the model
    missed = [
        name
        for name, mutant in registry.mutants(subject.name).items()
        if (not mutant.tasks or subject.task in mutant.tasks)
        and not told(mutant, subject.family, build, subject.reference, case, subject.task)
    ]
    assert not missed


def test_one_sigma_for_the_whole_batch_is_told(subject: Subject) -> None:
    mutate = method(
        "predict",
        lambda right: lambda m, part, batch, x, sigma: right(m, part, batch, x, sigma[:1].expand_as(sigma)),
    )
    bench = Bench(mutate(subject.family), plain_build, subject.task)
    assert batch_error(bench, subject.case(*CAPTIONS[:2])) > 100 * E1_TOLERANCE


# -- the encoders --------------------------------------------------------------------------------------------------


def asked(subject: Subject) -> list[Encoder]:
    """The encoders that are asked about items; some families have one for prompts alone, and tests of it."""
    return [encoder for encoder in subject.bench.encoders if not prompts_only(encoder)]


def test_encoders_return_the_declared_fields_alike_every_time(subject: Subject) -> None:
    given = subject.case().inputs()[0]
    for encoder in asked(subject):
        fields = encoder.encode(given)
        assert set(fields) == set(encoder.fields)
        again = encoder.encode(given)
        for name, tensor in fields.items():
            assert torch.equal(tensor, again[name])
            assert tensor.device.type == "cpu" and not tensor.requires_grad
            assert not tensor.is_floating_point() or torch.isfinite(tensor).all()


def test_stacked_fields_of_one_size_stack(subject: Subject) -> None:
    encoded = [subject.bench.encode(one) for one in subject.case(*CAPTIONS).inputs()]
    for encoder in asked(subject):
        for name, layout in encoder.fields.items():
            if layout == "stack":
                assert len({one[name].shape for one in encoded}) == 1


def test_encoders_read_what_they_say_and_nothing_else(subject: Subject) -> None:
    one, other = subject.case(*CAPTIONS[:2]).inputs()
    for encoder in asked(subject):
        mixed = {
            name: getattr(one, name) for name in ("caption", "target", "conditions") if name in encoder.reads
        }
        if "conditions" in encoder.reads:
            mixed["originals"] = one.originals
        said, repeated = encoder.encode(one), encoder.encode(replace(other, **mixed))
        assert all(torch.equal(said[name], repeated[name]) for name in said)
        assert any(not torch.equal(said[name], tensor) for name, tensor in encoder.encode(other).items())


def fingerprints(subject: Subject, folder: Path) -> dict[str, str]:
    family = registry.load(subject.name, subject.options, ModelPaths(folder))
    return {encoder.name: encoder.fingerprint() for encoder in family.encoders(subject.task)}


def test_fingerprints_change_with_an_encoders_own_files_alone(subject: Subject, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(subject.folder, folder)
    before = fingerprints(subject, folder)
    assert before == fingerprints(subject, folder) and len(set(before.values())) == len(before)
    denoisers = {part.name for part in subject.spec.parts(subject.family.options)}
    for file in sorted(folder.rglob("*.safetensors")):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        after = fingerprints(subject, folder)
        changed = [name for name in before if after[name] != before[name]]
        assert bool(changed) == (file.parent.name not in denoisers), file
        assert len(changed) < len(before), "one file, every encoder"
        before = after


# -- the denoisers -------------------------------------------------------------------------------------------------


def test_blocks_and_adapter_targets_are_there(subject: Subject) -> None:
    for part in subject.spec.parts(subject.family.options):
        module = subject.bench.modules[part.name]
        for name in part.block_lists:
            blocks = module.get_submodule(name)
            assert isinstance(blocks, torch.nn.ModuleList) and len(blocks)
        for pattern in subject.spec.adapter_targets:
            found = [layer for path, layer in module.named_modules() if fnmatchcase(path, pattern)]
            assert found and all(isinstance(layer, torch.nn.Linear) for layer in found), pattern


def test_what_stays_precise_is_outside_the_blocks_or_small(subject: Subject) -> None:
    for part in subject.spec.parts(subject.family.options):
        weights = dict(subject.bench.modules[part.name].named_parameters())
        for pattern in subject.spec.keep_precise:
            assert any(fnmatchcase(name, pattern) for name in weights), pattern
        for name, weight in weights.items():
            inside = any(name.startswith(f"{blocks}.") for blocks in part.block_lists)
            kept = any(fnmatchcase(name, pattern) for pattern in subject.spec.keep_precise)
            if inside and weight.dim() == 2 and "norm" not in name:
                assert not kept, f"{name} is where the bytes are"


def test_the_velocity_is_float32_like_the_latent_and_has_a_gradient(subject: Subject) -> None:
    batch = subject.bench.batch(subject.case(*CAPTIONS[:2]).inputs())
    for part in subject.spec.parts(subject.family.options):
        module = subject.bench.modules[part.name]
        sigma = torch.tensor([part.sigma_range[0], part.sigma_range[1]]).clamp(0.01, 0.99)
        weights = [weight.requires_grad_(True) for weight in module.parameters()]
        velocity = subject.family.predict(subject.bench.modules, part.name, batch, batch["latent"], sigma)
        assert velocity.dtype == torch.float32 and velocity.shape == batch["latent"].shape
        assert torch.isfinite(velocity).all()
        (gradient,) = torch.autograd.grad(velocity.square().mean(), weights[:1])
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
        for weight in weights:
            weight.requires_grad_(False)


def test_a_bfloat16_model_predicts_nearly_the_same(subject: Subject) -> None:
    batch = subject.bench.batch(subject.case().inputs())
    part = subject.spec.parts(subject.family.options)[0].name
    modules = subject.family.load(Build(dtype=torch.bfloat16))
    sigma = torch.tensor([0.5])
    precise = subject.family.predict(subject.bench.modules, part, batch, batch["latent"], sigma)
    rounded = subject.family.predict(modules, part, batch, batch["latent"], sigma)
    assert rounded.dtype == torch.float32
    assert (
        float((rounded - precise).norm() / precise.norm()) < 0.05
    )  # bfloat16 keeps 8 bits, a few layers lose some


# -- whole pictures ------------------------------------------------------------------------------------------------


def draw(subject: Subject, guided: bool = True, **more: object) -> np.ndarray:
    given = subject.case(columns=6).inputs()[0]
    settings = {"size": subject.size(6, 4), "steps": 3, "cfg": 3.0, "seed": 5, **more}
    frames = subject.family.generate(
        subject.bench.modules,
        subject.family.load_decoder(plain_build),
        subject.bench.encode(given),
        subject.bench.encode(replace(given, caption="")) if guided else None,
        **settings,
    )
    assert frames[0].size == (settings["size"].width, settings["size"].height)
    return np.stack([np.asarray(frame) for frame in frames])


def test_a_picture_is_a_function_of_its_seed_alone(subject: Subject) -> None:
    state = torch.get_rng_state()
    first = draw(subject)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert np.array_equal(first, draw(subject))
    assert not np.array_equal(first, draw(subject, seed=6))
    assert not np.array_equal(first, draw(subject, cfg=1.0))
    assert np.array_equal(draw(subject, cfg=1.0), draw(subject, guided=False))
    torch.set_rng_state(state)


def test_a_drawing_can_be_ended_early(subject: Subject) -> None:
    seen: list[int] = []

    def on_step(index: int) -> bool:
        seen.append(index)
        return len(seen) < 2

    draw(subject, steps=4, on_step=on_step)
    assert seen == [0, 1]


# -- names ---------------------------------------------------------------------------------------------------------


def test_every_linear_has_a_name_in_every_program_and_is_found_again(subject: Subject) -> None:
    keys = registry.keys(subject.name)
    for part in subject.spec.parts(subject.family.options):
        paths = [
            p for p, m in subject.bench.modules[part.name].named_modules() if isinstance(m, torch.nn.Linear)
        ]
        for naming in ("comfyui", "diffusers", "lycoris"):
            names = [keys.adapter_prefix(path, naming) for path in paths]
            assert len(set(names)) == len(paths)
            assert [keys.module_path(name) for name in names] == paths
    for foreign in (
        "lora_unet_input_blocks_1",
        "transformer.nonsense",
        "lycoris_nonsense",
        "diffusion_model.x",
        "",
    ):
        assert keys.module_path(foreign) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_full_state_survives_the_original_layout_to_the_bit(subject: Subject, dtype: torch.dtype) -> None:
    keys = registry.keys(subject.name)
    for part in subject.spec.parts(subject.family.options):
        state = {
            name: tensor.to(dtype) for name, tensor in subject.bench.modules[part.name].state_dict().items()
        }
        back = keys.from_original(keys.to_original(state))
        assert set(back) == set(state)
        for name, tensor in state.items():
            assert torch.equal(back[name], tensor) and back[name].is_contiguous()


# -- facts and the tiny model --------------------------------------------------------------------------------------


def test_the_facts_of_all_families_are_read_without_torch() -> None:
    code = (
        "import sys\n"
        "from whitetuner.families import registry\n"
        "for name in registry.FAMILIES:\n"
        "    spec = registry.spec(name)\n"
        "    spec.options(), spec.tokens(spec.default_size, spec.stride_px)\n"
        "print({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_facts_hold_together(subject: Subject) -> None:
    spec = subject.spec
    assert spec.name == subject.name and spec.variants and spec.sources
    assert spec.default_size.width % spec.stride_px == 0 and spec.default_size.height % spec.stride_px == 0
    assert spec.stride(ModelPaths(subject.folder)) == subject.family.stride()
    assert spec.min_size_px % spec.stride_px == 0
    for key, setting in spec.settings.items():
        assert key.count(".") == 1 and len(setting.source) > 10
    names = {part.name for part in spec.parts(subject.family.options)}
    assert names == set(subject.bench.modules) <= set(spec.components)
    ranges = sorted(part.sigma_range for part in spec.parts(subject.family.options))
    assert all(low < high for low, high in ranges)
    assert all(one[1] <= two[0] for one, two in pairwise(ranges)), "two parts for one noise level"
    if spec.auto_shift is not None:
        assert 0 < spec.auto_shift(spec.tokens(spec.default_size, spec.stride_px)) < 100


def test_the_tiny_model_is_small_and_a_function_of_its_seed(subject: Subject, tmp_path: Path) -> None:
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    registry.make_tiny(subject.name, str(tmp_path / "again"), subject.variant or None)
    registry.make_tiny(subject.name, str(tmp_path / "other"), subject.variant or None, 1)
    assert torch.equal(torch.get_rng_state(), state)

    def contents(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    first, again, other = (
        contents(folder) for folder in (subject.folder, tmp_path / "again", tmp_path / "other")
    )
    assert first == again
    weights = [name for name in first if name.endswith(".safetensors")]
    assert weights and all(first[name] != other[name] for name in weights)
    assert sum(map(len, first.values())) < 2_000_000


def test_the_pictures_of_the_cases_tell_channels_rows_and_columns_apart(subject: Subject) -> None:
    values = np.asarray(picture(subject.size(4, 4), 0)).astype(int)
    for wrong in (values[..., ::-1], values[::-1], values[:, ::-1], values.transpose(1, 0, 2)):
        assert np.abs(values - wrong).mean() > 5


def test_a_batch_holds_the_items_it_was_made_of(subject: Subject) -> None:
    batch = subject.bench.batch(subject.case(*CAPTIONS[:2]).inputs())
    assert isinstance(batch, Batch) and len(batch) == 2
    assert [item.caption for item in batch.items] == list(CAPTIONS[:2])
