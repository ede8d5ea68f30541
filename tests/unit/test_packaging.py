"""What the project is handed out as: the site of its documentation, its container, its figures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from whitetuner.gui.settings import from_arguments
from whitetuner.parser import make_parser

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


class Site(yaml.SafeLoader):
    """mkdocs.yml without the functions that it names: YAML's `!!python/...` is nothing here, and is not run."""


Site.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, name, node: name)


def site() -> dict[str, Any]:
    return dict(yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=Site))


def pages(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    each = nav if isinstance(nav, list) else nav.values()
    return [page for one in each for page in pages(one)]


def test_the_site_has_every_page_once() -> None:
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    listed = pages(site()["nav"])
    assert set(listed) == there and len(listed) == len(there)


def test_the_site_asks_no_other_host_for_fonts() -> None:
    assert site()["theme"]["font"] is False


def instruction(name: str) -> str:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(rf"^{name} (.*)$", text, re.MULTILINE)
    assert found, name
    return str(found[-1])


def test_the_container_opens_the_page_behind_a_password_and_is_not_root() -> None:
    words = json.loads(instruction("CMD"))
    given = make_parser().parse_args(words)
    settings = from_arguments(given)
    assert settings.server and settings.password and settings.host == "0.0.0.0"
    assert f"EXPOSE {settings.port}" in (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert instruction("USER") == "1000"


@pytest.mark.parametrize(
    "name", ["README.md", "LICENSE", "src", "launch.py", "pyproject.toml", "constraints.txt"]
)
def test_the_container_is_given_what_an_installation_needs(name: str) -> None:
    left_out = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert (ROOT / name).exists() and name not in left_out


def test_every_figure_has_its_command_and_its_row() -> None:
    rows = re.findall(
        r"^\| `([a-z_]+\.json)` \| `python (?:-m )?([\w./]+)[^`]*` \|",
        (ROOT / "benchmarks/README.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    results = {path.name for path in (ROOT / "benchmarks/results").glob("*.json")}
    assert {name for name, _ in rows} == results and len(rows) == len(results)
    for name, program in rows:
        words = program if "/" in program else program.replace(".", "/") + ".py"
        assert (ROOT / words).exists(), words
        text = (ROOT / "benchmarks/results" / name).read_text(encoding="utf-8")
        assert re.search(rf'"command": "(?:\w+=\S+ )*python (?:-m )?{re.escape(program)}[ "]', text), name
