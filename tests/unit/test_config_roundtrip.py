"""E12: file, form and command line give the same Config, and a written config gives itself again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from whitetuner.config.load import dump_config, flat, load_config
from whitetuner.config.schema import Config

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
path = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(
    lambda one: one == one.strip() and one.strip("\"'") == one
)
number = st.floats(1e-12, 1, allow_subnormal=False)


def table(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


shared = {
    "caption_ext": st.just(".caption"),
    "caption_dropout": number,
    "trigger": text,
    "default_caption": text,
    "resolution": st.one_of(
        st.integers(32, 8192), st.lists(st.integers(32, 8192), min_size=1, max_size=3, unique=True)
    ),
    "recursive": st.booleans(),
    "prompt": text,
}
a_set = st.builds(
    lambda folder, rest: {"images": folder, **rest},
    path,
    table(**shared, repeats=st.integers(1, 99), loss_weight=number, conditions=st.just([])),
)
data = st.one_of(
    st.builds(
        lambda folder, rest: {"images": folder, **rest}, path, table(**shared, batch_size=st.integers(1, 9))
    ),
    st.builds(
        lambda sets, rest: {"sets": sets, **rest}, st.lists(a_set, min_size=1, max_size=3), table(**shared)
    ),
)
prompts = st.lists(
    st.builds(
        lambda words, rest: {"text": words, **rest},
        text,
        table(negative=text, size=st.just([64, 96]), seed=st.integers(0, 2**63 - 1), cfg=st.floats(0, 100)),
    ),
    max_size=3,
)
documents = st.fixed_dictionaries(
    {
        "model": st.builds(lambda rest: {"family": "flux2-klein", **rest}, table(path=path, vae=path)),
        "data": data,
    },
    optional={
        "run": st.one_of(
            table(name=st.just("a cat"), output_dir=path, steps=st.integers(1, 10**7)),
            table(epochs=st.integers(1, 9)),
        ),
        "method": table(
            kind=st.sampled_from(["lokr", "lora"]), alpha=number, targets=st.lists(text, min_size=1)
        ),
        "noise": table(shift=st.one_of(st.just("auto"), number), noise_offset=number),
        "optimizer": table(
            lr=number,
            betas=st.just([0.5, 0.25]),
            name=text,
            args=st.dictionaries(st.from_regex(r"[a-z]+", fullmatch=True), number),
        ),
        "memory": table(
            vram_gb=st.one_of(st.just("auto"), st.floats(1, 99)), gradient_checkpointing=st.booleans()
        ),
        "preview": table(prompts=prompts, max_seconds=number),
    },
)
quick = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@quick
@given(documents)
def test_a_written_config_gives_itself_again(tmp_path: Path, document: dict[str, Any]) -> None:
    config = load_config(None, base=document).config
    file = tmp_path / "config.toml"
    file.write_text(dump_config(config), encoding="utf-8", newline="\n")
    again = load_config(file).config
    assert again == config
    assert again.data_sets() == config.data_sets()
    assert dump_config(again) == dump_config(config)


@quick
@given(documents)
def test_form_file_and_command_line_give_the_same_config(tmp_path: Path, document: dict[str, Any]) -> None:
    import tomlkit

    file = tmp_path / "form.toml"
    file.write_text(tomlkit.dumps(document), encoding="utf-8", newline="\n")
    dotted = {
        key: value for key, value in flat({k: v for k, v in document.items() if v}).items() if "[" not in key
    }
    for section, key in (("data", "sets"), ("preview", "prompts")):
        if key in document.get(section, {}):
            dotted[f"{section}.{key}"] = document[section][key]
    from_file = load_config(file).config
    from_form = load_config(None, base=dotted).config
    words = [f"{key}={inline(value)}" for key, value in dotted.items()]
    from_words = load_config(None, words).config
    assert from_file == from_form == from_words
    assert from_file.data_sets() == from_form.data_sets() == from_words.data_sets()


def inline(value: Any) -> str:
    """TOML on one line, as one types it behind --set."""
    import tomlkit

    if isinstance(value, list):
        return "[" + ", ".join(inline(one) for one in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {inline(one)}" for key, one in value.items()) + "}"
    return tomlkit.item(value).as_string()


def test_windows_paths_are_written_in_single_quotes() -> None:
    config = load_config(None, base={"model.family": "flux2-klein", "data.images": r"C:\new\cat"}).config
    assert r"images = 'C:\new\cat'" in dump_config(config)


def test_what_a_set_leaves_out_still_comes_from_data_after_writing(tmp_path: Path) -> None:
    sets = [{"images": "a"}, {"images": "b", "resolution": 64}]
    form = {"model.family": "flux2-klein", "data.resolution": 512, "data.sets": sets}
    file = tmp_path / "c.toml"
    file.write_text(dump_config(load_config(None, base=form).config), encoding="utf-8")
    assert [one.resolution for one in load_config(file).config.data_sets()] == [512, 64]


def test_a_config_is_frozen() -> None:
    config = load_config(None, base={"model.family": "flux2-klein"}).config
    with pytest.raises(ValueError, match=re.compile("frozen", re.I)):
        config.run.steps = 3  # type: ignore[misc]
    assert Config.model_validate(config.model_dump()) == config
