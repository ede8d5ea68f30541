"""The words of the command line about files: what is typed, what is printed. The work is in file_words.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from whitetuner import file_words
from whitetuner.adapters.shapes import AdapterSettings
from whitetuner.errors import UserError
from whitetuner.tongue import say


def _export(given: argparse.Namespace) -> int:
    to = (given.target, given.to, given.family, given.dtype)
    say(file_words.export(given.source, *to, checkpoint=given.checkpoint))
    return 0


def _merge(given: argparse.Namespace) -> int:
    say(file_words.merge(given.base, given.adapter, given.target, given.strength, given.dtype, given.part))
    return 0


def _extract(given: argparse.Namespace) -> int:
    _only_lokr(given.kind, {"--full-matrix": given.full_matrix})
    settings = AdapterSettings(given.kind, given.rank, None, given.factor, given.full_matrix)
    done, error = file_words.extract(given.tuned, given.base, given.target, settings, given.to, say)
    say(f"wrote {done.path} ({done.modules} layers); relative error over all that differs: {error:.2%}")
    return 0


def _resize(given: argparse.Namespace) -> int:
    _only_lokr(given.kind, {"--factor": given.factor})
    wanted = {"rank": given.rank, "kind": given.kind, "factor": given.factor}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    done, error = file_words.resize(given.source, given.target, wanted, given.family)
    say(f"wrote {done.path} ({done.modules} layers); relative error: {error:.2%}")
    return 0


def _only_lokr(kind: str | None, given: dict[str, object]) -> None:
    for where, value in given.items():
        if value and kind == "lora":
            raise UserError("a LoRA has no such thing", where=where, mend="leave it out, or use --kind lokr")


WORDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "export": _export,
    "merge": _merge,
    "extract": _extract,
    "resize": _resize,
}
