"""What a request says, read so that nothing in it can break a route: JSON, texts, whole numbers; and the answer's JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, overload

from starlette.requests import Request
from starlette.responses import JSONResponse

from whitetuner.errors import UserError

#: Digits of a number in an address or a field; Python itself refuses to read thousands of them.
_DIGITS = 9


class Told(JSONResponse):
    """JSON in ASCII: a file name that is no UTF-8 (an old archive's) goes to the page and comes back as it is."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def is_json(request: Request) -> bool:
    """A form of a foreign page cannot send this type."""
    return request.headers.get("content-type", "").partition(";")[0] == "application/json"


async def body_of(request: Request) -> dict[str, Any] | None:
    """The request's JSON object; None for anything else."""
    try:
        found = json.loads(await request.body())
    except (ValueError, RecursionError):  # thousands of brackets
        return None
    return found if isinstance(found, dict) else None


@overload
def whole(text: str | None, otherwise: int) -> int: ...
@overload
def whole(text: str | None, otherwise: int | None = None) -> int | None: ...
def whole(text: str | None, otherwise: int | None = None) -> int | None:
    """A number written in plain digits; `otherwise` for anything else."""
    is_number = text is not None and text.isascii() and text.isdigit() and len(text) <= _DIGITS
    return int(text) if is_number and text is not None else otherwise


def plain(text: str) -> str:
    """The text itself. Raises UserError when it can stand in no UTF-8 file and on no command line."""
    if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
        raise UserError(
            "a name or text has characters that are no Unicode",
            mend="rename the file or folder, then choose it",
        )
    return text


def word_of(body: Mapping[str, Any], name: str) -> str:
    """A text of the request, "" when it is none. Raises UserError as `plain`."""
    found = body.get(name)
    return plain(found) if isinstance(found, str) else ""
