"""Encoders in int8: chosen by the card's size, kept under keys of their own, near what they stand for, gone when freed."""

from __future__ import annotations

import gc
import itertools
import json
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GlmImageConfig, GlmImageForConditionalGeneration

from whitetuner import plan_view
from whitetuner.config.load import dump_config, load_config
from whitetuner.data.samples import make_testdata
from whitetuner.encoding import Encoding, Looked, chosen, encoding_of, encoding_on, look_at
from whitetuner.families import registry
from whitetuner.families.contract import quiet
from whitetuner.family import ModelPaths
from whitetuner.memory.build import Build
from whitetuner.memory.machine import GIB, typical_machine
from whitetuner.memory.phases import PhaseBuild, held_within
from whitetuner.memory.quantize import QuantLinear
from whitetuner.memory.swap.backend import CpuBackend
from whitetuner.memory.weigh import Weights
from whitetuner.planning import Shape, Sketched
from whitetuner.prepared import Prepared, phase_build, prepare_data
from whitetuner.records import EncodeInput, Size
from whitetuner.resolve import resolve
from whitetuner.tiny import tiny_values

GLM = "glm-image"
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """model, data and a model whose language model has three layers (deep)"""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("encoders")
    with quiet():
        registry.make_tiny(GLM, str(path / "model"))
        registry.make_tiny(GLM, str(path / "deep"))
        folder = path / "deep" / "vision_language_encoder"
        config = GlmImageConfig.from_pretrained(folder)
        config.text_config.num_hidden_layers = 3
        config.text_config.initializer_range = 0.2
        torch.manual_seed(1)
        model = GlmImageForConditionalGeneration(config)
        model.generation_config = GlmImageForConditionalGeneration.from_pretrained(folder).generation_config
        model.save_pretrained(folder)
    make_testdata("t2i", path / "data", 2, 0)
    yield path
    torch.set_num_threads(threads)


def values_of(place: Path, **more: Any) -> dict[str, Any]:
    values = tiny_values(GLM, place / "model", place / "data", place)
    values["model.options"] = {**values.get("model.options", {}), "generated_prior": 1.0}
    return {**values, "run.name": "x", "validation.every": 0, "preview.every": 0, **more}


def prepared(place: Path, base: str, before: dict[str, Any] | None = None) -> tuple[Prepared, Encoding]:
    config = load_config(None, base=values_of(place, **{"memory.encoder_base": base})).config
    resolved = resolve(config)
    encoding = encoding_of(config, resolved.family, resolved.device, resolved.dtype, before)
    return prepare_data(config, resolved, phase_build(config, resolved, print), encoding=encoding), encoding


# -- the choice --------------------------------------------------------------------------------------------------------


def looked(passes: int) -> Looked:
    wide, small = (Weights((size,) * 40, 2 * GIB) for size in (GIB // 2, GIB // 4))
    return Looked(f"{passes} passes", Path(f"folder-{passes}"), passes, {"bf16": wide, "int8": small})


def test_auto_quantises_only_what_writes_and_would_not_fit() -> None:
    for card_gb in range(6, 40):
        found = chosen([looked(1), looked(1000)], "auto", BF16, card_gb * GIB, 12e9)
        too_small = held_within(looked(1).weights["bf16"], int((card_gb - 0.6) * GIB)).residents is not None
        assert found.quantised == ({"1000 passes": "int8"} if too_small else {}), card_gb
        assert found.folders.keys() == ({Path("folder-1000")} if too_small else set())
        once, writes = found.held
        assert once.base == "bf16" and (once.streamed > 0) == too_small
        assert (writes.base == "int8") == bool(writes.why) == too_small
        assert writes.seconds >= 1000 * 0.05 and once.seconds < 2
    assert "GB" in found.words()[0] and json.dumps(found.to_json()) and found.facts() == {"encoder_base": {}}


def test_a_larger_card_never_waits_longer_or_holds_coarser_weights() -> None:
    both = [chosen([looked(1000)], "auto", BF16, gb * GIB, 12e9).held[0] for gb in range(6, 40)]
    for smaller, larger in itertools.pairwise(both):
        assert larger.seconds <= smaller.seconds
        assert not (smaller.base == "bf16" and larger.base == "int8")


@pytest.mark.parametrize("asked", ["int8", "fp8"])
def test_what_is_asked_for_is_taken_for_every_encoder_that_it_changes(place: Path, asked: str) -> None:
    family = registry.load(GLM, registry.spec(GLM).options(), ModelPaths(place / "model"))
    found = encoding_on(asked, family, "edit", BF16, None, size=Size(64, 64))
    assert found.quantised == {"glyphs": asked, "plan": asked} and found.held == ()
    for precise in ("auto", "bf16"):
        assert encoding_on(precise, family, "edit", BF16, None, size=Size(64, 64)) == Encoding()


def test_a_card_too_small_for_two_blocks_is_told_and_not_hidden() -> None:
    (held,) = chosen([looked(1000)], "auto", BF16, 3 * GIB, 12e9).held
    assert held.too_large > 3.9 and "does not fit" in held.sentence()


def test_the_language_model_says_how_often_it_is_gone_through(place: Path) -> None:
    family = registry.load(GLM, registry.spec(GLM).options(), ModelPaths(place / "model"))
    for task, passes in (("t2i", 1024 + 256), ("edit", 1024)):
        found = {
            one.encoder: one.passes for one in look_at(family.encoders(task), BF16, "int8", Size(1024, 1024))
        }
        assert found == {"glyphs": 1, "plan": passes}


def test_a_config_that_learns_beside_generated_tokens_is_planned_with_its_language_model(place: Path) -> None:
    config = place / "planned.toml"
    text = dump_config(load_config(None, base=values_of(place)).config)
    config.write_text(text, encoding="utf-8")
    found = plan_view.of_config(
        config, ["memory.encoder_base=fp8", "memory.device=auto"], [typical_machine(8, 64)]
    )
    (row,) = plan_view.as_json(found)["plans"]
    assert row["choices"] and {one["encoder"]: one["base"] for one in row["encoders"]} == {
        "glyphs": "fp8",
        "plan": "fp8",
    }
    assert "vision_language_encoder while caching: fp8" in plan_view.as_text(found, False)


@pytest.mark.parametrize(("through", "passes"), [(False, (3, 1)), (True, (3, 3))])
def test_the_passes_of_given_pictures_are_planned_for(
    place: Path, through: bool, passes: tuple[int, int]
) -> None:
    spec = registry.spec(GLM)
    options = spec.options(**spec.tiny_options, reference_gradients=through)
    family = registry.load(GLM, options, ModelPaths(place / "model"))
    config = load_config(None, base={**values_of(place), "model.task": "edit"}).config
    sketched = Sketched(family, spec.parts(options)[0], family.stride(), torch.float32)
    cost = sketched.cost(config, Shape(Size(64, 64), 1, (Size(64, 64), Size(96, 64))))
    alone = sketched.cost(config, Shape(Size(64, 64), 1))
    assert (cost.forwards, cost.backwards) == passes and (alone.forwards, alone.backwards) == (1, 1)
    assert cost.flops_forward > 1.4 * alone.flops_forward
    if not through:  # computed again is the target's pass alone, which sees more keys
        assert cost.blocks[0].flops < 1.3 * alone.blocks[0].flops


# -- the cache ---------------------------------------------------------------------------------------------------------


def test_another_format_invalidates_the_encoders_that_it_changes_and_no_other(place: Path) -> None:
    """E9: entries of both formats lie side by side, and a run that goes on keeps the one it began with."""
    made: dict[str, dict[str, int]] = {}
    kept = {}
    for name, base, before in (
        ("precise", "auto", None),
        ("int8", "int8", None),
        ("int8 again", "int8", None),
        ("fp8", "fp8", None),
        ("goes on", "auto", {"encoder_base": {"plan": "int8", "glyphs": "int8"}}),
        ("as released", "bf16", {"encoder_base": {"plan": "int8"}}),
    ):
        found, encoding = prepared(place, base, before)
        made[name] = {one.encoder: one.made for one in found.cached.told}
        kept[name] = found.cached.sample(found.items[0], 0).fields
        if base == "auto" and before is not None:
            assert encoding.facts() == before
    nothing = dict.fromkeys(("glyphs", "vae", "prior", "plan"), 0)
    assert all(made["precise"].values())
    changed = {name: made["precise"][name] for name in ("glyphs", "plan")}
    assert made["int8"] == made["fp8"] == {**nothing, **changed}
    assert made["int8 again"] == made["goes on"] == made["as released"] == nothing
    for name in ("latent", "prior_tokens"):
        assert torch.equal(kept["precise"][name], kept["int8"][name])
    error = (kept["precise"]["glyph_embeds"] - kept["int8"]["glyph_embeds"]).norm()
    assert 0 < error < 0.05 * kept["precise"]["glyph_embeds"].norm()
    assert torch.equal(kept["goes on"]["glyph_embeds"], kept["int8"]["glyph_embeds"])


# -- the language model ------------------------------------------------------------------------------------------------


def planner(place: Path, build: Any) -> Any:
    encoder = registry.load(GLM, registry.spec(GLM).options(), ModelPaths(place / "deep")).encoders("t2i")[-1]
    encoder.load(build)
    return encoder


def test_in_int8_its_words_are_nearly_as_likely_as_before(place: Path) -> None:
    """0.9 % of each weight matrix, through three layers."""
    logits = []
    for kind in (None, "int8"):
        encoder = planner(place, Build(quantize=kind))  # type: ignore[arg-type]
        inputs = encoder.inputs(EncodeInput("a red circle", size=Size(64, 64)), Size(64, 64))
        with torch.no_grad():
            logits.append(encoder._model(**inputs).logits)
    assert any(isinstance(one, QuantLinear) for one in encoder._model.modules())
    assert 0 < (logits[0] - logits[1]).norm() < 0.03 * logits[0].norm()


def test_streamed_in_int8_it_plans_as_it_does_whole_and_gives_its_memory_back(place: Path) -> None:
    given = EncodeInput("a red circle", size=Size(96, 64))
    whole = planner(place, Build(quantize="int8")).encode(given)["generated_tokens"]
    folder = place / "deep" / "vision_language_encoder"
    phase = PhaseBuild(Build(), 1, room_bytes=0, backend=lambda device: CpuBackend(1), tell=lambda text: None)
    (one,) = [
        one
        for one in look_at(
            registry.load(GLM, registry.spec(GLM).options(), ModelPaths(place / "deep")).encoders("t2i"),
            torch.float32,
            "int8",
            Size(64, 64),
        )
        if one.encoder == "plan"
    ]
    phase.budget_bytes = held_within(one.weights["int8"], 0, 0).needed_bytes
    encoding = Encoding({"plan": "int8"}, {folder: "int8"})
    encoder = planner(place, encoding.build(phase))
    (engine,) = phase.engines
    assert len(engine.residents) < len(engine.layouts)
    said = encoder.encode(given)["generated_tokens"]
    assert torch.equal(said, whole) and said.shape == (2, 3)
    model = weakref.ref(encoder._model)
    encoder.free()
    phase.release()
    del engine
    gc.collect()
    assert model() is None
    precise = planner(place, Build()).encode(replace(given, caption="two cats"))["generated_tokens"]
    assert precise.shape == said.shape
