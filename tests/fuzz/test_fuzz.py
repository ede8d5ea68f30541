"""Whatever a file, a name or a request holds: it is read, or refused with a UserError. Nothing else is ever raised.

Inputs are of two kinds: anything at all, and right ones with something wrong in them, which get further in.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from starlette.testclient import TestClient
from targets import RUN, TARGETS

from whitetuner.adapters.files import load_adapter
from whitetuner.checkpoint import store
from whitetuner.checkpoint.inspect import inspect_file
from whitetuner.checks import check_folder
from whitetuner.config.load import load_config
from whitetuner.config.preset import preset_text, presets
from whitetuner.config.schema import Config
from whitetuner.config.told import keys_of
from whitetuner.data.captions import convert_captions, guess_encoding, read_caption
from whitetuner.errors import UserError
from whitetuner.families import registry
from whitetuner.gui.app import make_app
from whitetuner.gui.form_api import FormApi
from whitetuner.gui.settings import Settings
from whitetuner.importers.reading import as_toml, document_of, import_document
from whitetuner.memory.weights import TensorFiles, read_header
from whitetuner.runs import events, jobs
from whitetuner.runs.console import Console
from whitetuner.runs.folder import RunFolder
from whitetuner.runs.report import write_report

TAB = "flux2-klein-t2i"

# -- what is made up -----------------------------------------------------------------------------------------------------

numbers = st.one_of(
    st.integers(-(10**20), 10**20), st.floats(), st.sampled_from([0, -1, 1, 2**31, 2**63, 1e308, 1e-320])
)
words = st.one_of(
    st.text(max_size=12), st.sampled_from(["", "auto", "latest", "..", "/", "C:\\", "\x00", "a" * 300, "猫"])
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, words),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def damaged(draw: Any, whole: bytes) -> bytes:
    """Right bytes, with a few stretches taken out, doubled, flipped or replaced."""
    raw = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(raw)))
        end = min(len(raw), at + draw(st.integers(0, 24)))
        raw[at:end] = draw(
            st.one_of(
                st.binary(max_size=12),
                st.just(b""),
                st.just(bytes(raw[at:end]) * 2),
                st.just(bytes(byte ^ 1 for byte in raw[at:end])),
                st.sampled_from([b"[" * 50, b"9" * 40, b'"', b"null", b"-1", b"\xff", b"{}", b"[]", b"\n\n"]),
            )
        )
    return bytes(raw)


def spoilt(whole: Mapping[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A right document, some of its values replaced or gone."""
    keys = st.dictionaries(st.sampled_from(sorted(whole)), values, max_size=3)
    gone = st.lists(st.sampled_from(sorted(whole)), max_size=2)
    return st.tuples(keys, gone).map(
        lambda both: {key: value for key, value in {**whole, **both[0]}.items() if key not in both[1]}
    )


@dataclass(frozen=True)
class Place:
    folder: Path
    page: TestClient
    job: jobs.Job


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WHITETUNER_STATE", str(folder / "state"))
        patch.chdir(folder)
        run = RunFolder(folder / "output" / "cat")
        run.control.mkdir(parents=True)
        config = {"run": {"name": "cat", "steps": 9}, "model": {"family": "flux2-klein", "task": "t2i"}}
        run.begin("", {**config, "method": {"kind": "lokr"}})
        shutil.copy(run.run_file, folder / "run.json")
        job = jobs.Job(run=str(run.path), config="c", cwd=".", pid=2**22 + 1, born=0.0, asked_at=1.0)
        job.write()
        app = make_app(Settings())
        yield Place(folder, TestClient(app, base_url="http://127.0.0.1:7860"), job)


def refused(act: Callable[[], object]) -> bool:
    """True when it was refused as a user is told; every other exception goes through."""
    try:
        act()
    except UserError as error:
        assert str(error)
        return True
    return False


# -- what reads it -------------------------------------------------------------------------------------------------------


def config_file(place: Place, raw: bytes) -> None:
    path = place.folder / "fuzzed.toml"
    path.write_bytes(raw)
    refused(lambda: load_config(path))


def config_values(place: Place, given: dict[str, Any]) -> None:
    refused(lambda: load_config(None, base={"model.family": "flux2-klein", **given}))


def config_settings(place: Place, given: list[tuple[str, str]]) -> None:
    overrides = [f"{key}={text}" for key, text in given]
    refused(lambda: load_config(None, ["model.family=flux2-klein", *overrides]))


def foreign_config(place: Place, raw: str) -> None:
    for name in ("x.yaml", "x.toml", "x.json"):
        refused(lambda name=name: as_toml(import_document(document_of(raw, name), name)))


def tensor_file(place: Place, raw: bytes) -> None:
    path = place.folder / "fuzzed.safetensors"
    path.write_bytes(raw)
    keys = registry.keys("flux2-klein")
    for read in (
        lambda: inspect_file(path, {"flux2-klein": keys}),
        lambda: load_adapter(path, keys),
        lambda: read_header(path),
        lambda: _all_of(path),
    ):
        refused(read)


def _all_of(path: Path) -> None:
    with TensorFiles([path]) as found:
        for name in found:
            found[name].sum()


def checkpoint(place: Place, document: dict[str, Any]) -> None:
    path = place.folder / "checkpoint-7"
    path.mkdir(exist_ok=True)
    whole = {**document, store.OWN_HASH: store._own_hash(document)}
    (path / store.STATE_FILE).write_text(json.dumps(whole), encoding="utf-8")
    assert refused(lambda: store.read(path)), "there are no such files"
    assert store.Store(place.folder, "r", 1).latest(lambda error: None) is None


def captions(place: Place, raw: bytes) -> None:
    path = place.folder / "caption.txt"
    path.write_bytes(raw)
    if refused(lambda: read_caption(path)):
        codecs.lookup(guess_encoding(raw))
        kept = path.with_name("caption.txt.bak")
        kept.unlink(missing_ok=True)
        refused(lambda: convert_captions([path]))
        assert raw in (path.read_bytes(), kept.read_bytes() if kept.exists() else b"")
    else:
        assert read_caption(path) == read_caption(path).strip()


def file_names(place: Place, names: list[str]) -> None:
    folder = place.folder / "named"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in names:
        try:
            Image.new("RGB", (64, 64)).save(folder / f"{name}.png")
            (folder / f"{name}.txt").write_text("a cat", encoding="utf-8")
        except (OSError, ValueError):  # no name on this system
            continue
    if refused(lambda: check_folder(folder, deep=False, convert=False).as_json()):
        assert not list(folder.glob("*.png"))


def event_lines(place: Place, raw: bytes) -> None:
    run = RunFolder(Path(place.job.run))
    shutil.copy(place.folder / "run.json", run.run_file)
    run.events.write_bytes(raw)
    found, end = events.read(run.events)
    assert end <= len(raw)
    console = Console(plain=True)
    for event in found:
        console(event)
    refused(lambda: write_report(run.path))
    for address in ("", "/curve", "/log", "/events"):
        assert place.page.get(f"/api/runs/{place.job.id}{address}").status_code < 500
    assert place.page.get("/api/runs").status_code == 200


def run_document(place: Place, document: dict[str, Any]) -> None:
    run = RunFolder(Path(place.job.run))
    run.run_file.write_text(json.dumps(document), encoding="utf-8")
    run.events.write_text(events.as_line(events.RunStarted(name="cat", steps=9)), encoding="utf-8")
    refused(lambda: write_report(run.path))
    run.origin()
    assert place.page.get(f"/api/runs/{place.job.id}").status_code < 500
    assert place.page.get("/api/runs").status_code == 200


ROUTES = (
    "/api/start",
    *(f"/api/form/{TAB}/{word}" for word in FormApi.VERBS if word != "make"),
    *(f"/api/data/{word}" for word in ("look", "caption", "undo", "writing")),
    "/api/path/list",
    *(f"/api/runs/JOB/{word}" for word in ("ask", "resume", "comfyui", "strengths")),
)
FIELDS = (
    "tab",
    "text",
    "changes",
    "add",
    "remove",
    "name",
    "vram",
    "goal",
    "look",
    "folder",
    "word",
    "path",
    "row",
    "caption",
    "gpus",
    "existing",
)


def request(place: Place, given: tuple[str, Any]) -> None:
    address, body = given
    if address == "/api/start" and isinstance(body, dict):
        body = {**body, "gpus": "none of these"}  # nothing is to be trained
    answer = place.page.post(
        address.replace("JOB", place.job.id),
        content=body if isinstance(body, bytes) else json.dumps(body),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code < 500, (given, answer.text)


def _tensors() -> bytes:
    file = Path(os.environ["WHITETUNER_STATE"]) / "good.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    prefix = "diffusion_model.double_blocks.0.img_attn.proj"
    save_file(
        {
            f"{prefix}.lokr_w1": torch.ones(2, 2),
            f"{prefix}.lokr_w2": torch.ones(4, 4),
            f"{prefix}.alpha": torch.tensor(1.0),
        },
        file,
        {"format": "pt"},
    )
    return file.read_bytes()


def _lines() -> bytes:
    """Times are fixed: what is made up out of them is the same on every day."""
    told = [
        events.RunStarted(name="cat", steps=9, pid=4711),
        events.Phase(name="train", total=9),
        *(
            events.StepDone(
                step=n, loss=0.5, lr=1e-4, grad_norm=1.0, seconds=0.1, samples=2, sigmas=[0.5], losses=[0.5]
            )
            for n in (1, 2)
        ),
        events.Validation(step=2, loss=0.5, by_sigma={"0.5": 0.5}, seconds=1.0),
        events.Preview(step=2, files=["samples/0.png"], prompts=["a"], seconds=1.0),
        events.Saved(step=2, path="checkpoints/checkpoint-2", seconds=0.1),
        events.Message(level="info", text="x"),
        events.Failed(reason="x"),
        events.Ended(status="finished", step=2),
    ]
    return "".join(events.as_line(dataclasses.replace(one, time=1.8e9)) for one in told).encode()


_WHOLE_EVENTS = [json.loads(line) for line in _lines().splitlines()]
_STATE = {
    "step": 7,
    "run_id": "r",
    "format": 1,
    "config": {},
    "files": {"a.json": {"sha256": "0", "bytes": 2}},
}
_FILES = st.dictionaries(
    words, st.one_of(values, st.fixed_dictionaries({"sha256": words, "bytes": numbers})), max_size=3
)
_KEYS = sorted(keys_of(Config))
_AI_TOOLKIT = """\
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

#: What -> (who reads it, what is made up, examples in the quick part and in the slow one).
READERS: dict[str, tuple[Callable[[Place, Any], None], Callable[[], st.SearchStrategy[Any]], int, int]] = {
    "config file": (
        config_file,
        lambda: st.one_of(
            st.binary(max_size=60), *(damaged(preset_text(name).encode()) for name in list(presets())[:4])
        ),
        40,
        800,
    ),
    "config values": (
        config_values,
        lambda: st.dictionaries(st.one_of(st.sampled_from(_KEYS), words), values, max_size=4),
        60,
        1500,
    ),
    "--set": (
        config_settings,
        lambda: st.lists(
            st.tuples(st.sampled_from([*_KEYS, "data.sets[0].images", "a[", "."]), words), max_size=3
        ),
        40,
        800,
    ),
    "another trainer's config": (
        foreign_config,
        lambda: st.one_of(
            st.text(max_size=60),
            damaged(_AI_TOOLKIT.encode()).map(lambda raw: raw.decode("utf-8", "replace")),
        ),
        30,
        600,
    ),
    "safetensors": (tensor_file, lambda: st.one_of(st.binary(max_size=60), damaged(_tensors())), 60, 1500),
    "checkpoint": (
        checkpoint,
        lambda: spoilt(_STATE).flatmap(
            lambda whole: st.one_of(st.just(whole), _FILES.map(lambda files: {**whole, "files": files}))
        ),
        50,
        800,
    ),
    "captions": (
        captions,
        lambda: st.one_of(
            st.binary(max_size=80),
            st.text(max_size=40).flatmap(
                lambda text: st.sampled_from(["gb18030", "utf-16", "big5", "latin-1"]).map(
                    lambda name: text.encode(name, "ignore")
                )
            ),
        ),
        80,
        2000,
    ),
    "file names": (
        file_names,
        lambda: st.lists(
            st.one_of(words, st.binary(min_size=1, max_size=20).map(os.fsdecode)), min_size=1, max_size=4
        ),
        10,
        150,
    ),
    "events": (
        event_lines,
        lambda: st.one_of(
            st.binary(max_size=80),
            damaged(_lines()),
            st.lists(
                st.sampled_from(_WHOLE_EVENTS).flatmap(
                    lambda one: spoilt({k: v for k, v in one.items() if k != "kind"}).map(
                        lambda rest: {"kind": one["kind"], **rest}
                    )
                ),
                max_size=6,
            ).map(lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode()),
        ),
        25,
        400,
    ),
    "run.json": (run_document, lambda: spoilt(RUN), 25, 400),
    "requests": (
        request,
        lambda: st.tuples(
            st.sampled_from(ROUTES),
            st.one_of(
                st.binary(max_size=30),
                st.dictionaries(st.sampled_from(FIELDS), values, max_size=5).map(
                    lambda body: {"tab": TAB, "text": "", **body}
                ),
            ),
        ),
        60,
        1200,
    ),
}


#: Of a step's line: what is written for what, and is no number or none to reckon with.
SPOILT_STEPS = [
    (b'"loss": 0.5', b'"loss": 0hevc'),
    (b'"loss": 0.5', b'"loss": 1.7e308'),
    (b'"step": 1', b'"step": null'),
    (b'"seconds": 0.1', b'"seconds": null'),
    (b'"seconds": 0.1', b'"seconds": 1e999'),
    (b'"seconds": 0.1', b'"seconds": -1'),
    (b'"memory_mb": 0.0', b'"memory_mb": null'),
    (b'"samples": 2', b'"samples": null'),
]
#: What was not read nor refused once: (who reads it, what).
FOUND: list[tuple[str, Any]] = [
    ("another trainer's config", "?"),  # YAML: {None: None}
    ("another trainer's config", "config: {process: [{2020-01-01: 1, 3: [x]}]}"),
    ("checkpoint", {**_STATE, "files": {"a" * 300: {"sha256": "", "bytes": 0}}}),
    ("checkpoint", {**_STATE, "files": {"\x00": {"sha256": "", "bytes": 0}}}),
    ("checkpoint", {**_STATE, "files": {"a.json": {"sha256": "", "bytes": math.inf}}}),
    ("checkpoint", {**_STATE, "step": math.inf}),
    ("events", b'{"kind": "ended", "status": "gone", "step": 2}\n'),
    ("events", b'{"kind": "message", "level": [], "text": "x"}\n'),
    ("events", b'{"kind": "run_started", "time": null, "name": "cat"}\n'),
    ("events", b'{"kind": "validation", "step": 2, "loss": null, "by_sigma": {}, "seconds": 1.0}\n'),
    *(("events", _lines().replace(old, new)) for old, new in SPOILT_STEPS),
    ("requests", ("/api/path/list", {"path": "a" * 300})),
    ("requests", ("/api/path/list", {"path": "a/" * 5000})),
    ("requests", ("/api/data/look", {"tab": TAB, "text": "", "folder": "a" * 300})),
    ("requests", ("/api/runs/JOB/strengths", {"tab": TAB, "text": ""})),  # its run.json names no prompts
]


@pytest.mark.parametrize("name, value", FOUND, ids=lambda one: one if isinstance(one, str) else "")
def test_what_was_found_stays_mended(place: Place, name: str, value: Any) -> None:
    READERS[name][0](place, value)


@pytest.mark.parametrize("name", TARGETS)
def test_what_atheris_begins_with_is_read(tmp_path: Path, name: str) -> None:
    """`python tests/fuzz` goes on from here; it is not installed with the other tools."""
    read, seeds = TARGETS[name]
    for seed in seeds():
        read(tmp_path, seed)
        read(tmp_path, seed[: len(seed) // 2])


def fuzz(place: Place, name: str, examples: int) -> None:
    read, made_up, _, _ = READERS[name]

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(made_up())
    def one(value: Any) -> None:
        read(place, value)

    one()


@pytest.mark.parametrize("name", READERS)
def test_it_is_read_or_refused(place: Place, name: str) -> None:
    fuzz(place, name, READERS[name][2])


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_it_is_read_or_refused_many_times_over(place: Place, name: str) -> None:
    fuzz(place, name, READERS[name][3])
