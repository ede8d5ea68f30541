"""The Python environment that White Tuner lives in: where it is, how it is made, what was installed into it.

A small JSON file in the environment, written as `installing` before and as `ready` after the work, tells a whole
installation from an interrupted one and remembers the options it was made with.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from whitetuner.errors import EXIT_ENVIRONMENT, UserError
from whitetuner.install import machine
from whitetuner.tongue import say

#: pip 21.3 is the first that installs editable projects without a setup.py; 22.2 the first with --report.
OLDEST_PIP = (22, 2)
#: Longest folder on a Windows without long paths: torch's own files go 150 characters deeper.
LONGEST_WINDOWS_FOLDER = 100


@dataclass(frozen=True)
class Installed:
    """What the record in an environment says. key: hash of the pins; base: the Python that it stands on."""

    state: str = "none"  # none | installing | ready
    own: bool = False  # made by us, so that we may make it anew
    key: str = ""
    root: str = ""
    base: str = ""
    extras: list[str] = field(default_factory=list)
    torch_index: str | None = None  # the user's --torch-index
    reuse_torch: bool = False
    torch_from: str | None = None  # where the torch in it came from; None = what pip is configured for


@dataclass(frozen=True)
class Environment:
    """folder: a virtual environment, or with --here the prefix of the Python that runs this."""

    folder: Path
    here: bool = False

    @property
    def python(self) -> Path:
        if self.here:
            return Path(sys.executable)
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def command(self, *words: str) -> list[str]:
        """This environment's Python with arguments; apart (-I) from PYTHON* variables and the current folder's modules.

        Not apart with --here: there pip may live in the user's own site-packages. UTF-8, since Python before 3.13
        reads the .pth of an editable installation in the system's code page, and the checkout's path may be Chinese.
        """
        return [str(self.python), "-X", "utf8", *([] if self.here else ["-I"]), *words]

    @property
    def record(self) -> Path:
        return self.folder / "whitetuner-install.json"

    @property
    def site_packages(self) -> Path:
        if self.here:
            return Path(sysconfig.get_path("purelib"))
        if os.name == "nt":
            return self.folder / "Lib/site-packages"
        return next(
            iter(sorted(self.folder.glob("lib/python3*/site-packages"))), self.folder / "lib/site-packages"
        )

    def read(self) -> Installed:
        try:
            return Installed(**json.loads(self.record.read_text(encoding="utf-8")))
        except (
            OSError,
            ValueError,
            TypeError,
        ):  # absent, torn, or another version's: as if nothing were installed
            return Installed()

    def write(self, installed: Installed) -> None:
        beside = self.record.with_suffix(".new")
        beside.write_text(json.dumps(asdict(installed), indent=1), encoding="utf-8")
        os.replace(beside, self.record)

    def base_is_there(self, installed: Installed) -> bool:
        """False when the Python below the environment was removed or became another one (a system upgrade)."""
        return self.python.exists() and (os.name == "nt" or os.path.realpath(self.python) == installed.base)


def pins_key(root: Path) -> str:
    """Changes whenever something else would be installed."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def choose_folder(root: Path) -> Path:
    """WHITETUNER_VENV, else .venv in the checkout, else (read-only, or too deep for Windows) a folder of the user's."""
    if given := os.environ.get("WHITETUNER_VENV"):
        return Path(given).absolute()
    beside = root / ".venv"
    too_deep = len(str(beside)) > LONGEST_WINDOWS_FOLDER and not machine.has_long_paths()
    if not too_deep and machine.is_writable(beside if beside.is_dir() else root):
        return beside
    return machine.user_folder() / "venvs" / hashlib.sha256(str(root).encode()).hexdigest()[:12]


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Lets one installation at a time into the folder; the second waits and then finds it done."""
    path = folder.parent / (folder.name + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        told = False
        while not _try_lock(file.fileno()):
            if not told:
                say(f"another start is installing into {folder}; waiting for it")
                told = True
            time.sleep(0.5)
        yield  # closing the file unlocks it, and so does the end of the process


def _try_lock(handle: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(handle, 0, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


#: Fails where a kill left pip half-unpacked: it imports then as a package of a few files. What unpacks it writes RECORD last.
#: Only asked of environments of ours: a distribution's pip may come without.
WHOLE_PIP = "import sys, pip._internal.cli.main, importlib.metadata as m; sys.exit(not m.files('pip'))"


def make(environment: Environment, before: Installed) -> Installed:
    """A working environment with pip in it, made anew where that is ours to do; returns its record, `installing`."""
    folder = environment.folder
    if environment.here:
        if not machine.is_writable(folder):
            raise UserError(
                "--here: {folder} may not be written",
                mend="leave --here out: White Tuner then makes its own environment",
                code=EXIT_ENVIRONMENT,
                folder=folder,
            )
        return replace(before, state="installing", own=False, base=os.path.realpath(sys.executable))
    usable = environment.python.exists() and _runs(
        environment.python, WHOLE_PIP if before.own else "import pip"
    )
    if usable and before.own and before.base and not environment.base_is_there(before):
        usable = False
    if usable:
        return replace(before, state="installing", base=os.path.realpath(environment.python))
    if folder.exists() and any(folder.iterdir()) and not before.own:
        raise UserError(
            "{folder} is in the way: it was not made by launch.py and has no working Python with pip",
            mend="move it away, or name another folder in the environment variable WHITETUNER_VENV",
            code=EXIT_ENVIRONMENT,
            folder=folder,
        )
    remove(folder)
    folder.mkdir(parents=True)
    # The mark comes first: what is interrupted from here on is known as ours.
    environment.write(Installed(state="installing", own=True))
    _create(folder)
    fresh = replace(before, state="installing", own=True, key="", torch_from=None)
    return replace(fresh, base=os.path.realpath(environment.python))


def remove(folder: Path) -> None:
    """Deletes an environment of ours; raises UserError when a program still runs in it (Windows)."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(
            "cannot remove {folder}: {reason}",
            mend="close the programs that run from it (a training, the page, an editor) and start again",
            code=EXIT_ENVIRONMENT,
            folder=folder,
            reason=error,
        ) from None


def _create(folder: Path) -> None:
    """Tries venv, virtualenv, uv and the pip at hand, in this order, for a virtual environment with pip."""
    # From inside the very environment that is made anew, only the Python below it survives.
    here = getattr(sys, "_base_executable", sys.executable) if Path(sys.prefix) == folder else sys.executable
    ways: list[list[list[str]]] = []
    if importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip"):
        ways.append([[here, "-I", "-m", "venv", str(folder)]])
    if importlib.util.find_spec("virtualenv"):
        ways.append([[here, "-m", "virtualenv", "--quiet", str(folder)]])
    elif program := shutil.which("virtualenv"):
        ways.append([[program, "--quiet", "--python", here, str(folder)]])
    if program := shutil.which("uv"):
        # --allow-existing: our mark lies in the folder already.
        ways.append(
            [[program, "venv", "--quiet", "--seed", "--allow-existing", "--python", here, str(folder)]]
        )
    if importlib.util.find_spec("venv") and importlib.util.find_spec("pip"):
        python = str(Environment(folder).python)
        bare = [here, "-I", "-m", "venv", "--without-pip", str(folder)]
        ways.append([bare, [here, "-m", "pip", "--quiet", "--python", python, "install", "pip"]])
    said = ""
    for way in ways:
        for command in way:
            done = subprocess.run(
                command, env=clean(os.environ), capture_output=True, text=True, errors="replace"
            )
            if done.returncode != 0:
                said = (done.stderr or done.stdout).strip()
                break
        else:
            if _runs(Environment(folder).python, "import pip"):
                return
    if said:
        raise UserError(
            "making the environment {folder} failed: {said}",
            where=here,
            mend="mend that, or set WHITETUNER_VENV to another folder. Where the venv module is incomplete: {command}",
            code=EXIT_ENVIRONMENT,
            folder=folder,
            said=said.splitlines()[-1],
            command=machine.venv_package(),
        )
    raise UserError(
        "this Python cannot make an environment: its venv or ensurepip module is missing, and virtualenv and uv too",
        where=here,
        mend="{command}, then start again. Or use an environment of your own with --here",
        code=EXIT_ENVIRONMENT,
        command=machine.venv_package(),
    )


def _runs(python: Path, code: str) -> bool:
    try:
        done = subprocess.run([str(python), "-I", "-c", code], capture_output=True, env=clean(os.environ))
    except OSError:
        return False
    return done.returncode == 0


def clean(variables: os._Environ[str] | dict[str, str]) -> dict[str, str]:
    """Without what would lead Python or pip out of the environment; all else of pip's configuration stays."""
    led_astray = ("PYTHONHOME", "PYTHONPATH", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "__PYVENV_LAUNCHER__")
    return {name: value for name, value in variables.items() if name not in led_astray} | {"PIP_USER": "0"}


def pip_version(environment: Environment) -> tuple[int, ...]:
    """(major, minor) of the pip in the environment."""
    command = environment.command("-m", "pip", "--version")
    done = subprocess.run(command, env=clean(os.environ), capture_output=True, text=True, check=True)
    return tuple(int(part) for part in done.stdout.split()[1].split(".")[:2])


def pip(environment: Environment, words: Sequence[str], root: Path, temporary: Path | None) -> None:
    """Runs pip in the checkout; it speaks to the screen, and in full to a log. Raises UserError with the likely mend."""
    log = environment.folder / "whitetuner-pip.log"
    log.unlink(missing_ok=True)
    quiet = [] if sys.stdout.isatty() else ["--quiet", "--progress-bar=off"]
    command = environment.command(
        "-m", "pip", "--disable-pip-version-check", *words, *quiet, "--log", str(log)
    )
    variables = clean(os.environ) | ({"TMPDIR": str(temporary), "TEMP": str(temporary)} if temporary else {})
    if subprocess.run(command, cwd=root, env=variables).returncode != 0:
        raise explain(log.read_text(encoding="utf-8", errors="replace") if log.exists() else "", log)


def explain(text: str, log: Path) -> UserError:
    """From pip's own log to what happened and how to mend it."""
    where, tail = str(log) if text else "", text[-40000:]

    def seen(*signs: str) -> bool:
        return any(sign in tail for sign in signs)

    if seen("No space left on device", "Errno 28", "WinError 112"):
        return UserError(
            "the disk is full",
            where=where,
            mend="free some space (`pip cache purge` helps) and start again; or set WHITETUNER_VENV to a folder elsewhere",
            code=EXIT_ENVIRONMENT,
        )
    if seen("CERTIFICATE_VERIFY_FAILED", "SSLCertVerificationError"):
        return UserError(
            "the secure connection was refused, as behind a company's proxy or with a wrong clock",
            where=where,
            mend="give pip the proxy's certificate (pip config set global.cert FILE.pem) and start again",
            code=EXIT_ENVIRONMENT,
        )
    if seen("NewConnectionError", "NameResolutionError", "ConnectTimeout", "ReadTimeout", "ProxyError"):
        return UserError(
            "the package source could not be reached",
            where=where,
            mend="check the connection and start again, it goes on. Another source: pip config set global.index-url URL, "
            "for torch --torch-index URL (or pip: whatever pip is configured for)",
            code=EXIT_ENVIRONMENT,
        )
    if seen("No matching distribution found", "ResolutionImpossible"):
        return UserError(
            "the package source has no build of a package for this system (the lines above name it)",
            where=where,
            mend="take another Python (3.12) or another source: pip config set global.index-url URL, for torch "
            "--torch-index URL (or pip: whatever pip is configured for)",
            code=EXIT_ENVIRONMENT,
        )
    if seen("Permission denied", "Errno 13", "WinError 5", "WinError 32"):
        return UserError(
            "a file could not be written",
            where=where,
            mend="close the programs that run from {folder}, look at its owner, and start again",
            code=EXIT_ENVIRONMENT,
            folder=log.parent,
        )
    return UserError(
        "pip could not install White Tuner; its last lines say why",
        where=where,
        mend="mend that and start again: it goes on where it was",
        code=EXIT_ENVIRONMENT,
    )


def heal(site_packages: Path) -> list[str]:
    """After an interrupted pip: takes away the records of half-unpacked packages, so that pip installs them again.

    pip writes RECORD last and parks what it replaces in folders that begin with `~`. Returns the names taken away.
    """
    parked = set(site_packages.glob("~*"))
    torn = {path for path in site_packages.glob("*.dist-info") if not (path / "RECORD").exists()} - parked
    for path in parked | torn:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return sorted(path.name.split("-")[0] for path in torn)
