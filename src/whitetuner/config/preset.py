"""Configs to begin with: the commented presets that come with the program, and one for a tiny or the embedded model."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from whitetuner.config.options import families, spec_of
from whitetuner.config.write import toml_value
from whitetuner.errors import UserError
from whitetuner.family import FamilySpec, ModelPaths

_NANO = "nano-lokr"


def presets() -> dict[str, str]:
    """Name -> first line (what it is for) of each preset."""
    folder = resources.files("whitetuner.config") / "presets"
    files = sorted((one for one in folder.iterdir() if one.name.endswith(".toml")), key=lambda one: one.name)
    return {
        one.name.removesuffix(".toml"): one.read_text(encoding="utf-8").split("\n")[0].lstrip("# ")
        for one in files
    }


def preset_text(name: str) -> str:
    """The commented TOML of a preset. Raises UserError with the known names."""
    known = presets()
    if name not in known:
        raise UserError(
            "there is no preset '{name}'",
            where="PRESET",
            mend="use one of: {known}",
            name=name,
            known=", ".join(known),
        )
    return (resources.files("whitetuner.config") / "presets" / f"{name}.toml").read_text(encoding="utf-8")


def init_text(preset: str) -> str:
    """What `whitetuner init PRESET` writes."""
    return preset_text(preset)


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
    family = _family_of(folder)
    spec = spec_of(family)
    task = _task_of(spec, folder)
    source, given = f"{'videos' if spec.frames else 'images'} = 'my-pictures'", ""
    if task == "edit":
        source, given = _edit_source(Path("my-edit/target"), [Path("my-edit/condition_1")])
    options = "".join(f"{key} = {toml_value(value)}\n" for key, value in spec.tiny_options.items())
    frames = "num_frames = 5\n" if spec.frames else ""
    return _TINY.format(
        family=family,
        name=f"tiny-{family}",
        path=toml_value(str(folder)),
        options=f"[model.options]\n{options}\n" if options else "",
        task=f'task = "{task}"\n' if task == "edit" else "",
        source=source,
        images=f"images = {given}\n" if given else "",
        frames=frames,
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
resolution = 64
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
{images}size = [64, 64]
steps = 4
"""


def _family_of(folder: Path) -> str:
    """The family whose denoiser lies in a diffusers folder."""
    file = folder / "transformer" / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            "config.json of the denoiser cannot be read ({reason})",
            where=str(folder / "transformer"),
            mend="make the model folder again",
            reason=error,
        ) from error
    for name in families():
        if spec_of(name).transformer_class == found:
            return name
    raise UserError(
        "no known family uses a {found}",
        where=str(folder),
        mend="known families: {known}",
        found=found,
        known=", ".join(families()),
    )
