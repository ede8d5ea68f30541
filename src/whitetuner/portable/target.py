"""The Python for Windows inside of a portable folder: unpacked from its publisher's archive, told to look nowhere else."""

from __future__ import annotations

import re
import struct
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from whitetuner.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

_AMD64 = 0x8664
_PLATFORM = "win_amd64"


@dataclass(frozen=True)
class Target:
    """The Python that goes into the folder: 3.minor, for Windows on x86-64."""

    minor: int

    @property
    def environment(self) -> dict[str, str]:
        """For the markers of requirements."""
        return {
            "python_version": f"3.{self.minor}",
            "python_full_version": f"3.{self.minor}.0",
            "implementation_name": "cpython",
            "implementation_version": f"3.{self.minor}.0",
            "platform_python_implementation": "CPython",
            "os_name": "nt",
            "sys_platform": "win32",
            "platform_system": "Windows",
            "platform_machine": "AMD64",
            "platform_release": "10",
            "platform_version": "10.0",
        }

    def wants(self, one: Requirement, extras: Sequence[str] = ("",)) -> bool:
        return one.marker is None or any(
            one.marker.evaluate({**self.environment, "extra": extra}) for extra in extras
        )

    def pip(self) -> list[str]:
        """pip's options for it."""
        words = ["--only-binary=:all:", "--platform", _PLATFORM, "--implementation", "cp"]
        # pip holds what packages say of Python against the one it runs on; `missing` holds it against the target
        return [*words, "--python-version", f"3.{self.minor}", "--ignore-requires-python"]


def project_of(root: Path) -> dict[str, Any]:
    """[project] of the source folder's pyproject.toml."""
    found: dict[str, Any] = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def unpack_python(archive: Path, place: Path, root: Path) -> Target:
    """Puts the Python of an archive into `place`, python.exe at its top, and tells it where to look for modules.

    Raises UserError for an archive that is none, holds no Python for Windows on x86-64 or one that White Tuner does not run on.
    """
    place.mkdir(parents=True, exist_ok=True)
    try:
        files = _contents(archive)
    except (OSError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise UserError(
            "this is no archive that can be read ({reason})",
            where=str(archive),
            mend="give a .zip or .tar.gz",
            reason=error,
        ) from error
    tops = sorted(
        (one.parent for one in files if one.name.lower() == "python.exe"), key=lambda one: len(one.parts)
    )
    dlls = [
        one
        for one in files
        if tops and one.parent == tops[0] and re.fullmatch(r"python3\d\d\.dll", one.name.lower())
    ]
    if not dlls:
        raise UserError(
            "there is no Python for Windows in it (python.exe with python3NN.dll beside it)",
            where=str(archive),
            mend="give python.org's embeddable package, or a build of python-build-standalone (install_only)",
        )
    top, version = tops[0], re.findall(r"\d+", dlls[0].name)[0]
    target = Target(int(version[1:]))
    project = project_of(root)
    if f"3.{target.minor}" not in SpecifierSet(project["requires-python"]):
        raise UserError(
            "it holds Python 3.{minor}; White Tuner runs on {range}",
            where=str(archive),
            mend="give another version, e.g. 3.12",
            minor=target.minor,
            range=project["requires-python"],
        )
    for name, content in files.items():
        # below the folder of python.exe; the pip and the tests that some builds bring along are not needed
        if name.is_relative_to(top) and not {"..", "test", "__pycache__"} & set(name.relative_to(top).parts):
            inside = name.relative_to(top)
            if name.is_absolute() or inside.suffix == "._pth" or "site-packages" in inside.parts:
                continue
            path = place.joinpath(*inside.parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    program = (place / "python.exe").read_bytes()
    at = struct.unpack_from("<I", program, 0x3C)[0] if len(program) > 0x40 and program[:2] == b"MZ" else 0
    machine = struct.unpack_from("<H", program, at + 4)[0] if at and len(program) > at + 6 else 0
    if machine != _AMD64:
        raise UserError(
            "its python.exe is not for Windows on x86-64, which PyTorch's builds are for",
            where=str(archive),
            mend="give the one whose name says amd64 or x86_64",
        )
    # With this file Python looks nowhere else: no registry, no PYTHONPATH, no packages of the user.
    lines = [f"python{version}.zip", "DLLs", "Lib", ".", "Lib\\site-packages", "import site"]
    write_windows(place / f"python{version}._pth", "\n".join(lines) + "\n", "utf-8")
    return target


def _contents(archive: Path) -> dict[PurePosixPath, bytes]:
    """Every plain file of it."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            held = {
                PurePosixPath(one.filename): zipped.read(one) for one in zipped.infolist() if not one.is_dir()
            }
    else:
        with tarfile.open(archive) as packed:
            held = {
                PurePosixPath(one.name): file.read()
                for one in packed
                if one.isfile() and (file := packed.extractfile(one)) is not None
            }
    return held


def write_windows(path: Path, text: str, encoding: str) -> None:
    """With the line ends of Windows."""
    path.write_bytes(text.replace("\n", "\r\n").encode(encoding))
