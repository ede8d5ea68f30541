"""`python launch.py [OPTIONS] [WORDS]`: installs when needed, then hands the words over to `whitetuner`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from whitetuner import tongue
from whitetuner.errors import EXIT_ENVIRONMENT, EXIT_STOPPED, EXIT_USE, UserError
from whitetuner.install import environment as env
from whitetuner.install import machine
from whitetuner.install.steps import EXTRAS, Options, install
from whitetuner.version import __version__

HELP = """usage: python launch.py [OPTIONS] [WORDS]

Installs White Tuner into .venv beside this file when needed, then runs `whitetuner WORDS` in it.

  python launch.py                the page
  python launch.py demo           three minutes, no GPU: train the embedded model and see what it learned
  python launch.py WORDS --help   help on any word; `whitetuner --help` in .venv lists them
  python launch.py setup          only install
  python launch.py test [--all]   install the development tools too and run the tests; --all: the slow ones as well;
                                  other arguments go to pytest

Options, before the words or after `setup`; they are remembered:
  --torch-index NAME|URL   take PyTorch from there: cpu, cu130, cu126, rocm7.2 (PyTorch's own indexes), an address,
                           or pip (whatever pip is configured for). Default: what fits this machine
  --reuse-torch            use the PyTorch (2.9 or newer) of the Python that runs this instead of another one
  --here                   no .venv: install into the Python that runs this; a PyTorch that is there stays
  --again                  throw .venv away and install anew

Environment: WHITETUNER_VENV=FOLDER puts .venv elsewhere; PIP_* and pip's configuration files are honoured.
Exit codes: 0 ok, 1 failed, 2 wrong use, 3 this machine or its Python does not fit, 130 stopped.
"""


def main(root: str, arguments: Sequence[str]) -> int:
    """root: the checkout's folder. Returns the exit code; on POSIX it does not come back from a word that runs."""
    tongue.speak(chinese().text if tongue.language() == "zh" else None)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a console in a legacy code page shows ? instead of failing
            stream.reconfigure(errors="replace")
    try:
        return run(Path(root), arguments)
    except UserError as error:
        tongue.say(f"error: {error}", wrong=True)
        print("错误：未能启动，请按上面 -> 后的提示处理", file=sys.stderr, flush=True)
        return error.code
    except KeyboardInterrupt:
        tongue.say("\nstopped; the next start goes on from here", wrong=True)
        return EXIT_STOPPED


def chinese() -> tongue.Phrases:
    """The installer's own sentences: it is there before anything that could read the page's."""
    return tongue.Phrases(json.loads(Path(__file__).with_name("words_zh.json").read_text(encoding="utf-8")))


def run(root: Path, arguments: Sequence[str]) -> int:
    """launch.py: installs what is missing, then runs the words. Their exit code; on POSIX they take this process's place."""
    options, words = split(arguments)
    if words[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if words[0] == "--version":
        print(f"White Tuner {__version__}")
        return 0
    environment = (
        env.Environment(Path(sys.prefix), here=True)
        if options.here
        else env.Environment(env.choose_folder(root))
    )
    extras = {*EXTRAS, *(["dev"] if words[0] == "test" else [])}
    if not is_ready(environment, root, options, extras):
        if options.here and machine.is_externally_managed():
            raise UserError(
                "the system's package manager owns this Python (PEP 668), so nothing may be installed into it",
                where=sys.executable,
                mend="leave --here out: White Tuner then makes its own environment",
                code=EXIT_ENVIRONMENT,
            )
        with env.only_one(environment.folder):
            if not is_ready(environment, root, options, extras):
                install(environment, root, options, extras)
    if words[0] == "setup":
        tongue.say(f"ready: {environment.folder}; next: python launch.py demo")
        return 0
    return hand_over(environment, root, words)


def split(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """Our options from the front (after `setup`: all), the rest untouched. No word means the page."""
    left, options, setup = list(arguments), Options(), False
    while left:
        name, has_value, value = left[0].partition("=")
        if name == "setup" and not setup:
            setup = True
        elif name == "--torch-index":
            if not has_value:
                if len(left) < 2:
                    raise UserError("{name} needs a value", mend="see python launch.py --help", name=name)
                value = left.pop(1)
            options = replace(options, torch_index=value)
        elif left[0] == "--reuse-torch":
            options = replace(options, reuse_torch=True)
        elif left[0] == "--here":
            options = replace(options, here=True)
        elif left[0] == "--again":
            options = replace(options, again=True)
        elif setup and name not in ("-h", "--help"):
            raise UserError("setup takes no {word}", mend="see python launch.py --help", word=left[0])
        else:
            break
        left.pop(0)
    if options.torch_index and options.reuse_torch:
        raise UserError(
            "--torch-index and --reuse-torch contradict each other", mend="leave one out", code=EXIT_USE
        )
    if setup:
        return options, left or ["setup"]
    if not left or (left[0].startswith("-") and left[0] not in ("-h", "--help", "--version")):
        left.insert(0, "gui")  # `launch.py --port 7861` is the page, too
    return options, left


def is_ready(environment: env.Environment, root: Path, options: Options, extras: set[str]) -> bool:
    """Whether the environment holds what is asked for; quick, for it stands before every start."""
    there = environment.read()
    return (
        there.state == "ready"
        and not options.again
        and there.root == str(root)
        and environment.base_is_there(there)
        and there.key == env.pins_key(root)
        and extras <= {*there.extras}
        and options.torch_index in (None, there.torch_index)
        and options.reuse_torch in (None, there.reuse_torch)
    )


def hand_over(environment: env.Environment, root: Path, words: Sequence[str]) -> int:
    """Runs the words in the environment: in this process's place on POSIX, as a child on Windows."""
    command = [str(environment.python), "-m", "whitetuner", *words]
    if words[0] == "test":
        rest = [word for word in words[1:] if word != "--all"]
        chosen = ["--run-slow"] if "--all" in words else [] if "-m" in rest else ["-m", "not slow"]
        if not rest or (len(rest) == 2 and rest[0] == "-m"):  # the whole suite, not a chosen test
            chosen += ["-n", "logical", "--maxprocesses", "4", "--dist", "loadfile"]
        command = [str(environment.python), "-m", "pytest", *chosen, *rest]
        os.chdir(root)
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONHOME"}
    variables.setdefault("PYTHONUTF8", "1")
    if not os.access(root / "src", os.W_OK):
        # Compiled modules of a read-only checkout go beside its environment, or every start would compile anew.
        variables.setdefault("PYTHONPYCACHEPREFIX", str(environment.folder / "pycache"))
    if os.name != "nt":
        _replace(command, variables)
    with subprocess.Popen(command, env=variables) as child:
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:
                continue  # Ctrl-C reached the child, too: it saves and ends by itself


def _replace(command: Sequence[str], variables: dict[str, str]) -> NoReturn:
    sys.stdout.flush()
    os.execve(command[0], list(command), variables)
