"""What stands around the forms: the title, the tabs of the runs, their words. Run views are drawn by static/run.js."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from html import escape
from importlib import resources

from whitetuner.gui.shell import LANGUAGES
from whitetuner.gui.training_tabs import Tab

#: Scripts and style of the page, served by ourselves.
HEAD = """
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="/static/run.css"><link rel="stylesheet" href="/static/form.css">
<script type="module" src="/static/run.js"></script>
"""


@cache
def words() -> dict[str, list[str]]:
    """Name -> its words in the order of LANGUAGES."""
    text = resources.files("whitetuner.gui").joinpath("static/run_words.json").read_text(encoding="utf-8")
    found: dict[str, list[str]] = json.loads(text)
    return found


def word(name: str, language: str) -> str:
    """A word of the page's frame in this language."""
    return words()[name][LANGUAGES.index(language)]


def title(language: str, locked: bool, tabs: Mapping[str, str]) -> str:
    """locked: there is a login to leave; tabs: key -> title of every tab, by which the address finds them."""
    other = next(one for one in LANGUAGES if one != language)
    leave = f'<a href="/logout">{"退出登录" if language == "zh" else "Log out"}</a>' if locked else ""
    known = escape(json.dumps(dict(tabs)))
    switch = f'<a href="/lang/{other}" lang="{other}">{escape(word("language", language))}</a>'
    return (
        f'<div class="wr-title" data-tabs="{known}"><h1>White Tuner</h1>'
        f"<span>{escape(word('tagline', language))}</span><nav>{switch}{leave}</nav></div>"
    )


def element(name: str, language: str, **data: str) -> str:
    """A custom element of static/run.js."""
    given = "".join(f' data-{key}="{escape(value)}"' for key, value in data.items())
    return f'<{name} data-lang="{language}"{given}></{name}>'


def training(tab: Tab, language: str) -> str:
    """The right column of a training tab: start, stop, Loss/LR/Step/ETA, log."""
    return element("wt-train", language, tab=tab.key, family=tab.family, tasks=" ".join(tab.tasks))
