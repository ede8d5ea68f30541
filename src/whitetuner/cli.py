"""The command line. Torch is imported by the words that need it, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence

from whitetuner import tongue
from whitetuner.errors import (
    EXIT_ENVIRONMENT,
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_USE,
    FULL,
    UserError,
    out_of_memory,
)
from whitetuner.parser import make_parser

Word = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one word; returns the exit code: 0 ok, 1 the run failed, 2 wrong use, 3 environment, 130 stopped and saved."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(
                errors="replace"
            )  # a Windows console in a legacy code page must not fail on a caption
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Before torch loads: libgomp's threads spin long before they sleep. The demo's step on two cores, seconds: quiet 0.12 by
    # default, 0.14 with this, 0.18 with sleeping at once; beside one busy core 0.66 to 1.4, 0.27 and 0.24 (docs/log.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # It looks for kernels that are not used here, and warns of each that it does not find.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    tongue.speak(_chinese if tongue.language() == "zh" else None)
    parser = make_parser()
    given = parser.parse_args(arguments)
    if given.word is None:
        parser.print_help()
        return EXIT_USE
    try:
        return WORDS[given.word](given)
    except (UserError, RuntimeError, MemoryError) as error:
        told = error if isinstance(error, UserError) else out_of_memory(error, given.word)
        if told is None:
            raise
        _say_error(told)
        return told.code
    except KeyboardInterrupt:
        tongue.say("stopped", wrong=True)
        return EXIT_STOPPED
    except BrokenPipeError:
        # The reader of our output went away (`| head`); say nothing more, also not at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        full = error.errno in FULL
        if error.strerror is None or (error.filename is None and not full):
            raise  # not the system speaking of a file: a fault of ours, to be seen whole
        mend = "make room there" if full else "look at this path and its rights"
        tongue.say(f"error: {error.filename or given.word}: {error.strerror}\n  -> {mend}", wrong=True)
        return EXIT_ENVIRONMENT


def _chinese(text: str) -> str:
    from whitetuner.gui.told import translated  # late: the schema takes a moment, and few lines come to this

    return translated(text, "zh")


def _say_error(error: UserError) -> None:
    """By its templates, and not by what its text looks like."""
    from whitetuner.gui import told

    text = str(error) if tongue.language() == "en" else told.told(error, "zh")
    print(f"error: {text}", file=sys.stderr)


def _demo(given: argparse.Namespace) -> int:
    from whitetuner import demo

    if given.family is None:
        return demo.nano(given.out)
    return demo.family(given.family, given.task, given.method, given.out)


def _selftest(given: argparse.Namespace) -> int:
    from whitetuner import selftest

    return selftest.run(given.family, as_json=given.json)


def _tiny(given: argparse.Namespace) -> int:
    from whitetuner.families import registry

    registry.make_tiny(given.family, str(given.dir), given.variant, given.seed)
    tongue.say(f"wrote a random tiny {given.family} to {given.dir} (it draws noise: its weights are random)")
    return 0


def _testdata(given: argparse.Namespace) -> int:
    from whitetuner.data.samples import make_testdata

    made = make_testdata(given.kind, given.dir, given.count, given.seed)
    tongue.say(f"wrote {len(made)} files to {given.dir}")
    return 0


def _init(given: argparse.Namespace) -> int:
    from whitetuner import config_commands

    return config_commands.init(
        given.preset,
        given.tiny,
        given.out,
        given.foreign,
        given.data,
        given.family,
        given.goal,
        given.vram,
    )


def _check(given: argparse.Namespace) -> int:
    from whitetuner import config_commands

    return config_commands.check(given)


def _train(given: argparse.Namespace) -> int:
    from whitetuner import commands

    return commands.train(given.config, given.overrides, given.resume, given.gpus, wait=given.wait)


def _fork(given: argparse.Namespace) -> int:
    from whitetuner import commands

    return commands.fork(given.run_folder, given.at, given.overrides, given.gpus, start=not given.no_start)


def _plan(given: argparse.Namespace) -> int:
    from whitetuner import commands

    return commands.plan(given)


def _cache(given: argparse.Namespace) -> int:
    from whitetuner import commands

    return commands.cache(given.config, given.overrides)


def _stop(given: argparse.Namespace) -> int:
    from whitetuner import commands

    return commands.stop(given.run_folder, now=given.now)


def _watch(given: argparse.Namespace) -> int:
    from whitetuner import commands

    return commands.watch(given.run_folder, once=given.once)


def _sample(given: argparse.Namespace) -> int:
    from whitetuner import commands

    return commands.sample(given)


def _families(given: argparse.Namespace) -> int:
    from whitetuner import commands

    return commands.families(as_json=given.json)


def _fetch(given: argparse.Namespace) -> int:
    from whitetuner import commands

    return commands.fetch(given.name, given.family)


def _file(given: argparse.Namespace) -> int:
    from whitetuner import file_commands

    return file_commands.WORDS[given.word](given)


def _doctor(given: argparse.Namespace) -> int:
    from whitetuner import commands

    return commands.doctor(given.out, as_json=given.json, bundle=given.bundle, run=given.run)


def _caption(given: argparse.Namespace) -> int:
    from whitetuner import commands

    return commands.caption(given)


def _inspect(given: argparse.Namespace) -> int:
    from whitetuner import commands

    return commands.inspect(given.file, as_json=given.json)


def _portable(given: argparse.Namespace) -> int:
    from whitetuner.portable.build import build

    build(given.dest, given.python, given.torch, print)
    return 0


def _jobs(given: argparse.Namespace) -> int:
    from whitetuner import commands

    return commands.jobs(as_json=given.json)


def _gui(given: argparse.Namespace) -> int:
    from whitetuner import commands

    return commands.gui(given)


#: What runs a word. Each imports what it needs when it runs.
WORDS: dict[str, Word] = {
    "demo": _demo,
    "selftest": _selftest,
    "tiny": _tiny,
    "testdata": _testdata,
    "init": _init,
    "check": _check,
    "train": _train,
    "fork": _fork,
    "plan": _plan,
    "cache": _cache,
    "fetch": _fetch,
    "stop": _stop,
    "watch": _watch,
    "sample": _sample,
    "families": _families,
    **dict.fromkeys(("export", "merge", "extract", "resize"), _file),
    "caption": _caption,
    "doctor": _doctor,
    "inspect": _inspect,
    "portable": _portable,
    "jobs": _jobs,
    "gui": _gui,
}


if __name__ == "__main__":
    sys.exit(main())
