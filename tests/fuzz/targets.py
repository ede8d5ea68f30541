"""What the coverage-guided fuzzer (python tests/fuzz) drives: a reader of bytes, and right inputs to begin with."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from whitetuner.adapters.files import load_adapter
from whitetuner.checkpoint import store
from whitetuner.checkpoint.inspect import inspect_file
from whitetuner.config.load import load_config
from whitetuner.config.preset import preset_text, presets
from whitetuner.data.captions import read_caption
from whitetuner.errors import UserError
from whitetuner.families import registry
from whitetuner.importers.reading import as_toml, document_of, import_document
from whitetuner.memory.weights import TensorFiles
from whitetuner.runs import events
from whitetuner.runs.console import Console
from whitetuner.runs.folder import RunFolder
from whitetuner.runs.report import write_report

Read = Callable[[Path, bytes], None]
Seeds = Callable[[], list[bytes]]


def refused(act: Callable[[], object]) -> None:
    """Every exception but the one that a user is told goes through."""
    try:
        act()
    except UserError as error:
        assert str(error)


def config(folder: Path, raw: bytes) -> None:
    path = folder / "fuzzed.toml"
    path.write_bytes(raw)
    refused(lambda: load_config(path))


def importers(folder: Path, raw: bytes) -> None:
    text = raw.decode("utf-8", "replace")
    for name in ("x.yaml", "x.toml", "x.json", "x.sh"):
        refused(lambda name=name: as_toml(import_document(document_of(text, name), name)))


def safetensors(folder: Path, raw: bytes) -> None:
    """raw: the header; its length stands before it as it has to, and some bytes behind it."""
    path = folder / "fuzzed.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(84))
    keys = registry.keys("flux2-klein")
    refused(lambda: inspect_file(path, {"flux2-klein": keys}))
    refused(lambda: load_adapter(path, keys))
    refused(lambda: _all_of(path))


def _all_of(path: Path) -> None:
    with TensorFiles([path]) as found:
        for name in found:
            found[name].sum()


def checkpoint(folder: Path, raw: bytes) -> None:
    """Its own hash is made to fit wherever it is a document at all."""
    path = folder / "checkpoint-7"
    path.mkdir(exist_ok=True)
    (path / "a.json").write_bytes(b"{}")
    try:
        document = json.loads(raw)
        if isinstance(document, dict):
            document[store.OWN_HASH] = store._own_hash(document)
            raw = json.dumps(document).encode()
    except (ValueError, RecursionError):
        pass
    (path / store.STATE_FILE).write_bytes(raw)
    refused(lambda: store.read(path))
    store.Store(folder, "r", 1).latest(lambda error: None)


def _run(folder: Path) -> RunFolder:
    run = RunFolder(folder / "cat")
    run.control.mkdir(parents=True, exist_ok=True)
    run.run_file.write_text(json.dumps(RUN), encoding="utf-8")
    run.events.write_bytes(_lines())
    return run


def event_lines(folder: Path, raw: bytes) -> None:
    run = _run(folder)
    run.events.write_bytes(raw)
    found, end = events.read(run.events)
    assert end <= len(raw)
    console = Console(plain=True)
    for event in found:
        console(event)
    refused(lambda: write_report(run.path))


def run_document(folder: Path, raw: bytes) -> None:
    run = _run(folder)
    run.run_file.write_bytes(raw)
    refused(run.document)
    refused(lambda: write_report(run.path))
    run.origin()


def captions(folder: Path, raw: bytes) -> None:
    path = folder / "caption.txt"
    path.write_bytes(raw)
    refused(lambda: read_caption(path))
    path.unlink()
    shutil.rmtree(folder / "cat", ignore_errors=True)


#: A run.json that is right.
RUN = {
    "format": 1,
    "run_id": "r",
    "began": 1.0,
    "config": {"run": {"name": "cat"}, "model": {"family": "flux2-klein"}},
    "versions": {},
    "hardware": {},
    "resolved": {},
    "origins": {},
    "forked_from": {"run": "../x", "step": 1, "run_id": "y"},
}
_STATE = {
    "step": 7,
    "run_id": "r",
    "format": 1,
    "config": {},
    "files": {"a.json": {"sha256": hashlib.sha256(b"{}").hexdigest(), "bytes": 2}},
}
_BLOCK = "diffusion_model.double_blocks.0.img_attn.proj"
_HEADER = {
    "__metadata__": {"format": "pt"},
    f"{_BLOCK}.lokr_w1": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    f"{_BLOCK}.lokr_w2": {"dtype": "F32", "shape": [4, 4], "data_offsets": [16, 80]},
    f"{_BLOCK}.alpha": {"dtype": "F32", "shape": [], "data_offsets": [80, 84]},
}
_AI_TOOLKIT = b"""\
job: extension
config:
  name: x
  process:
  - type: sd_trainer
    network: {type: lora, linear: 16}
    train: {steps: 9, lr: 1e-4}
    model: {name_or_path: x, arch: flux2_klein_4b}
    datasets: [{folder_path: a, resolution: [512]}]
"""
_MUSUBI = b"""\
accelerate launch src/musubi_tuner/flux_2_train_network.py --dit x.safetensors --network_dim 16 --learning_rate 1e-4 \\
  --dataset_config d.toml --max_train_steps 9 --optimizer_args weight_decay=0.1
"""


def _lines() -> bytes:
    told = [
        events.RunStarted(name="cat", steps=9),
        events.Phase(name="train", total=9),
        events.StepDone(
            step=1, loss=0.5, lr=1e-4, grad_norm=1.0, seconds=0.1, samples=2, sigmas=[0.5], losses=[0.5]
        ),
        events.Validation(step=2, loss=0.5, by_sigma={"0.5": 0.5}, seconds=1.0),
        events.Preview(step=2, files=["samples/0.png"], prompts=["a"], seconds=1.0),
        events.Saved(step=2, path="checkpoints/checkpoint-2", seconds=0.1),
        events.Ended(status="finished", step=2),
    ]
    return "".join(map(events.as_line, told)).encode()


#: Name -> (reader, seeds).
TARGETS: dict[str, tuple[Read, Seeds]] = {
    "config": (config, lambda: [preset_text(name).encode() for name in presets()]),
    "importers": (importers, lambda: [_AI_TOOLKIT, _MUSUBI]),
    "safetensors": (safetensors, lambda: [json.dumps(_HEADER).encode()]),
    "checkpoint": (checkpoint, lambda: [json.dumps(_STATE).encode()]),
    "events": (event_lines, lambda: [_lines()]),
    "run.json": (run_document, lambda: [json.dumps(RUN).encode()]),
    "captions": (captions, lambda: ["a cat, 一只猫".encode(name) for name in ("utf-8", "utf-16", "gb18030")]),
}
