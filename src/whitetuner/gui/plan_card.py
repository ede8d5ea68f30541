"""The plan card: `whitetuner plan` in a child process, its choices as numbers and words in the page's language."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from whitetuner.config.schema import Config
from whitetuner.errors import EXIT_FAILED, UserError
from whitetuner.gui.made import child_environment
from whitetuner.gui.told import translated
from whitetuner.gui.words import texts
from whitetuner.paths import PYTHON
from whitetuner.runs.files import write_atomically

GIB = 1 << 30
#: Cards that are asked for where none is found.
CARDS_GB = (8, 10, 12, 16, 24, 32)
_PATIENCE_S = 180
#: One plan at a time: it takes a core for seconds, and a form that is typed into asks often.
_ONE = Lock()
_KEPT: dict[str, dict[str, Any]] = {}
_KEPT_PLANS = 64


def plan(text: str, vram_gb: float | None, language: str, folder: Path) -> dict[str, Any]:
    """{"cards": [...], "shape", "found"} for a form's document.

    vram_gb: None: the card of this machine; where there is none, one row for each usual size. found: a card is here.
    folder: where the config is put for the child. Raises UserError with what the plan said when nothing fits.
    """
    key = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
    file = folder / f"{key[:16]}.toml"

    def asked() -> dict[str, Any]:
        write_atomically(file, text)
        try:
            return _asked([str(file)], vram_gb)
        finally:
            file.unlink(missing_ok=True)

    return told(_once(f"{vram_gb} {key}", asked), vram_gb, language)


def plan_released(config: Config, vram_gb: float | None, language: str) -> dict[str, Any]:
    """The same before there is a model or data: of the released model at its usual settings and this resolution."""
    variant = getattr(config.model_options(), "variant", "auto")
    name = config.model.family if variant == "auto" else f"{config.model.family}:{variant}"
    given = config.data.resolution
    side = given if isinstance(given, int) else max(given)
    words = [name, "--task", config.model.task, "--size", f"{side}x{side}"]
    document = _once(f"{vram_gb} {words}", lambda: _asked(words, vram_gb))
    steps = None if config.run.epochs else config.run.steps
    answer = told({**document, "steps": steps}, vram_gb, language)
    return {**answer, "released": True, "what": document.get("what", "")}


def _once(key: str, ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was asked before is not asked again."""
    with _ONE:
        if key not in _KEPT:
            while len(_KEPT) >= _KEPT_PLANS:
                del _KEPT[next(iter(_KEPT))]
            _KEPT[key] = ask()
        return _KEPT[key]


def _asked(subject: list[str], vram_gb: float | None) -> dict[str, Any]:
    vram = [] if vram_gb is None else ["--vram", f"{vram_gb:g}"]
    try:
        done = subprocess.run(
            [*PYTHON, "-m", "whitetuner", "plan", *subject, "--json", *vram],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=child_environment(),
            timeout=_PATIENCE_S,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            "the plan is not ready after {seconds} s",
            mend="try it in a terminal: whitetuner plan",
            code=EXIT_FAILED,
            seconds=_PATIENCE_S,
        ) from error
    try:
        document = json.loads(done.stdout)
    except ValueError:
        document = None
    if isinstance(document, dict):
        return document
    reason = done.stderr.strip().replace(subject[0], Path(subject[0]).name)
    raise UserError("{reason}", code=EXIT_FAILED, reason=reason[-1500:].removeprefix("error: "))


def told(document: Mapping[str, Any], vram_gb: float | None, language: str) -> dict[str, Any]:
    """The child's JSON as the card shows it: rows of short words, most important first."""
    steps = document.get("steps")
    rows = document.get("plans") if isinstance(document.get("plans"), list) else [document]
    cards = [_card(row, steps, language) for row in rows or []]
    return {
        "cards": cards,
        "shape": document.get("shape", ""),
        "found": vram_gb is None and len(cards) == 1,
        "sizes": list(CARDS_GB),
    }


def _card(row: Mapping[str, Any], steps: int | None, language: str) -> dict[str, Any]:
    say = texts("form", language)
    machine = row.get("machine") or {}
    vram = row.get("vram_gb") or machine.get("vram_bytes", 0) / GIB
    found: dict[str, Any] = {
        "name": translated(str(row.get("card") or machine.get("name", "")), language),
        "vram": round(vram, 1),
        "refused": "",
        "choices": [],
    }
    if row.get("encoders"):
        found["encoders"] = [_encoder(one, say) for one in row["encoders"]]
    if "refused" in row:
        return {**found, "refused": translated(str(row["refused"]), language)}
    choices = row.get("choices", [])
    best = choices[0]
    gain = 1 - row.get("seconds_with_2gb_more", best["seconds"]) / best["seconds"]
    return {
        **found,
        "measured": say["plan_measured" if machine.get("measured") else "plan_estimated"],
        "why": translated(str(row.get("why", "")), language)
        + ("" if row.get("previews", True) else f" {say['plan_no_previews']}"),
        "more": say["plan_more"].format(share=round(100 * gain)) if gain > 0.005 else say["plan_no_more"],
        "choices": [_choice(one, best, steps, say, number) for number, one in enumerate(choices)],
    }


def _encoder(one: Mapping[str, Any], say: Mapping[str, str]) -> str:
    """How a text encoder or language model is held while pictures and captions are cached."""
    if one["too_large"]:
        return say["plan_encoder_large"].format(part=one["part"], gb=f"{one['too_large']:.1f}")
    waiting, blocks = one["streamed"], one["blocks"]
    words = [
        say["plan_base"].format(base=one["base"]),
        f"{one['gb']:.1f} GB",
        say["plan_swap"].format(count=waiting, blocks=blocks) if waiting else say["plan_all"],
    ]
    if one["seconds"] >= 0.5:
        words.append(say["plan_encoder_time"].format(time=duration(one["seconds"], say)))
    return say["plan_encoder"].format(part=one["part"], words=", ".join(words))


def _choice(
    one: Mapping[str, Any], best: Mapping[str, Any], steps: int | None, say: Mapping[str, str], number: int
) -> dict[str, Any]:
    blocks, waiting = one["blocks"], one["blocks"] - len(one["residents"])
    again = blocks - len(one["plain"])
    lost = one["seconds"] / one["computing_s"] - 1 if one["computing_s"] else 0.0
    words = [
        say["plan_base"].format(base=one["base"]),
        say["plan_swap"].format(count=waiting, blocks=blocks) if waiting else say["plan_all"],
        say["plan_again"].format(count=again, blocks=blocks) if again else say["plan_kept"],
        say["plan_full_speed"] if lost < 0.01 else say["plan_waiting"].format(share=round(100 * lost)),
    ]
    figures = [
        say["plan_peak"].format(gb=f"{one['peak_bytes'] / GIB:.1f}"),
        say["plan_host"].format(gb=f"{one['host_bytes'] / GIB:.0f}"),
        say["plan_step"].format(seconds=f"{one['seconds']:.2g}" if one["seconds"] >= 0.01 else "0.01"),
    ]
    if one.get("disk_bytes"):
        figures.append(say["plan_disk"].format(gb=f"{one['disk_bytes'] / GIB:.0f}"))
    if steps:
        figures.append(say["plan_total"].format(steps=steps, time=duration(steps * one["seconds"], say)))
    parts = sorted(one.get("parts", {}).items(), key=lambda part: -part[1])
    return {
        "title": say[_title(one, best, number)],
        "words": words,
        "figures": figures,
        "parts": [[translated_part(name, say), round(size / GIB, 2)] for name, size in parts if size > 0],
        "peak": one["peak_bytes"] / GIB,
        "changes": {
            "memory.base": "bf16" if one["base"] == "fp32" else one["base"],
            "memory.blocks_to_swap": str(waiting),
            **(
                {"memory.gradient_checkpointing": "true" if again else "false"}
                if again in (0, blocks)
                else {}
            ),
        },
    }


def translated_part(name: str, say: Mapping[str, str]) -> str:
    """The part of a model in the words of the page; its own name where they have none."""
    return say.get(f"part:{name}", name)


def _title(one: Mapping[str, Any], best: Mapping[str, Any], number: int) -> str:
    if number == 0:
        return "plan_recommended"
    if one["seconds"] < best["seconds"] * 0.99:
        return "plan_faster"
    if one["peak_bytes"] < best["peak_bytes"] * 0.99:
        return "plan_smaller"
    finer = one["base"] in ("fp32", "bf16") and best["base"] not in ("fp32", "bf16")
    return "plan_finer" if finer else "plan_other"


def duration(seconds: float, say: Mapping[str, str]) -> str:
    """In words: "1 h 20 min", "12 min", "40 s"."""
    if seconds < 90:
        return say["seconds"].format(n=round(seconds))
    minutes = round(seconds / 60)
    if minutes < 90:
        return say["minutes"].format(n=minutes)
    hours = say["hours"].format(n=minutes // 60)
    return f"{hours} {say['minutes'].format(n=minutes % 60)}" if minutes % 60 else hours
