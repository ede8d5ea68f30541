"""A blank sample has the shapes that the encoders give: the plan measures what training will really see."""

from __future__ import annotations

from subjects import Subject

from whitetuner.families import registry


def test_a_blank_sample_is_shaped_as_the_encoders_shape_one(subject: Subject) -> None:
    case = subject.case(columns=5, rows=4)
    given = case.inputs()[0]
    real = subject.bench.encode(given)
    part = subject.spec.parts(subject.family.options)[0].name
    module = subject.bench.modules[part]
    blank = registry.sketch(subject.name).blank(
        module, subject.options, case.size, subject.family.stride(), tuple(case.condition_sizes)
    )
    assert blank.keys() == real.keys()
    layouts = {
        name: kind for one in subject.family.encoders(subject.task) for name, kind in one.fields.items()
    }
    for name, tensor in real.items():
        if layouts[name] == "stack":
            assert blank[name].shape == tensor.shape, name
        else:  # the plan reckons with the longest
            assert blank[name].ndim == tensor.ndim, name
            assert all(b >= t for b, t in zip(blank[name].shape, tensor.shape, strict=True)), name


def test_released_models_are_variants_of_the_family_with_a_config_of_its_class() -> None:
    for name in registry.FAMILIES:
        spec, released = registry.spec(name), registry.sketch(name).RELEASED
        assert released and released.keys() <= spec.variants.keys(), name
        for variant, configs in released.items():
            named = {"variant": variant} if "variant" in spec.options.model_fields else {}
            parts = {part.name for part in spec.parts(spec.options(**named))}
            assert configs.keys() <= parts and configs, (name, variant)


def test_page_and_files_agree_on_what_comfyui_loads() -> None:
    for name in registry.FAMILIES:
        assert registry.spec(name).comfyui_loads == getattr(registry.keys(name), "in_comfyui", True), name
