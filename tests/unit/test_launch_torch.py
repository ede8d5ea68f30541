"""The right build of PyTorch for a machine, and what is said about it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from whitetuner.errors import UserError
from whitetuner.install import environment as env
from whitetuner.install import steps
from whitetuner.install import torch_build as build
from whitetuner.install.machine import Driver
from whitetuner.install.steps import Options

CU130, CU126, CPU = (build.INDEXES + name for name in ("cu130", "cu126", "cpu"))


@pytest.mark.parametrize(
    ("system", "driver", "index", "must"),
    [
        ("linux", Driver((13, 0), (8, 6)), None, False),  # PyPI's default wheel is this build
        ("linux", Driver((12, 8), (8, 9)), CU126, True),  # CUDA 13 needs a newer driver
        ("linux", Driver((13, 0), (6, 1)), CU126, True),  # Pascal: CUDA 13 has no code for it
        (
            "linux",
            Driver((12, 8), (12, 0)),
            None,
            False,
        ),  # Blackwell: 12.6 has none, so the driver must be updated
        ("linux", Driver(), None, False),
        ("win32", Driver((13, 0), (8, 6)), CU130, True),  # PyPI's default wheel on Windows has no CUDA
        ("win32", Driver((12, 4), (8, 6)), CU126, True),
        ("win32", None, None, False),
        ("darwin", None, None, False),
    ],
)
def test_the_build_follows_system_and_driver(
    system: str, driver: Driver | None, index: str | None, must: bool
) -> None:
    chosen = build.choose(system, driver)
    assert (chosen.index, chosen.must) == (index, must)
    assert chosen.why


def test_a_driver_that_is_too_old_is_told() -> None:
    assert "UPDATE THE DRIVER" in build.choose("linux", Driver((12, 8), (12, 0))).why
    assert "UPDATE THE DRIVER" in build.choose("win32", Driver((11, 8), (8, 6))).why


@pytest.mark.parametrize("system", ["linux", "win32", "darwin"])
@pytest.mark.parametrize("driver", [None, Driver((13, 0), (8, 6))])
def test_the_users_index_wins(system: str, driver: Driver | None) -> None:
    assert build.choose(system, driver, "cu126").index == CU126
    assert (
        build.choose(system, driver, "https://mirror.example/whl/cpu").index
        == "https://mirror.example/whl/cpu"
    )
    assert build.choose(system, driver, "pip").index is None


def test_an_index_of_pytorch_gives_its_own_build_or_none() -> None:
    asked = build.choose("linux", None, "cu126").requirement("torch==2.13.0")
    assert asked == "torch==2.13.0+cu126"
    assert (
        build.choose("linux", None, "https://mirror.example/whl").requirement("torch==2.13.0")
        == "torch==2.13.0"
    )
    assert build.choose("linux", None, "pip").requirement("torch==2.13.0") == "torch==2.13.0"


def test_linux_without_nvidia_takes_the_cpu_build_where_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "answers", lambda index: index == CPU)
    assert build.choose("linux", None).index == CPU
    monkeypatch.setattr(build, "answers", lambda index: False)
    fallback = build.choose("linux", None)
    assert fallback.index is None
    assert not fallback.must
    assert CPU in fallback.why


@pytest.fixture
def index() -> Iterator[str]:
    class Index(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200 if self.path == "/whl/cpu/torch/" else 404)
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/whl/"
        server.shutdown()


def test_an_index_answers_when_it_serves_torch(index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert build.answers(index + "cpu")
    assert not build.answers(index + "other")


def test_an_index_that_never_answers_costs_no_more_than_the_time_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as mute:
        begun = time.monotonic()
        assert not build.answers(f"http://127.0.0.1:{mute.getsockname()[1]}", seconds=0.4)
        assert time.monotonic() - begun < 3  # 0.4 s, and slack for a busy machine


@pytest.fixture
def environment(tmp_path: Path) -> env.Environment:
    environment = env.Environment(tmp_path / ".venv")
    (environment.folder / "lib/python3.11/site-packages").mkdir(parents=True)
    (environment.folder / "Lib/site-packages").mkdir(parents=True, exist_ok=True)
    return environment


def test_torch_that_was_installed_is_not_fetched_again(environment: env.Environment) -> None:
    (environment.site_packages / "torch-2.13.0+cpu.dist-info").mkdir()
    there = env.Installed(state="installing", torch_from=CPU)
    chosen, version = steps.choose_torch(environment, there, Options(), "torch==2.13.0")
    assert (chosen.download_mb, version) == (0, "2.13.0")


def test_torch_is_fetched_again_when_its_replacement_was_interrupted(environment: env.Environment) -> None:
    (environment.site_packages / "torch-2.13.0+cpu.dist-info").mkdir()
    there = env.Installed(state="installing", torch_index="cu126", torch_from=build.UNKNOWN)
    chosen, _ = steps.choose_torch(environment, there, Options(), "torch==2.13.0")
    assert chosen.index == CU126


def test_reuse_links_the_torch_of_the_running_python_and_refuses_an_old_one(
    environment: env.Environment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    there = env.Installed(state="installing", reuse_torch=True)
    monkeypatch.setattr(build, "installed_torch", lambda: build.FoundTorch("2.10.1+cu128", tmp_path))
    chosen, version = steps.choose_torch(environment, there, Options(), "torch==2.13.0")
    assert (chosen.download_mb, version) == (0, "2.10.1+cu128")
    link = environment.site_packages / "whitetuner-reuse.pth"
    assert link.read_text(encoding="utf-8").strip() == str(tmp_path)
    for found in (None, build.FoundTorch("2.8.0", tmp_path)):
        monkeypatch.setattr(build, "installed_torch", lambda found=found: found)
        with pytest.raises(UserError, match=r"2\.9 or newer") as caught:
            steps.choose_torch(environment, there, Options(), "torch==2.13.0")
        assert caught.value.code == 3


def test_too_small_a_disk_is_refused_before_anything_is_fetched(
    environment: env.Environment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = build.TorchBuild(CPU, "a test", *build.CPU_MB)
    needed = sum(build.CPU_MB) + sum(build.REST_MB)
    monkeypatch.setattr(steps.machine, "free_mb", lambda folder: needed)
    assert steps.announce(environment, chosen, "2.13.0", []) is None
    said = capsys.readouterr().out
    assert CPU in said
    assert str(environment.folder) in said
    monkeypatch.setattr(steps.machine, "free_mb", lambda folder: needed - 1)
    with pytest.raises(UserError, match="not enough room") as caught:
        steps.announce(environment, chosen, "2.13.0", [])
    assert caught.value.code == 3


def test_a_small_temporary_folder_is_replaced_by_one_beside_the_environment(
    environment: env.Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        steps.machine, "free_mb", lambda folder: 10**6 if folder == environment.folder else 100
    )
    chosen = build.TorchBuild(CPU, "a test", *build.CPU_MB)
    assert steps.announce(environment, chosen, "2.13.0", []) == environment.folder / "tmp"
