"""Where a finished run's file goes: into ComfyUI's folder, under the run's name, over nothing that is there."""

from __future__ import annotations

import filecmp
import shutil
from pathlib import Path

from whitetuner.errors import EXIT_ENVIRONMENT, UserError
from whitetuner.families import registry
from whitetuner.gui.pickers import Roots
from whitetuner.gui.settings import Settings
from whitetuner.runs.files import inside, replace, write_atomically
from whitetuner.runs.folder import RunFolder
from whitetuner.runs.jobs import Job
from whitetuner.runs.listing import row_of
from whitetuner.runs.state import state_folder

_REMEMBERED = "comfyui.txt"


def comfyui_folder(roots: Roots) -> str:
    """The folder used last; "" before the first time, and where it is none that this page may use."""
    try:
        found = (state_folder() / _REMEMBERED).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return found if found and roots.allows(Path(found)) else ""


def comfyui_loads(family: str) -> bool:
    """Whether ComfyUI loads this family's models; True for a run that does not tell its family."""
    return family not in registry.FAMILIES or registry.spec(family).comfyui_loads


def copy_to_comfyui(settings: Settings, job: Job, given: str) -> Path:
    """Copies final/NAME.safetensors to models/loras (a full model: models/diffusion_models); returns the copy.

    A different file of that name stays, the copy is then NAME-2. Raises UserError for a folder that is not ComfyUI's and for a
    run without a final file, and for models/loras that lead out of the folders which the page may use.
    """
    roots = settings.paths()
    family = row_of(job)["family"]
    if not comfyui_loads(family):
        raise UserError(
            "ComfyUI does not load {title}, and so not its adapters",
            where=job.run,
            mend="draw with `whitetuner sample`, or load the file of final/ that ends in _diffusers with diffusers",
            title=registry.spec(family).title,
        )
    root = roots.path(given or comfyui_folder(roots))
    models = next((one for one in (root / "models", root) if (one / "loras").is_dir()), None)
    if models is None:
        raise UserError(
            "there is no models/loras in it",
            where=str(root),
            mend="choose the folder that ComfyUI is installed in",
        )
    folder = RunFolder(Path(job.run))
    source = inside(folder.path, folder.final / f"{folder.path.name}.safetensors")
    if source is None:
        raise UserError("this run has no final file yet", where=job.run, mend="let it run to its end")
    kind = folder.document()["config"].get("method", {}).get("kind")
    target = roots.path(str(models / ("diffusion_models" if kind == "full" else "loras")))
    try:
        target.mkdir(exist_ok=True)
        for number in range(1, 1000):
            name = folder.path.name if number == 1 else f"{folder.path.name}-{number}"
            path = target / f"{name}.safetensors"
            if path.exists() and not filecmp.cmp(source, path, shallow=False):
                continue
            if not path.exists():
                _copy(source, path)
            write_atomically(state_folder() / _REMEMBERED, str(root))
            return path
    except OSError as error:
        raise UserError(
            "the file cannot be copied ({reason})",
            where=str(target),
            mend="make room there, or mend the folder's rights",
            code=EXIT_ENVIRONMENT,
            reason=error.strerror or error,
        ) from error
    raise UserError("there are a thousand files of this name", where=str(target), mend="clear the folder")


def _copy(source: Path, path: Path) -> None:
    """Whole or not there; what a kill left beside it is no way to anywhere else."""
    beside = path.with_name(f".{path.name}.writing")
    beside.unlink(missing_ok=True)
    try:
        shutil.copyfile(source, beside)
        replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
