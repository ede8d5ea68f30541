"""Videos as clips: the frames that are decoded are the ones asked for, and bad files are told, one by one."""

from __future__ import annotations

import base64
import io
import os
import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from whitetuner.data import video
from whitetuner.data.check import check_sets
from whitetuner.data.check_page import write_check_html
from whitetuner.data.scan import Films, scan
from whitetuner.data.video import frame_files, frames_of, look
from whitetuner.data.video_clips import ClipRules, choose_clips, clip_lengths, resampled, spans
from whitetuner.data.video_folders import content_digests, list_videos
from whitetuner.data.video_stream import AHEAD, FrameStream
from whitetuner.errors import UserError, UserErrors
from whitetuner.records import Size
from whitetuner.runs.film import contact_sheet

#: Rows of a numbered frame's bar code: its number in twelve bits.
BITS = 12


def numbered(number: int, width: int = 96, height: int = 64) -> Image.Image:
    """A picture that carries its number: stripes, black or white, lowest bit left."""
    values = np.zeros((height, width), dtype=np.uint8)
    stripe = width // BITS
    for bit in range(BITS):
        values[:, bit * stripe : (bit + 1) * stripe] = 235 if number >> bit & 1 else 20
    return Image.fromarray(values).convert("RGB")


def number_of(picture: Image.Image) -> int:
    values = np.asarray(picture.convert("L"))
    stripe = values.shape[1] // BITS
    middle = values.shape[0] // 2
    return sum((int(values[middle, bit * stripe + stripe // 2]) > 128) << bit for bit in range(BITS))


def film(
    path: Path,
    count: int,
    fps: int = 16,
    codec: str = "libx264",
    times: list[int] | None = None,
    size: tuple[int, int] = (96, 64),
    rotate: int = 0,
    sound: bool = False,
) -> Path:
    """A clip of numbered frames. times: of the frames in milliseconds (a variable rate)."""
    with av.open(str(path), "w") as container:
        track = container.add_stream(codec, rate=fps)
        track.width, track.height, track.pix_fmt = *size, "yuv420p"
        if codec == "libx264":
            track.options = {"crf": "10", "g": "12", "bf": "2"}
        if times is not None:
            track.codec_context.time_base = Fraction(1, 1000)
        voice = container.add_stream("aac", rate=8000, layout="mono") if sound else None
        if voice is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), "fltp", "mono")
            silence.sample_rate, silence.pts = 8000, 0
            container.mux(voice.encode(silence))
            container.mux(voice.encode(None))
        for number in range(count):
            frame = av.VideoFrame.from_image(numbered(number, *size))
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(track.encode(frame))
        container.mux(track.encode(None))
    if codec == "libsvtav1" and hasattr(os, "sched_setscheduler"):
        # Run by root it puts the caller's own thread into the real-time class, and all that this starts later.
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    if rotate:
        turned(path, rotate)
    return path


def turned(path: Path, degrees: int) -> None:
    """Writes the rotation into the matrix of the track header (ISO/IEC 14496-12, 8.3.2), as phones do."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    one, none = (65536).to_bytes(4, "big", signed=True), bytes(4)
    minus = (-65536).to_bytes(4, "big", signed=True)
    rows = {90: (none, one, minus, none), 180: (minus, none, none, minus), 270: (none, minus, one, none)}
    a, b, c, d = rows[degrees]
    data[start : start + 20] = a + b + none + c + d
    path.write_bytes(bytes(data))


def frames_folder(folder: Path, count: int, first: int = 1, size: tuple[int, int] = (96, 64)) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        numbered(number, *size).save(folder / f"frame_{number + first}.png")
    return folder


# -- what a file says of itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("a.mov", "libx264"),
        ("a.mkv", "libx265"),
        ("a.webm", "libvpx-vp9"),
        ("a.avi", "mpeg4"),
        ("b.mp4", "libsvtav1"),
    ],
)
def test_every_frame_of_every_kind_is_found_by_its_number(tmp_path: Path, name: str, codec: str) -> None:
    path = film(tmp_path / name, 30, codec=codec)
    seen = look(path)
    assert seen.problem is None and seen.size == Size(96, 64, 30)
    assert seen.times == pytest.approx([number / 16 for number in range(30)], abs=2e-3)
    wanted = (0, 7, 8, 8, 13, 29)
    assert tuple(map(number_of, frames_of(path, wanted))) == wanted
    assert tuple(map(number_of, frames_of(path, [25, 3]))) == (25, 3)


def test_a_variable_rate_is_resampled_by_its_times(tmp_path: Path) -> None:
    times = [0, 10, 20, 500, 510, 1000, 1062, 1125, 1900, 2000]
    path = film(tmp_path / "vfr.mkv", 10, times=times)
    seen = look(path)
    assert seen.times == pytest.approx([time / 1000 for time in times], abs=2e-3)
    chosen = resampled(seen.times, 2)
    assert chosen == (0, 3, 5, 7, 9)  # at 1.5 s the frame of 1.125 is nearer than that of 1.9
    assert tuple(map(number_of, frames_of(path, chosen))) == chosen


def test_sound_is_passed_over_and_rotation_followed(tmp_path: Path) -> None:
    assert look(film(tmp_path / "loud.mp4", 9, sound=True)).size == Size(96, 64, 9)
    plain = frames_of(film(tmp_path / "plain.mp4", 3), [2])[0]
    for degrees, size in ((90, (64, 96)), (180, (96, 64)), (270, (64, 96))):
        path = film(tmp_path / f"turned{degrees}.mp4", 3, rotate=degrees)
        seen = look(path)
        assert seen.size == Size(*size, 3) and "rotated" in seen.traits
        upright = frames_of(path, [2])[0]
        assert upright.size == size
        assert np.array_equal(np.asarray(upright.rotate(degrees, expand=True)), np.asarray(plain))


def test_a_frame_is_cut_as_a_picture_is(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", 5)
    (whole,) = frames_of(path, [4])
    from whitetuner.data.media import cut

    assert np.array_equal(
        np.asarray(frames_of(path, [4], Size(32, 32))[0]), np.asarray(cut(whole, Size(32, 32)))
    )


@pytest.mark.parametrize("started", [False, True])
def test_a_stream_gives_the_frames_one_after_the_other_and_holds_a_few(
    tmp_path: Path, started: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    right = video._cut
    monkeypatch.setattr(video, "_cut", lambda picture, size: (made.append(1), right(picture, size))[1])
    wanted = (3, 3, 4, 7, 7, 8, 20, 21, 33)
    for path in (film(tmp_path / "a.mp4", 40), frames_folder(tmp_path / "frames", 40)):
        stream = FrameStream(path, wanted, Size(96, 64))
        assert len(stream) == 9 and stream
        for _ in range(2):  # a walk can be made again
            if started:
                stream.start()
            made.clear()
            for seen, (number, picture) in enumerate(zip(wanted, stream, strict=True)):
                assert number_of(picture) == number and len(made) <= seen + AHEAD + 2
        assert [number_of(one) for one in (stream[0], *stream[6:8])] == [3, 20, 21]
        stream.start()
        next(iter(stream))  # left in the middle


@pytest.mark.parametrize("always", [False, True])
def test_a_frame_that_is_lost_is_looked_for_from_the_start_and_told(
    tmp_path: Path, always: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    right = video._frames

    def losing(path: Path, container: object, stream: object) -> object:
        passes.append(1)
        for number, frame in enumerate(right(path, container, stream)):
            if number not in (20, 30) or not (always or len(passes) == 1):
                yield frame

    monkeypatch.setattr(video, "_frames", losing)
    seen: list[int] = []
    try:
        for picture in FrameStream(film(tmp_path / "a.mp4", 40), range(40), Size(96, 64)):
            seen.append(number_of(picture))
    except UserError as error:
        assert always and "2 frames cannot be decoded, the first is number 20" in str(error)
    assert seen == list(range(20 if always else 40)) and len(passes) == 2


# -- bad files -----------------------------------------------------------------------------------------------------


def said(path: Path, deep: bool = False) -> str:
    seen = look(path, deep)
    assert seen.problem is not None and seen.size is None
    return str(seen.problem)


def test_bad_files_are_told(tmp_path: Path) -> None:
    whole = film(tmp_path / "whole.mp4", 40).read_bytes()
    for name, content, message in (
        ("empty.mp4", b"", "0 bytes"),
        ("text.mp4", b"not a video at all" * 50, "damaged"),
        ("half.mp4", whole[: len(whole) // 2], "damaged|cut off"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        assert any(word in said(path) for word in message.split("|")), name
    webm = film(tmp_path / "whole.webm", 60, codec="libvpx-vp9")
    webm.write_bytes(webm.read_bytes()[: webm.stat().st_size // 3])
    assert "cut off" in said(webm) or "damaged" in said(webm)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        voice = container.add_stream("aac", rate=8000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), "fltp", "mono")
        silence.sample_rate, silence.pts = 8000, 0
        container.mux(voice.encode(silence))
        container.mux(voice.encode(None))
    assert "only sound" in said(tmp_path / "sound.mp4")


def test_a_codec_that_is_not_known_is_told(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", 9)
    path.write_bytes(
        path.read_bytes().replace(b"avc1", b"zzzz")
    )  # the sample entry's kind (ISO/IEC 14496-12, 8.5.2)
    assert "codec cannot be decoded" in said(path) and "ffmpeg" in said(path, deep=True)


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = film(tmp_path / "a.mp4", 5)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    assert "whitetuner[video]" in said(path)


def test_frame_folders_with_gaps_twins_or_mixed_sizes_are_told(tmp_path: Path) -> None:
    folder = frames_folder(tmp_path / "gap", 12)
    assert [path.name for path in frame_files(folder)][8:11] == [
        "frame_9.png",
        "frame_10.png",
        "frame_11.png",
    ]
    assert look(folder).size == Size(96, 64, 12) and look(folder).kind == "frames"
    assert tuple(map(number_of, frames_of(folder, [0, 11, 3]))) == (0, 11, 3)
    (folder / "frame_5.png").unlink()
    assert "frame 5 is missing" in said(folder)
    numbered(4).save(folder / "frame_04.png")
    numbered(4).save(folder / "frame_5.png")
    assert "two frames have the number 4" in said(folder)
    mixed = frames_folder(tmp_path / "mixed", 3)
    numbered(3, 48, 32).save(mixed / "frame_4.png")
    assert "different sizes" in said(mixed)
    numbered(3).save(mixed / "frame_4.png")
    numbered(3).save(mixed / "cover.png")
    assert "has no number" in said(mixed)


# -- clips ---------------------------------------------------------------------------------------------------------


def test_lengths_are_legal_or_the_nearest_are_named() -> None:
    assert clip_lengths(None, 81, 4) == (81,) and clip_lengths([33, 5, 33], 81, 4) == (5, 33)
    assert clip_lengths(1, 81, 4) == (1,)
    for wrong, below, above in ((16, 13, 17), (82, 81, 85), (3, 1, 5)):
        with pytest.raises(UserError, match=f"use {below} or {above}"):
            clip_lengths(wrong, 81, 4)


@pytest.mark.parametrize(
    ("source", "wanted"), [(16, 16), (24, 16), (30, 16), (60, 24), (29.97, 16), (12, 16)]
)
def test_resampling_keeps_the_time(source: float, wanted: float) -> None:
    times = [number / source for number in range(90)]
    chosen = resampled(times, wanted)
    assert len(chosen) == int(times[-1] * wanted + 1e-3) + 1
    assert all(
        abs(times[index] - number / wanted) <= 0.5 / source + 1e-5 for number, index in enumerate(chosen)
    )
    assert list(chosen) == sorted(chosen)
    if source == wanted:
        assert chosen == tuple(range(90))


def test_how_clips_are_chosen() -> None:
    times, digest = [number / 16 for number in range(41)], "0123456789abcdef0123"

    def clips(
        choice: str, count: int = 3, lengths: tuple[int, ...] = (9,), **more: object
    ) -> list[tuple[int, ...]]:
        rules = ClipRules(lengths, 16.0, choice, count, **more)  # type: ignore[arg-type]
        found = choose_clips(times, rules, digest)
        return [] if found is None else list(found.clips)

    assert clips("head") == [tuple(range(9))]
    assert [one[0] for one in clips("uniform")] == [0, 16, 32]
    assert [one[0] for one in clips("chunks")] == [0, 9, 18, 27]
    at_random = clips("random", 20)
    assert clips("random", 20) == at_random and len(set(at_random)) == len(at_random) > 5
    assert all(one == tuple(range(one[0], one[0] + 9)) and 0 <= one[0] <= 32 for one in at_random)
    assert clips("head", lengths=(5, 33, 81)) == [tuple(range(33))]
    assert clips("head", lengths=(81,)) == []
    padded = choose_clips(times, ClipRules((45,), 16.0, too_short="pad"), digest)
    assert padded is not None and padded.held == 4 and padded.clips == ((*range(41), 40, 40, 40, 40),)
    folder = choose_clips(
        [float(n) for n in range(41)], ClipRules((9,), 16.0, source_fps=32.0), digest, frames=True
    )
    assert folder is not None and folder.clips[0] == tuple(range(0, 18, 2))
    assert spans((3, 4, 5)) == "3-5" and "(4 of them)" in spans((0, 2, 4, 9))


# -- data sets -----------------------------------------------------------------------------------------------------


def data_set(folder: Path) -> Path:
    folder.mkdir()
    film(folder / "a.mp4", 20)
    film(folder / "b.mov", 12, fps=8, size=(64, 96))
    frames_folder(folder / "c", 9)
    film(folder / "short.mp4", 3)
    for name in ("a", "b", "short"):
        (folder / f"{name}.txt").write_text(f"clip {name}", encoding="utf-8")
    (folder / "c" / "caption.txt").write_text("clip c", encoding="utf-8")
    return folder


OPTIONS = {"resolution": 64, "num_frames": 9}
FILMS = Films(4, 16.0, 81, first_frame=True)


def options(folder: Path, **more: object) -> object:
    return type("Section", (), {"videos": folder, **OPTIONS, **more})()


def test_items_are_the_clips_that_check_announces(tmp_path: Path) -> None:
    folder = data_set(tmp_path / "data")
    found = scan([options(folder)], 16, films=FILMS)
    assert [(item.target.name, item.caption, item.size) for item in found.items] == [
        ("a.mp4", "clip a", Size(80, 48, 9)),
        ("b.mov", "clip b", Size(48, 80, 9)),
        ("c", "clip c", Size(80, 48, 9)),
    ]
    assert [item.clips[0] for item in found.items] == [
        tuple(range(9)),
        (0, 0, 1, 1, 2, 2, 3, 3, 4),
        tuple(range(9)),
    ]
    assert all(item.condition_sizes == (item.size._replace(frames=1),) for item in found.items)
    assert any("too short" in note and "short.mp4" in note for note in found.notes())
    report = check_sets([options(folder)], 16, films=FILMS)
    announced = {one.film.path: one.film.clips for one in report.pictures if one.film and one.film.clips}
    assert announced == {item.target: item.clips for item in found.items}
    assert report.buckets == ((Size(80, 48, 9), 2), (Size(48, 80, 9), 1)) and report.usable == 3
    text = report.as_text()
    assert "b.mov: 64x96, 8 fps, 12 frames -> 23 at 16 fps; used: 0, 0, 1, 1, ... 4 (9 of them)" in text
    assert "frames are shown twice" in text and "short.mp4: 96x64, 16 fps, 3 frames: left out" in text
    assert report.as_json()["films"][0]["clips"] == [list(range(9))]


def test_the_page_of_a_check_has_a_contact_sheet_of_every_clip(tmp_path: Path) -> None:
    report = check_sets([options(data_set(tmp_path / "data"))], 16, films=FILMS)
    page = write_check_html(report, tmp_path / "report.html").read_text(encoding="utf-8")
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(one))) for one in re.findall(r"base64,([\w+/=]+)", page)
    ]
    sheets = [one for one in pictures if one.width > 3 * 16 and one.height > 2 * 14]
    wanted = contact_sheet(
        [numbered(0, 24, 16).resize((20, 16))] * 8
    )  # a quarter of 80 x 48, at least 16, eight of nine frames
    assert [one.size for one in sheets if one.size == wanted.size] == [
        wanted.size
    ] * 2  # a.mp4 and the folder; b.mov is upright
    assert len(pictures) == 2 * 3, "the clips that are used, each with its sheet"


def test_several_clips_of_a_video_are_items_of_their_own_and_random_ones_one_item(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    film(folder / "a.mp4", 40)
    chunks = scan([options(folder, clips="chunks", default_caption="x")], 16, films=FILMS).items
    assert [item.clips[0][0] for item in chunks] == [0, 9, 18, 27] and len({item.id for item in chunks}) == 4
    (one,) = scan(
        [options(folder, clips="random", clips_per_video=5, default_caption="x")], 16, films=FILMS
    ).items
    assert 1 < len(one.clips) <= 5


def test_a_renamed_clip_keeps_its_id_and_other_frames_change_the_digest(tmp_path: Path) -> None:
    folder = data_set(tmp_path / "data")
    before = scan([options(folder)], 16, films=FILMS)
    (folder / "a.mp4").rename(folder / "z.mp4")
    (folder / "a.txt").rename(folder / "z.txt")
    after = scan([options(folder)], 16, films=FILMS)
    assert {item.id for item in before.items} == {item.id for item in after.items}
    assert before.digest() == after.digest()
    assert scan([options(folder, fps=8.0)], 16, films=FILMS).digest() != before.digest()
    digest = content_digests([folder / "c"])
    numbered(77).save(folder / "c" / "frame_9.png")
    assert content_digests([folder / "c"]) != digest


def test_nothing_long_enough_an_illegal_length_and_missing_captions_are_told(tmp_path: Path) -> None:
    folder = data_set(tmp_path / "data")
    with pytest.raises(UserError, match="no video of the data set is long enough"):
        scan([options(folder, num_frames=81)], 16, films=FILMS)
    with pytest.raises(UserErrors, match="use 13 or 17"):
        scan([options(folder, num_frames=16)], 16, films=FILMS)
    (folder / "a.txt").unlink()
    with pytest.raises(UserErrors, match="beside the clip"):
        scan([options(folder)], 16, films=FILMS)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "x.gif").write_bytes(b"GIF89a")
    with pytest.raises(UserErrors, match="no videos"):
        scan([options(empty)], 16, films=FILMS)
    assert list_videos(folder / "c", ".txt", False).pictures == (folder / "c",)
