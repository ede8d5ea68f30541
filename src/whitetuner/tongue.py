"""The language of the terminal: what is printed there for a person goes through `told`.

Chinese where the system speaks Chinese, or as WHITETUNER_LANG says. The sentences stand in one table for page and terminal, which
lies far above those who print (gui/told.py): the command line hands it down with `speak`. What is written for programs (JSON,
events, files) does not go through here: it is English, and is translated where it is shown.
"""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache

VARIABLE = "WHITETUNER_LANG"
#: The first of these that is not empty counts, as for every other program (POSIX).
_LOCALES = ("LC_ALL", "LC_MESSAGES", "LANG")
#: Less text of its own than this, and a sentence is not known by it.
_OWN = 6

_translate: Callable[[str], str] | None = None


def language(environment: Mapping[str, str] = os.environ) -> str:
    """ "zh" or "en"."""
    found = environment.get(VARIABLE) or next(
        (environment[name] for name in _LOCALES if environment.get(name)), ""
    )
    if not found and sys.platform == "win32":  # it has no such variables, but a language of its windows
        import ctypes

        return "zh" if ctypes.windll.kernel32.GetUserDefaultUILanguage() & 0x3FF == 0x04 else "en"
    return "zh" if found.lower().startswith("zh") else "en"


def speak(translate: Callable[[str], str] | None) -> None:
    """What `told` does from now on; None: nothing, English."""
    global _translate
    _translate = translate


def told(text: str) -> str:
    """Our English in the terminal's language, line by line; what is not known stays."""
    return text if _translate is None else _translate(text)


def say(text: str, *, wrong: bool = False) -> None:
    """Prints it at once, in the terminal's language. wrong: where errors and warnings go."""
    print(told(text), file=sys.stderr if wrong else sys.stdout, flush=True)


def padded(text: str, columns: int) -> str:
    """Filled up with spaces to so many columns of a terminal, where a Chinese character takes two."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return text + " " * (columns - len(text) - wide)


class Phrases:
    """Templates and what they are in another language.

    table: English template -> translation with the same {placeholders}
    value: what a placeholder's value becomes; None: a text that is known itself is translated too
    """

    def __init__(self, table: Mapping[str, str], value: Callable[[object], object] | None = None) -> None:
        self.table = table
        self._value = value or (lambda one: self.text(one) if isinstance(one, str) else one)
        self._line = lru_cache(4096)(self._look_up)

    def filled(self, template: str, values: Mapping[str, object]) -> str:
        return self.table.get(template, template).format(
            **{name: self._value(value) for name, value in values.items()}
        )

    def text(self, english: str) -> str:
        """Sentence by sentence; what no template matches stays."""
        return "\n".join(self._line(line) for line in english.split("\n"))

    @cached_property
    def _patterns(self) -> tuple[tuple[re.Pattern[str], str], ...]:
        """Templates as patterns, those with the most text of their own first. A template of several lines is known by each."""
        found = []
        for english, chinese in self.table.items():
            plain = re.split(r"\{\w+(?:![rsa])?(?::[^}]*)?\}", english)
            names = re.findall(r"\{(\w+)", english)
            if len("".join(plain).strip()) < _OWN:
                continue
            seen: set[str] = set()
            pattern = re.escape(plain[0])
            for name, after in zip(names, plain[1:], strict=True):
                pattern += f"(?P={name})" if name in seen else f"(?P<{name}>.*?)"
                pattern += re.escape(after)
                seen.add(name)
            found.append((re.compile(pattern, re.DOTALL), re.sub(r"\{(\w+)[^}]*\}", r"{\1}", chinese)))
        return tuple(sorted(found, key=lambda one: -len(one[0].pattern)))

    def _look_up(self, line: str) -> str:
        """A line as UserError renders it: "WHERE: what", or "  -> mend"."""
        lead = re.match(r"\s*(-> |error: |warning: |note: |info: )?", line)
        assert lead is not None
        start, rest = line[: lead.end()], line[lead.end() :]
        if rest in self.table:
            return start + self.table[rest]
        cuts = [0, *(found.end() for found in re.finditer(r": ", rest))]
        for cut in cuts:
            for pattern, chinese in self._patterns:
                found = pattern.fullmatch(rest[cut:])
                if found is not None:
                    values = {name: self._value(value) for name, value in found.groupdict().items()}
                    return f"{start}{rest[:cut]}{chinese.format(**values)}"
        return line
