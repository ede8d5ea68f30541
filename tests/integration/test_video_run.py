"""WAN from files to a clip: the frames that are learned are those that check announces; experts in turns; resume; bad input."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from whitetuner import drawing, recipe
from whitetuner.cli import main
from whitetuner.config.load import dump_config, load_config
from whitetuner.data.video import look
from whitetuner.errors import UserError, UserErrors
from whitetuner.evidence import checkpoint, digest, losses
from whitetuner.families import registry
from whitetuner.families.contract import quiet
from whitetuner.gui import forms
from whitetuner.gui.pickers import Roots
from whitetuner.gui.training_tabs import tab_for
from whitetuner.memory.build import Build
from whitetuner.prepared import encoded_twice
from whitetuner.records import Size
from whitetuner.resolve import open_family
from whitetuner.tiny import tiny_values

#: Stripes of a numbered frame, lowest bit left.
BITS = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """model22/, model21/, and data/ with two clips whose frames carry their number, 24 and 16 a second."""
    folder = tmp_path_factory.mktemp("video")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with quiet():
        registry.make_tiny("wan", str(folder / "model22"), "i2v-2.2")
        registry.make_tiny("wan", str(folder / "model21"), "i2v-2.1")
    (folder / "data").mkdir()
    for name, rate, count in (("fast", 24, 40), ("plain", 16, 24)):
        with av.open(str(folder / "data" / f"{name}.mp4"), "w") as container:
            track = container.add_stream("libx264", rate=rate, options={"crf": "8", "g": "10", "bf": "2"})
            track.width, track.height, track.pix_fmt = 64, 64, "yuv420p"
            for number in range(count):
                container.mux(track.encode(av.VideoFrame.from_image(numbered(number))))
            container.mux(track.encode(None))
        (folder / "data" / f"{name}.txt").write_text(f"a {name} clip", encoding="utf-8")
    yield folder
    torch.set_num_threads(threads)


def numbered(number: int) -> Image.Image:
    bits = [235 if number >> bit & 1 else 20 for bit in range(BITS)]
    row = np.repeat(np.array(bits, dtype=np.uint8), 64 // BITS)
    return Image.fromarray(np.tile(row, (64, 1))).convert("RGB")


def number_of(picture: Image.Image) -> int:
    row = np.asarray(picture.convert("L"))[32, 64 // BITS // 2 :: 64 // BITS]
    return sum(int(value > 128) << bit for bit, value in enumerate(row))


def config(place: Path, out: Path, model: str = "model22", **more: object) -> dict[str, object]:
    values = tiny_values("wan", place / model, place / "data", out, "i2v")
    clip = str(place / "data" / "fast.mp4")
    prompts = [{"text": "a fast clip", "size": [64, 64], "steps": 2, "images": [clip]}]
    return {**values, "run.name": "run", "run.steps": 6, "preview.prompts": prompts, **more}


def test_the_frames_that_are_learned_are_those_that_check_announces(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from whitetuner.families.wan.encoders import FirstFrameEncoder, LatentEncoder

    learned, first = [], []

    def watched(kind: type, seen: list, field: str):
        right = kind.encode

        def encode(self, given):
            seen.append(tuple(number_of(one) for one in getattr(given, field)))
            return right(self, given)

        monkeypatch.setattr(kind, "encode", encode)

    watched(LatentEncoder, learned, "target")
    watched(FirstFrameEncoder, first, "conditions")
    values = config(place, tmp_path, **{"data.clips": "uniform", "data.clips_per_video": 2})
    file = tmp_path / "c.toml"
    file.write_text(dump_config(load_config(None, base=values).config), encoding="utf-8")
    assert main(["check", str(file), "--json"]) == 0
    films = json.loads(capsys.readouterr().out)["data"]["films"]
    announced = [tuple(clip) for film in films for clip in film["clips"]]
    assert len(announced) == 4 and (0, 1, 3, 4, 6) in announced and (0, 1, 2, 3, 4) in announced
    assert main(["cache", str(file)]) == 0
    assert sorted(learned) == sorted(announced)
    assert {clip[0] for clip in announced} == {one[0] for one in first}


def test_two_experts_learn_in_turns_resume_to_the_bit_and_leave_two_files(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whitetuner.train.team.TURN_STEPS", 2)
    whole = recipe.run(load_config(None, base=config(place, tmp_path / "a", **{"save.every": 3})))
    cut = config(place, tmp_path / "b", **{"run.steps": 3, "save.every": 3})
    recipe.run(load_config(None, base=cut))
    again = recipe.run(
        load_config(None, base=config(place, tmp_path / "b", **{"save.every": 3})), resume="latest"
    )
    folders = [result.folder / "checkpoints" / "checkpoint-6" for result in (whole, again)]
    names = ["lokr/lokr_high_noise.safetensors", "lokr/lokr_low_noise.safetensors"]
    for name in [*names, "accelerate_state/optimizer_high_noise.safetensors"]:
        one, other = (load_file(folder / name) for folder in folders)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
    high, low = (load_file(folders[0] / name) for name in names)
    assert any(not torch.equal(high[key], low[key]) for key in high)
    final = whole.folder / "final"
    assert {path.name for path in final.glob("run*.safetensors")} == {
        "run_high_noise.safetensors",
        "run_low_noise.safetensors",
    }
    assert all("diffusion_model.blocks." in key for key in load_file(final / "run_low_noise.safetensors"))
    film = drawing.sample(
        str(whole.folder),
        prompt="x",
        images=[place / "data" / "plain.mp4"],
        out=tmp_path / "x.mp4",
        size=Size(64, 48),
        frames=9,
        steps=2,
    )
    assert look(film).size == Size(64, 48, 9) and look(film).times[1] == pytest.approx(1 / 16, abs=1e-3)


def test_one_expert_learns_and_draws_with_the_other(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = config(place, tmp_path, **{"model.options.expert": "low", "preview.every": 6, "run.steps": 4})
    said: list[str] = []
    result = recipe.run(load_config(None, base=values), listeners=(lambda event: said.append(str(event)),))
    assert any("reading the expert that does not learn (high_noise)" in one for one in said)
    assert look(result.folder / "samples" / "step-000004" / "00.mp4").size == Size(64, 64, 5)
    assert [path.name for path in sorted((result.folder / "final").glob("*.safetensors"))] == [
        "run_low_noise.safetensors"
    ]
    file = result.folder / "final" / "lokr" / "lokr_low_noise.safetensors"
    images = [place / "data" / "fast.mp4"]
    two = [
        drawing.sample(
            str(model),
            adapter=adapter,
            images=images,
            out=tmp_path / name,
            frames=5,
            size=Size(64, 64),
            steps=2,
        )
        for model, adapter, name in ((result.folder, None, "a.png"), (place / "model22", file, "b.png"))
    ]
    assert np.array_equal(*(np.asarray(Image.open(path)) for path in two)), (
        "the run's files and the file alone"
    )
    monkeypatch.setattr("whitetuner.companions._SHARE", 0.0)
    said.clear()
    poor = {**values, "run.name": "poor"}
    done = recipe.run(load_config(None, base=poor), listeners=(lambda event: said.append(str(event)),))
    assert any("no previews: they need the other expert too" in one for one in said)
    assert not any((done.folder / "samples").rglob("*.png"))


def test_turns_by_the_plan_are_written_down_and_stay_on_resume(place: Path, tmp_path: Path) -> None:
    """A plan for another machine may want other turns; whose turn a step is must not change with it."""
    from whitetuner.planning import Shape, way_of

    values = config(place, tmp_path, **{"memory.vram_gb": 2, "run.steps": 3})
    planned = load_config(None, base=values).config
    family, shapes = open_family(planned), [Shape(Size(64, 64, 5), 1, (Size(64, 64),))]
    ways = {
        name: way_of(planned, family, torch.device("cpu"), torch.float32, shapes, earlier)
        for name, earlier in (("new", {}), ("old", {"base": "fp32"}), ("same", {"turn_steps": 77}))
    }
    assert ways["new"].turn_steps == 20 == ways["new"].facts()["turn_steps"]
    assert ways["old"].turn_steps is None and ways["same"].turn_steps == 77
    done = recipe.run(load_config(None, base=values))
    assert json.loads((done.folder / "run.json").read_text("utf-8"))["resolved"]["turn_steps"] == 20


def test_experts_that_wait_on_disk_and_off_the_device_change_no_bit(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With validation and previews between turns. What has left is never asked, and nothing holds on to where it lay."""
    from whitetuner.families.wan import drawing as wan_drawing
    from whitetuner.families.wan import model as wan_model
    from whitetuner.memory.luggage import Luggage
    from whitetuner.memory.swap.engine import SwapEngine
    from whitetuner.train.learner import Learner

    monkeypatch.setattr("whitetuner.train.team.TURN_STEPS", 2)
    more = {
        "run.steps": 5,
        "save.every": 5,
        "preview.every": 3,
        "validation.every": 3,
        "optimizer.ema": 0.9,
    }
    wanted = recipe.run(load_config(None, base=config(place, tmp_path / "a", **more)))
    learners: dict[int, Learner] = {}
    parked: list[int] = []

    def moved(tensor: torch.Tensor, _: torch.device) -> torch.Tensor:
        there = tensor.clone()
        tensor.fill_(float("nan") if tensor.is_floating_point() else 99)
        return there

    class Leaving(Learner):
        def __init__(self, part, module, *rest):
            super().__init__(part, module, *rest)
            assert self.fitted is not None and self.fitted.engine is not None
            blocks = {id(e.tensor) for layout in self.fitted.engine.layouts for e in layout.entries}
            small = lambda: (one for one in self._tensors() if id(one) not in blocks)  # noqa: E731
            self.luggage = Luggage(small, torch.device("cpu"), moved)
            learners[id(module)] = self

    def here(asked, module):
        assert not learners[id(module)].luggage.packed
        return asked(module)

    park = SwapEngine.park
    monkeypatch.setattr(SwapEngine, "park", lambda engine, shelf: (parked.append(1), park(engine, shelf)))
    monkeypatch.setattr("whitetuner.assemble.Learner", Leaving)
    for home, name in ((wan_drawing, "_anchor"), (wan_model, "anchor")):
        asked = getattr(home, name)
        monkeypatch.setattr(home, name, lambda module, asked=asked: here(asked, module))
    on_disk = config(place, tmp_path / "b", **more, **{"memory.experts_on_disk": True})
    other = recipe.run(load_config(None, base=on_disk))
    assert len(learners) == 2 and len(parked) > 6
    assert digest(checkpoint(other.folder, 5)) == digest(checkpoint(wanted.folder, 5))
    assert losses(other.folder) == losses(wanted.folder)
    sheets = [one.folder / "samples" / "step-000003" / "00.png" for one in (wanted, other)]
    assert sheets[0].read_bytes() == sheets[1].read_bytes()


@pytest.mark.parametrize("clips", ["chunks", "random"])
def test_what_is_cached_is_what_is_encoded_now(place: Path, tmp_path: Path, clips: str) -> None:
    values = load_config(None, base=config(place, tmp_path, "model21", **{"data.clips": clips})).config
    before, now = encoded_twice(values, open_family(values), Build())
    assert before.keys() == now.keys() and {name.partition("/")[2] for name in now} == {
        "latent",
        "prompt_embeds",
        "first_frame_latents",
        "image_embeds",
    }
    assert all(torch.equal(before[name], now[name]) for name in now)


def test_clips_at_random_change_with_the_visit(place: Path, tmp_path: Path) -> None:
    values = config(
        place, tmp_path, **{"data.clips": "random", "data.clips_per_video": 3, "data.batch_size": 1}
    )
    result = recipe.run(load_config(None, base=values))
    entries = list((tmp_path / "cache" / "vae").rglob("*.safetensors"))
    assert 4 <= len(entries) <= 6, "each clip of each video is encoded"
    assert result.step == 6


def wrong(values: dict[str, object]) -> str:
    with pytest.raises((UserError, UserErrors)) as caught:
        recipe.run(load_config(None, base=values))
    return str(caught.value)


def test_bad_input_is_told_before_anything_is_loaded(place: Path, tmp_path: Path) -> None:
    good = config(place, tmp_path)
    assert "use 5 or 9" in wrong({**good, "data.num_frames": 8})
    assert "needs its first frame" in wrong({**good, "preview.prompts": [{"text": "x"}]})
    assert "use 5 or 9" in wrong({**good, "preview.prompts": [{**good["preview.prompts"][0], "frames": 7}]})  # type: ignore[index]
    assert "learns how a first frame goes on" in wrong(
        {
            **{key: value for key, value in good.items() if key != "data.videos"},
            "data.images": str(place / "data"),
        }
    )
    assert "is for i2v, not for t2v" in wrong({**good, "model.task": "t2v", "preview.prompts": []})
    assert "the folder holds WAN i2v-2.2" in wrong({**good, "model.options.variant": "i2v-2.1"})
    assert "no expert to choose" in wrong(
        {**config(place, tmp_path, "model21"), "model.options.expert": "high"}
    )
    assert "no expert waits here" in wrong(
        {**config(place, tmp_path, "model21"), "memory.experts_on_disk": True}
    )
    assert "no video of the data set is long enough" in wrong({**good, "data.num_frames": 81})
    for more, message in (
        ({}, "begins from a first frame|draws beside given pictures"),
        ({"images": [place / "data" / "fast.mp4"], "frames": 6}, "use 5 or 9"),
        ({"images": [place / "data" / "fast.txt"]}, "not a picture|damaged|unknown"),
    ):
        with pytest.raises(UserError) as caught:
            drawing.sample(str(place / "model22"), out=tmp_path / "x.mp4", size=Size(64, 64), **more)  # type: ignore[arg-type]
        assert any(word in str(caught.value) for word in message.split("|")), caught.value


def test_long_clips_in_pieces_learn_the_same_streamed_or_not(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces inside recomputed and streamed blocks: the same bits with the swap as without; the whole to rounding."""
    monkeypatch.setattr("whitetuner.planning.LONG_TOKENS", 8)
    monkeypatch.setattr("whitetuner.planning.PIECE_TOKENS", 8)
    again = {"memory.gradient_checkpointing": True, "run.steps": 3}
    wanted = {}
    for name, more in (
        ("plain", again),
        ("streamed", {**again, "memory.blocks_to_swap": 2}),
        ("offloaded", {**again, "memory.blocks_to_swap": 1, "memory.activation_offload": True}),
    ):
        result = recipe.run(load_config(None, base=config(place, tmp_path / name, "model21", **more)))
        assert json.loads((result.folder / "run.json").read_text("utf-8"))["resolved"]["pieces"] == 8
        wanted[name] = load_file(result.folder / "checkpoints" / "checkpoint-3" / "lokr" / "lokr.safetensors")
    monkeypatch.setattr("whitetuner.planning.LONG_TOKENS", 10_000)
    result = recipe.run(load_config(None, base=config(place, tmp_path / "whole", "model21", **again)))
    whole = load_file(result.folder / "checkpoints" / "checkpoint-3" / "lokr" / "lokr.safetensors")
    for key, tensor in wanted["plain"].items():
        assert torch.equal(tensor, wanted["streamed"][key]) and torch.equal(
            tensor, wanted["offloaded"][key]
        ), key
        assert torch.allclose(tensor, whole[key], atol=1e-3), key


def test_the_form_says_of_a_model_what_the_run_would(place: Path) -> None:
    tab = tab_for("wan", "i2v")
    assert tab is not None

    def told(model: str, options: str = "") -> dict[str, object]:
        text = f"[model]\nfamily = 'wan'\ntask = 'i2v'\npath = '{place / model}'\n{options}"
        return forms.state(tab, f"{text}\n[data]\nvideos = '{place / 'data'}'\n", "zh", Roots.of(None))

    assert told("model21")["errors"] == told("model22")["errors"] == {}
    assert told("model22", "options.expert = 'low'")["errors"] == {}
    wrong = told("model21", "options.expert = 'low'")["errors"]
    assert list(wrong) == ["model.options.expert"] and "没有专家可选" in str(wrong)  # type: ignore[call-overload]
    wrong = told("model21", "options.variant = 'i2v-2.2'")["errors"]
    assert "i2v-2.1" in str(wrong)
