"""The cache survives torn files, flipped bits, kills, full disks, several writers, broken pictures."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_encoders import Text, Vae, asked, build, draw, items_of, make_folder, run

from whitetuner.data import cache as cache_module
from whitetuner.data.cache import build_cache
from whitetuner.data.entries import read_entry, write_entry
from whitetuner.errors import UserError, UserErrors
from whitetuner.family import BuildFn

TENSORS = {
    "half": torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16),
    "full": torch.randn(2, 5, generator=torch.Generator().manual_seed(2)),
    "ids": torch.arange(7),
    "flag": torch.tensor([True, False]),
    "none": torch.zeros(0, 3),
    "one": torch.tensor(2.5, dtype=torch.float64),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


def test_an_entry_comes_back_as_it_was_written(tmp_path: Path) -> None:
    view = torch.arange(12.0).reshape(3, 4).t()
    write_entry(tmp_path / "a", "k", {**TENSORS, "view": view, "same": view})
    found = read_entry(tmp_path / "a", "k")
    assert found is not None and found.keys() == {*TENSORS, "view", "same"}
    for name, tensor in {**TENSORS, "view": view}.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert read_entry(tmp_path / "a", "other key") is None and read_entry(tmp_path / "missing", "k") is None


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_entry(path, "k", {"x": TENSORS["half"]})
    whole = path.read_bytes()
    unnoticed = []
    for position in range(len(whole)):
        for bit in (position % 8, (position + 3) % 8):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            found = read_entry(path, "k")
            if found is not None and not (found.keys() == {"x"} and torch.equal(found["x"], TENSORS["half"])):
                unnoticed.append((position, bit))
    assert not unnoticed
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert read_entry(path, "k") is None
    path.write_bytes(whole + b"\0")
    assert read_entry(path, "k") is None


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "foreign", "gone"])
def test_a_harmed_entry_is_encoded_again_and_only_it(folder: Path, harm: str) -> None:
    items = items_of(folder)
    before = [run(folder, items, Vae()).sample(item, 0).fields["latent"] for item in items]
    victim, other = sorted((folder.parent / "cache" / "vae").glob("*/*.safetensors"))[:2]
    raw = victim.read_bytes()
    if harm == "gone":
        victim.unlink()
    else:
        flipped = raw[:-9] + bytes([raw[-9] ^ 16]) + raw[-8:]
        victim.write_bytes(
            {"cut": raw[:-9], "flip": flipped, "empty": b"", "foreign": other.read_bytes()}[harm]
        )
    vae = Vae()
    cached = run(folder, items, vae)
    assert asked(vae) == (1,)
    assert all(
        torch.equal(cached.sample(item, 0).fields["latent"], old)
        for item, old in zip(items, before, strict=True)
    )


def test_an_entry_harmed_while_in_use_is_told_and_removed(folder: Path) -> None:
    items = items_of(folder)
    cached = run(folder, items, Vae())
    for victim in (folder.parent / "cache" / "vae").glob("*/*.safetensors"):
        victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(UserError, match="encoded anew"):
        cached.sample(items[0], 0)
    vae = Vae()
    run(folder, items, vae)
    assert asked(vae) == (3,)


def test_a_full_disk_says_what_is_needed_and_keeps_what_is_written(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = cache_module.write_entry
    written = []

    def small_disk(path: Path, key: str, tensors: dict[str, torch.Tensor]) -> int:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        return real(path, key, tensors)

    monkeypatch.setattr(cache_module, "write_entry", small_disk)
    vae = Vae()
    with pytest.raises(
        UserError, match=r"2 of 3 are encoded, the rest needs about 0\.0 MB, \d+\.\d MB are free"
    ):
        run(folder, items_of(folder), vae)
    assert vae.frees == 1 and len(written) == 2
    monkeypatch.setattr(cache_module, "write_entry", real)
    vae = Vae()
    run(folder, items_of(folder), vae)
    assert asked(vae) == (1,)


@pytest.mark.skipif(sys.platform != "linux", reason="makes a small disk with mount")
def test_a_really_full_disk(folder: Path) -> None:
    disk = folder.parent / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True)
    if made.returncode:
        pytest.skip("may not mount a small disk here")
    try:
        for number in range(3, 30):
            draw(folder / f"{number}.png", number)
            (folder / f"{number}.txt").write_text("x", encoding="utf-8")
        with pytest.raises(UserError, match=r"the disk is too small: \d+ of 30 are encoded"):
            build_cache(items_of(folder), [Vae()], build, disk)
        entries = list(disk.glob("vae/*/*.safetensors"))
        assert entries and all(read_entry(path, path.stem) is not None for path in entries)
        assert not list(disk.glob("vae/*/.*.tmp"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_will_not_hold_all_is_told_early(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_RECKON_AFTER", 1)
    monkeypatch.setattr(
        cache_module.shutil, "disk_usage", lambda path: cache_module.shutil._ntuple_diskusage(9, 8, 1)
    )
    with pytest.raises(UserError, match="1 of 3 are encoded"):
        run(folder, items_of(folder), Vae())


def test_a_folder_that_cannot_be_written_is_told(folder: Path) -> None:
    (folder.parent / "cache").write_text("a file stands here", encoding="utf-8")
    with pytest.raises(UserError, match="cache folder cannot be written"):
        run(folder, items_of(folder), Vae())


def test_stopping_keeps_what_was_written_and_frees_the_encoder(folder: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(name: str, done: int, total: int, seconds: float) -> None:
        if done == 1:
            raise Stopped

    vae = Vae()

    class Slow(Vae):
        def encode(self, given: object) -> dict[str, torch.Tensor]:
            time.sleep(0.25)  # progress is passed on a few times a second
            return super().encode(given)  # type: ignore[arg-type]

    slow = Slow()
    with pytest.raises(Stopped):
        run(folder, items_of(folder), slow, progress=stop)
    assert slow.frees == 1
    run(folder, items_of(folder), vae)
    assert asked(slow, vae) == (1, 2)


def test_pictures_that_break_while_decoding_are_told_together_after_the_others(folder: Path) -> None:
    items = items_of(folder)
    raw = bytearray((folder / "1.png").read_bytes())
    raw[len(raw) // 2] ^= 255  # the end is there, the middle is broken: only decoding tells
    (folder / "1.png").write_bytes(raw)
    draw(folder / "2.png", 77)  # changed between scan and encoding
    with pytest.raises(UserErrors) as caught:
        run(folder, (items[0], items_of(folder)[1], items[2]), Vae())
    text = str(caught.value)
    assert "1.png" in text and "damaged" in text and "2.png" in text and "changed after" in text
    vae = Vae()
    run(folder, items[:1], vae)
    assert asked(vae) == (0,)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked from a process that has torch loaded")
def test_caches_built_at_once_agree(folder: Path) -> None:
    """Three runs are three processes: libraries load models through state of the whole process, so threads prove less."""
    for number in range(3, 12):
        draw(folder / f"{number}.png", number)
        (folder / f"{number}.txt").write_text(str(number), encoding="utf-8")
    items = items_of(folder)
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                run(folder, items, Text(), Vae())
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    vae = Vae()
    run(folder, items, Text(), vae)
    assert asked(vae) == (0,) and not list((folder.parent / "cache").glob("*/*/.*.tmp"))


def test_a_freed_encoder_is_gone_even_when_it_holds_itself(folder: Path) -> None:
    class Circular(Vae):
        def load(self, build: BuildFn) -> None:
            super().load(build)
            self.vae.__dict__["itself"] = self.vae
            self.seen = weakref.ref(self.vae)

    vae = Circular()
    gc.disable()
    try:
        run(folder, items_of(folder), vae)
        assert vae.seen() is None
    finally:
        gc.enable()


def test_ranks_share_the_work_and_all_see_all(folder: Path) -> None:
    items = items_of(folder)
    barrier = threading.Barrier(2)
    encoders = [Vae(), Vae()]
    found: dict[int, torch.Tensor] = {}

    def rank(number: int) -> None:
        cached = run(folder, items, encoders[number], share=(number, 2), wait=barrier.wait)
        found[number] = torch.stack([cached.sample(item, 0).fields["latent"] for item in items])

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(asked(*encoders)) == [1, 2] and torch.equal(found[0], found[1])


def test_leftovers_of_killed_runs_are_swept_when_old(folder: Path) -> None:
    run(folder, items_of(folder), Vae())
    place = next((folder.parent / "cache" / "vae").iterdir())
    old, young = place / ".a.1.2.3.tmp", place / ".b.1.2.3.tmp"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 3e5,) * 2)
    run(folder, items_of(folder), Vae())
    assert not old.exists() and young.exists()


def test_the_noise_of_the_test_pictures_is_not_all_alike(folder: Path) -> None:
    """Guards the tests above: equal latents would hide a wrong entry."""
    cached = run(folder, items_of(folder), Vae())
    latents = [cached.sample(item, 0).fields["latent"].numpy() for item in items_of(folder)]
    assert not np.array_equal(latents[0], latents[1]) and not np.array_equal(latents[1], latents[2])
