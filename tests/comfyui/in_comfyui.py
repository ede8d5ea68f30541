"""Runs in a process of its own, inside ComfyUI's code: loads models and adapters through its loaders on the CPU.

python in_comfyui.py COMFYUI_DIR CASES.json: a list of cases, see test_comfyui.py. Writes the answers beside it, as answers.json.
"""

from __future__ import annotations

import importlib.machinery
import json
import logging
import sys
import types
from pathlib import Path
from typing import Any, ClassVar


class _Absent(types.ModuleType):
    """Stands for a package that ComfyUI imports for models that play no part here (Stable Cascade's pictures)."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        inner = _Absent(f"{self.__name__}.{name}")
        sys.modules[inner.__name__] = inner
        setattr(self, name, inner)
        return inner


def prepare(folder: str) -> None:
    """ComfyUI importable, on the CPU."""
    sys.path.insert(0, folder)
    import diffusers  # noqa: F401 - before a stand-in for torchvision is there: both look for it when they are imported
    import transformers  # noqa: F401

    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # RuntimeError: built for another torch
        for name in ("torchvision", "torchvision.transforms"):
            stand_in = _Absent(name)
            stand_in.__spec__ = importlib.machinery.ModuleSpec(name, None)
            sys.modules[name] = stand_in
        sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]  # type: ignore[attr-defined]
    from comfy.cli_args import args

    args.cpu = True


class Said(logging.Handler):
    """What ComfyUI logs of names that it did not find."""

    WORDS = ("missing", "unexpected", "left over", "not loaded", "not load", "error", "unsupported")

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if any(word in text.lower() for word in self.WORDS):
            self.lines.append(text[:500])


def judge(case: dict[str, Any], said: Said) -> dict[str, Any]:
    import comfy.lora
    import comfy.model_detection
    import comfy.sd
    import comfy.utils
    import torch
    from safetensors.torch import load_file

    detect = comfy.model_detection.detect_unet_config

    def detected(*given: Any, **more: Any) -> Any:
        found = detect(*given, **more)
        return found if found is None else {**found, **case["numbers"]}

    comfy.model_detection.detect_unet_config = detected
    said.lines.clear()
    try:
        model = comfy.sd.load_diffusion_model(case["model"], {"dtype": torch.float32})
    finally:
        comfy.model_detection.detect_unet_config = detect
    answer: dict[str, Any] = {"class": type(model.model).__name__, "of_model": list(said.lines)}
    held = model.model.diffusion_model.state_dict()
    file = load_file(case["model"])
    answer["weights_differ"] = [name for name in file if not torch.equal(held[name], file[name])]
    answer["not_in_file"] = sorted(set(held) - set(file))
    tensors = load_file(case["inputs"])
    given = {name.removeprefix("given."): t for name, t in tensors.items() if name.startswith("given.")}
    with torch.no_grad():
        x = given.pop("x")
        ours = model.model.diffusion_model(x, given.pop("timestep"), **given, **case["words"])
    theirs = tensors["output"] * case["sign"]
    answer["forward"] = float((ours.reshape(theirs.shape) - theirs).norm() / theirs.norm())
    answer["adapters"] = {}
    for name, adapter in case["adapters"].items():
        said.lines.clear()
        lora = comfy.utils.load_torch_file(adapter["file"], safe_load=True)
        patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
        wanted = load_file(adapter["merged"])
        changed, worst = set(), 0.0
        for key, patches in patched.patches.items():
            bare = key.removeprefix("diffusion_model.")
            weight = comfy.lora.calculate_weight(patches, file[bare].clone(), key)
            scale = (wanted[bare] - file[bare]).abs().max()
            worst = max(worst, float((weight - wanted[bare]).abs().max() / scale))
            changed.add(bare)
        moved = {n for n, tensor in wanted.items() if not torch.equal(tensor, file[n])}
        answer["adapters"][name] = {
            "lines": list(said.lines),
            "patches": len(changed),
            "not_patched": sorted(moved - changed),
            "worst": worst,
        }
    return answer


def unknown_nodes(workflows: dict[str, Any], folder: str) -> list[str]:
    """Nodes and inputs of our workflows that ComfyUI does not have, and inputs that it asks for besides."""
    import importlib
    import os

    os.chdir(folder)
    import nodes

    known = dict(nodes.NODE_CLASS_MAPPINGS)
    for room in (
        "flux",
        "sd3",
        "model_advanced",
        "qwen",
        "wan",
        "custom_sampler",
        "edit_model",
        "hunyuan",
        "video",
    ):
        module = importlib.import_module(f"comfy_extras.nodes_{room}")
        known.update(getattr(module, "NODE_CLASS_MAPPINGS", {}))
        for one in vars(module).values():
            if isinstance(one, type) and "define_schema" in vars(one):
                known[one.define_schema().node_id] = one  # type: ignore[attr-defined]
    wrong = []
    for name, made in workflows.items():
        for node in made.values():
            kind, given = known.get(node["class_type"]), set(node["inputs"])
            if kind is None:
                wrong.append(f"{name}: {node['class_type']}")
                continue
            if hasattr(kind, "GET_SCHEMA"):
                inputs = kind.GET_SCHEMA().inputs
                needed, allowed = {one.id for one in inputs if not one.optional}, {one.id for one in inputs}
            else:
                types_ = kind.INPUT_TYPES()
                needed = set(types_["required"])
                allowed = needed | set(types_.get("optional", {}))
            if needed - given or given - allowed:
                wrong.append(
                    f"{name}: {node['class_type']} {sorted(needed - given)} {sorted(given - allowed)}"
                )
    return wrong


def main(folder: str, cases: Path) -> None:
    prepare(folder)
    said = Said()
    logging.getLogger().addHandler(said)
    logging.getLogger().setLevel(logging.INFO)
    given = json.loads(cases.read_text("utf-8"))
    workflows = given.pop("workflows")
    answers: dict[str, Any] = {name: judge(case, said) for name, case in given.items()}
    answers["workflows"] = unknown_nodes(workflows, folder)
    cases.with_name("answers.json").write_text(json.dumps(answers, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
