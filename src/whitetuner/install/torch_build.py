"""Which build of PyTorch fits this machine, where it comes from, how big it is.

The default wheel is a CUDA build on Linux and a CPU build on Windows; PyTorch's own indexes hold the others
(pytorch/RELEASE.md: 2.13 ships CUDA 12.6 and 13.0, CUDA 13 needs compute capability 7.5, 12.6 ends at 9.0).
"""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from whitetuner.install.machine import Driver

INDEXES = "https://download.pytorch.org/whl/"
PIP = "pip"
#: Stands in the record while torch is being replaced.
UNKNOWN = "?"
OLDEST_TORCH = (2, 9)

#: Megabytes of torch with its CUDA libraries: (download, on disk afterwards). Seen for 2.13.0; CUDA ones rounded up.
CPU_MB, LINUX_CUDA_MB, WINDOWS_CUDA_MB, MAC_MB = (195, 750), (2750, 6500), (2000, 4700), (115, 450)
#: The same for all other packages.
REST_MB = (250, 850)
DEV_MB = (150, 400)


@dataclass(frozen=True)
class TorchBuild:
    """index: where torch alone is taken from; None = what pip is configured for. why: one sentence for the user.
    download_mb, disk_mb: about. must: no other source will do, so a failing index ends the installation."""

    index: str | None
    why: str
    download_mb: int
    disk_mb: int
    must: bool = False

    def requirement(self, pinned: str) -> str:
        """`torch==VERSION`, and exactly this build where the index is PyTorch's own, which name it in the version.

        Otherwise a folder of wheels in pip's configuration could put a build for the CPU in the place of one for CUDA.
        """
        if self.index is None or not self.index.startswith(INDEXES):
            return pinned
        return f"{pinned}+{self.index.rstrip('/').rpartition('/')[2]}"


def index_url(name: str) -> str | None:
    """`cpu`, `cu130` and the like are PyTorch's own indexes, `pip` is pip's configuration, anything else an address."""
    if name == PIP:
        return None
    return name if "/" in name else INDEXES + name


def choose(system: str, driver: Driver | None, asked: str | None = None) -> TorchBuild:
    """system: sys.platform. asked: the user's --torch-index, which wins. Asks the network only for Linux without NVIDIA."""
    if asked is not None:
        size = (
            CPU_MB
            if asked.rstrip("/").endswith("cpu")
            else LINUX_CUDA_MB
            if system == "linux"
            else WINDOWS_CUDA_MB
        )
        return TorchBuild(index_url(asked), "as --torch-index says", *size, must=asked != PIP)
    if system == "darwin":
        return TorchBuild(None, "macOS has one build", *MAC_MB)
    if driver is None:
        if system != "linux":
            return TorchBuild(None, "no NVIDIA driver: the default build, for the CPU", *CPU_MB)
        cpu = INDEXES + "cpu"
        if answers(cpu):
            return TorchBuild(cpu, "no NVIDIA driver: the build for the CPU", *CPU_MB)
        why = f"no NVIDIA driver, and {cpu} did not answer within 5 s: what pip finds"
        return TorchBuild(None, why, *LINUX_CUDA_MB)
    name, why = _cuda_build(driver)
    if system == "linux":
        return TorchBuild(
            None if name == "cu130" else INDEXES + name, why, *LINUX_CUDA_MB, must=name != "cu130"
        )
    return TorchBuild(INDEXES + name, why, *WINDOWS_CUDA_MB, must=True)


def _cuda_build(driver: Driver) -> tuple[str, str]:
    old_card = driver.capability is not None and driver.capability < (7, 5)
    new_card = driver.capability is not None and driver.capability >= (10, 0)
    if driver.cuda is None:
        return "cu130", "an NVIDIA driver of unknown version: CUDA 13.0"
    version = f"{driver.cuda[0]}.{driver.cuda[1]}"
    if old_card:
        return "cu126", f"NVIDIA driver for CUDA {version}, card older than CUDA 13 serves: CUDA 12.6"
    if driver.cuda >= (13, 0):
        return "cu130", f"NVIDIA driver for CUDA {version}: CUDA 13.0"
    if new_card or driver.cuda < (12, 0):
        name = "cu130" if new_card else "cu126"
        return (
            name,
            f"NVIDIA driver for CUDA {version}, too old for this PyTorch: PLEASE UPDATE THE DRIVER (580 or newer), "
            "or the GPU stays unused",
        )
    return "cu126", f"NVIDIA driver for CUDA {version}: CUDA 12.6"


def answers(index: str, seconds: float = 5.0) -> bool:
    """Whether the index serves torch, within so many seconds in all (name look-up included, hence the thread)."""
    found: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(index.rstrip("/") + "/torch/", method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=seconds) as reply:
                found.append(reply.status == 200)
        except (urllib.error.URLError, OSError, ValueError):
            found.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(found and found[0])


@dataclass(frozen=True)
class FoundTorch:
    """A torch that is already there. version: e.g. "2.13.0+cpu"; folder: the site-packages that holds it."""

    version: str
    folder: Path

    @property
    def is_suitable(self) -> bool:
        return tuple(int(part) for part in self.version.split(".")[:2]) >= OLDEST_TORCH


def installed_torch() -> FoundTorch | None:
    """The torch of the Python that runs this."""
    try:
        found = metadata.distribution("torch")
    except metadata.PackageNotFoundError:
        return None
    return FoundTorch(found.version, Path(str(found.locate_file(""))))
