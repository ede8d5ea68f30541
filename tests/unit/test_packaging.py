"""What the project is handed out as: the site of its documentation, its container, its figures."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmarks import ages

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


def test_every_figure_names_the_code_it_measures() -> None:
    rows = dict(ages.rows())
    assert list(ages.MEASURES) == list(rows)
    for name in rows:
        assert len(ages.sources(name)) > 1
        assert [path for path in ages.sources(name) if not (ROOT / path).exists()] == []
    text = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    made = text.split(ages.BEGIN)[1].split(ages.END)[0]
    for name, paths in ages.MEASURES.items():
        (row,) = [line for line in made.split("\n") if line.startswith(f"| `{name}` |")]
        assert ", ".join(f"`{path}`" for path in paths) in row, "run: python -m benchmarks.ages --write"


@pytest.mark.slow
def test_figures_older_than_the_code_are_marked() -> None:
    """Only that no mark is missing: one that is there too long is renewed with the next measurement."""
    try:
        whole = ages.git("rev-parse", "--is-shallow-repository") == "false"
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git history here")
    if not whole:
        pytest.skip("a shallow clone does not tell what came after a measurement")
    older = {name for name in ages.MEASURES if ages.is_older(name)}
    assert older <= ages.marked(), "run: python -m benchmarks.ages --write"


def test_one_command_makes_every_figure_again() -> None:
    command = [sys.executable, "-m", "benchmarks.all", "--dry-run"]
    every = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True).stdout
    assert every.splitlines() == [f"{name}: {line}" for name, line in ages.rows()]
    one = subprocess.run([*command, "step.json"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    assert one.stdout == "step.json: python -m benchmarks.cpu.step\n"
    wrong = subprocess.run([*command, "stap.json"], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert wrong.returncode == 1 and "no such result: stap.json" in wrong.stderr


def test_an_older_figure_is_told_by_history_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    def commit(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
        git("add", "-A")
        git("commit", "-qm", path)

    monkeypatch.setattr(ages, "ROOT", tmp_path)
    monkeypatch.setattr(ages, "MEASURES", {"a.json": ("x.py",), "b.json": ("deep",)})
    git("init", "-q")
    head = "| `a.json` | `python -m benchmarks.a` | x | 1 |\n| `b.json` | `python tests/b go` | x | 1 |\n"
    commit("benchmarks/README.md", f"{head}{ages.BEGIN}\n{ages.END}\nend\n")
    for path in ("src/whitetuner/x.py", "src/whitetuner/deep/y.py", "benchmarks/results/a.json"):
        commit(path, "1")
    commit("benchmarks/results/b.json", "1")
    assert ages.sources("b.json") == ["tests/b", "src/whitetuner/deep"]
    assert not ages.is_older("a.json") and not ages.is_older("b.json")
    commit("src/whitetuner/other.py", "1")
    assert not ages.is_older("a.json")
    commit("src/whitetuner/x.py", "2")
    assert ages.is_older("a.json") and not ages.is_older("b.json")
    assert ages.marked() == set()
    text = ages.with_table((tmp_path / ages.README).read_text(encoding="utf-8"), ages.table())
    assert text.endswith(f"{ages.END}\nend\n") and ages.with_table(text, ages.table()) == text
    commit(str(ages.README), text)
    assert ages.marked() == {"a.json"}
    commit("benchmarks/a.py", "2")
    commit("src/whitetuner/deep/z.py", "2")
    assert ages.is_older("b.json")
    commit("benchmarks/results/a.json", "2")
    assert not ages.is_older("a.json")
