"""The config that trains a random tiny model of a family, as values (`demo FAMILY`, selftest, the tests) and as a commented
file (`init --tiny`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from whitetuner.config.preset import preset_text
from whitetuner.config.write import toml_value
from whitetuner.errors import UserError
from whitetuner.families import registry
from whitetuner.family import FamilySpec, ModelPaths
from whitetuner.models import family_of

_NANO = "nano-lokr"

TINY_SIZE_PX, TINY_FRAMES = registry.TINY_SIZE.width, registry.TINY_SIZE.frames


def tiny_options(family: str) -> dict[str, Any]:
    """[model.options] that suit the tiny model."""
    return dict(registry.spec(family).tiny_options)


def tiny_values(
    family: str, model: Path, data: Path, output: Path, task: str = "t2i", variant: str = ""
) -> dict[str, Any]:
    """Dotted config values of a run over a tiny model and a small data set; seconds on a CPU.

    data: folder of pictures; of an edit task: with the folders target, condition_1 and condition_2, as `testdata` makes them,
    of which a variant that takes one picture is given the first
    """
    folders = [str(data / "condition_1"), str(data / "condition_2")]
    most = registry.spec(family).most_references.get(variant, len(folders))
    edit = {"data.target": str(data / "target"), "data.conditions": folders[:most]}
    film = {"data.videos": str(data), "data.num_frames": TINY_FRAMES}
    return {
        "run.name": f"tiny-{family}",
        "run.output_dir": str(output),
        "run.steps": 30,
        "model.family": family,
        "model.task": task,
        "model.path": str(model),
        **{f"model.options.{key}": value for key, value in tiny_options(family).items()},
        **(edit if task == "edit" else film if task in ("i2v", "t2v") else {"data.images": str(data)}),
        "data.resolution": TINY_SIZE_PX,
        "data.batch_size": 2,
        "data.caption_dropout": 0.1,
        "data.cache_dir": str(output / "cache"),
        "method.kind": "lokr",
        "method.factor": 4,
        "method.full_matrix": True,
        "optimizer.lr": 1e-2,
        "memory.device": "cpu",
        "save.every": 0,
        "preview.every": 0,
        "validation.every": 0,
        "log.tensorboard": False,
    }


def tiny_text(folder: Path) -> str:
    """A config that trains in seconds on a CPU.

    folder: a model folder (of `whitetuner tiny`), which is trained on pictures still to be named, or a folder of pictures
    (or with the folders target and condition*), on which the embedded model is trained. Raises UserError when it is neither.
    """
    if not folder.is_dir():
        raise UserError(
            "there is no folder {folder}",
            where="--tiny",
            mend="make one: whitetuner tiny flux2-klein {folder}   (or: whitetuner testdata t2i {folder})",
            folder=folder,
        )
    if not (folder / "model_index.json").is_file():
        text, conditions = (
            preset_text(_NANO),
            sorted(one for one in folder.glob("condition*") if one.is_dir()),
        )
        if not (folder / "target").is_dir() or not conditions:
            return text.replace("'my-pictures'", toml_value(str(folder)))
        source, given = _edit_source(folder / "target", conditions)
        first, _, rest = text.partition("images = 'my-pictures'")
        text = (
            first.replace('family = "flux2-klein"', 'family = "flux2-klein"\ntask = "edit"') + source + rest
        )
        return text.replace("[[preview.prompts]]", f"[[preview.prompts]]\nimages = {given}")
    family = family_of(folder)
    spec = registry.spec(family)
    task = _task_of(spec, folder)
    source, given = f"{'videos' if spec.frames else 'images'} = 'my-pictures'", ""
    if task == "edit":
        source, given = _edit_source(Path("my-edit/target"), [Path("my-edit/condition_1")])
    options = "".join(f"{key} = {toml_value(value)}\n" for key, value in spec.tiny_options.items())
    frames = f"num_frames = {TINY_FRAMES}\n" if spec.frames else ""
    return _TINY.format(
        family=family,
        name=f"tiny-{family}",
        path=toml_value(str(folder)),
        options=f"[model.options]\n{options}\n" if options else "",
        task=f'task = "{task}"\n' if task == "edit" else "",
        source=source,
        images=f"images = {given}\n" if given else "",
        frames=frames,
        size=TINY_SIZE_PX,
    )


def _edit_source(target: Path, conditions: list[Path]) -> tuple[str, str]:
    """Lines of [data] for an edit set, and the given picture of a preview."""
    shown = next((one for one in sorted(conditions[0].glob("*")) if one.is_file()), conditions[0] / "01.jpg")
    folders = toml_value([str(one) for one in conditions])
    return f"target = {toml_value(str(target))}\nconditions = {folders}", toml_value([str(shown)])


def _task_of(spec: FamilySpec, folder: Path) -> str:
    """The first task of the variant that lies in a model folder, as far as that can be told."""
    variant = spec.variant_of(spec.options(**spec.tiny_options), ModelPaths(folder))
    return (spec.tasks if variant is None else spec.tasks_of(variant))[0]


_TINY = """\
# A random tiny model: it learns in seconds what a real one learns in hours, and draws noise.
[run]
name = "{name}"
steps = 20

[model]
family = "{family}"
{task}path = {path}

{options}[data]
{source}        # `whitetuner testdata` makes some
resolution = {size}
{frames}
[method]
factor = 4

[optimizer]
lr = 1e-2

[save]
every = 10

[validation]
every = 10

[preview]
every = 10
[[preview.prompts]]
text = "a red circle"
{images}size = [{size}, {size}]
steps = 4
"""
