"""Rendered copies show what their plan says."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from video.clipmaker import counter_frame, cut, index_of, make_clip, rotate_mp4

from vkd.clips import Clip, Sampling, View
from vkd.copies import Copies, Copy, plan
from vkd.errors import VideoError
from vkd.store import files
from vkd.video import render
from vkd.video.access import Access
from vkd.video.decode import decode_clip, probe
from vkd.video.edits import edit_of, fitted
from vkd.video.render import Rendering, Shrinking, encode, read

FPS, SIZE_PX = 8.0, 64


def counted(first: int, num_frames: int, size_px: tuple[int, int] = (96, 64)) -> np.ndarray:
    return np.stack([counter_frame(first + i, *size_px) for i in range(num_frames)])


def square(frame: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(frame).resize((SIZE_PX, SIZE_PX), Image.Resampling.BILINEAR)).astype(int)


def decoded(path: str, num_frames: int) -> list[np.ndarray]:
    """Every frame of a copy, by the decoder that labels are made with."""
    (frames,) = decode_clip(
        Clip(path, 0.0, num_frames / FPS, View("frame"), ""), [Sampling(num_frames=num_frames, size_px=SIZE_PX, mode="fps", fps=FPS)]
    )
    return [frame.astype(int) for frame in frames]


def test_partial_copies_show_the_source_where_they_say(tmp_path: Path) -> None:
    how = Copies(out=str(tmp_path), partial=1.0, per_video=5)
    frames = {"a": counted(0, 30), "b": counted(128, 50, (64, 96))}
    small = {name: str(tmp_path / f"{name}.mp4") for name in frames}
    for name, own in frames.items():
        files.put(small[name], encode(own, FPS, 12))
    copies = plan(how, {"a": 30, "b": 50}, {"a": "train", "b": "train"})[:5]
    assert len({type(copy.look) for copy in copies}) > 1
    targets = {copy: str(tmp_path / copy.name(how)) for copy in copies}
    render.render(Rendering(tuple(targets.items()), small, FPS))
    for copy, target in targets.items():
        part = copy.pasted
        assert part is not None
        edit = edit_of(copy.look, (96, 64))
        known = [square(fitted(edit(frame, 0), (64, 96))) for frame in frames["a"]] + [square(frame) for frame in frames["b"]]
        expected = [n if n >= 0 else 30 + ~n for n in copy.shown]
        found = [int(np.argmin([np.abs(frame - other).mean() for other in known])) for frame in decoded(target, len(copy.shown))]
        assert found == expected
        inside = [part.first <= i < part.first + part.num_frames for i in range(len(found))]
        assert [n < 30 for n in found] == inside


def test_a_copy_of_the_whole_has_its_frames_in_the_planned_order(tmp_path: Path) -> None:
    small, target = str(tmp_path / "small.mp4"), str(tmp_path / "copy.mp4")
    files.put(small, encode(counted(0, 20), FPS, 12))
    copy = Copy("a", 0, "reversal", tuple(range(19, -1, -1)))
    render.render(Rendering(((copy, target),), {"a": small}, FPS))
    assert [index_of(frame) for frame in read(target)] == list(copy.shown)
    before = Path(target).read_bytes(), Path(target).stat().st_mtime_ns
    Path(target).unlink()
    render.render(Rendering(((copy, target),), {"a": small}, FPS))
    assert (Path(target).read_bytes(), Path(target).stat().st_mtime_ns) == before


def shrunk(path: Path, how: Copies, folder: Path) -> VideoError | None:
    return render.shrink(Shrinking(str(path), probe(str(path)), str(folder / "small"), how, Access()))


def test_a_small_version_shows_each_moment_of_its_source(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "in.mp4", [i / 24 for i in range(96)], size_px=(192, 128))
    assert shrunk(source, Copies(out="/x", side_px=64, max_length_s=3), tmp_path) is None
    frames = read(str(tmp_path / "small-24.mp4"))
    assert frames.shape == (24, 64, 96, 3)
    assert [index_of(frame) for frame in frames] == [3 * i for i in range(24)]


def test_a_turned_source_is_upright_and_never_made_larger(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "in.mp4", [i / 25 for i in range(50)])
    rotate_mp4(source, 90)
    assert shrunk(source, Copies(out="/x"), tmp_path) is None
    frames = read(str(tmp_path / "small-16.mp4"))
    assert frames.shape == (16, 96, 64, 3)
    assert [index_of(np.rot90(frame)) for frame in frames] == [int(25 * i / 8) for i in range(16)]


def test_a_damaged_source_is_told(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "in.mkv", [i / 25 for i in range(100)])
    info = probe(str(source))
    cut(source, 0.5)
    error = render.shrink(Shrinking(str(source), info, str(tmp_path / "small"), Copies(out="/x"), Access()))
    assert isinstance(error, VideoError)
    assert error.kind == "truncated"
    assert list(tmp_path.glob("small*")) == []


@pytest.mark.parametrize("fps", [8.0, 7.5, 1.0])
def test_encoding_keeps_times_and_even_sides(fps: float) -> None:
    data = encode(counted(0, 5, (104, 66))[:, :65, :99], fps, 23)
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
    assert [frame.time for frame in frames] == pytest.approx([i / fps for i in range(5)])
    assert (frames[0].width, frames[0].height) == (98, 64)
