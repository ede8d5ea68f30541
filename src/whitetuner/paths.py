"""A path as people write it into a config: the option type of files and folders, also in a family's own settings.

And the Python that our own programs beside this one are run with.
"""

from __future__ import annotations

import re
import sys
from typing import Annotated

from pydantic import AfterValidator


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

#: Begins the command of a child of ours. UTF-8 said in words: the Python of a portable Windows folder hears no PYTHONUTF8.
PYTHON = (sys.executable, "-X", "utf8")
