"""A model of ModelScope, against two small servers on this machine: the hub, and the host that it sends large files from.

They answer as the hub was seen to (its own client, modelscope-hub 0.5.1, fetches from them): files of the list with trees,
sizes and hashes; text files at once and without Range, weights by a redirect to the other host.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import pytest
from test_hub import Server, served

from whitetuner.cli import main
from whitetuner.config.load import load_config
from whitetuner.errors import EXIT_ENVIRONMENT, UserError
from whitetuner.families import registry
from whitetuner.gui.told import told
from whitetuner.hub import modelscope
from whitetuner.hub.fetching import fetch, fetch_for
from whitetuner.hub_names import HubName, hub_name
from whitetuner.models import model_paths

NAME = "someone/FLUX.2-klein-tiny"
MODEL = HubName("modelscope", NAME)
TOKEN = "ms-0123456789"
SPEC = registry.spec("flux2-klein")


class Host(Server):
    """asked: (what, headers) of every request; cut: file -> how often it breaks off in the middle."""

    def __init__(self, folder: Path, answer: type[BaseHTTPRequestHandler]) -> None:
        self.folder, self.asked, self.cut = folder, [], {}  # type: ignore[var-annotated]
        self.other: Host | None = None
        self.change: Callable[[list[dict[str, Any]]], Any] = lambda rows: rows
        self.gated = False
        super().__init__(answer)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Both(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Host

    def log_message(self, *given: object) -> None:
        return

    def say(self, body: bytes, code: int = 200, short: bool = False, **more: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **more}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if short else body)
        self.close_connection = short

    def say_no(self, code: int) -> None:
        self.say(json.dumps({"Code": 10010200000 + code, "Message": "no", "Success": False}).encode(), code)


class _Hub(_Both):
    def do_GET(self) -> None:
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        file = query.get("FilePath", [""])[0]
        self.server.asked.append((file or path, dict(self.headers)))
        if not path.startswith(f"/api/v1/models/{NAME}/"):
            return self.say_no(404)
        if self.server.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.say_no(403)
        if path.endswith("/repo/files"):
            assert query == {"Revision": ["master"], "Recursive": ["True"]}
            rows = self.server.change(self.rows())
            return self.say(json.dumps({"Code": 200, "Data": {"Files": rows}, "Success": True}).encode())
        assert query["Revision"] == ["master"]
        if not (self.server.folder / file).is_file():
            return self.say_no(404)
        if file.endswith(".safetensors"):
            assert self.server.other is not None
            return self.say(b"", 302, Location=f"{self.server.other.address}/{quote(file)}?Signature=x")
        return self.say((self.server.folder / file).read_bytes())

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for path in sorted(self.server.folder.rglob("*")):
            row = {
                "Name": path.name,
                "Path": path.relative_to(self.server.folder).as_posix(),
                "Revision": "b" * 40,
            }
            if path.is_dir():
                rows.append({**row, "Type": "tree", "Size": 0, "Sha256": ""})
            else:
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                rows.append({**row, "Type": "blob", "Size": path.stat().st_size, "Sha256": digest})
        return rows


class _Store(_Both):
    def do_GET(self) -> None:
        file, wanted = urlsplit(self.path).path.lstrip("/"), self.headers.get("Range", "")
        self.server.asked.append((file, dict(self.headers)))
        body, code, more = (self.server.folder / file).read_bytes(), 200, {}
        if wanted:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                return self.say(b"", 416)
            more = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
            body, code = body[start:], 206
        short = self.server.cut.get(file, 0) > 0
        self.server.cut[file] = self.server.cut.get(file, 0) - 1
        return self.say(body, code, short, **more)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served(tmp_path_factory.mktemp("hub") / "served", "assets")


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    server = Host(model, _Hub)
    server.other = Host(model, _Store)
    for one in (server, server.other):
        threading.Thread(target=one.serve_forever, daemon=True).start()
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.address)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WHITETUNER_STATE", str(tmp_path / "state"))
    for variable in ("MODELSCOPE_API_TOKEN", "WHITETUNER_HUB"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(modelscope, "_PAUSE_S", 0.0)
    monkeypatch.setattr(modelscope, "_CHUNK", 4096)
    yield server
    for one in (server, server.other):
        one.shutdown()
        one.server_close()


def config_of(path: str = f"modelscope:{NAME}", **more: object) -> Any:
    values = {"run.name": "x", "model.family": "flux2-klein", "model.path": path, "data.images": "."}
    return load_config(None, base={**values, **more}).config


def store(hub: Host) -> Host:
    assert hub.other is not None
    return hub.other


def ranges(hub: Host, file: str) -> list[str]:
    return [headers.get("Range", "") for name, headers in store(hub).asked if name == file]


def silent(text: str) -> None:
    return


def test_a_name_says_which_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WHITETUNER_HUB", raising=False)
    huggingface = HubName("huggingface", "Qwen/Qwen-Image")
    assert hub_name("Qwen/Qwen-Image") == hub_name("HuggingFace:Qwen/Qwen-Image") == huggingface
    assert hub_name(' "modelscope:Qwen/Qwen-Image" ') == HubName("modelscope", "Qwen/Qwen-Image")
    for path in (
        "./a/b",
        "a/b/c",
        "C:/models/a",
        "c:a/b",
        "builtin:nano",
        "a/b.safetensors",
        "a",
        "modelscope://a/b",
    ):
        assert hub_name(path) is None, path
    with pytest.raises(UserError, match=r"(?s)no hub 'modelscop'.*huggingface, modelscope"):
        hub_name("modelscop:Qwen/Qwen-Image")
    monkeypatch.setenv("WHITETUNER_HUB", "ModelScope")
    assert hub_name("Qwen/Qwen-Image") == HubName("modelscope", "Qwen/Qwen-Image")
    assert hub_name("huggingface:Qwen/Qwen-Image") == huggingface
    monkeypatch.setenv("WHITETUNER_HUB", "gitee")
    with pytest.raises(UserError, match="WHITETUNER_HUB: there is no hub 'gitee'"):
        hub_name("Qwen/Qwen-Image")


def test_only_what_is_needed_is_fetched_once_and_its_size_is_told_before(
    hub: Host, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UserError, match=r"(?s)not fetched yet.*whitetuner fetch modelscope:someone/FLUX.2-klein-tiny"
    ):
        model_paths(config_of())
    monkeypatch.setattr(modelscope, "_SAID_EVERY_S", 0.0)
    said: list[str] = []
    fetch_for(config_of(), said.append)
    assert said[0].startswith(f"fetching modelscope:{NAME}: ") and "GB (of" in said[0]
    assert f"{NAME}: 0.00 of 0.00 GB are here" in said[1:]
    came = {name for name, _ in hub.asked}
    assert "transformer/diffusion_pytorch_model.safetensors" in came and "tokenizer/tokenizer.json" in came
    assert not any(one.endswith((".bin", ".md", ".fp16.safetensors")) or "assets" in one for one in came)
    paths = model_paths(config_of())
    assert paths.folder == tmp_path / "cache" / "models" / "someone" / "FLUX___2-klein-tiny"
    for file in (one for one in paths.folder.rglob("*") if one.is_file() and one.name[0] != "."):
        assert file.read_bytes() == (model / file.relative_to(paths.folder)).read_bytes()
    before = len(hub.asked)
    fetch_for(config_of(), silent)
    assert len(hub.asked) == before  # it is here: the hub is not asked, which may be far away by now
    fetch(MODEL, SPEC, silent)
    assert [name.rpartition("/")[2] for name, _ in hub.asked[before:]] == ["files"]


def test_a_bare_name_is_of_the_hub_that_the_variable_names(
    hub: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHITETUNER_HUB", "modelscope")
    fetch_for(config_of(NAME), silent)
    assert model_paths(config_of(NAME)).folder == model_paths(config_of()).folder


def test_the_token_goes_to_the_hub_alone(hub: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated = True
    with pytest.raises(UserError, match=r"(?s)logged in, or has agreed.*MODELSCOPE_API_TOKEN") as refused:
        fetch(MODEL, SPEC, silent)
    assert refused.value.code == EXIT_ENVIRONMENT
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
    said: list[str] = []
    fetch(MODEL, SPEC, said.append)
    assert store(hub).asked and not any(TOKEN in str(headers) for _, headers in store(hub).asked)
    assert TOKEN not in " ".join(said)
    for _, headers in [*hub.asked, *store(hub).asked]:
        rest = set(headers) - {"Host", "Accept", "Accept-Encoding", "Connection", "Range"}
        assert rest <= {"User-Agent", "Authorization", "Cookie"} and headers["User-Agent"] == "whitetuner"


def test_parts_that_are_given_otherwise_are_not_fetched_until_they_are_asked_for(
    hub: Host, model: Path
) -> None:
    given = {"model.vae": str(model / "vae")}
    fetch_for(config_of(**given), silent)
    assert not any(name.startswith("vae/") for name, _ in hub.asked)
    assert model_paths(config_of(**given)).component("vae") == model / "vae"
    fetch_for(config_of(), silent)
    paths, heavy = model_paths(config_of()), "transformer/diffusion_pytorch_model.safetensors"
    assert paths.folder is not None and paths.component("vae") == paths.folder / "vae"
    assert len(ranges(hub, heavy)) == 1


@pytest.mark.parametrize("times", [1, 9])
def test_a_fetch_that_was_cut_goes_on_where_it_was(hub: Host, model: Path, times: int) -> None:
    """Once: in the same fetch. Again and again: it ends, what came stays, and the next fetch goes on."""
    file = "text_encoder/model.safetensors"
    store(hub).cut[file] = times
    if times > 1:
        with pytest.raises(
            UserError, match=r"(?s)what came so far stays.*MODELSCOPE_ENDPOINT=.*huggingface:"
        ):
            fetch(MODEL, SPEC, silent)
        with pytest.raises(UserError, match="not fetched yet"):
            model_paths(config_of())
        store(hub).cut[file] = 0
    folder = fetch(MODEL, SPEC, silent)
    assert (folder / file).read_bytes() == (model / file).read_bytes()
    starts = [int(one.removeprefix("bytes=").rstrip("-") or 0) for one in ranges(hub, file)]
    assert starts == sorted(set(starts)) and starts[0] == 0 and len(starts) == (2 if times == 1 else 4)
    assert not list(folder.rglob("*.part"))


def test_a_part_that_is_none_of_this_file_is_told_by_its_hash(hub: Host, model: Path) -> None:
    file, folder = "text_encoder/model.safetensors", modelscope.ModelScope().folder(NAME)
    (folder / "text_encoder").mkdir(parents=True)
    (folder / f"{file}.part").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="other contents"):
        fetch(MODEL, SPEC, silent)
    assert (fetch(MODEL, SPEC, silent) / file).read_bytes() == (model / file).read_bytes()


def test_what_another_program_fetched_is_taken_where_its_hash_is_right(hub: Host, model: Path) -> None:
    folder = modelscope.ModelScope().folder(NAME)
    (folder / "text_encoder").mkdir(parents=True)
    (folder / "vae").mkdir()
    there, spoilt = "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"
    (folder / there).write_bytes((model / there).read_bytes())
    (folder / spoilt).write_bytes(bytes((model / spoilt).stat().st_size))
    fetch(MODEL, SPEC, silent)
    assert ranges(hub, there) == [] and ranges(hub, spoilt) == [""]
    assert (folder / spoilt).read_bytes() == (model / spoilt).read_bytes()


def test_two_processes_do_not_fetch_at_once(hub: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = modelscope.ModelScope().folder(NAME)
    folder.mkdir(parents=True)
    said: list[str] = []
    with modelscope.FileLock(folder / ".fetching.lock"):
        other = threading.Thread(target=fetch, args=(MODEL, SPEC, said.append))
        other.start()
        other.join(1.0)
        assert other.is_alive() and said[-1].startswith("another process fetches")
        assert not any(name.endswith(".json") for name, _ in hub.asked)
    other.join(30.0)
    assert said[-1].startswith("fetched into")


def test_a_path_in_the_list_stays_in_its_folder(hub: Host, tmp_path: Path) -> None:
    names = (
        "vae/../../../escaped.json",
        "vae/..",
        "/vae/a.json",
        "vae/..\\a.json",
        "C:/vae/a.json",
        "vae/a:b.json",
    )
    hub.change = lambda rows: rows + [{"Path": one, "Type": "blob", "Size": 2, "Sha256": ""} for one in names]
    folder = fetch(MODEL, SPEC, silent)
    assert {one.name for one in (folder / "vae").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    assert not list(tmp_path.rglob("escaped.json"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: None, "list of files cannot be read"),
        (lambda rows: [{"Name": "a"}], "list of files cannot be read"),
        (lambda rows: rows * 400, "does not list them all"),
        (lambda rows: [{**one, "Size": one["Size"] + 1} for one in rows], "bytes came"),
        (lambda rows: [{**one, "Path": one["Path"].replace("vae/c", "vae/d")} for one in rows], "not there any more"),
        (lambda rows: [one for one in rows if one["Path"] != "model_index.json"], "model_index.json is missing"),
    ],
)  # fmt: skip
def test_a_list_that_is_not_so_is_told(hub: Host, change: Any, said: str) -> None:
    hub.change = change
    with pytest.raises(UserError, match=said):
        fetch(MODEL, SPEC, silent)


def test_what_is_wrong_is_told_in_both_languages(
    hub: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        UserError, match=r"(?s)no model modelscope:a/b on the hub.*huggingface:a/b"
    ) as missing:
        fetch(HubName("modelscope", "a/b"), SPEC, silent)
    assert "模型站上没有 modelscope:a/b" in told(missing.value, "zh")
    monkeypatch.setattr("whitetuner.hub.fetching.shutil.disk_usage", lambda place: SimpleNamespace(free=7))
    with pytest.raises(UserError, match=r"(?s)GB left.*MODELSCOPE_CACHE"):
        fetch(MODEL, SPEC, silent)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"(?s)could not be fetched.*MODELSCOPE_ENDPOINT"):
        fetch(MODEL, SPEC, silent)
    assert main(["fetch", f"modelscope:{NAME}"]) == 3 and "Traceback" not in capsys.readouterr().err
    assert main(["fetch", "./folder"]) == 2 and "modelscope:ORG/MODEL" in capsys.readouterr().err
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://[")
    with pytest.raises(UserError, match="could not be fetched"):
        fetch(MODEL, SPEC, silent)
    monkeypatch.setenv("ALL_PROXY", "nonsense://1.2.3.4")
    with pytest.raises(UserError, match="could not be fetched"):
        fetch(MODEL, SPEC, silent)
