"""Hugging Face's hub, through its own library: cache, resume, progress and tokens are that library's."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from whitetuner.hub.source import (
    Listing,
    NoSuchModelError,
    NotAllowedError,
    Say,
    UnreachableError,
    one_line,
)


class HuggingFace:
    """As `whitetuner.hub.source.Hub`."""

    mirror = "HF_ENDPOINT=https://hf-mirror.com"
    home = "HF_HOME"
    login = "hf auth login"

    def __init__(self) -> None:
        self.endpoint = os.environ.get("HF_ENDPOINT") or None

    def listing(self, name: str) -> Listing:
        from huggingface_hub import HfApi

        with _told():
            found = HfApi(endpoint=self.endpoint).model_info(name, files_metadata=True)
        return Listing(str(found.sha), {one.rfilename: int(one.size or 0) for one in found.siblings or ()})

    def place(self) -> Path:
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE)

    def came(self, name: str) -> int:
        here = self.place() / f"models--{name.replace('/', '--')}" / "blobs"
        return sum(one.stat().st_size for one in here.iterdir()) if here.is_dir() else 0

    def get(self, name: str, listing: Listing, files: Sequence[str], say: Say) -> Path:
        from huggingface_hub import snapshot_download

        with _told():
            return Path(
                snapshot_download(
                    name,
                    revision=listing.revision,
                    allow_patterns=[_literal(file) for file in files],
                    endpoint=self.endpoint,
                )
            )


@contextmanager
def _told() -> Iterator[None]:
    """The library's errors as those of whitetuner.hub.source."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    # of its HTTP client where nobody answers: httpx in the library's first release, httpx2 later
    transport: type[Exception] = next(one for one in HfHubHTTPError.__mro__ if one.__name__ == "HTTPError")
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise UnreachableError("HF_HUB_OFFLINE is set") from error
    except GatedRepoError as error:
        raise NotAllowedError from error
    except RepositoryNotFoundError as error:
        raise NoSuchModelError from error
    except (HfHubHTTPError, transport) as error:
        raise UnreachableError(one_line(error)) from error


def _literal(file: str) -> str:
    """As a pattern that means this file alone."""
    return re.sub(r"([\[*?])", r"[\1]", file)
