"""The portable folder for Windows: what lies in it and where its Python looks, built here with stand-ins for Python and torch."""

from __future__ import annotations

import io
import re
import shutil
import struct
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from whitetuner.cli import main
from whitetuner.errors import UserError
from whitetuner.portable.build import MAX_PATH, START, build
from whitetuner.portable.packages import missing, packages
from whitetuner.portable.target import Target, unpack_python

ROOT = Path(__file__).parents[2]
PROJECT = """[project]
name = "whitetuner"
requires-python = ">=3.10,<3.15"
dependencies = ["torch>=2.9", "small>=1", "tomli>=2; python_version < '3.11'"]
[project.optional-dependencies]
video = ["wide[fast]>=2; sys_platform == 'win32'"]
all = ["whitetuner[video]"]
"""


def program(machine: int = 0x8664) -> bytes:
    """The first bytes of a Windows program."""
    found = bytearray(0x100)
    found[:2] = b"MZ"
    struct.pack_into("<I", found, 0x3C, 0x80)
    found[0x80:0x84] = b"PE\0\0"
    struct.pack_into("<H", found, 0x84, machine)
    return bytes(found)


#: As python.org packs its embeddable Python, and as python-build-standalone packs a whole one.
EMBEDDABLE = {
    "python.exe": program(),
    "python312.dll": b"dll",
    "python312.zip": b"standard library",
    "_socket.pyd": b"pyd",
    "python312._pth": b"python312.zip\r\n.\r\n#import site\r\n",
}
WHOLE = {
    "python/python.exe": program(),
    "python/python311.dll": b"dll",
    "python/DLLs/_socket.pyd": b"pyd",
    "python/Lib/os.py": b"import sys",
    "python/Lib/test/test_os.py": b"",
    "python/Lib/site-packages/pip/__init__.py": b"",
    "python/Lib/venv/scripts/nt/python.exe": b"another",
    "elsewhere/python/../../up.txt": b"",
    "README": b"",
}


def packed(path: Path, files: dict[str, bytes]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as zipped:
            for name, content in files.items():
                zipped.writestr(name, content)
    else:
        with tarfile.open(path, "w:gz") as archive:
            for name, content in files.items():
                one = tarfile.TarInfo(name)
                one.size = len(content)
                archive.addfile(one, io.BytesIO(content))
    return path


def wheel(
    folder: Path, name: str, version: str, tag: str = "py3-none-any", requires: tuple[str, ...] = ()
) -> str:
    """A wheel of one module; returns its hash as release.txt writes it."""
    from hashlib import sha256

    path, info = folder / f"{name}-{version}-{tag}.whl", f"{name}-{version}.dist-info/"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr(f"{name}/__init__.py", f"TAG = {tag!r}\n")
        words = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {one}" for one in requires)]
        zipped.writestr(info + "METADATA", "\n".join(["Metadata-Version: 2.1", *words]) + "\n")
        head = "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\n"
        zipped.writestr(info + "WHEEL", f"{head}Tag: {tag}\n")
        zipped.writestr(info + "entry_points.txt", f"[console_scripts]\n{name} = {name}:main\n")
        zipped.writestr(info + "RECORD", "")
    return f"--hash=sha256:{sha256(path.read_bytes()).hexdigest()}"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in source folder, its packages in a folder of wheels that pip is configured for."""
    wheels, root = tmp_path / "wheels", tmp_path / "source"
    wheels.mkdir()
    wheel(wheels, "torch", "2.13.0", "cp312-cp312-win_amd64", ("small", "nvidia-x; sys_platform == 'linux'"))
    wheel(wheels, "torch", "2.13.0", "cp312-cp312-manylinux_2_28_x86_64")
    windows = wheel(wheels, "wide", "2.5", "cp38-abi3-win_amd64", ("quick; extra == 'fast'",))
    old, new = wheel(wheels, "small", "1.0"), wheel(wheels, "small", "1.1")
    (root / "src/whitetuner/__pycache__").mkdir(parents=True)
    (root / "src/whitetuner/__init__.py").write_text("", encoding="utf-8")
    (root / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
    (root / "constraints.txt").write_text("torch==2.13.0\n", encoding="utf-8")
    (root / "LICENSE").write_text("licence", encoding="utf-8")
    (root / "release.txt").write_text(
        "# made by hand\n"
        f"small==1.0 ; python_full_version < '3.12' \\\n    {old}\n"
        f"small==1.1 ; python_full_version >= '3.12' \\\n    {new} \\\n    --hash=sha256:{'0' * 64}\n"
        f"unix-only==1 ; sys_platform != 'win32' \\\n    --hash=sha256:{'0' * 64}\n"
        f"wide==2.5 ; platform_machine == 'AMD64' \\\n    {windows}\n"
        f"quick==1.0 \\\n    {wheel(wheels, 'quick', '1.0')}\n",
        encoding="utf-8",
    )
    config = tmp_path / "pip.conf"
    config.write_text(f"[global]\nno-index = true\nfind-links = {wheels}\n", encoding="utf-8")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_TARGET"):
        monkeypatch.delenv(name, raising=False)
    return root


def test_the_folder_holds_a_python_its_packages_and_a_start(root: Path, tmp_path: Path) -> None:
    said: list[str] = []
    archive = packed(tmp_path / "python-3.12.10-embed-amd64.zip", EMBEDDABLE)
    made = build(tmp_path / "白 色 (1) & more" / "portable", str(archive), "pip", said.append, root)
    python = made / "python"
    assert sorted(path.name for path in made.iterdir()) == ["LICENSE", "README.txt", "python", "start.bat"]
    assert {path.name for path in python.iterdir()} == {*EMBEDDABLE, "Lib"}
    site = python / "Lib/site-packages"
    assert {path.name for path in site.iterdir() if "." not in path.name} == {
        "whitetuner", "torch", "small", "wide", "quick",
    }  # fmt: skip
    assert "win_amd64" in (site / "torch/__init__.py").read_text(encoding="utf-8")
    assert {one.name: one.version for one in metadata.distributions(path=[str(site)])} == {
        "torch": "2.13.0", "small": "1.1", "wide": "2.5", "quick": "1.0",
    }  # fmt: skip
    assert not list(made.rglob("*.pyc")) and not list(made.rglob("__pycache__"))
    assert all(not path.is_symlink() for path in made.rglob("*"))
    # only paths below the folder itself, so that it can be moved; nothing of the machine's other Pythons
    lines = (python / "python312._pth").read_bytes().decode("ascii").split("\r\n")
    assert lines == ["python312.zip", "DLLs", "Lib", ".", "Lib\\site-packages", "import site", ""]
    assert "files, " in said[-1] and str(made) in said[-1]
    deepest = max(len(str(path.relative_to(made))) for path in made.rglob("*"))
    text = (made / "README.txt").read_bytes()
    assert text.startswith(b"\xef\xbb\xbf") and text.count(b"\r\n") == text.count(b"\n")
    assert f"at most {MAX_PATH - 1 - deepest} characters" in text.decode("utf-8-sig")
    assert (made / "start.bat").read_bytes() == START.replace("\n", "\r\n").encode()
    assert str(tmp_path) not in "".join(
        path.read_text("utf-8") for path in made.rglob("*") if path.suffix in (".bat", ".txt", "._pth", ".py")
    )


def test_the_start_works_from_any_path_and_hands_every_word_over() -> None:
    """What cmd.exe makes of it cannot be tried here; the rules that keep paths and words whole can be looked for."""
    lines = START.split("\n")
    code = [line for line in lines if not line.startswith("rem ")]
    assert lines[0] == "@echo off" and "setlocal EnableExtensions DisableDelayedExpansion" in lines
    assert 'set "HERE=%~dp0"' in code
    for line in code:
        # every use of the path in quotes; no block in brackets, which a `)` in a word or path would end
        assert "%HERE%" not in re.sub(r'"[^"]*"', "", line), line
        assert not line.rstrip().endswith("(") and not line.startswith(")"), line
        assert not re.search(r"\b[A-Za-z]:\\|mklink|pushd|!", line), line
    runs = [line for line in code if "-m whitetuner" in line]
    assert runs == [
        '"%HERE%python\\python.exe" -X utf8 -m whitetuner %*',
        '"%HERE%python\\python.exe" -X utf8 -m whitetuner gui',
    ]
    labels = {line[1:] for line in code if line.startswith(":")}
    assert {match[1] for line in code if (match := re.search(r"goto (\w+)", line))} == labels
    first = next(number for number, line in enumerate(lines) if not line.isascii())
    assert lines.index(":torn") < first  # what is not ASCII comes last


def test_a_whole_python_is_taken_without_its_pip_and_tests(tmp_path: Path) -> None:
    archive = packed(tmp_path / "cpython-3.11-install_only.tar.gz", WHOLE)
    target = unpack_python(archive, tmp_path / "python", ROOT)
    assert target == Target(11)
    held = {
        path.relative_to(tmp_path / "python").as_posix()
        for path in (tmp_path / "python").rglob("*")
        if path.is_file()
    }
    assert held == {
        "python.exe", "python311.dll", "python311._pth", "DLLs/_socket.pyd", "Lib/os.py", "Lib/venv/scripts/nt/python.exe",
    }  # fmt: skip
    assert not (tmp_path / "up.txt").exists()


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"python3": b"", "lib/os.py": b""}, "no Python for Windows in it"),
        ({"python.exe": program()}, "no Python for Windows in it"),
        (EMBEDDABLE | {"python.exe": program(0xAA64)}, "not for Windows on x86-64"),
        (EMBEDDABLE | {"python.exe": program(0x14C)}, "not for Windows on x86-64"),
        (EMBEDDABLE | {"python.exe": b"MZ"}, "not for Windows on x86-64"),
        ({"python.exe": program(), "python39.dll": b""}, "no Python for Windows in it"),
        ({"python.exe": program(), "python316.dll": b""}, "it holds Python 3.16"),
    ],
)
def test_an_archive_that_will_not_do_is_refused(tmp_path: Path, files: dict[str, bytes], told: str) -> None:
    with pytest.raises(UserError, match=told):
        unpack_python(packed(tmp_path / "a.zip", files), tmp_path / "python", ROOT)


def test_what_stands_in_the_way_is_told_and_leaves_nothing(root: Path, tmp_path: Path) -> None:
    archive = str(packed(tmp_path / "a.zip", EMBEDDABLE))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("", encoding="utf-8")
    torn = tmp_path / "torn.zip"
    torn.write_bytes(Path(archive).read_bytes()[:100])
    for folder, python, told in (
        ("full", archive, "something in"),
        ("a", str(tmp_path / "none.zip"), "no such file"),
        ("a", "http://127.0.0.1:9/python.zip", "not fetched unprotected"),
        ("a", "https://127.0.0.1:9/python.zip", "could not be fetched"),
        ("a", str(torn), "no archive that can be read"),
    ):
        with pytest.raises(UserError, match=told):
            build(tmp_path / folder, python, "pip", lambda text: None, root)
    # a wheel that is not the one of release.txt
    wheel(tmp_path / "wheels", "small", "1.1", requires=("other",))
    with pytest.raises(UserError, match=r"(?s)pip could not unpack.*"):
        build(tmp_path / "a", archive, "pip", lambda text: None, root)
    # a package that another one needs is in no line
    text = (root / "release.txt").read_text(encoding="utf-8")
    (root / "release.txt").write_text(text[: text.index("small==1.0")], encoding="utf-8")
    with pytest.raises(UserError, match=r"would not run: .*torch asks for small, there is none"):
        build(tmp_path / "a", archive, "pip", lambda text: None, root)
    assert not (tmp_path / "a").exists() and not list(tmp_path.glob(".a*"))
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["mine"]


def test_only_a_source_folder_builds_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = packed(tmp_path / "a.zip", EMBEDDABLE)
    site = tmp_path / "lib/site-packages/whitetuner/portable"
    site.mkdir(parents=True)
    shutil.copy(ROOT / "src/whitetuner/portable/build.py", site)
    monkeypatch.setattr("whitetuner.portable.build.__file__", str(site / "build.py"))
    assert main(["portable", str(tmp_path / "a"), "--python", str(archive)]) == 2
    assert "installed package" in capsys.readouterr().err


@pytest.mark.parametrize("minor", range(10, 15))
def test_the_packages_for_windows_are_those_of_the_release(minor: int) -> None:
    lines = packages(ROOT, Target(minor))
    heads = [line.split(" ")[0] for line in lines]
    names = [head.partition("==")[0] for head in heads]
    assert len(names) == len(set(names)) > 70
    assert {"colorama", "bitsandbytes", "gradio", "diffusers"} <= set(names)
    assert ("tomli" in names) == (minor < 11)
    assert all(re.fullmatch(r"[^\s;]+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+", line) for line in lines)
    assert all(Requirement(head) for head in heads)


def test_missing_looks_behind_extras_and_versions(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
    site = tmp_path / "site"
    for name, version, requires in (
        ("torch", "2.8", ""),
        ("small", "1", "Requires-Python: >=3.11\n"),
        ("wide", "2", "Requires-Dist: quick; extra == 'fast'\nRequires-Dist: slow; extra == 'other'\n"),
    ):
        info = site / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}"
        (info / "METADATA").write_text(text, encoding="utf-8")
    assert missing(site, Target(12), tmp_path) == [
        "whitetuner asks for torch>=2.9, there is 2.8",
        'wide asks for quick; extra == "fast", there is none',
    ]
    assert set(missing(site, Target(10), tmp_path)) - set(missing(site, Target(12), tmp_path)) == {
        "small runs on Python >=3.11, this is 3.10",
        'whitetuner asks for tomli>=2; python_version < "3.11", there is none',
    }
