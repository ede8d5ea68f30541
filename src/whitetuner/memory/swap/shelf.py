"""Masters of a model whose turn is far away wait in a file, so that the host holds one of two experts at a time.

Weights that are frozen are written once; from then on leaving host memory costs nothing, and coming back is one reading in
order: 13 GB in some seconds, between turns of many minutes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch

from whitetuner.errors import EXIT_FAILED, UserError


class Shelf:
    """A file without a name in `folder`: the system deletes it with this process, however that ends.

    written: what the file holds is what the masters hold; False: they are written anew at the next `put`
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written = False
        self._file: IO[bytes] | None = None

    def put(self, masters: Sequence[torch.Tensor]) -> None:
        """masters: flat uint8 tensors on the CPU. Raises UserError when the disk is full or cannot be written."""
        if self.written:
            return
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 - lives as long as this
            self._file.seek(0)
            for master in masters:
                self._file.write(master.numpy().data)
            self._file.flush()
        except OSError as error:
            raise UserError(
                "the expert that waits cannot be written to the disk ({reason}); it takes {need:.1f} GB there",
                where=str(self.folder),
                mend="make room on this disk, or set memory.experts_on_disk = false where the host has room for both",
                code=EXIT_FAILED,
                reason=error.strerror or error,
                need=sum(master.numel() for master in masters) / (1 << 30),
            ) from error
        self.written = True

    def take(self, masters: Sequence[torch.Tensor]) -> None:
        """Fills masters of the same sizes, in the same order. Raises UserError when the disk fails."""
        assert self._file is not None and self.written, "taken before it was put"
        try:
            self._file.seek(0)
            for master in masters:
                read = self._file.readinto(master.numpy())  # type: ignore[attr-defined]
                if read != master.numel():
                    raise OSError(f"{master.numel() - read} bytes are missing")
        except OSError as error:
            raise UserError(
                "the expert that waited on the disk cannot be read back ({reason}); what was saved before is intact",
                where=str(self.folder),
                mend="check the disk, then go on with --resume latest",
                code=EXIT_FAILED,
                reason=error.strerror or error,
            ) from error
