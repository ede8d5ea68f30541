"""What flows through a run: Item (what the disk says), Sample (what the encoders said), Batch (samples of one shape).

No torch at import: data sets are scanned and shown without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from PIL import Image


class Size(NamedTuple):
    """Pixels and frames; a still picture has one frame."""

    width: int
    height: int
    frames: int = 1


class Mask(NamedTuple):
    """What of a picture counts in the loss. path: the mask, whose white counts; or the picture itself, whose opacity does
    (alpha); digest: of that file's content; floor: how much the rest counts, 0..1"""

    path: Path
    digest: str
    alpha: bool = False
    floor: float = 0.0


@dataclass(frozen=True)
class Item:
    """One thing to learn from, as found on disk and cut to its bucket.

    id:         content hash of the target (hex) + "-" + ordinal among files of equal content, counted in scan order.
                Noise, timestep and dropout are functions of it, so renaming a file changes nothing.
    caption:    the final text (trigger word and default caption applied)
    source:     size on disk after EXIF rotation
    size:       size it is trained at: scaled to cover, then centre-cropped
    condition_sizes: sizes the conditions are encoded at, one each
    clips:      of a video: its frames, counted from 0 in the order they are shown, that are learned from; with several (of
                equal length) visit after visit takes the next. Empty for a picture
    loss_weight: factor of its loss in what is learned, as its data set says
    mask:       what of the target counts; None: all of it
    orders:     the caption with its tags in other orders; a visit takes the caption or one of them (see data/tags.py)
    """

    id: str
    target: Path
    digest: str
    caption: str
    source: Size
    size: Size
    conditions: tuple[Path, ...] = ()
    condition_digests: tuple[str, ...] = ()
    condition_sizes: tuple[Size, ...] = ()
    set_index: int = 0
    clips: tuple[tuple[int, ...], ...] = ()
    loss_weight: float = 1.0
    mask: Mask | None = None
    orders: tuple[str, ...] = ()


@dataclass(frozen=True)
class EncodeInput:
    """What an encoder may read: decoded RGB frames (PIL), already cut to `Item.size` and `Item.condition_sizes`.

    target: frames of the target (one for a picture; empty for a prompt that has none, as a preview's); of a clip they are
            decoded while they are walked through
    conditions: one picture each, own aspect kept; in an i2v task the one first frame
    size: of the target, for encoders that read it; or size and length of the clip, for those that read "frames"
    originals: the conditions as on disk (rotated, RGB, uncut), for encoders that look at them at a size of their own
    unconditional: for encoders that read it: this is the side that guidance leads away from, a negative prompt or a visit
                whose text is dropped
    mask: what of the target counts, greys of an eighth of its size (see data/masks.py)
    """

    caption: str
    target: Sequence[Image.Image] = ()
    conditions: tuple[Image.Image, ...] = ()
    originals: tuple[Image.Image, ...] = ()
    size: Size | None = None
    unconditional: bool = False
    mask: Image.Image | None = None


@dataclass(frozen=True)
class Sample:
    """The encoders' words about one item: field name -> tensor without a batch dimension.

    `latent` is the clean target x0, (C, H, W) or (C, T, H, W), dense and normalised as the model sees it. `mask`, of pictures
    that have one, is how much each place of the latent counts, (H, W) float32 in [0, 1].
    """

    item: Item
    visit: int
    fields: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """Samples of one shape key. Stacked fields are (B, ...) tensors, ragged ones lists of B tensors."""

    items: tuple[Item, ...]
    visits: tuple[int, ...]
    fields: Mapping[str, torch.Tensor | list[torch.Tensor]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, name: str) -> torch.Tensor | list[torch.Tensor]:
        return self.fields[name]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; dtypes stay as encoded."""
        moved = {
            name: [one.to(device) for one in value] if isinstance(value, list) else value.to(device)
            for name, value in self.fields.items()
        }
        return Batch(self.items, self.visits, moved)


@dataclass(frozen=True)
class StepBatches:
    """What one rank has of an optimizer step. mine: its micro-batches, none when there are more ranks than samples; sizes:
    samples of all micro-batches of the step in their order, of which rank r of W has number r, r + W, ..."""

    mine: list[Batch]
    sizes: tuple[int, ...]
