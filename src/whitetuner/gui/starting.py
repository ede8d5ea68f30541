"""From a form, a run or nothing at all to a training in a process of its own."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from PIL import Image

from whitetuner.errors import UserError
from whitetuner.gui.forms import to_train
from whitetuner.gui.settings import Settings
from whitetuner.gui.training_tabs import tab_of
from whitetuner.nano.draw import NEW_SHAPE, NEW_WORD, draw_set
from whitetuner.runs import jobs, start
from whitetuner.runs.files import write_atomically
from whitetuner.runs.folder import RunFolder
from whitetuner.runs.jobs import Job

P = ParamSpec("P")
T = TypeVar("T")
_STARTING = threading.Lock()
#: The trial: pictures of the new word, of what the model knows, steps, steps between previews.
_NEW, _OLD, _STEPS, _EVERY = 32, 256, 300, 25
_PROMPTS = (
    f"a red {NEW_WORD} on a white background",
    f"a big blue {NEW_WORD} on a yellow background",
    "a red circle on a white background",
    "a green triangle on a black background",
)


def _one_at_a_time(start_one: Callable[P, T]) -> Callable[P, T]:
    """Between the look at a folder and the start into it nobody else may start: two clicks would share one folder."""

    @wraps(start_one)
    def alone(*args: P.args, **kwargs: P.kwargs) -> T:
        with _STARTING:
            return start_one(*args, **kwargs)

    return alone


@_one_at_a_time
def start_form(settings: Settings, tab: str, text: str, gpus: str, existing: str) -> dict[str, Any]:
    """Starts what a form shows: {id}, or {exists, name, other} when a run is in its folder and nothing was said about it.

    existing: "" (ask), "resume" or "other" (beside it, under the next free name). Raises UserError(s).
    """
    roots = settings.paths()
    of = tab_of(tab)
    if of is None:
        raise UserError("there is no form '{name}'", mend="load the page again", name=tab)
    if not re.fullmatch(r"[a-z0-9:, ]{0,64}", gpus):
        raise UserError(
            "there is no such device: {name}", mend='use "any", "cpu" or numbers, e.g. 0,1', name=gpus[:64]
        )
    config = to_train(text, of, roots).config
    name = config.run.name
    run = (Path.cwd() / config.run.output_dir / name).resolve()
    roots.path(str(run))
    resume, overrides = config.run.resume, [f"run.name={json.dumps(name)}"]
    folder = RunFolder(run)
    before = jobs.read(jobs.id_of(run))
    busy = before is not None and jobs.state_of(before) in ("waiting", "starting", "running")
    if busy or folder.running():
        raise UserError(
            "this run is going on already",
            where=str(run),
            mend="stop it first, or give another name of the run",
        )
    if folder.is_run() and resume is None:
        other = next(f"{name}-{n}" for n in range(2, 10_000) if not run.with_name(f"{name}-{n}").exists())
        if existing == "resume":
            resume = "latest"
        elif existing == "other":
            run, overrides = run.with_name(other), [f"run.name={json.dumps(other)}"]
        else:
            return {"exists": folder.status(), "name": name, "other": other}
    asked = config.memory.device
    gpus = gpus or ("any" if asked == "auto" else asked)
    kept = run / "logs" / f"{time.strftime('%Y%m%d_%H%M%S')}.toml"
    write_atomically(kept, text)
    model = {"family": config.model.family, "task": config.model.task}
    job = start.start(kept, run, cwd=Path.cwd(), gpus=gpus, resume=resume, overrides=overrides, **model)
    return {"id": job.id}


def resume(job: Job, more: int = 0) -> Job:
    """Goes on from the newest checkpoint, with so many steps more when asked.

    A running one is asked to save and stop first: its learning rate is planned over all of its steps. Raises UserError while
    it goes on otherwise.
    """
    run = Path(job.run)
    folder = RunFolder(run)
    state = jobs.state_of(job)
    if state == "running" and more > 0:
        folder.request("stop")
        threading.Thread(target=_resume_when_stopped, args=(job, more), daemon=True).start()
        return job
    if state in ("waiting", "starting", "running"):
        raise UserError("this run is going on already", where=job.run, mend="stop it first")
    if not folder.is_run():  # it never began: the same once more
        return start.start(
            Path(job.config), run, cwd=Path(job.cwd), gpus=job.gpus, resume=job.resume, overrides=_own(run)
        )
    overrides = _own(run)
    if more > 0:
        document = folder.document()
        before = document.get("resolved", {}).get("steps") or document["config"].get("run", {}).get("steps")
        overrides.append(f"run.steps={(before if isinstance(before, int) else 0) + more}")
    return start.start(
        folder.config_file, run, cwd=Path(job.cwd), gpus=job.gpus, resume="latest", overrides=overrides
    )


def _resume_when_stopped(job: Job, more: int) -> None:
    """Should the page end before the run does, the run is stopped and saved, and Resume is there."""
    while (state := jobs.state_of(jobs.read(job.id) or job)) in ("running", "starting"):
        time.sleep(0.5)
    if state in ("stopped", "finished"):
        resume(jobs.read(job.id) or job, more)


def _own(run: Path) -> list[str]:
    """The folder stays this one, whatever the config file says it was."""
    return [f"run.name={json.dumps(run.name)}", f"run.output_dir={json.dumps(str(run.parent))}"]


@_one_at_a_time
def start_trial(settings: Settings) -> Job:
    """Teaches the embedded model a word: three minutes, no GPU, no model, a preview every 25 steps."""
    base = settings.paths().path(str((settings.roots or (Path.cwd(),))[0] / "output"))
    name = next(f"try-{n}" for n in range(1, 10_000) if not (base / f"try-{n}").exists())
    data = base / f"{name}-data"
    for part, count, seed in (("new", _NEW, 21), ("old", _OLD, 22)):
        folder = data / part
        folder.mkdir(parents=True, exist_ok=True)
        drawings = draw_set(count, seed, (NEW_SHAPE,), NEW_WORD) if part == "new" else draw_set(count, seed)
        for index, drawing in enumerate(drawings):
            Image.fromarray(drawing.image).save(folder / f"{index:03d}.png")
            (folder / f"{index:03d}.txt").write_text(drawing.caption, encoding="utf-8")
    run = base / name
    config = run / "logs" / "config.toml"
    write_atomically(config, _trial_text(name, base, data))
    return start.start(config, run, cwd=Path.cwd(), gpus="cpu", family="flux2-klein", task="t2i")


def _trial_text(name: str, base: Path, data: Path) -> str:
    """The config; a JSON string is a TOML basic string."""
    quote = json.dumps
    prompts = "\n".join(
        f"[[preview.prompts]]\ntext = {quote(text)}\nsize = [64, 64]\nseed = {index}\nsteps = 8\ncfg = 2.0"
        for index, text in enumerate(_PROMPTS)
    )
    return f"""\
# The embedded model learns the word '{NEW_WORD}': three minutes on two cores
[run]
name = {quote(name)}
output_dir = {quote(str(base))}
steps = {_STEPS}
[model]
family = "flux2-klein"
path = "builtin:nano"
[model.options]
max_sequence_length = 28
[data]
resolution = 64
batch_size = 24
caption_dropout = 0.1
cache_dir = {quote(str(base / "cache"))}
[[data.sets]]
images = {quote(str(data / "new"))}
weight = 0.5
[[data.sets]]
images = {quote(str(data / "old"))}
weight = 0.5
[method]
kind = "lokr"
factor = 4
full_matrix = true
[noise]
timesteps = "sigmoid"
sigmoid_bias = 0.6
[optimizer]
lr = 4e-3
betas = [0.9, 0.99]
weight_decay = 0.0
warmup_steps = 20
schedule = "linear"
min_lr_ratio = 0.05
ema = 0.98
[save]
every = 100
[validation]
every = 50
[preview]
every = {_EVERY}
{prompts}
"""
