"""A hub name where a model folder is asked for, against a small server on this machine that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants as hub_constants
import pytest

from whitetuner.cli import main
from whitetuner.config.load import load_config
from whitetuner.errors import UserError
from whitetuner.families import registry
from whitetuner.families.contract import quiet
from whitetuner.hub.fetching import family_of, fetch, fetch_for, needed
from whitetuner.hub_names import HubName
from whitetuner.models import model_paths

NAME, REVISION = "someone/FLUX.2-klein-tiny", "a" * 40
MODEL = HubName("huggingface", NAME)


class Server(ThreadingHTTPServer):
    """On this machine. A client that goes away in the middle is what these tests are about, not a traceback for the terminal."""

    def __init__(self, answer: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), answer)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Hub(Server):
    """Serves one model's folder. asked: (path, range) of every file; cut: a file that breaks off in the middle, once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cut = folder, ""
        self.asked: list[tuple[str, str]] = []
        super().__init__(_Answer)


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *given: object) -> None:
        return

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith(f"/api/models/{NAME}"):
            if "/tree/" in path:
                rows = [{"type": "file", "oid": "0", **one} for one in self._files("path")]
                return self._say(json.dumps(rows).encode(), "application/json")
            return self._say(
                json.dumps(
                    {"id": NAME, "modelId": NAME, "sha": REVISION, "siblings": self._files("rfilename")}
                ).encode(),
                "application/json",
            )
        lead = f"/{NAME}/resolve/{REVISION}/"
        if not path.startswith(lead) or not (self.server.folder / path.removeprefix(lead)).is_file():
            return self._say(b"{}", "application/json", 404, {"X-Error-Code": "RepoNotFound"})
        name = path.removeprefix(lead)
        body = (self.server.folder / name).read_bytes()
        more = {
            "ETag": f'"{hashlib.sha256(body).hexdigest()}"',
            "X-Repo-Commit": REVISION,
            "Accept-Ranges": "bytes",
        }
        start, code = 0, 200
        wanted = self.headers.get("Range", "")
        if self.command == "GET":
            self.server.asked.append((name, wanted))
        if wanted:
            start, code = int(wanted.removeprefix("bytes=").split("-")[0]), 206
            more["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self._say(
            body[start:],
            "application/octet-stream",
            code,
            more,
            cut=self.command == "GET" and name == self.server.cut,
        )
        return None

    def _files(self, key: str) -> list[dict[str, object]]:
        files = [path for path in sorted(self.server.folder.rglob("*")) if path.is_file()]
        return [{key: f.relative_to(self.server.folder).as_posix(), "size": f.stat().st_size} for f in files]

    def _say(
        self, body: bytes, kind: str, code: int = 200, more: dict[str, str] | None = None, cut: bool = False
    ) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.server.cut = ""
            self.close_connection = True
            self.wfile.flush()


def served(folder: Path, other: str) -> Path:
    """A tiny model as a hub has it, with files beside that no training reads; other: a folder of none of its components."""
    with quiet():
        registry.make_tiny("flux2-klein", str(folder))
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"second")
    (folder / other).mkdir()
    (folder / other / "model.safetensors").write_bytes(b"other")
    (folder / "README.md").write_text("words", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served(tmp_path_factory.mktemp("hub") / "served", "safety_checker")


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub(model)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("WHITETUNER_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        hub_constants, "DOWNLOAD_CHUNK_SIZE", 4096
    )  # tiny files, so that a part of one can be kept
    yield server
    server.shutdown()
    server.server_close()


def config_of(**more: object):  # type: ignore[no-untyped-def]
    values = {"run.name": "x", "model.family": "flux2-klein", "model.path": NAME, "data.images": "."}
    return load_config(None, base={**values, **more}).config


def test_only_what_is_needed_is_fetched_once_and_its_size_is_told_before(
    hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"(?s)not fetched yet.*whitetuner fetch someone/FLUX.2-klein-tiny"):
        model_paths(config_of())
    said: list[str] = []
    fetch_for(config_of(), said.append)
    assert said[0].startswith(f"fetching {NAME}: ") and "GB (of" in said[0]
    came = {name for name, _ in hub.asked}
    assert "transformer/diffusion_pytorch_model.safetensors" in came and "tokenizer/tokenizer.json" in came
    assert not any(one.endswith((".bin", ".md", ".fp16.safetensors")) or "safety" in one for one in came)
    paths = model_paths(config_of())
    assert paths.folder is not None
    for part in ("transformer", "vae", "text_encoder"):
        for file in (model / part).glob("*model*.safetensors"):
            if "fp16" not in file.name:
                assert (paths.folder / part / file.name).read_bytes() == file.read_bytes()
    before = len(hub.asked)
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    fetch_for(config_of(), said.append)  # it is here: the hub is not asked, which may be far away by now
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    fetch(MODEL, registry.spec("flux2-klein"), said.append)
    assert [name for name, _ in hub.asked[before:]] == []


@pytest.mark.slow
def test_parts_that_are_given_otherwise_are_not_fetched(hub: Hub, model: Path) -> None:
    fetch_for(config_of(**{"model.vae": str(model / "vae")}), lambda text: None)
    assert not any(name.startswith("vae/") for name, _ in hub.asked)
    paths = model_paths(config_of(**{"model.vae": str(model / "vae")}))
    assert paths.component("vae") == model / "vae"


@pytest.mark.slow
def test_a_fetch_that_was_cut_goes_on_where_it_was(hub: Hub, model: Path) -> None:
    hub.cut = "text_encoder/model.safetensors"
    spec = registry.spec("flux2-klein")
    try:
        folder = fetch(MODEL, spec, lambda text: None)
    except UserError as error:
        assert "what came so far stays" in str(error)
        with pytest.raises(UserError, match="not fetched yet"):
            model_paths(config_of())
        folder = fetch(MODEL, spec, lambda text: None)
    assert (folder / "text_encoder/model.safetensors").read_bytes() == (
        model / "text_encoder/model.safetensors"
    ).read_bytes()
    ranges = [wanted for name, wanted in hub.asked if name == "text_encoder/model.safetensors"]
    assert len(ranges) == 2 and ranges[1].startswith("bytes=") and not ranges[1].startswith("bytes=0-")


def test_what_is_wrong_is_told(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = registry.spec("flux2-klein")
    with pytest.raises(UserError, match="there is no model someone/other"):
        fetch(HubName("huggingface", "someone/other"), spec, lambda text: None)
    with pytest.raises(UserError, match="does not tell which family"):
        family_of("someone/model")
    assert (
        family_of("Tongyi-MAI/Z-Image-Turbo") == "zimage"
        and family_of("Qwen/Qwen-Image-Edit") == "qwen-image"
    )
    monkeypatch.setattr("whitetuner.hub.fetching.shutil.disk_usage", lambda place: SimpleNamespace(free=7))
    with pytest.raises(UserError, match="GB left"):
        fetch(MODEL, spec, lambda text: None)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"(?s)could not be fetched.*HF_ENDPOINT"):
        fetch(MODEL, spec, lambda text: None)
    assert main(["fetch", NAME]) == 3 and "Traceback" not in capsys.readouterr().err


def test_which_files_are_needed() -> None:
    files = dict.fromkeys(
        ("model_index.json", "vae/config.json", "vae/a.safetensors", "vae/a.fp16.safetensors", "vae/a.bin",
         "a.safetensors", "transformer/m-00001-of-2.safetensors", "transformer/m.fp16-00001-of-2.safetensors",
         "transformer/m.safetensors.index.json", "transformer/m.safetensors.index.fp16.json", "docs/x.json"), 1,
    )  # fmt: skip
    kept = needed(files, ("vae", "transformer"))
    assert kept == [
        "model_index.json", "transformer/m-00001-of-2.safetensors", "transformer/m.safetensors.index.json",
        "vae/a.safetensors", "vae/config.json",
    ]  # fmt: skip
