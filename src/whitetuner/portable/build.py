"""`python launch.py portable DEST`: a folder for Windows with its own Python, to unpack anywhere and start by start.bat.

    DEST/
        start.bat                  runs python\\python.exe -m whitetuner, by paths relative to itself
        README.txt                 the few words that its user needs
        python/                    a Python for Windows as its publisher packed it
        python/python312._pth      where it looks for modules: here alone, whatever else is installed on the machine
        python/Lib/site-packages/  White Tuner, PyTorch, the packages of release.txt

Can be built on any system: the packages are those of release.txt, chosen for Windows, checked by their hashes and unpacked by
pip; nothing of the target is run. So what each of them asks for is looked up again at the end.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from whitetuner.errors import EXIT_ENVIRONMENT, EXIT_FAILED, UserError
from whitetuner.portable.packages import Say, missing, take_packages
from whitetuner.portable.target import unpack_python, write_windows
from whitetuner.version import __version__

#: Longest path that every Windows takes, its end mark counted.
MAX_PATH = 259
START = r"""@echo off
rem Starts White Tuner with the Python of this folder. The folder may lie anywhere and be moved.
rem No delayed expansion, so that ! in paths and arguments stays what it is.
setlocal EnableExtensions DisableDelayedExpansion
chcp 65001 >nul 2>nul
set "HERE=%~dp0"
if not exist "%HERE%python\python.exe" goto torn
if "%~1"=="" goto page
"%HERE%python\python.exe" -X utf8 -m whitetuner %*
set "CODE=%ERRORLEVEL%"
goto ended

:page
"%HERE%python\python.exe" -X utf8 -m whitetuner gui
set "CODE=%ERRORLEVEL%"
goto ended

:ended
rem The window of a double click stays open when something went wrong; 130 is a stop that was asked for.
if not "%CODE%"=="0" if not "%CODE%"=="130" if not defined CI pause
exit /b %CODE%

rem Last, since some versions of Windows lose count of what follows a line that is not ASCII.
:torn
echo error: python\python.exe is not beside start.bat
echo   -^> unpack the whole folder again and start it from there, not from inside of the archive
set "CODE=3"
echo 错误：start.bat 旁边没有 python\python.exe，请把整个文件夹重新解压
goto ended
"""
README = """White Tuner {version}, PyTorch {torch}, Python {python}

start.bat                 the page in the browser
start.bat demo            teaches an embedded model a new word in three minutes and checks it
start.bat train my.toml   any word of the program; start.bat --help lists them

Unpack the folder where its path is at most {room} characters long, for instance C:\\whitetuner.
Does PyTorch not load? Install the Microsoft Visual C++ Redistributable (x64).
A newer version: unpack it as a new folder and move your output folder into it; what the page remembers lies in your
user's folder and is found again.

双击 start.bat 打开页面。请解压到路径不超过 {room} 个字符的地方，例如 C:\\whitetuner。
PyTorch 无法加载时，请安装 Microsoft Visual C++ Redistributable (x64)。
升级：把新版本解压成新文件夹，再把 output 文件夹移过去；页面的设置保存在用户目录里，会自动找到。
"""


def build(folder: Path, python: str, torch_index: str, say: Say, root: Path | None = None) -> Path:
    """Makes the folder; returns it.

    python: a .zip or .tar.gz with python.exe in it, or its https address; torch_index: as launch.py's --torch-index;
    root: the source folder
    Raises UserError for a folder that is in use, an archive that will not do, packages that cannot be had.
    """
    root = source_folder() if root is None else root
    begun = time.monotonic()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            "there is something in {path} already",
            where="DEST",
            mend="give another folder, or empty it",
            path=folder,
        )
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            "this Python has no pip, which unpacks the packages",
            where=sys.executable,
            mend="start it as `python launch.py portable DEST --python FILE`, or install pip into this environment",
            code=EXIT_ENVIRONMENT,
        )
    partial = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(partial, ignore_errors=True)
    site = partial / "python" / "Lib" / "site-packages"
    try:
        site.mkdir(parents=True)
        with tempfile.TemporaryDirectory() as name:
            archive = _fetched(python, Path(name), say)
            target = unpack_python(archive, partial / "python", root)
        say(f"Python 3.{target.minor} of {archive.name}")
        torch = take_packages(site, target, root, torch_index, say)
        shutil.copytree(
            root / "src/whitetuner", site / "whitetuner", ignore=shutil.ignore_patterns("__pycache__")
        )
        (partial / "LICENSE").write_bytes((root / "LICENSE").read_bytes())
        lacking = missing(site, target, root)
        if lacking:
            raise UserError(
                "the folder would not run: {lacking}",
                where="release.txt",
                mend="make release.txt anew; its head says how",
                code=EXIT_FAILED,
                lacking="; ".join(lacking),
            )
        files = [path for path in partial.rglob("*") if path.is_file()]
        deepest = max(len(path.relative_to(partial).as_posix()) for path in files)
        words = {"version": __version__, "torch": torch, "python": f"3.{target.minor}"}
        write_windows(
            partial / "README.txt", README.format(**words, room=MAX_PATH - 1 - deepest), "utf-8-sig"
        )
        write_windows(partial / "start.bat", START, "utf-8")
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    say(
        f"{folder}: {len(files)} files, {size / 1e6:.0f} MB, {time.monotonic() - begun:.0f} s; pack it as it is"
    )
    return folder


def source_folder() -> Path:
    """The checkout or unpacked sdist that this program runs from. Raises UserError for an installed wheel."""
    root = Path(__file__).resolve().parents[3]
    if not all((root / name).is_file() for name in ("release.txt", "pyproject.toml", "constraints.txt")):
        raise UserError(
            "a portable folder is built from White Tuner's source, and this is an installed package",
            mend="clone the repository, or unpack the sdist, and run there: python launch.py portable DEST --python FILE",
        )
    return root


def _fetched(python: str, place: Path, say: Say) -> Path:
    """The archive as a file."""
    if not re.match(r"https?://", python):
        if not Path(python).is_file():
            raise UserError(
                "there is no such file",
                where="--python",
                mend="give python.org's embeddable package (python-3.12.N-embed-amd64.zip), a build of "
                "python-build-standalone (x86_64-pc-windows-msvc-install_only.tar.gz), or the address of one",
            )
        return Path(python)
    if not python.startswith("https://"):
        raise UserError(
            "what is run on another machine is not fetched unprotected",
            where="--python",
            mend="give an https address, or a file",
        )
    path = place / (python.rpartition("/")[2] or "python.zip")
    say(f"fetching {python}")
    try:
        with urllib.request.urlopen(python, timeout=60) as reply, path.open("wb") as file:
            shutil.copyfileobj(reply, file)
    except OSError as error:
        raise UserError(
            "{address} could not be fetched ({reason})",
            where="--python",
            mend="check the connection, or fetch it with a browser and give the file",
            code=EXIT_ENVIRONMENT,
            address=python,
            reason=error,
        ) from error
    return path
