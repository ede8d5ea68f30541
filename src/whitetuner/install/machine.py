"""What this machine is: its system, its NVIDIA driver, its disks. Facts only; torch_build and environment decide.

Standard library only, as the whole folder: it runs before anything is installed.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from whitetuner.errors import EXIT_ENVIRONMENT, UserError

# CUdevice_attribute, cuda.h
_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76


@dataclass(frozen=True)
class Driver:
    """An NVIDIA driver. cuda: the newest CUDA it runs, e.g. (13, 0); capability: of the first GPU; None = unknown."""

    cuda: tuple[int, int] | None = None
    capability: tuple[int, int] | None = None


def nvidia_driver() -> Driver | None:
    """Asks the driver's own library (no nvidia-smi needed: containers and WSL often lack it). None: there is no driver."""
    loaded = None
    for name in ("nvcuda.dll",) if os.name == "nt" else ("libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1"):
        try:
            loaded = ctypes.CDLL(name)
            break
        except OSError:
            continue
    if loaded is None:
        # A driver whose library is out of reach, e.g. between an update and the reboot.
        return Driver() if Path("/proc/driver/nvidia/version").exists() else None
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    if loaded.cuDriverGetVersion(ctypes.byref(version)) != 0 or version.value == 0:
        return None  # the stub of a CUDA toolkit, without a driver
    cuda = (version.value // 1000, version.value % 1000 // 10)
    if loaded.cuInit(0) != 0 or loaded.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        # The library alone proves no GPU: laptops with the card off, containers started without it.
        return Driver(cuda) if os.name == "nt" or Path("/proc/driver/nvidia/version").exists() else None
    major, minor = ctypes.c_int(0), ctypes.c_int(0)
    loaded.cuDeviceGetAttribute(ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, 0)
    loaded.cuDeviceGetAttribute(ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, 0)
    return Driver(cuda, (major.value, minor.value))


def refuse_unfit() -> None:
    """Raises UserError on systems that PyTorch ships no builds for, before anything is downloaded."""
    if sys.platform == "darwin" and platform.machine() == "x86_64":
        raise UserError(
            "PyTorch ships no builds for Macs with Intel processors since 2.3",
            mend="use a Mac with Apple silicon, Linux or Windows",
            code=EXIT_ENVIRONMENT,
        )
    if sys.platform == "linux":
        name, version = platform.libc_ver()
        if name != "glibc":
            raise UserError(
                "PyTorch ships no builds for this system's C library (musl, as in Alpine)",
                mend="use a distribution with glibc, e.g. a Debian or Ubuntu container",
                code=EXIT_ENVIRONMENT,
            )
        if tuple(int(part) for part in version.split(".")[:2]) < (2, 28):
            raise UserError(
                "PyTorch needs glibc 2.28 or newer; this system has {version}",
                mend="use Debian 10, Ubuntu 18.10, RHEL 8 or anything newer",
                code=EXIT_ENVIRONMENT,
                version=version,
            )


def is_externally_managed() -> bool:
    """Whether the system's package manager owns this Python (PEP 668) and pip would refuse to install into it."""
    return (
        sys.prefix == sys.base_prefix and (Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED").exists()
    )


def venv_package() -> str:
    """The command that installs what Python's venv module lacks on this system."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    system = ""
    release = Path("/etc/os-release")
    if release.exists():
        system = release.read_text(encoding="utf-8", errors="replace").lower()
    if "debian" in system or "ubuntu" in system:
        return f"sudo apt install python{python}-venv"
    if "suse" in system:
        return f"sudo zypper install python{python.replace('.', '')}-virtualenv"
    if "fedora" in system or "rhel" in system:
        return "sudo dnf install python3-virtualenv"
    if "arch" in system:
        return "sudo pacman -S python-virtualenv"
    return f"{sys.executable} -m pip install --user virtualenv"


def is_writable(folder: Path) -> bool:
    """Whether a file can really be made there: permissions, read-only mounts and ACLs answer differently to os.access."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def has_long_paths() -> bool:
    """Whether paths over 260 characters work: everywhere but on a Windows that was not told to."""
    if sys.platform == "win32":
        import winreg

        try:
            with winreg.OpenKey(
                winreg.HKEY_LOCAL_MACHINE, r"SYSTEM\CurrentControlSet\Control\FileSystem"
            ) as key:
                return bool(winreg.QueryValueEx(key, "LongPathsEnabled")[0])
        except OSError:
            return False
    else:
        return True


def user_folder() -> Path:
    """The folder for this user's program data, made nowhere here."""
    home = Path.home()
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData/Local") / "whitetuner"
    if sys.platform == "darwin":
        return home / "Library/Application Support/whitetuner"
    return Path(os.environ.get("XDG_DATA_HOME") or home / ".local/share") / "whitetuner"


def free_mb(folder: Path) -> int:
    """Free megabytes (10^6 bytes) on the disk of the folder, or of its nearest parent that exists."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free // 10**6
