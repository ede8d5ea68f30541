"""What encoders can be asked, and the name under which the answer is kept: a hash of the encoder and of what it reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from whitetuner.data.buckets import fit
from whitetuner.data.digests import digest_of, file_digest
from whitetuner.data.masks import mask_cells
from whitetuner.data.media import CUT_VERSION, cut, naming, picture, read
from whitetuner.data.probe import probe
from whitetuner.data.video import CLIP_VERSION, VIDEOS, frame_files, frames_of, is_clip, look
from whitetuner.data.video_folders import content_digests
from whitetuner.data.video_stream import FrameStream
from whitetuner.errors import UserError
from whitetuner.family import Encoder, Layout, Reads, prompts_only
from whitetuner.records import EncodeInput, Item, Mask, Size

#: Part of every key: raised when entries written before must not be used any more.
CODE_VERSION = 1


@dataclass(frozen=True)
class Inputs:
    """What encoders can be asked about: an item, or a prompt that has no target (a preview's, a negative)."""

    caption: str
    target: Path | None = None
    digest: str = ""
    size: Size | None = None
    conditions: tuple[Path, ...] = ()
    condition_digests: tuple[str, ...] = ()
    condition_sizes: tuple[Size, ...] = ()
    clip: tuple[int, ...] = ()
    unconditional: bool = False
    mask: Mask | None = None

    @classmethod
    def of(cls, item: Item, *, uncond: bool = False, visit: int = 0, order: int = 0) -> Inputs:
        """uncond: the same with an empty caption, for visits whose text is dropped; visit: chooses among a video's clips; order:
        0: the caption as written, else with its tags in the order of that number.
        """
        return cls(
            "" if uncond else (item.caption, *item.orders)[order],
            item.target,
            item.digest,
            item.size,
            item.conditions,
            item.condition_digests,
            item.condition_sizes,
            item.clips[visit % len(item.clips)] if item.clips else (),
            uncond,
            item.mask,
        )

    @classmethod
    def from_frame(cls, caption: str, frame: Path | None, size: Size) -> Inputs:
        """A prompt for a clip of this size, beside its first frame (None: of text alone). frame: a picture, or a video whose
        first frame is taken. Raises UserError when it cannot be read.
        """
        if frame is None:
            return cls(caption, size=size)
        digest = content_digests([frame])[0] if frame.is_dir() else file_digest(frame)
        return cls(
            caption,
            size=size,
            conditions=(frame,),
            condition_digests=(digest,),
            condition_sizes=(size._replace(frames=1),),
        )

    @classmethod
    def prompt(
        cls,
        caption: str,
        given: Sequence[Path] = (),
        resolution: int = 1024,
        stride_px: int = 16,
        size: Size | None = None,
        unconditional: bool = False,
    ) -> Inputs:
        """A prompt beside given pictures, which keep their shapes and are scaled down to the area of resolution squared.

        size: that is drawn; unconditional: it is the negative one
        Raises UserError for a picture that cannot be read or is too small.
        """
        sizes = tuple(_size_of(path, resolution, stride_px) for path in given)
        return cls(
            caption,
            size=size,
            unconditional=unconditional,
            conditions=tuple(given),
            condition_digests=tuple(map(file_digest, given)),
            condition_sizes=sizes,
        )

    def pictures(self) -> tuple[tuple[Image.Image, ...], tuple[Image.Image, ...]]:
        """(the conditions cut to their sizes, the same uncut). Raises UserError for one that changed since it was looked at."""
        originals = tuple(
            frames_of(path, [0])[0]
            if path.suffix.lower() in VIDEOS
            else read(path, data=_content(path, digest))
            for path, digest in zip(self.conditions, self.condition_digests, strict=True)
        )
        return tuple(map(cut, originals, self.condition_sizes)), originals


@dataclass(frozen=True)
class Facts:
    """What a key needs of an encoder; the encoder itself, with its weights, is gone by then."""

    name: str
    fields: Mapping[str, Layout]
    reads: frozenset[Reads]
    fingerprint: str
    precision: str
    prompts_only: bool = False

    @classmethod
    def of(cls, encoder: Encoder, precision: str) -> Facts:
        """precision: how its weights are made (dtype)."""
        fields, alone = dict(encoder.fields), prompts_only(encoder)
        return cls(encoder.name, fields, encoder.reads, encoder.fingerprint(), precision, alone)

    def applies(self, inputs: Inputs) -> bool:
        """A prompt without target has nothing for an encoder that reads targets only; some are asked about prompts alone."""
        return not (self.prompts_only and inputs.target is not None) and (
            "caption" in self.reads
            or ("mask" in self.reads and inputs.mask is not None)
            or ("target" in self.reads and inputs.target is not None)
            or ("conditions" in self.reads and bool(inputs.conditions or inputs.clip))
        )

    def key(self, inputs: Inputs) -> str:
        parts: list[object] = [CODE_VERSION, self.name, self.fingerprint, self.precision]
        if "caption" in self.reads:
            parts.append(["caption", inputs.caption])
        if "target" in self.reads and inputs.clip:
            parts.append(["clip", inputs.digest, inputs.clip, inputs.size, CUT_VERSION, CLIP_VERSION])
        elif "target" in self.reads:
            parts.append(["target", inputs.digest, inputs.size, CUT_VERSION])
        if "mask" in self.reads and inputs.mask is not None:
            parts.append(["mask", inputs.mask.digest, inputs.mask.alpha, inputs.size, CUT_VERSION])
        if "frames" in self.reads:
            parts.append(["frames", inputs.size])
        if "unconditional" in self.reads:
            parts.append(["unconditional", inputs.unconditional])
        if "conditions" in self.reads and inputs.clip:
            first = [inputs.digest, inputs.clip[0], inputs.size and inputs.size[:2]]
            parts.append(["first frame", *first, CUT_VERSION, CLIP_VERSION])
        elif "conditions" in self.reads:
            parts.append(["conditions", inputs.condition_digests, inputs.condition_sizes, CUT_VERSION])
        return hashlib.blake2b(json.dumps(parts).encode("utf-8"), digest_size=20).hexdigest()

    def give(self, inputs: Inputs) -> EncodeInput:
        """Decodes what this encoder says it reads, and hands it nothing else: a result cannot hang on more than its key."""
        size: Size | None = None
        target: Sequence[Image.Image] = ()
        conditions: tuple[Image.Image, ...] = ()
        originals: tuple[Image.Image, ...] = ()
        if "frames" in self.reads:
            size = inputs.size
        if inputs.clip:
            assert inputs.target is not None and inputs.size is not None
            _unchanged(inputs.target, inputs.digest)
            if "target" in self.reads:
                size, target = inputs.size, FrameStream(inputs.target, inputs.clip, inputs.size)
            if "conditions" in self.reads:
                conditions = originals = frames_of(inputs.target, inputs.clip[:1], inputs.size)
            return EncodeInput(
                inputs.caption if "caption" in self.reads else "", target, conditions, originals, size
            )
        if "target" in self.reads:
            size = inputs.size
            if inputs.target is not None and size is not None:
                target = (picture(inputs.target, size, _content(inputs.target, inputs.digest)),)
        if "conditions" in self.reads:
            conditions, originals = inputs.pictures()
        caption = inputs.caption if "caption" in self.reads else ""
        unconditional = "unconditional" in self.reads and inputs.unconditional
        mask = None
        if "mask" in self.reads and inputs.mask is not None and inputs.size is not None:
            path = inputs.mask.path
            mask = mask_cells(path, inputs.mask.alpha, inputs.size, _content(path, inputs.mask.digest))
        return EncodeInput(caption, target, conditions, originals, size, unconditional, mask)


def _size_of(path: Path, resolution: int, stride_px: int) -> Size:
    seen = look(path) if is_clip(path) else probe(path)
    if seen.problem is not None:
        raise seen.problem.error
    assert seen.size is not None, "readable"
    size = fit(seen.size, resolution, stride_px)
    if size is None:
        raise UserError(
            "{width} x {height} pixels are too few for a given picture: no side may come out under {stride}",
            where=str(path),
            mend="take a larger one, or one of a less extreme shape",
            width=seen.size.width,
            height=seen.size.height,
            stride=stride_px,
        )
    return size


def _unchanged(path: Path, digest: str) -> None:
    """As `_content`, for videos, which are too large to be read for every clip: once for each state of the file."""
    files = frame_files(path) if path.is_dir() else [path]
    with naming(path):
        state = tuple((stat.st_size, stat.st_mtime_ns) for stat in (file.stat() for file in files))
    if _digest_at(path, state) != digest:
        raise _was_changed(path)


@lru_cache(maxsize=4096)
def _digest_at(path: Path, state: tuple[tuple[int, int], ...]) -> str:
    return content_digests([path])[0]


def _was_changed(path: Path) -> UserError:
    return UserError(
        "the file was changed after the run had looked at it",
        where=str(path),
        mend="start again when it is finished",
    )


def _content(path: Path, digest: str) -> bytes:
    """The file's bytes. Raises UserError when they are not those that were scanned: the entry's name would lie."""
    with naming(path):
        data = path.read_bytes()
    if digest_of(data) != digest:
        raise _was_changed(path)
    return data
