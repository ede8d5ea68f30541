"""The packages inside of a portable folder: those of release.txt for the target, and the proof that none is missing."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from whitetuner.errors import EXIT_ENVIRONMENT, UserError
from whitetuner.install.steps import EXTRAS, pinned_torch
from whitetuner.install.torch_build import choose
from whitetuner.paths import PYTHON
from whitetuner.portable.target import Target, project_of

Say = Callable[[str], None]


def packages(root: Path, target: Target) -> list[str]:
    """The lines of release.txt for the target, hashes included, their markers decided."""
    text = (root / "release.txt").read_text(encoding="utf-8")
    found = []
    for block in re.findall(r"^[A-Za-z0-9].*(?:\n[ \t].*)*", text, re.MULTILINE):
        head, *hashes = re.split(r"\s*\\\n\s*", block)
        if target.wants(Requirement(head)):
            found.append(" \\\n    ".join([head.partition(";")[0].strip(), *hashes]))
    return found


def take_packages(site: Path, target: Target, root: Path, torch_index: str, say: Say) -> str:
    """PyTorch and the packages of release.txt into site-packages; -> PyTorch's version as installed."""
    chosen = choose("win32", None, torch_index)
    torch = chosen.requirement(pinned_torch(root))
    say(f"{torch} {'of ' + chosen.index if chosen.index else 'as pip is configured'}")
    index = ["--index-url", chosen.index] if chosen.index else []
    _pip(site, ["--no-deps", *target.pip(), *index, torch])
    lines = packages(root, target)
    say(f"{len(lines)} packages of release.txt")
    if lines:
        with tempfile.TemporaryDirectory() as name:
            wanted = Path(name) / "release.txt"
            wanted.write_text("\n".join(lines) + "\n", encoding="utf-8")
            _pip(site, ["--no-deps", "--require-hashes", *target.pip(), "-r", str(wanted)])
    shutil.rmtree(site / "bin", ignore_errors=True)  # starters for the system that built it
    return next(one.version for one in metadata.distributions(path=[str(site)]) if one.name == "torch")


def _pip(site: Path, words: Sequence[str]) -> None:
    common = ["--disable-pip-version-check", "install", "--quiet", "--no-compile", "--target", str(site)]
    done = subprocess.run(
        [*PYTHON, "-m", "pip", *common, *words], capture_output=True, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()
        raise UserError(
            "pip could not unpack the packages for Windows: {reason}",
            where=" ".join(words[-1:]),
            mend="check the connection and the index (--torch cpu, cu126, cu130, an address, or pip: as pip is configured)",
            code=EXIT_ENVIRONMENT,
            reason=" ".join(lines[-2:]) or "no message",
        )


def missing(site: Path, target: Target, root: Path) -> list[str]:
    """What the packages ask for on the target and do not find in the folder, in words."""
    there = {canonicalize_name(one.name): one for one in metadata.distributions(path=[str(site)])}
    project = project_of(root)
    own = [Requirement(line) for line in _own(project, EXTRAS)]
    asked = [("whitetuner", one) for one in own if target.wants(one)]
    seen: set[tuple[str, frozenset[str]]] = set()
    found = []
    while asked:
        by, one = asked.pop()
        name = canonicalize_name(one.name)
        held = there.get(name)
        if held is None or held.version not in one.specifier:
            found.append(f"{by} asks for {one}, there is {'none' if held is None else held.version}")
        elif (name, frozenset(one.extras)) not in seen:
            seen.add((name, frozenset(one.extras)))
            pythons = (held.metadata.get_all("Requires-Python") or [""])[0]
            if f"3.{target.minor}.0" not in SpecifierSet(pythons):
                found.append(f"{name} runs on Python {pythons}, this is 3.{target.minor}")
            more = [Requirement(line) for line in held.requires or ()]
            asked += [(name, each) for each in more if target.wants(each, ("", *one.extras))]
    return sorted(set(found))


def _own(project: dict[str, Any], extras: Sequence[str]) -> Iterator[str]:
    yield from project["dependencies"]
    for extra in extras:
        for line in project["optional-dependencies"][extra]:
            inside = Requirement(line)
            if inside.name == "whitetuner":
                for name in sorted(inside.extras):
                    yield from project["optional-dependencies"][name]
            else:
                yield line
