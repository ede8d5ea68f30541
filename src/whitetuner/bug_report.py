"""A file for bug reports: the machine and, if wished, a run's settings and events. No picture, no caption, no prompt, no key.

What goes in is listed, not what stays out: a file or a field that is new is left away until somebody says that it is harmless.
"""

from __future__ import annotations

import getpass
import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from whitetuner.doctor import Finding, as_json, as_text
from whitetuner.errors import UserError
from whitetuner.runs import events
from whitetuner.runs.folder import RunFolder

#: Settings that are somebody's words: only their length is told.
_WORDS = {"prompt", "text", "negative", "default_caption", "trigger", "instruction", "name"}
#: Steps told: the first and the last ones.
_STEPS = 200
_LOG_BYTES = 1 << 18


def write_bundle(path: Path, findings: Sequence[Finding], run: Path | None) -> list[str]:
    """Writes the zip; returns the names in it. Raises UserError when it is there already or run is no run."""
    if path.exists():
        raise UserError("{path} is there already", where="--bundle", mend="give another name", path=path)
    texts = {"machine.txt": as_text(findings), "machine.json": json.dumps(as_json(findings), indent=1)}
    if run is not None:
        texts.update(_of_run(RunFolder(run)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "x", zipfile.ZIP_DEFLATED) as file:
        for name, text in texts.items():
            file.writestr(name, without_names(text))
    return list(texts)


def _of_run(folder: RunFolder) -> dict[str, str]:
    folder.require()
    document = folder.document()
    private = {str(value) for value in _words_of(document) if len(str(value)) > 3}
    told = {
        "config": _settings(document.get("config", {})),
        **{
            key: document.get(key)
            for key in ("run_id", "versions", "hardware", "resolved", "measured", "forked_from")
        },
    }
    happened, _ = events.read(folder.events)
    steps = [event.step for event in happened if isinstance(event, events.StepDone)]
    few = {*steps[:_STEPS], *steps[-_STEPS:]}
    lines = [
        _event(event) for event in happened if not isinstance(event, events.StepDone) or event.step in few
    ]
    found = {"run.json": json.dumps(told, indent=1, ensure_ascii=False), "events.jsonl": "".join(lines)}
    for log in sorted(folder.logs.glob("*.log"))[-3:] if folder.logs.is_dir() else []:
        found[f"logs/{log.name}"] = _unquoted(log.read_bytes()[-_LOG_BYTES:].decode("utf-8", "replace"))
    for name in ("events.jsonl", *(one for one in found if one.startswith("logs/"))):
        for words in sorted(private, key=len, reverse=True):  # messages and logs may say them again
            found[name] = found[name].replace(words, "(words)")
    return found


def _words_of(value: Any, name: str = "") -> list[Any]:
    """Every setting that is somebody's words."""
    if isinstance(value, dict):
        return [one for key, inner in value.items() for one in _words_of(inner, key)]
    if isinstance(value, list):
        return [one for inner in value for one in _words_of(inner, name)]
    return [value] if name in _WORDS and isinstance(value, str) else []


def _settings(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _settings(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [_settings(inner, name) for inner in value]
    if isinstance(value, str) and name in _WORDS:
        return f"({len(value)} characters)"
    if isinstance(value, str) and ("/" in value or "\\" in value):
        return f"(path) {value.replace(chr(92), '/').rstrip('/').rpartition('/')[2]}"
    return value


#: Messages quote what they are about, a caption among it; places in program files stay.
_QUOTED = re.compile(r"""(?<![\w(=])(?<!File )('[^\n]{4,}?'(?!\w)|"[^"\n]{4,}")""")


def _unquoted(text: str) -> str:
    return _QUOTED.sub("(words)", text)


def _event(event: events.Event) -> str:
    if isinstance(event, events.Message):
        event = replace(event, text=_unquoted(event.text))
    if isinstance(event, events.Failed):
        event = replace(event, reason=_unquoted(event.reason))
    if isinstance(event, events.Preview):
        hidden = [f"({len(prompt)} characters)" for prompt in event.prompts]
        event = events.Preview(
            time=event.time, step=event.step, files=[], prompts=hidden, seconds=event.seconds
        )
    return events.as_line(event)


def without_names(text: str) -> str:
    """Without the user's name and home folder."""
    home = str(Path.home())
    for one in (home, home.replace("\\", "\\\\"), home.replace("\\", "/")):
        if len(one) > 1:
            text = text.replace(one, "~")
    user = getpass.getuser()
    return text.replace(user, "USER") if len(user) > 3 and user != "root" else text
