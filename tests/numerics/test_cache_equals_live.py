"""E9: what comes from the cache is what the encoders say live, to the bit, and exactly what changed is
encoded anew.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cache_encoders import Pair, Text, Vae, asked, build, draw, items_of, make_folder, run

from whitetuner.data.digests import file_digest
from whitetuner.data.inputs import Inputs
from whitetuner.data.media import picture
from whitetuner.family import BuildFn
from whitetuner.records import EncodeInput, Item, Size

SQUARE = Size(32, 32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_is_live_to_the_bit(folder: Path, workers: int, dtype: torch.dtype) -> None:
    items = items_of(folder)
    vae, text = Vae(), Text()
    vae.dtype = dtype
    cached = run(folder, items, text, vae, workers=workers)
    live = Vae()
    live.dtype = dtype
    live.load(build)
    for item in items:
        sample = cached.sample(item, visit=3)
        image = picture(item.target, item.size)
        wanted = live.encode(EncodeInput("", (image,), size=item.size))["latent"]
        assert sample.fields["latent"].dtype == dtype and torch.equal(sample.fields["latent"], wanted)
        said = Text().encode(EncodeInput(item.caption))["prompt"]
        assert sample.fields["prompt"].dtype == torch.bfloat16 and torch.equal(sample.fields["prompt"], said)
        assert (sample.item, sample.visit) == (item, 3)


def test_encoders_run_in_turn_and_only_when_something_is_missing(folder: Path) -> None:
    events: list[str] = []

    class Seen(Text):
        def __init__(self, name: str, field: str) -> None:
            super().__init__()
            self.name, self.fields = name, {field: "ragged"}

        def load(self, build: BuildFn) -> None:
            events.append(f"load {self.name}")

        def encode(self, given: EncodeInput) -> dict[str, torch.Tensor]:
            return {next(iter(self.fields)): super().encode(given)["prompt"]}

        def free(self) -> None:
            events.append(f"free {self.name}")

    run(folder, items_of(folder), Seen("a", "x"), Seen("b", "y"))
    assert events == ["load a", "free a", "load b", "free b"]
    again = run(folder, items_of(folder), Seen("a", "x"), Seen("b", "y"))
    assert events[4:] == [] and [(one.made, one.reused) for one in again.told] == [(0, 3), (0, 3)]


def test_a_changed_caption_is_encoded_alone(folder: Path) -> None:
    run(folder, items_of(folder), Text(), Vae())
    (folder / "1.txt").write_text("another", encoding="utf-8")
    text, vae = Text(), Vae()
    cached = run(folder, items_of(folder), text, vae)
    assert [given.caption for given in text.asked] == ["another"] and asked(vae) == (0,) and vae.loads == 0
    fields = cached.sample(items_of(folder)[1], 0).fields
    assert torch.equal(fields["prompt"], Text().encode(EncodeInput("another"))["prompt"])


def test_a_changed_file_is_encoded_alone(folder: Path) -> None:
    run(folder, items_of(folder), Text(), Vae())
    draw(folder / "2.png", 99)
    text, vae = Text(), Vae()
    run(folder, items_of(folder), text, vae)
    assert asked(text, vae) == (0, 1)


def test_a_changed_size_leaves_the_text_alone(folder: Path) -> None:
    run(folder, items_of(folder), Text(), Vae())
    text, vae = Text(), Vae()
    cached = run(folder, items_of(folder, resolution=32), text, vae)
    assert asked(text, vae) == (0, 3)
    assert (
        cached.sample(items_of(folder, 32)[0], 0).fields["latent"].shape[-1]
        == items_of(folder, 32)[0].size.width // 2
    )


def test_a_changed_encoder_or_precision_leaves_the_other_alone(folder: Path) -> None:
    run(folder, items_of(folder), Text(), Vae())
    text, vae = Text(), Vae("2")
    run(folder, items_of(folder), text, vae)
    assert asked(text, vae) == (0, 3)
    text, vae = Text(), Vae()
    run(folder, items_of(folder), text, vae, precision="bf16")
    assert asked(text, vae) == (3, 3)
    text, vae = Text(), Vae()
    run(folder, items_of(folder), text, vae)
    assert asked(text, vae) == (0, 0)  # going back finds what was there


def test_renaming_adding_and_removing_files_encodes_only_what_is_new(folder: Path) -> None:
    run(folder, items_of(folder), Text(), Vae())
    for ending in ("png", "txt"):
        (folder / f"0.{ending}").rename(folder / f"zz.{ending}")
        (folder / f"1.{ending}").unlink()
    draw(folder / "new.png", 7)
    (folder / "new.txt").write_text("new", encoding="utf-8")
    text, vae = Text(), Vae()
    run(folder, items_of(folder), text, vae)
    assert asked(text, vae) == (1, 1)


def test_conditions_and_prompt_count_where_they_are_read(folder: Path) -> None:
    def edits(items: tuple[Item, ...], size: Size = SQUARE) -> tuple[Item, ...]:
        reference = folder.parent / "reference.png"
        return tuple(
            replace(
                item,
                conditions=(reference,),
                condition_digests=(file_digest(reference),),
                condition_sizes=(size,),
            )
            for item in items
        )

    draw(folder.parent / "reference.png", 50, (80, 40))
    pair, vae = Pair(), Vae()
    run(folder, edits(items_of(folder)), pair, vae)
    assert asked(pair, vae) == (3, 3)
    assert pair.asked[0].conditions[0].size == (32, 32) and pair.asked[0].originals[0].size == (80, 40)
    draw(folder.parent / "reference.png", 51, (80, 40))
    pair, vae = Pair(), Vae()
    run(folder, edits(items_of(folder)), pair, vae)
    assert asked(pair, vae) == (3, 0)
    pair, vae = Pair(), Vae()
    run(folder, edits(items_of(folder), Size(48, 32)), pair, vae)
    assert asked(pair, vae) == (3, 0)
    pair, vae = Pair(), Vae()
    run(folder, tuple(replace(item, caption="one for all") for item in edits(items_of(folder))), pair, vae)
    assert asked(pair, vae) == (1, 0)  # equal prompt, equal conditions: one entry serves all targets


def test_equal_inputs_are_encoded_once_and_prompts_without_target_pass_the_vae_by(folder: Path) -> None:
    for number in range(3):
        (folder / f"{number}.txt").write_text("the same", encoding="utf-8")
    text, vae = Text(), Vae()
    preview = Inputs("a preview", size=Size(64, 64))
    cached = run(folder, items_of(folder), text, vae, extra=[preview, Inputs("")], uncond=True)
    assert sorted(given.caption for given in text.asked) == ["", "a preview", "the same"] and asked(vae) == (
        3,
    )
    assert set(cached.fields(preview)) == {"prompt"}
    item = items_of(folder)[0]
    dropped, spoken = cached.sample(item, 0, uncond=True).fields, cached.sample(item, 0).fields
    assert torch.equal(dropped["latent"], spoken["latent"])
    assert torch.equal(dropped["prompt"], Text().encode(EncodeInput(""))["prompt"])
    assert not torch.equal(dropped["prompt"], spoken["prompt"])
