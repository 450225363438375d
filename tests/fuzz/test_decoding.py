"""Damaged videos: each is decoded or rejected with a reason, none takes its child down without being told, none takes long."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import damage
import numpy as np
import pytest

from vkd.clips import MAX_DURATION_S, Clip, ClipPlan, Sampling, View
from vkd.errors import VideoError
from vkd.stages import decode_or_reject
from vkd.store.labelset import Reject
from vkd.video.guard import Guard
from vkd.video.settings import Limits, Settings

REPOSITORY = Path(__file__).parents[2]
SETTINGS = Settings((Sampling(num_frames=2, size_px=32),), limits=Limits(20.0, 1.0, 1 << 30))
KNOWN = {  # every reason that damage may be given
    "not_a_video", "no_video_stream", "truncated", "decode_error", "empty", "too_large", "bad_duration", "out_of_memory", "deadline",
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(clips_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return damage.write_sources([clips_dir / "carphone_distorted.mp4"], tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def jpegs(sources: Sequence[Path]) -> Path:
    return next(path for path in sources if path.suffix == ".mov")


def whole(path: Path) -> Clip:
    return Clip(str(path), 0.0, None, View(), path.name)


def test_damage_is_the_same_for_the_same_seed(sources: Sequence[Path], tmp_path: Path) -> None:
    count = len(damage.DAMAGES)
    one, same, other = (damage.write_damaged(sources, tmp_path / name, count, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in same]
    assert [path.read_bytes() for path in one] != [path.read_bytes() for path in other]


def test_damaged_files_are_labelled_or_rejected_with_a_reason(sources: Sequence[Path], tmp_path: Path) -> None:
    assert_survived(sources, damage.write_damaged(sources, tmp_path, 63))


@pytest.mark.slow
def test_a_thousand_damaged_files(sources: Sequence[Path], corpus: Path, tmp_path: Path) -> None:
    made = damage.write_sources([*sources, *damage.smallest(corpus)], tmp_path / "sources")
    assert_survived(sources, damage.write_damaged(made, tmp_path / "damaged", 1000, seed=1))


@pytest.mark.slow
def test_the_pipeline_survives_a_thousand_damaged_files(corpus: Path) -> None:
    done = subprocess.run([sys.executable, "bench/fuzz.py", "--json"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["intact_labelled"] == told["intact"]
    assert told["lost"] == told["over_deadline"] == 0
    assert told["planned"] + told["rejected_when_listed"] == told["files"] == told["intact"] + 1000


def assert_survived(sources: Sequence[Path], damaged: Sequence[Path]) -> None:
    """Damaged and intact files in turns: what becomes of each."""
    clips = [clip for path in damaged for clip in (whole(path), whole(sources[0]))]
    found = list(decode_or_reject(clips, SETTINGS))
    reasons = Counter(each.kind for each in found[::2] if isinstance(each, Reject))
    assert set(reasons) <= KNOWN, [each for each in found if isinstance(each, Reject) and each.kind not in KNOWN]
    assert reasons["not_a_video"] and reasons["truncated"]
    assert not any(isinstance(each, Reject) for each in found[1::2])


def test_headers_that_say_a_duration_which_no_file_holds(sources: Sequence[Path], tmp_path: Path) -> None:
    """Such a video is rejected by name when it is listed; a plan made of its word would have millions of rows."""
    data, path = sources[0].read_bytes().replace(b"elst", b"free"), tmp_path / "endless.mp4"
    place = data.index(b"mdhd") + 16
    path.write_bytes(data[:place] + (1).to_bytes(4, "big") + data[place + 4 :])  # one tick a second
    decoder = Guard(SETTINGS)
    with pytest.raises(VideoError) as caught:
        decoder.probe(str(path))
    assert caught.value.kind == "bad_duration"
    (error,) = decoder.decode([whole(path)])
    assert isinstance(error, VideoError) and error.kind == "bad_duration"


@pytest.mark.parametrize("duration_s", [1e9, 1e308, float("inf"), float("nan"), -5.0, 2 * MAX_DURATION_S])
def test_a_plan_of_an_impossible_duration_is_one_clip_which_decoding_rejects(sources: Sequence[Path], duration_s: float) -> None:
    for plan in (ClipPlan(plan="windows", length_s=1.0), ClipPlan(plan="count", count=10**6), ClipPlan()):
        ((start_s, end_s),) = plan.spans_s(duration_s)
    (error,) = Guard(SETTINGS).decode([Clip(str(sources[0]), start_s, end_s, View(), "key")])
    assert duration_s == -5.0 or (isinstance(error, VideoError) and error.kind == "bad_span")


@pytest.mark.parametrize("px", [16_000, damage.HUGE_PX])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("backend", ["auto", "decord", "pyav"])
def test_a_stream_of_larger_frames_than_its_header_says(jpegs: Path, tmp_path: Path, px: int, first: int, backend: str) -> None:
    """The container says 96 x 64; from frame `first` on, the frames say otherwise, with enough bytes to be believed."""
    with av.open(str(jpegs)) as old, av.open(str(tmp_path / "large.avi"), "w") as new:
        stream = old.streams.video[0]
        target = new.add_stream_from_template(stream)
        for index, packet in enumerate(list(old.demux(stream))[: first + 1]):
            data = bytes(packet) if index < first else damage.large_jpeg(bytes(packet)[:-2], px) + bytes(px * px // 200) + b"\xff\xd9"
            large = av.Packet(data)
            large.pts = large.dts = index
            large.time_base, large.stream, large.is_keyframe = Fraction(1, 25), target, True
            new.mux(large)
    (error,) = Guard(Settings((Sampling(num_frames=8, size_px=32),), backend, limits=SETTINGS.limits)).decode(
        [whole(tmp_path / "large.avi")]
    )
    # decord scales a later frame to the size of the first
    assert (first == 1 and backend != "pyav") or isinstance(error, VideoError), np.shape(error)
    assert not isinstance(error, VideoError) or error.kind in {"too_large", "truncated", "decode_error", "out_of_memory"}


def test_memory_that_ffmpeg_does_not_get_is_named(jpegs: Path, tmp_path: Path) -> None:
    with av.open(str(tmp_path / "wide.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 8000, 4000, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((6000, 8000), np.uint8), format="yuv420p")))
        container.mux(stream.encode(None))
    tight = Settings(SETTINGS.samplings, "pyav", limits=Limits(20.0, 1.0, 200 << 20))
    (error,) = Guard(tight).decode([whole(tmp_path / "wide.avi")])
    assert isinstance(error, VideoError)
    assert error.kind == "out_of_memory", error.what


@pytest.mark.parametrize("backend", ["auto", "decord"])
def test_a_webm_whose_packets_all_sit_near_zero(clips_dir: Path, tmp_path: Path, backend: str) -> None:
    """Old decord never returns from this one. Whatever the decoder makes of it: an answer, and others go on."""
    path = tmp_path / "odd.webm"
    with av.open(str(clips_dir / "carphone_distorted.mp4")) as old, av.open(str(path), "w") as new:
        stream = new.add_stream("libvpx-vp9", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for frame in old.decode(video=0):
            small = frame.reformat(96, 64, "yuv420p")
            small.pts = None
            new.mux(stream.encode(small))
        new.mux(stream.encode(None))
    decoder = Guard(Settings(SETTINGS.samplings, backend, limits=Limits(6.0, 0.0, 1 << 30)))
    odd, after = decoder.decode([whole(path), whole(clips_dir / "carphone_distorted.mp4")])
    assert not isinstance(odd, VideoError) or odd.kind in KNOWN
    assert not isinstance(after, VideoError)
