"""The packages of a release are those that were tested, to the byte: release.txt has hashes for what constraints.txt pins."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from test_house import PINS, PROJECT, ROOT, canonical

#: Which build of these fits is the machine's matter.
MACHINES_OWN = re.compile(r"torch|triton|nvidia-.*|cuda-.*")
TEXT = (ROOT / "release.txt").read_text(encoding="utf-8")


def holds(marker: str, minor: int) -> bool:
    """For a Python 3.minor, on the system that needs most."""
    found = re.findall(r"python(?:_full)?_version (<|>=|==) '3\.(\d+)(?:\.\*)?'", marker)
    assert len(found) == marker.count("python_"), marker
    tests = {"<": minor.__lt__, ">=": minor.__ge__, "==": minor.__eq__}
    # hf-xet alone has `or`, between machines.
    return " or " in marker or all(tests[sign](int(number)) for sign, number in found)


def pins(text: str, minor: int) -> dict[str, str]:
    found = {}
    for line in text.splitlines():
        if match := re.match(r"([A-Za-z0-9._-]+)==([^\s;]+)(?: ; ([^\\]*))?", line):
            name, version, marker = match[1], match[2], match[3] or ""
            if holds(marker, minor):
                name = canonical.sub("-", name.lower())
                assert name not in found, f"two versions of {name} for Python 3.{minor}"
                found[name] = version
    return found


@pytest.mark.parametrize("minor", range(10, 15))
def test_both_name_the_same_versions(minor: int) -> None:
    hashed, pinned = pins(TEXT, minor), pins(PINS, minor)
    assert len(hashed) > 70
    assert {name: version for name, version in hashed.items() if pinned.get(name) != version} == {}


def test_every_package_has_hashes_and_nothing_else_stands_there() -> None:
    blocks = re.split(r"\n(?=[^ #])", "\n" + TEXT.split("httpx2-jsfetch (browsers only).\n")[1].strip("\n"))[
        1:
    ]
    for block in blocks:
        head, *hashes = block.split(" \\\n    ")
        assert re.fullmatch(r"[a-z0-9._-]+==[^\s;]+( ; .+)?", head), head
        assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", one) for one in hashes), head
    assert not [head for head in blocks if MACHINES_OWN.fullmatch(head.partition("==")[0])]


def needed(name: str, extras: frozenset[str], seen: set[str]) -> Iterator[str]:
    """What an installed package asks for here, and what that asks for."""
    if name in seen:
        return
    seen.add(name)
    yield name
    if MACHINES_OWN.fullmatch(name):
        return
    for line in metadata.requires(name) or ():
        one = Requirement(line)
        wanted = one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras or {""})
        if wanted:
            yield from needed(canonical.sub("-", one.name.lower()), frozenset(one.extras), seen)


def test_nothing_that_is_needed_is_missing() -> None:
    extras = [
        line
        for name in ("video", "quant", "prodigy", "heic")
        for line in PROJECT["optional-dependencies"][name]
    ]
    seen: set[str] = set()
    for line in [*PROJECT["dependencies"], *extras]:
        one = Requirement(line)
        if one.marker is None or one.marker.evaluate():
            assert list(needed(canonical.sub("-", one.name.lower()), frozenset(one.extras), seen)) or seen
    hashed = pins(TEXT, sys.version_info[1])
    assert {name for name in seen if name not in hashed and not MACHINES_OWN.fullmatch(name)} == set()
    assert len(seen) > 60
