"""Where the environment goes, how it is made without venv, how an interrupted one heals."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from whitetuner.errors import UserError
from whitetuner.install import environment as env
from whitetuner.install import machine


def test_the_environment_lies_beside_launch_py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WHITETUNER_VENV", raising=False)
    assert env.choose_folder(tmp_path) == tmp_path / ".venv"


def test_the_environment_of_a_checkout_that_may_not_be_written_lies_in_the_users_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WHITETUNER_VENV", raising=False)
    monkeypatch.setattr(machine, "is_writable", lambda folder: False)
    monkeypatch.setattr(machine, "user_folder", lambda: tmp_path / "mine")
    first, second = env.choose_folder(tmp_path / "a"), env.choose_folder(tmp_path / "b")
    assert first.parent == second.parent == tmp_path / "mine/venvs"
    assert first != second


@pytest.mark.skipif(sys.platform != "linux", reason="a folder that even root cannot write to: /proc")
def test_a_folder_is_writable_only_when_a_file_can_be_made(tmp_path: Path) -> None:
    assert machine.is_writable(tmp_path)
    assert not machine.is_writable(Path("/proc"))
    assert not machine.is_writable(tmp_path / "missing")


def test_the_variable_names_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHITETUNER_VENV", str(tmp_path / "else where"))
    assert env.choose_folder(tmp_path) == tmp_path / "else where"


def test_a_deep_folder_on_windows_gets_a_short_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WHITETUNER_VENV", raising=False)
    monkeypatch.setattr(machine, "has_long_paths", lambda: False)
    monkeypatch.setattr(machine, "user_folder", lambda: tmp_path)
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    assert env.choose_folder(deep).parent == tmp_path / "venvs"


def test_pip_keeps_its_configuration_but_not_what_leads_out_of_the_environment() -> None:
    given = {
        "PIP_INDEX_URL": "u",
        "PIP_FIND_LINKS": "f",
        "PIP_TARGET": "t",
        "PYTHONPATH": "p",
        "PIP_USER": "1",
        "PATH": "x",
    }
    assert env.clean(given) == {"PIP_INDEX_URL": "u", "PIP_FIND_LINKS": "f", "PIP_USER": "0", "PATH": "x"}


def test_one_installation_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []

    def second() -> None:
        with env.only_one(tmp_path / ".venv"):
            order.append("second")

    with env.only_one(tmp_path / ".venv"):
        waiting = threading.Thread(target=second)
        waiting.start()
        time.sleep(0.3)
        order.append("first")
    waiting.join(10)
    assert order == ["first", "second"]
    assert "waiting" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("torn", ["_internal/cli/main.py", "RECORD"])
def test_an_environment_whose_pip_was_torn_is_made_anew(tmp_path: Path, torn: str) -> None:
    """As a kill while pip is unpacked leaves it: a package that imports, and does nothing."""
    place = env.Environment(tmp_path / ".venv")
    made = env.make(place, env.Installed())
    assert env.make(place, made).own and (place.site_packages / "pip").is_dir()
    [whole] = place.site_packages.glob("pip-*.dist-info")
    lost = whole / torn if torn == "RECORD" else place.site_packages / "pip" / torn
    lost.unlink()
    env.make(place, made)
    assert lost.exists() and env.pip_version(place) > (1, 0)


def test_packages_torn_by_an_interruption_are_installed_again(tmp_path: Path) -> None:
    for name in ("whole-1.0.dist-info", "torn-2.0.dist-info", "~ld-1.0.dist-info", "~ld"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "METADATA").write_text("Name: x", encoding="utf-8")
    (tmp_path / "whole-1.0.dist-info/RECORD").write_text("", encoding="utf-8")
    assert env.heal(tmp_path) == ["torn"]
    assert [path.name for path in tmp_path.iterdir()] == ["whole-1.0.dist-info"]


@pytest.mark.parametrize(
    ("log", "word"),
    [
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        (
            "NewConnectionError(...) ... No matching distribution found for torch==2.13.0",
            "could not be reached",
        ),
        ("ssl.SSLCertVerificationError: CERTIFICATE_VERIFY_FAILED", "certificate"),
        ("ERROR: No matching distribution found for torch==2.13.0", "no build"),
        ("PermissionError: [Errno 13] Permission denied: 'x'", "could not be written"),
        ("something new", "last lines"),
    ],
)
def test_pips_log_becomes_a_sentence_with_a_mend(log: str, word: str) -> None:
    error = env.explain(log, Path("pip.log"))
    assert word in str(error)
    assert error.mend
    assert error.code == 3


def test_a_folder_of_somebody_elses_is_not_touched(tmp_path: Path) -> None:
    folder = tmp_path / ".venv"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="in the way"):
        env.make(env.Environment(folder), env.Installed())
    assert (folder / "notes.txt").read_text(encoding="utf-8") == "mine"


def without(monkeypatch: pytest.MonkeyPatch, *modules: str, programs: bool = False) -> None:
    """As on a system that lacks these modules, and the virtualenv and uv programs."""
    find = env.importlib.util.find_spec
    monkeypatch.setattr(env.importlib.util, "find_spec", lambda name: None if name in modules else find(name))
    if not programs:
        monkeypatch.setattr(env.shutil, "which", lambda name: None)


def test_nothing_that_makes_environments_names_the_systems_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "venv", "virtualenv")
    monkeypatch.setattr(machine, "venv_package", lambda: "sudo apt install python3.11-venv")
    with pytest.raises(UserError, match=r"sudo apt install python3\.11-venv") as caught:
        env._create(tmp_path / ".venv")
    assert caught.value.code == 3


@pytest.mark.skipif(sys.platform != "linux", reason="reads /etc/os-release")
def test_the_systems_package_fits_the_python(monkeypatch: pytest.MonkeyPatch) -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for system, said in {
        "ID=debian": f"sudo apt install python{version}-venv",
        "ID=pop\nID_LIKE=ubuntu debian": f"sudo apt install python{version}-venv",
        "ID=fedora": "sudo dnf install python3-virtualenv",
        "ID=nixos": f"{sys.executable} -m pip install --user virtualenv",
    }.items():
        monkeypatch.setattr(Path, "read_text", lambda self, system=system, **how: system)
        assert machine.venv_package() == said


def test_virtualenv_stands_in_for_a_missing_ensurepip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # virtualenv comes with pre-commit among the development tools.
    without(monkeypatch, "ensurepip")
    folder = tmp_path / "a 环境 🎨/.venv"
    folder.mkdir(parents=True)
    env._create(folder)
    command = env.Environment(folder).command("-m", "pip", "--version")
    assert str(folder) in subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
