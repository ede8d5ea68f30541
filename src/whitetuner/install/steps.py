"""The steps of an installation, in their order: environment, the right torch, all the rest, a proof that it loads."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from whitetuner.errors import EXIT_ENVIRONMENT, EXIT_USE, UserError
from whitetuner.install import environment as env
from whitetuner.install import machine
from whitetuner.install import torch_build as build
from whitetuner.tongue import say
from whitetuner.version import __version__

#: Of pyproject.toml's optional dependencies, what everybody gets: whatever the config can name works.
EXTRAS = ("all",)


@dataclass(frozen=True)
class Options:
    """None where the user said nothing: then what was said at an earlier start holds."""

    torch_index: str | None = None
    reuse_torch: bool | None = None
    here: bool = False
    again: bool = False


def install(environment: env.Environment, root: Path, options: Options, extras: set[str]) -> None:
    """Everything from an empty folder, or from a half-done one, to a record that says `ready`."""
    begun = time.monotonic()
    machine.refuse_unfit()
    before = environment.read()
    if options.again:
        before = _again(environment, before)
    known = bool(before.key)
    say(
        f"White Tuner {__version__} updates itself"
        if known
        else f"White Tuner {__version__} installs itself (only this once)"
    )
    active = os.environ.get("VIRTUAL_ENV") or os.environ.get("CONDA_PREFIX")
    if active and not options.here and Path(active) != environment.folder:
        say(f"  (the active environment {active} stays as it is; --here would use it)")
    there = _with_options(env.make(environment, before), options, extras)
    environment.write(there)
    if before.state == "installing" and (torn := env.heal(environment.site_packages)):
        say(f"  an earlier installation was interrupted; again: {', '.join(torn)}")
    if not environment.here and env.pip_version(environment) < env.OLDEST_PIP:
        env.pip(environment, ["install", "--upgrade", "pip"], root, None)

    pinned, constraints = pinned_torch(root), root / "constraints.txt"
    chosen, version = choose_torch(environment, there, options, pinned)
    if version != pinned.partition("==")[2]:
        constraints = _constraints_with(constraints, environment.folder, version)
    temporary = announce(environment, chosen, version, there.extras)
    there = _take_torch(environment, there, chosen, pinned, root, temporary)
    names = f"[{','.join(there.extras)}]" if there.extras else ""
    # `.` and not the path, which may hold brackets. Editable: the checkout stays the one truth, also a read-only one,
    # for the build backend writes nothing into it.
    env.pip(environment, ["install", "-c", str(constraints), "-e", f".{names}"], root, temporary)
    told = prove(environment)
    if temporary is not None:
        shutil.rmtree(temporary, ignore_errors=True)
    environment.write(replace(there, state="ready", key=env.pins_key(root), root=str(root)))
    say(f"installed in {time.monotonic() - begun:.0f} s: {told}")


def _again(environment: env.Environment, before: env.Installed) -> env.Installed:
    if environment.here or (not before.own and environment.folder.exists()):
        raise UserError(
            "--again throws away only what launch.py made, and {folder} is not its work",
            mend="remove it yourself, or leave --again out",
            code=EXIT_USE,
            folder=environment.folder,
        )
    env.remove(environment.folder)
    return replace(before, state="none", key="", torch_from=None)


def _with_options(there: env.Installed, options: Options, extras: set[str]) -> env.Installed:
    """What the user says now wins over what was said at an earlier start; extras add up."""
    index, reuse = there.torch_index, there.reuse_torch
    if options.torch_index is not None:
        index, reuse = options.torch_index, False
    if options.reuse_torch:
        index, reuse = None, True
    return replace(there, extras=sorted({*there.extras, *extras}), torch_index=index, reuse_torch=reuse)


def pinned_torch(root: Path) -> str:
    """The requirement `torch==VERSION` of constraints.txt."""
    for line in (root / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if re.match(r"torch\s*==", line):
            return line.split(";")[0].strip()
    raise AssertionError("constraints.txt pins torch; tests/unit/test_house.py holds that")


def _constraints_with(pins: Path, folder: Path, version: str) -> Path:
    """A copy of our pins, with that version of torch in place of ours."""
    lines = pins.read_text(encoding="utf-8").splitlines()
    lines = [f"torch=={version}" if re.match(r"torch\s*==", line) else line for line in lines]
    changed = folder / "whitetuner-constraints.txt"
    changed.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return changed


def choose_torch(
    environment: env.Environment, there: env.Installed, options: Options, pinned: str
) -> tuple[build.TorchBuild, str]:
    """Where torch comes from, and its version. One that is there and will do is kept, unless another is asked for."""
    ours = pinned.partition("==")[2]
    link = environment.site_packages / "whitetuner-reuse.pth"
    if there.reuse_torch and not environment.here:
        found = build.installed_torch()
        if found is None or not found.is_suitable:
            raise UserError(
                "--reuse-torch: this Python has {found}, and 2.9 or newer is needed",
                where=sys.executable,
                mend="start launch.py with the Python that has it, or leave --reuse-torch out",
                code=EXIT_ENVIRONMENT,
                found=f"torch {found.version}" if found else "no torch",
            )
        # A .pth, not --system-site-packages: that would look past a virtual environment which is active now.
        link.write_text(f"{found.folder}\n", encoding="utf-8")
        return build.TorchBuild(None, f"--reuse-torch: the one in {found.folder}", 0, 0), found.version
    link.unlink(missing_ok=True)
    present = next(environment.site_packages.glob("torch-*.dist-info"), None)
    version = present.name.removesuffix(".dist-info").partition("-")[2] if present else ""
    if present and options.torch_index is None:
        if version.partition("+")[0] == ours and there.torch_from != build.UNKNOWN:
            return build.TorchBuild(there.torch_from, "the one that is there already", 0, 0), ours
        if environment.here and build.FoundTorch(version, present.parent).is_suitable:
            return build.TorchBuild(None, "--here: the one that is there stays", 0, 0), version
    chosen = build.choose(sys.platform, machine.nvidia_driver(), there.torch_index)
    if chosen.index is None and sys.platform == "linux":
        chosen = with_what_pip_takes(chosen, environment, pinned)
    return chosen, ours


def with_what_pip_takes(
    chosen: build.TorchBuild, environment: env.Environment, pinned: str
) -> build.TorchBuild:
    """Asks pip which file it would take, since a mirror or a folder of wheels may hold another build than PyPI does."""
    flags = ["--dry-run", "--no-deps", "--ignore-installed", "--quiet", "--report", "-"]
    command = environment.command("-m", "pip", "--disable-pip-version-check", "install", *flags, pinned)
    done = subprocess.run(
        command, env=env.clean(os.environ), capture_output=True, text=True, errors="replace"
    )
    try:
        address = json.loads(done.stdout)["install"][0]["download_info"]["url"]
    except (ValueError, LookupError):
        return chosen  # the installation itself will say what is wrong
    if "cpu-" not in address.rpartition("/")[2]:
        return chosen
    download, disk = build.CPU_MB
    return replace(
        chosen, why=f"{chosen.why}, which is a build for the CPU", download_mb=download, disk_mb=disk
    )


def announce(
    environment: env.Environment, chosen: build.TorchBuild, version: str, extras: Sequence[str]
) -> Path | None:
    """Says what comes from where, how big it is and where it goes; raises UserError when the disk is too small.

    Returns a folder for pip's temporary files when the system's own one is too small for the download.
    """
    download, disk = chosen.download_mb + build.REST_MB[0], chosen.disk_mb + build.REST_MB[1]
    if "dev" in extras:
        download, disk = download + build.DEV_MB[0], disk + build.DEV_MB[1]
    free, is_first = machine.free_mb(environment.folder), not environment.read().key
    say(f"  into       {environment.folder} ({free / 1000:.1f} GB free)")
    say(f"  Python     {sys.version.split()[0]}, {sys.executable}")
    source = f" from {chosen.index}" if chosen.index and chosen.download_mb else ""
    say(f"  PyTorch    {version}{source} ({chosen.why})")
    if is_first:
        say(
            f"  download   about {download / 1000:.1f} GB (less what pip kept), {disk / 1000:.1f} GB on the disk"
        )
    else:
        say("  download   what has changed since the last installation")
    sys.stdout.flush()
    # What is kept in pip's cache and unpacked at the same time lies on the disk twice.
    needed = disk + download
    if is_first and free < needed:
        raise UserError(
            "not enough room: the installation needs {needed:.1f} GB, {free:.1f} GB are free",
            where=str(environment.folder),
            mend="free some space, or set the environment variable WHITETUNER_VENV to a folder on a larger disk",
            code=EXIT_ENVIRONMENT,
            needed=needed / 1000,
            free=free / 1000,
        )
    if machine.free_mb(Path(tempfile.gettempdir())) >= download:
        return None
    folder = environment.folder / "tmp"
    folder.mkdir(exist_ok=True)
    return folder


def _take_torch(
    environment: env.Environment,
    there: env.Installed,
    chosen: build.TorchBuild,
    pinned: str,
    root: Path,
    temporary: Path | None,
) -> env.Installed:
    """Torch first and alone where it has a source of its own, since these hold few other packages at our versions."""
    if chosen.download_mb == 0:
        return there
    changed = there.torch_from != chosen.index
    if chosen.index is None and not changed:
        return there  # comes with all the rest
    environment.write(replace(there, torch_from=build.UNKNOWN))
    words = ["install", "--no-deps", *(["--force-reinstall"] if changed else [])]
    try:
        source = ["--index-url", chosen.index] if chosen.index else []
        env.pip(environment, [*words, *source, chosen.requirement(pinned)], root, temporary)
    except UserError:
        if chosen.must or chosen.index is None:
            raise
        say(f"  {chosen.index} has none for this system: taking what pip finds")
        chosen = replace(chosen, index=None)
    there = replace(there, torch_from=chosen.index)
    environment.write(there)
    return there


def prove(environment: env.Environment) -> str:
    """Imports what was installed; returns a line about it. Raises UserError when it cannot be used."""
    code = (
        "import torch, whitetuner.version as v; g = torch.cuda.is_available();"
        "print(v.__version__, 'with PyTorch', torch.__version__, 'on', torch.cuda.get_device_name(0) if g else 'the CPU')"
    )
    command = environment.command("-c", code)
    done = subprocess.run(
        command, env=env.clean(os.environ), capture_output=True, text=True, errors="replace"
    )
    if done.returncode == 0:
        return "White Tuner " + done.stdout.strip().splitlines()[-1]
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if "DLL load failed" in last or "WinError 126" in last:
        raise UserError(
            "installed, but PyTorch does not load: {last}",
            mend="install the Microsoft Visual C++ Redistributable (x64) and start again",
            code=EXIT_ENVIRONMENT,
            last=last,
        )
    raise UserError(
        "installed, but PyTorch does not load: {last}",
        mend="python launch.py setup --again; if that does not help, another build: --torch-index cpu",
        code=EXIT_ENVIRONMENT,
        last=last,
    )
