"""How a model on a hub is named where a folder could stand: ORG/MODEL, or the hub before it, modelscope:ORG/MODEL.

A name without its hub is of the one that WHITETUNER_HUB names, else of Hugging Face's.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from whitetuner.errors import UserError

HUBS = ("huggingface", "modelscope")
VARIABLE = "WHITETUNER_HUB"
_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"


@dataclass(frozen=True)
class HubName:
    """A model of a hub. hub: one of HUBS; name: ORG/MODEL."""

    hub: str
    name: str

    def __str__(self) -> str:
        """As a config says it, whatever WHITETUNER_HUB is; a bare name is Hugging Face's to everybody."""
        return self.name if self.hub == HUBS[0] else f"{self.hub}:{self.name}"

    @property
    def stem(self) -> str:
        """A file name that no other model has."""
        return str(self).replace(":", "--").replace("/", "--")


def hub_name(path: str) -> HubName | None:
    """What a path names on a hub: one slash, and nothing that only a path has; None: it is a path.

    Asked where no such file or folder is there. Raises UserError for a hub that is not known, in the name or the variable.
    """
    lead, name = _parts(path)
    if not re.fullmatch(_NAME, name, re.ASCII) or name.endswith(".safetensors"):
        return None
    hub, where = (
        (lead.lower(), "model.path") if lead else (os.environ.get(VARIABLE, "").strip().lower(), VARIABLE)
    )
    if hub and hub not in HUBS:
        raise UserError(
            "there is no hub '{hub}'", where=where, mend="use one of: {known}", hub=hub, known=", ".join(HUBS)
        )
    return HubName(hub or HUBS[0], name)


def looks_like_hub_name(path: str) -> bool:
    """Whether it is written as one, of whatever hub."""
    return re.fullmatch(_NAME, _parts(path)[1], re.ASCII) is not None


def _parts(path: str) -> tuple[str, str]:
    """(hub or "", the rest). A drive's letter is no hub."""
    text = path.strip().strip("\"'")
    found = re.match(r"([A-Za-z]{2,}):(?!//)", text)
    return (found[1], text[found.end() :]) if found else ("", text)
