"""Where a preset's values come from, written beside them: what `init` gives says of each number who stands for it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import tomlkit

from whitetuner.config.options import spec_of
from whitetuner.family import Setting

_HEADER = re.compile(r"\[([\w.]+)\]\s*(#.*)?$")
_KEY = re.compile(r"(\w+)\s*=")
#: Of what presets say and no family proposes.
_FOR_ALL = {
    "optimizer.warmup_steps": "the first lengths of AdamW's steps are unsure (Liu et al. 2019, arXiv 1908.03265); "
    "costs nothing (docs/laboratory.md)"
}


def with_sources(text: str) -> str:
    """A preset's text with the family's source as a comment on each value that is the family's proposal, and the proposals
    that the preset leaves unsaid as comments of their own. What the text says as a config stays the same.
    """
    document = tomlkit.parse(text).unwrap()
    settings = spec_of(document["model"]["family"]).settings
    lines: list[str] = []
    section, last = "", dict[str, int]()
    for line in text.split("\n"):
        header, key = _HEADER.match(line), _KEY.match(line)
        if header:
            section = header[1]
        elif line.startswith("["):  # of an array of tables: nothing of ours
            section = ""
        elif key and section:
            name = f"{section}.{key[1]}"
            setting, source = settings.get(name), _FOR_ALL.get(name)
            if setting is not None and document[section][key[1]] == setting.value:
                source = setting.source
            if source is not None:
                line += f"{'; ' if '#' in line else '   # '}{source}"
            last[section] = len(lines)
        lines.append(line)
    unsaid = _unsaid(settings, document)
    # from below, so that the numbers of lines hold
    for name in sorted(unsaid, key=lambda one: -last.get(one, 0)):
        if name in last:
            lines[last[name] + 1 : last[name] + 1] = unsaid[name]
    more = [line for name in unsaid if name not in last for line in (f"[{name}]", *unsaid[name], "")]
    return "\n".join([*lines, *more])


def _unsaid(settings: Mapping[str, Setting], document: Mapping[str, Any]) -> dict[str, list[str]]:
    """Section -> a comment for each proposal that the document says nothing of, and that means something for its method."""
    found: dict[str, list[str]] = {}
    method = document.get("method", {})
    idle = {"method.factor", "method.full_matrix"} if method.get("kind") == "lora" else set()
    if method.get("kind") == "lokr" and method.get("full_matrix"):
        idle = {"method.rank"}
    for key, setting in settings.items():
        section, _, name = key.partition(".")
        if key not in idle and name not in document.get(section, {}):
            value = json.dumps(setting.value)  # of words, numbers and truths: TOML's, too
            found.setdefault(section, []).append(f"# {name} = {value}   # default: {setting.source}")
    return found
