"""launch.py as a user starts it: real processes, a real environment, real pip; only the project is a small stand-in.

The stand-in's torch is an empty wheel in a folder that pip's configuration names, so nothing comes from a network.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROJECT = """[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "whitetuner"
version = "0.1.0"
dependencies = ["torch>=2.9"]
[project.optional-dependencies]
all = []
dev = []
"""

BACKEND = """
import pathlib, zipfile

def build_editable(folder, settings=None, metadata=None):
    name = "whitetuner-0.1.0-py3-none-any.whl"
    info = "whitetuner-0.1.0.dist-info/"
    with zipfile.ZipFile(pathlib.Path(folder) / name, "w") as wheel:
        wheel.writestr("whitetuner.pth", str(pathlib.Path("src").absolute()) + "\\n")
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: whitetuner\\nVersion: 0.1.0\\n"
                       "Requires-Dist: torch>=2.9\\nProvides-Extra: all\\nProvides-Extra: dev\\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "RECORD", "")
    return name
"""

#: Tells what reached it, and ends with the code that it is asked for.
MAIN = """
import json, os, pathlib, sys
import torch
print(json.dumps({"words": sys.argv[1:], "prefix": sys.prefix, "utf8": sys.flags.utf8_mode, "torch": torch.__version__}))
sys.exit(int(sys.argv[2]) if sys.argv[1:2] == ["exit"] else 0)
"""


def make_wheel(folder: Path, version: str) -> None:
    code = f"__version__ = {version!r}\nclass cuda:\n    is_available = staticmethod(lambda: False)\n"
    info = f"torch-{version}.dist-info/"
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("torch/__init__.py", code)
        wheel.writestr(info + "METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        wheel.writestr(
            info + "WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(info + "RECORD", "")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in checkout whose path has spaces, brackets, Chinese and an emoji."""
    root = tmp_path_factory.mktemp("launch") / "my [x] 模型 🎨"
    shutil.copytree(ROOT / "src/whitetuner/install", root / "src/whitetuner/install")
    for name in ("errors.py", "tongue.py", "version.py"):
        shutil.copy(ROOT / "src/whitetuner" / name, root / "src/whitetuner")
    for name in ("launch.py", "gui.py", "start.sh"):
        shutil.copy(ROOT / name, root)
    (root / "src/whitetuner/__init__.py").write_text("", encoding="utf-8")
    (root / "src/whitetuner/__main__.py").write_text(MAIN, encoding="utf-8")
    (root / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
    (root / "backend.py").write_text(BACKEND, encoding="utf-8")
    (root / "constraints.txt").write_text("torch==2.13.0\n", encoding="utf-8")
    # pip splits its list of folders at spaces, so this one has none.
    wheels = root.parent / "wheels"
    wheels.mkdir()
    make_wheel(wheels, "2.13.0+cpu")
    (root.parent / "pip.conf").write_text(
        f"[global]\nno-index = true\nfind-links = {wheels}\n", encoding="utf-8"
    )
    done = start(root, "--torch-index", "pip", "train", "c.toml", "--here")
    assert done.returncode == 0, done.stderr
    return root


def variables(root: Path) -> dict[str, str]:
    """This process's, without anything about Python and pip but the stand-in's pip.conf (beside the checkout)."""
    left_out = ("PIP_", "WHITETUNER_", "PYTHON", "VIRTUAL_ENV", "CONDA")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return kept | {"PIP_CONFIG_FILE": str(root.parent / "pip.conf")}


def copy_of(checkout: Path, place: Path, environment: bool = True) -> Path:
    """Another checkout, with or without the installed environment."""
    left_out = [] if environment else [".venv*", "__pycache__"]
    shutil.copytree(checkout, place, symlinks=True, ignore=shutil.ignore_patterns(*left_out))
    shutil.copy(checkout.parent / "pip.conf", place.parent)
    return place


def start(
    root: Path, *words: str, python: str = sys.executable, **more: str
) -> subprocess.CompletedProcess[str]:
    command = [python, str(root / "launch.py"), *words]
    return subprocess.run(
        command,
        env=variables(root) | more,
        cwd=root.parent,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
    )


def said(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    """What the stand-in said in its last line."""
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(answer, dict)
    return answer


def test_the_words_run_in_the_environment_beside_launch_py(checkout: Path) -> None:
    answer = said(start(checkout, "train", "文件.toml", "--set", "a=1", "--here"))
    assert answer["words"] == ["train", "文件.toml", "--set", "a=1", "--here"]
    assert Path(str(answer["prefix"])).samefile(checkout / ".venv")
    assert answer["torch"] == "2.13.0+cpu"
    assert answer["utf8"] == 1


def test_no_words_open_the_page(checkout: Path) -> None:
    assert said(start(checkout))["words"] == ["gui"]


def test_gui_py_is_the_page(checkout: Path) -> None:
    command = [
        sys.executable,
        "-S",
        str(checkout / "gui.py"),
        "--port",
        "7861",
    ]  # -S: no whitetuner to import
    done = subprocess.run(command, env=variables(checkout), capture_output=True, encoding="utf-8")
    assert said(done)["words"] == ["gui", "--port", "7861"]


@pytest.mark.skipif(os.name == "nt", reason="start.bat is the one for Windows")
def test_start_sh_hands_everything_over(checkout: Path) -> None:
    command = ["sh", str(checkout / "start.sh"), "train", "a b.toml", "--set", 'run.name="x y"', ""]
    done = subprocess.run(command, env=variables(checkout), cwd="/", capture_output=True, encoding="utf-8")
    assert said(done)["words"] == ["train", "a b.toml", "--set", 'run.name="x y"', ""]
    nothing = subprocess.run(
        ["/bin/sh", str(checkout / "start.sh")], env={"PATH": "/nowhere"}, capture_output=True
    )
    assert nothing.returncode == 3
    assert b"Python 3.10 to 3.14" in nothing.stderr


@pytest.mark.parametrize("code", [0, 1, 2, 3, 130])
def test_the_exit_code_comes_through(checkout: Path, code: int) -> None:
    assert start(checkout, "exit", str(code)).returncode == code


def test_a_second_start_installs_nothing_and_adds_less_than_300_ms(checkout: Path) -> None:
    """In seconds of the processor where the system counts them per child: a busy machine says nothing about us."""

    def seconds(command: list[str]) -> float:
        before, begun = os.times(), time.perf_counter()
        done = subprocess.run(command, env=variables(checkout), stdin=subprocess.DEVNULL, capture_output=True)
        assert done.returncode == 0
        assert b"installs itself" not in done.stdout
        after = os.times()
        used = after.children_user + after.children_system - before.children_user - before.children_system
        return used or time.perf_counter() - begun

    program = next(path for path in (checkout / ".venv").glob("*/python*") if path.stem == "python")
    launched = min(seconds([sys.executable, str(checkout / "launch.py"), "x"]) for _ in range(5))
    bare = min(seconds([str(program), "-m", "whitetuner", "x"]) for _ in range(5))
    assert launched - bare < 0.3


def test_a_moved_checkout_runs_from_its_new_place(checkout: Path, tmp_path: Path) -> None:
    moved = copy_of(checkout, tmp_path / "moved")
    done = start(moved, "where", PIP_CONFIG_FILE=os.devnull, PIP_NO_INDEX="1")  # nothing is fetched again
    assert Path(str(said(done)["prefix"])).samefile(moved / ".venv")
    path_file = next((moved / ".venv").rglob("whitetuner.pth"))
    assert path_file.read_text(encoding="utf-8").strip() == str(moved / "src")


def test_a_torn_package_of_an_interrupted_installation_is_installed_again(
    checkout: Path, tmp_path: Path
) -> None:
    copy = copy_of(checkout, tmp_path / "torn")
    record = copy / ".venv/whitetuner-install.json"
    content = json.loads(record.read_text(encoding="utf-8"))
    record.write_text(json.dumps(content | {"state": "installing"}), encoding="utf-8")
    package = next((copy / ".venv").rglob("torch/__init__.py"))
    package.unlink()
    next((copy / ".venv").rglob("torch-*.dist-info/RECORD")).unlink()
    done = start(copy, "train")
    assert said(done)["torch"] == "2.13.0+cpu"
    assert "interrupted" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5])
def test_a_start_that_was_killed_while_installing_is_finished_by_the_next(
    checkout: Path, tmp_path: Path, seconds: float
) -> None:
    copy = copy_of(checkout, tmp_path / "killed", environment=False)
    command = [sys.executable, str(copy / "launch.py"), "--torch-index", "pip", "setup"]
    child = subprocess.Popen(
        command,
        env=variables(copy),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    begun = time.monotonic()
    while not (copy / ".venv/whitetuner-install.json").exists() and time.monotonic() - begun < 30:
        time.sleep(0.01)
    time.sleep(seconds)
    if os.name == "nt":
        child.kill()
    else:
        os.killpg(child.pid, signal.SIGKILL)  # with the pip or venv that it had started
    child.wait()
    assert said(start(copy, "train"))["torch"] == "2.13.0+cpu"


@pytest.mark.slow
def test_two_starts_at_once_install_once(checkout: Path, tmp_path: Path) -> None:
    copy = copy_of(checkout, tmp_path / "twice", environment=False)
    command = [sys.executable, str(copy / "launch.py"), "--torch-index", "pip", "train"]
    both = [
        subprocess.Popen(
            command, env=variables(copy), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
        )
        for _ in range(2)
    ]
    told = [child.communicate()[0] for child in both]
    assert [child.returncode for child in both] == [0, 0], told
    assert sorted("installs itself" in text for text in told) == [False, True]
    assert sorted("waiting" in text for text in told) == [False, True]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of a POSIX terminal")
def test_ctrl_c_while_installing_ends_with_130_and_a_sentence(checkout: Path, tmp_path: Path) -> None:
    copy = copy_of(checkout, tmp_path / "stopped", environment=False)
    command = [sys.executable, str(copy / "launch.py"), "--torch-index", "pip", "train"]
    child = subprocess.Popen(
        command,
        env=variables(copy),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # As a terminal starts it: a job in the background inherits that SIGINT is ignored, and CI may be one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (copy / ".venv/whitetuner-install.json").exists():
        time.sleep(0.01)
    time.sleep(0.5)
    os.killpg(child.pid, signal.SIGINT)
    errors = child.communicate()[1].decode()
    assert child.returncode == 130
    assert "next start goes on" in errors
    assert "launch.py" not in errors  # no traceback of ours
    assert said(start(copy, "train"))["torch"] == "2.13.0+cpu"


@pytest.mark.slow
def test_the_environments_python_may_vanish(checkout: Path, tmp_path: Path) -> None:
    copy = copy_of(checkout, tmp_path / "vanished")
    for path in (copy / ".venv").glob("Scripts/python*" if os.name == "nt" else "bin/python*"):
        path.unlink()
        if os.name != "nt":
            path.symlink_to("/nowhere/python3")
    assert said(start(copy, "train"))["torch"] == "2.13.0+cpu"


def test_a_test_start_adds_the_development_tools_once(checkout: Path) -> None:
    done = start(checkout, "test", "--version")
    assert "updates itself" in done.stdout
    record = json.loads((checkout / ".venv/whitetuner-install.json").read_text(encoding="utf-8"))
    assert record["extras"] == ["all", "dev"]
    assert "updates itself" not in start(checkout, "test", "--version").stdout


@pytest.mark.slow
def test_here_installs_into_the_running_python_and_keeps_its_torch(checkout: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    subprocess.run([sys.executable, "-m", "venv", str(mine)], check=True, env=variables(checkout))
    python = str(next(path for path in mine.glob("*/python*") if path.stem == "python"))
    other = tmp_path / "other"
    other.mkdir()
    make_wheel(other, "2.11.0")
    wheel = str(next(other.iterdir()))
    subprocess.run([python, "-m", "pip", "install", "--quiet", wheel], check=True, env=variables(checkout))
    answer = said(start(checkout, "--here", "train", python=python))
    assert answer["torch"] == "2.11.0"
    assert Path(str(answer["prefix"])).samefile(mine)


@pytest.mark.slow
def test_reuse_takes_the_torch_of_the_running_python(checkout: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    subprocess.run([sys.executable, "-m", "venv", str(mine)], check=True, env=variables(checkout))
    python = str(next(path for path in mine.glob("*/python*") if path.stem == "python"))
    make_wheel(tmp_path, "2.12.1")
    wheel = str(next(tmp_path.glob("torch*.whl")))
    subprocess.run([python, "-m", "pip", "install", "--quiet", wheel], check=True, env=variables(checkout))
    venv = str(tmp_path / "own")
    answer = said(start(checkout, "--reuse-torch", "train", python=python, WHITETUNER_VENV=venv))
    assert answer["torch"] == "2.12.1"
    assert Path(str(answer["prefix"])).samefile(venv)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter (pytest keeps its own to itself)."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_a_read_only_checkout_installs_into_the_users_folder(checkout: Path, open_folder: Path) -> None:
    copy = copy_of(checkout, open_folder / "read only", environment=False)
    shutil.copytree(checkout.parent / "wheels", open_folder / "wheels")
    (open_folder / "pip.conf").write_text(
        f"[global]\nno-index = true\nfind-links = {open_folder / 'wheels'}\n", encoding="utf-8"
    )
    home = open_folder / "home"
    home.mkdir()
    python = shutil.which("python3", path="/usr/bin") or sys.executable
    user: dict[str, int] = {}
    if os.geteuid() == 0:  # root may write everywhere, so another user starts it
        user = {"user": 65534, "group": 65534}
        os.chown(home, 65534, 65534)
    asked = [python, "-c", "import sys, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))"]
    if subprocess.run(asked, capture_output=True, **user).returncode:  # type: ignore[call-overload]
        pytest.skip("no Python with ensurepip that another user may run")
    before = sorted(copy.rglob("*"))
    for path in [*before, copy]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    done: subprocess.CompletedProcess[str] = subprocess.run(  # type: ignore[call-overload]
        [python, str(copy / "launch.py"), "--torch-index", "pip", "train"],
        env=variables(copy) | {"HOME": str(home), "XDG_DATA_HOME": str(home / "data")},
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        **user,
    )
    for path in [copy, *before]:
        path.chmod(0o755)
    assert (home / "data/whitetuner/venvs") in Path(str(said(done)["prefix"])).parents
    assert sorted(copy.rglob("*")) == before


@pytest.mark.parametrize("version", ["3.9", "3.8", "3.6", "2.7"])
def test_another_python_is_told_which_ones_fit(version: str) -> None:
    """With the old Python itself where the machine has one; launch.py has to parse there."""
    kept_by_pyenv = [str(path) for path in Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    python = next(iter([*kept_by_pyenv, *filter(None, [shutil.which(f"python{version}")])]), None)
    if python is None:
        pytest.skip(f"no Python {version} on this machine")
    done = subprocess.run([python, str(ROOT / "launch.py"), "demo"], capture_output=True)
    assert done.returncode == 3
    assert "Python 3.10 to 3.14" in done.stderr.decode()
    assert version in done.stderr.decode()
    assert b"Traceback" not in done.stderr


def test_what_does_not_fit_is_named() -> None:
    import runpy

    names = runpy.run_path(str(ROOT / "launch.py"))
    refusal = names["refusal"]
    assert refusal((3, 10, 0), True, "CPython") == []
    assert refusal((3, 14, 9), True, "CPython") == []
    for version, is_64_bit, kind, word in (
        ((3, 15, 0), True, "CPython", "3.15"),
        ((3, 9, 18), True, "CPython", "3.9"),
        ((3, 12, 0), False, "CPython", "32-bit"),
        ((3, 11, 0), True, "PyPy", "PyPy"),
    ):
        lines = refusal(version, is_64_bit, kind)
        assert word in lines[0]
        assert "->" in lines[-1]


@pytest.mark.slow
def test_a_fresh_clone_installs_and_starts(tmp_path: Path) -> None:
    """The real thing: everything from where pip is configured to take it, into an empty folder, with an empty cache."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    command = [sys.executable, str(clone / "launch.py")]
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "WHITETUNER_"))
    }
    done = subprocess.run([*command, "setup"], env=kept | {"PIP_NO_CACHE_DIR": "1"}, stdin=subprocess.DEVNULL)
    assert done.returncode == 0
    helped = subprocess.run([*command, "train", "--help"], env=kept, capture_output=True, encoding="utf-8")
    assert helped.returncode == 0
    assert "CONFIG" in helped.stdout.upper()
