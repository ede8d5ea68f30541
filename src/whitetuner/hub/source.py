"""What a hub is asked for: the list of a model's files, and some of them. What goes wrong there, without words for users."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

Say = Callable[[str], None]


@dataclass(frozen=True)
class Listing:
    """What a model has on its hub.

    revision: what the files are of; sizes: file -> bytes; digests: file -> SHA-256, where the hub tells it
    """

    revision: str
    sizes: Mapping[str, int]
    digests: Mapping[str, str] = field(default_factory=dict)


class NoSuchModelError(Exception):
    """The hub has no model of this name."""


class NotAllowedError(Exception):
    """The hub gives it only to who is logged in, or has agreed to a licence."""


class UnreachableError(Exception):
    """Nobody answers, or not with what was asked for; its text says why, in one line without secrets."""


class Hub(Protocol):
    """One hub.

    mirror: variable that names another address, and one, as VARIABLE=ADDRESS; home: variable that names the place of the files
    login: what to do to be known there
    """

    mirror: str
    home: str
    login: str

    def listing(self, name: str) -> Listing:
        """Raises the three errors above."""

    def place(self) -> Path:
        """Where its files go; need not be there yet."""

    def came(self, name: str) -> int:
        """Bytes of this model that are in the place already."""

    def get(self, name: str, listing: Listing, files: Sequence[str], say: Say) -> Path:
        """The folder with these files, each whole; what is there is not fetched again. Raises the three errors and OSError."""


def one_line(error: BaseException) -> str:
    """The first line of what an error says, or what it is."""
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__
