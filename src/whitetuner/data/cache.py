"""What the encoders say about every item, kept in files named after what they were asked.

The name of an entry is a hash of the encoder (its files, options, code) and of what it reads of the item, and of
nothing more: a changed file, caption, size or encoder finds no entry and is encoded anew, all else is found, by any run and
any data set. Encoders run one after the other, each is loaded only if something is missing and freed before the next.
"""

from __future__ import annotations

import gc
import os
import shutil
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from whitetuner.data.entries import read_entry, write_entry
from whitetuner.data.folders import CACHE_TAG
from whitetuner.data.inputs import Facts, Inputs
from whitetuner.data.mask_fields import counting
from whitetuner.data.video_stream import FrameStream
from whitetuner.errors import EXIT_ENVIRONMENT, EXIT_FAILED, FULL, UserError, UserErrors
from whitetuner.family import BuildFn, Encoder, Layout
from whitetuner.records import EncodeInput, Item, Sample

_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Encoded pictures and captions of White Tuner; may be deleted.\n"

#: After so many entries of an encoder it is reckoned whether all will fit on the disk.
_RECKON_AFTER = 16

#: Temporary files this old were left by a killed process.
_STALE_S = 24 * 3600

#: (what is encoded, done, total, seconds since it began); it may raise to stop, everything written so far stays.
Progress = Callable[[str, int, int, float], None]


@dataclass(frozen=True)
class Told:
    """How much one encoder had to do."""

    encoder: str
    made: int
    reused: int
    seconds: float


class Cached:
    """Reads back what `build_cache` made sure is there."""

    def __init__(self, folder: Path, encoders: Sequence[Facts]) -> None:
        self.folder = folder
        self.told: list[Told] = []
        self.encoders = tuple(encoders)
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        self.layouts: dict[str, Layout] = {}
        for encoder in encoders:
            assert not self.layouts.keys() & encoder.fields.keys(), (
                f"{encoder.name}: field written by two encoders"
            )
            self.layouts.update(encoder.fields)

    def fields(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """Everything the encoders said, on the CPU, dtypes as encoded.

        Raises UserError when an entry was deleted or damaged since `build_cache`; the damaged file is removed, so that the
        next start encodes it again.
        """
        found: dict[str, torch.Tensor] = {}
        for encoder in self.encoders:
            if not encoder.applies(inputs):
                continue
            key = encoder.key(inputs)
            path = self._path(encoder.name, key)
            tensors = read_entry(path, key)
            if tensors is None:
                path.unlink(missing_ok=True)
                raise UserError(
                    "an entry of the cache was damaged or deleted while it was in use",
                    where=str(path),
                    mend="start again with --resume latest: it is encoded anew, the rest stays (and check the disk)",
                    code=EXIT_FAILED,
                )
            found.update(tensors)
        if inputs.mask is not None:
            found["mask"] = counting(found["mask"], inputs.mask.floor, found["latent"])
        return found

    def sample(self, item: Item, visit: int, uncond: bool = False, order: int = 0) -> Sample:
        """uncond: encoded with an empty caption (build_cache(..., uncond=True) keeps those); order: see Inputs.of."""
        return Sample(item, visit, self.fields(Inputs.of(item, uncond=uncond, visit=visit, order=order)))

    def shape_key(self, item: Item) -> tuple[object, ...]:
        """Items with equal keys can share a batch: sizes of target and conditions, and shapes of all stacked fields."""
        shapes = self._stacked(Inputs.of(item))
        return (tuple(item.size), tuple(map(tuple, item.condition_sizes)), shapes)

    def _stacked(self, inputs: Inputs) -> tuple[tuple[str, tuple[int, ...]], ...]:
        found = []
        for encoder in self.encoders:
            if encoder.applies(inputs) and "mask" not in encoder.reads:  # the latent tells its shape
                shapes = self._shapes[encoder.key(inputs)]
                found += [(name, shape) for name, shape in shapes.items() if encoder.fields[name] == "stack"]
        return tuple(sorted(found))

    def _path(self, encoder: str, key: str) -> Path:
        return self.folder / encoder / key[:2] / f"{key}.safetensors"


def build_cache(
    items: Sequence[Item],
    encoders: Sequence[Encoder],
    build: BuildFn,
    folder: Path,
    *,
    extra: Sequence[Inputs] = (),
    uncond: bool = False,
    precision: str = "",
    quantised: Mapping[str, str] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    share: tuple[int, int] = (0, 1),
    wait: Callable[[], None] | None = None,
) -> Cached:
    """Makes sure that everything the encoders say about the items and extra inputs lies in the cache folder.

    extra: preview prompts, negatives, validation items; uncond: also every item with an empty caption
    precision: how `build` makes the encoders (their dtype), part of the key;  quantised: name of an encoder -> in which format,
    too, for those whose weights are held in one
    workers: threads that decode pictures ahead of the encoder; 0: none, decode in line; None: by the machine's cores
    share: (rank, ranks), each encodes its part; wait: comes back when all ranks have finished an encoder
    Raises UserError for a full disk or folder that cannot be written, and, after all others are encoded, for every picture
    that cannot be decoded. Whatever is raised, entries written before are valid and are found again.
    """
    _prepare(folder)
    formats = quantised or {}
    facts = [
        Facts.of(encoder, " ".join(filter(None, (precision, formats.get(encoder.name)))))
        for encoder in encoders
    ]
    cached = Cached(folder, facts)
    wanted = [one for item in items for one in _visits(item)] + list(extra)
    if uncond:
        wanted += [one for item in items for one in _visits(item, uncond=True)]
    count = _threads() if workers is None else workers
    for encoder, known in zip(encoders, facts, strict=True):
        jobs = {known.key(inputs): inputs for inputs in wanted if known.applies(inputs)}
        _verify(cached, known, list(jobs), progress)
        rank, ranks = share
        mine = {
            key: inputs
            for number, (key, inputs) in enumerate(jobs.items())
            if number % ranks == rank and key not in cached._shapes
        }
        began = time.perf_counter()
        if mine:
            _encode(cached, encoder, known, build, mine, count, progress)
        if wait is not None:
            wait()
            _verify(cached, known, [key for key in jobs if key not in cached._shapes], None)
        cached.told.append(Told(known.name, len(mine), len(jobs) - len(mine), time.perf_counter() - began))
        left = [key for key in jobs if key not in cached._shapes]
        assert not left, f"{known.name}: {len(left)} inputs were encoded by no rank"
    for item in items if uncond else [item for item in items if item.orders]:
        asked = [Inputs.of(item, order=order) for order in range(1 + len(item.orders))]
        alike = {
            cached._stacked(one) for one in (*asked, *([Inputs.of(item, uncond=True)] if uncond else []))
        }
        assert len(alike) == 1, f"a stacked field changes its shape with the caption: {alike}"
    return cached


def _visits(item: Item, uncond: bool = False) -> list[Inputs]:
    """All that visits of the item can ask for: its clips in turn, its caption in every order."""
    clips, orders = range(max(1, len(item.clips))), range(1 if uncond else 1 + len(item.orders))
    return [Inputs.of(item, uncond=uncond, visit=clip, order=order) for clip in clips for order in orders]


def _encode(
    cached: Cached,
    encoder: Encoder,
    known: Facts,
    build: BuildFn,
    jobs: Mapping[str, Inputs],
    workers: int,
    progress: Progress | None,
) -> None:
    tell = _Teller(known.name, len(jobs), progress)
    bad: list[UserError] = []
    room = _Room(cached.folder, len(jobs))
    encoder.load(build)
    try:
        with closing(_decoded(known, jobs, workers)) as decoded:
            for done, (key, given) in enumerate(decoded, start=1):
                if isinstance(given, UserError):
                    bad.append(given)
                elif (tensors := _said(encoder, given, bad)) is not None:
                    complete = set(tensors) == set(known.fields) or not given.target
                    assert complete and set(tensors) <= set(known.fields), (
                        f"{known.name} says {sorted(tensors)}"
                    )
                    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
                        raise _not_finite(known, jobs[key])
                    room.write(cached._path(known.name, key), key, tensors)
                    cached._shapes[key] = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
                tell(done)
    finally:
        _free(encoder)
    if bad:
        raise UserErrors(bad)


@torch.no_grad()
def _said(encoder: Encoder, given: EncodeInput, bad: list[UserError]) -> Mapping[str, torch.Tensor] | None:
    """None, and why in `bad`, for a clip one of whose frames cannot be decoded: that is seen on the way."""
    try:
        return encoder.encode(given)
    except UserError as error:
        if not isinstance(given.target, FrameStream):
            raise
        bad.append(error)
        return None


def _free(encoder: Encoder) -> None:
    """Gives the encoder's memory back before anything else is loaded.

    Models that hold themselves in a circle stay until a full collection, which takes 0.4 s: only then it is run.
    """
    held = [weakref.ref(value) for value in vars(encoder).values() if isinstance(value, torch.nn.Module)]
    encoder.free()
    if any(model() is not None for model in held):
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _not_finite(encoder: Facts, inputs: Inputs) -> UserError:
    return UserError(
        "the model's part '{encoder}' makes numbers of this that are not finite",
        where=repr(inputs.caption)
        if encoder.reads == {"caption"}
        else ", ".join(map(str, inputs.conditions if inputs.target is None else (inputs.target,))),
        mend="its weights are damaged: download this part again; or set memory.dtype = 'fp32'",
        code=EXIT_FAILED,
        encoder=encoder.name,
    )


def _decoded(
    known: Facts, jobs: Mapping[str, Inputs], workers: int
) -> Generator[tuple[str, EncodeInput | UserError]]:
    """Every job with its pictures decoded, in order, by threads that stay a few pictures ahead (Pillow frees the lock)."""

    def give(inputs: Inputs) -> EncodeInput | UserError:
        try:
            given = known.give(inputs)
        except UserError as error:
            return error
        if workers and isinstance(given.target, FrameStream):
            given.target.start()
        return given

    if workers == 0 or known.reads == {"caption"}:
        for key, inputs in jobs.items():
            yield key, give(inputs)
        return
    if any(inputs.clip for inputs in jobs.values()):
        workers = 1  # a clip has a thread of its own; of three a few frames are held
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    ahead: deque[tuple[str, Future[EncodeInput | UserError]]] = deque()
    try:
        for key, inputs in jobs.items():
            ahead.append((key, pool.submit(give, inputs)))
            if len(ahead) > 2 * workers:
                first, future = ahead.popleft()
                yield first, future.result()
        while ahead:
            first, future = ahead.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _verify(cached: Cached, known: Facts, keys: Sequence[str], progress: Progress | None) -> None:
    """Takes note of the entries that are there and whole; what is torn or flipped counts as missing."""

    def look(key: str) -> dict[str, tuple[int, ...]] | None:
        tensors = read_entry(cached._path(known.name, key), key)
        return None if tensors is None else {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    there = [key for key in keys if cached._path(known.name, key).exists()]
    if not there:
        return
    tell = _Teller("verify " + known.name, len(there), progress)
    with ThreadPoolExecutor(_threads()) as pool:
        for done, (key, shapes) in enumerate(zip(there, pool.map(look, there), strict=True), start=1):
            if shapes is not None:
                cached._shapes[key] = shapes
            tell(done)


def _prepare(folder: Path) -> None:
    """Makes the folder, marks it as a cache (backup programs and our scan pass over it), removes what killed runs left."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / CACHE_TAG).exists():
            (folder / CACHE_TAG).write_text(_TAG, encoding="utf-8")
    except OSError as error:
        raise UserError(
            "the cache folder cannot be written ({reason})",
            where=str(folder),
            mend="make room there, or set data.cache_dir to another disk"
            if error.errno in FULL
            else "mend its rights, or set data.cache_dir to another folder",
            code=EXIT_ENVIRONMENT,
            reason=error.strerror or error,
        ) from error
    before = time.time() - _STALE_S
    for stale in folder.glob("*/*/.*.tmp"):
        try:
            if stale.stat().st_mtime < before:
                stale.unlink()
        except OSError:  # another process was quicker, or still has it open
            continue


class _Room:
    """Writes the entries of one encoder, and says how much is needed when the disk cannot hold them."""

    def __init__(self, folder: Path, total: int) -> None:
        self.folder, self.total = folder, total
        self.written = self.written_bytes = 0

    def write(self, path: Path, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        try:
            self.written_bytes += write_entry(path, key, tensors)
        except OSError as error:
            if error.errno in FULL:
                raise self._full() from error
            raise UserError(
                "the cache cannot be written ({reason})",
                where=str(self.folder),
                mend="mend its rights, or set data.cache_dir to another folder; what is written stays",
                code=EXIT_FAILED,
                reason=error.strerror or error,
            ) from error
        self.written += 1
        if self.written == _RECKON_AFTER and self._needed() > shutil.disk_usage(self.folder).free:
            raise self._full()

    def _needed(self) -> float:
        return self.written_bytes / max(1, self.written) * (self.total - self.written)

    def _full(self) -> UserError:
        return UserError(
            "the disk is too small: {done} of {total} are encoded, the rest needs about {needed}, {free} are free",
            where=str(self.folder),
            mend="make room, or set data.cache_dir to another disk, and start again: what is encoded stays and is found",
            code=EXIT_FAILED,
            done=self.written,
            total=self.total,
            needed=f"{self._needed() / 1e6:.1f} MB" if self.written else "an unknown size",
            free=f"{shutil.disk_usage(self.folder).free / 1e6:.1f} MB",
        )


def _threads() -> int:
    return max(1, min(4, os.cpu_count() or 1))


class _Teller:
    """Passes progress on, a few times a second and at both ends."""

    def __init__(self, name: str, total: int, progress: Progress | None) -> None:
        self.name, self.total, self.progress = name, total, progress
        self.began = self.last = time.perf_counter()
        if progress is not None:
            progress(name, 0, total, 0.0)

    def __call__(self, done: int) -> None:
        now = time.perf_counter()
        if self.progress is not None and (done == self.total or now - self.last > 0.2):
            self.last = now
            self.progress(self.name, done, self.total, now - self.began)
