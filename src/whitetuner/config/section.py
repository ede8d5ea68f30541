"""What every table of the config is made of."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A table of the config file; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _path(text: str) -> str:
    """Quotes that "copy as path" puts around are taken off; a path with a control character was written wrongly."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1]
    if not text:
        raise ValueError("a path is empty; leave the line out instead")
    if re.search(r"[\x00-\x1f]", text):
        raise ValueError(
            "in \"...\" a backslash begins an escape (\\n, \\t): write the path in single quotes, 'C:\\new'"
        )
    return text


#: Text that names a file or folder.
PathText = Annotated[str, AfterValidator(_path)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
