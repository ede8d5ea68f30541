"""The sdist holds what installs and starts; the wheel built from it has all that the program needs; the README's walk is true."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src"
#: Of the sdist, beside the package: what `python launch.py`, `pip install` and a reader of it need.
BESIDE = {
    *("pyproject.toml", "PKG-INFO", ".gitignore", "launch.py", "start.bat", "start.sh", "gui.py", "req.txt"),
    *(
        "constraints.txt",
        "release.txt",
        "LICENSE",
        "README.md",
        "README.zh-CN.md",
        "CHANGELOG.md",
        "SECURITY.md",
    ),
}


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


def sources() -> set[Path]:
    return {
        path.relative_to(SOURCES)
        for path in SOURCES.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and "__pycache__" not in path.parts
    }


@pytest.mark.slow
def test_the_sdist_builds_a_wheel_that_runs_alone_from_another_folder(tmp_path: Path) -> None:
    home = tmp_path / "home"
    venv.create(home, symlinks=os.name != "nt", with_pip=False)
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    # a checkout without what git ignores, but with what else lies in the repository
    tree = tmp_path / "tree"
    shutil.copytree(SOURCES, tree / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tree / path.name)
    for name in ("tests/unit/test_x.py", "docs/x.md", "output/run/checkpoint.safetensors"):
        (tree / name).parent.mkdir(parents=True)
        (tree / name).write_text("not of the package", encoding="utf-8")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "-q", "--target", tmp_path / "build", "hatchling", folder=tmp_path)
    build = "import hatchling.build, sys; hatchling.build.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, tmp_path / "dist", folder=tree, PYTHONPATH=str(tmp_path / "build"))

    (sdist,) = (tmp_path / "dist").glob("whitetuner-*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {Path(*Path(one.name).parts[1:]) for one in archive if one.isfile()}
        assert all(one.isfile() or one.isdir() for one in archive)  # no links: Windows unpacks it
    assert {path for path in held if path.parts[0] != "src"} == {Path(name) for name in BESIDE}
    assert {Path("src") / path for path in sources()} == held - {Path(name) for name in BESIDE}
    assert sdist.stat().st_size < 16_000_000  # 14.7 MB, the embedded models are most of it

    # from the sdist, with hatchling as it comes for a user: by pip's build isolation
    run(*pip, "wheel", "--no-deps", "-q", "-w", tmp_path / "dist", sdist, folder=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("whitetuner-*.whl")
    run(*pip, "--python", scripts / "python", "install", "-q", "--no-deps", wheel, folder=tmp_path)
    (packages,) = home.rglob("site-packages")
    # what it depends on: the packages of this environment, without their .pth files (one of them may name the checkout)
    (packages / "environment.pth").write_text("\n".join(site.getsitepackages()) + "\n", encoding="utf-8")

    assert {path for path in sources() if not (packages / path).is_file()} == set()
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
