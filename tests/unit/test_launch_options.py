"""Which words are launch.py's own, and when an installation is taken for ready."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whitetuner.errors import UserError
from whitetuner.install import environment as env
from whitetuner.install.launch import HELP, is_ready, split
from whitetuner.install.steps import Options

ROOT = Path(__file__).parents[2]


@given(st.sampled_from(["train", "demo", "check", "gui", "test"]), st.lists(st.text(max_size=12)))
def test_words_after_the_first_reach_whitetuner_untouched(word: str, rest: list[str]) -> None:
    given_words = [word, *rest, "--here", "--again", "--torch-index", "cpu"]
    assert split(given_words) == (Options(), given_words)


def test_options_stand_before_the_words() -> None:
    options, words = split(["--torch-index", "cpu", "--again", "train", "c.toml", "--set", "a=1"])
    assert options == Options(torch_index="cpu", again=True)
    assert words == ["train", "c.toml", "--set", "a=1"]


def test_setup_takes_the_options_behind_it_too() -> None:
    assert split(["setup", "--torch-index=cu130", "--here"]) == (
        Options(torch_index="cu130", here=True),
        ["setup"],
    )
    with pytest.raises(UserError, match=r"setup takes no demo"):
        split(["setup", "demo"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["gui"]),
        (["--port", "7861"], ["gui", "--port", "7861"]),
        (["--reuse-torch"], ["gui"]),
        (["--help"], ["--help"]),
        (["setup", "--help"], ["--help"]),
        (["train", "--help"], ["train", "--help"]),
    ],
)
def test_no_word_means_the_page(arguments: list[str], words: list[str]) -> None:
    assert split(arguments)[1] == words


@pytest.mark.parametrize(
    "arguments", [["setup", "demo"], ["--torch-index"], ["--torch-index", "cpu", "--reuse-torch"]]
)
def test_wrong_use_ends_with_2_and_a_mend(arguments: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        split(arguments)
    assert caught.value.code == 2
    assert caught.value.mend


def test_the_help_names_every_option() -> None:
    for word in (
        "--torch-index",
        "--reuse-torch",
        "--here",
        "--again",
        "WHITETUNER_VENV",
    ):
        assert word in HELP


@pytest.fixture
def ready(tmp_path: Path) -> tuple[env.Environment, Path, env.Installed]:
    """An environment that looks installed, for a checkout that has nothing but its pins."""
    root = tmp_path / "checkout"
    root.mkdir()
    for name in ("pyproject.toml", "constraints.txt"):
        (root / name).write_bytes((ROOT / name).read_bytes())
    environment = env.Environment(root / ".venv")
    environment.python.parent.mkdir(parents=True)
    environment.python.write_text("", encoding="utf-8")
    whole = env.Installed(
        state="ready",
        own=True,
        key=env.pins_key(root),
        root=str(root),
        base=str(environment.python.resolve()),
        extras=["all", "dev"],
    )
    environment.write(whole)
    return environment, root, whole


def test_a_whole_installation_is_ready(ready: tuple[env.Environment, Path, env.Installed]) -> None:
    environment, root, whole = ready
    assert environment.read() == whole
    assert is_ready(environment, root, Options(), {"all"})
    assert is_ready(environment, root, Options(), {"all", "dev"})


@pytest.mark.parametrize(
    "change",
    [
        {"state": "installing"},
        {"key": "other pins"},
        {"root": "/moved/from/here"},
        {"base": "/gone/python3.9"},
        {"extras": []},
    ],
)
def test_anything_that_differs_is_not_ready(
    ready: tuple[env.Environment, Path, env.Installed], change: dict[str, object]
) -> None:
    environment, root, whole = ready
    environment.write(replace(whole, **change))  # type: ignore[arg-type]
    assert not is_ready(environment, root, Options(), {"all", "dev"})


@pytest.mark.parametrize(
    "options", [Options(again=True), Options(torch_index="cpu"), Options(reuse_torch=True)]
)
def test_a_new_wish_is_not_ready(
    ready: tuple[env.Environment, Path, env.Installed], options: Options
) -> None:
    environment, root, _ = ready
    assert not is_ready(environment, root, options, {"all"})


def test_changed_pins_are_not_ready(ready: tuple[env.Environment, Path, env.Installed]) -> None:
    environment, root, _ = ready
    (root / "constraints.txt").write_text("torch==2.9.0\n", encoding="utf-8")
    assert not is_ready(environment, root, Options(), {"all"})


@pytest.mark.parametrize("text", ["", "{", '{"state": "ready"', '{"strange": 1}', "[]", "\x00\x00"])
def test_a_torn_record_counts_as_nothing_installed(
    ready: tuple[env.Environment, Path, env.Installed], text: str
) -> None:
    environment, root, _ = ready
    environment.record.write_text(text, encoding="utf-8")
    assert environment.read() == env.Installed()
    assert not is_ready(environment, root, Options(), {"all"})
