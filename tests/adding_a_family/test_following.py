"""docs/adding-a-family.md, followed: its folder and its line are added to a copy of the project, where the checks it names pass.

So nothing but the folder and the line can be needed; where a check failed for want of more, the contract was mended.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/adding-a-family.md").read_text(encoding="utf-8")
FOLDER = Path(__file__).with_name("lumina2")
BLOCKS = re.findall(r"^```(?:python|ini)\n# ([\w.]+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_every_block_of_the_page_is_a_part_of_its_file() -> None:
    assert len(BLOCKS) == len(re.findall(r"^```\w", PAGE, re.MULTILINE)), (
        "a block begins with its file's name"
    )
    for file, code in BLOCKS:
        if file != "registry.py":
            assert f"\n{code}" in (FOLDER / file).read_text(encoding="utf-8"), f"{file}:\n{code}"


def test_the_page_speaks_of_every_file() -> None:
    files = {file.name for file in FOLDER.iterdir() if file.is_file() and file.stat().st_size}
    assert files | {"registry.py"} == {file for file, _ in BLOCKS}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with the family in it."""
    copy = tmp_path_factory.mktemp("project")
    for name in ("src", "tests"):
        shutil.copytree(
            ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", Path(__file__).parent.name)
        )
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(
        FOLDER, copy / "src/whitetuner/families/lumina2", ignore=shutil.ignore_patterns("__pycache__")
    )
    (line,) = (code for file, code in BLOCKS if file == "registry.py")
    registry = copy / "src/whitetuner/families/registry.py"
    before, families, after = registry.read_text(encoding="utf-8").partition("FAMILIES: dict[str, str] = {\n")
    table, end, rest = after.partition("}\n")
    registry.write_text(before + families + table + line + end + rest, encoding="utf-8")
    return copy


def run(tree: Path, *words: str) -> str:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=tree,
        env={**variables, "PYTHONPATH": str(tree / "src")},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def how_many_pass(tree: Path, *words: str) -> int:
    """How many; none fails and none is skipped."""
    said = run(tree, "pytest", "-q", "-p", "no:cacheprovider", *words)
    found = re.search(r"(\d+) passed", said)
    assert found is not None and "skipped" not in said, said[-2000:]
    return int(found[1])


@pytest.mark.slow
def test_the_command_line_knows_it_and_has_a_plan_for_it(tree: Path) -> None:
    assert "Lumina-Image 2.0" in run(tree, "whitetuner", "families")
    assert "30 blocks" in run(tree, "whitetuner", "plan", "lumina2", "--vram", "8")


@pytest.mark.slow
def test_all_checks_of_families_pass(tree: Path) -> None:
    """Every wrong convention, adapters and whole models in other programs' files, micro-batches."""
    assert how_many_pass(tree, "tests/families", "--run-slow", "-k", "lumina2") >= 55


@pytest.mark.slow
def test_it_learns_stops_resumes_draws_and_exports(tree: Path) -> None:
    names = ("integration/test_training", "integration/test_demos", "integration/test_memory_run")
    files = [f"tests/{name}.py" for name in (*names, "numerics/test_swap_families")]
    assert how_many_pass(tree, *files, "--run-slow", "-k", "lumina2") >= 34


@pytest.mark.slow
def test_the_house_and_the_page_take_it_in(tree: Path) -> None:
    """Floors, files, both languages of every option and message."""
    names = ("floors", "gui_told", "gui_fields", "gui_form_api", "config_roundtrip")
    assert (
        how_many_pass(
            tree, *(f"tests/unit/test_{name}.py" for name in names), "-k", "not architecture and not seed"
        )
        > 400
    )
