"""The wheel, installed away from the checkout, has all that the program needs; the README's walk with a tiny model is true."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src"


def run(*words: str | Path, folder: Path, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(
        words,
        cwd=folder,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=600,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_wheel_alone_runs_from_another_folder(tmp_path: Path) -> None:
    home = tmp_path / "home"
    venv.create(home, symlinks=os.name != "nt", with_pip=False)
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    # a checkout without what git ignores; hatchling comes as it does for a user, by pip's build isolation
    shutil.copytree(SOURCES, tmp_path / "tree" / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "-q", "-w", tmp_path / "dist", tmp_path / "tree", folder=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("whitetuner-*.whl")
    run(*pip, "--python", scripts / "python", "install", "-q", "--no-deps", wheel, folder=tmp_path)
    (packages,) = home.rglob("site-packages")
    # what it depends on: the packages of this environment, without their .pth files (one of them may name the checkout)
    (packages / "environment.pth").write_text("\n".join(site.getsitepackages()) + "\n", encoding="utf-8")

    sources = {
        path.relative_to(SOURCES) for path in SOURCES.rglob("*") if path.is_file() and path.suffix != ".pyc"
    }
    assert {path for path in sources if not (packages / path).is_file()} == set()
    python = scripts / "python"
    told = run(python, "-c", "import whitetuner; print(whitetuner.__file__)", folder=tmp_path)
    assert Path(told.strip()).resolve().is_relative_to(packages.resolve())
    program = scripts / "whitetuner"
    assert "selftest" in run(program, "--help", folder=tmp_path)
    assert "flux2-klein" in run(program, "families", folder=tmp_path)
    run(program, "init", "nano-lokr", "-o", "my.toml", folder=tmp_path)
    assert 'family = "flux2-klein"' in (tmp_path / "my.toml").read_text(encoding="utf-8")


def walk(page: str) -> list[list[str]]:
    text = (ROOT / page).read_text(encoding="utf-8")
    (block,) = re.findall(r"^```\w*\n(python launch\.py tiny .*?)^```", text, re.MULTILINE | re.DOTALL)
    return [shlex.split(line, comments=True) for line in block.splitlines()]


def test_both_readmes_have_the_same_walk() -> None:
    words = [["python", "launch.py", word] for word in ("tiny", "testdata", "init", "train")]
    assert [line[:3] for line in walk("README.md")] == words
    assert walk("README.md") == walk("README.zh-CN.md")


@pytest.mark.slow
def test_the_walk_with_a_tiny_model_runs_as_it_stands_there(tmp_path: Path) -> None:
    for line in walk("README.md"):
        # launch.py installs and then does just this; two steps instead of the config's are enough here
        steps = ("--set", "run.steps=2") if line[2] == "train" else ()
        run(sys.executable, "-m", "whitetuner", *line[2:], *steps, folder=tmp_path, PYTHONPATH=str(SOURCES))
    assert list(tmp_path.glob("output/*/final/*.safetensors"))
