"""The docs are true where a program can tell: links lead somewhere; words, options and config keys that they quote exist."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import tomlkit
from tomlkit.exceptions import ParseError

from whitetuner.config.load import flat
from whitetuner.config.schema import Config
from whitetuner.families import registry
from whitetuner.install.launch import HELP
from whitetuner.parser import make_parser

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@cache
def anchors(page: Path) -> frozenset[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return frozenset(slug(one) for one in re.findall(r"^#+ (.+)$", text, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_inside_leads_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), f"{page.name}: {target}"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{page.name}: {target}; there are {sorted(anchors(there))}"


def quoted(page: Path) -> Iterator[str]:
    """Every command line of ours, in a block or inline."""
    text = page.read_text(encoding="utf-8")
    blocks = [body for _, body in FENCE.findall(text)]
    inline = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    for body in [*blocks, *inline]:
        for line in re.sub(r"\s*\\\n\s*", " ", body).splitlines():
            found = re.search(
                r"(?:^|\s|\$ )(?:python3? (?:launch|gui)\.py|python -m whitetuner|whitetuner)\s+(.*)", line
            )
            if found and not line.lstrip().startswith(("#", "pip ")):
                yield found[1].replace(r"\|", "|").split("  #")[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_word_and_option_quoted_exists(page: Path) -> None:
    parser = make_parser()
    (words,) = (one.choices for one in parser._actions if isinstance(one, argparse._SubParsersAction))
    wrong = []
    for line in quoted(page):
        given = [one.strip("[](),.;") for one in re.split(r"[\s=|]+", line)]
        word = given[0]
        if not word or word.startswith(("-", "$")) or word.isupper() or word in ("test", "setup", "...", "…"):
            wrong += [
                one
                for one in given
                if one.startswith("--") and one not in HELP and one not in ("--all", "--version", "--help")
            ]
            continue
        if not re.fullmatch(r"[a-z]+", word):
            continue  # "whitetuner 0.1", "whitetuner/..." are no command lines
        if word not in words:
            wrong.append(line)
            continue
        known = {option for action in words[word]._actions for option in action.option_strings}
        wrong += [
            f"{word} {one}" for one in given if one.startswith("--") and len(one) > 2 and one not in known
        ]
    assert wrong == []


def typed(line: str) -> list[str] | None:
    """A quoted line as typed, placeholders filled; None for a mere word (`plan`) and for what launch.py does itself."""
    line = re.split(r"\s{2,}", line.strip())[0]  # text set off by spaces tells what the line is for
    line = (
        re.sub(r"\[:[A-Z]+\]", "", line).replace("[", " ").replace("]", " ") if "sets[" not in line else line
    )
    line = re.sub(r"(\w+)(?:\|\w+)+", r"\1", line)  # one of several
    given = [{"STEP": "5", "...": "run.steps=1"}.get(one, one) for one in shlex.split(line, comments=True)]
    if not given or given[0] in ("test", "setup", "WORD") or not re.fullmatch("[a-z]+", given[0]):
        return None
    return given if len(given) > 1 else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_line_quoted_is_taken_by_the_real_parser(
    page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser, wrong = make_parser(), []
    for line in filter(None, map(typed, quoted(page))):
        try:
            parser.parse_args(line)
        except SystemExit as end:
            if end.code:
                wrong.append((line, capsys.readouterr().err.splitlines()[-1]))
    assert wrong == []


def test_a_line_with_a_missing_or_foreign_word_is_not_taken() -> None:
    assert typed("export IN OUT --to comfyui|diffusers   both ways") == [
        "export", "IN", "OUT", "--to", "comfyui",
    ]  # fmt: skip
    assert typed("plan") is None
    assert sum(typed(line) is not None for page in PAGES for line in quoted(page)) > 50
    for line in ("export IN --to comfyui", "export IN OUT --to nowhere", "fork RUN --at soon"):
        with pytest.raises(SystemExit):
            make_parser().parse_args(typed(line))


def keys(section: object, prefix: str = "") -> set[str]:
    found = set()
    for name, field in Config.model_fields.items() if not prefix else ():
        found |= {f"{name}.{key}" for key in getattr(field.annotation, "model_fields", {})}
    return found


KEYS = keys(Config) | {"data.sets", "preview.prompts", "model.options"}
OPTIONS = {
    f"model.options.{key}" for name in registry.FAMILIES for key in registry.spec(name).options.model_fields
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_config_key_quoted_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    wrong = []
    for language, body in FENCE.findall(text):
        if language == "toml" and "[" in body:
            try:
                said = flat(tomlkit.parse(body).unwrap())
            except ParseError:
                wrong.append(body[:60])
                continue
            wrong += [key for key in said if not is_key(re.sub(r"\[\d+\]", "", key))]
    sections = "|".join(Config.model_fields)
    for span in re.findall(r"`([^`\n]+)`", FENCE.sub("", text)):
        found = re.match(rf"((?:{sections})\.[a-z_]+(?:\.[a-z_0-9]+)?)(?:\s*=|$)", span)
        if found and not is_key(found[1]) and not span.endswith((".toml", ".json", ".py")):
            wrong.append(span)
    assert wrong == []


def is_key(key: str) -> bool:
    rows = ("data.sets.", "preview.prompts.", "optimizer.args")
    return key in KEYS | OPTIONS or key.startswith(rows)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_shell_lines_can_be_typed(page: Path) -> None:
    """Quotes are balanced, and none of them is a typographer's."""
    for language, body in FENCE.findall(page.read_text(encoding="utf-8")):
        if language in ("bash", "sh", "console"):
            for line in re.sub(r"\\\n", " ", body).splitlines():
                shlex.split(line, comments=True)
                assert not re.search("[“”‘’]", line), line


@pytest.mark.parametrize("page", sorted((ROOT / "docs/zh").glob("*.md")), ids=lambda page: str(page.name))
def test_chinese_lines_are_not_broken_where_a_reader_would_see_a_blank(page: Path) -> None:
    """Markdown makes a blank of a line's end, which Chinese does not have between its words."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found = re.search(r".*[\u4e00-\u9fff\u3001-\u3011\uff00-\uffef]\n *[\u4e00-\u9fff].*", text)
    assert found is None, found[0][:200]


def test_these_tests_see_what_they_look_for() -> None:
    assert sum(1 for page in PAGES for _ in quoted(page)) > 60
    assert len(KEYS) > 60 and len(OPTIONS) > 5
    assert sum(len(anchors(page)) for page in PAGES) > 100
