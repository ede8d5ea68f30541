"""Where a finished run's file goes: into ComfyUI's folder, under the run's name, over nothing that is there."""

from __future__ import annotations

import filecmp
import shutil
from pathlib import Path

from whitetuner.errors import EXIT_ENVIRONMENT, UserError
from whitetuner.gui.settings import Settings
from whitetuner.runs.files import replace, write_atomically
from whitetuner.runs.folder import RunFolder
from whitetuner.runs.jobs import Job
from whitetuner.runs.state import state_folder

_REMEMBERED = "comfyui.txt"


def comfyui_folder() -> str:
    """The folder used last, "" before the first time."""
    try:
        return (state_folder() / _REMEMBERED).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def copy_to_comfyui(settings: Settings, job: Job, given: str) -> Path:
    """Copies final/NAME.safetensors to models/loras (a full model: models/diffusion_models); returns the copy.

    A different file of that name stays, the copy is then NAME-2. Raises UserError for a folder that is not ComfyUI's and for a
    run without a final file.
    """
    root = settings.paths().path(given or comfyui_folder())
    models = next((one for one in (root / "models", root) if (one / "loras").is_dir()), None)
    if models is None:
        raise UserError(
            "there is no models/loras in it",
            where=str(root),
            mend="choose the folder that ComfyUI is installed in",
        )
    folder = RunFolder(Path(job.run))
    source = folder.final / f"{Path(job.run).name}.safetensors"
    if not source.is_file():
        raise UserError("this run has no final file yet", where=job.run, mend="let it run to its end")
    kind = folder.document()["config"]["method"]["kind"]
    target = models / ("diffusion_models" if kind == "full" else "loras")
    try:
        target.mkdir(exist_ok=True)
        for number in range(1, 1000):
            name = source.stem if number == 1 else f"{source.stem}-{number}"
            path = target / f"{name}.safetensors"
            if path.exists() and not filecmp.cmp(source, path, shallow=False):
                continue
            if not path.exists():
                beside = path.with_name(f".{path.name}.writing")
                shutil.copyfile(source, beside)
                replace(beside, path)
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
