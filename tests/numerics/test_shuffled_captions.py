"""Shuffled captions: every order lies in the cache, a visit takes what its lot says, and a resumed run draws the same lots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from cache_encoders import Text, Vae, draw, run
from PIL import Image

from whitetuner import recipe
from whitetuner.checks import check_config
from whitetuner.config.load import dump_config, load_config
from whitetuner.data.loader import Loader, chosen_order, drops
from whitetuner.data.order import Order, Shares
from whitetuner.data.scan import SetOptions, scan
from whitetuner.evidence import checkpoint, digest, losses
from whitetuner.families import registry
from whitetuner.records import EncodeInput
from whitetuner.tiny import tiny_values

CAPTIONS = ("mika, sofa, window, evening", "mika, tulips", "mika")


def test_the_loader_reads_the_order_of_every_visit_and_nothing_is_encoded_twice(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for number, caption in enumerate(CAPTIONS):
        draw(folder / f"{number}.png", number)
        (folder / f"{number}.txt").write_text(caption, encoding="utf-8")
    options = {"images": folder, "resolution": 64, "caption_dropout": 0.2}
    found = scan([SetOptions(caption_shuffles=3, **options)], 16)  # type: ignore[arg-type]
    assert [len(item.orders) for item in found.items] == [3, 0, 0]  # mika stays first
    text = Text()
    cached = run(folder, found.items, text, Vae(), uncond=True)
    wanted = {one for item in found.items for one in (item.caption, *item.orders)} | {""}
    assert sorted(given.caption for given in text.asked) == sorted(wanted)
    order = Order(found.items, [0, 0, 0], found.sets, 2, seed=5)
    seen: set[str] = set()
    with Loader(cached, found.items, order, found.sets, shares=Shares(1)) as loader:
        for _ in range(100):  # 67 visits of each
            (batch,) = next(loader).mine
            for item, visit, said in zip(batch.items, batch.visits, batch["prompt"], strict=True):
                caption = (item.caption, *item.orders)[chosen_order(5, item, visit)]
                caption = "" if drops(5, item, visit, 0.2) else caption
                assert torch.equal(said, Text().encode(EncodeInput(caption))["prompt"])
                seen.add(caption)
    assert seen == wanted
    again = Text()
    more = scan([SetOptions(caption_shuffles=5, **options)], 16).items  # type: ignore[arg-type]
    run(folder, more, again, Vae(), uncond=True)
    assert [given.caption for given in again.asked] == list(more[0].orders[3:])
    plain = Text()
    run(folder, scan([SetOptions(**options)], 16).items, plain, Vae(), uncond=True)  # type: ignore[arg-type]
    assert not plain.asked


def test_stopped_and_resumed_with_shuffled_captions_is_never_interrupted(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    registry.make_tiny("flux2-klein", str(tmp_path / "model"))
    (tmp_path / "data").mkdir()
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{index}.png")
        (tmp_path / "data" / f"{index}.txt").write_text(
            f"mika, sofa {index}, window, evening", encoding="utf-8"
        )
    place = {
        **tiny_values("flux2-klein", tmp_path / "model", tmp_path / "data", tmp_path / "out"),
        "run.steps": 6,
        "save.every": 3,
        "preview.every": 0,
        "validation.every": 3,
        "data.caption_dropout": 0.3,
        "data.caption_shuffles": 4,
        "log.tensorboard": False,
    }

    def trained(name: str, resume: str | None = None, **more: Any) -> Path:
        values = {**place, "run.name": name, **{key.replace("__", "."): value for key, value in more.items()}}
        return recipe.run(load_config(None, base=values), resume=resume).folder

    whole = trained("whole")
    trained("halves", run__steps=3)
    halves = trained("halves", "latest")
    assert digest(checkpoint(whole, 6)) == digest(checkpoint(halves, 6)) and losses(whole) == losses(halves)
    written = trained("written", data__caption_shuffles=0)
    assert digest(checkpoint(written, 6)) != digest(checkpoint(whole, 6))
    assert [one[2] for one in losses(written)] == [
        one[2] for one in losses(whole)
    ]  # noise levels are drawn apart
    kept = trained("kept", data__caption_keep=2)  # one order of each: two tags change places
    assert digest(checkpoint(kept, 6)) not in {digest(checkpoint(one, 6)) for one in (whole, written)}

    file = tmp_path / "c.toml"
    notes = []
    for count in (0, 4):
        config = load_config(None, base={**place, "data.caption_shuffles": count})
        file.write_text(dump_config(config.config), encoding="utf-8")
        notes.append(check_config(file, [], deep=False, model=True, convert=False).notes)
    assert "shuffled captions: 15 texts are encoded for 3 captions" in notes[1]
    told = [
        float(next(one for one in row if "MB in all" in one).split(", ")[1].split(" MB")[0]) for row in notes
    ]
    assert told[1] > 1.5 * told[0]  # of a tiny model most is text
